"""The outcome of a solve, from the solver to the user: its status, the report, the error and what it says."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, listed, to_python
from implicitdiff.errors import (
    NonFiniteProductError,
    NotConvergedError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    PreconditionerError,
    SingularError,
    SolveError,
    SolveWarning,
)
from implicitdiff.records import Record, brief, html_table
from implicitdiff.tolerances import SAFETY

if TYPE_CHECKING:
    from implicitdiff.error_estimate import ErrorEstimate
    from implicitdiff.linalg.operator import Operator

__all__ = ["MODES", "Counts", "Report", "Status", "explain", "settle", "tally", "warn"]


class Status(IntEnum):
    """Why a solver stopped. Ordered: in a set of solves the largest is the worst."""

    CONVERGED = 0
    APPROXIMATE = 1
    """An approximation by design (a truncated series, a diagonal): never called converged."""
    MAX_ITERATIONS = 2
    STAGNATED = 3
    """The true residual no longer falls, and is above the tolerance."""
    NOT_POSITIVE_DEFINITE = 4
    NOT_SYMMETRIC = 5
    SINGULAR = 6
    BAD_PRECONDITIONER = 7
    """It holds NaN or Inf, is singular, or not symmetric positive definite where the method needs that."""
    NON_FINITE = 8
    CONTRADICTED = 9
    """Under the user's own jit, where it cannot be an error: what was given or said of derivatives is not so."""

    @property
    def ok(self) -> bool:
        """Whether the solution may be used."""
        return self <= Status.APPROXIMATE


def tally(status: Any) -> str:
    """Say how a solve ended, and of a batch which items did not converge: what a report and an error begin with.

    Examples
    --------
    >>> import numpy as np
    >>> tally(np.array([0, 4, 0, 4, 6]))
    '2 of 5 converged; items 1, 3: NOT_POSITIVE_DEFINITE; item 4: SINGULAR'
    """
    if isinstance(status, Status):
        return status.name
    try:
        codes = status.tolist() if hasattr(status, "tolist") else [int(status[i]) for i in range(status.shape[0])]
    except TypeError:  # inside of a compiled program there are no numbers
        return str(status)
    codes = codes if isinstance(codes, list) else [codes]
    parts = [f"{codes.count(Status.CONVERGED)} of {len(codes)} converged"]
    for code in sorted({code for code in codes if code != Status.CONVERGED}):
        numbers = [i for i, found in enumerate(codes) if found == code]
        parts.append(f"{'item' if len(numbers) == 1 else 'items'} {listed(numbers)}: {Status(code).name}")
    return "; ".join(parts)


class Counts(NamedTuple):
    """What a solver tells beside its solution. Arrays hold one entry per item of the batch.

    Attributes
    ----------
    iterations : int or array
        Iterations of the method; 0 for a direct one.
    matvecs : int
        Products with A, counted per block of vectors.
    residual : float or array, optional
        True residual ``‖b − A x‖ / ‖b‖``. Where it is missing, the caller recomputes it.
    operator_norm : float or array, optional
        A lower estimate of ``‖A‖₂`` seen on the way.
    rcond : float or array, optional
        Estimate of the reciprocal condition number (direct methods).
    tolerance : float or array, optional
        The relative residual that the solver called success.
    condition : float or array, optional
        What a relative error of A is multiplied by in the solution, where that is known and not 1/rcond; from below
        for iterative methods.
    method : int or array, optional
        Which of the methods that ``Solver.describe`` lists was used, where it lists several.
    """

    iterations: Any = 0
    matvecs: Any = 0
    residual: Any = None
    operator_norm: Any = None
    rcond: Any = None
    tolerance: Any = None
    condition: Any = None
    method: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class Report(Record):
    """How far to trust a derivative. With ``batched=True`` the fields are arrays over the items.

    Attributes
    ----------
    status : Status or array of int
        Why the solver stopped.
    converged : bool or array of bool
        Whether the true residual is within the tolerance; never True for an approximation.
    solver : str
        The solver that was really used.
    reason : str
        Why this solver was used, and what else happened.
    iterations, matvecs : int or array of int
        Iterations and products with A (one per vector).
    residual : float or array
        True residual ``‖b − A x‖ / ‖b‖`` of the linear system, recomputed at exit; where the equilibrated system, on
        which it is judged, is on the other side of the tolerance, the residual of that one.
    stationarity : float or array
        ``‖F(y, theta)‖``; NaN where the condition gives no way to evaluate F.
    solved : bool, array of bool or None
        Whether y passes as a solution: the Newton step from it is small in every coordinate (or F cannot be evaluated).
        An array under ``jit``, where nothing can be said; there the result is NaN where the step is larger than a
        tenth of y. None where there is no F.
    derivatives : dict of str to str
        For each product (``"A"``, ``"B"``, ``"outer"``): ``"given"``, ``"autodiff"``, ``"complex step"``
        or ``"finite differences"``.
    seconds : float
        Wall-clock time of the linear solve, factorisation included where it was not reused.
    rcond : float, array or None
        Estimate of the reciprocal condition number of the equilibrated matrix, from direct solvers.
    damping : float
        The δ of (A + δI) that was solved with.
    error : ErrorEstimate or None
        How far off the derivative is, estimated; where ``error=True`` or ``max_error`` asked for it.
    polished_y : pytree or None
        The y at which the derivative was taken, where ``polish`` moved it.
    solution : array, optional
        The raveled solution of the linear system, shape (..., n): a warm start ``x0`` for the next.
    """

    status: Any
    converged: Any
    solver: str
    reason: str
    iterations: Any
    matvecs: Any
    residual: Any
    stationarity: Any
    derivatives: dict[str, str]
    seconds: float
    rcond: Any = None
    damping: float = 0.0
    solved: Any = None
    error: ErrorEstimate | None = None
    polished_y: Any = field(default=None, compare=False)
    solution: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"Report({tally(self.status)}, solver={self.solver!r}, residual={brief(self.residual)})"

    def __str__(self) -> str:
        return "\n".join(["Report", *(f"  {name:<13} {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        return html_table((), list(self._rows()), "Report")

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, value in self.__dict__.items():
            if name == "error" and value is not None:
                yield name, f"{value.relative} (relative), {value.cause}; trusted: {value.trusted}"
            elif name not in {"solution", "polished_y"} and value is not None:
                yield name, tally(value) if name == "status" else str(value)


# -- what a failure says, and what happens then (``on_failure``) --------------------------------------------------
MODES = ("raise", "warn", "nan", "ignore")

_NOT_THE_USER = {"implicitdiff", "contextlib", "functools", "torch"}
"""Between the line that asks for a derivative and ours; Torch calls us from within its backward pass."""


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
    kind, says = _TABLE[worst]
    if worst not in _NOT_ZERO and _is_zero(operator):
        kind, head, hint = SingularError, *_ZERO
    else:
        head, cause, following = says(operator, solver)
        hint = f"Likely cause: {cause}\nNext: {following}"
    head = head.format(solver=solver, A=operator.label, **_facts(xp, solution, codes, worst))
    items = f"{tally(codes)}.\n" if operator.items else ""
    return kind(f"{items}{head}\n{hint}")


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
        "iterations": pick(solution.iterations), "products": _products(solution),
        "how": f"residual = {pick(solution.residual)}" if solution.rcond is None
        else f"rcond = {pick(solution.rcond)}, residual = {pick(solution.residual)}",
    }  # fmt: skip


def _products(solution: Any) -> str:
    return getattr(solution, "products", "") or "the product"


def _is_zero(operator: Operator) -> bool:
    """Whether A maps a vector without structure to zero (costs one product, after a failure only)."""
    like, xp = operator.like, operator.backend.xp
    if like is None:  # x may come of a program whose vectors are of another kind or order
        like = xp.zeros((*operator.items, operator.n), dtype=operator.dtype, device=operator.device)
    z = operator.backend.space(like).probe()
    level = SAFETY * operator.offset * max(operator.accuracy, float(xp.finfo(operator.dtype).eps))

    def left(image: Array, z: Array) -> Array:  # I − ∂T is zero to the rounding of 1
        return xp.where(xp.abs(image) <= level * xp.abs(z), xp.zeros_like(image), image)

    image = operator.matvec(z)
    image = image.map(left, z) if hasattr(image, "map") else left(image, z)
    return bool(operator.backend.space(like).is_zero(image))


_NOT_ZERO = {Status.NON_FINITE, Status.NOT_SYMMETRIC, Status.BAD_PRECONDITIONER}
_ZERO = (
    "{A} v = 0 for a probe vector v: F does not depend on y, or its Hessian is zero.",
    "Likely cause: the condition was given the wrong function, or y and theta are swapped.\n"
    "Next: check that F(y, theta) changes with y.",
)
_DIRECT = {"lu", "ldlt", "cholesky"}

# What to say for a status: head, likely cause, what to try next. The advice goes by what is known of A, and never names
# the method that has just failed.
Text = tuple[str, str, str]


def _or(*choices: str) -> str:
    return ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0]


def _others(operator: Operator, solver: str) -> str:
    """Methods that may do better on an A that need not be positive definite."""
    names = ("minres", "lu") if operator.symmetric else ("gmres", "lu")
    return _or(*(f"solver={name!r}" for name in names if name != solver))


def _exhausted(operator: Operator, solver: str) -> Text:
    return (
        "{solver} stopped after {iterations} iterations at a residual of {residual}, above {tolerance}.",
        f"{operator.label} is ill-conditioned, or maxiter is too small.",
        _or("raise maxiter", "give a preconditioner", "add damping", "loosen rtol", "try solver='lu'") + ".",
    )


def _stagnated(operator: Operator, solver: str) -> Text:
    advice = ["add damping"] if solver in _DIRECT else ["add damping", "loosen rtol"]
    if solver != "lu":
        advice.insert(0, "try solver='lu' (it reports the condition number)")
    return (
        "{solver} stagnated after {iterations} iterations: the true residual stays at {residual}, above {tolerance}.",
        "a singular or very ill-conditioned operator, or noisy products (finite differences).",
        _or(*advice) + ".",
    )


def _indefinite(operator: Operator, solver: str) -> Text:
    cause = "y is a saddle point or a maximum, or the Hessian is singular."
    if not operator.symmetric:
        cause = f"{operator.label} is not symmetric, or singular, or y is no minimum."
    return (
        "{solver}: {A} is not positive definite (zero or negative curvature was met).",
        cause,
        _or(_others(operator, solver), "damping in the solver") + ".",
    )


def _asymmetric(operator: Operator, solver: str) -> Text:
    said = (
        "was declared symmetric, and it is not"
        if operator.symmetric
        else f"was declared symmetric, and it is not: {solver} takes it to be"
    )
    return (
        f"{{solver}}: {{A}} {said}.",
        "hvp or hessian has an error, or a Root was given to a method for symmetric matrices.",
        "compare vᵀ(A w) with wᵀ(A v); for a truly asymmetric operator use solver='gmres' or 'lu'.",
    )


def _singular(operator: Operator, solver: str) -> Text:
    advice = ["regularise the problem", "add damping"]
    if operator.symmetric and solver != "minres":
        advice.append("use solver='minres' where the loss ignores the flat directions")
    return (
        "{solver}: {A} is singular, or so to working precision ({how}).",
        "the solution is not unique (a redundant parameter, a flat direction), or F ignores part of y.",
        _or(*advice) + ".",
    )


def _preconditioner(operator: Operator, solver: str) -> Text:
    fault = "is singular" if solver == "gmres" else "is not symmetric positive definite"
    return (
        f"{{solver}}: the preconditioner {fault}, or its products hold NaN or Inf.",
        "a wrong sign, a factorisation that failed, or the product with another matrix.",
        "evaluate M b, compare vᵀ(M w) with wᵀ(M v), or leave the preconditioner out.",
    )


def _non_finite(operator: Operator, solver: str) -> Text:
    return (
        "{products} with {A} holds NaN or Inf, although y, theta and the vector are finite.",
        "a derivative that does not exist at y (a square root or a norm at 0, a log of 0).",
        "evaluate that callback at y, and smooth the function there.",
    )


def _contradicted(operator: Operator, solver: str) -> Text:
    return (
        "{solver}: what was said of {A} is not so: a given product, or the kind of the point.",
        "hvp, jvp, mixed_vjp or another product is not the derivative of its function; or y is no minimum.",
        "run check_derivatives(condition, y, theta), which names the callable.",
    )


_TABLE: dict[Status, tuple[type[SolveError], Callable[[Operator, str], Text]]] = {
    Status.MAX_ITERATIONS: (NotConvergedError, _exhausted),
    Status.STAGNATED: (NotConvergedError, _stagnated),
    Status.NOT_POSITIVE_DEFINITE: (NotPositiveDefiniteError, _indefinite),
    Status.NOT_SYMMETRIC: (NotSymmetricError, _asymmetric),
    Status.SINGULAR: (SingularError, _singular),
    Status.BAD_PRECONDITIONER: (PreconditionerError, _preconditioner),
    Status.NON_FINITE: (NonFiniteProductError, _non_finite),
    Status.CONTRADICTED: (SolveError, _contradicted),
}
"""Of each status that is a failure, the class of the error and what it says."""
