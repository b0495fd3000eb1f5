"""The outcome of a solve, from the solver to the user: its status, the report, the error and what it says."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import listed
from implicitdiff.errors import SolveError, SolveWarning
from implicitdiff.records import Record, brief, html_table

if TYPE_CHECKING:
    from implicitdiff.error_estimate import ErrorEstimate

__all__ = ["MODES", "Counts", "Report", "Status", "settle", "tally", "warn"]


class Status(IntEnum):
    """Why a solver stopped. Ordered: in a set of solves the largest is the worst."""

    CONVERGED = 0
    APPROXIMATE = 1
    """An approximation by design (a truncated series, a diagonal): never called converged."""
    LEAST_SQUARES = 2
    """The system has no solution, and x is that of least squares, which is what was asked for; where it was not, it is
    SINGULAR."""
    MAX_ITERATIONS = 3
    STAGNATED = 4
    """The true residual no longer falls, and is above the tolerance."""
    NOT_POSITIVE_DEFINITE = 5
    NOT_SYMMETRIC = 6
    SINGULAR = 7
    BAD_PRECONDITIONER = 8
    """It holds NaN or Inf, is singular, or not symmetric positive definite where the method needs that."""
    NON_FINITE = 9
    CONTRADICTED = 10
    """Under the user's own jit, where it cannot be an error: what was given or said of derivatives is not so."""
    DIVERGED = 11
    """The residual of a series grows: its step is too large, or A is not of the kind that it is for."""

    @property
    def ok(self) -> bool:
        """Whether the solution may be used."""
        return self <= Status.LEAST_SQUARES


def tally(status: Any) -> str:
    """Say how a solve ended, and of a batch which items did not converge: what a report and an error begin with.

    Examples
    --------
    >>> import numpy as np
    >>> tally(np.array([0, 5, 0, 5, 7]))
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
    rank : int or array, optional
        Rank of A, where it was decided.
    leak : float or array, optional
        Part of the right-hand side that no A x reaches, relative to ‖b‖: of Aᵀ u = v the part of v in the null space
        of A.
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
    rank: Any = None
    leak: Any = None
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
        which it is judged, is on the other side of the tolerance, the residual of that one. Of many right-hand sides
        that a direct method solves together (the columns of a Jacobian), a bound of each, in the equilibrated system.
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
    rank, nullity : int, array or None
        Rank of A, and dimension of its null space, where a method decided on them (`Pinv`).
    leak : float, array or None
        Part of the right-hand side that no A x (of a gradient, no Aᵀ u) reaches, relative to its norm: for a gradient,
        what the loss sees of the null space of A. Where an iterative method told, a bound from above.
    error : ErrorEstimate or None
        How far off the derivative is, estimated; where ``error=True`` or ``max_error`` asked for it.
    recycled : int, array of int or None
        Pairs of earlier solves that served this one, where it is one of a sequence; 0 where there were none, or they
        had to be dropped.
    dropped : bool, array of bool or None
        Whether they had to be, since A has changed too much for them to be of use.
    drift : float, array or None
        By how much A differed from those pairs, relatively, on the first direction of the solve.
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
    rank: Any = None
    nullity: Any = None
    leak: Any = None
    error: ErrorEstimate | None = None
    recycled: Any = None
    dropped: Any = None
    drift: Any = None
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
