"""The benchmarks run, and every row is right; what they measure is not asserted."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# the benchmarks are not installed: `python -m pytest` in a checkout finds them, `pytest` alone does not
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.measure import Setting, Spread, interleave, peak_bytes, ratio, spread
from benchmarks.problems import Batch, Logistic, Penalties, Quadratic, Ridge, System, relative_error
from benchmarks.report import Result, Row, Skipped, read_json, table, write_json

SHORT = Setting(short=True, rounds=1, seconds=0.0)


LONG = ("import",)
"""Seconds; the command of the session `bench` runs them all, and fails at a wrong row."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n in LONG)) for n in cases.CASES])
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
    assert ("NO: error" in table(Result({}, [row]))) is not correct
    assert Result({}, [make_row(), row]).correct is correct
    assert not Result({}, [make_row()], broken=True).correct


@pytest.mark.parametrize(("bar", "met"), [(1.2, False), (2.0, True), (None, None)])
def test_the_bar_is_held_against_the_median(bar, met):
    assert make_row(bar=bar).met is met


def test_the_command_fails_on_a_wrong_result_and_writes_it_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CASES", {"batch": lambda _: [make_row()], "memory": lambda _: [make_row(error=1.0)]})
    keep_environment(monkeypatch)
    path = tmp_path / "deep" / "rows.json"
    assert command.main(["run", "--short", "--only", "batch"]) == 0
    assert command.main(["run", "--short", "--json", str(path)]) == 1
    assert "NO: error 1.0e+00" in capsys.readouterr().out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["correct"] for row in written["rows"]] == [True, False]
    assert written["rows"][0]["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert set(written["machine"]) == {"cpu", "cores", "threads", "system", "python", "versions", "precision"}
    assert command.main(["run", "--only", "no such"]) == 2
    assert command.main(["run", "--backends", "numpy,no such"]) == 2


def test_a_case_that_needs_what_is_not_installed_is_told(monkeypatch):
    def needs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cases, "CASES", {"loops": lambda _: needs("sklearn.datasets"), "batch": lambda _: [make_row()]})
    result = Result({})
    command._cases(result, "numpy", (), Setting(short=True))
    assert [(row.case, row.reason) for row in result.skipped] == [("loops", "sklearn.datasets is not installed")]
    assert len(result.rows) == 1
    monkeypatch.setattr(cases, "CASES", {"loops": lambda _: needs("implicitdiff.loops")})
    with pytest.raises(ModuleNotFoundError):
        command._cases(result, "numpy", (), Setting(short=True))


def test_what_is_not_measured_is_told_with_the_reason(monkeypatch, capsys):
    keep_environment(monkeypatch)
    monkeypatch.setattr(cases, "CASES", {"batch": lambda _: [Skipped("a", "n = 1", "nobody has it")]})
    assert command.main(["run", "--short", "--only", "batch", "--only", "syncs"]) == 0
    told = capsys.readouterr().out
    assert "skipped: numpy: a, n = 1: nobody has it" in told
    assert "skipped: numpy: syncs: there is no such case" in told
    assert command.main(["run", "--short", "--device", "cuda"]) == 0
    assert "NumPy knows the CPU only" in capsys.readouterr().out
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.measured("torch", [], SHORT).skipped == [Skipped("all", "", "torch is not installed", "torch")]


def test_a_file_is_read_as_it_was_written(tmp_path):
    result = Result({"threads": 1}, [make_row(facts={"iterations": 3})], [], [Skipped("b", "", "why")])
    write_json(tmp_path / "rows.json", SHORT, result)
    assert read_json(tmp_path / "rows.json") == result


@pytest.mark.exhaustive  # so does the session `bench`
@pytest.mark.parametrize(
    "only", [("batch", "syncs"), ("gradient", "jacobian", "batch", "qp", "products", "syncs")], ids=len
)
def test_frameworks_are_measured_each_in_a_process_of_its_own(only, monkeypatch, tmp_path):
    keep_environment(monkeypatch)
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    path = tmp_path / "rows.json"
    chosen = [word for name in only for word in ("--only", name)]
    assert command.main(["run", "--short", "--peers", "--backends", "torch,jax", "--json", str(path), *chosen]) == 0
    result = read_json(path)
    for backend in ("torch", "jax"):
        mine = [row.case for row in result.rows if row.backend == backend]
        skipped = [row for row in result.skipped if row.backend == backend]
        assert all(row.reason for row in skipped)
        if any(row.case.startswith("all") for row in skipped):  # it is not installed
            assert not mine
            continue
        assert {case.split(",")[0].split(" ")[0] for case in mine} == {*only} - {"syncs"}
        assert any(row.case.startswith("host syncs") for row in skipped)
        assert "gradient" not in only or any("solve_cg" in case for case in [*mine, *(row.case for row in skipped)])


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "false")
    options = command._parser().parse_args(["run", "--short"])
    result = command.in_its_own_process("torch", options)
    assert not command.merged([result], 1).correct
    assert "ended with status 1" in table(result)


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


def test_the_truth_of_the_penalties_is_that_of_re_solved_problems():
    p, step = Penalties(3, 4), 1e-6

    def loss(theta):
        A = p.H + np.exp(theta)[:, :, None] * np.eye(4)
        return np.sum(p.cotangent * np.linalg.solve(A, np.tile(p.c, (3, 1))[..., None])[..., 0])

    direction = np.cos(np.arange(12.0)).reshape(3, 4)
    slope = (loss(p.theta + step * direction) - loss(p.theta - step * direction)) / (2 * step)
    assert abs(slope - np.sum(p.truth * direction)) < 1e-7 * abs(slope)


def test_an_allowance_is_taken_off_ours_and_rounds_that_take_long_are_fewer():
    assert ratio({"a": [3.0, 1.0], "b": [1.0, 1.0]}, "a", "b", allowance=2.0) == Spread(0.5, 0.0, 1.0)
    setting = Setting(rounds=9, seconds=1e-3)
    assert len(interleave({"slow": lambda: time.sleep(0.01)}, setting)["slow"]) == 3


def test_the_batch_is_done_item_by_item():
    p = Batch(3, 4)
    each = [C.T @ np.linalg.solve(H, v) for H, C, v in zip(p.H, p.C, p.cotangent, strict=True)]
    assert relative_error(p.by_numpy(), np.stack(each)) < 1e-13
