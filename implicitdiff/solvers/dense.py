"""What the direct methods share: assembly, the condition estimate, the true residual, refinement.

The matrix is assembled once, widened to double precision where the framework has it (a single-precision
factorisation loses all digits at a condition number that is harmless in double), factored once, and serves
all right-hand sides and the transposed system.

References
----------
J. D. Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 20
(1983) 812-814. DOI 10.1137/0720053 (the estimate of ‖A⁻¹‖ from a probe vector)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, any_true, item_norm, probe_vector
from implicitdiff.operator import Operator
from implicitdiff.report import Counts, Status
from implicitdiff.solvers.base import Solver

__all__ = ["DenseSolver", "DenseState", "asymmetry", "classify"]


class DenseState(NamedTuple):
    """A factored matrix.

    ``rcond`` estimates 1/(‖A‖ ‖A⁻¹‖) and ``failed`` holds a status per item, 0 where the factorisation is sound.
    """

    operator: Operator
    matrix: Array
    factor: Any
    transposed: bool
    norm: Array
    rcond: Array
    failed: Array


@dataclass(frozen=True)
class DenseSolver(Solver):
    """Base of the direct methods on an assembled matrix.

    Parameters
    ----------
    damping : float, default 0
        Solve (A + damping I) x = b.
    """

    damping: float = 0.0

    symmetric: ClassVar[bool] = False

    def factor(self, backend: Any, matrix: Array) -> Any:
        """Factor matrices of shape (*items, n, n); entries that are not finite mean failure."""
        raise NotImplementedError

    def apply(self, backend: Any, factor: Any, b: Array, transposed: bool) -> Array:
        """Solve with columns b, shape (*items, n, k)."""
        raise NotImplementedError

    def broken(self, xp: Any, factor: Any) -> Array | None:
        """Items whose factorisation says that the matrix is not positive definite."""
        return None

    def init(self, operator: Operator) -> Any:
        if operator.sparse is not None:
            from implicitdiff.solvers import sparse

            return sparse.init(operator, symmetric=self.symmetric)
        backend = operator.backend
        xp = backend.xp
        matrix = backend.widen(operator.dense())
        finite = xp.all(xp.isfinite(matrix), axis=(-2, -1))
        if not any_true(xp, ~finite):
            return self._init(operator, matrix, xp.zeros(operator.items, dtype=xp.int32, device=operator.device))
        eye = xp.eye(operator.n, dtype=matrix.dtype, device=operator.device)
        bad = xp.where(
            finite, 0, xp.full(operator.items, int(Status.NON_FINITE), dtype=xp.int32, device=operator.device)
        )
        return self._init(operator, xp.where(finite[..., None, None], matrix, eye), bad)

    def _init(self, operator: Operator, matrix: Array, failed: Array) -> DenseState:
        backend = operator.backend
        xp = backend.xp
        if self.symmetric or operator.symmetric:
            if not operator.trusted:
                skew = asymmetry(xp, matrix)
                failed = xp.where((skew > skew_tolerance(xp, operator.dtype)) & (failed == 0),
                                  xp.full_like(failed, int(Status.NOT_SYMMETRIC)), failed)  # fmt: skip
            # a Hessian from differences, or one declared symmetric, is so up to noise: take its symmetric part
            matrix = 0.5 * (matrix + xp.matrix_transpose(matrix))
        factor = self.factor(backend, matrix)
        broken = self.broken(xp, factor)
        if broken is not None:
            failed = xp.where(broken & (failed == 0), xp.full_like(failed, int(Status.NOT_POSITIVE_DEFINITE)), failed)
        flat = xp.reshape(matrix, (*operator.items, operator.n**2))
        norm = item_norm(xp, flat)
        z = probe_vector(xp, operator.n, matrix.dtype, operator.device)
        z = xp.broadcast_to(z, (*operator.items, operator.n))
        w = self.apply(backend, factor, z[..., None], False)[..., 0]
        inverse = math.sqrt(operator.n) * item_norm(xp, w) / item_norm(xp, z)
        product = norm * inverse
        usable = xp.isfinite(product) & (product > 0)
        one = xp.ones_like(product)
        rcond = xp.where(usable, one / xp.where(usable, product, one), 0 * one)
        # one probe sees ‖A⁻¹‖_F up to a modest factor; at 1 % of uncertainty the solution is told singular
        eps = float(xp.finfo(matrix.dtype).eps)
        failed = xp.where((rcond < 100 * eps) & (failed == 0), xp.full_like(failed, int(Status.SINGULAR)), failed)
        return DenseState(operator, matrix, factor, False, norm, rcond, failed)

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        if not isinstance(state, DenseState):
            from implicitdiff.solvers import sparse

            return sparse.solve(state, b)
        backend, items = state.operator.backend, state.operator.items
        xp = backend.xp
        size = item_norm(xp, b)
        scale = xp.where(size > 0, size, xp.ones_like(size))
        unit = backend.widen(b / scale[..., None])
        columns = _to_columns(xp, unit, items)
        x = self.apply(backend, state.factor, columns, state.transposed)
        r = columns - _product(xp, state, x)
        correction = self.apply(backend, state.factor, r, state.transposed)
        x = x + correction  # one step of refinement: the residual was needed anyway
        r = columns - _product(xp, state, x)
        x, r = _from_columns(xp, x, unit.shape), _from_columns(xp, r, unit.shape)
        residual = item_norm(xp, r)
        residual = xp.where(size == 0, xp.zeros_like(residual), residual)
        status, tolerance = classify(xp, state.failed, state.rcond, residual)
        status = xp.where(size == 0, xp.zeros_like(status), status)
        x = xp.where((size == 0)[..., None], xp.zeros_like(x), x)
        x = backend.astype(x, b.dtype) * scale[..., None]
        return x, status, Counts(0, 0, residual, state.norm / math.sqrt(state.operator.n), state.rcond, tolerance)

    def transpose(self, state: Any) -> Any:
        if state.operator.symmetric:
            return state
        return state._replace(operator=state.operator.transpose(), transposed=not state.transposed)


def classify(xp: Any, failed: Array, rcond: Array, residual: Array) -> tuple[Array, Array]:
    """Status per right-hand side, and the residual that was still called success.

    A backward-stable solve leaves at most about eps κ; more than a hundredfold of that is a defect.
    """
    eps = float(xp.finfo(residual.dtype).eps)
    safe = xp.where(rcond > 0, rcond, xp.ones_like(rcond))
    tolerance = xp.where(rcond > 0, 100 * eps / safe, 0 * safe)
    tolerance = xp.where(tolerance > 1e-10, tolerance, 0 * tolerance + 1e-10)
    good = residual <= tolerance
    failed = xp.broadcast_to(failed, residual.shape)
    stagnated = xp.full(residual.shape, int(Status.STAGNATED), dtype=failed.dtype, device=_device(residual))
    status = xp.where((failed == 0) & ~good, stagnated, failed)
    status = xp.where((failed == 0) & xp.isnan(residual), xp.full_like(status, int(Status.NON_FINITE)), status)
    return status, tolerance


def _device(x: Array) -> Any:
    import array_api_compat

    return array_api_compat.device(x)


def asymmetry(xp: Any, matrix: Array) -> Array:
    """‖A − Aᵀ‖ / ‖A‖ in the largest entry, per item."""
    skew = xp.max(xp.abs(matrix - xp.matrix_transpose(matrix)), axis=(-2, -1))
    size = xp.max(xp.abs(matrix), axis=(-2, -1))
    return xp.where(size > 0, skew / xp.where(size > 0, size, xp.ones_like(size)), 0 * size)


def skew_tolerance(xp: Any, dtype: Any) -> float:
    """Asymmetry up to which a matrix counts as symmetric: noise of finite differences passes."""
    return 1e-5 if float(xp.finfo(dtype).eps) < 1e-10 else 1e-3


def _product(xp: Any, state: DenseState, x: Array) -> Array:
    matrix = xp.matrix_transpose(state.matrix) if state.transposed else state.matrix
    return matrix @ x


def _to_columns(xp: Any, b: Array, items: tuple[int, ...]) -> Array:
    """(*rhs, *items, n) -> (*items, n, k)."""
    return b[..., None] if len(b.shape) == len(items) + 1 else xp.moveaxis(b, 0, -1)


def _from_columns(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    return x[..., 0] if x.shape[:-1] == shape else xp.moveaxis(x, -1, 0)
