"""What makes a direct solve trustworthy: symmetry of the matrix, the condition number, the residual."""

from __future__ import annotations

import math
from typing import Any

from implicitdiff.arrays import Array, divisor, item_norm, nowhere, quotient
from implicitdiff.outcome import Status
from implicitdiff.tolerances import SKEW, WELL_CONDITIONED

__all__ = ["PROBES", "amplification", "asymmetry", "cancelled", "classify", "skew_tolerance"]

PROBES = 4
"""Vectors on which ‖A⁻¹‖ is seen."""


def classify(
    xp: Any, failed: Array, rcond: Array, residual: Array, explained: Array | float = 0.0
) -> tuple[Array, Array]:
    """Status per right-hand side, and the residual that was still called success.

    A backward-stable solve leaves at most about eps κ; more than a hundredfold of that is a defect. ``explained`` is
    what the rounding of A itself leaves, where A may be another one each time that it is seen.
    """
    eps = float(xp.finfo(residual.dtype).eps)
    well = WELL_CONDITIONED * eps  # from there on 1e-10 is what counts
    tolerance = 100 * eps / xp.where((rcond > 0) & (rcond < well), rcond, xp.full_like(rcond, well)) + explained
    good = residual <= tolerance
    failed = failed if failed.shape == residual.shape else xp.broadcast_to(failed, residual.shape)
    if nowhere(~good):
        return failed, tolerance
    stagnated = xp.full_like(failed, int(Status.STAGNATED))
    status = xp.where((failed == 0) & ~good, stagnated, failed)
    return xp.where((failed == 0) & xp.isnan(residual), xp.full_like(status, int(Status.NON_FINITE)), status), tolerance


def cancelled(xp: Any, operator: Any, scaling: Any, norm: Array, x: Array) -> Array:
    """Relative error of an equilibrated I − ∂T on x: what is left of the diagonal is known to the rounding of 1."""
    error = operator.offset * operator.resolution
    length = item_norm(xp, x)
    moved = length if scaling is None else item_norm(xp, scaling.rows * scaling.columns * x)
    return error * moved / divisor(xp, norm / math.sqrt(operator.n) * length)


def amplification(xp: Any, operator: Any, scaling: Any, norm: Array, rcond: Array, x: Array) -> Array | None:
    """What an error of A is multiplied by, where that is more than 1/rcond: A is what is left of I − ∂T; else None."""
    if not operator.offset:
        return None
    error, usable = cancelled(xp, operator, scaling, norm, x) / operator.resolution, rcond > 0
    error = xp.where(error > 1, error, xp.ones_like(error))
    return quotient(xp, error, rcond, usable)


def asymmetry(xp: Any, matrix: Array) -> Array:
    """‖A − Aᵀ‖ / ‖A‖ in the largest entry, per item."""
    skew = xp.max(xp.abs(matrix - xp.matrix_transpose(matrix)), axis=(-2, -1))
    size = xp.max(xp.abs(matrix), axis=(-2, -1))
    return quotient(xp, skew, size, size > 0)


def skew_tolerance(xp: Any, dtype: Any) -> float:
    """Asymmetry up to which a matrix counts as symmetric: noise of finite differences passes."""
    return SKEW.at(xp, dtype)
