"""What a bilevel loop costs, and how accurate its gradients are: ``python -m benchmarks.loops``.

60 steps of Adam on each of the problems of `benchmarks.sequences`, by tolerances that are guessed and by sweeps. Cost
is inner gradients and products; the true error of every gradient is measured against the re-solved inner problem.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.sequences import PROBLEMS, SequenceProblem
from implicitdiff import Bilevel, Fixed, Sweep

__all__ = ["TOLERANCES", "measured", "table"]

TOLERANCES: tuple[Any, ...] = (Fixed(1e-8), Fixed(1e-4), Fixed(1e-3), Sweep(0.1), Sweep(0.1, target=0.01))


def measured(problem: SequenceProblem, tolerance: Any, steps: int = 60) -> dict[str, float]:
    """Cost of a loop; largest and median true error of its gradients, and median of the estimated over the true one."""
    outer = problem.outer, lambda y, theta: (problem.slope(y), None)
    loop = Bilevel(problem.condition, outer, args=problem.args, tolerance=tolerance)
    state, y, errors, ratios = loop.init(problem.y, problem.theta), problem.y, [], []
    for _ in range(steps):
        theta = state.theta
        state = loop.step(state)
        y = problem.inner(y, theta, 1e-11)
        exact = problem.gradient(y, theta)
        errors.append(float(np.linalg.norm(state.gradient - exact) / np.linalg.norm(exact)))
        ratios.append(float(state.error) / errors[-1])
    return {
        "inner gradients": int(state.inner_gradients), "products": int(state.products), "largest error": max(errors),
        "median error": float(np.median(errors)), "estimated / true": float(np.median(ratios)),
    }  # fmt: skip


def table(names: list[str]) -> None:
    """Print one line for each problem and tolerance."""
    for name in names:
        problem = PROBLEMS[name]()
        for tolerance in TOLERANCES:
            row = measured(problem, tolerance)
            print(f"{name:<14} {tolerance!s:<20}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))


if __name__ == "__main__":
    table(sys.argv[1:] or list(PROBLEMS))
