"""The zoo is what it says: its truths are those of the problems solved anew; the runner and the estimate in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from zoo import NAMES, problem
from zoo.measure import MODES, Dense, Measured, call, raveled, share, survey
from zoo.stopped import directions, perturbed, stopped

QUICK = {"slowest 0.01", "random 0.001"}


@pytest.mark.parametrize("name", NAMES)
def test_truth(name):
    p = problem(name)
    assert p.name == name
    h, d = 1e-5, p.tangent / np.linalg.norm(p.tangent)
    moved = [p.solve(p.t + s * h * d, p.x)[: p.n] for s in (1, -1)]
    assert np.linalg.norm((moved[0] - moved[1]) / (2 * h) - p.jacobian @ d) <= 1e-7 * np.linalg.norm(p.jacobian @ d)
    losses = [p.outer(y, p.pack(p.t + s * h * d), *p.args) for y, s in zip(moved, (1, -1))]
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(
        p.gradient @ d, abs=1e-7 * np.linalg.norm(p.gradient) * np.linalg.norm(d)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_library_agrees_at_the_solution(name):
    p, library = problem(name), pytest.importorskip("implicitdiff")
    for mode in MODES:
        value, report = call(library, p, p.y, mode, solver="lu")
        assert bool(report.solved)
        assert np.linalg.norm(raveled(p, value, mode) - p.truth(mode)) <= 1e-9 * np.linalg.norm(p.truth(mode))


def test_there_are_solutions_of_each_kind():
    p = problem("kepler")
    offs = [np.linalg.norm(y - p.y) / np.linalg.norm(p.y) for how, y in perturbed(p) if how.startswith("slowest")]
    assert offs == pytest.approx([0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6])
    A, d = p.matrices(p.x)[0], directions(p)
    assert np.linalg.norm(A @ d["slowest"]) == pytest.approx(np.linalg.svd(A)[1][-1])
    assert len(list(stopped(p))) >= 4


def test_the_dense_estimate_is_right():
    """The recommended form, with nothing of the library in it, where y is right to 1 %."""
    rows = []
    for name in NAMES:
        solutions = ((how, y) for how, y in perturbed(problem(name)) if how in QUICK)
        rows += survey(Dense(problem(name)), problem(name), solutions)
    rows = [row for row in rows if row.trusted]
    assert len(rows) >= 150
    assert share(rows, 3) == 1, [str(row) for row in rows if row.missed]
    assert share(rows, 2) >= 0.98


def test_what_counts():
    right, none = Measured("a", "b", "jvp", 0.1, 1e-3, 2e-3, floor=1e-14), Measured("a", "b", "jvp", 0, floor=1e-14)
    missed = Measured("a", "b", "jvp", 0.1, 1e-3, 0.0, floor=1e-14)
    assert right.effectivity == 2
    assert not right.missed
    assert missed.missed
    assert share([right, missed], 3) == 0.5
    exact = Measured("a", "b", "jvp", 0.1, 1e-16, 0.0, floor=1e-14)
    assert not exact.counts
    assert not exact.missed
    assert "1.0e-03" in str(right)
    assert none.counts is not exact.counts
