"""The command line: what info tells, and the demo from its arguments to its numbers, its plot and its failures."""

from __future__ import annotations

import dataclasses
import platform
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import SOLVERS

import implicitdiff
from implicitdiff import CG, Stationary, registry, solver_names, solvers
from implicitdiff.tools import demo
from implicitdiff.tools.command_line import main

WINE = ["demo", "--data", "wine", "--steps", "3", "--quiet"]


def number(text: str, label: str) -> float:
    """First number on the line of that label."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    found = re.search(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", line.removeprefix(label))
    assert found, f"no number in {line!r}"
    return float(found[0])


@pytest.fixture(scope="module")
def wine() -> demo.Outcome:
    return demo.run("wine", "cholesky", steps=4, quiet=True)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the demo starts to work although its arguments are wrong."""

    def run(*args: object) -> None:
        raise AssertionError("the demo ran")

    monkeypatch.setattr(demo, "run", run)


# -- info ----------------------------------------------------------------------------------------------
def test_info_tells_versions_devices_and_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"implicitdiff  {implicitdiff.__version__}" in out
    assert platform.python_version() in out
    assert re.search(rf"^numpy +{re.escape(version('numpy'))} +cpu$", out, re.MULTILINE)
    assert re.search(rf"^array-api-strict +{re.escape(version('array-api-strict'))} +CPU_DEVICE, ", out, re.MULTILINE)
    assert re.search(rf"^autograd +{re.escape(version('autograd'))} ", out, re.MULTILINE)
    assert re.search(rf"^solvers +{', '.join(solver_names())}$", out, re.MULTILINE)


def test_info_lists_a_registered_solver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setitem(solvers._FACTORIES, "mine", CG)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(", mine")


@pytest.fixture
def broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a torch 9.9.9 that cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('no driver\\nand more')\n")
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("torch", "array_api_compat.torch"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("broken_torch")
@pytest.mark.parametrize(
    ("backends", "told"),
    [
        ({}, "no backend in this version of implicitdiff"),
        ({"torch": "implicitdiff.backends.torch:TorchBackend"}, "not usable: RuntimeError: no driver"),
    ],
    ids=["no-backend", "with-backend"],
)
def test_info_imports_only_what_a_backend_serves(
    backends: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "BACKENDS", {"numpy": registry.BACKENDS["numpy"], **backends})
    assert main(["info"]) == 0
    assert re.search(rf"^torch +9\.9\.9 +{told}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"), [(["info"], 0), (["demo", "--solver", "qr"], 2), (["--version"], 0), ([], 2)]
)
def test_as_a_module(arguments: list[str], status: int) -> None:
    found = subprocess.run([sys.executable, "-m", "implicitdiff", *arguments], capture_output=True, text=True)
    assert found.returncode == status, found.stderr
    assert "Traceback" not in found.stderr


# -- the demo: numbers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", SOLVERS)
def test_demo_with_each_solver(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WINE, "--solver", solver]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert number(out, "gradient check  relative error") < 1e-5
    assert number(out, "outer loop") >= 3
    used = "cholesky" if solver == "auto" else solver
    assert f"adjoint solver  {used} (" in out
    assert number(out, "saved") > 0


def test_each_solver_finds_the_same_penalties(wine: demo.Outcome) -> None:
    found = demo.run("wine", "minres", steps=4, quiet=True)
    np.testing.assert_allclose(found.tuned.theta, wine.tuned.theta, rtol=0, atol=0.4)  # gradients within 10 %
    np.testing.assert_allclose(found.history, wine.history, rtol=0.05)
    np.testing.assert_allclose(found.history[:, 0], wine.history[:, 0], rtol=0.01)


def test_the_loop_spares_work(wine: demo.Outcome) -> None:
    state, rounds = wine.loop.state, len(wine.loop.history)
    assert state.inner_gradients + state.products < rounds * sum(wine.alone)
    assert all(row.error <= 0.1 for row in wine.loop.history)


def test_table_shows_the_losses_of_the_models(wine: demo.Outcome) -> None:
    out = demo.table(wine)
    validation, test = (wine.history[[0, -1], i] for i in (0, 1))
    assert f"{validation[0]:.4f}{validation[1]:>18.4f}" in out
    assert f"{test[0]:.4f}{test[1]:>18.4f}" in out
    assert validation[1] < validation[0]
    rows = [line for line in out.splitlines() if line.startswith(("validation loss", "test "))]
    assert len({line.index(".", 30) for line in rows[:2]}) == 1  # aligned


def test_validation_loss_falls_at_every_step(wine: demo.Outcome) -> None:
    assert len(wine.history) == 5
    assert (np.diff(wine.history[:, 0]) < 0).all()
    assert demo.loss(wine.shared.W, *wine.data.validation) == pytest.approx(wine.history[0, 0], rel=1e-12)


def test_shared_penalty_is_the_best_one() -> None:
    """The hypergradient search ends where a scan of the re-solved problem has its minimum."""
    data = demo.load("breast_cancer", seed=0)
    theta = demo.shared_penalty(data, "auto", lambda values, **options: values)
    assert np.ptp(theta) == 0
    scan, W, values = np.linspace(*demo.BOUNDS, 200), np.zeros((31, 2)), []
    for value in scan:
        W = demo.fit(W, np.full(30, value), data.train, tol=1e-8)
        values.append(demo.loss(W, *data.validation))
    best = demo.loss(demo.fit(W, theta, data.train), *data.validation)
    assert best <= min(values) + 1e-9
    assert abs(theta[0] - scan[np.argmin(values)]) <= scan[1] - scan[0]


def test_fit_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    data = demo.load("wine", seed=1)
    X, Y = data.train
    penalty = 0.05
    W = demo.fit(np.zeros((14, 3)), np.full(13, np.log(penalty)), data.train)
    oracle = LogisticRegression(C=1 / (penalty * len(X)), tol=1e-10, max_iter=10_000).fit(X[:, :-1], Y.argmax(axis=1))
    np.testing.assert_allclose(
        demo.softmax(data.test.X @ W), oracle.predict_proba(data.test.X[:, :-1]), rtol=0, atol=1e-6
    )


def test_gradient_check_sees_a_wrong_gradient(wine: demo.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = dataclasses.asdict(demo.CONDITION)
    wrong = {**parts, "mixed_vjp": lambda W, theta, U, X, Y: 1.01 * demo.mixed_vjp(W, theta, U, X, Y)}
    monkeypatch.setattr(demo, "CONDITION", Stationary(**wrong))
    error = demo.check_gradient(wine.data, "cholesky", *wine.tuned, lambda values, **options: values)
    assert error == pytest.approx(0.01, rel=1e-3)


def test_split_is_disjoint_complete_and_standardised_on_the_training_set() -> None:
    from sklearn.datasets import load_digits

    data = demo.load("digits", seed=0)
    parts = (data.train, data.validation, data.test)
    images = np.concatenate([part.X[:, :-1] for part in parts])
    scale = np.unique(load_digits().data, axis=0)
    assert len(images) == 1797
    assert len(np.unique(images.round(9), axis=0)) == len(scale)
    np.testing.assert_allclose(data.train.X[:, :-1].mean(axis=0), 0, atol=1e-12)
    assert set(data.train.X[:, :-1].std(axis=0).round(9)) <= {0.0, 1.0}
    assert abs(data.test.X[:, :-1].mean(axis=0)).max() > 1e-3
    for part in parts:
        assert part.Y.mean(axis=0) == pytest.approx(0.1, abs=0.01)


def test_verdict_follows_the_test_loss_and_its_noise(wine: demo.Outcome) -> None:
    rng = np.random.default_rng(0)
    W = np.array([[2.0, -2.0], [0.0, 0.0]])
    X = np.column_stack([rng.standard_normal(500), np.ones(500)])
    right = demo.Split(X, np.eye(2)[(X[:, 0] < 0).astype(int)])
    data = dataclasses.replace(wine.data, test=right)
    good, bad = demo.Model(wine.tuned.theta, W), demo.Model(wine.tuned.theta, 0.2 * W)
    better = dataclasses.replace(wine, data=data, shared=bad, tuned=good)
    assert re.match(r"The test loss fell by 0\.\d+, \d+\.\d standard errors: penalties", demo.verdict(better))
    worse = dataclasses.replace(wine, data=data, shared=good, tuned=bad)
    assert re.match(r"The test loss rose by .* fitted to the validation set's noise", demo.verdict(worse))
    coin = demo.Split(np.concatenate([X, X]), np.concatenate([right.Y, 1 - right.Y]))  # every x with both labels
    other = demo.Model(wine.tuned.theta, W[:, ::-1])
    even = dataclasses.replace(wine, data=dataclasses.replace(data, test=coin), shared=good, tuned=other)
    assert "too little to tell from chance" in demo.verdict(even)
    assert (
        demo.verdict(dataclasses.replace(wine, data=data, shared=good, tuned=good)) == "The test loss did not change."
    )


# -- the demo: output ----------------------------------------------------------------------------------
def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument for argument in WINE if argument != "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert all(f"{bar}:" in err and f"{bar}:" not in out for bar in ("shared penalty", "outer steps", "gradient check"))
    assert out.startswith("wine: 13 features, 3 classes; ")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"wine.{suffix}"
    assert main([*WINE, "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    if suffix == "svg":
        assert path.read_text().startswith("<?xml")
        return
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


@pytest.mark.slow
def test_digits_by_default_with_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.png"
    assert main(["demo", "--steps", "2", "--quiet", "--plot", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("digits: 64 features, 10 classes; ")
    assert "adjoint solver  cg (" in out
    assert number(out, "gradient check  relative error") < 1e-5
    assert min(matplotlib.image.imread(path).shape[:2]) > 600


# -- the demo: failures --------------------------------------------------------------------------------
@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--solver", "qr"], "--solver qr: not known; expected one of auto, lu, ldlt, cholesky, cg, minres, gmres"),
        (["--plot", "figure.xyz"], "figure.xyz: unknown kind of file; .*png"),
        (["--plot", "no/such/folder/figure.png"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_argument_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(told, err)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "many"], ["--seed", "-1"], ["--data", "iris"]])
def test_argument_that_argparse_rejects(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (["sklearn"], r"needs scikit-learn: python -m pip install scikit-learn$"),
        (["tqdm"], r"needs tqdm: python -m pip install tqdm, or --quiet$"),
        (["matplotlib"], r"needs matplotlib: python -m pip install matplotlib$"),
        (["sklearn", "tqdm"], r"needs scikit-learn and tqdm: python -m pip install scikit-learn tqdm$"),
    ],
    ids=" ".join,
)
def test_missing_extra_says_what_to_install(
    modules: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--plot", "figure.png"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(told, err.rstrip())


def test_what_is_not_used_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matplotlib without a plot, no tqdm without a progress bar."""
    for module in ("matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(WINE) == 0
    assert main([argument for argument in WINE if argument != "--quiet"]) == 1


def test_solver_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(solvers._FACTORIES, "weak", lambda: CG(maxiter=2))
    with warnings.catch_warnings():  # of the loop, that its gradients missed their tolerance
        warnings.simplefilter("ignore")
        assert main([*WINE, "--solver", "weak"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"2 iterations", err)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", run)
    assert main(WINE) == 130
    assert capsys.readouterr().err == "implicitdiff: interrupted\n"
