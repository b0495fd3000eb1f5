"""The vector space in which the iterative solvers work.

A solver written over these few operations runs on one flat array of shape (..., n), whose leading
axes are independent items, and on anything else that offers them (a tuple of sharded leaves).
Scalars are arrays of the item shape (...).

``axpy`` and ``scale`` may overwrite their last argument, ``subtract`` its first: a solver hands its own vector
over and goes on with the result. Whatever a product with A returned may be the user's own memory, so it is copied
before it is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from implicitdiff.arrays import Array, all_finite_items, item_norm, probe_vector
from implicitdiff.tolerances import NEARBY

__all__ = ["ArraySpace", "TreeSpace", "TreeVector", "is_tree_vector"]


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

    host: ClassVar[bool] = False
    """Whether scalars are the host's own numbers, of a single vector (`HostSpace`)."""

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: Any, device: Any) -> None:
        self.xp = xp
        self.shape = tuple(shape)
        self.items = self.shape[:-1]
        self.dtype = dtype
        self.device = device
        self.eps = float(xp.finfo(dtype).eps)

    @property
    def length(self) -> int:
        """Number of entries of a vector, wherever they are."""
        return self.shape[-1]

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

    def aypx(self, a: Any, x: Array, y: Array) -> Array:
        """x + a y; y may be overwritten."""
        return self.axpy(a, y, x)

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

    # -- around a solve ----------------------------------------------------------------------------
    def size(self, x: Array) -> Array:
        """2-norm per item, also of entries so small or large that their squares are lost."""
        return item_norm(self.xp, x)

    def finite(self, x: Array) -> Array:
        """Whether every entry is finite, per item."""
        return all_finite_items(self.xp, x)

    def is_zero(self, x: Array) -> Array:
        """Whether x is exactly zero in every item."""
        return ~self.xp.any(x != 0)

    def probe(self) -> Array:
        """Return a fixed vector without structure, the same in every item."""
        z = probe_vector(self.xp, self.shape[-1], self.dtype, self.device)
        return z if not self.items else self.xp.broadcast_to(z, self.shape)

    def nan(self) -> Array:
        """Return a vector of NaN."""
        return self.xp.full(self.shape, math.nan, dtype=self.dtype, device=self.device)

    def nearby(self, x: Array, zero: float = 1.0) -> Array:
        """Return another point, one percent away in each entry; a zero is taken for so many times the largest."""
        if not self.shape[-1]:
            return x
        sizes = _sizes(self.xp, x, lambda size: self.xp.max(size, axis=-1, keepdims=True), zero)
        return x + NEARBY * self.probe() * sizes

    def worst(self, x: Array) -> Array:
        """Position of the largest entry, per item; -1 where that is not known."""
        return self.xp.argmax(x, axis=-1)

    def entry(self, x: Array, index: Array) -> Array:
        """Entry at a position, per item."""
        there = self.xp.arange(x.shape[-1], device=self.device) == index[..., None]
        return self.xp.sum(self.xp.where(there, x, self.xp.zeros_like(x)), axis=-1)

    # -- a basis of k vectors, shape (..., k, n), for Arnoldi ---------------------------------------
    def basis(self, k: int) -> Array:
        """Return k zero vectors."""
        shape = (*self.items, k, self.shape[-1])
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def put(self, basis: Array, j: Any, x: Array) -> Array:
        """Store x as vector j of the basis; the basis may be overwritten."""
        return self.put_row(basis, j, x)

    def put_row(self, matrix: Array, j: Any, row: Array) -> Array:
        """Store row j of a matrix (..., k, l), which may be overwritten."""
        matrix[..., j, :] = row
        return matrix

    def take(self, basis: Array, j: Any) -> Array:
        """Vector j of the basis."""
        return basis[..., j, :]

    def copy_row(self, matrix: Array, j: Any) -> Array:
        """Row j of a matrix (..., k, l), in memory of its own."""
        return self.copy(matrix[..., j, :])

    def stages(self, k: int) -> tuple[int, ...]:
        """Numbers of vectors up to which the work of Arnoldi's process is done alike; the last is k."""
        return (k,)

    def project(self, basis: Array, j: Any, x: Array, room: int) -> Array:
        """Inner products of x with vectors 0 … j < room, shape (..., k); zeros beyond."""
        known = (basis[..., : j + 1, :] @ x[..., None])[..., 0]
        rest = self.xp.zeros((*self.items, basis.shape[-2] - j - 1), dtype=self.dtype, device=self.device)
        return self.xp.concat([known, rest], axis=-1)

    def combine(self, basis: Array, j: Any, c: Array, room: int) -> Array:
        """Σ c_i v_i over vectors 0 … j < room."""
        return (c[..., None, : j + 1] @ basis[..., : j + 1, :])[..., 0, :]

    def solve_triangular(self, upper: Array, b: Array) -> Array:
        """Solve with small upper triangular matrices (..., k, k) for b (..., k)."""
        return self.xp.linalg.solve(upper, b[..., None])[..., 0]


class TreeVector:
    """A vector that is a tuple of leaves, which are never concatenated.

    Concatenating leaves that are spread over devices would gather them on each. Sums, differences and multiples
    are taken leaf by leaf; 0 may stand for a vector that there is not.

    Parameters
    ----------
    leaves : sequence of array
    """

    def __init__(self, leaves: Sequence[Array]) -> None:
        self.leaves = tuple(leaves)

    @property
    def dtype(self) -> Any:
        """Dtype, the same for all leaves."""
        return self.leaves[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vector that the leaves would make, (n,)."""
        return (sum(math.prod(leaf.shape) for leaf in self.leaves),)

    def map(self, function: Callable[..., Array], *others: TreeVector) -> TreeVector:
        """Apply a function leaf by leaf."""
        return TreeVector([function(*leaves) for leaves in zip(self.leaves, *(o.leaves for o in others), strict=True)])

    def __add__(self, other: TreeVector | Literal[0]) -> TreeVector:
        return self.map(lambda a, b: a + b, other) if isinstance(other, TreeVector) else self

    def __sub__(self, other: TreeVector | Literal[0]) -> TreeVector:
        return self.map(lambda a, b: a - b, other) if isinstance(other, TreeVector) else self

    def __neg__(self) -> TreeVector:
        return self.map(lambda a: -a)

    def __mul__(self, number: Any) -> TreeVector:
        return self.map(lambda a: number * a)

    __rmul__ = __mul__


def _sizes(xp: Any, x: Array, top: Callable[[Array], Array], zero: float) -> Array:
    """Size of each entry: its own, or where it is 0 or infinite (no bound) ``zero`` times the largest one's, or 1."""
    size = xp.abs(x)
    size = xp.where(xp.isfinite(size), size, xp.zeros_like(size))
    largest = top(size)
    largest = largest + xp.astype(largest == 0, size.dtype)
    return size + xp.astype(size == 0, size.dtype) * (zero * largest)


def is_tree_vector(x: Any) -> bool:
    """Whether a vector is a tuple of leaves."""
    return isinstance(x, TreeVector)


class TreeSpace(ArraySpace):
    """Vectors that are tuples of leaves; scalars are 0-d arrays.

    Only reduced scalars decide when a method stops, so every process of a distributed program takes the same number
    of iterations.

    Parameters
    ----------
    xp : module
        Array namespace.
    like : TreeVector
        Gives shapes, dtype and placement of the leaves.
    """

    def __init__(self, xp: Any, like: TreeVector) -> None:
        super().__init__(xp, like.shape, like.dtype, None)
        self.like = like

    def total(self, x: Array) -> Array:
        """Sum of all entries of one leaf, as a scalar."""
        return self.xp.sum(x)

    def top(self, x: Array) -> Array:
        """Largest entry of one leaf, as a scalar."""
        return self.xp.max(x)

    def inner(self, x: TreeVector, y: TreeVector) -> Array:
        parts = [self.total(a * b) for a, b in zip(x.leaves, y.leaves, strict=True)]
        return sum(parts[1:], start=parts[0])

    def largest(self, x: TreeVector) -> Array:
        found = [self.top(self.xp.abs(leaf)) for leaf in x.leaves if math.prod(leaf.shape)]
        out = self.scalar(0.0)
        for part in found:
            out = self.maximum(out, part)
        return out

    def size(self, x: TreeVector) -> Array:
        largest = self.largest(x)
        usable = self.xp.isfinite(largest) & (largest > 0)
        scale = self.where(usable, largest, self.scalar(1.0))
        return scale * self.norm((1 / scale) * x)

    def finite(self, x: TreeVector) -> Array:
        return self.xp.isfinite(self.largest(x))

    def is_zero(self, x: TreeVector) -> Array:
        return self.largest(x) == 0

    def axpy(self, a: Any, x: TreeVector, y: TreeVector) -> TreeVector:
        return x.map(lambda p, q: a * p + q, y)

    def subtract(self, x: TreeVector, y: TreeVector) -> TreeVector:
        return x - y

    def scale(self, a: Any, x: TreeVector) -> TreeVector:
        return a * x

    def copy(self, x: TreeVector) -> TreeVector:
        return x

    def zeros(self) -> TreeVector:
        return self.like.map(self.xp.zeros_like)

    def nan(self) -> TreeVector:
        return self.like.map(lambda leaf: self.xp.full_like(leaf, math.nan))

    def select(self, mask: Array, x: TreeVector, y: TreeVector) -> TreeVector:
        return x.map(lambda a, b: self.xp.where(mask, a, b), y)

    def probe(self) -> TreeVector:
        return TreeVector([self._wave(leaf, i) for i, leaf in enumerate(self.like.leaves)])

    def ones(self, leaf: Array) -> Array:
        """Return ones that lie where a leaf does."""
        return self.xp.ones_like(leaf)

    def _wave(self, leaf: Array, number: int) -> Array:
        """Return a leaf of numbers without structure, made axis by axis so that nothing is gathered."""
        out = self.ones(leaf)
        for axis, k in enumerate(leaf.shape):
            shape = [1] * len(leaf.shape)
            shape[axis] = k
            wave = probe_vector(self.xp, k, leaf.dtype, None, number)  # a slice of a spread vector gathers
            out = out * self.xp.reshape(wave, tuple(shape))
        return out

    def nearby(self, x: TreeVector, zero: float = 1.0) -> TreeVector:
        def moved(leaf: Array, z: Array) -> Array:
            return leaf + NEARBY * z * _sizes(self.xp, leaf, self.top, zero) if math.prod(leaf.shape) else leaf

        return x.map(moved, self.probe())

    def worst(self, x: TreeVector) -> Array:
        best, index, start = self.scalar(-1.0), self.counter(), 0
        for leaf in x.leaves:
            if length := math.prod(leaf.shape):
                top, where = self.xp.max(leaf), self.xp.argmax(self.xp.reshape(leaf, (-1,)))
                index = self.xp.where(top > best, where + start, index)
                best, start = self.maximum(best, top), start + length
        return index

    def entry(self, x: TreeVector, index: Array) -> Array:
        found, start = self.scalar(0.0), 0
        for leaf in x.leaves:
            numbers = self.xp.reshape(self.xp.arange(start, start + math.prod(leaf.shape)), leaf.shape)
            found = found + self.xp.sum(self.xp.where(numbers == index, leaf, self.xp.zeros_like(leaf)))
            start += math.prod(leaf.shape)
        return found

    def basis(self, k: int) -> TreeVector:
        return self.like.map(lambda leaf: self.xp.stack([self.xp.zeros_like(leaf)] * k))

    def put(self, basis: TreeVector, j: Any, x: TreeVector) -> TreeVector:
        return basis.map(lambda rows, row: self.put_leaf(rows, j, row), x)

    def put_leaf(self, rows: Array, j: Any, leaf: Array) -> Array:
        """Store a leaf as row j of the leaf of a basis."""
        rows[j] = leaf
        return rows

    def take(self, basis: TreeVector, j: Any) -> TreeVector:
        return basis.map(lambda rows: rows[j])

    def project(self, basis: TreeVector, j: Any, x: TreeVector, room: int) -> Array:
        # vectors beyond j are zero, and so are their inner products
        parts = [
            self.rows_total(rows * leaf[None]) for rows, leaf in zip(basis.leaves, x.leaves, strict=True)
        ]  # fmt: skip
        return sum(parts[1:], start=parts[0])

    def rows_total(self, rows: Array) -> Array:
        """Sum of each row's entries, shape (k,)."""
        return self.xp.sum(rows, axis=tuple(range(1, len(rows.shape))))

    def combine(self, basis: TreeVector, j: Any, c: Array, room: int) -> TreeVector:
        def leaf(rows: Array) -> Array:
            weights = self.xp.reshape(c, (-1, *(1,) * (len(rows.shape) - 1)))
            return self.xp.sum(weights * rows[: c.shape[0], ...], axis=0)

        return basis.map(leaf)
