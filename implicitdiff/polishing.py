"""Polishing: Newton steps from a solution that was stopped early, before its derivative is taken.

The error of a derivative is of first order in that of y, and a Newton step squares that one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from implicitdiff.arrays import any_true, divisor
from implicitdiff.conditions import as_condition
from implicitdiff.error_estimate import ErrorControl, approximation
from implicitdiff.errors import AccuracyWarning, DerivativeError, InaccurateError, InputError, SolveError
from implicitdiff.mode import Mode
from implicitdiff.outcome import warn
from implicitdiff.solvers import get_solver
from implicitdiff.tolerances import CONTRACTING, MOST_POLISH, TELLING

__all__ = ["no_numbers", "once_only", "polished", "refused_twice", "uncertified"]


def no_numbers() -> InputError:
    """Build the error for a search under jit."""
    return InputError("polish='auto' looks at numbers, which jit hides.\nNext: give a number of steps, polish=1.")


def uncertified(what: str, options: str = "error, max_error or polish") -> DerivativeError:
    """Build the error for a derivative that is asked for where estimates and polished points do not go."""
    return DerivativeError(
        f"{what} is asked for, together with {options}.\n"
        "Likely cause: what they do is of first order: a y that was polished, and an estimate, have no derivative.\n"
        "Next: take it without them, at a y that is solved for."
    )


def once_only(problem: Any, solver: Any, condition: Any) -> Any:
    """Return the problem; where values are traced and a second derivative is wrong, its point has no derivative."""
    error = refused_twice(solver, condition)
    if error is None or problem.backend.mode is not Mode.INLINE:
        return problem
    y, theta = problem.backend.underivable((problem.y, problem.theta), lambda: error)
    return replace(problem, y=y, theta=theta)


def refused_twice(solver: Any, condition: Any) -> DerivativeError | None:
    """Build the error for a second derivative through an approximation, or of −A⁺B; None where there is no reason."""
    if condition.singular == "minimum-norm" and not condition.follows:
        return DerivativeError(
            "a second derivative is asked for, with singular='minimum-norm'.\n"
            "Likely cause: −A⁺B is a choice, not the derivative of a solution, and has no derivative of that rule.\n"
            "Next: first derivatives; or singular='gauge' for a loss that does not see the flat directions."
        )
    if not getattr(solver, "approximate", False):
        return None
    return DerivativeError(
        f"a second derivative is asked for, through solver={getattr(solver, 'name', type(solver).__name__)!r}.\n"
        "Likely cause: the rule for it holds for solutions of the system, and nobody knows how far it is off here.\n"
        "Next: an exact solver, 'cg' at a minimum, 'gmres' or 'lu'."
    )


def polished(
    lin: Any, mode: str, direction: Any, x0: Any, control: ErrorControl
) -> tuple[Any, tuple[Any, SolveError | None]]:
    """Take a derivative at a y that Newton's method has improved.

    Parameters
    ----------
    lin : Linearization
        At y.
    mode, direction, x0
        The product.
    control : ErrorControl
        How many steps, or up to which error.

    Returns
    -------
    tuple
        The linearisation there, and what its product came to: the value, and the error if there is one.
    """
    at_last, another = control._replace(polish=0), _another_matrix(lin)
    if control.polish == "auto":
        lin, found = _until_met(lin, mode, direction, x0, at_last)
    else:
        for _ in range(int(control.polish)):
            lin = lin.moved(lin.newton())
        found = lin.attempt(mode, direction, x0, at_last._replace(error=at_last.error or bool(another)))
    if another and lin.mode is not Mode.INLINE and found[1] is None:
        _tell_what_stays(lin, another)
    return lin, found


def _another_matrix(lin: Any) -> str:
    """Name the matrix other than A that a derivative is solved with, however good y is."""
    p = lin._problem
    return approximation(as_condition(p.condition), getattr(get_solver(p.settings.solver), "damping", 0.0))


def _tell_what_stays(lin: Any, another: str) -> None:
    """Warn where a derivative at a y that was polished is off for the matrix it is solved with."""
    xp, estimate = lin._problem.backend.xp, lin.estimate
    share = estimate.approximation / divisor(xp, estimate.absolute) * estimate.relative
    if any_true(xp, share > TELLING):
        warn(
            f"polish made y better, and the derivative is off by about {float(xp.max(share)):.2g} of its size for "
            f"{another}: no Newton step takes that away.\n"
            "Next: solve with A itself; or subtract report.error.correction (error=True).",
            AccuracyWarning,
        )


def _until_met(lin: Any, mode: str, direction: Any, x0: Any, control: ErrorControl) -> Any:
    """Polish until the error is what it may be, or Newton's method stops contracting."""
    xp, limit = lin._problem.backend.xp, control.max_error
    control = control._replace(error=True)
    for step in range(MOST_POLISH + 1):
        lin.by_newton = True  # of a y that is on its way nothing is told but at the end
        found = lin.attempt(mode, direction, x0, control)
        estimate = lin.estimate
        if lin.mode is Mode.INLINE:
            raise no_numbers()
        if found[1] is not None and not isinstance(found[1], InaccurateError):
            break
        open_ = xp.ones_like(estimate.trusted) if limit is None else ~(estimate.relative <= limit)
        moving = open_ & (estimate.contraction <= CONTRACTING) & estimate.usable & (estimate.inner > 0)
        if step == MOST_POLISH or not any_true(xp, moving):
            break
        lin = lin.moved(estimate.y)
    if found[1] is None and any_true(xp, ~estimate.trusted):
        warn(
            "polish='auto' stopped where Newton's method does not contract, and the derivative is not known to be "
            f"right: {lin.report.error.doubt}.",
            AccuracyWarning,
        )
    return lin, found
