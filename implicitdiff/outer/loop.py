"""Bilevel optimisation: minimise L(y*(θ), θ) over θ, where F(y*(θ), θ) = 0, by steps along its gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.conditions import as_condition
from implicitdiff.errors import InputError
from implicitdiff.outer.bounds import bounds_of, within
from implicitdiff.outer.equations import Equations
from implicitdiff.outer.history import HistoryRow
from implicitdiff.outer.inner import Inner, inner_of
from implicitdiff.outer.optimizers import optimizer_of
from implicitdiff.outer.schedules import Schedule
from implicitdiff.outer.state import BilevelState, Past
from implicitdiff.outer.sweeps import begin
from implicitdiff.problem import Problem, problem_of
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules
from implicitdiff.verification.first_use import verify

__all__ = ["Steps"]


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a loop, as pure functions of its state.

    Parameters
    ----------
    condition, outer, args, inner, optimizer, learning_rate, tolerance, solver, project, bounds
        See `bilevel`.
    """

    condition: Any
    outer: Any
    args: tuple[Any, ...]
    inner: Any
    optimizer: Any
    learning_rate: float | None
    tolerance: Schedule
    solver: Any
    project: Callable[[Any], Any] | None
    bounds: Any

    def __post_init__(self) -> None:
        self.tolerance.refuse(as_condition(self.condition), self.inner, self.solver)
        parts = self.outer if isinstance(self.outer, tuple) else (self.outer,)
        if not all(map(callable, parts)) or len(parts) > 2:
            raise InputError("outer: expected a callable L(y, theta), or a pair (L, gradient) of callables.")
        if self.project is not None and not callable(self.project):
            raise InputError(f"project is {type(self.project).__name__}; expected a callable of theta.")
        _ = self._inner

    @cached_property
    def _inner(self) -> Inner:
        return inner_of(self.inner, as_condition(self.condition), self.args)

    def problem(self, y: Any, theta: Any) -> Problem:
        """Return the problem at a point."""
        return problem_of(self.condition, y, theta, args=self.args, solver=self.solver)

    def equations(self, problem: Problem) -> Equations:
        """Return what is evaluated along the loop, with the structure of a problem."""
        backend, condition = problem.backend, as_condition(problem.condition).elsewhere()
        ravelers = [Raveler(backend, tree, name) for tree, name in ((problem.y, "y"), (problem.theta, "theta"))]
        ravelers[0].check_partner(ravelers[1])
        return Equations(replace(problem, condition=condition), self.outer, *ravelers)

    @cached_property
    def _programs(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _compiled(self, name: str, problem: Problem) -> Callable[..., Any]:
        key = name, problem.backend
        if key not in self._programs:
            self._programs[key] = problem.backend.compiled(getattr(self, name))
        return self._programs[key]

    # -- the first state -----------------------------------------------------------------------------
    def init(self, y0: Any, theta0: Any) -> BilevelState:
        """State at y0 and θ0, before any step."""
        problem = self.problem(y0, theta0)
        if not problem.backend.traced:
            with problem.backend.computing():
                args = self.tolerance.on_samples(self.equations(problem), 0).problem.args
                looked_at = replace(problem, args=args)
                rules = Rules(looked_at, flat=True)  # raises for what is wrong with y0 and theta0
                verify(looked_at, lambda: rules, "gradient")
        return self._compiled("_first", problem)(problem.args, y0, theta0)

    def _first(self, backend: Any, args: tuple[Any, ...], y0: Any, theta0: Any) -> BilevelState:
        equations = self.equations(replace(self.problem(y0, theta0), backend=backend, args=args))
        equations = self.tolerance.on_samples(equations, 0)
        y, theta, xp = equations.y.vector, equations.theta.vector, backend.xp
        y, theta = xp.asarray(y, copy=True), xp.asarray(theta, copy=True)
        theta = within(theta, equations.theta, *self._limits(equations))
        spot, none = equations.at(y, theta), equations.count(0)
        u, nan = xp.zeros_like(spot.rules.embedded(y)), equations.number(float("nan"))
        scale, *spent, memory = self.tolerance.first(spot)
        gradients, products = (none + equations.count(k) for k in spent)
        state = optimizer_of(self.optimizer, equations.theta, self.learning_rate).init(theta)
        past = Past(theta, xp.zeros_like(theta), xp.zeros_like(y), xp.zeros_like(u))
        gradient = equations.theta.unravel(xp.zeros_like(theta))
        infinite = equations.number(float("inf"))
        return BilevelState(
            equations.y.unravel(y), equations.theta.unravel(theta), gradient, gradients, products, none, nan, nan,
            nan, nan, none == 0, u, state, past, infinite, scale, memory, equations.number(0.0),
        )  # fmt: skip

    # -- a step --------------------------------------------------------------------------------------
    def step(self, state: BilevelState) -> BilevelState:
        """Make one step: the gradient at θ to the tolerance, and a step of the optimizer."""
        problem = self.problem(state.y, state.theta)
        return self._compiled("_next", problem)(problem.args, state)

    def _limits(self, equations: Equations) -> tuple[Any, Any]:
        return bounds_of(self.bounds, equations.theta), self.project

    def _next(self, backend: Any, args: tuple[Any, ...], state: BilevelState) -> BilevelState:
        equations = self.equations(replace(self.problem(state.y, state.theta), backend=backend, args=args))
        y, theta, xp = equations.y.vector, equations.theta.vector, backend.xp
        s = self.tolerance.find(equations, self._start(equations, y, theta, state), theta, state, self._inner)
        t = optimizer_of(self.optimizer, equations.theta, self.learning_rate)
        moved, optimizer = t.update(theta, s.gradient, state.optimizer)
        moved = moved if s.share is None else theta + s.share * (moved - theta)
        moved = within(moved, equations.theta, *self._limits(equations))
        first = xp.asarray(state.step == 0)
        by = [xp.where(first, 0 * (new - old), new - old) for new, old in
              ((theta, state.past.theta), (s.y, y), (s.u, state.adjoint))]  # fmt: skip
        return BilevelState(
            equations.y.unravel(s.y), equations.theta.unravel(moved), equations.theta.unravel(s.gradient),
            state.inner_gradients + s.gradients, state.products + s.products, state.step + 1, s.value,
            backend.space(theta).size(s.gradient), s.error, s.residual, s.met, s.u, optimizer, Past(theta, *by),
            s.doubt, s.scale, s.memory, s.damping,
        )  # fmt: skip

    def _start(self, equations: Equations, y: Array, theta: Array, state: BilevelState) -> tuple[Array, Array]:
        """Where the solves for y and u begin at θ: further along the latest step."""
        t = state.past.ahead(equations.backend.xp, theta)
        own = not isinstance(self.inner, str)  # to be continued from what it found
        return y if own else y + t * state.past.by_y, state.adjoint + t * state.past.by_u

    def row(self, old: BilevelState, new: BilevelState, began: float) -> HistoryRow:
        """Return what is told of a step that began at a time of `time.perf_counter`."""
        self.problem(new.y, new.theta).backend.synchronize(new)
        value, norm, error, residual = map(float, (new.value, new.gradient_norm, new.error, new.residual))
        first = int(old.step) == 0  # with what it took to begin
        gradients, products = (
            int(now) - (0 if first else int(before))
            for now, before in ((new.inner_gradients, old.inner_gradients), (new.products, old.products))
        )
        seconds = time.perf_counter() - began
        return HistoryRow(int(new.step), value, norm, error, residual, gradients, products, seconds)

    # -- the end -------------------------------------------------------------------------------------
    def finished(self, state: BilevelState) -> tuple[Any, Any]:
        """Return y at the θ that the latest update came to, and ‖F‖ there."""
        if not self.tolerance.solves:
            return state.y, state.residual
        problem = self.problem(state.y, state.theta)
        return self._compiled("_last", problem)(problem.args, state)

    def _last(self, backend: Any, args: tuple[Any, ...], state: BilevelState) -> tuple[Any, Any]:
        equations = self.equations(replace(self.problem(state.y, state.theta), backend=backend, args=args))
        theta = equations.theta.vector
        y, u = self._start(equations, equations.y.vector, theta, state)
        s = begin(equations, (y, u), theta, (state.doubt, state.memory, state.damping), gradient=False)
        s = self._inner(equations, s, theta, self.tolerance.limit(equations, state, s.size))
        return equations.y.unravel(s.y), s.size
