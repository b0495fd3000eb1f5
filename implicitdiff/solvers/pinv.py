"""The pseudo-inverse by singular values: any A, singular or rectangular, with the rank that it has.

The rank is decided on the equilibrated matrix Â = R A C, where units have dropped out, against the accuracy to which A
is known. The solution is that of the user's own norms all the same: with Â⁺ of that rank, and orthogonal projectors on
the null spaces of A (spanned by C V₀) and of Aᵀ (by R U₀),

    A⁺ b = (I − P_N) C Â⁺ R (I − P_L) b.

References
----------
G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th ed., Johns Hopkins University Press, 2013, section 5.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, item_norm, quotient
from implicitdiff.linalg.block_operator import padded
from implicitdiff.linalg.equilibration import Scaling, of_matrix
from implicitdiff.linalg.operator import Operator, matrix_product
from implicitdiff.linalg.rectangular import regularised
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.gram import GramState, in_two_steps, two_steps
from implicitdiff.tolerances import LOST, NOISE_LEFT, RESIDUAL

__all__ = ["Pinv", "PinvState", "without"]


class PinvState(NamedTuple):
    """Singular values and vectors of Â = U S Vᵀ, and null spaces of A and Aᵀ where Â is not A.

    ``inverse`` holds 1/s, and zero beyond the rank.
    """

    operator: Operator
    matrix: Array
    u: Array
    v: Array
    inverse: Array
    scaling: Scaling | None
    null: Array | None
    left: Array | None
    norm: Array
    rcond: Array
    rank: Array
    failed: Array
    least_norm: bool = True
    """Whether of all solutions the one of least norm in the user's own norm is asked for."""

    def in_range(self, b: Array, tolerance: Array) -> tuple[Array, Array]:
        """Whether A x = b has a solution, judged on the equilibrated system; and b, or its part in the range of A."""
        xp = self.operator.backend.xp
        scaled = b if self.scaling is None else self.scaling.scaled(b)
        inside = _times(
            xp, self.u, xp.astype(self.inverse > 0, b.dtype) * _times(xp, xp.matrix_transpose(self.u), scaled)
        )
        size = item_norm(xp, scaled)
        solvable = item_norm(xp, scaled - inside) <= tolerance * size
        return solvable, xp.where(solvable[..., None], b, without(xp, self.left, b))


@dataclass(frozen=True, eq=False, repr=False)
class Pinv(Solver):
    """Pseudo-inverse by singular values: the solution of least squares and least norm, and the rank.

    The matrix is assembled where it is not given, and factored once for all right-hand sides and the transposed system.
    Where b is not in the range of A, it ends as `Status.LEAST_SQUARES`, with x at hand. The report has ``rank``,
    ``nullity`` and ``leak``, the part of b that is not in the range.

    Parameters
    ----------
    damping : float, default 0
        δ of A + δI where A is square. Where it is not, δ is Tikhonov's: x minimises ‖b − A x‖² + δ² ‖x‖².

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.array([[2.0, 2.0], [2.0, 2.0]])
    >>> x, report = linear_solve(A, np.array([4.0, 4.0]), solver="pinv", return_report=True)
    >>> np.round(x, 6), report.rank, report.nullity
    (array([1., 1.]), 1, 1)
    """

    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "pinv"
    square: ClassVar[bool] = False
    direct: ClassVar[bool] = True
    verified: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    least_squares: ClassVar[bool] = True

    def init(self, operator: Operator) -> Any:
        if getattr(operator, "root", None) is not None:
            return two_steps(self, operator)
        operator = regularised(operator, self.damping)
        backend, m, n = operator.backend, operator.rows, operator.columns
        xp, matrix = backend.xp, backend.to_double(operator.dense())
        finite = xp.all(xp.isfinite(matrix), axis=(-2, -1))
        matrix = xp.where(finite[..., None, None], matrix, xp.zeros_like(matrix))
        failed = xp.astype(~finite, xp.int32) * int(Status.NON_FINITE)
        scaling = _scaling(operator, matrix)
        if scaling is not None:
            matrix = scaling.rows[..., :, None] * matrix * scaling.columns[..., None, :]
        u, s, vt = xp.linalg.svd(matrix, full_matrices=False)
        norm = item_norm(xp, xp.reshape(matrix, (*matrix.shape[:-2], -1)))
        kept = s > _threshold(operator, scaling, norm)[..., None]
        rank = xp.sum(xp.astype(kept, xp.int32), axis=-1)
        inverse = quotient(xp, 1.0, s, kept)
        largest = xp.max(inverse, axis=-1)
        rcond = quotient(xp, 1.0, norm * largest, norm * largest > 0)
        v = xp.matrix_transpose(vt)
        null = left = None
        if scaling is not None and (backend.traced or any_true(xp, rank < min(m, n))):
            null, left = (_basis(xp, scale[..., :, None] * x, kept) if x.shape[-2] == x.shape[-1] else None
                          for scale, x in ((scaling.columns, v), (scaling.rows, u)))  # fmt: skip
        return PinvState(operator, matrix, u, v, inverse, scaling, null, left, norm, rcond, rank, failed)

    def transpose(self, state: Any) -> Any:
        if isinstance(state, GramState):
            return state
        scaling = None if state.scaling is None else state.scaling.transpose()
        matrix = state.operator.backend.xp.matrix_transpose(state.matrix)
        return state._replace(
            operator=state.operator.transpose(), matrix=matrix, u=state.v, v=state.u, scaling=scaling,
            null=state.left, left=state.null,
        )  # fmt: skip

    def factored(self, state: Any) -> bool:
        return True

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        if isinstance(state, GramState):
            return in_two_steps(state, b, x0)
        op, backend = state.operator, state.operator.backend
        xp, scaling = backend.xp, state.scaling
        given = b
        b = backend.to_double(padded(backend, b, op.rows))
        size = item_norm(xp, b)
        zero = size == 0
        b = b / xp.where(zero, xp.ones_like(size), size)[..., None]
        tolerance = _tolerance(xp, state)
        solvable, right = state.in_range(b, tolerance)
        x = _inverse(xp, state, right)
        x = x + _inverse(xp, state, right - _product(xp, state, x))
        if state.least_norm and state.null is not None:  # in a norm of other units: what that leaves is small
            x = without(xp, state.null, x)
            x = x + _inverse(xp, state, right - _product(xp, state, x))
        r = b - _product(xp, state, x)
        residual = item_norm(xp, r)
        # what is left has to be orthogonal to the range
        missed = item_norm(xp, _product(xp, state, _inverse(xp, state, right - _product(xp, state, x))))
        judged = _size(xp, scaling, r) / divisor(xp, _size(xp, scaling, b))
        consistent = zero | (solvable & (judged <= tolerance))
        residual = xp.where(consistent & (judged < residual), judged, residual)
        none = xp.zeros_like(xp.astype(residual, xp.int32))
        status = xp.where(missed <= tolerance, none + int(Status.LEAST_SQUARES), none + int(Status.STAGNATED))
        status = xp.where(consistent, none, status)
        status = xp.where(xp.isfinite(residual), status, none + int(Status.NON_FINITE))
        status = xp.where(state.failed != 0, state.failed + none, status)
        x = backend.astype(x * size[..., None], given.dtype)
        even = 0 * residual
        counts = Counts(0, 0, residual, state.norm + even, state.rcond + even, tolerance + even,
                        rank=state.rank + xp.astype(even, xp.int32), leak=residual)  # fmt: skip
        return x, status, counts


def _scaling(operator: Operator, matrix: Array) -> Scaling | None:
    """R and C; of a matrix that is not square those on its shorter side only, where they change no norm."""
    xp, m, n = operator.backend.xp, operator.rows, operator.columns
    if m == n:
        return of_matrix(operator.backend, matrix, symmetric=bool(operator.symmetric))
    if operator.damping:  # of Tikhonov: in the user's norm
        return None
    largest = xp.max(xp.abs(matrix), axis=-2 if m > n else -1)
    even = 2.0 ** xp.round(xp.log2(quotient(xp, 1.0, largest, largest > 0) + xp.astype(largest == 0, largest.dtype)))
    ones = xp.ones_like(matrix[..., 0] if m > n else matrix[..., 0, :])
    return Scaling(ones, even) if m > n else Scaling(even, ones)


def _threshold(operator: Operator, scaling: Scaling | None, norm: Array) -> Array:
    """Size of a singular value of Â that may be zero."""
    xp = operator.backend.xp
    eps, own = float(xp.finfo(norm.dtype).eps), float(xp.finfo(operator.dtype).eps)
    known = max(eps, operator.accuracy, 0.25 * own)
    if not operator.offset:
        return known / LOST * norm
    # what is left of I − ∂T is known to the rounding of 1
    unit = 1.0 if scaling is None else xp.max(scaling.rows * scaling.columns, axis=-1)
    return known / LOST * xp.maximum(norm, norm * 0 + operator.offset * unit)


def _tolerance(xp: Any, state: PinvState) -> Array:
    """Part of b outside of the range that may be rounding, or noise of A."""
    op = state.operator
    least = max(RESIDUAL.at(xp, op.dtype), min(30 * op.accuracy, NOISE_LEFT))
    found = quotient(xp, 10 * op.resolution, state.rcond, state.rcond > 0)
    found = xp.where(found < NOISE_LEFT, found, NOISE_LEFT + 0 * found)
    return xp.where(found > least, found, least + 0 * found)


def _basis(xp: Any, vectors: Array, kept: Array) -> Array:
    """Return an orthonormal basis of the vectors that are not kept, as columns; zeros in the place of the others."""
    free = xp.astype(~kept, vectors.dtype)
    first = xp.flip(vectors * free[..., None, :], axis=-1)  # singular values are in descending order
    q, _ = xp.linalg.qr(first)
    return q * xp.flip(free, axis=-1)[..., None, :]


def without(xp: Any, basis: Array | None, x: Array) -> Array:
    """Return what of x is orthogonal to a basis; twice is enough."""
    if basis is None:
        return x
    for _ in range(2):
        x = x - _times(xp, basis, _times(xp, xp.matrix_transpose(basis), x))
    return x


def _times(xp: Any, matrix: Array, x: Array) -> Array:
    return matrix_product(xp, matrix)(x)


def _size(xp: Any, scaling: Scaling | None, x: Array) -> Array:
    """‖R x‖."""
    return item_norm(xp, x if scaling is None else scaling.scaled(x))


def _inverse(xp: Any, state: PinvState, b: Array) -> Array:
    """C Â⁺ R b."""
    b = b if state.scaling is None else state.scaling.scaled(b)
    x = _times(xp, state.v, state.inverse * _times(xp, xp.matrix_transpose(state.u), b))
    return x if state.scaling is None else state.scaling.restored(x)


def _product(xp: Any, state: PinvState, x: Array) -> Array:
    """A x."""
    if state.scaling is None:
        return _times(xp, state.matrix, x)
    return state.scaling.residual(_times(xp, state.matrix, state.scaling.start(x)))
