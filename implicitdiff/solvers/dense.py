"""What the direct methods share: assembly, equilibration, the condition estimate, the true residual, refinement.

The matrix is assembled once, widened to double precision where the framework has it (a single-precision
factorisation loses all digits at a condition number that is harmless in double), equilibrated, factored once, and
serves all right-hand sides and the transposed system. What is judged, rank, symmetry and residual, is judged on the
equilibrated matrix, and the rank is held against the precision in which A was made, not that of the factors.

References
----------
J. D. Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 20
(1983) 812-814. DOI 10.1137/0720053 (the estimate of ‖A⁻¹‖ from probe vectors)
R. Freivalds, "Fast probabilistic algorithms", Mathematical Foundations of Computer Science 1979, Lecture Notes in
Computer Science 74, 57-69. DOI 10.1007/3-540-09526-8_5 (a product of matrices held against one of vectors)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, item_norm, needed, nowhere, probe_vector, quotient
from implicitdiff.linalg.equilibration import Scaling, of_matrix
from implicitdiff.linalg.operator import Operator, Product, matrix_product
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers import hosted
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.checks import PROBES, amplification, asymmetry, cancelled, classify, skew_tolerance
from implicitdiff.tolerances import LOST, ROUNDED, WELL_CONDITIONED, is_double

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["DenseSolver", "DenseState", "weakest"]


TOGETHER = 64
"""Right-hand sides from which their residuals are seen on combinations: b − A x would take as long as the solution."""
STABLE = 100.0
"""Times the rounding of a product: a larger residual is no rounding."""


class DenseState(NamedTuple):
    """A factored matrix.

    ``matrix`` is equilibrated, ``norm`` its Frobenius norm, ``size`` that of A. ``rcond`` estimates 1/(‖Â‖ ‖Â⁻¹‖) and
    ``failed`` holds a status per item, 0 where the factorisation is sound. Where JAX is tracing, ``rcond`` is None: the
    estimate comes with the solve, as one more right-hand side.
    """

    operator: Operator
    matrix: Array
    scaling: Scaling | None
    factor: Any
    transposed: bool
    norm: Array
    size: Array
    rcond: Array
    failed: Array


@dataclass(frozen=True, eq=False, repr=False)
class DenseSolver(Solver):
    """Base of the direct methods on an assembled matrix.

    Parameters
    ----------
    damping : float, default 0
        Solve (A + damping I) x = b.
    """

    damping: float | Literal["auto"] = 0.0
    direct: ClassVar[bool] = True

    verified: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    definite: ClassVar[bool] = False
    """Whether the method is for positive definite matrices, of which the diagonal tells the scales."""

    def factor(self, backend: Backend, matrix: Array) -> Any:
        """Factor matrices of shape (*items, n, n); entries that are not finite mean failure."""
        raise NotImplementedError

    def factors(self, operator: Operator, matrix: Array, scaling: Scaling | None) -> Any:
        """Factor the equilibrated matrix of an operator."""
        return self.factor(operator.backend, matrix)

    def apply(self, backend: Backend, factor: Any, b: Array, transposed: bool) -> Array:
        """Solve with columns b, shape (*items, n, k)."""
        raise NotImplementedError

    def broken(self, xp: Any, factor: Any) -> Array | None:
        """Items whose factorisation says that the matrix is not positive definite."""
        return None

    def init(self, operator: Operator) -> Any:
        if operator.sparse is not None or operator.entries is not None:
            return hosted.init(operator, symmetric=self.symmetric)
        backend = operator.backend
        xp = backend.xp
        matrix, size, failed = _screened(operator, backend.to_double(operator.dense()))
        symmetric = bool(self.symmetric or operator.symmetric)
        scaling = of_matrix(backend, matrix, symmetric=symmetric, definite=self.definite)
        if scaling is not None:
            matrix = scaling.rows[..., :, None] * matrix * scaling.columns[..., None, :]
        if symmetric:
            matrix, failed = _symmetrised(operator, matrix, failed, needed_by_factors=self.symmetric)
        factor = self.factors(operator, matrix, scaling)
        broken = self.broken(xp, factor)
        if broken is not None:
            failed = _mark(xp, failed, broken, Status.NOT_POSITIVE_DEFINITE)
        norm = size if scaling is None else _frobenius(backend, matrix)
        if backend.traced:
            failed = xp.where(xp.isfinite(norm), failed, xp.full_like(failed, int(Status.NON_FINITE)))
        state = DenseState(operator, matrix, scaling, factor, False, norm, size, None, failed)
        if backend.traced:
            return state
        z = _probes(state)
        w = self.rows(state, z)
        # one step of the power method for (Aᵀ A)⁻¹: few vectors may all be nearly orthogonal to a singular one
        v = xp.sum(w, axis=0)
        size = item_norm(xp, v)[..., None]
        v = self.rows(state._replace(transposed=True), v / divisor(xp, size))
        return _with_condition(state, z, w, item_norm(xp, v))

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        if not isinstance(state, DenseState):
            return hosted.solve(state, b)
        backend = state.operator.backend
        xp = backend.xp
        wide = backend.to_double(b)
        wide = wide if state.scaling is None else state.scaling.scaled(wide)
        size = item_norm(xp, wide)
        zero = size == 0
        scale = xp.where(zero, xp.ones_like(size), size)[..., None]
        if backend.traced:
            state, x, r, residual = self._with_probe(state, wide / scale)
        else:
            x, r, residual = self._refined(state, wide / scale)
        state = _by_solution(state, x)
        rcond = state.rcond**2 if _is_gram(state) else state.rcond  # the residual is that of A
        status, tolerance = classify(xp, state.failed, rcond, residual, _explained(state, x))
        if state.scaling is not None and r is not None:
            converged = status == int(Status.CONVERGED)
            residual = state.scaling.reported_residual(backend, converged, (residual, tolerance), r, wide / scale)
        condition = amplification(xp, state.operator, state.scaling, state.norm, state.rcond, x)
        if needed(backend, zero):
            residual = xp.where(zero, xp.zeros_like(residual), residual)
            status = xp.where(zero, xp.zeros_like(status), status)
            x = xp.where(zero[..., None], xp.zeros_like(x), x)
        x = x if state.scaling is None else state.scaling.restored(x)
        x *= scale  # of its own, and as large as A where the columns are many
        norm = state.size / math.sqrt(state.operator.n)
        return backend.astype(x, b.dtype), status, Counts(0, 0, residual, norm, state.rcond, tolerance, condition)

    def factored(self, state: Any) -> bool:
        return True

    def loosely(self, state: Any, b: Array) -> tuple[Array, Any, Counts]:
        if not isinstance(state, DenseState) or not state.operator.backend.traced:
            return self.solve(state, b)
        backend = state.operator.backend  # a second estimate of the condition number would only cost compilation
        xp = backend.xp
        wide = backend.to_double(b)
        x = self.rows(state, wide if state.scaling is None else state.scaling.scaled(wide))
        x = x if state.scaling is None else state.scaling.restored(x)
        failed = xp.broadcast_to(state.failed, tuple(b.shape[:-1]))
        status = xp.where(xp.isfinite(item_norm(xp, x)), failed, int(Status.NON_FINITE))
        return backend.astype(x, b.dtype), status, Counts()

    def _refined(self, state: DenseState, b: Array) -> tuple[Array, Array | None, Array]:
        """Return x, b − A x and its norms; solve once more for it where the factors left one beyond rounding.

        Of many right-hand sides the norms are bounds, and b − A x is None, where `_together` tells enough.
        """
        backend = state.operator.backend
        xp = backend.xp
        product = matrix_product(xp, state.matrix, transposed=state.transposed)
        x = self.rows(state, b)
        if _are_many(state, b):
            bound, doubt = _together(state, product, b, x)
            if not any_true(xp, doubt):
                return x, None, bound
        r = b - product(x)
        residual = xp.sqrt(xp.vecdot(r, r))

        def refine(found: tuple[Array, Array]) -> tuple[Array, Array]:
            x = found[0] + self.rows(state, found[1])
            return x, b - product(x)

        x, r = backend.if_any(~(residual <= STABLE * _rounding(state, x)), refine, (x, r))
        return x, r, xp.sqrt(xp.vecdot(r, r))

    def _with_probe(self, state: DenseState, b: Array) -> tuple[DenseState, Array, Array | None, Array]:
        """Solve for b and for the probe vectors in one go.

        A compiled program has no branch that is cheap: data in single precision is always refined, in double never.
        (XLA may compute an entry of A twice: see `_explained`.) And XLA was seen to hang, on the CPU, where calls of
        LAPACK run at the same time or in a loop: these follow one another.
        """
        backend, lead = state.operator.backend, len(state.operator.items)
        xp = backend.xp
        product = matrix_product(xp, state.matrix, transposed=state.transposed)
        many = len(b.shape) > lead + 1
        z = _probes(state)
        rows = self.rows(state, xp.concat([b if many else b[None, ...], z], axis=0))
        x, w = (rows[:-PROBES, ...] if many else rows[0, ...]), rows[-PROBES:, ...]
        double = is_double(float(xp.finfo(state.operator.dtype).eps))
        if double and _are_many(state, b):
            bound, doubt = _together(state, product, b, x)
            residual = backend.if_any(doubt, lambda old: item_norm(xp, b - product(x)) + 0 * old, bound)
            return _with_condition(state, z, w), x, None, residual
        r = b - product(x)
        if not double and not _is_gram(state):
            x = x + self.rows(state, r)
            r = b - product(x)
        return _with_condition(state, z, w), x, r, xp.sqrt(xp.vecdot(r, r))

    def rows(self, state: DenseState, b: Array) -> Array:
        """Solve for b of shape (*rhs, *items, n), whose right-hand sides are columns to LAPACK."""
        backend, items = state.operator.backend, state.operator.items
        xp = backend.xp
        if len(b.shape) == len(items) + 1:
            return self.apply(backend, state.factor, b[..., None], state.transposed)[..., 0]
        if not items:  # the same, at a fraction of the cost of `moveaxis` in Python
            return xp.matrix_transpose(self.apply(backend, state.factor, xp.matrix_transpose(b), state.transposed))
        x = self.apply(backend, state.factor, xp.moveaxis(b, 0, -1), state.transposed)
        return xp.moveaxis(x, -1, 0)

    def transpose(self, state: Any) -> Any:
        if state.operator.symmetric:
            return state
        if not isinstance(state, DenseState):
            return state.transpose()
        scaling = None if state.scaling is None else state.scaling.transpose()
        return state._replace(operator=state.operator.transpose(), scaling=scaling, transposed=not state.transposed)


def _probes(state: DenseState) -> Array:
    """Return vectors without structure for every item, shape (PROBES, *items, n)."""
    op = state.operator
    xp = op.backend.xp
    z = probe_vector(xp, PROBES * op.n, state.matrix.dtype, op.device, constant=not op.backend.spread)
    z = xp.reshape(z, (PROBES, *(1,) * len(op.items), op.n))
    return xp.broadcast_to(z, (PROBES, *op.items, op.n)) if op.items else z


def _rounding(state: DenseState, x: Array) -> Array:
    """The size of b − A x that rounding explains, eps ‖A‖ ‖x‖; factors that are stable leave no more."""
    xp = state.operator.backend.xp
    return float(xp.finfo(x.dtype).eps) * (1 + state.norm * xp.sqrt(xp.vecdot(x, x)))


def _are_many(state: DenseState, b: Array) -> bool:
    """Whether b holds so many right-hand sides that their residuals are looked at together."""
    return len(b.shape) > len(state.operator.items) + 1 and b.shape[0] >= TOGETHER


def _together(state: DenseState, product: Product, b: Array, x: Array) -> tuple[Array, Array]:
    """Bound ‖b − A x‖ of each right-hand side from a few combinations of them; and where that does not tell enough.

    With columns b_j − A x_j in units u_j of their rounding and weights g_j without structure, one column that is wrong
    shows in Σ_j g_j (b_j − A x_j)/u_j, which takes one product with A and not one for each (Freivalds). Its squared
    norm is about the sum of those of the columns, so that it bounds each, in rounding, by √m.

    Returns
    -------
    tuple of array, shape (*rhs, *items)
        The bounds, and whether b − A x is to be made.
    """
    op = state.operator
    xp, items, rhs = op.backend.xp, len(op.items), b.shape[0]
    g = probe_vector(xp, PROBES * rhs, b.dtype, op.device, constant=not op.backend.spread)
    g = xp.reshape(g, (PROBES, rhs))
    g = g / xp.sqrt(xp.sum(g * g, axis=0))
    unit = _rounding(state, x)
    weights = xp.reshape(g, (PROBES, rhs, *(1,) * items)) / unit
    weights = xp.moveaxis(weights, (0, 1), (-2, -1)) if items else weights

    def combined(vectors: Array) -> Array:
        return xp.moveaxis(weights @ xp.moveaxis(vectors, 0, -2), -2, 0) if items else weights @ vectors

    r = combined(b) - product(combined(x))
    seen = xp.sqrt(xp.sum(xp.vecdot(r, r), axis=0))
    bound = seen * unit
    return bound, ~((seen <= STABLE) & (bound <= 100 / WELL_CONDITIONED))


def weakest(solver: DenseSolver, op: Operator, matrix: Array) -> tuple[DenseState, Array]:
    """Return the factors of an equilibrated matrix with its condition, and vectors near where ‖A x‖ is least."""
    matrix, norm, failed = _screened(op, matrix)
    state = DenseState(op, matrix, None, solver.factor(op.backend, matrix), False, norm, norm, None, failed)
    z = _probes(state)
    w = solver.rows(state, z)
    return _with_condition(state, z, w), w


def _with_condition(state: DenseState, z: Array, w: Array, gain: Any = 0.0) -> DenseState:
    """Estimate 1/(‖A‖ ‖A⁻¹‖) from w, the images of the probe vectors z under A⁻¹, and from a gain of A⁻ᵀ.

    ‖A‖ is the Frobenius norm and ‖A⁻¹‖ that of the image of a unit vector without structure, about the Frobenius norm
    over √n: together what an error of A without structure, of relative size ε, does to a solution, in units of ε.
    """
    xp = state.operator.backend.xp
    gains = item_norm(xp, w) / item_norm(xp, z)
    gains = item_norm(xp, xp.moveaxis(gains, 0, -1) if state.operator.items else gains) / math.sqrt(PROBES)
    product = state.norm * xp.maximum(gains, gains * 0 + gain / math.sqrt(state.operator.n))
    usable = xp.isfinite(product) & (product > 0)
    rcond = quotient(xp, 1.0, product, usable)
    rcond = xp.sqrt(rcond) if _is_gram(state) else rcond
    failed = _mark(xp, state.failed, rcond < _least(state), Status.SINGULAR)
    if state.operator.offset:
        lost = xp.max(cancelled(xp, state.operator, state.scaling, state.norm, w), axis=0)
        failed = _mark(xp, failed, rcond < lost / LOST, Status.SINGULAR)
    return state._replace(rcond=rcond, failed=failed)


def _explained(state: DenseState, x: Array) -> Array | float:
    """Residual that is rounding of a single-precision A: a compiled program may make it anew for each use.

    XLA merges the making of a matrix into what uses it, with other roundings, and no barrier of its language keeps it
    from that: x may solve the system of one A, and be held against another.
    """
    op = state.operator
    xp = op.backend.xp
    if not op.backend.traced or is_double(float(xp.finfo(op.dtype).eps)):
        return 0.0
    return ROUNDED * op.rounding * state.norm * item_norm(xp, x)


def _is_gram(state: DenseState) -> bool:
    """Whether what was factored is J of A = JᵀJ: then it is the condition of J that counts."""
    return getattr(state.operator, "root", None) is not None


def _least(state: DenseState) -> float:
    """Below which rcond A is singular to the accuracy that it has."""
    return max(float(state.operator.backend.xp.finfo(state.matrix.dtype).eps), state.operator.resolution) / LOST


def _by_solution(state: DenseState, x: Array) -> DenseState:
    """Take over what the solution for a unit vector shows of A⁻¹, where that is more than the probe vectors did."""
    xp = state.operator.backend.xp
    gain = state.norm * item_norm(xp, x) / math.sqrt(state.operator.n)
    gain = xp.sqrt(gain) if _is_gram(state) else gain
    if nowhere(state.rcond * gain > 1):  # as nearly always
        return state
    rcond = xp.where(state.rcond * gain > 1, 1 / divisor(xp, gain), state.rcond)
    failed = _mark(xp, xp.broadcast_to(state.failed, rcond.shape), rcond < _least(state), Status.SINGULAR)
    return state._replace(rcond=rcond, failed=failed)


def _frobenius(backend: Backend, matrix: Array) -> Array:
    """‖A‖_F per item, also where squares of entries are lost."""
    xp = backend.xp
    entries = xp.reshape(matrix, (*matrix.shape[:-2], -1))
    if not backend.traced:  # a pass over the matrices in place of four
        size, kind = xp.linalg.vector_norm(entries, axis=-1), xp.finfo(matrix.dtype)
        least = math.sqrt(float(kind.smallest_normal) / float(kind.eps))  # squares below it are lost beside the rest
        if not any_true(xp, ~((size > least) & (size < 1 / least))):
            return size
    return item_norm(xp, entries)


def _screened(operator: Operator, matrix: Array) -> tuple[Array, Array, Array]:
    """Mark items whose matrix is not finite, as its norm shows, and put the identity in their place."""
    xp = operator.backend.xp
    failed = xp.zeros(operator.items, dtype=xp.int32, device=operator.device)
    size = _frobenius(operator.backend, matrix)
    if operator.backend.traced:  # no exception comes of a NaN there
        return matrix, size, failed
    finite = xp.isfinite(size)
    if any_true(xp, ~finite):
        eye = xp.eye(operator.n, dtype=matrix.dtype, device=operator.device)
        matrix = xp.where(finite[..., None, None], matrix, eye)
        size, failed = _frobenius(operator.backend, matrix), _mark(xp, failed, ~finite, Status.NON_FINITE)
    return matrix, size, failed


def _symmetrised(operator: Operator, matrix: Array, failed: Array, *, needed_by_factors: bool) -> tuple[Array, Array]:
    """Check a declared symmetry, and take the symmetric part: products of a Hessian have it up to rounding only.

    To a compiler a transpose is a pass over the matrix against its order in memory; LU needs none of a symmetry that
    is known.
    """
    xp = operator.backend.xp
    if operator.backend.traced and operator.trusted and not needed_by_factors:
        return matrix, failed
    transpose = xp.matrix_transpose(matrix)
    if not needed(operator.backend, matrix != transpose):
        return matrix, failed
    if not operator.trusted:
        allowed = max(skew_tolerance(xp, operator.dtype), 100 * operator.accuracy)
        failed = _mark(xp, failed, asymmetry(xp, matrix) > allowed, Status.NOT_SYMMETRIC)
    return 0.5 * (matrix + transpose), failed


def _mark(xp: Any, failed: Array, mask: Array, status: Status) -> Array:
    """Give a status to the items of the mask that have none yet."""
    return failed if nowhere(mask) else xp.where(mask & (failed == 0), xp.full_like(failed, int(status)), failed)
