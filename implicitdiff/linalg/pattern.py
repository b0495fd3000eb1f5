"""Where a square matrix may have entries, as the user says it: a SciPy sparse matrix, a mask, or (rows, columns)."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff.errors import InputError, ShapeError
from implicitdiff.linalg.coloring import Coloring, colored
from implicitdiff.linalg.interned import Interned
from implicitdiff.linalg.segments import Segments

__all__ = ["Pattern", "as_pattern"]


class Pattern(Interned):
    """Places of entries, sorted by rows; equal patterns are one object, so that each is coloured once.

    Parameters
    ----------
    n : int
        Order of the matrix; 0 as long as it is not known.
    rows, columns : array of int, shape (entries,)
        The places, in any order.
    """

    n: int
    rows: np.ndarray
    columns: np.ndarray

    def __new__(cls, n: int, rows: Any, columns: Any) -> Pattern:
        rows, columns = (np.array(x, dtype=np.int64).ravel() for x in (rows, columns))
        width = int(columns.max(initial=-1)) + 1
        place = rows * max(width, 1) + columns
        if not np.all(place[1:] > place[:-1]):
            place.sort()  # np.unique hashes, which takes several times as long
            rows, columns = np.divmod(place[np.diff(place, prepend=-1) > 0], max(width, 1))
        return cls._of(n=n, rows=rows, columns=columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pattern, (self.n, self.rows, self.columns)

    def __repr__(self) -> str:
        return f"Pattern({self.size} entries)"

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.rows)

    def of_order(self, n: int) -> Pattern:
        """Return it as that of a matrix of order n, the diagonal included.

        Raises
        ------
        ShapeError
            Where it is that of a matrix of another order.
        """
        least = 1 + max(int(self.rows.max(initial=-1)), int(self.columns.max(initial=-1)))
        if self.n not in (0, n) or least > n:
            raise ShapeError(f"sparsity is that of a matrix of order {self.n or least}, and A is one of order {n}.")
        if self.n == n and np.count_nonzero(self.rows == self.columns) == n:
            return self
        i = np.arange(n)
        return self.once(
            ("order", n), lambda: Pattern(n, np.concatenate([self.rows, i]), np.concatenate([self.columns, i]))
        )

    @property
    def symmetric(self) -> Pattern:
        """The pattern and its transpose together."""
        return self.once("symmetric", lambda: self if self._is_symmetric() else self.union(self.transposed))

    def _is_symmetric(self) -> bool:
        turned = self.by_columns
        return np.array_equal(self.rows[turned], self.columns) and np.array_equal(self.columns[turned], self.rows)

    @property
    def transposed(self) -> Pattern:
        """Of Aᵀ."""
        return self.once("transposed", lambda: Pattern(self.n, self.columns, self.rows))

    @property
    def by_columns(self) -> np.ndarray:
        """Order of the entries by columns: values of A in this order are those of Aᵀ.

        Of a symmetric pattern it is the number of entry (j, i) for each (i, j).
        """
        return self.once("by columns", lambda: np.lexsort((self.rows, self.columns)))

    @property
    def ends(self) -> np.ndarray:
        """Where the entries of each row begin, and the last ones end: shape (n + 1,)."""
        return self.once("ends", lambda: np.searchsorted(self.rows, np.arange(self.n + 1)))

    @property
    def segments(self) -> Segments:
        """The rows, to be summed over."""
        return self.once("segments", lambda: Segments(self.ends))

    def union(self, other: Pattern) -> Pattern:
        """All entries of both."""
        rows, columns = np.concatenate([self.rows, other.rows]), np.concatenate([self.columns, other.columns])
        return Pattern(self.n, rows, columns)

    def coloring(self, *, symmetric: bool, transposable: bool) -> Coloring:
        """Return its colouring, made once; of a symmetric pattern where ``symmetric``."""
        key = ("coloring", symmetric, transposable)
        return self.once(key, lambda: colored(self, symmetric=symmetric, transposable=transposable))

    def matrix(self, values: Any) -> Any:
        """Return the SciPy matrix (CSR) with these values."""
        import scipy.sparse

        return scipy.sparse.csr_array((values, self.columns, self.ends), shape=(self.n, self.n))


def as_pattern(given: Any) -> Pattern:
    """Return what a user gave as a pattern.

    Parameters
    ----------
    given : SciPy sparse matrix, array (n, n) or pair of arrays of int
        Of a sparse matrix all stored entries count, whatever their value, of an array those that are not zero; a pair
        is (rows, columns).

    Raises
    ------
    InputError
        Where it is none of these.
    ShapeError
        Where it is not square.
    """
    if isinstance(given, Pattern):
        return given
    if hasattr(given, "tocoo"):
        found = given.tocoo()
        shape: tuple[int, ...] = found.shape
        places: tuple[Any, ...] = (found.row, found.col)
    elif _is_pair(given):
        return _of_indices(*map(np.asarray, given))
    else:
        mask = _dense(given) if hasattr(given, "shape") or isinstance(given, list) else np.zeros(0)
        if mask.ndim != 2 or mask.dtype.kind not in "biufc":
            raise InputError(
                f"sparsity is {type(given).__name__}: expected None, 'detect', a SciPy sparse matrix, a square array, "
                "or (rows, columns), two arrays of int."
            )
        shape, places = mask.shape, tuple(np.nonzero(mask))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ShapeError(f"sparsity has shape {tuple(shape)}; expected a square matrix.")
    return Pattern(shape[0], *places)


def _dense(given: Any) -> np.ndarray:
    """The array; none of a framework's own sparse arrays, which have no such conversion."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        return np.zeros(0)


def _of_indices(rows: np.ndarray, columns: np.ndarray) -> Pattern:
    if len(rows) != len(columns):
        raise ShapeError(f"sparsity has {len(rows)} rows and {len(columns)} columns; expected as many of both.")
    if min(rows.min(initial=0), columns.min(initial=0)) < 0:
        raise InputError("sparsity holds a negative index; rows and columns are counted from 0.")
    return Pattern(0, rows, columns)


def _is_pair(given: Any) -> bool:
    """Whether it is (rows, columns); a list of lists is a matrix."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not all(map(_are_indices, given)):
        return False
    return isinstance(given, tuple) or all(hasattr(x, "shape") for x in given)


def _are_indices(x: Any) -> bool:
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    return array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0)
