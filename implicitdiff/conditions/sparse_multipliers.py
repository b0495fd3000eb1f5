"""Multipliers by least squares where the gradients of the constraints are a sparse matrix.

(UUᵀ + S) z = b is the Schur complement of a sparse system that has no square of U in it,

    [[I, Uᵀ], [U, −S]] (r, z) = (0, −b),

which SuperLU factors on every framework.

References
----------
M. Arioli, I. S. Duff, P. P. M. de Rijk, "On the augmented system approach to sparse least-squares problems", Numer.
Math. 55 (1989) 667-684. DOI 10.1007/BF01389335
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from implicitdiff.arrays import Array, needed
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.rows import Places, SparseRows, rows_times, saddle_entries, scaled_rows, turned_times
from implicitdiff.outcome import Status
from implicitdiff.solvers import hosted
from implicitdiff.tolerances import DENSE, DEPENDENT, DEPENDENT_ROWS

__all__ = ["least_squares", "multipliers", "unit_rows"]


def unit_rows(rows: SparseRows, reach: Array, norms: Array, held: Array) -> SparseRows:
    """The held rows, with coordinates in their units, at norm one; zeros for the others."""
    found: SparseRows = scaled_rows(rows, rows.backend.astype(held, rows.dtype) / norms, reach)
    return found


def least_squares(unit: SparseRows, held: Array, slack: Array) -> Callable[[Array], tuple[Array, Array]]:
    """Return what solves (UUᵀ + S) z = b, and tells whether that is singular; S is 1 for rows that are not held."""
    backend, device, (k, n) = unit.backend, unit.device, unit.places.shape
    xp, items = backend.xp, tuple(unit.shape[:-2])
    corner = slack + 1 - backend.astype(held, unit.dtype)
    eye = Places((n, n), np.arange(n), np.arange(n))
    ones = xp.ones((*items, n), dtype=unit.dtype, device=device)
    entries = saddle_entries(SparseRows(eye, ones, backend, device), unit, backend.concat([0 * ones, -corner]))
    op = Operator(
        backend, n + k, n + k, items, unit.dtype, device, forward=lambda x: x, entries=entries, symmetric=True,
        trusted=True,
    )  # fmt: skip
    state = hosted.init(op, symmetric=False)

    def solve(b: Array) -> tuple[Array, Array]:
        x, status, counts = hosted.solve(state, backend.concat([xp.zeros((*b.shape[:-1], n), dtype=b.dtype,
                                                                         device=device), -b]))  # fmt: skip
        lost = counts.rcond < DEPENDENT_ROWS.at(xp, unit.dtype)
        return x[..., n:], (xp.asarray(status) == int(Status.SINGULAR)) | lost

    return solve


def multipliers(unit: SparseRows, candidate: Array, gradient: Array) -> tuple[Array, Array]:
    """z of ∇f = −Uᵀ z by least squares, refined once, and which candidates are linearly dependent."""
    backend, xp = unit.backend, unit.backend.xp
    solve = least_squares(unit, candidate, xp.zeros_like(candidate, dtype=unit.dtype))
    z, singular = solve(-rows_times(unit, gradient))
    left = gradient + turned_times(xp, unit, z)
    z = z + solve(-rows_times(unit, left))[0]
    z = xp.where(xp.isfinite(z), z, xp.zeros_like(z))
    dependent = candidate & singular[..., None]
    if backend.traced or not needed(backend, singular) or unit.places.shape[0] > DENSE:
        return z, dependent
    return z, dependent & _in_null_space(xp, unit.dense())


def _in_null_space(xp: Any, unit: Array) -> Array:
    """Rows that the null vectors of UUᵀ are made of; rows of zeros are not held."""
    held = xp.max(xp.abs(unit), axis=-1) > 0
    left, values, _ = xp.linalg.svd(unit, full_matrices=True)
    short = left.shape[-1] - values.shape[-1]
    zeros = xp.zeros((*values.shape[:-1], short), dtype=values.dtype)
    null = xp.concat([values, zeros], axis=-1) < DEPENDENT_ROWS.at(xp, unit.dtype) ** 0.5
    parts = xp.where(null[..., None, :], xp.abs(left), xp.zeros_like(left))
    return held & (xp.max(parts, axis=-1) > DEPENDENT)
