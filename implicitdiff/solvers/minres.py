"""MINRES for symmetric A, definite or not.

The Lanczos process builds an orthonormal basis in which A is tridiagonal; Givens rotations keep its QR
factorisation, and x minimises ‖b − A x‖ over the Krylov space. The norm of the residual, φ, comes with the
rotations, so the stopping test costs nothing; it is ‖r‖ / ‖b‖, not ‖r‖ / (‖A‖ ‖x‖), which calls a solution
with a residual of 60 % a success when A is ill-conditioned.

References
----------
C. C. Paige, M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
Anal. 12 (1975) 617-629. DOI 10.1137/0712047
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.outcome import Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start, Structure, without_preconditioner
from implicitdiff.tolerances import NULL_VECTOR

__all__ = ["MINRES"]


class _State(NamedTuple):
    x: Array
    r1: Array  # Lanczos vectors before the preconditioner: the last but one,
    r2: Array  # the last,
    y: Array  # and M r2
    w1: Array
    w2: Array
    beta: Array
    beta_old: Array
    dbar: Array
    epsilon: Array
    cs: Array
    sn: Array
    phi: Array
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    operator_norm: Array
    gain: Array  # 1 / the smallest diagonal entry of R: a lower bound of ‖A⁻¹‖
    memory: Any = None  # takes pairs (p, A p), where they are kept


@dataclass(frozen=True, eq=False, repr=False)
class MINRES(Krylov):
    """Minimum residuals: symmetric A, indefinite or singular but consistent, products only.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in
    single; relative to ‖b‖, checked on the true residual), ``maxiter`` (default 10 n, within 1 000 to
    100 000), ``preconditioner`` (symmetric positive definite, ≈ ``|A|⁻¹``), ``damping`` (δ of A + δI).

    Parameters
    ----------
    recycle : int, default 0
        How many pairs (p, A p) of earlier solves of a sequence to keep, as in `CG`. They are kept while A is positive
        definite as far as it is seen; of any other only the starts are shared.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.diag([2.0, -1.0])
    >>> np.round(linear_solve(A, np.array([1.0, 1.0]), solver="minres"), 6)
    array([ 0.5, -1. ])
    """

    recycle: int = 0

    name: ClassVar[str] = "minres"
    structure: ClassVar[Structure] = "symmetric"
    monotone: ClassVar[bool] = True
    consistent: ClassVar[bool] = True

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run MINRES from x with residual r until φ reaches the target."""
        product, precondition = state.operator.matvec, state.preconditioner
        # y is handed over below, so it must not be r itself, nor memory of the user's.
        y = space.copy(precondition(start.r))
        square = space.inner(start.r, y)
        beta = space.sqrt(square)
        zero = space.scalar(0.0)
        status = space.where(square < 0, int(Status.BAD_PRECONDITIONER), space.counter())
        rr = square if precondition.identity else space.inner(start.r, start.r)
        first = _State(
            start.x, space.zeros(), start.r, y, space.zeros(), space.zeros(), beta, zero, zero, zero,
            zero - 1, zero, beta, start.active & (status == 0), status, space.counter(), 0, zero, zero,
            start.memory and start.memory.begun(space),
        )  # fmt: skip
        # φ is a norm in M; without M it is the residual itself. With M, one decimal more is asked for
        # and the driver has the last word on the true residual.
        target = start.target if precondition.identity else 0.1 * start.target * beta / space.sqrt(rr)

        def step(s: _State) -> _State:
            return _step(s, space, product, precondition, target, start.budget)

        most, loop = self.most(space.length), state.operator.backend.while_loop
        end = loop(lambda s: space.any(s.active), step, first, limit=most)
        norm = end.operator_norm
        norm = norm if precondition.identity else without_preconditioner(space, norm, rr, square)
        return Cycle(end.x, end.iterations, end.matvecs, end.status, norm, gain=end.gain, memory=end.memory)


def _step(s: _State, space: Any, product: Any, precondition: Any, target: Array, budget: Array) -> _State:
    zero, one = space.scalar(0.0), space.scalar(1.0)
    usable = s.active & (s.beta > 0)
    inverse = space.where(usable, one / space.where(usable, s.beta, one), zero)
    v = space.scale(inverse, s.y)
    y = space.copy(product(v))
    memory = s.memory and s.memory.conjugated(space, v, y, s.beta, usable)  # before y is overwritten
    later = usable & (s.beta_old > 0)  # from the second step on; an item that has stopped does nothing any more: v = 0
    ratio = space.where(later, s.beta / space.where(later, s.beta_old, one), zero)
    y = space.axpy(-ratio, s.r1, y)
    alpha = space.inner(v, y)
    y = space.axpy(-alpha * inverse, s.r2, y)
    z = y if precondition.identity else precondition(y)
    square = space.inner(y, z)
    beta = space.sqrt(square)
    # the new column of the tridiagonal matrix, rotated twice
    delta = s.cs * s.dbar + s.sn * alpha
    gbar = s.sn * s.dbar - s.cs * alpha
    gamma = space.sqrt(gbar * gbar + beta * beta)
    norm = space.sqrt(alpha * alpha + beta * beta + space.where(later, s.beta * s.beta, zero))
    finite = space.isfinite(gamma)
    # ‖A r‖ = φ · root: where root vanishes against ‖A‖, r is orthogonal to the range of A, and x already is the
    # least-squares solution of an inconsistent system. Another step would go along a null vector.
    root = space.sqrt(gbar * gbar + (s.cs * beta) ** 2)
    # (Lost orthogonality keeps root above about sqrt(eps), which is the limit; a regular A of condition 3e7, or
    # 1e5 in single precision, cannot be told from a singular one here.)
    running = space.maximum(s.operator_norm, norm)
    go = usable & finite & (root > NULL_VECTOR.of(space.eps) * running) & (gamma > space.eps * norm)
    safe = space.where(go, gamma, one)
    cs, sn = gbar / safe, beta / safe
    x, w = _update(s, space, v, go, safe, delta, cs * s.phi)
    phi = space.where(go, sn * s.phi, s.phi)
    status = _status(s, space, go, finite, square, memory)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & (status == 0) & (phi > target) & (iterations < budget)
    return _State(
        x, s.r2, y, space.copy(z), s.w2, w, beta, s.beta, -s.cs * beta, s.sn * beta, cs, sn, phi, active,
        status, iterations, s.matvecs + 1, space.maximum(s.operator_norm, space.where(s.active, norm, zero)),
        space.maximum(s.gain, space.where(go, one / safe, zero)), memory,
    )  # fmt: skip


def _update(s: _State, space: Any, v: Array, go: Array, gamma: Array, delta: Array, phi: Array) -> tuple[Array, Array]:
    """w = (v - ε w₁ - δ w₂) / γ and x += φ w, for the items that go on."""
    zero = space.scalar(0.0)
    w = space.axpy(-s.epsilon, s.w1, v)
    w = space.axpy(-delta, s.w2, w)
    w = space.scale(space.where(go, 1 / gamma, zero), w)
    return space.axpy(space.where(go, phi, zero), w, s.x), w


def _status(s: _State, space: Any, go: Array, finite: Array, square: Array, memory: Any) -> Array:
    """Why an item stops here, 0 where it does not."""
    status = space.where(s.active & ~go, int(Status.SINGULAR), s.status)
    if memory is not None:
        status = space.where(go & memory.strange, int(Status.STAGNATED), status)
    status = space.where(s.active & (square < 0), int(Status.BAD_PRECONDITIONER), status)
    return space.where(s.active & ~finite, int(Status.NON_FINITE), status)
