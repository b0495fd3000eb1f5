"""Bilevel optimisation: minimise L(y*(θ), θ) over θ, where F(y*(θ), θ) = 0, by steps along its gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from implicitdiff.arrays import Array, divisor
from implicitdiff.conditions import as_condition
from implicitdiff.errors import InputError
from implicitdiff.outer.bounds import bounds_of, within
from implicitdiff.outer.equations import Equations
from implicitdiff.outer.history import HistoryRow
from implicitdiff.outer.inner import Inner, inner_of
from implicitdiff.outer.optimizers import optimizer_of
from implicitdiff.outer.schedules import Schedule, Sweep
from implicitdiff.outer.single_loop import SOBA
from implicitdiff.outer.state import BilevelState, Past
from implicitdiff.outer.sweeps import Corrected, adjoint_solved, begin, swept
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
        if not isinstance(self.tolerance, Schedule):
            raise InputError(
                f"tolerance = {self.tolerance!r}: expected Sweep(), Fixed(rtol), Geometric(), Summable(), "
                "SOBA(samples) or SABA(samples)."
            )
        if isinstance(self.tolerance, SOBA):
            self.tolerance.check(as_condition(self.condition), self.inner, self.solver)
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
                args = self._on_batch(self.equations(problem), 0).problem.args
                looked_at = replace(problem, args=args)
                rules = Rules(looked_at, flat=True)  # raises for what is wrong with y0 and theta0
                verify(looked_at, lambda: rules, "gradient")
        return self._compiled("_first", problem)(problem.args, y0, theta0)

    def _on_batch(self, equations: Equations, step: Any) -> Equations:
        """Return the equations on the batches of a step, where there are any."""
        return self.tolerance.sampled(equations, step)[0] if isinstance(self.tolerance, SOBA) else equations

    def _first(self, backend: Any, args: tuple[Any, ...], y0: Any, theta0: Any) -> BilevelState:
        equations = self.equations(replace(self.problem(y0, theta0), backend=backend, args=args))
        equations = self._on_batch(equations, 0)
        y, theta, xp = equations.y.vector, equations.theta.vector, backend.xp
        y, theta = xp.asarray(y, copy=True), xp.asarray(theta, copy=True)
        theta = within(theta, equations.theta, *self._limits(equations))
        spot, none = equations.at(y, theta), equations.count(0)
        u, nan = xp.zeros_like(spot.rules.embedded(y)), equations.number(float("nan"))
        scale, gradients, products, memory = nan, none, none, None
        if isinstance(self.tolerance, SOBA):
            scale, spent, memory = self.tolerance.first(spot)
            products = none + equations.count(spent)
        elif not self.tolerance.measured:
            sizes = [backend.space(x).size(x) for x in (spot.residual(), spot.product(spot.rules.embedded(y)))]
            scale, gradients, products = xp.maximum(*sizes), none + 1, none + 1
        memory = memory if isinstance(self.tolerance, SOBA) else spot.memory()
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
        name = "_next_at_once" if isinstance(self.tolerance, SOBA) else "_next"
        return self._compiled(name, problem)(problem.args, state)

    def _next_at_once(self, backend: Any, args: tuple[Any, ...], state: BilevelState) -> BilevelState:
        """Move y, the adjoint and θ by a step each, on the batches of the step."""
        equations = self.equations(replace(self.problem(state.y, state.theta), backend=backend, args=args))
        equations, blocks = self.tolerance.sampled(equations, state.step)  # type: ignore[attr-defined]
        y, theta, xp = equations.y.vector, equations.theta.vector, backend.xp
        spot, number = equations.at(y, theta), equations.number
        d, F = self.tolerance.directions(spot, state.adjoint, blocks, state.memory)  # type: ignore[attr-defined]
        shrink = self.tolerance.at(xp.astype(xp.asarray(state.step), y.dtype))
        rho = state.scale * shrink
        t = optimizer_of(self.optimizer, equations.theta, self.learning_rate)
        moved, optimizer = t.update(theta, d.by_theta, state.optimizer)
        moved = within(theta + shrink * (moved - theta), equations.theta, *self._limits(equations))
        y, u = backend.detached(y - rho * d.by_y), backend.detached(state.adjoint - rho * d.by_u)
        return state._replace(
            y=equations.y.unravel(y), theta=equations.theta.unravel(moved),
            gradient=equations.theta.unravel(d.by_theta), inner_gradients=state.inner_gradients + 1,
            products=state.products + 1, step=state.step + 1, value=spot.value(),
            gradient_norm=backend.space(theta).size(d.by_theta), error=number(float("nan")),
            residual=backend.space(F).size(F), adjoint=u, optimizer=optimizer, memory=d.memory,
        )  # fmt: skip

    def _limits(self, equations: Equations) -> tuple[Any, Any]:
        return bounds_of(self.bounds, equations.theta), self.project

    def _next(self, backend: Any, args: tuple[Any, ...], state: BilevelState) -> BilevelState:
        equations = self.equations(replace(self.problem(state.y, state.theta), backend=backend, args=args))
        y, theta, xp = equations.y.vector, equations.theta.vector, backend.xp
        s = self._gradient(equations, y, theta, state)
        t = optimizer_of(self.optimizer, equations.theta, self.learning_rate)
        moved, optimizer = t.update(theta, s.gradient, state.optimizer)
        moved = within(moved, equations.theta, *self._limits(equations))
        first = xp.asarray(state.step == 0)
        by = [xp.where(first, 0 * (new - old), new - old) for new, old in
              ((theta, state.past.theta), (s.y, y), (s.u, state.adjoint))]  # fmt: skip
        norm = backend.space(theta).size(s.gradient)
        none = equations.number(float("nan"))
        error = s.error / divisor(xp, norm) if self.tolerance.measured else none
        return BilevelState(
            equations.y.unravel(s.y), equations.theta.unravel(moved), equations.theta.unravel(s.gradient),
            state.inner_gradients + s.gradients, state.products + s.products, state.step + 1,
            equations.at(s.y, theta).value() - xp.vecdot(s.u, s.F), norm, error, s.size, s.usable & ~s.going, s.u,
            optimizer, Past(theta, *by), s.doubt, state.scale, s.memory, s.damping,
        )  # fmt: skip

    def _start(self, equations: Equations, y: Array, theta: Array, state: BilevelState) -> tuple[Array, Array]:
        """Where the solves for y and u begin at θ: further along the latest step."""
        t = state.past.ahead(equations.backend.xp, theta)
        own = not isinstance(self.inner, str)  # to be continued from what it found
        return y if own else y + t * state.past.by_y, state.adjoint + t * state.past.by_u

    def _gradient(self, equations: Equations, y: Array, theta: Array, state: BilevelState) -> Corrected:
        """Return y, u and the gradient at θ, to the tolerance of the step."""
        xp, past = equations.backend.xp, (state.doubt, state.memory, state.damping)
        y, u = self._start(equations, y, theta, state)
        if isinstance(self.tolerance, Sweep):
            s = begin(equations, (y, u), theta, past, gradient=True)
            least = xp.where(state.step % self.tolerance.check == 0, equations.count(2), equations.count(1))
            newton = isinstance(self.inner, str) and self.inner == "newton-cg"
            inner = None if newton else self._inner
            return swept(equations, s, theta, self.tolerance, least, inner=inner)
        rtol = self._rtol(equations, state)
        s = begin(equations, (y, u), theta, past, gradient=False)
        return adjoint_solved(equations, self._inner(equations, s, theta, rtol * state.scale), theta, rtol)

    def _rtol(self, equations: Equations, state: BilevelState) -> Any:
        step = equations.backend.xp.asarray(state.step, dtype=equations.y.dtype, device=equations.y.device)
        return self.tolerance.at(step)

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
        if isinstance(self.tolerance, SOBA):
            return state.y, state.residual
        problem = self.problem(state.y, state.theta)
        return self._compiled("_last", problem)(problem.args, state)

    def _last(self, backend: Any, args: tuple[Any, ...], state: BilevelState) -> tuple[Any, Any]:
        equations = self.equations(replace(self.problem(state.y, state.theta), backend=backend, args=args))
        theta = equations.theta.vector
        y, u = self._start(equations, equations.y.vector, theta, state)
        s = begin(equations, (y, u), theta, (state.doubt, state.memory, state.damping), gradient=False)
        measured = self.tolerance.measured
        limit = self.tolerance.at(0.0) * s.size if measured else self._rtol(equations, state) * state.scale
        s = self._inner(equations, s, theta, limit)
        return equations.y.unravel(s.y), s.size
