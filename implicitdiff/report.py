"""How a solve ended: the status codes, the counts of a solver and the report of a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from implicitdiff.arrays import listed
from implicitdiff.records import Record, brief, html_table

__all__ = ["Counts", "Report", "Status", "tally"]


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
    solution: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"Report({tally(self.status)}, solver={self.solver!r}, residual={brief(self.residual)})"

    def __str__(self) -> str:
        return "\n".join(["Report", *(f"  {name:<13} {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        return html_table((), list(self._rows()), "Report")

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, value in self.__dict__.items():
            if name != "solution" and value is not None:
                yield name, tally(value) if name == "status" else str(value)
