"""What makes a direct solve trustworthy: symmetry of the matrix, the condition number, the residual."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.report import Status

__all__ = ["asymmetry", "classify", "skew_tolerance"]


def classify(xp: Any, failed: Array, rcond: Array, residual: Array) -> tuple[Array, Array]:
    """Status per right-hand side, and the residual that was still called success.

    A backward-stable solve leaves at most about eps κ; more than a hundredfold of that is a defect.
    """
    eps = float(xp.finfo(residual.dtype).eps)
    well = 1e12 * eps  # from there on 1e-10 is what counts
    tolerance = 100 * eps / xp.where((rcond > 0) & (rcond < well), rcond, xp.full_like(rcond, well))
    good = residual <= tolerance
    failed = xp.broadcast_to(failed, residual.shape)
    stagnated = xp.full_like(failed, int(Status.STAGNATED))
    status = xp.where((failed == 0) & ~good, stagnated, failed)
    status = xp.where((failed == 0) & xp.isnan(residual), xp.full_like(status, int(Status.NON_FINITE)), status)
    return status, tolerance


def asymmetry(xp: Any, matrix: Array) -> Array:
    """‖A − Aᵀ‖ / ‖A‖ in the largest entry, per item."""
    skew = xp.max(xp.abs(matrix - xp.matrix_transpose(matrix)), axis=(-2, -1))
    size = xp.max(xp.abs(matrix), axis=(-2, -1))
    return xp.where(size > 0, skew / xp.where(size > 0, size, xp.ones_like(size)), 0 * size)


def skew_tolerance(xp: Any, dtype: Any) -> float:
    """Asymmetry up to which a matrix counts as symmetric: noise of finite differences passes."""
    return 1e-5 if float(xp.finfo(dtype).eps) < 1e-10 else 1e-3
