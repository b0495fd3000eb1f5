"""The inner condition and the outer loss on vectors, at points of a loop, with loose solves from any start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor
from implicitdiff.errors import CallbackError
from implicitdiff.linalg.damping import damped
from implicitdiff.outcome import Status
from implicitdiff.problem import Problem
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules
from implicitdiff.solvers import CG, GMRES, Auto, get_solver
from implicitdiff.solvers.recycling import carried_on
from implicitdiff.solvers.sequences import SequenceState, fresh, pairs_of
from implicitdiff.tolerances import DAMPED, RAISED, RESIDUAL, SMALL

__all__ = ["Equations", "Solved", "Spot"]

PAIRS = 50
"""Pairs that the loop's own choice of a method keeps, but no more than four for each unknown."""


class Solved(NamedTuple):
    """A loose solution of a linear system."""

    x: Array
    usable: Array
    """Whether it is a step that a method made, and finite; of a minimum, not where A had negative curvature."""
    products: Array
    memory: Any
    """Pairs of directions and their images, for the next solve (`implicitdiff.solvers.recycling`)."""
    damping: Array
    """δ for the next solve: more than there was where A + δI had negative curvature."""
    left: Array
    """Relative residual of the undamped system, or a bound of it."""


@dataclass(frozen=True)
class Equations:
    """A condition with an outer loss, for any y and θ of the structure of a problem.

    Parameters
    ----------
    problem : Problem
        Its y and θ give structure, shapes and dtypes alone.
    outer : callable or (callable, callable)
        L, or L and its gradient.
    y, theta : Raveler
        Of that structure.
    """

    problem: Problem
    outer: Any
    y: Raveler
    theta: Raveler

    @property
    def backend(self) -> Any:
        """The backend at work."""
        return self.problem.backend

    def count(self, number: Any) -> Array:
        """Return a number as a 0-d integer array."""
        xp = self.backend.xp
        return xp.asarray(number, dtype=xp.int32, device=self.y.device)

    def number(self, value: Any) -> Array:
        """Return a number as a 0-d array like y."""
        return self.backend.xp.asarray(value, dtype=self.y.dtype, device=self.y.device)

    def at(self, y: Array, theta: Array) -> Spot:
        """Return everything at a point."""
        trees = self.y.unravel(y), self.theta.unravel(theta)
        problem = replace(self.problem, y=trees[0], theta=trees[1], copy=False)
        return Spot(self, Rules(problem, flat=True, trial=True, later=True))


@dataclass(frozen=True)
class Spot:
    """A point (y, θ) of the loop.

    Parameters
    ----------
    equations : Equations
    rules : Rules
    """

    equations: Equations
    rules: Rules

    @property
    def y(self) -> Array:
        """The raveled y."""
        return self.rules.point.y.vector

    def residual(self) -> Array:
        """F(y, θ) in memory of our own: a callback may fill its buffer again."""
        F: Array = self.rules.maps.residual()  # type: ignore[misc]
        return self.rules.point.backend.xp.asarray(F, copy=True)

    @cached_property
    def operator(self) -> Any:
        """A without what makes a solver look for units: that took products at each point of a loop."""
        A = self.rules.prepared.operator
        return A if A.matrix is not None or A.sparse is not None else replace(A, like=None, leaves=(), _cache={})

    @cached_property
    def solver(self) -> Any:
        """The method in place of "auto": a loop solves loosely from a good start, so that products alone will do."""
        asked, A = get_solver(self.rules.condition.routed(self.rules.solver)), self.operator
        if type(asked) is not Auto or A.matrix is not None or A.sparse is not None or A.positive_definite is False:
            return asked
        options: Any = {f.name: getattr(asked, f.name) for f in fields(asked)}
        return CG(**options, recycle=min(PAIRS, 4 * A.n)) if A.symmetric else GMRES(**options)

    def memory(self) -> SequenceState | None:
        """Return the memory of solves here before the first; None where the method keeps none."""
        A, pairs = self.operator, pairs_of(self.solver)
        return fresh(A.backend.xp, (A.n,), A.dtype, A.device, pairs) if pairs else None

    @property
    def minimum(self) -> bool:
        """Whether A is to be positive definite at a solution, as far as the condition says."""
        return getattr(self.equations.problem.condition, "kind", "none") in (None, "minimum")

    def solve(self, b: Array, rtol: Any, memory: Any, damping: Array, *, transposed: bool) -> Solved:
        """Solve (A + δI) x = b, or that of Aᵀ, to a relative residual; δ is that of a minimum alone.

        At negative curvature, or at the last of its iterations, a method hands out what it had. Of F that is a descent
        direction. Of the adjoint it is taken where it lowers the residual.
        """
        solver, xp = self.solver, self.rules.point.backend.xp
        if is_dataclass(solver) and "rtol" in {f.name for f in fields(solver)}:
            solver = replace(solver, rtol=rtol)  # type: ignore[type-var]
        operator, _ = damped(self.operator, getattr(solver, "damping", 0.0), dense=self.operator.n <= SMALL)
        if self.minimum:
            operator = operator.damped(damping if operator.backend.traced else float(damping))
        state = solver.init(operator)
        state = solver.transpose(state) if transposed else state
        if memory is None:
            x, status, counts = solver.solve(state, b, None)
        else:
            x, status, counts, memory = carried_on(solver, state, b, memory, operator.backend, extrapolated=False)
        status = xp.asarray(status, device=operator.device)
        spent = counts.matvecs + operator.n * operator.assembled + operator.probes
        usable = status <= int(Status.APPROXIMATE)
        for code in (Status.NOT_POSITIVE_DEFINITE, Status.MAX_ITERATIONS, Status.STAGNATED):
            usable = usable | (status == int(code))
        space, size = operator.backend.space(b), operator.backend.space(b).size
        left = self.equations.number(0.0 if counts.residual is None else counts.residual)
        if self.minimum:
            left = left + damping * size(x) / divisor(xp, size(b))
        if transposed:
            usable = usable & (left < 1)
        usable = usable & space.finite(x)
        negative = self.minimum & (status == int(Status.NOT_POSITIVE_DEFINITE))
        more, spent = self._raised(damping, negative, b, spent)
        x = space.select(usable, x, space.zeros())
        return Solved(x, usable & ~negative, self.equations.count(spent), memory, more, left)

    def _raised(self, damping: Array, negative: Array, b: Array, spent: Any) -> tuple[Array, Any]:
        """Return a δ that is larger in place of one that did not do, and the products with what it took to find it."""
        if not self.minimum:
            return damping, spent
        backend, xp = self.operator.backend, self.operator.backend.xp
        size, none = backend.space(b).size, negative & (damping == 0)
        unit = backend.if_any(none, lambda zero: zero + size(self.product(b)) / divisor(xp, size(b)), 0 * damping)
        found = xp.where(none, DAMPED * unit, RAISED * damping)
        found = xp.where(negative & xp.isfinite(found), found, damping)
        return found, spent + xp.astype(none, xp.int32)

    @property
    def regular(self) -> Array:
        """Whether y has a derivative here, as far as the condition sees: that it violates no constraint, say."""
        seen, yes = self.rules.maps.observations, self.equations.count(0) == 0
        return yes if seen is None else seen.usable & yes

    @property
    def least(self) -> float:
        """Least relative residual that it makes sense to ask for."""
        return RESIDUAL.at(self.rules.point.backend.xp, self.operator.dtype)

    def slopes(self) -> tuple[Array, Array]:
        """∂L/∂y, extended to the unknowns of the system, and ∂L/∂θ."""
        outer, p = self.equations.outer, self.rules.point
        if not isinstance(outer, tuple):
            by_y, by_theta, _ = p.backend.gradients(self._loss(outer), p.y.vector, p.theta.vector)
            return self.rules.embedded(by_y), by_theta
        trees = p.y.unravel(p.backend.guard(p.y.vector)), p.theta.unravel(p.backend.guard(p.theta.vector))
        found = outer[1](*trees)
        if not isinstance(found, tuple) or len(found) != 2:
            raise CallbackError("the gradient of outer returned no pair.\nExpected (by_y, by_theta), or (by_y, None).")
        by_y = p.y.like(found[0], "the gradient of outer by y", dtype=p.y.dtype, callback=True)
        zero = p.backend.xp.zeros_like(p.theta.vector)
        name = "the gradient of outer by theta"
        by_theta = zero if found[1] is None else p.theta.like(found[1], name, dtype=p.theta.dtype, callback=True)
        return self.rules.embedded(by_y), by_theta

    def _loss(self, outer: Callable[..., Any]) -> Any:
        return self.rules.point.scalar_function(outer, "outer", args=())

    def value(self) -> Array:
        """L(y, θ)."""
        outer, p = self.equations.outer, self.rules.point
        loss = self._loss(outer[0] if isinstance(outer, tuple) else outer)
        return loss(p.y.vector, p.theta.vector)

    def product(self, x: Array, *, transposed: bool = False) -> Array:
        """A x, or Aᵀ x."""
        return (self.operator.rmatvec if transposed else self.operator.matvec)(x)

    def pullback(self, u: Array, by_theta: Array) -> Array:
        """∂L/∂θ − Bᵀ u."""
        return by_theta - self.rules.maps.B.rmatvec(u)
