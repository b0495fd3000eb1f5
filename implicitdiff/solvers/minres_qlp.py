"""MINRES-QLP for symmetric A, singular or not: the solution of least squares that has the least norm.

The Lanczos process of MINRES with a second set of reflections: the tridiagonal matrix becomes Q L P, L lower
triangular, instead of Q R. Where A is singular, the last diagonal entry of L vanishes, and with the coordinate that
belongs to it left out x has the least norm, whether b is in the range of A or not; where A is ill-conditioned, x is
more accurate than that of MINRES.

References
----------
S.-C. T. Choi, C. C. Paige, M. A. Saunders, "MINRES-QLP: a Krylov subspace method for indefinite or singular symmetric
systems", SIAM J. Sci. Comput. 33 (2011) 1810-1836. DOI 10.1137/100787921
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.outcome import Status
from implicitdiff.solvers.base import Cycle, KrylovState, Start, Structure, without_preconditioner
from implicitdiff.solvers.least_squares import LeastSquaresKrylov
from implicitdiff.solvers.rotations import ratio, rotation
from implicitdiff.tolerances import NULL_VECTOR

__all__ = ["MINRESQLP"]


class _Lanczos(NamedTuple):
    r1: Array  # vectors before the preconditioner: the last but one,
    r2: Array  # the last,
    y: Array  # and M r2
    beta: Array
    beta_old: Array


class _Left(NamedTuple):
    """Of the reflections from the left, Q."""

    cs: Array
    sn: Array
    dbar: Array
    epsilon: Array
    phi: Array  # ‖r‖


class _Right(NamedTuple):
    """Of the reflections from the right, P: rows of L hold η, ϑ and, on the diagonal, γ."""

    cs: Array  # of the one that is applied in the next step
    sn: Array
    gamma: Array
    gamma_1: Array  # of the row before
    theta: Array
    theta_1: Array
    eta: Array
    eta_1: Array


class _Found(NamedTuple):
    """x = x₂ + u₁ w₁ + u w, where x₂ is final and the rest is not."""

    x2: Array
    w1: Array
    w: Array
    u: Array
    u1: Array
    u2: Array  # of coordinates that are final
    u3: Array
    tau: Array
    tau_1: Array


class _State(NamedTuple):
    lanczos: _Lanczos
    left: _Left
    right: _Right
    found: _Found
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    operator_norm: Array
    gain: Array


@dataclass(frozen=True, eq=False, repr=False)
class MINRESQLP(LeastSquaresKrylov):
    """Minimum residuals of least norm: symmetric A, indefinite or singular, products only.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in single),
    ``maxiter``, ``preconditioner`` (symmetric positive definite, ≈ ``|A|⁻¹``; the norm that is least is then that of
    M⁻¹), ``damping`` (δ of A + δI).

    Where b is not in the range of A, it ends as `Status.LEAST_SQUARES`, with x at hand.

    Parameters
    ----------
    rtol, maxiter, preconditioner, damping
        See above.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.array([[1.0, 1.0], [1.0, 1.0]])
    >>> np.round(linear_solve(A, np.array([2.0, 2.0]), solver="minres_qlp"), 6)
    array([1., 1.])
    """

    name: ClassVar[str] = "minres_qlp"
    structure: ClassVar[Structure] = "symmetric"

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run MINRES-QLP from x with residual r until φ reaches the target."""
        product, precondition = state.operator.matvec, state.preconditioner
        y = space.copy(precondition(start.r))
        square = space.inner(start.r, y)
        beta, zero, one = space.sqrt(square), space.scalar(0.0), space.scalar(1.0)
        status = space.where(square < 0, int(Status.BAD_PRECONDITIONER), space.counter())
        rr = square if precondition.identity else space.inner(start.r, start.r)
        first = _State(
            _Lanczos(space.zeros(), start.r, y, beta, zero),
            _Left(zero - 1, zero, zero, zero, beta),
            _Right(zero - 1, zero, zero, zero, zero, zero, zero, zero),
            _Found(space.zeros(), space.zeros(), space.zeros(), zero, zero, zero, zero, zero, zero),
            start.active & (status == 0), status, space.counter(), 0, zero, zero,
        )  # fmt: skip
        target = start.target if precondition.identity else 0.1 * start.target * beta / space.sqrt(rr)

        def step(s: _State) -> _State:
            return _step(s, space, product, precondition, target, start.budget)

        most, loop = self.most(space.length), state.operator.backend.while_loop
        end = loop(lambda s: space.any(s.active), step, first, limit=most)
        f = end.found
        x = space.axpy(f.u, f.w, space.axpy(f.u1, f.w1, space.axpy(one, f.x2, start.x)))
        norm = end.operator_norm
        norm = norm if precondition.identity else without_preconditioner(space, norm, rr, square)
        return Cycle(x, end.iterations, end.matvecs, end.status, norm, gain=end.gain)


def _step(s: _State, space: Any, product: Any, precondition: Any, target: Array, budget: Array) -> _State:
    zero = space.scalar(0.0)
    lanczos, v, alpha, square, usable = _lanczos(s, space, product, precondition)
    beta, q = lanczos.beta, s.left
    delta, gbar = q.cs * q.dbar + q.sn * alpha, q.sn * q.dbar - q.cs * alpha
    epsilon, dbar = q.sn * beta, -q.cs * beta
    above = space.where(s.lanczos.beta_old > 0, s.lanczos.beta, zero)
    norm = space.sqrt(alpha * alpha + beta * beta + above * above)
    running = space.maximum(s.operator_norm, space.where(usable, norm, zero))
    # ‖A r‖ = φ · root, for the residual of the step before: where it vanishes, that one was of least squares, and this
    # last step sets the coordinate along the null vector to zero.
    root = space.sqrt(gbar * gbar + dbar * dbar)
    least = usable & (root <= NULL_VECTOR.of(space.eps) * running)
    cs, sn, gamma = rotation(space, gbar, beta)
    tau, phi = cs * q.phi, sn * q.phi
    finite = space.isfinite(gamma)
    go = usable & finite
    right, found, diagonal = _right(s, space, go, (delta, epsilon, gamma, tau), v, least)
    status = space.where(s.active & (least | ~usable), int(Status.LEAST_SQUARES), s.status)
    status = space.where(s.active & (square < 0), int(Status.BAD_PRECONDITIONER), status)
    status = space.where(s.active & ~finite, int(Status.NON_FINITE), status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & (status == 0) & (phi > target) & (iterations < budget)
    gain = space.maximum(s.gain, space.where(go & ~least, ratio(space, space.scalar(1.0), diagonal), zero))
    left = _Left(cs, sn, dbar, epsilon, phi)
    return _State(lanczos, left, right, found, active, status, iterations, s.matvecs + 1, running, gain)


def _lanczos(s: _State, space: Any, product: Any, precondition: Any) -> tuple[_Lanczos, Array, Array, Array, Array]:
    """Take the next step of the process; v is zero in items that have stopped."""
    zero, one, k = space.scalar(0.0), space.scalar(1.0), s.lanczos
    usable = s.active & (k.beta > 0)
    inverse = space.where(usable, one / space.where(usable, k.beta, one), zero)
    v = space.scale(inverse, k.y)
    y = space.copy(product(v))
    later = usable & (k.beta_old > 0)
    y = space.axpy(-space.where(later, ratio(space, k.beta, k.beta_old), zero), k.r1, y)
    alpha = space.inner(v, y)
    y = space.axpy(-alpha * inverse, k.r2, y)
    z = y if precondition.identity else precondition(y)
    square = space.inner(y, z)
    beta = space.sqrt(square)
    return _Lanczos(k.r2, y, space.copy(z), beta, space.where(usable, k.beta, zero)), v, alpha, square, usable


def _right(
    s: _State, space: Any, go: Array, column: tuple[Array, ...], v: Array, least: Array
) -> tuple[_Right, _Found, Array]:
    """Reflect from the right, and move x."""
    zero, one, p, f = space.scalar(0.0), space.scalar(1.0), s.right, s.found
    delta, epsilon, gamma, tau = column
    third = s.iterations > 1
    cs2, sn2 = space.where(third, p.cs, -one), space.where(third, p.sn, zero)
    theta_1, delta = cs2 * p.theta + sn2 * delta, sn2 * p.theta - cs2 * delta
    eta, gamma = sn2 * gamma, -cs2 * gamma
    cs1, sn1, gamma_1 = rotation(space, p.gamma, delta)
    later = s.iterations > 0
    cs1, sn1 = space.where(later, cs1, -one), space.where(later, sn1, zero)
    gamma_1 = space.where(later, gamma_1, zero)
    theta, gamma = sn1 * gamma, -cs1 * gamma
    u2 = ratio(space, f.tau_1 - p.eta_1 * f.u3 - p.theta_1 * f.u2, p.gamma_1)
    u2 = space.where(third, u2, zero)
    u1 = space.where(later, ratio(space, f.tau - p.eta * f.u2 - theta_1 * u2, gamma_1), zero)
    u = space.where(least, zero, ratio(space, tau - eta * u2 - theta * u1, gamma))
    w1, w, x2 = _vectors(space, go, (cs1, sn1, cs2, sn2), u2, v, f)
    cs, sn, ahead = rotation(space, gamma_1, epsilon)
    u, u1, u2, u3 = (space.where(go, new, old) for new, old in ((u, f.u), (u1, f.u1), (u2, f.u2), (f.u2, f.u3)))
    found = _Found(x2, w1, w, u, u1, u2, u3, tau, f.tau)
    return _Right(cs, sn, gamma, ahead, theta, theta_1, eta, p.eta), found, abs(gamma)


def _vectors(
    space: Any, go: Array, reflections: tuple[Array, ...], u2: Array, v: Array, f: _Found
) -> tuple[Array, Array, Array]:
    """Return w₁, w and x₂, which stay as they are in items that have stopped."""
    zero, one = space.scalar(0.0), space.scalar(1.0)
    cs1, sn1, cs2, sn2 = reflections

    def where(new: Array, old: Array) -> Array:
        return space.where(go, new, old)

    x2 = space.axpy(where(u2 * cs2, zero), f.w1, space.axpy(where(u2 * sn2, zero), v, f.x2))
    w1 = space.scale(where(sn1 * sn2, one), space.copy(f.w1))
    w1 = space.axpy(where(cs1, zero), f.w, space.axpy(where(-sn1 * cs2, zero), v, w1))
    w = space.axpy(where(cs1 * cs2, zero), v, space.scale(where(sn1, one), f.w))
    w = space.axpy(where(-cs1 * sn2, zero), f.w1, w)
    return w1, w, x2
