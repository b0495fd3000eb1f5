"""The operator of a linear least-squares problem, A = JᵀJ, with J: what is factored is J, not A.

The condition number of A is that of J squared, so that a factor of A has lost all digits where J has half of them left.
R of a QR factorisation J = QR is a Cholesky factor of A, A = RᵀR, that never saw A.

References
----------
Å. Björck, "Numerical Methods for Least Squares Problems", SIAM, 1996, section 2.4. DOI 10.1137/1.9781611971484
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import LinearMap, Operator, Product

__all__ = ["GramOperator", "gram", "triangle"]


@dataclass(frozen=True)
class GramOperator(Operator):
    """A symmetric positive semidefinite operator A = JᵀJ.

    Parameters
    ----------
    root : LinearMap
        J, of any number of rows.
    """

    root: Any = None

    def rewrapped(self, wrap: Callable[[Product], Product], **changes: Any) -> Any:
        """Copy with every product wrapped: what comes out is not JᵀJ any more."""
        changes = {"root": None, **changes}
        return super().rewrapped(wrap, **changes)

    def damped(self, damping: Any) -> Any:
        """Return JᵀJ + δI: that of J over √δ I, where δ is one number."""
        found: Any = super().damped(damping)
        stacked = isinstance(damping, (int, float)) and damping > 0 and self.root is not None
        return replace(found, root=_stacked(self.root, damping)) if stacked else found

    def _assemble(self) -> Array:
        if self.root is None:
            return super()._assemble()
        matrix = self.root.dense()
        return self.backend.astype(self.backend.xp.matrix_transpose(matrix) @ matrix, self.dtype)


def gram(like: Operator, root: LinearMap) -> GramOperator:
    """Give an operator, that is JᵀJ, its J."""
    return like.specialised(GramOperator, root=root)


def _stacked(root: LinearMap, damping: float) -> LinearMap:
    """J over √δ I."""
    backend, k, n, shift = root.backend, root.rows, root.columns, damping**0.5
    xp = backend.xp
    matrix = None
    if root.matrix is not None:
        eye = shift * xp.eye(n, dtype=root.matrix.dtype, device=root.device)
        matrix = xp.concat([root.matrix, xp.broadcast_to(eye, (*root.items, n, n))], axis=-2)

    def forward(v: Array) -> Array:
        return backend.concat([root.matvec(v), backend.astype(shift * v, root.dtype)])

    def adjoint(u: Array) -> Array:
        pulled = root.rmatvec(u[..., :k])
        return pulled + backend.astype(shift * u[..., k:], pulled.dtype)

    return replace(
        root, rows=k + n, forward=forward, adjoint=adjoint, matrix=matrix, sparse=None, derive=None, _cache={}
    )


def triangle(backend: Any, matrix: Array) -> Array:
    """Rᵀ of a QR factorisation of matrices (*items, rows, n): lower triangular, (*items, n, n), zero where rows < n.

    Where a matrix is not finite, NaN.
    """
    xp = backend.xp
    rows, n = int(matrix.shape[-2]), int(matrix.shape[-1])
    if rows < n:
        below = xp.zeros((*matrix.shape[:-2], n - rows, n), dtype=matrix.dtype, device=backend.device(matrix))
        matrix = xp.concat([matrix, below], axis=-2)
    finite = xp.all(xp.isfinite(matrix), axis=(-2, -1))[..., None, None]
    safe = xp.where(finite, matrix, xp.zeros_like(matrix))
    some = len(matrix.shape) == 2 or matrix.shape[0]
    R = xp.linalg.qr(safe, mode="reduced")[1] if some else safe[..., :n, :]
    return xp.where(finite, xp.matrix_transpose(R), xp.full_like(R, float("nan")))
