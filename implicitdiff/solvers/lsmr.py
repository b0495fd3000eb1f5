"""LSMR for least-squares problems: any A, rectangular or singular, from products with A and Aᵀ.

The Golub-Kahan process makes A bidiagonal, and x minimises ‖Aᵀ(b − A x)‖ over the Krylov space of AᵀA: it is MINRES on
the normal equations, without their rounding. Started from zero it stays in the range of Aᵀ, so that of all solutions of
least squares it finds the one of least norm.

References
----------
D. C.-L. Fong, M. A. Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J. Sci. Comput. 33
(2011) 2950-2971. DOI 10.1137/10079687X
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.outcome import Status
from implicitdiff.solvers.base import Cycle, KrylovState, Start
from implicitdiff.solvers.least_squares import LeastSquaresKrylov
from implicitdiff.solvers.rotations import ratio, rotation

__all__ = ["LSMR"]


class _State(NamedTuple):
    x: Array
    u: Array
    v: Array
    h: Array
    hbar: Array
    alpha: Array
    alphabar: Array
    rho: Array
    rhobar: Array
    cbar: Array
    sbar: Array
    zetabar: Array  # ‖Aᵀ r‖, with its sign
    zeta: Array
    betadd: Array
    betad: Array  # from here on for ‖r‖
    rhod: Array
    thetatilde: Array
    tautilde: Array
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    operator_norm: Array
    gain: Array


@dataclass(frozen=True, eq=False, repr=False)
class LSMR(LeastSquaresKrylov):
    """Least squares by products with A and Aᵀ: any A, singular or rectangular; of least norm where x is not unique.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in single),
    ``maxiter``, ``preconditioner`` (≈ A⁻¹, with its transpose; the norm that is least is then that of M⁻¹ x), and
    ``damping``: δ of A + δI where A is square. Where it is not, δ is Tikhonov's: x minimises ‖b − A x‖² + δ² ‖x‖².

    Where b is not in the range of A, it ends as `Status.LEAST_SQUARES`, with x at hand.

    Parameters
    ----------
    rtol, maxiter, preconditioner, damping
        See above.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> x, report = linear_solve(A, np.array([0.0, 1.0, 3.0]), solver="lsmr", return_report=True)
    >>> np.round(x, 6), report.status.name
    (array([-0.166667,  1.5     ]), 'LEAST_SQUARES')
    """

    name: ClassVar[str] = "lsmr"
    square: ClassVar[bool] = False

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run LSMR from x with residual r until its estimate of ‖r‖, or of ‖Aᵀ r‖, reaches the target."""
        op, precondition = state.operator, state.preconditioner
        product, transposed, back = op.matvec, op.rmatvec, precondition.transpose()
        if not precondition.identity:
            product = lambda v: op.matvec(precondition(v))  # noqa: E731
            transposed = lambda u: back(op.rmatvec(u))  # noqa: E731
        zero, one = space.scalar(0.0), space.scalar(1.0)
        u, beta = _unit(space, space.copy(start.r))
        v, alpha = _unit(space, space.copy(transposed(u)))
        nothing = start.active & ~(alpha > 0)  # r is orthogonal to the range: x is the solution of least squares
        finite = space.isfinite(alpha)
        bad = space.where(finite, int(Status.LEAST_SQUARES), int(Status.NON_FINITE))
        status = space.where(nothing, bad, space.counter())
        first = _State(
            space.zeros(), u, v, space.copy(v), space.zeros(), alpha, alpha, one, one, one, zero, alpha * beta, zero,
            beta, zero, one, zero, zero, start.active & ~nothing, status, space.counter(), 1, zero, zero,
        )  # fmt: skip
        target = start.target

        def step(s: _State) -> _State:
            return _step(s, space, product, transposed, target, 10 * space.eps, start.budget)

        most, loop = self.most(space.length), op.backend.while_loop
        end = loop(lambda s: space.any(s.active), step, first, limit=most)
        d = precondition(end.x)
        x = space.axpy(one, d, start.x)
        return Cycle(x, end.iterations, end.matvecs, end.status, end.operator_norm, gain=end.gain)


def _unit(space: Any, x: Array) -> tuple[Array, Array]:
    """x / ‖x‖ and ‖x‖; zeros where x is zero."""
    norm = space.norm(x)
    one, zero = space.scalar(1.0), space.scalar(0.0)
    return space.scale(space.where(norm > 0, one / space.where(norm > 0, norm, one), zero), x), norm


def _step(
    s: _State, space: Any, product: Any, transposed: Any, target: Array, level: float, budget: Array
) -> _State:  # fmt: skip
    zero, one = space.scalar(0.0), space.scalar(1.0)
    # an item that has stopped keeps its vectors, whatever the others do
    go = space.where(s.active, one, zero)
    u, beta = _unit(space, space.axpy(-s.alpha, s.u, space.copy(product(s.v))))
    v, alpha = _unit(space, space.axpy(-beta, s.v, space.copy(transposed(u))))
    c, sn, rho = rotation(space, s.alphabar, beta)
    theta, alphabar, thetabar = sn * alpha, c * alpha, s.sbar * rho
    cbar, sbar, rhobar = rotation(space, s.cbar * rho, theta)
    zeta, zetabar = cbar * s.zetabar, -sbar * s.zetabar
    hbar = space.axpy(one, s.h, space.scale(-ratio(space, thetabar * rho, s.rho * s.rhobar), s.hbar))
    x = space.axpy(go * ratio(space, zeta, rho * rhobar), hbar, s.x)
    h = space.axpy(one, v, space.scale(-ratio(space, theta, rho), s.h))
    # ‖r‖, from the factors
    betahat, betadd = c * s.betadd, -sn * s.betadd
    ctilde, stilde, rhotilde = rotation(space, s.rhod, thetabar)
    thetatilde, rhod = stilde * rhobar, ctilde * rhobar
    betad = ctilde * betahat - stilde * s.betad
    tautilde = ratio(space, s.zeta - s.thetatilde * s.tautilde, rhotilde)
    tau = ratio(space, zeta - thetatilde * tautilde, rhod)
    residual = space.sqrt((betad - tau) * (betad - tau) + betadd * betadd)
    norm = space.maximum(s.operator_norm, space.sqrt(s.alpha * s.alpha + beta * beta))
    finite = space.isfinite(alpha) & space.isfinite(rho)
    least = abs(zetabar) <= level * norm * residual
    done = s.active & finite & (residual > target) & (least | (alpha == 0))
    status = space.where(done, int(Status.LEAST_SQUARES), s.status)
    status = space.where(s.active & ~finite, int(Status.NON_FINITE), status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = s.active & (status == 0) & (residual > target) & (iterations < budget)
    gain = space.maximum(s.gain, space.where(s.active & (rho > 0), ratio(space, one, rho), zero))
    return _State(
        x, u, v, h, hbar, alpha, alphabar, rho, rhobar, cbar, sbar, zetabar, zeta, betadd, betad, rhod, thetatilde,
        tautilde, active, status, iterations, s.matvecs + 2, space.where(s.active, norm, s.operator_norm), gain,
    )  # fmt: skip
