"""A matrix of known pattern, read off as many products as the pattern has colours, and held against one more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array, any_true, divisor
from implicitdiff.errors import NotSymmetricError, PatternError
from implicitdiff.linalg.coloring import Coloring
from implicitdiff.linalg.pattern import Pattern
from implicitdiff.tolerances import MISSED, SKEW

__all__ = ["Entries", "Mismatch", "mismatch", "missed", "noise", "poisoned", "read", "swept"]

LOOKED_AT = 16
"""Rows that are looked into, at most: an entry that is left out spoils one other row, or none."""
AT_ONCE = 2**26
"""Numbers in the vectors of one sweep, at most: more products are made in several."""


class Entries(NamedTuple):
    """A sparse matrix in arrays of the framework at work.

    Attributes
    ----------
    pattern : Pattern
    values : array, shape (*items, entries)
    products : int
        What it was read off.
    """

    pattern: Pattern
    values: Array
    products: int

    def transposed(self, xp: Any, device: Any) -> Entries:
        """Of Aᵀ."""
        order = xp.asarray(self.pattern.by_columns, device=device)
        return self._replace(pattern=self.pattern.transposed, values=xp.take(self.values, order, axis=-1))

    def matvec(self, xp: Any, x: Array, device: Any) -> Array:
        """A x for x of shape (*rhs, *items, n)."""
        columns = xp.asarray(self.pattern.columns, device=device)
        terms = self.values * xp.take(x, columns, axis=-1)
        return self.pattern.segments.over(xp, terms, device)

    def shifted(self, xp: Any, shift: Array, device: Any) -> Entries:
        """A + diag(shift), for one of order n; the diagonal is part of the pattern."""
        rows, columns = self.pattern.rows, self.pattern.columns
        mask = xp.asarray((rows == columns).astype(np.float64), dtype=self.values.dtype, device=device)
        return self._replace(values=self.values + mask * xp.take(shift, xp.asarray(rows, device=device), axis=-1))

    def largest(self, xp: Any, device: Any) -> Array:
        """max |A_ij| over each row, shape (*items, n)."""
        return self.pattern.segments.over(xp, xp.abs(self.values), device, xp.max)


def swept(op: Any, product: Callable[[Array], Array], vectors: np.ndarray) -> Array:
    """Products with NumPy vectors (k, n), the same for all items: shape (k, *items, n)."""
    xp, (count, n), lead = op.backend.xp, vectors.shape, (1,) * len(op.items)
    step = max(1, AT_ONCE // max(n, 1))
    parts = []
    for start in range(0, count, step):
        x = xp.asarray(vectors[start : start + step], dtype=op.domain or op.dtype, device=op.device)
        k = x.shape[0]
        x = xp.broadcast_to(xp.reshape(x, (k, *lead, n)), (k, *op.items, n))
        parts.append(op.backend.astype(product(x), op.dtype))
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def noise(op: Any) -> float:
    """Relative error of products beyond what rounding explains."""
    return op.accuracy if op.accuracy > 100 * float(op.backend.xp.finfo(op.dtype).eps) else 0.0


def read(op: Any, pattern: Pattern) -> Entries:
    """Assemble an operator from its products, one for each colour of the pattern."""
    coloring, n, xp = coloring_of(op, pattern), op.n, op.backend.xp
    seeds = (coloring.colors[None, :] == np.arange(coloring.number)[:, None]).astype(np.float64)
    images = swept(op, op.rmatvec if coloring.transposed else op.matvec, seeds)
    flat = xp.reshape(xp.moveaxis(images, 0, -2), (*op.items, coloring.number * n))
    values = xp.take(flat, xp.asarray(coloring.place, device=op.device), axis=-1)
    return Entries(pattern, values, coloring.number)


def coloring_of(op: Any, pattern: Pattern) -> Coloring:
    """Return the colouring for an operator: products with Aᵀ count where they are at hand."""
    return pattern.coloring(symmetric=bool(op.symmetric), transposable=op.adjoint is not None)


class Mismatch(NamedTuple):
    """What one product says of an assembled matrix."""

    vector: Array
    """The vector, in the units of the columns."""
    rows: Array
    """Rows, per item, in which A has more than the matrix."""
    finite: Array
    """Items whose product is finite."""
    gap: Array
    """How much more, as a part of what is there."""
    level: Array
    """What a row may be off by."""


def mismatch(op: Any, found: Entries) -> Mismatch:
    """Hold an assembled matrix against a product with a vector without structure.

    Where nothing is seen a gap cannot be looked into, and has to be a hundred times as large to count.
    """
    xp, device = op.backend.xp, op.device
    columns = found.transposed(xp, device).largest(xp, device)
    columns = xp.where(xp.isfinite(columns), columns, xp.zeros_like(columns))
    x = op.backend.space(columns).probe() / divisor(xp, columns)
    exact = op.matvec(x)
    size = found._replace(values=xp.abs(found.values)).matvec(xp, xp.abs(x), device) + xp.abs(exact)
    size = size + op.offset * xp.abs(x)
    level = MISSED.at(xp, op.dtype) * size * (1 if op.backend.sees(found.values) else 100)
    if noise(op):  # of differences, which are noisy as a whole
        level = level + 30 * noise(op) * xp.max(size, axis=-1, keepdims=True)
    gap = xp.abs(exact - found.matvec(xp, x, device))
    return Mismatch(x, gap > level, xp.all(xp.isfinite(exact), axis=-1), gap / divisor(xp, size), level)


def missed(op: Any, found: Entries, seen: Mismatch) -> Exception | None:
    """Find an entry that a pattern leaves out, by halving, and say so; None where a row is off by rounding alone."""
    n, to_host = op.n, op.backend.to_host
    rows, gap, level = (np.asarray(to_host(x)).reshape(-1, n) for x in (seen.rows, seen.gap, seen.level))
    worst = np.argwhere(rows)[np.argsort(-gap[rows], kind="stable")[:LOOKED_AT]]
    for item, row in worst.tolist():
        outside = np.ones(n, dtype=bool)
        outside[found.pattern.columns[found.pattern.rows == row]] = False
        columns = np.arange(n)
        if not _part(op, seen, (item, row), outside) > level[item, row]:
            continue
        while len(columns) > 1:
            halves = np.array_split(columns, 2)
            columns = max(halves, key=lambda c: _part(op, seen, (item, row), outside & np.isin(np.arange(n), c)))
        count = int(rows.any(axis=0).sum())
        return PatternError(
            f"sparsity leaves out entry ({row}, {columns[0]}) of A, which is not zero; {count} rows miss something.\n"
            'Next: add what is missing, in raveled order, or say sparsity="detect".'
        )
    if op.trusted or not op.symmetric or gap.max() <= SKEW.at(op.backend.xp, op.dtype):
        return None
    return NotSymmetricError(
        f"the products say that A is not symmetric: row {worst[0][1]} is not the column across the diagonal.\n"
        "Next: check hvp, or use Root, whose A need not be symmetric."
    )


def _part(op: Any, seen: Mismatch, place: tuple[int, int], inside: np.ndarray) -> float:
    """What some columns make of a row."""
    xp = op.backend.xp
    x = xp.where(xp.asarray(inside, device=op.device), seen.vector, xp.zeros_like(seen.vector))
    return abs(float(np.asarray(op.backend.to_host(op.matvec(x))).reshape(-1, op.n)[place]))


def poisoned(backend: Any, found: Entries, seen: Mismatch) -> Entries:
    """Return the matrix with NaN in items that are not what the products say."""
    xp = backend.xp
    wrong = xp.any(seen.rows, axis=-1) | ~seen.finite
    if not backend.traced and not any_true(xp, wrong):
        return found
    return found._replace(values=xp.where(wrong[..., None], float("nan"), found.values))
