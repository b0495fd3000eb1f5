"""The transposed product of a map that has forward products only, as differences have them: by colours.

Bᵀu by differences takes an evaluation for every column of B. Where B is sparse, its pattern is found, and its entries
are read off as many forward products as it has colours. It is checked by one more; where that says otherwise, the
columns are gone through after all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from implicitdiff.arrays import Array, probe_vector
from implicitdiff.linalg.coloring import column_colors
from implicitdiff.linalg.detection import by_halving
from implicitdiff.linalg.entries import noise, swept
from implicitdiff.linalg.operator import LinearMap
from implicitdiff.tolerances import MISSED, SMALL

__all__ = ["by_colors"]

MOST = 64
"""Colours from which B is not sparse enough: what it cost to see that is little beside its columns."""


def by_colors(B: LinearMap, known: dict[Any, Any]) -> LinearMap:
    """Return a map whose transposed product is that of a sparse matrix, made when it is first asked for.

    Parameters
    ----------
    B : LinearMap
        With forward products, of one problem on NumPy.
    known : dict
        Patterns that were found before.
    """
    if B.items or B.backend.name != "numpy" or B.kind in {"given", "autodiff"} or min(B.rows, B.columns) <= SMALL:
        return B
    made: list[Any] = []

    def adjoint(u: Array) -> Array:
        if not made:
            made.append(_assembled(B, known))
        if made[0] is None:  # column by column
            return B.rmatvec(u)
        return np.asarray((made[0].T @ u.T).T, dtype=B.domain or B.dtype)

    return replace(B, adjoint=adjoint)


def _assembled(B: LinearMap, known: dict[Any, Any]) -> Any:
    """The SciPy matrix; None where it is not found."""
    import scipy.sparse

    key, shape = ("B", B.rows, B.columns), (B.rows, B.columns)
    for _ in range(2):
        new = key not in known
        rows, columns = known[key] = by_halving(B, most=MOST)[:2] if new else known[key]
        colors, count = column_colors(B.columns, rows, columns, B.rows)
        seeds = (colors[None, :] == np.arange(count)[:, None]).astype(np.float64)
        values = np.asarray(swept(B, B.matvec, seeds))[colors[columns], rows]
        found = scipy.sparse.csr_array((values, (rows, columns)), shape=shape)
        if _is_right(B, found):
            return found
        del known[key]
        if new:
            return None
    return None


def _is_right(B: LinearMap, found: Any) -> bool:
    """Hold the matrix against a product."""
    x = probe_vector(np, B.columns, B.domain or B.dtype, None)
    exact, size = B.matvec(x), abs(found) @ abs(x)
    level = (MISSED.at(np, B.dtype) + 30 * noise(B)) * (size + abs(exact))
    return bool(np.all(abs(exact - found @ x) <= level + 30 * noise(B) * size.max(initial=0.0)))
