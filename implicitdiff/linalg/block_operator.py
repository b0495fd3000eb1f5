"""The saddle operator of a constrained problem, K = [[H, Jᵀ], [J, −D]], with its blocks.

D is zero for constraints that are active; the others keep their places with zero rows in J and a positive diagonal in
D, so that every item of a batch, and every active set, has a system of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.rows import scaled_rows

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["SaddleOperator", "padded", "saddle"]


@dataclass(frozen=True)
class SaddleOperator(Operator):
    """A symmetric operator of order n + k with blocks.

    Parameters
    ----------
    primal : int
        n, the order of H.
    jacobian : array or SparseRows, shape (*items, k, n)
        J.
    corner : array, shape (*items, k)
        The diagonal of D.
    units : array, shape (*items, n + k)
        S, powers of two: units of the coordinates of y, and of the multipliers, in which the blocks are of size one.
    """

    primal: int = 0
    jacobian: Any = None
    corner: Any = None
    units: Any = None

    def principal(self) -> Operator:
        return self.hessian()

    def weighted(self, damping: Any) -> Any:
        """That of [[H + δI, Jᵀ], [J, −D]]: on the whole diagonal it would bring an indefinite K nearer to singular."""
        part = [1.0] * self.primal + [0.0] * (self.n - self.primal)
        return damping * self.backend.xp.asarray(part, dtype=self.dtype, device=self.device)

    def in_units(self) -> SaddleOperator:
        """Return S K S."""
        if self.units is None:
            return self
        n, scale, matrix = (
            self.primal,
            self.units,
            self.matrix if self.matrix is not None else self._cache.get("matrix"),
        )
        y, z = scale[..., :n], scale[..., n:]
        blocks = {"jacobian": scaled_rows(self.jacobian, z, y), "corner": z * self.corner * z,
                  "units": None}  # fmt: skip
        if matrix is not None:
            blocks["matrix"] = scale[..., :, None] * matrix * scale[..., None, :]
        return self.rewrapped(lambda product: lambda x: scale * product(scale * x), leaves=(), **blocks)

    def hessian(self) -> Operator:
        """H as an operator of its own."""
        n = self.primal

        def product(x: Array) -> Array:
            return self.matvec(self.padded(x))[..., :n]

        matrix = None if self.matrix is None else self.matrix[..., :n, :n]
        if matrix is None and self.assembled:
            matrix = self.dense()[..., :n, :n]
        return Operator(
            self.backend, n, n, self.items, self.dtype, self.device, forward=product, adjoint=product, matrix=matrix,
            kind=self.kind, label="H", symmetric=True, trusted=self.trusted, accuracy=self.accuracy,
        )  # fmt: skip

    def padded(self, x: Array) -> Array:
        """(x, 0) for x of shape (*rhs, *items, n)."""
        return padded(self.backend, x, self.n)

    def _assemble(self) -> Array:
        """Assemble from n products: the rest is J."""
        if self.sparse is not None:
            return super()._assemble()
        xp, n, lead = self.backend.xp, self.primal, len(self.items)
        unit = xp.eye(n, self.n, dtype=self.dtype, device=self.device)
        unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * lead, self.n)), (n, *self.items, self.n))
        return self.matrix_of(xp.moveaxis(self.matvec(unit), 0, -1))

    def matrix_of(self, left: Array) -> Array:
        """Complete the first n columns, H over J, to the whole matrix."""
        xp, n = self.backend.xp, self.primal
        eye = xp.eye(self.n - n, dtype=self.dtype, device=self.device)
        right = xp.concat([xp.matrix_transpose(left[..., n:, :]), -self.corner[..., :, None] * eye], axis=-2)
        return xp.concat([left, right], axis=-1)


def padded(backend: Backend, x: Array, length: int) -> Array:
    """Vectors (*lead, n) with zeros behind, up to a length."""
    missing = length - x.shape[-1]
    if not missing:
        return x
    zeros = backend.xp.zeros((*x.shape[:-1], missing), dtype=x.dtype, device=backend.device(x))
    return backend.concat([x, zeros])


def saddle(op: Operator, **blocks: Any) -> SaddleOperator:
    """Give an operator its blocks."""
    return op.specialised(SaddleOperator, **blocks)
