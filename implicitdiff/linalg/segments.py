"""Sums over the rows of a sparse matrix, in the operations of the array standard: gathers and sums of short rows.

A row longer than a few times the usual is cut into pieces, whose sums are summed again: an arrow costs no more than
its entries, and long sums are pairwise.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from implicitdiff.arrays import Array

__all__ = ["Segments"]

WIDTH = 8
"""Least length at which a row is cut."""


class Segments:
    """Segments of a vector: sums over each.

    Parameters
    ----------
    ends : array of int, shape (n + 1,)
        Where each begins, and the last one ends.
    """

    def __init__(self, ends: np.ndarray) -> None:
        self.ends = ends

    @cached_property
    def _levels(self) -> list[np.ndarray]:
        """Places (pieces, width) in the vector, or in the sums before; one past the last means nothing."""
        ends, levels = self.ends, []
        while True:
            lengths = np.diff(ends)
            longest, usual = int(lengths.max(initial=1)), float(lengths.mean()) if lengths.size else 1.0
            width = longest if longest <= max(WIDTH, 4 * usual) else max(WIDTH, int(2 * usual))
            pieces = np.maximum(-(-lengths // width), 1)
            begins = np.concatenate([[0], np.cumsum(pieces)])
            row = np.repeat(np.arange(len(lengths)), pieces)
            start = ends[row] + (np.arange(begins[-1]) - begins[row]) * width
            place = start[:, None] + np.arange(width)
            levels.append(np.where(place < ends[row + 1][:, None], place, ends[-1]))
            if np.all(pieces == 1):
                return levels
            ends = begins

    def over(self, xp: Any, x: Array, device: Any, reduce: Any = None) -> Array:
        """Sum over each segment, or what else ``reduce(x, axis=-1)`` does: (..., entries) to (..., n)."""
        for place in self._levels:
            zero = xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=device)
            flat = xp.asarray(place.ravel(), device=device)
            taken = xp.take(xp.concat([x, zero], axis=-1), flat, axis=-1)
            x = (reduce or xp.sum)(xp.reshape(taken, (*x.shape[:-1], *place.shape)), axis=-1)
        return x
