"""Runs a mode of the rules: as a compiled program, or inline where JAX is tracing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from implicitdiff.backends.jax.programs import Call, Program, call_for, program_for
from implicitdiff.backends.jax.reports import hand_out
from implicitdiff.backends.jax.rules import arrays_in, functions_of, run_rules
from implicitdiff.backends.jax.tracers import is_traced, is_transformed
from implicitdiff.mode import Mode
from implicitdiff.polishing import no_numbers
from implicitdiff.problem import Problem
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules
from implicitdiff.runs import Run
from implicitdiff.solvers.sequences import SequenceState
from implicitdiff.tolerances import CONTRACTING, MOST_POLISH

__all__ = ["Runner", "looked_at", "newtons"]

_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


class Runner:
    """Runs a mode of the rules: compiled where values are at hand, inline where JAX is tracing.

    Parameters
    ----------
    problem : Problem
    inline : JaxBackend
        The backend for what is being traced.
    """

    def __init__(self, problem: Problem, inline: Any) -> None:
        self.problem, self._inline = problem, inline
        self._direct: Rules | None = None
        self._factors: tuple[Program, Any] | None = None
        self._step: Any = None

    def __call__(self, mode: str, direction: Any, x0: Any, *, estimate: bool = False) -> Run:
        problem, start = self.problem, time.perf_counter()
        outer, vector = (direction, None) if mode == "gradient" else (None, direction)
        if self._direct is not None or is_traced(arrays_in(problem), vector, x0):
            return self._traced(mode, direction, x0, estimate)
        _check_leaves(problem, mode, vector, x0)
        if getattr(problem.condition, "structure", None) == ():  # of nothing found: here are numbers to look at
            _ = Rules(replace(problem, copy=False), flat=True, later=True).prepared.whole
        call = call_for(problem, mode, (problem.y, problem.theta), vector, x0, outer=outer)
        if problem.copy and x0 is None and mode in {"vjp", "jvp"} and not estimate:
            program, out = self._factored(call)
        else:
            program = program_for(call, _build_estimated if estimate else _build)
            out = program(call)
        if is_traced(out):  # constants, met inside of a program that is being traced
            return self._traced(mode, direction, x0, estimate)
        (value, diagnostics, clean, *found), seconds = out, time.perf_counter() - start
        run = Run(value, diagnostics, **program.facts["report"], seconds=seconds, clean=clean, certain=self._certain)
        return run._replace(estimate=found[0]) if found else run

    def newton(self) -> Any:
        """y − A⁻¹F(y, θ), as a tree: by a program of its own, or inline."""
        problem = self.problem
        if self._direct is None and not is_traced(*arrays_in(problem)):
            call = call_for(problem, "newton", (problem.y, problem.theta))
            out = program_for(call, _build_newton)(call)
            if not is_traced(out):
                return out
        return Rules(replace(problem, backend=self._inline, copy=False), flat=True).newton()

    def _certain(self) -> Any:
        if self._step is None:
            self._step = looked_at(self.problem, sure=True)
        return self._step

    def _traced(self, mode: str, direction: Any, x0: Any, estimate: bool) -> Run:
        if not estimate and self._is_transformed(direction, x0):
            run = self._transformed(mode, direction, x0)
        else:
            run = self._inlined(mode, direction, x0, estimate)
        if self.problem.settings.on_report is not None:
            hand_out(self.problem, run)
        return run

    def _is_transformed(self, direction: Any, x0: Any) -> bool:
        problem, vector = self.problem, None if callable(direction) else direction
        if problem.copy or self._direct is not None:
            return False
        return is_transformed((*functions_of(problem.condition), direction), (*arrays_in(problem), vector, x0))

    def _transformed(self, mode: str, direction: Any, x0: Any) -> Run:
        """Let JAX transform one compiled program: of hundreds of operations each would be compiled by itself."""
        problem = self.problem
        outer, vector = (direction, None) if mode == "gradient" else (None, direction)
        _check_leaves(problem, mode, vector, x0)
        call = call_for(problem, mode, (problem.y, problem.theta), vector, x0, outer=outer)
        program = program_for(call, _build_inline)
        value, diagnostics = program(call)
        return Run(value, diagnostics, **program.facts["report"], seconds=float("nan"), mode=Mode.INLINE)

    def _inlined(self, mode: str, direction: Any, x0: Any, estimate: bool) -> Run:
        if self.problem.batched and not self.problem.copy:
            problem = replace(self.problem, backend=self._inline)
            value, diagnostics, found, rules = run_rules(problem, mode, direction, x0, estimate=estimate)
            p = rules.prepared
            run = Run(value, diagnostics, p.methods, rules.derivatives, p.damping, p.seconds, rules, Mode.INLINE)
            return run._replace(estimate=found)
        if self._direct is None:
            self._direct = Rules(replace(self.problem, backend=self._inline, copy=False))
        return self._direct(mode, direction, x0, estimate=estimate)

    def _factored(self, call: Call) -> tuple[Program, Any]:
        """Use what the point alone determines (factors, residuals), computed at the first call."""
        vector = call.arrays[3]
        call = replace(call, arrays=call.arrays[:3])
        if self._factors is None:  # what the functions see may be another later: this is the point as it was
            made = program_for(replace(call, mode="linearize"), _build_parts)
            self._factors = made, made(call)  # at once: another thread may be doing the same
        program, factors = self._factors
        part = program.facts[call.mode]
        leaves = part.leaves(self.problem, vector)
        if is_traced(factors):
            return program, factors
        return program, jax.tree.unflatten(part.form, part.compiled(factors[call.mode], leaves))


def _check_leaves(problem: Problem, mode: str, vector: Any, x0: Any) -> None:
    """Raise, with its path, for a leaf that cannot go into a compiled program."""
    if all(isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves((problem.y, problem.theta, vector, x0))):
        return
    trees = (problem.y, "y"), (problem.theta, "theta")
    ravelers = [Raveler(problem.backend, tree, name, problem.batched) for tree, name in trees]
    if vector is not None:
        raveler, name = (ravelers[1], "tangent") if mode == "jvp" else (ravelers[0], "cotangent")
        raveler.like(vector, name)
    if x0 is not None and not isinstance(x0, SequenceState):
        problem.backend.as_leaf(x0, "x0")


def _note(program: Program, rules: Rules) -> None:
    p = rules.prepared
    program.facts["report"] = {"methods": list(p.methods), "derivatives": rules.derivatives, "damping": p.damping}


def looked_at(problem: Problem, *, sure: bool) -> Any:
    """Look at y as a solution, in a program of its own; ``sure`` makes the Newton step."""
    call = call_for(problem, "certain" if sure else "look", (problem.y, problem.theta))
    return program_for(call, _build_look)(call)


def _build_look(program: Program, call: Call, y: Any, theta: Any, dynamic: Any) -> Any:
    return Rules(call.problem_at(y, theta, dynamic)).check.look(sure=call.mode == "certain")


def _build(program: Program, call: Call, y: Any, theta: Any, dynamic: Any, vector: Any, x0: Any) -> Any:
    """Trace one mode at a point."""
    return _built(program, call, (y, theta, dynamic), vector, x0)[:3]


def _build_estimated(program: Program, call: Call, y: Any, theta: Any, dynamic: Any, vector: Any, x0: Any) -> Any:
    """The same, with an estimate of the error."""
    return _built(program, call, (y, theta, dynamic), vector, x0, estimate=True)


def _built(
    program: Program, call: Call, at: tuple[Any, Any, Any], vector: Any, x0: Any, *, estimate: bool = False
) -> Any:
    direction = call.outer if call.mode == "gradient" else vector
    problem = call.problem_at(*at)
    value, diagnostics, found, rules = run_rules(problem, call.mode, direction, x0, estimate=estimate)
    _note(program, rules)
    return value, diagnostics, diagnostics.clean(jnp), found


def _build_newton(program: Program, call: Call, y: Any, theta: Any, dynamic: Any) -> Any:
    return Rules(call.problem_at(y, theta, dynamic), flat=True).newton()


def newtons(problem: Problem, steps: Any, inline: Any) -> Any:
    """Return y after so many Newton steps; "auto" is until they contract no more."""
    runner = Runner(replace(problem, copy=False), inline)
    if steps != "auto":
        for _ in range(steps):
            runner = Runner(replace(runner.problem, y=runner.newton()), inline)
        return runner.problem.y
    if is_traced(*arrays_in(problem)):
        raise no_numbers()
    size = float("inf")
    for _ in range(MOST_POLISH):
        found = float(jnp.max(looked_at(runner.problem, sure=False).size))
        if not found <= CONTRACTING * size or found == 0:
            break
        size, runner = found, Runner(replace(runner.problem, y=runner.newton()), inline)
    return runner.problem.y


def _build_inline(program: Program, call: Call, y: Any, theta: Any, dynamic: Any, vector: Any, x0: Any) -> Any:
    """Trace one mode for a user who may transform it further."""
    backend: Any = call.problem.backend
    problem = replace(call.problem_at(y, theta, dynamic), backend=backend.inline)
    outer = call.outer if call.mode == "gradient" else vector
    value, diagnostics, _, rules = run_rules(problem, call.mode, outer, x0)
    _note(program, rules)
    return value, diagnostics


@dataclass
class _Part:
    """One mode of a linearisation whose constants were computed before."""

    mode: str
    compiled: Any
    form: Any

    def leaves(self, problem: Problem, vector: Any) -> list[Any]:
        """Check a direction and take it apart."""
        like, name, what = (problem.y, "y", "cotangent") if self.mode == "vjp" else (problem.theta, "theta", "tangent")
        raveler = Raveler(problem.backend, like, name, problem.batched)
        raveler.like(vector, what, dtype=raveler.dtype)
        kinds = [leaf.dtype for leaf in raveler.leaves]
        return [jnp.asarray(leaf, dtype=kind) for leaf, kind in zip(jax.tree.leaves(vector), kinds, strict=True)]


def _build_parts(program: Program, call: Call, y: Any, theta: Any, dynamic: Any) -> Any:
    """Factor at a point, and trace what the modes do with the factors; their constants are what is returned."""
    rules = Rules(call.problem_at(y, theta, dynamic))
    for transposed in (False, True):
        rules.prepared.state(transposed)
    constants = {}
    for mode, like in (("vjp", y), ("jvp", theta)):

        def run(direction: Any, mode: str = mode) -> Any:
            value, diagnostics = getattr(rules, mode)(direction)
            return value, diagnostics, diagnostics.clean(jnp)

        closed, shape = jax.make_jaxpr(run, return_shape=True)(jax.tree.map(jnp.asarray, like))
        program.facts[mode] = _Part(mode, jax.jit(_evaluator(closed.jaxpr)), jax.tree.structure(shape))
        constants[mode] = closed.consts
    _note(program, rules)
    return constants


def _evaluator(jaxpr: Any) -> Callable[[Any, Any], Any]:
    return lambda constants, leaves: jax.core.eval_jaxpr(jaxpr, constants, *leaves)
