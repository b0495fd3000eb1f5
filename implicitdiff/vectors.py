"""The vector space in which the iterative solvers work.

A solver written over these few operations runs on one flat array of shape (..., n), whose leading
axes are independent items, and on anything else that offers them (a tuple of sharded leaves).
Scalars are arrays of the item shape (...).

``axpy`` and ``scale`` may overwrite their last argument, ``subtract`` its first: a solver hands its own vector
over and goes on with the result. Whatever a product with A returned may be the user's own memory, so it is copied
before it is handed over.
"""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array

__all__ = ["ArraySpace"]


class ArraySpace:
    """Vectors of shape (..., n) over an array namespace; every operation makes a new array.

    Parameters
    ----------
    xp : module
        Array namespace (array-api-compat).
    shape : tuple of int
        Shape (..., n) of the vectors.
    dtype, device
        Of the vectors.
    """

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: Any, device: Any) -> None:
        self.xp = xp
        self.shape = tuple(shape)
        self.items = self.shape[:-1]
        self.dtype = dtype
        self.device = device
        self.eps = float(xp.finfo(dtype).eps)

    def inner(self, x: Array, y: Array) -> Array:
        """Inner product per item."""
        return self.xp.vecdot(x, y, axis=-1)

    def norm(self, x: Array) -> Array:
        """2-norm per item, of a vector whose entries are of moderate size."""
        return self.xp.sqrt(self.inner(x, x))

    def largest(self, x: Array) -> Array:
        """Largest absolute entry per item."""
        return self.xp.max(self.xp.abs(x), axis=-1)

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        """a x + y; y may be overwritten."""
        return a[..., None] * x + y

    def subtract(self, x: Array, y: Array) -> Array:
        """x - y; x may be overwritten, y is not."""
        return x - y

    def scale(self, a: Any, x: Array) -> Array:
        """a x; x may be overwritten."""
        return a[..., None] * x

    def copy(self, x: Array) -> Array:
        """Return memory of our own."""
        return self.xp.asarray(x, copy=True)

    def zeros(self) -> Array:
        """Return the zero vector."""
        return self.xp.zeros(self.shape, dtype=self.dtype, device=self.device)

    def select(self, mask: Array, x: Array, y: Array) -> Array:
        """Items of x where the mask holds, of y elsewhere."""
        return self.xp.where(mask[..., None], x, y)

    def where(self, mask: Array, a: Any, b: Any) -> Array:
        """Select, for scalars."""
        if isinstance(a, int) and isinstance(b, int):
            a = self.counter(a)
        return self.xp.where(mask, a, b)

    def scalar(self, value: float) -> Array:
        """Return one number per item."""
        return self.xp.full(self.items, value, dtype=self.dtype, device=self.device)

    def counter(self, value: int = 0) -> Array:
        """Return one integer per item."""
        return self.xp.full(self.items, value, dtype=self.xp.int32, device=self.device)

    def any(self, mask: Array) -> Array:
        """Whether any item's mask holds, for the condition of a loop."""
        return self.xp.any(mask)

    def sqrt(self, a: Array) -> Array:
        """Square root of a scalar, 0 for a negative one."""
        return self.xp.sqrt(self.xp.where(a > 0, a, self.xp.zeros_like(a)))

    def isfinite(self, a: Array) -> Array:
        """Whether a scalar is finite."""
        return self.xp.isfinite(a)

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of two scalars; NaN where either is."""
        return self.xp.maximum(a, b)

    # -- a basis of k vectors, shape (..., k, n), for Arnoldi ---------------------------------------
    def basis(self, k: int) -> Array:
        """Return k zero vectors."""
        shape = (*self.items, k, self.shape[-1])
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def put(self, basis: Array, j: Any, x: Array) -> Array:
        """Store x as vector j of the basis; the basis may be overwritten."""
        basis[..., j, :] = x
        return basis

    def take(self, basis: Array, j: Any) -> Array:
        """Vector j of the basis."""
        return basis[..., j, :]

    def copy_row(self, matrix: Array, j: Any) -> Array:
        """Row j of a matrix (..., k, l), in memory of its own."""
        return self.copy(matrix[..., j, :])

    def project(self, basis: Array, j: Any, x: Array) -> Array:
        """Inner products of x with vectors 0 … j, shape (..., k); zeros beyond."""
        known = (basis[..., : j + 1, :] @ x[..., None])[..., 0]
        rest = self.xp.zeros((*self.items, basis.shape[-2] - j - 1), dtype=self.dtype, device=self.device)
        return self.xp.concat([known, rest], axis=-1)

    def combine(self, basis: Array, j: Any, c: Array) -> Array:
        """Σ c_i v_i over vectors 0 … j."""
        return (c[..., None, : j + 1] @ basis[..., : j + 1, :])[..., 0, :]
