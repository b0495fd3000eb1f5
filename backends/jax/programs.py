"""Programs compiled once for each condition, loss, solver and structure, and kept as long as the functions live."""

from __future__ import annotations

import threading
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from implicitdiff.backends.jax.contents import Contents
from implicitdiff.backends.jax.repeats import Repeats, code_of, repeats_of
from implicitdiff.backends.jax.reports import hand_out
from implicitdiff.backends.jax.rules import arrays_of, filled, functions_of, named_functions, run_rules
from implicitdiff.backends.jax.tracers import is_traced, is_transformed
from implicitdiff.errors import RecompilationWarning
from implicitdiff.mode import Mode
from implicitdiff.outcome import warn
from implicitdiff.problem import Problem
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules, Run

__all__ = ["Call", "Program", "Runner", "Split", "call_for", "looked_at", "program_for"]


@dataclass
class Program:
    """One compiled program, and what was found while it was traced.

    Parameters
    ----------
    build : callable
        ``build(program, call, *arrays) -> arrays``; runs while JAX traces.
    contents : Contents
        What the user's functions see beside their arguments.
    warned : bool
        Whether the user knows that it is compiled at every call.
    repeats : Repeats, optional
        Counts the programs of the same code.
    """

    build: Callable[..., Any]
    contents: Contents
    warned: bool = False
    repeats: Repeats | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    compiled: Any = None

    def __post_init__(self) -> None:
        # What is compiled must not keep the user's functions alive: it finds them in the call that is running.
        self.compiled = jax.jit(lambda *arrays: self.build(self, _running.stack[-1], *arrays))

    def __call__(self, call: Call) -> Any:
        _running.stack.append(call)
        try:
            return self.compiled(*call.arrays)
        finally:
            _running.stack.pop()


class _Running(threading.local):
    def __init__(self) -> None:
        self.stack: list[Call] = []


_running = _Running()


@dataclass
class Call:
    """A call with its static parts, and the arrays that go into the program.

    ``arrays`` are y, theta, the leaves of args that may change from call to call, and what else the program takes.
    """

    problem: Problem
    mode: str
    outer: Any
    args: Split
    arrays: tuple[Any, ...]

    def problem_at(self, y: Any, theta: Any, dynamic: list[Any]) -> Problem:
        """Return the problem with traced values in place of the arrays."""
        args, arrays = self.args.join(dynamic)
        condition = filled(self.problem.condition, arrays)
        return replace(self.problem, y=y, theta=theta, args=args, condition=condition, copy=False)


class Split:
    """Arguments taken apart into arrays and floats, which may change, and the rest, which is part of the program."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.dynamic: list[Any] = []
        self.static: list[Any] = []
        leaves, self.treedef = jax.tree.flatten(args)
        for leaf in leaves:
            changes = isinstance(leaf, (jax.Array, np.ndarray, np.generic, float))
            self.static.append(_CHANGES if changes else leaf)
            if changes:
                self.dynamic.append(leaf)

    def join(self, dynamic: list[Any]) -> tuple[Any, ...]:
        """Put the arguments together again."""
        rest = iter(dynamic)
        return jax.tree.unflatten(self.treedef, [next(rest) if leaf is _CHANGES else leaf for leaf in self.static])


def call_for(problem: Problem, mode: str, point: tuple[Any, Any], *arrays: Any, outer: Any = None) -> Call:
    """Return a call of a program on the point, the data, and more arrays."""
    split = Split((problem.args, arrays_of(problem.condition)))
    return Call(problem, mode, outer, split, (*point, split.dynamic, *arrays))


_CHANGES = object()
_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
_programs: dict[Any, Program] = {}


def program_for(call: Call, build: Callable[..., Any]) -> Program:
    """Return the program for a call, made at the first one of its kind.

    The key speaks of the user's functions, and of objects that cannot be compared, by their identity; an entry goes
    when one of them does.
    """
    problem, settings, found = call.problem, call.problem.settings, list[Any]()
    functions = (*functions_of(problem.condition), *(() if call.outer is None else (call.outer,)))
    static = (settings.solver, call.args.treedef, *call.args.static)
    key = (
        call.mode, build, type(problem.condition), *(_identity(f, found) for f in functions), problem.batched,
        settings.on_failure, *(_static(part, found) for part in static), _form(call.arrays),
        jax.config.read("jax_enable_x64"), _identity(settings.on_report, found),
    )  # fmt: skip
    held = (settings.solver, *call.args.static, *(f for f in functions if not callable(f)))
    program, contents = _programs.get(key), Contents(filter(callable, functions), held)
    if program is not None and program.contents == contents:
        if program.repeats is not None:
            program.repeats.count = 0
        return program
    program = Program(build, contents, _tell_unknown(program, contents), _counted(call, build, program is not None))
    for thing in found:
        try:
            program.kept.append(weakref.ref(thing, _dropping(key)))
        except TypeError:  # no weak references to it: kept, or its id could come to mean another
            program.kept.append(thing)
    _programs[key] = program
    return program


def _counted(call: Call, build: Any, changed: bool) -> Repeats:
    """Count a program by the code of what it is made of."""
    problem, settings, split = call.problem, call.problem.settings, call.args
    named = [*named_functions(problem.condition).items(), ("outer", call.outer), ("on_report", settings.on_report)]
    named += [("solver", settings.solver), *(("args", leaf) for leaf in split.static if leaf is not _CHANGES)]
    code = type(problem.condition), *(code_of(value) for _, value in named)
    rest = call.mode, build, problem.batched, settings.on_failure, split.treedef, _form(call.arrays)
    return repeats_of(code, rest, named, changed=changed)


def _tell_unknown(before: Program | None, contents: Contents) -> bool:
    """Say once why a program is compiled again and again; return whether that was said."""
    if before is None or before.warned or contents.unknown is None:
        return before is not None and before.warned
    warn(
        f"JAX compiles this derivative at every call: its functions see {contents.unknown}, which cannot be compared "
        "with what it was.\nNext: pass what changes in args or theta, as arrays, and keep the rest from the functions; "
        "or call from within jax.jit.",
        RecompilationWarning,
    )
    return True


def _dropping(key: Any) -> Callable[[Any], None]:
    """Return what drops a program; it holds on to the table, which is gone at the end of the interpreter."""
    programs = _programs

    def drop(_: Any) -> None:
        programs.pop(key, None)

    return drop


def _identity(function: Any, found: list[Any]) -> Any:
    """Identity of a function; that of a bound method is the object's and the function's."""
    if not callable(function):
        return _static(function, found)
    if isinstance(function, types.MethodType):
        found += [function.__self__, function.__func__]
        return id(function.__self__), id(function.__func__)
    found.append(function)
    return id(function)


def _static(value: Any, found: list[Any]) -> Any:
    """Make a key of a value: itself where it can be compared, else its identity."""
    try:
        hash(value)
    except TypeError:
        found.append(value)
        return id(value)
    return type(value), value


def _form(tree: Any) -> tuple[Any, ...]:
    """Structure, shapes and dtypes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, *((getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


class Runner:
    """Runs a mode of the rules: compiled where values are at hand, inline where JAX is tracing.

    Parameters
    ----------
    problem : Problem
    inline : JaxBackend
        The backend for what is being traced.
    """

    def __init__(self, problem: Problem, inline: Any) -> None:
        self._problem, self._inline = problem, inline
        self._direct: Rules | None = None
        self._factors: tuple[Program, Any] | None = None
        self._step: Any = None

    def __call__(self, mode: str, direction: Any, x0: Any) -> Run:
        problem, start = self._problem, time.perf_counter()
        outer, vector = (direction, None) if mode == "gradient" else (None, direction)
        arrays = (problem.y, problem.theta, problem.args, arrays_of(problem.condition))
        if self._direct is not None or is_traced(arrays, vector, x0):
            return self._traced(mode, direction, x0)
        _check_leaves(problem, mode, vector, x0)
        call = call_for(problem, mode, (problem.y, problem.theta), vector, x0, outer=outer)
        if problem.copy and x0 is None and mode in {"vjp", "jvp"}:
            program, out = self._factored(call)
        else:
            program = program_for(call, _build)
            out = program(call)
        if is_traced(out):  # constants, met inside of a program that is being traced
            return self._traced(mode, direction, x0)
        (value, diagnostics, clean), seconds = out, time.perf_counter() - start
        return Run(value, diagnostics, **program.facts["report"], seconds=seconds, clean=clean, certain=self._certain)

    def _certain(self) -> Any:
        if self._step is None:
            self._step = looked_at(self._problem, sure=True)
        return self._step

    def _traced(self, mode: str, direction: Any, x0: Any) -> Run:
        run = (self._transformed if self._is_transformed(direction, x0) else self._inlined)(mode, direction, x0)
        if self._problem.settings.on_report is not None:
            hand_out(self._problem.settings.on_report, run)
        return run

    def _is_transformed(self, direction: Any, x0: Any) -> bool:
        problem, vector = self._problem, None if callable(direction) else direction
        if problem.copy or self._direct is not None:
            return False
        given = problem.y, problem.theta, problem.args, arrays_of(problem.condition), vector, x0
        return is_transformed((*functions_of(problem.condition), direction), given)

    def _transformed(self, mode: str, direction: Any, x0: Any) -> Run:
        """Let JAX transform one compiled program: of hundreds of operations each would be compiled by itself."""
        problem = self._problem
        outer, vector = (direction, None) if mode == "gradient" else (None, direction)
        _check_leaves(problem, mode, vector, x0)
        call = call_for(problem, mode, (problem.y, problem.theta), vector, x0, outer=outer)
        program = program_for(call, _build_inline)
        value, diagnostics = program(call)
        return Run(value, diagnostics, **program.facts["report"], seconds=float("nan"), mode=Mode.INLINE)

    def _inlined(self, mode: str, direction: Any, x0: Any) -> Run:
        if self._problem.batched and not self._problem.copy:
            problem = replace(self._problem, backend=self._inline)
            value, diagnostics, rules = run_rules(problem, mode, direction, x0)
            p = rules.prepared
            return Run(value, diagnostics, p.methods, rules.derivatives, p.damping, p.seconds, rules, Mode.INLINE)
        if self._direct is None:
            self._direct = Rules(replace(self._problem, backend=self._inline, copy=False))
        return self._direct(mode, direction, x0)

    def _factored(self, call: Call) -> tuple[Program, Any]:
        """Use what the point alone determines (factors, residuals), computed at the first call."""
        vector = call.arrays[3]
        call = replace(call, arrays=call.arrays[:3])
        if self._factors is None:  # what the functions see may be another later: this is the point as it was
            made = program_for(replace(call, mode="linearize"), _build_parts)
            self._factors = made, made(call)  # at once: another thread may be doing the same
        program, factors = self._factors
        part = program.facts[call.mode]
        leaves = part.leaves(self._problem, vector)
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
    if x0 is not None:
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
    problem = call.problem_at(y, theta, dynamic)
    direction = call.outer if call.mode == "gradient" else vector
    value, diagnostics, rules = run_rules(problem, call.mode, direction, x0)
    _note(program, rules)
    return value, diagnostics, diagnostics.clean(jnp)


def _build_inline(program: Program, call: Call, y: Any, theta: Any, dynamic: Any, vector: Any, x0: Any) -> Any:
    """Trace one mode for a user who may transform it further."""
    backend: Any = call.problem.backend
    problem = replace(call.problem_at(y, theta, dynamic), backend=backend.inline)
    value, diagnostics, rules = run_rules(problem, call.mode, call.outer if call.mode == "gradient" else vector, x0)
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
