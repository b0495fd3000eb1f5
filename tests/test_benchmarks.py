"""The benchmarks run, and every row is right; what they measure is not asserted."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

# the benchmarks are not installed: `python -m pytest` in a checkout finds them, `pytest` alone does not
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.measure import Setting, Spread, peak_bytes, ratio, spread
from benchmarks.problems import Batch, Logistic, Quadratic, Ridge, System, relative_error
from benchmarks.report import Row, table

SHORT = Setting(short=True, rounds=1, seconds=0.0)


@pytest.mark.parametrize("name", cases.CASES)
def test_every_row_of_the_short_setting_is_right(name):
    rows = cases.CASES[name](SHORT)
    assert rows
    for row in rows:
        assert row.correct, f"{row.case}, {row.size}: error {row.error}, allowed {row.allowed}"
        assert row.ours > 0
        assert row.reference > 0
        assert row.ratio.low <= row.ratio.median <= row.ratio.high


def make_row(**changes):
    given = {"case": "a", "size": "n = 1", "ours": 2.0, "reference": 1.0, "ratio": Spread(2.0, 1.5, 2.5), "bar": 1.2,
             "error": 0.0, "allowed": 1e-6}  # fmt: skip
    return Row(**{**given, **changes})


@pytest.mark.parametrize(("error", "correct"), [(0.0, True), (1e-6, True), (1e-5, False), (math.nan, False)])
def test_a_wrong_result_is_called_wrong(error, correct):
    row = make_row(error=error)
    assert row.correct is correct
    assert ("NO: error" in table([row])) is not correct


@pytest.mark.parametrize(("bar", "met"), [(1.2, False), (2.0, True), (None, None)])
def test_the_bar_is_held_against_the_median(bar, met):
    assert make_row(bar=bar).met is met


def test_the_command_fails_on_a_wrong_result_and_writes_it_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CASES", {"right": lambda _: [make_row()], "wrong": lambda _: [make_row(error=1.0)]})
    keep_environment(monkeypatch)
    path = tmp_path / "deep" / "rows.json"
    assert command.main(["run", "--short", "--only", "right"]) == 0
    assert command.main(["run", "--short", "--json", str(path)]) == 1
    assert "NO: error 1.0e+00" in capsys.readouterr().out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["correct"] for row in written["rows"]] == [True, False]
    assert written["rows"][0]["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert set(written["machine"]) == {"cpu", "cores", "threads", "system", "python", "versions", "precision"}
    assert command.main(["run", "--only", "no such"]) == 2


def keep_environment(monkeypatch):
    for name in command.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")  # restored afterwards


def test_ratios_are_formed_within_rounds():
    times = {"ours": [1.0, 4.0, 9.0], "reference": [1.0, 2.0, 3.0]}
    assert ratio(times, "ours", "reference") == Spread(2.0, 1.0, 3.0)
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_the_peak_counts_what_is_held_at_once():
    def two_then_one():
        a, b = bytearray(1 << 20), bytearray(1 << 20)
        del a, b
        return bytearray(1 << 20)

    assert 2 << 20 <= peak_bytes(two_then_one) < (2 << 20) + 50_000


def test_the_logistic_problem_is_solved_and_its_truth_is_that_of_re_solved_problems():
    p, step = Logistic(12), 1e-4
    assert np.linalg.norm(p.grad(p.W, p.theta, *p.args)) < 1e-9
    direction = np.cos(np.arange(12.0))
    ends = []
    for sign in (1, -1):
        moved = Logistic(12)
        moved.theta = p.theta + sign * step * direction
        ends.append(moved._fit())
    slope = np.sum(p.cotangent * (ends[0] - ends[1])) / (2 * step)
    assert abs(slope - p.truth @ direction) < 1e-6 * abs(slope)


@pytest.mark.parametrize("problem", [Quadratic, System, Ridge])
def test_the_truth_of_the_dense_problems_is_that_of_re_solved_problems(problem):
    p, step, columns = problem(6), 1e-6, []

    def solve(theta):
        if problem is Ridge:
            return np.linalg.solve(p.matrix(p.y, theta, *p.args), p.b)
        return np.linalg.solve(p.A, p.C @ theta)

    assert np.allclose(solve(p.theta), p.y, rtol=1e-12)
    for e in np.eye(6):
        h = step * np.abs(p.theta).max()
        columns.append((solve(p.theta + h * e) - solve(p.theta - h * e)) / (2 * h))
    assert relative_error(np.stack(columns, axis=1), p.truth) < 1e-8


def test_the_batch_is_done_item_by_item():
    p = Batch(3, 4)
    each = [C.T @ np.linalg.solve(H, v) for H, C, v in zip(p.H, p.C, p.cotangent, strict=True)]
    assert relative_error(p.by_numpy(), np.stack(each)) < 1e-13
