"""The sweep of the benchmarks: every family is right at a small size, its files can be plotted and compared."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# the benchmarks are not installed: `python -m pytest` in a checkout finds them, `pytest` alone does not
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as command
from benchmarks.families import FAMILIES
from benchmarks.measure import Setting, Spread
from benchmarks.programs import Programs, by_hand
from benchmarks.report import Result, Skipped, read_json, table, write_json
from benchmarks.sample import Sample
from benchmarks.scipy_peer import by_scipy
from benchmarks.sweep import Sweep, Where, problem_names, sweep
from implicitdiff.pytree import flatten, map_leaves

SHORT = Setting(short=True, rounds=1, seconds=0.0)


def make_sample(**changes):
    given = {
        "backend": "numpy", "device": "cpu", "library": "implicitdiff", "problem": "ridge", "axis": "n", "size": 10,
        "solver": "cg", "used": "cg", "status": "CONVERGED", "reason": "", "seconds": Spread(2.0, 1.5, 2.5),
        "first": 3.0, "products": 7, "iterations": 5, "residual": 1e-11, "error": 1e-10, "memory": 2**20, "floor": 1.0,
    }  # fmt: skip
    return Sample(**{**given, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(  # the command of the session `bench` runs them all
    "name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n not in ("layer", "qp"))) for n in problem_names()]
)
def test_every_solver_of_every_family_is_right_on_numpy(name):
    rows = sweep("numpy", Sweep((name,)), replace(SHORT, peers=True))
    samples = [row for row in rows if isinstance(row, Sample)]
    problem = FAMILIES[name].make(samples[0].size, np.random.default_rng(0))
    assert {s.solver for s in samples if s.library == "implicitdiff"} == set(problem.solvers)
    for s in samples:
        assert s.correct, s
        assert s.seconds.median > 0
        if s.library == "implicitdiff":
            assert s.status == "CONVERGED", s
            assert s.error <= 1e-6
            assert s.memory > 0
        else:
            assert s.error <= 1e-5


@pytest.mark.parametrize("name", problem_names())
def test_the_reference_is_the_slope_of_the_solution(name):
    """Moving θ moves the solution along dy/dθ: the condition stays zero to second order."""
    found = FAMILIES[name]
    size = 4 if found.axis == "items" else 30 if name != "grid" else 36
    p = found.make(size, np.random.default_rng(1))
    if name == "logistic":
        pytest.skip("tested with the problem it is made of")
    import implicitdiff as idf

    rng = np.random.default_rng(2)
    t = map_leaves(lambda x: rng.normal(size=x.shape), p.theta)
    w = idf.implicit_jvp(p.condition(False), p.y, p.theta, t, args=p.args, solver="auto", batched=p.batched)
    # ⟨v, dy⟩ = ⟨gradient, t⟩, with dy from forward mode and its own test below
    left = float(np.sum(p.cotangent * w))
    right = sum(float(np.sum(a * b)) for a, b in zip(flatten(p.truth).leaves, flatten(t).leaves, strict=True))
    assert abs(left - right) <= 1e-6 * max(abs(left), 1e-3)


def test_problems_come_from_the_seed():
    one, same, other = (FAMILIES["ridge"].make(20, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one.theta, same.theta)
    assert not np.array_equal(one.theta, other.theta)


@pytest.mark.slow
def test_what_is_not_there_is_listed_with_the_reason():
    rows = sweep("numpy", Sweep(("ridge",), ("cg", "auto"), (8, 3000), ("cpu", "cuda")), SHORT)
    told = {row.reason for row in rows if isinstance(row, Skipped)}
    assert told == {"NumPy knows the CPU only"}
    big = sweep("numpy", Sweep(("distillation",), ("lu", "cg")), SHORT)
    assert [row.reason for row in big if isinstance(row, Skipped)] == ["the method is not for this problem"]
    assert Where.unavailable("cupy", "cpu") in {"cupy is not installed", "CuPy knows GPUs only"}
    assert Where.unavailable("no_such_framework", "cpu") == "no_such_framework is not installed"


def test_programs_are_solved_and_differentiated_by_hand():
    p = Programs(2, 5, 1, 4, seed=3)
    Q, q, A, b, G, h = (p.theta[name] for name in ("Q", "q", "A", "b", "G", "h"))
    for i in range(2):
        stationary = Q[i] @ p.y[i] + q[i] + A[i].T @ p.lam[i] + G[i].T @ p.mu[i]
        assert np.linalg.norm(stationary) < 1e-12
        assert np.linalg.norm(A[i] @ p.y[i] - b[i]) < 1e-12
        assert np.all(G[i] @ p.y[i] - h[i] <= 1e-12)

        def solution(right, i=i):
            active = p.mu[i] > 0
            J = np.concatenate([A[i], G[i][active]])
            K = np.block([[Q[i], J.T], [J, np.zeros((len(J), len(J)))]])
            return np.linalg.solve(K, np.concatenate([-q[i], b[i], right[active]]))[:5]

        step = 1e-6 * np.eye(4)
        slope = [(solution(h[i] + e) - solution(h[i] - e)) @ p.cotangent[i] / 2e-6 for e in step]
        one = by_hand({k: x[i] for k, x in p.theta.items()}, p.y[i], p.lam[i], p.mu[i], p.cotangent[i])
        assert np.allclose(one["h"], slope, atol=1e-7)


def test_scipy_does_the_same():
    p = FAMILIES["layer"].make(40, np.random.default_rng(0))
    value, info, products = by_scipy(p, "gmres")()
    assert info == 0
    assert products > 3
    assert np.linalg.norm(value - p.truth) <= 1e-8 * np.linalg.norm(p.truth)


# -- files, tables, plots --------------------------------------------------------------------------------
def test_a_wrong_sample_is_called_wrong_and_ends_the_command_with_1():
    wrong = make_sample(error=1e-2)
    assert not wrong.correct
    assert make_sample(error=1e-2, status="MAX_ITERATIONS").correct  # it says so itself
    assert "WRONG" in table(Result({}, samples=[wrong]))
    assert not Result({}, samples=[wrong]).correct


def test_files_keep_everything(tmp_path):
    result = Result({"threads": 1}, samples=[make_sample(), make_sample(library="scipy", memory=None, floor=None)])
    write_json(tmp_path / "rows.json", SHORT, result)
    assert read_json(tmp_path / "rows.json") == result


@pytest.mark.slow
def test_the_command_sweeps_plots_and_compares(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in command.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    path = tmp_path / "rows.json"
    arguments = ["run", "--short", "--only", "none", "--problems", "ridge,saddle", "--solvers", "minres,ldlt"]
    assert command.main([*arguments, "--json", str(path)]) == 0
    assert "ridge" in capsys.readouterr().out
    assert {(s.problem, s.solver) for s in read_json(path).samples} == {
        ("ridge", "minres"), ("ridge", "ldlt"), ("saddle", "minres"), ("saddle", "ldlt")
    }  # fmt: skip
    assert command.main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    drawn = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert drawn == {"time.png", "solvers.png", "error.png", "floor.png"}
    assert all((tmp_path / "plots" / name).stat().st_size > 10_000 for name in drawn)
    assert command.main(["compare", str(path), str(path), "--fail-above", "1.5"]) == 0
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--problems", "nonsense"], "no problem nonsense"), (["--devices", "tpu"], "no device tpu"),
        (["--solvers", "qr"], "no solver qr"), (["--sizes", "ten"], "positive integers"),
    ],
)  # fmt: skip
def test_wrong_names_are_told(monkeypatch, capsys, arguments, told):
    for name in command.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    assert command.main(["run", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_slower_runs_are_told(tmp_path, capsys):
    slow = make_sample(seconds=Spread(4.0, 3.5, 4.5))
    for name, sample in (("old", make_sample()), ("new", slow)):
        write_json(tmp_path / f"{name}.json", SHORT, Result({"cpu": name}, samples=[sample, make_sample(size=20)]))
    assert command.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--fail-above", "1.5"]) == 1
    told = capsys.readouterr().out
    assert "2.00" in told
    assert "slower" in told
    assert "other machines" in told


def test_the_crossover_lies_where_the_lines_meet():
    plots = pytest.importorskip("benchmarks.plots")
    cpu = [make_sample(size=n, seconds=Spread(n / 1e3, 0, 1)) for n in (10, 100, 1000)]
    gpu = [make_sample(size=n, device="cuda", seconds=Spread(0.1, 0, 1)) for n in (10, 100, 1000)]
    assert abs(plots.crossover(cpu, gpu) - 100) < 1e-9
    assert plots.crossover(cpu, cpu[:1]) is None


@pytest.mark.exhaustive  # so does the session `bench`
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("problem", ["ridge", "layer", "qp"])
def test_the_families_are_right_on_the_frameworks(problem, backend):
    if Where.unavailable(backend, "cpu"):
        pytest.skip(f"{backend} is not installed")
    rows = sweep(backend, Sweep((problem,), ("auto", "gmres")), replace(SHORT, peers=True))
    samples = [row for row in rows if isinstance(row, Sample)]
    assert len(samples) >= 2
    assert [s.problem for s in samples if s.library == "assembly"] == ["ridge"] * (problem == "ridge")
    assert all(s.correct and s.status == "CONVERGED" for s in samples)
