"""SciPy's optimizers over a whole outer problem: values and gradients to the tolerance, each from the one before."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from implicitdiff.errors import AccuracyWarning
from implicitdiff.outcome import Status, warn
from implicitdiff.outer.bounds import bounds_of
from implicitdiff.outer.history import HistoryRow
from implicitdiff.outer.loop import Steps
from implicitdiff.outer.state import BilevelState
from implicitdiff.tolerances import CONSISTENT

__all__ = ["CAUSES", "Found", "minimize_whole"]

CAUSES = (
    "Likely cause: y is far from a solution, or infeasible, A is singular, or the tolerance is below rounding.\n"
    "Next: start y0 nearer to a solution, look at history.table(), or bound theta to where there is a solution."
)
"""Of a gradient that missed its tolerance."""


@dataclass
class Found:
    """How SciPy's method ended, and a row for each evaluation."""

    rows: list[HistoryRow] = field(default_factory=list)
    status: Status = Status.CONVERGED
    message: str = ""


class _Objective:
    """L(θ) and its gradient on vectors of NumPy; the state of the loop is carried along."""

    def __init__(self, steps: Steps, y0: Any, theta0: Any, found: Found) -> None:
        self.steps, self.state, self.found = steps, steps.init(y0, theta0), found
        self.theta = steps.equations(steps.problem(y0, self.state.theta)).theta

    def moved(self, x: Any) -> BilevelState:
        """Return the state with another θ."""
        xp = self.theta.backend.xp
        vector = xp.asarray(x.tolist(), dtype=self.theta.dtype, device=self.theta.device)
        return self.state._replace(theta=self.theta.unravel(vector))

    def numbers(self, vector: Any) -> Any:
        """Return a vector as one of NumPy."""
        return np.array([float(vector[i]) for i in range(self.theta.n)])

    def __call__(self, x: Any) -> tuple[float, Any]:
        began, before = time.perf_counter(), self.moved(x)
        self.state = self.steps.step(before)
        self.found.rows.append(self.steps.row(before, self.state, began))
        gradient = self.theta.like(self.state.gradient, "gradient", dtype=self.theta.dtype)
        return float(self.state.value), self.numbers(gradient)


def minimize_whole(steps: Steps, loop: Any, y0: Any, theta0: Any) -> tuple[Any, BilevelState, Found]:
    """Run SciPy's method of the name that the loop's optimizer has.

    Parameters
    ----------
    steps : Steps
    loop : Bilevel
        Its steps, bounds, constraints and callback.
    y0, theta0 : pytree

    Returns
    -------
    tuple
        y at the end, the state there, and what happened.
    """
    import scipy.optimize

    found = Found()
    objective = _Objective(steps, y0, theta0, found)
    start = objective.numbers(objective.theta.vector)
    pair = bounds_of(loop.bounds, objective.theta)
    bounds = None if pair is None else scipy.optimize.Bounds(*map(objective.numbers, pair))

    def seen(x: Any) -> None:
        if loop.callback is not None and loop.callback(objective.moved(x)) is True:
            raise StopIteration

    options: dict[str, Any] = {}
    limits: dict[str, Any] = {"maxiter": loop.steps}
    if loop.optimizer == "SLSQP":
        value, slope = objective(start)
        scale = abs(value) or float(slope @ slope)  # its ftol is in units of L; a first step is one gradient long
        options["constraints"], limits["ftol"] = loop.constraints, CONSISTENT**1.5 * scale
    end = scipy.optimize.minimize(
        objective, start, jac=True, method=loop.optimizer, bounds=bounds, callback=seen,
        options=limits, **options,
    )  # fmt: skip
    state = steps.step(objective.moved(end.x))._replace(theta=objective.moved(end.x).theta)
    found.message = str(end.message)
    found.status = Status.CONVERGED if end.success else Status.MAX_ITERATIONS
    if not bool(state.met):
        found.status, found.message = Status.STAGNATED, "the gradient at the end missed its tolerance"
        warn(f"{found.message}.\n{CAUSES}", AccuracyWarning)
    return state.y, state, found
