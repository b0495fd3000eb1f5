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
from implicitdiff.linalg.equilibration import Scaling, of_sparse, scaled_sparse
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.checks import PROBES, amplification, classify, skew_tolerance
from implicitdiff.tolerances import LOST

__all__ = ["SparseState", "init", "solve"]


class SparseState(NamedTuple):
    """A factored sparse matrix, equilibrated; ``failed`` is a status, 0 where the factorisation is sound.

    ``size`` is the Frobenius norm of A itself.
    """

    operator: Operator
    matrix: Any
    scaling: Scaling | None
    factor: Any
    transposed: bool
    size: float
    rcond: float
    failed: int

    def transpose(self) -> SparseState:
        """Of Aᵀ."""
        scaling = None if self.scaling is None else self.scaling.transpose()
        return self._replace(operator=self.operator.transpose(), scaling=scaling, transposed=not self.transposed)


def init(operator: Operator, *, symmetric: bool) -> SparseState:
    """Factor the operator's sparse matrix."""
    import scipy.sparse.linalg

    matrix, scaling = operator.sparse.astype(np.float64), None
    size = math.nan

    def state(status: int, factor: Any = None, rcond: float = 0.0) -> SparseState:
        return SparseState(operator, matrix, scaling, factor, False, size, rcond, status)

    if not np.all(np.isfinite(matrix.data)):
        return state(Status.NON_FINITE)
    size, as_symmetric = _frobenius(matrix), symmetric or bool(operator.symmetric)
    scaling = of_sparse(operator.backend, matrix, symmetric=as_symmetric)
    if scaling is not None:
        matrix = scaled_sparse(matrix, scaling)
    if as_symmetric:
        skew = abs(matrix - matrix.T).max()
        if not operator.trusted and skew > skew_tolerance(np, operator.dtype) * abs(matrix).max():
            return state(Status.NOT_SYMMETRIC)
        if skew:
            matrix = (0.5 * (matrix + matrix.T)).tocsc()
    try:
        factor = _symmetric(matrix) if symmetric else scipy.sparse.linalg.splu(matrix, **_ordering(matrix))
    except RuntimeError:  # "Factor is exactly singular"
        return state(Status.SINGULAR)
    if symmetric and not _positive(factor):
        return state(Status.NOT_POSITIVE_DEFINITE)
    z = probe_vector(np, PROBES * operator.n, np.float64, None).reshape(PROBES, -1)
    with np.errstate(all="ignore"):
        gains = item_norm(np, factor.solve(z.T).T) / item_norm(np, z)
        product = _frobenius(matrix) * item_norm(np, gains) / math.sqrt(PROBES)
    rcond = float(1 / product) if np.isfinite(product) and product > 0 else 0.0
    least = max(float(np.finfo(float).eps), operator.resolution) / LOST
    return state(Status.SINGULAR if rcond < least else Status.CONVERGED, factor, rcond)


def _ordering(matrix: Any) -> dict[str, Any]:
    """Options of SuperLU: where A has the pattern of Aᵀ and a diagonal, an order by that pattern fills in less.

    A pivot may then be a tenth of the largest in its column, so that the order is kept; refinement makes up for that.
    """
    pattern = matrix.astype(bool)
    if not np.all(matrix.diagonal()) or (pattern != pattern.T).nnz:
        return {}
    return {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.1}


def _frobenius(matrix: Any) -> float:
    return float(item_norm(np, matrix.data)) if matrix.nnz else 0.0


def _symmetric(matrix: Any) -> Any:
    import scipy.sparse.linalg

    return scipy.sparse.linalg.splu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )


def _positive(factor: Any) -> bool:
    return bool(np.all(factor.U.diagonal() > 0) and np.array_equal(factor.perm_r, factor.perm_c))


def solve(state: SparseState, b: Any) -> tuple[Any, Any, Counts]:
    """Solve for b of shape (*rhs, n), with one step of refinement."""
    wide = b.astype(np.float64)
    wide = wide if state.scaling is None else state.scaling.scaled(wide)
    size = np.asarray(item_norm(np, wide))
    scale = np.where(size > 0, size, 1.0)
    unit = wide / scale[..., None]
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
        r = (unit.T - matrix @ x).T
    residual = np.where(size == 0, 0.0, item_norm(np, r))
    status, tolerance = classify(np, np.asarray(int(state.failed)), np.asarray(state.rcond), residual)
    if state.scaling is not None:
        backend = state.operator.backend
        residual = state.scaling.reported_residual(backend, (status == 0) & (size > 0), (residual, tolerance), r, unit)
    status = np.where(size == 0, 0, status)
    x = np.where((size == 0)[..., None], 0, x.T)
    rcond = np.asarray(state.rcond)
    condition = amplification(np, state.operator, state.scaling, np.asarray(_frobenius(state.matrix)), rcond, x)
    x = x if state.scaling is None else state.scaling.restored(x)
    x = (x * scale[..., None]).astype(b.dtype)
    norm = np.float64(state.size / math.sqrt(state.operator.n))
    return x, status, Counts(0, 0, residual, norm, rcond, tolerance, condition)
