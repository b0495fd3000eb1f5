"""The solver protocol, and what the iterative methods share: scaling, cycles, the true residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from implicitdiff.arrays import Array, needed
from implicitdiff.linalg.equilibration import equilibrated, of_operator
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner, as_preconditioner, is_valid
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.outcome import Counts, Status
from implicitdiff.records import Record
from implicitdiff.solvers.checks import cancelled
from implicitdiff.solvers.cycles import (
    Cycle,
    KrylovState,
    Outer,
    Start,
    accuracy,
    rescaled_cycle,
    resolution,
    started,
    true_residual,
    unit_of,
    without_preconditioner,
)
from implicitdiff.solvers.options import check_options
from implicitdiff.solvers.refinement import refinable, refined
from implicitdiff.solvers.unit import one_step
from implicitdiff.tolerances import LOOSE, LOOSE_ITERATIONS, LOST, NOISE_LEFT, RESIDUAL

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = [
    "Cycle",
    "Krylov",
    "KrylovState",
    "Solver",
    "Start",
    "accuracy",
    "methods_of",
    "without_preconditioner",
]

Structure = Literal["general", "symmetric", "positive definite"]


class Solver(Record):
    """A method for A x = b: a small frozen object whose fields are its options.

    Subclass it to add a method, then name it with ``register_solver``. ``init`` sees the operator once
    (factor here), ``solve`` runs for each right-hand side, ``transpose`` turns a state for A into one
    for Aᵀ without doing the work again.
    """

    name: ClassVar[str] = "solver"
    damping: float | Literal["auto"] = 0.0
    structure: ClassVar[Structure] = "general"
    """What A has to be; on any other the method is wrong, or breaks down."""
    square: ClassVar[bool] = True  # whether A has to be
    direct: ClassVar[bool] = False
    """Whether the method factors an assembled matrix; one that does not needs products only."""
    approximate: ClassVar[bool] = False  # whether by design: it ends as `Status.APPROXIMATE`
    least_squares: ClassVar[bool] = False
    """Whether x is that of least squares and least norm, where A is singular or not square."""
    verified: ClassVar[bool] = False
    """Whether the residual that the solver reports is the true one; that of any other is recomputed."""

    @property
    def symmetric_only(self) -> bool:
        """Whether the method is wrong on an operator that is not symmetric."""
        return self.structure != "general"

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, operator: Operator) -> Any:
        """Prepare for an operator, damping included: factor, choose, build a preconditioner."""
        raise NotImplementedError

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        """Solve A x = b for b of shape ``(*rhs, *items, n)``.

        Returns
        -------
        x : array, like b
        status : Status or array of int, shape ``(*rhs, *items)``
        counts : Counts
        """
        raise NotImplementedError

    def transpose(self, state: Any) -> Any:
        """Return the state for Aᵀ."""
        raise NotImplementedError

    def loosely(self, state: Any, b: Array) -> tuple[Array, Any, Counts]:
        """Solve A x = b to a digit or two, for a look at x: with less work than `solve`, where that is possible."""
        return self.solve(state, b, None)

    def roughly(self, rtol: float) -> Solver:
        """Return the method with that tolerance where it has one, and neither limit nor damping."""
        names = {f.name for f in fields(self)} if is_dataclass(self) else set[str]()
        options = {"rtol": rtol, "maxiter": None, "damping": 0.0}
        changes: Any = {name: value for name, value in options.items() if name in names}
        return replace(self, **changes) if changes else self  # type: ignore[type-var]

    def factored(self, state: Any) -> bool:
        """Whether A was factored, so that one more right-hand side is little work."""
        return False

    def matrix_free(self, n: int) -> bool:
        """Whether for n unknowns it needs products with A and the operations of a vector space, and nothing else."""
        return False

    def describe(self, state: Any) -> list[tuple[str, str]]:
        """Names of the methods that may be used, and why; ``Counts.method`` tells which was, by default the first."""
        return [(self.name, "chosen by name")]


def methods_of(solver: Any, state: Any) -> Sequence[tuple[str, str]]:
    """Names of the methods that a solver may use, and why; of one that does not tell, its own."""
    describe = getattr(solver, "describe", None)
    name = str(getattr(solver, "name", type(solver).__name__))
    return describe(state) if describe else [(name, "chosen by name")]


@dataclass(frozen=True, eq=False, repr=False)
class Krylov(Solver):
    """Options that every iterative method here reads.

    Parameters
    ----------
    rtol : float, optional
        Success is ``‖b − A x‖ <= rtol ‖b‖``, checked on the residual recomputed at exit. Default 1e-10 in
        double precision, 1e-5 in single, more where the products are finite differences. Where rounding in the
        product alone makes a larger residual, 4 to 16 eps ‖A‖ ‖x‖, that level is success too.
    maxiter : int, optional
        Most iterations. Default 10 n, but at least 1 000 and at most 100 000.
    preconditioner : array, sparse matrix, LinearOperator, callable or (M, Mᵀ), optional
        Approximates A⁻¹ and acts on raveled vectors of shape (n,).
    damping : float, default 0
        Solve (A + damping I) x = b.
    """

    rtol: float | None = None
    maxiter: int | None = None
    preconditioner: Any = None
    damping: float | Literal["auto"] = 0.0

    verified: ClassVar[bool] = True
    stall: ClassVar[float] = 0.5
    """A cycle that leaves more than this part of the true residual has stagnated."""
    monotone: ClassVar[bool] = False  # whether ‖r‖ cannot grow but for rounding
    consistent: ClassVar[bool] = False  # whether it is meant for singular systems, too, if they are consistent

    def init(self, operator: Operator) -> KrylovState:
        operator = operator.settled()
        scaling = of_operator(operator, symmetric=self.symmetric_only)
        given = self.preconditioner
        M = Preconditioner() if given is None else as_preconditioner(given, operator).scaled(scaling)
        return KrylovState(equilibrated(operator, scaling), M, scaling)

    def transpose(self, state: KrylovState) -> KrylovState:
        operator = state.operator.transpose()
        if operator is state.operator:
            return state
        if operator.backend.traced:
            _ = operator.matvec  # derived here, not first inside a loop, where what is traced cannot be kept
        scaling = None if state.scaling is None else state.scaling.transpose()
        return KrylovState(operator, state.preconditioner.transpose(), scaling)

    def matrix_free(self, n: int) -> bool:
        return self.preconditioner is None

    def loosely(self, state: KrylovState, b: Array) -> tuple[Array, Any, Counts]:
        backend = state.operator.backend
        if backend.mode is Mode.INLINE:
            return one_step(state, b)
        most = min(self.most(state.operator.n), LOOSE_ITERATIONS)
        return replace(self, rtol=LOOSE, maxiter=most).solve(state, b, None)

    def most(self, n: int) -> int:
        """Return the most iterations for n unknowns."""
        return self.maxiter or min(max(10 * n, 1000), 100_000)

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run the method once."""
        raise NotImplementedError

    def solve(self, state: KrylovState, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        scaling = state.scaling
        if scaling is None:
            x, status, counts = self._solve(state, b, x0)
            return x, status, counts
        right = scaling.scaled(b)
        found = self._solve(state, right, None if x0 is None else scaling.start(x0))
        if refinable(state):
            found = refined(state.operator, lambda r: self._solve(state, r, None), right, found)
        return scaling.restored(found[0]), found[1], found[2]

    def tolerance(self, op: Operator, space: Any) -> float:
        """Relative residual that is asked for."""
        noise = min(30 * op.accuracy, NOISE_LEFT) if op.matrix is None else 0.0
        return self.rtol or max(RESIDUAL.of(space.eps), noise)

    def _solve(
        self, state: KrylovState, b: Array, x0: Array | None, memory: Any = None, most: Any = None
    ) -> tuple[Any, ...]:
        """Run the cycles: x, status and counts, and the memory of pairs where one is given."""
        # Everything happens on b scaled to norm one, so that neither 1e-30 nor 1e30 under- or overflows.
        # A method runs in cycles: when its own (recursive) residual says done, the true one b - A x is
        # computed; where that is still too large but fell, the next cycle starts from it. Restarted
        # GMRES is the same loop with many cycles; CG and MINRES nearly always take one.
        op, backend = state.operator, state.operator.backend
        space = backend.space(b)
        rtol, maxiter = space.scalar(self.tolerance(op, space)), self.most(space.length) if most is None else most
        unit, scale = unit_of(space, b)
        state_0 = started(space, op, unit, x0, scale, rtol)
        if memory is not None:
            state_0 = state_0._replace(memory=memory._replace(first=state_0.residual))

        def body(s: Outer) -> Outer:
            start = Start(s.x, s.r, rtol, s.active, maxiter - s.iterations, s.memory)
            c = rescaled_cycle(self.cycle, state, space, s, start)
            if c.r is None:
                r, more = space.subtract(unit(), op.matvec(c.x)), 1
            else:
                r, more = true_residual(state, space, s, c, unit, rtol)
            c = c._replace(matvecs=c.matvecs + more)
            return self._rescaled(space, s, self._after_cycle(state, space, s, c, r, rtol, maxiter), unit, backend)

        end = backend.while_loop(lambda s: space.any(s.active), body, state_0)
        residual, status = end.residual, self._blamed(state, space, end.status, unit)
        if state.scaling is not None:
            converged = end.status == int(Status.CONVERGED)
            residual = state.scaling.reported_residual(backend, converged, (residual, end.tolerance), end.r, unit())
        known = space.where(space.isfinite(end.operator_norm), end.operator_norm, space.scalar(0.0))
        condition = end.condition if state.preconditioner.identity else None
        if condition is not None and op.offset and state.scaling is not None and not is_tree_vector(b):
            norm = backend.xp.asarray(known, device=op.device) * op.n**0.5
            more = space.xp.asarray(cancelled(backend.xp, op, state.scaling, norm, end.x) / op.resolution)
            condition = condition * space.maximum(space.scalar(1.0), more)
        counts = Counts(end.iterations, end.matvecs, residual, known, None, end.tolerance, condition)
        found = space.scale(scale, end.x), status, counts
        return found if memory is None else (*found, end.memory)

    def _after_cycle(
        self, state: KrylovState, space: Any, s: Outer, c: Cycle, r: Array, rtol: Array, maxiter: Any
    ) -> Outer:
        residual = space.where(s.active, space.norm(r), s.residual)
        norm = space.maximum(s.operator_norm, c.operator_norm)
        iterations = s.iterations + c.iterations
        # Rounding in A x alone (or noise) leaves eps ‖A‖ ‖x‖: below that no method can go, and it is no failure.
        size = space.norm(space.scale(norm, space.copy(c.x)))  # ‖A‖ ‖x‖: no square under- or overflows
        floor = accuracy(state, space) * size
        condition = space.where(s.active, space.maximum(size, norm * c.gain), s.condition)
        finite = space.isfinite(residual)
        flat, limit, number = s.active & c.flat, 20 * space.eps**0.5, space.scalar
        improved = residual < space.where(flat, number(min(0.9, self.stall)), number(self.stall)) * s.residual
        # Terms of the product that cancel, as in (I - W) x, round more than ‖A‖ shows: seen where nothing improves.
        level = floor * space.where(improved | (16 * floor >= limit), number(4.0), number(16.0))
        noisy = state.operator.accuracy > space.eps  # differences: up to that limit
        level = space.where((level >= limit) & noisy, limit, level)
        tolerance = space.where((level > rtol) & ((level < limit) | noisy), level, rtol)
        done = residual <= tolerance
        status = space.where(improved | (iterations >= maxiter), int(Status.MAX_ITERATIONS), int(Status.STAGNATED))
        status = space.where(flat, int(Status.SINGULAR), status)
        if state.preconditioner.identity:
            # ‖A x‖ / ‖x‖ bounds the least singular value from above. Against ‖A‖ it may be below what the products
            # are good for: then no digit of x is right.
            status = space.where(100 * floor > 1 + residual, int(Status.SINGULAR), status)
            if self.monotone:  # only steps along a null vector, of any length, make it grow
                status = space.where(residual > 2 * s.residual, int(Status.SINGULAR), status)
        status = space.where(c.status != 0, c.status, status)
        status = space.where(finite, status, int(Status.NON_FINITE))
        lost = (resolution(state, space, norm) * condition > LOST) & state.preconditioner.identity
        # and then a small residual means nothing, either
        status = space.where(done, space.where(lost, int(Status.SINGULAR), int(Status.CONVERGED)), status)
        again = s.active & ~done & finite & improved & (c.status == 0) & (iterations < maxiter)
        return Outer(
            c.x, r, residual, again, space.where(s.active, status, s.status), iterations,
            s.matvecs + c.matvecs, norm, space.where(s.active, tolerance, s.tolerance), s.unit, condition, c.memory,
        )  # fmt: skip

    def _rescaled(self, space: Any, s: Outer, end: Outer, unit: Callable[[], Array], backend: Backend) -> Outer:
        """Start again on A/σ, with another σ, where the squares of a method over- or underflowed."""
        failed = s.active & (end.status != int(Status.CONVERGED))
        if not needed(backend, failed):
            return end
        huge = float(space.xp.finfo(space.dtype).max) ** 0.5
        relative, one = end.operator_norm / s.unit, space.scalar(1.0)
        outside = ~(relative < huge * space.eps**0.5) | (relative < 1 / (huge * space.eps))
        known = space.isfinite(relative) & (relative > 0)
        # one step into the dark, and one by the norm that is seen from there
        wide, near = ((s.unit < huge**power) & (s.unit > huge**-power) for power in (1.2, 0.8))
        lost = failed & outside & space.where(known, wide, near)
        if not needed(backend, lost):
            return end
        beyond = space.where(relative == 0, one / huge, huge * one)
        step = space.where(known, relative, beyond)
        return end._replace(
            x=space.select(lost, space.zeros(), end.x), r=space.select(lost, unit(), end.r),
            residual=space.where(lost, one, end.residual), active=end.active | lost,
            operator_norm=space.where(lost, space.scalar(0.0), end.operator_norm),
            unit=space.where(lost, s.unit * step, s.unit),
        )  # fmt: skip

    def _blamed(self, state: KrylovState, space: Any, status: Array, unit: Callable[[], Array]) -> Array:
        """Ask the preconditioner first where a solve failed."""
        backend = state.operator.backend
        failed = status > int(Status.APPROXIMATE)
        if state.preconditioner.identity or not needed(backend, failed):
            return status

        def ask(old: Array) -> Array:
            M, scaling, definite = state.preconditioner, state.scaling, self.symmetric_only
            valid = is_valid(M, space, unit(), definite=definite)
            if scaling is not None:  # in the units in which it was given, too: either may hide what is wrong
                valid = valid & is_valid(M.given, space, scaling.residual(unit()), definite=definite)
            return space.where(failed & ~valid, int(Status.BAD_PRECONDITIONER), old)

        return backend.if_any(failed, ask, status)
