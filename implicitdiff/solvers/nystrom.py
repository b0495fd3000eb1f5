"""Nyström's approximation of A from its products with a few vectors, and its inverse by Woodbury's formula.

With Ω (n, r), C = (A − ρI) Ω and M = Ωᵀ C, the matrix L = C M⁺ Cᵀ is the best that C tells of A − ρI: it is exact where
that has rank r. With L = U Λ Uᵀ, from eigenvalues of r by r matrices, Woodbury's formula is

    (ρI + L)⁻¹ v = v/ρ + U ((Λ + ρI)⁻¹ − I/ρ) Uᵀ v.

Where ρ is not given, C = A Ω, and the inverse is U Λ⁻¹ Uᵀ on the range of U, and 1/ρ elsewhere.

References
----------
R. Hataya, M. Yamada, "Nyström method for accurate and scalable implicit differentiation", AISTATS 2023.
arXiv:2302.09726 (as a solver, Ω columns of the identity)
Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023) 718-752.
DOI 10.1137/21M1466244 (as a preconditioner, Ω Gaussian)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from implicitdiff.arrays import Array, divisor
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner
from implicitdiff.outcome import Status
from implicitdiff.solvers.approximation import Applied, ApproximateState, Approximation
from implicitdiff.solvers.base import Structure
from implicitdiff.tolerances import RANK, ROUNDED

__all__ = ["Nystrom"]


class _Sketch(NamedTuple):
    rows: Array  # Uᵀ, (*items, r, n): eigenvectors of L, zeros where there is none
    values: Array  # λ + ρ for its eigenvalues λ; 0 where there is none
    rho: Array  # (*items): what A is elsewhere
    sign: Array  # of A, which may be negative definite
    indefinite: Array  # whether curvature of both signs was met


@dataclass(frozen=True, eq=False, repr=False)
class Nystrom(Approximation):
    """A of low rank beside a multiple of the identity, from its products with a few vectors: symmetric definite A.

    Parameters
    ----------
    rank : int, default 20
        Vectors: as many products, once for each A, whatever the number of right-hand sides.
    rho : float, optional
        ρ, what A is where its low rank is not: no damping of the problem, but a part of A. By default the mean
        curvature over the vectors; as a preconditioner the smallest eigenvalue that was found.
    seed : int, default 0
        Of the vectors.
    sketch : {"gauss", "columns"}, default "gauss"
        Random vectors, or columns of A.
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    Exact where A is ρI and a matrix of that rank. Where A has eigenvalues everywhere between, a small ρ makes the error
    larger than 1, that of zero: as a solver it is seldom worth its products (docs/solvers.md), as a preconditioner,
    ``CG(preconditioner=Nystrom(rank=50))``, it often is.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Nystrom, linear_solve
    >>> A = 0.5 * np.eye(4) + np.ones((4, 4))
    >>> b = np.array([1.0, 2.0, 3.0, 4.0])
    >>> bool(np.allclose(linear_solve(A, b, solver=Nystrom(rank=1, rho=0.5)), np.linalg.solve(A, b)))
    True
    """

    rank: int = 20
    rho: float | None = None
    seed: int = 0
    sketch: str = "gauss"
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "nystrom"
    cost: ClassVar[str] = "rank"
    structure: ClassVar[Structure] = "symmetric"
    products_only: ClassVar[bool] = False

    def prepare(self, operator: Operator) -> _Sketch:
        return _sketched(operator, self._vectors(operator), self.rho)

    def _vectors(self, op: Operator) -> Array:
        """Ωᵀ, shape (r, *items, n)."""
        rng, r = np.random.default_rng(self.seed), min(self.rank, op.n)
        if self.sketch == "columns":
            rows = np.zeros((r, op.n))
            rows[np.arange(r), np.sort(rng.choice(op.n, r, replace=False))] = 1.0
        else:
            rows = np.linalg.qr(rng.normal(size=(op.n, r)))[0].T
        xp = op.backend.xp
        rows = xp.asarray(np.ascontiguousarray(rows), dtype=op.dtype, device=op.device)
        shape = (r, *(1,) * len(op.items), op.n)
        return xp.broadcast_to(op.backend.reshape(rows, shape), (r, *op.items, op.n))

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        found: _Sketch = state.prepared
        status = space.where(found.indefinite, int(Status.NOT_POSITIVE_DEFINITE), 0)
        return Applied(_woodbury(state.operator.backend.xp, found, r), space.counter(), 0, status)

    def as_preconditioner(self, operator: Operator) -> Preconditioner:
        xp, found = operator.backend.xp, self.prepare(operator)
        if self.rho is None:
            largest = xp.max(found.values, axis=-1, keepdims=True)
            kept = xp.where(found.values > 0, found.values, largest)
            found = found._replace(rho=divisor(xp, xp.min(kept, axis=-1)))

        def product(r: Array) -> Array:
            return _woodbury(xp, found, r)

        return Preconditioner(product, product)


def _woodbury(xp: Any, found: _Sketch, r: Array) -> Array:
    """The inverse of what was found of A, times r of shape (*rhs, *items, n)."""
    rho, usable = found.rho[..., None], found.values > 0
    weights = xp.where(usable, 1 / divisor(xp, found.values) - 1 / rho, xp.zeros_like(found.values))
    inside = (r[..., None, :] @ xp.matrix_transpose(found.rows)) * weights[..., None, :]
    return found.sign[..., None] * (r / rho + (inside @ found.rows)[..., 0, :])


def _sketched(op: Operator, omega: Array, rho: float | None) -> _Sketch:
    backend, xp = op.backend, op.backend.xp
    images = backend.astype(op.matvec(omega), op.dtype)
    op._cache["probes"] = op.probes + omega.shape[0]
    omega, images = xp.moveaxis(omega, 0, -2), xp.moveaxis(images, 0, -2)  # (*items, r, n)
    finite = xp.all(xp.isfinite(images), axis=(-2, -1))
    images = xp.where(finite[..., None, None], images, omega)
    mean = xp.sum(omega * images, axis=(-2, -1)) / xp.sum(omega * omega, axis=(-2, -1))
    sign = xp.where(mean < 0, -xp.ones_like(mean), xp.ones_like(mean))
    images = sign[..., None, None] * images
    part = 0.0 if rho is None else rho
    images = images - part * omega
    elsewhere = divisor(xp, xp.abs(mean)) if rho is None else xp.full_like(mean, rho)
    elsewhere = xp.where(finite, elsewhere, xp.full_like(elsewhere, float("nan")))
    level = images.shape[-2] * float(xp.finfo(images.dtype).eps)
    rows, ritz, _ = _half_inverse(xp, _gram(xp, omega, images), images, level)  # its Gram matrix: the eigenvalues of L
    below = max(RANK, ROUNDED * max(level, op.accuracy)) * xp.max(xp.abs(ritz + part), axis=-1)
    indefinite = xp.min(ritz, axis=-1) + part < -below
    rows, values, kept = _half_inverse(xp, _gram(xp, rows, rows), rows, max(level, RANK))
    return _Sketch(rows, xp.where(kept, values + part, xp.zeros_like(values)), elsewhere, sign, indefinite)


def _gram(xp: Any, left: Array, right: Array) -> Array:
    product = left @ xp.matrix_transpose(right)
    return (product + xp.matrix_transpose(product)) / 2


def _half_inverse(xp: Any, middle: Array, rows: Array, level: float) -> tuple[Array, Array, Array]:
    """Λ^(-1/2) Vᵀ rows for a symmetric V Λ Vᵀ, with zeros for what is negative, or rounding; Λ, and what was kept."""
    values, vectors = xp.linalg.eigh(middle)
    kept = values > level * xp.max(xp.abs(values), axis=-1, keepdims=True)
    root = xp.where(kept, 1 / xp.sqrt(divisor(xp, values)), xp.zeros_like(values))
    return root[..., :, None] * (xp.matrix_transpose(vectors) @ rows), values, kept
