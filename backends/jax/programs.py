"""Programs compiled once for each condition, loss, solver and structure, and kept as long as the functions live."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from implicitdiff.backends.jax.contents import Contents
from implicitdiff.backends.jax.repeats import Repeats, code_of, repeats_of
from implicitdiff.backends.jax.rules import arrays_of, filled, functions_of, named_functions
from implicitdiff.errors import RecompilationWarning
from implicitdiff.outcome import warn
from implicitdiff.problem import Problem

__all__ = ["Call", "Program", "Split", "call_for", "program_for"]


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
_programs: dict[Any, Program] = {}


def program_for(call: Call, build: Callable[..., Any]) -> Program:
    """Return the program for a call, made at the first one of its kind.

    The key speaks of the user's functions, and of objects that cannot be compared, by their identity; an entry goes
    when one of them does.
    """
    problem, settings, found = call.problem, call.problem.settings, list[Any]()
    functions = (*functions_of(problem.condition), *(() if call.outer is None else (call.outer,)))
    static = (problem.axes.mapped, settings.solver, call.args.treedef, *call.args.static)
    key = (
        call.mode, build, type(problem.condition), *(_identity(f, found) for f in functions), problem.batched,
        settings.on_failure, *(_static(part, found) for part in static), _form(call.arrays),
        jax.config.read("jax_enable_x64"), _identity(settings.on_report, found), settings.control,
        getattr(problem.condition, "structure", None),
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
