"""What a few products are worth: errors of hypergradients by approximations, on penalties of classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import implicitdiff as idf
from benchmarks.sequences import PROBLEMS
from implicitdiff import Status
from implicitdiff.solvers import get_solver

NAMES = tuple(name for name in idf.solver_names() if getattr(get_solver(name), "approximate", False))


EXPECTED: dict[str, dict[tuple[str, int], float]] = {
    "breast cancer": {},
    "digits": {("truncated", 10): 0.19, ("truncated", 20): 0.012, ("neumann", 10): 0.86, ("neumann", 20): 0.75,
               ("one_step", 1): 0.98, ("nystrom", 10): 0.74},
    "pixels": {("truncated", 10): 0.093, ("truncated", 20): 0.0011, ("neumann", 10): 0.87, ("neumann", 20): 0.76,
               ("one_step", 1): 0.99},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("problem", list(EXPECTED))
def test_errors_of_hypergradients(problem: str) -> None:
    """What a few products are worth, and that the estimate is right, on penalties of classifiers (docs/solvers.md)."""
    pytest.importorskip("sklearn")
    p = PROBLEMS[problem]()
    y = p.inner(p.y, p.theta)
    truth = p.gradient(y, p.theta)
    errors: dict[tuple[str, int], float] = {}
    for name in NAMES:
        for solver in type(get_solver(name)).at_costs((10, 20), p.n):
            options: dict[str, Any] = {"args": p.args, "solver": solver, "error": True, "return_report": True}
            g, report = idf.implicit_vjp(p.condition, y, p.theta, p.slope(y), **options)
            off = np.linalg.norm(g - truth)
            errors[name, getattr(solver, solver.cost) if solver.cost else 1] = off / np.linalg.norm(truth)
            assert report.status == Status.APPROXIMATE
            assert 0.5 <= report.error.absolute / off <= 2 or off <= 1e-10 * np.linalg.norm(truth)
    assert errors["truncated", 20] < 0.05 * errors["neumann", 20]
    assert errors["truncated", 10] < 0.4 * errors["neumann", 10]
    for key, value in EXPECTED[problem].items():
        assert errors[key] == pytest.approx(value, rel=0.1), key
