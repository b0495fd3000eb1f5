"""Conjugate gradients for symmetric positive definite A.

With M ≈ A⁻¹, z = M r and starting from p = z::

    α = rᵀz / pᵀAp      x += α p      r -= α Ap
    β = r₊ᵀz₊ / rᵀz     p  = z₊ + β p

pᵀAp <= 0 proves that A is not positive definite: the method stops and says so. Two reductions an
iteration (three with a preconditioner) and four vectors: x, r, p, Ap.

References
----------
M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl.
Bur. Stand. 49 (1952) 409-436. DOI 10.6028/jres.049.044
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.report import Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start

__all__ = ["CG"]


class _State(NamedTuple):
    x: Array
    r: Array
    p: Array
    rz: Array
    rr: Array
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    ritz: Array  # β/α of the step before: with 1/α the next diagonal entry of the Lanczos matrix
    operator_norm: Array


@dataclass(frozen=True)
class CG(Krylov):
    """Conjugate gradients: symmetric positive definite A, products only.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in
    single; relative to ‖b‖, checked on the true residual), ``maxiter`` (default 10 n, within 1 000 to
    100 000), ``preconditioner`` (≈ A⁻¹, symmetric positive definite), ``damping`` (δ of A + δI).

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import CG, linear_solve
    >>> A = np.array([[4.0, 1.0], [1.0, 3.0]])
    >>> np.round(linear_solve(A, np.array([1.0, 2.0]), solver=CG(rtol=1e-12)), 6)
    array([0.090909, 0.636364])
    """

    name: ClassVar[str] = "cg"
    symmetric_only: ClassVar[bool] = True

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run CG from x with residual r until the recursive residual reaches the target."""
        product, precondition = state.operator.matvec, state.preconditioner
        z = start.r if precondition.identity else precondition(start.r)
        rz = space.inner(start.r, z)
        zero = space.scalar(0.0)
        first = _State(
            start.x, start.r, space.copy(z), rz, rz, start.active, space.counter(), space.counter(),
            0, zero, zero,
        )  # fmt: skip
        target = start.target * start.target

        def step(s: _State) -> _State:
            return _step(s, space, product, precondition, target, start.budget)

        most, loop = self.most(space.length), state.operator.backend.while_loop
        end = loop(lambda s: space.any(s.active), step, first, limit=most)
        return Cycle(end.x, end.iterations, end.matvecs, end.status, end.operator_norm)


def _step(s: _State, space: Any, product: Any, precondition: Any, target: Array, budget: Array) -> _State:
    zero, one = space.scalar(0.0), space.scalar(1.0)
    ap = product(s.p)
    curvature = space.inner(s.p, ap)
    finite = space.isfinite(curvature)
    go = s.active & (curvature > 0) & (s.rz > 0) & finite
    rz_safe = space.where(go, s.rz, one)
    alpha = space.where(go, s.rz / space.where(go, curvature, one), zero)
    x = space.axpy(alpha, s.p, s.x)
    r = space.axpy(-alpha, ap, s.r)
    z = r if precondition.identity else precondition(r)
    rz = space.inner(r, z)
    rr = rz if precondition.identity else space.inner(r, r)
    beta = space.where(go, rz / rz_safe, zero)
    p = space.axpy(one, z, space.scale(beta, s.p))
    # 1/α_k + β_{k-1}/α_{k-1} is a Rayleigh quotient of A, hence a lower estimate of its norm, for free.
    inverse = space.where(go, curvature / rz_safe, zero)
    norm = space.maximum(s.operator_norm, inverse + s.ritz)
    bad = space.where(finite, int(Status.NOT_POSITIVE_DEFINITE), int(Status.NON_FINITE))
    status = space.where(s.active & ~go, bad, s.status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & (rr > target) & (iterations < budget)
    return _State(x, r, p, rz, rr, active, status, iterations, s.matvecs + 1, beta * inverse, norm)
