"""What a failed solve says, and what happens then (``on_failure``)."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from implicitdiff.arrays import Array, item_numbers, to_python
from implicitdiff.errors import (
    NonFiniteProductError,
    NotConvergedError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    SingularError,
    SolveError,
    SolveWarning,
    UnknownNameError,
)
from implicitdiff.operator import Operator
from implicitdiff.report import Status

__all__ = ["MODES", "check_mode", "explain", "settle", "warn"]

MODES = ("raise", "warn", "nan", "ignore")

_ERRORS: dict[Status, type[SolveError]] = {
    Status.MAX_ITERATIONS: NotConvergedError,
    Status.STAGNATED: NotConvergedError,
    Status.NOT_POSITIVE_DEFINITE: NotPositiveDefiniteError,
    Status.NOT_SYMMETRIC: NotSymmetricError,
    Status.SINGULAR: SingularError,
    Status.NON_FINITE: NonFiniteProductError,
}
_NOT_THE_USER = {"implicitdiff", "contextlib", "functools", "torch"}
"""Between the line that asks for a derivative and ours; Torch calls us from within its backward pass."""


def check_mode(on_failure: str) -> None:
    """Raise where ``on_failure`` is none of the four."""
    if on_failure not in MODES:
        raise UnknownNameError(f"on_failure = {on_failure!r}: expected one of {', '.join(MODES)}.")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the user's line: the innermost frame that is neither this library's nor its framework's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def settle(error: SolveError | None, on_failure: str) -> None:
    """Raise, warn or stay quiet."""
    if error is None:
        return
    if on_failure == "raise":
        raise error
    if on_failure == "warn":
        warn(f"{type(error).__name__}: {error}", SolveWarning)


def explain(operator: Operator, solution: Any, solver: str) -> SolveError:
    """Build the error for a solve of which at least one item failed, with the method of that name."""
    xp = operator.backend.xp
    codes = xp.asarray(solution.status)
    worst = Status(int(xp.max(codes)))
    facts = _facts(xp, solution, codes, worst)
    head, hint = _TEXTS[worst]
    head = head.format(solver=solver, A=operator.label, **facts)
    if worst is not Status.NON_FINITE and worst is not Status.NOT_SYMMETRIC and _is_zero(operator, solution.x):
        worst = Status.SINGULAR
        head = f"{operator.label} v = 0 for a probe vector v: F does not depend on y, or its Hessian is zero."
        hint = (
            "Likely cause: the condition was given the wrong function, or y and theta are swapped.\n"
            "Next: check that F(y, theta) changes with y."
        )
    items = ""
    if operator.items:
        numbers = item_numbers(xp, codes > int(Status.APPROXIMATE))
        items = f"items {numbers}: "
    return _ERRORS[worst](f"{items}{head}\n{hint}")


def _facts(xp: Any, solution: Any, codes: Array, worst: Status) -> dict[str, str]:
    here = codes == int(worst)

    def pick(field: Any) -> str:
        if field is None:
            return "unknown"
        values = xp.broadcast_to(xp.asarray(field), codes.shape)
        value = to_python(values if not codes.shape else values[here][0])
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return {
        "residual": pick(solution.residual), "tolerance": pick(solution.tolerance),
        "iterations": pick(solution.iterations), "rcond": pick(solution.rcond),
        "products": _products(solution),
    }  # fmt: skip


def _products(solution: Any) -> str:
    return getattr(solution, "products", "") or "the product"


def _is_zero(operator: Operator, x: Array) -> bool:
    """Whether A maps a vector without structure to exactly zero (costs one product, after a failure only)."""
    one = operator.backend.space(x[0, ...] if len(x.shape) > len(operator.items) + 1 else x)
    return bool(one.vanishes(operator.matvec(one.probe())))


_TEXTS = {
    Status.MAX_ITERATIONS: (
        "{solver} stopped after {iterations} iterations at a residual of {residual}, above {tolerance}.",
        "Likely cause: {A} is ill-conditioned, or maxiter is too small.".replace("{A}", "the operator")
        + "\nNext: raise maxiter, give a preconditioner or damping, loosen rtol, or try solver='lu'.",
    ),
    Status.STAGNATED: (
        "{solver} stagnated after {iterations} iterations: the true residual stays at {residual}, above {tolerance}.",
        "Likely cause: a singular or very ill-conditioned operator, or noisy products (finite differences).\n"
        "Next: try solver='lu' (it reports the condition number), add damping, or loosen rtol.",
    ),
    Status.NOT_POSITIVE_DEFINITE: (
        "{solver}: {A} is not positive definite (zero or negative curvature was met).",
        "Likely cause: y is a saddle point or a maximum, or the Hessian is singular.\n"
        "Next: solver='minres' (symmetric), 'lu' (any), or damping in the solver.",
    ),
    Status.NOT_SYMMETRIC: (
        "{solver}: {A} was declared symmetric, and it is not.",
        "Likely cause: hvp or hessian has an error, or a Root was given to a method for symmetric matrices.\n"
        "Next: compare vᵀ(A w) with wᵀ(A v); for a truly asymmetric operator use solver='gmres' or 'lu'.",
    ),
    Status.SINGULAR: (
        "{solver}: {A} is singular, or so to working precision (rcond = {rcond}, residual = {residual}).",
        "Likely cause: the solution is not unique (a redundant parameter, a flat direction), or F ignores part of y.\n"
        "Next: regularise the problem, add damping, or use solver='minres' where the loss ignores the flat directions.",
    ),
    Status.NON_FINITE: (
        "{products} with {A} holds NaN or Inf, although y, theta and the vector are finite.",
        "Likely cause: a derivative that does not exist at y (a square root or a norm at 0, a log of 0).\n"
        "Next: evaluate that callback at y, and smooth the function there.",
    ),
}
