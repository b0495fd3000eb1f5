"""Direct solution with a SciPy sparse matrix: SuperLU, and its symmetric mode in place of Cholesky.

SciPy has no sparse Cholesky. In SuperLU's symmetric mode without pivoting the factors of a symmetric matrix are
L and D Lᵀ, so A is positive definite exactly if all pivots (the diagonal of U) are positive and no row moved.

References
----------
X. S. Li, "An overview of SuperLU", ACM Trans. Math. Softw. 31 (2005) 302-325. DOI 10.1145/1089014.1089017
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from implicitdiff.arrays import item_norm, probe_vector
from implicitdiff.operator import Operator
from implicitdiff.report import Counts, Status
from implicitdiff.solvers.checks import classify, skew_tolerance

__all__ = ["SparseState", "init", "solve"]


class SparseState(NamedTuple):
    """A factored sparse matrix; ``failed`` is a status, 0 where the factorisation is sound."""

    operator: Operator
    matrix: Any
    factor: Any
    transposed: bool
    norm: float
    rcond: float
    failed: int


def init(operator: Operator, *, symmetric: bool) -> SparseState:
    """Factor the operator's sparse matrix."""
    import scipy.sparse.linalg

    matrix = operator.sparse.astype(np.float64)
    if not np.all(np.isfinite(matrix.data)):
        return SparseState(operator, matrix, None, False, math.nan, 0.0, Status.NON_FINITE)
    norm = float(scipy.sparse.linalg.norm(matrix))
    if (symmetric or operator.symmetric) and not operator.trusted:
        skew = abs(matrix - matrix.T).max()
        if skew > skew_tolerance(np, operator.dtype) * abs(matrix).max():
            return SparseState(operator, matrix, None, False, norm, 0.0, Status.NOT_SYMMETRIC)
    try:
        factor = _symmetric(matrix) if symmetric else scipy.sparse.linalg.splu(matrix)
    except RuntimeError:  # "Factor is exactly singular"
        return SparseState(operator, matrix, None, False, norm, 0.0, Status.SINGULAR)
    if symmetric and not _positive(factor):
        return SparseState(operator, matrix, None, False, norm, 0.0, Status.NOT_POSITIVE_DEFINITE)
    z = probe_vector(np, operator.n, np.float64, None)
    with np.errstate(all="ignore"):
        product = norm * math.sqrt(operator.n) * item_norm(np, factor.solve(z)) / item_norm(np, z)
    rcond = float(1 / product) if np.isfinite(product) and product > 0 else 0.0
    failed = Status.SINGULAR if rcond < 100 * np.finfo(float).eps else Status.CONVERGED
    return SparseState(operator, matrix, factor, False, norm, rcond, failed)


def _symmetric(matrix: Any) -> Any:
    import scipy.sparse.linalg

    return scipy.sparse.linalg.splu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )


def _positive(factor: Any) -> bool:
    return bool(np.all(factor.U.diagonal() > 0) and np.array_equal(factor.perm_r, factor.perm_c))


def solve(state: SparseState, b: Any) -> tuple[Any, Any, Counts]:
    """Solve for b of shape (*rhs, n), with one step of refinement."""
    size = np.asarray(item_norm(np, b))
    scale = np.where(size > 0, size, 1.0)
    unit = (b / scale[..., None]).astype(np.float64)
    if state.factor is None:
        nan = np.full(b.shape, np.nan, dtype=b.dtype)
        x = np.where((size == 0)[..., None], 0, nan)
        residual = np.where(size == 0, 0.0, np.nan)
        status = np.where(size == 0, 0, int(state.failed))
        return x, status, Counts(0, 0, residual, None, np.asarray(state.rcond), np.zeros_like(residual))
    matrix = state.matrix.T if state.transposed else state.matrix
    mode = "T" if state.transposed else "N"
    with np.errstate(all="ignore"):
        x = state.factor.solve(unit.T, mode)
        x = x + state.factor.solve(unit.T - matrix @ x, mode)
        residual = np.where(size == 0, 0.0, item_norm(np, (unit.T - matrix @ x).T))
    status, tolerance = classify(np, np.asarray(int(state.failed)), np.asarray(state.rcond), residual)
    status = np.where(size == 0, 0, status)
    x = np.where((size == 0)[..., None], 0, x.T).astype(b.dtype) * scale[..., None]
    norm = np.float64(state.norm / math.sqrt(state.operator.n))
    return x, status, Counts(0, 0, residual, norm, np.asarray(state.rcond), tolerance)
