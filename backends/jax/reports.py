"""Reports from within compiled programs, handed to the user's ``on_report`` by JAX's own callback.

A program that is running calls back in a thread of JAX's, where an exception would come out as one of JAX's. Where
nothing is traced but the derivative itself, its two ends are seen in numbers (see `Watch`): what is called back in
between is kept, and handed out at the end, in the thread of the user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from implicitdiff.accuracy import shown
from implicitdiff.arrays import numpy_namespace
from implicitdiff.backends.jax.rules import filled
from implicitdiff.conditions import as_condition
from implicitdiff.estimates import Estimate
from implicitdiff.linalg.reports import make_report
from implicitdiff.linalg.solve import Solution
from implicitdiff.mode import Mode
from implicitdiff.outcome import Report
from implicitdiff.problem import Problem
from implicitdiff.rules import Rules
from implicitdiff.runs import Run
from implicitdiff.solution_check import Step

__all__ = ["between", "hand_out", "hand_out_solved"]

OnReport = Callable[[Report], object]


def hand_out(problem: Problem, run: Run) -> None:
    """Let the program that is being traced hand out the report of a run of the rules."""
    e = run.diagnostics
    _emit(problem, (e.solution, e.step, run.estimate), (run.methods, run.derivatives, run.damping))


def hand_out_solved(rules: Rules, solution: Solution, b: Any, transposed: bool, estimate: Estimate | None) -> None:
    """Let the program that is being traced hand out the report of a solve, which JAX may have transposed."""
    step, p = rules.check.look(solution, b, transposed=transposed), rules.prepared
    _emit(rules.problem, (solution, step, estimate), (list(p.methods), rules.derivatives, p.damping))


def _emit(problem: Problem, seen: tuple[Solution, Step, Estimate | None], facts: tuple[Any, ...]) -> None:
    (methods, derivatives, damping), (solution, step, estimate) = facts, seen
    on_report, items = cast("OnReport", problem.settings.on_report), jnp.ndim(solution.status)
    leaves, treedef = jax.tree.flatten((solution, step.size, step.unsolved, estimate))
    condition = as_condition(problem.condition)
    condition = filled(condition, dict.fromkeys(condition.arrays))  # what is traced now is nothing to keep

    def receive(*numbers: Any) -> None:
        found, size, unsolved, known = jax.tree.unflatten(treedef, list(map(np.asarray, numbers)))
        report = make_report(found, damping, methods, float("nan"), size, derivatives, Mode.EAGER, ~unsolved)
        if known is not None:
            report = replace(report, error=shown(numpy_namespace, known, condition, damping, visible=True))
        kept = _between.get(id(on_report))
        if kept is None:
            on_report(report)
        else:
            kept.append(report)

    shape = jnp.shape(solution.status)
    arrays = [jnp.broadcast_to(leaf, shape) if jnp.ndim(leaf) < items else jnp.asarray(leaf) for leaf in leaves]
    _called_back(receive, list(map(lax.stop_gradient, arrays)), items)


def _called_back(receive: Callable[..., None], leaves: Sequence[Any], items: int) -> None:
    """Call back with numbers, under a map once for all: JAX's own way is once for each item, each compiled."""

    @jax.custom_batching.custom_vmap
    def call(*leaves: Any) -> tuple[()]:
        jax.debug.callback(receive, *leaves)
        return ()

    @call.def_vmap
    def _(size: int, batched: Sequence[bool], *leaves: Any) -> tuple[tuple[()], tuple[()]]:
        many = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(leaves, batched, strict=True)]
        _called_back(receive, [_merged(x) if items else x for x in many], 1)
        return (), ()

    call(*leaves)


def _merged(x: Any) -> Any:
    """Make one axis of items of the first two."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


_between: dict[int, list[Report]] = {}
_lock = threading.Lock()


def between(on_report: OnReport | None, *, last: bool) -> None:
    """Keep what is called back from here on; at the last end, and of an earlier call that failed, hand it out."""
    if on_report is None:
        return
    jax.effects_barrier()
    with _lock:
        kept = _between.pop(id(on_report), [])
        if not last:
            _between[id(on_report)] = []
    for report in kept:
        on_report(report)
