"""Every linear solve: an operator with its solver, how it ended, and the report of that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor, item_norm, marked, nan_where, needed, nowhere, quotient
from implicitdiff.linalg.damping import AUTO, damped
from implicitdiff.linalg.determined import determined
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.sparsity import assembled
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers import GMRES, MINRES, get_solver
from implicitdiff.solvers.base import methods_of
from implicitdiff.solvers.rank import ranked
from implicitdiff.solvers.recycling import carried_on, remember_scale
from implicitdiff.solvers.sequences import SequenceState, followed, looked_at
from implicitdiff.tolerances import DENSE, RESIDUAL_OF_OTHERS, SKEW_SEEN, SMALL, UNCERTAIN

__all__ = ["Prepared", "Solution", "method_of", "prepare"]


class Solution(NamedTuple):
    """A solved system; the fields after ``x`` have the shape of the items, the worst over right-hand sides.

    Arrays only, so that it may leave a compiled program; ``method`` is the index into `Prepared.methods`.
    """

    x: Array
    status: Array
    iterations: Array
    matvecs: Array
    residual: Array
    tolerance: Any
    rcond: Any
    operator_norm: Any
    method: Any
    condition: Any = None
    rank: Any = None
    nullity: Any = None
    leak: Any = None
    damping: Any = None
    """δ, where it was found."""
    carried: Any = None
    """What it leaves to the next system of a sequence."""

    def uncertainty(self, xp: Any, accuracy: float) -> Any:
        """Relative error of x where A has one of that accuracy; None where nothing is known of the condition number."""
        if self.condition is not None:
            return accuracy * xp.asarray(self.condition)
        if self.rcond is None:
            return None
        rcond = xp.asarray(self.rcond)
        return quotient(xp, accuracy, rcond, rcond > 0)

    def without_doubt(self, xp: Any, accuracy: float) -> Solution:
        """Return it with items as failed that would be told to be uncertain, if anything could be told."""
        error, code = self.uncertainty(xp, accuracy), xp.full_like(self.status, int(Status.SINGULAR))
        if error is None:
            return self
        return self._replace(status=xp.where((error > UNCERTAIN) & ~self.failed, code, self.status))

    @property
    def failed(self) -> Array:
        """Items that did not succeed."""
        return self.status > int(Status.LEAST_SQUARES)


@dataclass
class Prepared:
    """An operator with its solver, factored at the first solve and only then.

    Parameters
    ----------
    operator : Operator
    solver : Solver
    nan_on_failure : bool
        Whether the items that failed come out as NaN, since nothing will be told.
    """

    operator: Operator
    solver: Any
    nan_on_failure: bool = False
    least_squares: bool = False
    """Whether a solution of least squares is what was asked for."""
    differentiated: bool = False
    """Whether a framework may differentiate the solution in A."""
    seconds: float = 0.0
    methods: Sequence[tuple[str, str]] = ()
    spent: int = 0
    """Products for corrections."""
    on_solved: Callable[..., None] | None = None
    """Sees each solution within a compiled program, with b, whether it was of Aᵀ, and what `limit` found."""
    limit: Callable[..., tuple[Solution, Any]] | None = None
    """Looks at each such solution, with ``beside``, and may spoil it."""
    beside: Any = None
    """What b was made of, where that is to be seen with it."""
    counted: int = 0
    """Products for matrices and scales that a solve has told already."""
    _states: dict[bool, tuple[Operator, Any]] = field(default_factory=dict)
    _undamped: tuple[float, Prepared] | None = None
    _stand_in: Prepared | None = None
    determined: Any = None
    found_damping: Any = None
    """δ, where it was found."""

    @property
    def damping(self) -> float:
        """The δ of (A + δI) that is solved with; NaN where it is to be found."""
        damping = getattr(self.solver, "damping", 0.0)
        return math.nan if damping == AUTO else float(damping)

    @cached_property
    def whole(self) -> Operator:
        """A + δI, assembled where a sparsity pattern tells how; a wrong one raises."""
        damping = getattr(self.solver, "damping", 0.0)
        if damping != AUTO:
            op = self.operator.damped(damping)
            return op if op.sparsity is None else assembled(op)
        op = self.operator
        op = op if op.sparsity is None else assembled(op)  # the matrix is what δ is found of
        direct = op.matrix is not None or getattr(self.solver, "direct", False)
        dense = op.n <= SMALL or (op.n <= DENSE and direct)
        op, self.found_damping = damped(op, damping, dense=dense)
        return op

    def state(self, transposed: bool) -> tuple[Operator, Any]:
        """Return A or Aᵀ, damping included, and the solver's state for it."""
        if False not in self._states:
            op = self.whole
            self._states[False] = (op, self.solver.init(op))
        if transposed and True not in self._states:
            op, state = self._states[False]
            self._states[True] = (op.transpose(), self.solver.transpose(state))
        used = self._states[transposed][0]
        if used.backend.traced and used.n:
            _ = used.matvec  # derived here, not first inside a loop, where what is traced cannot be kept
            if (exact := self.exact) is not self:
                exact.state(False)
        return self._states[transposed]

    def solve(self, b: Array, x0: Array | None = None, transposed: bool = False) -> Solution:
        """Solve A x = b, or Aᵀ x = b, for b of shape (*rhs, *items, n)."""
        start = time.perf_counter()
        op, xp = self.operator, self.operator.backend.xp
        if op.n == 0 or 0 in b.shape:
            self.methods, self.seconds = [(_name(self.solver), "n = 0")], time.perf_counter() - start
            return _empty(op, b)
        if isinstance(x0, SequenceState):
            remember_scale(self.whole, x0)
        used, state = self.state(transposed)
        carried = None
        if isinstance(x0, SequenceState):
            x, status, counts, carried = carried_on(self.solver, state, b, x0, op.backend)
        else:
            x, status, counts = self.solver.solve(state, b, x0)
        status = xp.asarray(status, device=op.device)
        looked = carried is not None and looked_at(carried, op.backend, status)
        status, counts, probes = _verify(used, b, x, status, counts, self, looked=looked)
        x, status, counts = ranked(used, state, b, (x, status, counts), getattr(self.solver, "consistent", False))
        status, counts = determined(self, used, state, status, counts)
        if not self.least_squares:
            status = marked(xp, status == int(Status.LEAST_SQUARES), int(Status.SINGULAR), status)
        broken = status == int(Status.NON_FINITE)
        if needed(op.backend, broken):  # NaN in, NaN out: no number that looks like an answer
            x = nan_where(op.backend, broken, x)
        self.methods = methods_of(self.solver, state)
        if used.entries is not None and used.entries.products:
            self.methods = _assembled(self.methods, used.entries.products)
        solution = _summary(op, x, status, counts, self._newly_assembled() + probes)
        if self.nan_on_failure:
            solution = solution.without_doubt(xp, op.rounding)
            solution = solution._replace(x=nan_where(op.backend, solution.failed, x))
        if self.found_damping is not None:
            solution = solution._replace(damping=self.found_damping)
        if carried is not None:
            solution = solution._replace(carried=followed(carried, xp, solution.x, xp.asarray(~solution.failed)))
        self.seconds = time.perf_counter() - start
        return solution

    @property
    def factored(self) -> bool:
        """Whether the solver has factors, for which one more right-hand side is little work."""
        known = getattr(self.solver, "factored", None)
        return bool(known and known(self.state(False)[1]))

    @property
    def scaling(self) -> Any:
        """Rows and columns by which A is equilibrated; None where it is not, or nothing was solved yet."""
        if False not in self._states:
            return None
        state = self._states[False][1]
        found, inner = getattr(state, "scaling", None), getattr(state, "prepared", None)
        if found is not None or not isinstance(inner, dict):
            return found
        return next((s for s in (getattr(s, "scaling", None) for s in inner.values()) if s is not None), None)

    @property
    def exact(self) -> Prepared:
        """The same with a Krylov method, where the solver is an approximation, by which no error is judged; or self."""
        if not getattr(self.solver, "approximate", False):
            return self
        if self._stand_in is None:
            kind = MINRES if self.operator.symmetric else GMRES
            self._stand_in = Prepared(self.operator, kind(damping=getattr(self.solver, "damping", 0.0)))
        return self._stand_in

    def correction(self, b: Array) -> tuple[Array, Array, Any]:
        """A⁻¹ b to a digit or two; whether it is that, per item, and the reciprocal condition number if it is known."""
        if (exact := self.exact) is not self:
            found, self.spent = exact.correction(b), exact.spent
            return found
        used, state = self.state(False)
        loosely = getattr(self.solver, "loosely", self.solver.solve)
        x, status, counts = loosely(state, b)
        xp = used.backend.xp
        usable = xp.asarray(status, device=used.device) <= int(Status.APPROXIMATE)
        if counts.residual is not None:  # a Krylov method that was stopped has most of it
            usable = usable | (xp.asarray(counts.residual, device=used.device) < 0.5)
        if not used.backend.traced:
            self.spent += int(xp.max(xp.asarray(counts.matvecs)))
        return x, usable, counts.rcond

    def roughly(self, b: Array, *, transposed: bool, rtol: float) -> tuple[Array, Array, Any]:
        """A⁻¹ b, or A⁻ᵀ b, without damping: to a tolerance, or as well as factors do.

        Returns
        -------
        tuple
            The solution, whether it is one, per right-hand side and item, and the number of products.
        """
        if (exact := self.exact) is not self:
            return exact.roughly(b, transposed=transposed, rtol=rtol)
        if self._undamped is None or self._undamped[0] != rtol:
            solver = self.solver.roughly(rtol) if hasattr(self.solver, "roughly") else self.solver
            shared = {} if self.damping else self._states
            self._undamped = rtol, Prepared(self.operator, solver, _states=shared)
        prepared = self._undamped[1]
        used, state = prepared.state(transposed)
        x, status, counts = prepared.solver.solve(state, b, None)
        xp = used.backend.xp
        usable = xp.asarray(status, device=used.device) <= int(Status.APPROXIMATE)
        return x, usable & used.backend.space(x).finite(x), counts.matvecs

    def _newly_assembled(self) -> int:
        """Count the products that went into assembling matrices, and into scales, since the last solve."""
        operators = {id(op): op for op, _ in self._states.values()}.values()  # a symmetric one is its own transpose
        spent = (op.n * op.assembled + op.probes for op in operators)
        before, self.counted = self.counted, sum(spent)
        return self.counted - before


def prepare(operator: Operator, solver: Any, *, nan_on_failure: bool = False) -> Prepared:
    """Pair an operator with the solver of that name, or with the instance."""
    solver = get_solver(solver)
    return Prepared(operator, solver, nan_on_failure, getattr(solver, "accepting", False))


def _name(solver: Any) -> str:
    return str(getattr(solver, "name", type(solver).__name__))


def _assembled(methods: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Add to the reasons of methods what a sparse matrix was assembled from."""
    said = f"assembled from {count} product{'s' if count != 1 else ''}"
    return [(name, f"{why}; {said}") for name, why in methods]


def _empty(op: Operator, b: Array) -> Solution:
    xp = op.backend.xp
    zero = xp.zeros(op.items, dtype=op.dtype, device=op.device)
    code = xp.zeros(op.items, dtype=xp.int32, device=op.device)
    return Solution(xp.zeros_like(b), code, code, code, zero, zero, None, zero, None)


def _verify(
    op: Operator, b: Array, x: Array, status: Array, counts: Counts, prepared: Prepared, *, looked: bool = False
) -> tuple[Array, Counts, int]:
    """Recompute what the solver did not tell, and check a symmetry that was only declared."""
    xp, solver = op.backend.xp, prepared.solver
    if not getattr(solver, "verified", False):
        residual = item_norm(xp, b - op.matvec(x)) / divisor(xp, item_norm(xp, b))
        counts = Counts(*counts)._replace(residual=residual)
        rtol = getattr(solver, "rtol", None) or max(RESIDUAL_OF_OTHERS.at(xp, b.dtype), 30 * op.accuracy)
        counts = counts._replace(tolerance=rtol + 0 * counts.residual, matvecs=counts.matvecs + 1)
        claimed = xp.broadcast_to(status, counts.residual.shape)
        wrong = (claimed == 0) & ~(counts.residual <= rtol)
        status = xp.where(wrong, xp.full_like(claimed, int(Status.STAGNATED)), claimed)
    if counts.rcond is None and not op.trusted and not looked:
        status, probes = _check_symmetry(op, b, x, status, counts, prepared)
        return status, counts, probes
    return status, counts, 0


def _check_symmetry(
    op: Operator, b: Array, x: Array, status: Array, counts: Counts, prepared: Prepared
) -> tuple[Array, int]:
    # Where A is only said to be symmetric, the solve of Aᵀ u = v was replaced by one of A u = v. For a vector z
    # without structure, <A z, u> - <z, v> is the residual of the *transposed* system along z: one product
    # tells whether u solves that one, too. After a failure it tells whether asymmetry is the cause.
    backend, solver = op.backend, prepared.solver
    failing = status > int(Status.APPROXIMATE)
    failed = needed(backend, failing)
    only, inexact = getattr(solver, "symmetric_only", False), getattr(solver, "approximate", False)
    if not (op.symmetric or ((failed or inexact) and only)):
        return status, 0
    scaling, image = prepared.scaling, b  # after a success A x = b up to the residual
    if failed:  # x may be zero, or NaN: A b in place of A x
        space = backend.space(x)
        x = space.select(backend.xp.broadcast_to(failing, space.items), b, x)
    if inexact:
        image, counts = op.matvec(x), Counts(*counts)._replace(residual=0 * counts.residual)
    elif failed:
        image = backend.if_any(failing, lambda _: op.matvec(x), b)

    def compare(status: Array) -> Array:
        return _compare(op, scaling, b, x, image, status, counts, failing)

    # where nothing was said of A, and the method is one for symmetric matrices: worth it after a failure only
    status = compare(status) if op.symmetric or inexact else backend.if_any(failing, compare, status)
    rhs = x.shape[0] if len(x.shape) > len(op.items) + 1 else 1
    return status, 1 + (rhs if inexact or (failed and not backend.traced) else 0)


def _compare(
    op: Operator, scaling: Any, b: Array, x: Array, image: Array, status: Array, counts: Counts, failing: Array
) -> Array:  # fmt: skip
    """NOT_SYMMETRIC where <A z, x> differs from <z, A x>, each coordinate of z and x in its unit."""
    xp = op.backend.xp
    space = op.backend.space(x)
    one = op.backend.space(_first(op, x))
    z = one.probe()
    if scaling is None:
        az = op.matvec(z)
    else:  # C A C and C⁻¹ x
        az = scaling.scaled(op.matvec(scaling.restored(z)))
        x, image = scaling.start(x), scaling.scaled(image)
    # scalars of a vector space may be the host's own numbers
    gap = xp.abs(xp.asarray(_inner(space, az, x) - _inner(space, z, image), device=op.device))
    residual = xp.asarray(counts.residual, device=op.device)
    eps = float(xp.finfo(op.dtype).eps)
    relative = SKEW_SEEN.of(eps) + (residual if nowhere(failing) else xp.where(failing, 0 * residual, residual))
    allowed = one.size(z) * space.size(image) * relative + 1e3 * eps * one.size(az) * space.size(x)
    asymmetric = xp.isfinite(gap) & (gap > allowed) & (space.size(b) > 0)
    if len(gap.shape) > len(op.items):  # what one right-hand side shows is so for all
        asymmetric = asymmetric | xp.any(asymmetric, axis=0)
    asymmetric = asymmetric & (status != int(Status.BAD_PRECONDITIONER))
    if nowhere(asymmetric):
        return status
    return xp.where(asymmetric, xp.full_like(xp.broadcast_to(status, gap.shape), int(Status.NOT_SYMMETRIC)), status)


def _first(op: Operator, x: Array) -> Array:
    """Return the first right-hand side of several, for its shape."""
    return x[0, ...] if len(x.shape) > len(op.items) + 1 else x


def _inner(space: Any, z: Array, x: Array) -> Array:
    return space.inner(z if z.shape == x.shape else space.xp.broadcast_to(z, x.shape), x)


def _summary(op: Operator, x: Array, status: Array, counts: Counts, assembled: Any) -> Solution:
    """Reduce over right-hand sides: the worst residual, the largest count, all products."""
    xp, device, lead = op.backend.xp, op.device, tuple(x.shape[:-1])
    rhs = lead[0] if len(lead) > len(op.items) else 0

    def worst(field: Any) -> Any:
        if field is None or not lead:
            return field
        field = xp.asarray(field, device=device)
        if field.shape != lead:  # a copy: what a report holds is the user's to write to
            field = xp.asarray(xp.broadcast_to(field, lead), copy=True)
        return xp.max(field, axis=0) if rhs else field

    def least(field: Any) -> Any:
        return None if field is None else -worst(-xp.asarray(field, device=device))

    kept = (status, counts.iterations, counts.matvecs, counts.residual, counts.tolerance, counts.operator_norm,
             counts.method, counts.condition, counts.leak)  # fmt: skip
    status, iterations, matvecs, residual, tolerance, norm, method, condition, leak = map(worst, kept) if lead else kept
    rank = least(counts.rank)
    return Solution(
        x, status, iterations, matvecs * max(rhs, 1) + assembled, residual, tolerance, least(counts.rcond), norm,
        method, condition, rank, None if rank is None else op.columns - rank, leak,
    )  # fmt: skip


def method_of(solution: Solution, methods: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return name and reason of the sturdiest method that any item needed; of the first where that is not seen."""
    codes = solution.method
    if codes is None or len(methods) == 1:
        return methods[0]
    if hasattr(codes, "shape") and codes.shape:
        return methods[max(int(codes[i]) for i in range(codes.shape[0]))]
    return methods[int(codes)]
