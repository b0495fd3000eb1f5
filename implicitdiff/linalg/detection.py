"""The pattern of a matrix of which there are products only.

A vector without structure on a block of columns shows which rows have entries there. Blocks are halved until they are
columns: blocks that share no row, as far as is known from the level before, share a product. What it takes is
2 log₂(n) times as many products as the pattern has colours, at most. A row that has entries nearly everywhere would
leave nothing to share; where there are products with Aᵀ it is left out, and read off one of those.

A zero of A at this point is no entry: the result is a pattern for this point and points like it, which each assembly
checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff.arrays import probe_vector
from implicitdiff.errors import PatternError
from implicitdiff.linalg.coloring import column_colors
from implicitdiff.linalg.entries import noise, swept
from implicitdiff.linalg.pattern import Pattern
from implicitdiff.tolerances import SMALL

__all__ = ["detected"]

START = 4
"""Blocks to start with, as a power of two."""
DENSE_ROW = 64
"""Blocks in which a row has entries, from which it is looked at by itself."""
MOST = 2**26
"""Entries from which a matrix is not sparse."""


def detected(op: Any) -> tuple[Pattern, int]:
    """Find the pattern of an operator, for all its items together, and count the products that it took.

    Raises
    ------
    PatternError
        Where it has so many entries that it is not sparse.
    """
    n = op.n
    if n <= SMALL:
        rows, columns = np.nonzero(_nonzero(op, op.matvec, np.eye(n)).T)
        spent = n
    else:
        rows, columns, spent = by_halving(op, transposable=op.adjoint is not None)
    found = Pattern(n, rows, columns).of_order(n)
    return found.symmetric if op.symmetric else found, spent


def _nonzero(op: Any, product: Any, vectors: np.ndarray) -> np.ndarray:
    """Where the products with vectors (k, n) are not zero, in any item: shape (k, n)."""
    images = np.abs(np.asarray(op.backend.to_host(swept(op, product, vectors))))
    level = 30 * noise(op) * images.max(axis=0, keepdims=True, initial=0.0)  # of each row, in its own unit
    found = ~(images <= level)
    return found.any(axis=tuple(range(1, found.ndim - 1))) if found.ndim > 2 else found


def by_halving(
    op: Any, *, transposable: bool = False, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """Places of the entries of a map, of any shape, and the products that it took.

    Parameters
    ----------
    op : LinearMap
    transposable : bool
        Whether long rows may be read off transposed products.
    most : int, optional
        Colours from which it is given up: nothing is found.
    """
    n, k, spent = op.columns, op.rows, 0
    shift = max((n - 1).bit_length() - START, 0)
    blocks = -(-n // 2**shift)
    rows, columns = np.repeat(np.arange(k), blocks), np.tile(np.arange(blocks), k)  # row and block, as far as is known
    dense = np.zeros(0, dtype=np.int64)
    while True:
        rows, columns, more = _confirmed(op, rows, columns, shift)
        spent += more
        if most is not None and more > most:
            return rows[:0], columns[:0], spent
        if transposable:
            rows, columns, dense = _without_dense(rows, columns, dense, k)
        if shift == 0:
            break
        shift -= 1
        rows, columns = np.repeat(rows, 2), np.repeat(2 * columns, 2)
        columns[1::2] += 1
        inside = columns << shift < n
        rows, columns = rows[inside], columns[inside]
        if len(rows) > MOST:
            raise PatternError(
                f"A has more than {MOST // 2} entries: it is not sparse.\nNext: leave sparsity out, or give a pattern."
            )
    if not len(dense):
        return rows, columns, spent
    units = np.zeros((len(dense), k))
    units[np.arange(len(dense)), dense] = 1
    which, others = np.nonzero(_nonzero(op, op.rmatvec, units))
    return np.concatenate([rows, dense[which]]), np.concatenate([columns, others]), spent + len(dense)


def _confirmed(op: Any, rows: np.ndarray, blocks: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Keep the pairs of row and block of columns where there is something; count the products."""
    n = op.columns
    count = ((n - 1) >> shift) + 1
    colors, used = column_colors(count, *_without_repeats(rows, blocks, count), op.rows)
    of_column = colors[np.arange(n) >> shift]
    probe = probe_vector(np, n, np.float64, None)
    vectors = np.where(of_column[None, :] == np.arange(used)[:, None], probe, 0.0)
    found = _nonzero(op, op.matvec, vectors)[colors[blocks], rows]
    return rows[found], blocks[found], used


def _without_repeats(rows: np.ndarray, blocks: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep one of the rows that have entries in the same blocks: a colouring needs no more; rows are in order.

    Each block has a random number of 64 bits, and a row the sum of those of its blocks.
    """
    if not len(rows):
        return rows, blocks
    numbers = np.random.default_rng(0).integers(0, 2**63, size=count, dtype=np.uint64)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    lengths = np.diff(np.append(starts, len(rows)))
    kept = np.zeros(len(starts), dtype=bool)
    kept[np.unique(np.add.reduceat(numbers[blocks], starts), return_index=True)[1]] = True
    keep = np.repeat(kept, lengths)
    return rows[keep], blocks[keep]


def _without_dense(rows: np.ndarray, blocks: np.ndarray, dense: np.ndarray, n: int) -> Any:
    """Take rows out that have entries in many more blocks than is usual."""
    counts = np.bincount(rows, minlength=n)
    many = counts > max(DENSE_ROW, 8 * float(counts.mean()))
    if not many.any():
        return rows, blocks, dense
    keep = ~many[rows]
    return rows[keep], blocks[keep], np.concatenate([dense, np.flatnonzero(many)])
