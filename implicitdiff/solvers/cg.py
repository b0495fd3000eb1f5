"""Conjugate gradients for symmetric positive definite A.

With M ≈ A⁻¹, z = M r and starting from p = z::

    α = rᵀz / pᵀAp      x += α p      r -= α Ap
    β = r₊ᵀz₊ / rᵀz     p  = z₊ + β p

pᵀAp <= 0 proves that A is not positive definite, and pᵀAp <= 4 ε ‖A‖ pᵀp that it is not so to the accuracy ε of its
products: the method stops and says which. (pᵀp costs nothing: ‖p₊‖² = ‖z₊‖² + β² ‖p‖², in the norm of M⁻¹.) Two
reductions an iteration (three with a preconditioner) and four vectors: x, r, p, Ap.

References
----------
M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl.
Bur. Stand. 49 (1952) 409-436. DOI 10.6028/jres.049.044
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.outcome import Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start, Structure, accuracy, without_preconditioner

__all__ = ["CG"]


class _State(NamedTuple):
    x: Array
    r: Array
    p: Array
    rz: Array
    rr: Array
    pp: Array
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    ritz: Array  # β/α of the step before: with 1/α the next diagonal entry of the Lanczos matrix
    operator_norm: Array
    gain: Array  # largest pᵀp / pᵀAp: a lower bound of ‖A⁻¹‖
    memory: Any = None  # takes the pairs (p, A p), where they are kept


@dataclass(frozen=True, eq=False, repr=False)
class CG(Krylov):
    """Conjugate gradients: symmetric positive definite A, products only.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in
    single; relative to ‖b‖, checked on the true residual), ``maxiter`` (default 10 n, within 1 000 to
    100 000), ``preconditioner`` (≈ A⁻¹, symmetric positive definite), ``damping`` (δ of A + δI).

    Parameters
    ----------
    recycle : int, default 0
        How many pairs (p, A p) of earlier solves of a sequence (``implicit_grad(…, state=…)``) to keep: together a
        limited-memory preconditioner for the next. It costs no product, 2 k vectors of memory, and as much arithmetic
        as 4 k inner products an iteration.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import CG, linear_solve
    >>> A = np.array([[4.0, 1.0], [1.0, 3.0]])
    >>> np.round(linear_solve(A, np.array([1.0, 2.0]), solver=CG(rtol=1e-12)), 6)
    array([0.090909, 0.636364])
    """

    recycle: int = 0

    name: ClassVar[str] = "cg"
    structure: ClassVar[Structure] = "positive definite"

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run CG from x with residual r until the recursive residual reaches the target."""
        product, precondition, noise = state.operator.matvec, state.preconditioner, accuracy(state, space)
        z = start.r if precondition.identity else precondition(start.r)
        rz = space.inner(start.r, z)
        rr = rz if precondition.identity else space.inner(start.r, start.r)
        zero = space.scalar(0.0)
        first = _State(
            start.x, start.r, space.copy(z), rz, rr, rz, start.active, space.counter(), space.counter(),
            0, zero, zero, zero, start.memory,
        )  # fmt: skip
        target, move = start.target * start.target, _step_on_host if space.host else _step

        def step(s: _State) -> _State:
            return move(s, space, product, precondition, target, start.budget, 4 * noise)

        most, loop = self.most(space.length), state.operator.backend.while_loop
        end = loop(lambda s: space.any(s.active), step, first, limit=most)
        end = _flat(end, state, space, 16 * noise)
        norm = end.operator_norm if precondition.identity else without_preconditioner(space, end.operator_norm, rr, rz)
        r = None if end.memory is None else end.r
        return Cycle(end.x, end.iterations, end.matvecs, end.status, norm, gain=end.gain, memory=end.memory, r=r)


def _step(s: _State, space: Any, product: Any, precondition: Any, target: Array, budget: Array, level: float) -> _State:
    zero, one = space.scalar(0.0), space.scalar(1.0)
    ap = product(s.p)
    curvature = space.inner(s.p, ap)
    finite = space.isfinite(curvature)
    valid = s.rz > 0
    go = s.active & (curvature > level * s.operator_norm * s.pp) & (curvature > 0) & valid & finite
    rz_safe = space.where(go, s.rz, one)
    memory = s.memory and s.memory.noted(space, s.p, ap, curvature, s.rz, go)  # before p is overwritten
    alpha = space.where(go, s.rz / space.where(go, curvature, one), zero)
    x = space.axpy(alpha, s.p, s.x)
    r = space.axpy(-alpha, ap, s.r)
    z = r if precondition.identity else precondition(r)
    rz = space.inner(r, z)
    rr = rz if precondition.identity else space.inner(r, r)
    # an item that has stopped keeps its x, r and p whatever the others do
    beta = space.where(go, rz / rz_safe, one)
    p = space.axpy(space.where(go, one, zero), z, space.scale(beta, s.p))
    # 1/α_k + β_{k-1}/α_{k-1} is a Rayleigh quotient of A, hence a lower estimate of its norm, for free.
    inverse = space.where(go, curvature / rz_safe, zero)
    norm = space.maximum(s.operator_norm, inverse + s.ritz)
    bad = space.where(finite, int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE))
    bad = bad if precondition.identity else space.where(valid, bad, int(Status.BAD_PRECONDITIONER))
    status = space.where(s.active & ~go, bad, s.status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & (rr > target) & (iterations < budget)
    if memory is not None:
        status, active = space.where(go & memory.strange, int(Status.STAGNATED), status), active & ~memory.strange
    pp = space.where(go, rz + beta * beta * s.pp, s.pp)
    gain = space.maximum(s.gain, space.where(go, s.pp / space.where(go, curvature, one), zero))
    return _State(x, r, p, rz, rr, pp, active, status, iterations, s.matvecs + 1, beta * inverse, norm, gain,
                  memory)  # fmt: skip


def _step_on_host(
    s: _State, space: Any, product: Any, precondition: Any, target: Array, budget: Array, level: float
) -> _State:
    """The same of one vector whose scalars are seen: it goes on or stops, and nothing is masked."""
    ap = product(s.p)
    curvature = space.inner(s.p, ap)
    go = curvature > level * s.operator_norm * s.pp and curvature > 0 and s.rz > 0 and math.isfinite(curvature)
    memory = s.memory and s.memory.noted(space, s.p, ap, curvature, s.rz, go)
    if not go:
        bad = Status.NOT_POSITIVE_DEFINITE if math.isfinite(curvature) else Status.NON_FINITE
        bad = bad if precondition.identity or s.rz > 0 else Status.BAD_PRECONDITIONER
        return s._replace(
            active=False, status=int(bad), iterations=s.iterations + 1, matvecs=s.matvecs + 1,
            operator_norm=space.maximum(s.operator_norm, s.ritz), memory=memory,
        )  # fmt: skip
    alpha = s.rz / curvature
    x = space.axpy(alpha, s.p, s.x)
    r = space.axpy(-alpha, ap, s.r)
    z = r if precondition.identity else precondition(r)
    rz = space.inner(r, z)
    rr = rz if precondition.identity else space.inner(r, r)
    beta, inverse, iterations, status = rz / s.rz, curvature / s.rz, s.iterations + 1, s.status
    p = space.aypx(beta, z, s.p)
    active = bool(rr > target and iterations < budget)
    if memory is not None and memory.strange:
        status, active = int(Status.STAGNATED), False
    return _State(
        x, r, p, rz, rr, rz + beta * beta * s.pp, active, status, iterations, s.matvecs + 1, beta * inverse,
        space.maximum(s.operator_norm, inverse + s.ritz), space.maximum(s.gain, s.pp / curvature), memory,
    )  # fmt: skip


def _flat(end: _State, state: KrylovState, space: Any, level: float) -> _State:
    """Tell zero curvature from a singular A, where A p vanishes, too (two products, after a failure only)."""
    stopped = end.status == int(Status.NOT_POSITIVE_DEFINITE)

    def ask(found: tuple[Array, ...]) -> tuple[Array, ...]:
        (status, matvecs, norm), precondition = found, state.preconditioner
        probe = space.probe()
        z = precondition(probe)  # as p, in the norm of M⁻¹
        zz = space.inner(probe, z)
        ap = state.operator.matvec(end.p)
        image = space.inner(ap, precondition(ap))
        az = state.operator.matvec(z)
        size = space.inner(az, precondition(az))
        is_zero = image * zz <= level * size * end.pp
        norm = space.maximum(norm, space.sqrt(size / zz))
        return space.where(stopped & is_zero, int(Status.SINGULAR), status), matvecs + 2, norm

    found = state.operator.backend.if_any(stopped, ask, (end.status, end.matvecs, end.operator_norm))
    return end._replace(status=found[0], matvecs=found[1], operator_norm=found[2])
