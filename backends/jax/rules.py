"""The rules of JAX's calls: a condition's functions and arrays, and a batch as one item mapped."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import jax

from implicitdiff import axes
from implicitdiff.certificate import certify
from implicitdiff.errors import ShapeError
from implicitdiff.problem import Problem
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules
from implicitdiff.solvers.sequences import SequenceState

__all__ = ["arrays_in", "arrays_of", "filled", "functions_of", "named_functions", "run_rules"]


def functions_of(condition: Any) -> tuple[Any, ...]:
    """Return the user's functions in a condition, and options; not its arrays, which may be others at each call."""
    return tuple(named_functions(condition).values())


def named_functions(condition: Any) -> dict[str, Any]:
    """... with the names of the arguments that they were given as."""
    if not hasattr(condition, "maps"):
        return {"condition": condition}
    return {name: value for name, value in vars(condition).items() if name not in condition.arrays}


def arrays_of(condition: Any) -> dict[str, Any]:
    """Return the numbers that a condition holds."""
    return getattr(condition, "arrays", {})


def arrays_in(problem: Problem) -> tuple[Any, ...]:
    """Return all that may be traced of a problem."""
    return problem.y, problem.theta, problem.args, arrays_of(problem.condition)


def filled(condition: Any, arrays: dict[str, Any]) -> Any:
    """Return the condition with traced values in place of its arrays."""
    if not arrays:
        return condition
    filled = copy.copy(condition)
    for name, value in arrays.items():
        object.__setattr__(filled, name, value)
    return filled


def run_rules(
    problem: Problem, mode: str, direction: Any, x0: Any, *, estimate: bool = False
) -> tuple[Any, Any, Any, Rules]:
    """Run a mode of the rules, and estimate its error if asked to; for a batch those of one item, mapped.

    XLA makes more of one item mapped than of arithmetic on arrays with a leading axis: its loops are over items.
    """
    flat = estimate or mode == "jacobian" or isinstance(x0, SequenceState)
    if not problem.batched or not (count := _check_items(problem, mode, direction, x0)):
        rules = Rules(problem, flat=flat)
        value, diagnostics = getattr(rules, mode)(direction, x0)
        return value, diagnostics, certify(rules) if estimate else None, rules
    made, mapped = list[Rules](), problem.axes.mapped
    each = {name: value for name, value in arrays_of(problem.condition).items() if name in problem.condition.per_item}
    axes.check_each(each, count)

    def one(y: Any, theta: Any, vector: Any, x0: Any, each: dict[str, Any], own: list[Any]) -> Any:
        condition, args = filled(problem.condition, each), axes.filled(problem.args, mapped, own)
        at = {"y": y, "theta": theta, "args": args, "condition": condition}
        rules = Rules(replace(problem, **at, batched=False, axes=axes.NO_AXES), flat=flat)
        made.append(rules)
        value, diagnostics = getattr(rules, mode)(direction if mode == "gradient" else vector, x0)
        return value, diagnostics, certify(rules) if estimate else None

    vector = None if mode == "gradient" else direction
    value, diagnostics, *rest = jax.vmap(one)(
        problem.y, problem.theta, vector, x0, each, axes.mapped_of(problem.args, mapped)
    )
    if mode == "jacobian":  # solutions of several right-hand sides are (*rhs, *items, n) everywhere
        x = jax.numpy.moveaxis(diagnostics.solution.x, 0, 1)
        diagnostics = diagnostics._replace(solution=diagnostics.solution._replace(x=x))
    return value, diagnostics, *rest, made[-1]


def _check_items(problem: Problem, mode: str, direction: Any, x0: Any) -> int:
    """Check that everything carries the same leading axis, and return its length."""
    y = Raveler(problem.backend, problem.y, "y", True)
    theta = Raveler(problem.backend, problem.theta, "theta", True)
    y.check_partner(theta)
    axes.check_mapped(problem.backend, problem.args, problem.axes.mapped, y.items)
    if mode in {"vjp", "jvp"}:
        raveler, name = (y, "cotangent") if mode == "vjp" else (theta, "tangent")
        raveler.like(direction, name, dtype=raveler.dtype)
    if isinstance(x0, SequenceState):
        return y.items[0]  # its shapes are looked at where those of the system are known
    if x0 is not None and tuple(x0.shape[:1]) != y.items:
        raise ShapeError(f"x0 has shape {tuple(x0.shape)}; expected one raveled vector for each of {y.items[0]} items.")
    return y.items[0]
