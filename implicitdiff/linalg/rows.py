"""Rectangular matrices, dense or sparse, by the few operations that systems with constraints need.

A dense one is an array (*items, k, n). A sparse one has places that are known and values that are an array of the
framework, so that all of it runs in batches and programs, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.arrays import Array, divisor, item_norm, times
from implicitdiff.linalg.entries import Entries
from implicitdiff.linalg.interned import Interned
from implicitdiff.linalg.pattern import Pattern
from implicitdiff.linalg.segments import Segments

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = [
    "Places",
    "SparseMatrix",
    "SparseRows",
    "absolute",
    "as_sparse",
    "diagonal_of",
    "row_norms",
    "row_sizes",
    "rows_times",
    "saddle_entries",
    "scaled_rows",
    "squared",
    "stacked",
    "turned_times",
]


class Places(Interned):
    """Where a sparse matrix (k, n) has entries, row by row; equal ones are one object.

    Parameters
    ----------
    shape : tuple of int
    rows, columns : array of int, shape (entries,)
        Sorted by rows, then columns, each place once.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray

    def __new__(cls, shape: tuple[int, int], rows: Any, columns: Any) -> Places:
        rows, columns = (np.asarray(x, dtype=np.int64) for x in (rows, columns))
        return cls._of(shape=shape, rows=rows, columns=columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self.shape, self.rows, self.columns)

    @property
    def by_row(self) -> Segments:
        """The rows, to be summed over."""
        return self.once("rows", lambda: Segments(np.searchsorted(self.rows, np.arange(self.shape[0] + 1))))

    @property
    def by_column(self) -> tuple[np.ndarray, Segments]:
        """An order of the entries by columns, and the columns."""

        def make() -> tuple[np.ndarray, Segments]:
            order = np.lexsort((self.rows, self.columns))
            return order, Segments(np.searchsorted(self.columns[order], np.arange(self.shape[1] + 1)))

        return self.once("columns", make)

    @classmethod
    def full(cls, shape: tuple[int, int]) -> Places:
        """Of a matrix without zeros."""
        rows, columns = np.divmod(np.arange(shape[0] * shape[1]), max(shape[1], 1))
        return cls(shape, rows, columns)


class SparseMatrix:
    """A constant sparse matrix as the user gave it.

    Parameters
    ----------
    matrix : SciPy sparse matrix (k, n)
    """

    def __init__(self, matrix: Any) -> None:
        found = matrix.tocsr(copy=True)
        found.sum_duplicates()
        rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        self.places, self.values = Places(found.shape, rows, found.indices), np.asarray(found.data)

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n)."""
        return self.places.shape

    def __repr__(self) -> str:
        return f"sparse[{self.shape[0]}, {self.shape[1]}]"

    def on(self, backend: Backend, items: tuple[int, ...], dtype: Any, device: Any) -> SparseRows:
        """Return it in arrays of a framework, the same for all items."""
        values = backend.xp.asarray(np.array(self.values), dtype=dtype, device=device)
        values = backend.xp.broadcast_to(values, (*items, values.shape[-1]))
        return SparseRows(self.places, values, backend, device)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A sparse matrix (*items, k, n).

    Parameters
    ----------
    places : Places
    values : array, shape (*items, entries)
    backend : Backend
    device : object
        Of the values.
    products : int
        What it was assembled from, if it was.
    spent : int
        Products that were made on the way.
    """

    places: Places
    values: Array
    backend: Backend
    device: Any
    products: int = 0
    spent: int = 0

    @classmethod
    def zeros(
        cls, shape: tuple[int, int], backend: Backend, items: tuple[int, ...], dtype: Any, device: Any
    ) -> SparseRows:  # fmt: skip
        """Return one without entries."""
        return cls(Places(shape, [], []), backend.xp.zeros((*items, 0), dtype=dtype, device=device), backend, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*items, k, n)."""
        return (*tuple(self.values.shape[:-1]), *self.places.shape)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    def of(self, x: Array, axis: int) -> Array:
        """Entries of vectors (..., k) or (..., n) beside those of the matrix, by their rows (0) or columns (1)."""
        index = self.places.columns if axis else self.places.rows
        return self.backend.xp.take(x, self.backend.xp.asarray(index, device=self.device), axis=-1)

    def over(self, x: Array, axis: int, reduce: Any = None) -> Array:
        """Sum numbers beside the entries over each row (1) or each column (0)."""
        xp = self.backend.xp
        if axis:
            return self.places.by_row.over(xp, x, self.device, reduce)
        order, segments = self.places.by_column
        return segments.over(xp, xp.take(x, xp.asarray(order, device=self.device), axis=-1), self.device, reduce)

    def dense(self) -> Array:
        """Return the array (*items, k, n)."""
        xp, (k, n) = self.backend.xp, self.places.shape
        place = np.full(k * n, self.places.rows.size)
        place[self.places.rows * n + self.places.columns] = np.arange(self.places.rows.size)
        zero = xp.zeros((*self.values.shape[:-1], 1), dtype=self.dtype, device=self.device)
        flat = xp.take(xp.concat([self.values, zero], axis=-1), xp.asarray(place, device=self.device), axis=-1)
        return xp.reshape(flat, self.shape)


def scaled_rows(rows: Any, left: Array | None, right: Array | None) -> Any:
    """Diag(left) J diag(right), for vectors (*items, k) and (*items, n)."""
    if isinstance(rows, SparseRows):
        values = rows.values if left is None else rows.values * rows.of(left, 0)
        return SparseRows(
            rows.places, values if right is None else values * rows.of(right, 1), rows.backend, rows.device
        )
    rows = rows if left is None else rows * left[..., None]
    return rows if right is None else rows * right[..., None, :]


def rows_times(rows: Any, x: Array) -> Array:
    """J x for vectors (*rhs, *items, n)."""
    return rows.over(rows.values * rows.of(x, 1), 1) if isinstance(rows, SparseRows) else times(rows, x)


def turned_times(xp: Any, rows: Any, z: Array) -> Array:
    """Jᵀ z for vectors (*rhs, *items, k)."""
    if isinstance(rows, SparseRows):
        return rows.over(rows.values * rows.of(z, 0), 0)
    return times(xp.matrix_transpose(rows), z)


def row_sizes(xp: Any, rows: Any) -> Array:
    """The largest entry of each row, shape (*items, k)."""
    if isinstance(rows, SparseRows):
        return rows.over(xp.abs(rows.values), 1, xp.max)
    return xp.max(xp.abs(rows), axis=-1)


def row_norms(xp: Any, rows: Any) -> Array:
    """The norm of each row, shape (*items, k); no square under- or overflows."""
    if not isinstance(rows, SparseRows):
        return item_norm(xp, rows)
    largest = row_sizes(xp, rows)
    part = rows.values / rows.of(divisor(xp, largest), 0)
    return largest * xp.sqrt(rows.over(part * part, 1))


def absolute(xp: Any, rows: Any) -> Any:
    """The sizes of the entries."""
    if isinstance(rows, SparseRows):
        return SparseRows(rows.places, xp.abs(rows.values), rows.backend, rows.device)
    return xp.abs(rows)


def squared(rows: Any) -> Any:
    """The squares of the entries."""
    if isinstance(rows, SparseRows):
        return SparseRows(rows.places, rows.values * rows.values, rows.backend, rows.device)
    return rows * rows


def diagonal_of(xp: Any, matrix: Any) -> Array:
    """The diagonal of a square matrix, shape (*items, n)."""
    if not isinstance(matrix, SparseRows):
        return xp.linalg.diagonal(matrix)
    places = matrix.places
    mask = xp.asarray((places.rows == places.columns).astype(np.float64), dtype=matrix.dtype, device=matrix.device)
    return matrix.over(matrix.values * mask, 1)


def as_sparse(backend: Backend, matrix: Any) -> SparseRows:
    """A dense matrix (*items, k, n) as one of which all entries are there."""
    if isinstance(matrix, SparseRows):
        return matrix
    *items, k, n = matrix.shape
    values = backend.reshape(matrix, (*items, k * n))
    return SparseRows(Places.full((k, n)), values, backend, backend.device(matrix))


def stacked(parts: list[SparseRows]) -> SparseRows:
    """Matrices of as many columns, one over the other."""
    first, heights = parts[0], np.cumsum([0, *(part.places.shape[0] for part in parts)])
    rows = np.concatenate([part.places.rows + start for part, start in zip(parts, heights, strict=False)])
    columns = np.concatenate([part.places.columns for part in parts])
    places = Places((int(heights[-1]), first.places.shape[1]), rows, columns)
    return SparseRows(places, first.backend.concat([part.values for part in parts]), first.backend, first.device)


def saddle_entries(H: SparseRows, J: SparseRows, diagonal: Array) -> Entries:
    """[[H, Jᵀ], [J, 0]] + diag(diagonal), the diagonal (*items, n + k) among its entries even where it is zero."""
    xp, pattern, order, segments = H.backend.xp, *_saddle_places(H.places, J.places)
    parts = H.backend.concat([H.values, J.values, J.values, diagonal])
    values = segments.over(xp, xp.take(parts, xp.asarray(order, device=H.device), axis=-1), H.device)
    return Entries(pattern, values, H.products)


def _saddle_places(H: Places, J: Places) -> tuple[Pattern, np.ndarray, Segments]:
    """The pattern, an order of all that is added up, and what makes up each entry."""

    def make() -> tuple[Pattern, np.ndarray, Segments]:
        (k, n), i = J.shape, np.arange(sum(J.shape))
        rows = np.concatenate([H.rows, J.rows + n, J.columns, i])
        columns = np.concatenate([H.columns, J.columns, J.rows + n, i])
        place = rows * (n + k) + columns
        order = np.argsort(place, kind="stable")
        begins = np.flatnonzero(np.diff(place[order], prepend=-1))
        pattern = Pattern(n + k, rows[order][begins], columns[order][begins])
        return pattern, order, Segments(np.append(begins, len(order)))

    return H.once(("saddle", J), make)
