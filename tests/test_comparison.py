"""`compare_solvers`: a row for each solver that says what happened, on every framework."""

import csv
import json
import warnings

import numpy as np
import pytest
from frameworks import EACH, framework

import implicitdiff as idf
from implicitdiff import solvers
from implicitdiff.solvers import get_solver, suitable

RNG = np.random.default_rng(3)
N = 12
M = RNG.normal(size=(N, N))
H = M @ M.T / N + np.eye(N)
SADDLE = np.diag(np.where(np.arange(N) < 4, -1.0, 1.0) * np.linspace(1.0, 3.0, N))


def quadratic(A, **more):
    return idf.Stationary(
        grad=lambda y, t: A @ y - t, hvp=lambda y, t, v: A @ v, mixed_vjp=lambda y, t, u: -u, **more
    )  # fmt: skip


def compare(A, **options):
    theta = np.arange(1.0, N + 1)
    return idf.compare_solvers(quadratic(A), np.ones(N), np.linalg.solve(A, theta), theta, **options)


def test_every_solver_is_a_row_with_its_error():
    found = compare(H)
    truth = np.linalg.solve(H, np.ones(N))
    assert [row.solver for row in found] == ["auto", *suitable("positive definite")]
    for row, gradient in zip(found, found.gradients, strict=True):
        assert row.status == "CONVERGED"
        assert row.converged
        assert row.residual <= 1e-10
        assert row.error <= 1e-8
        assert np.linalg.norm(gradient - truth) <= 1e-8 * np.linalg.norm(truth)
        assert row.seconds > 0
        assert row.first > 0
        assert row.memory > 0
        assert row.message == ""
    assert sum(row.error == 0 for row in found) >= 1  # the reference
    assert found.fastest.seconds == min(row.seconds for row in found)


@pytest.mark.parametrize("damped", [idf.CG(damping=10.0), idf.LU(damping=10.0)], ids=["cg", "lu"])
def test_a_damped_solver_is_no_reference(damped):
    found = compare(H, solvers=(damped, idf.CG(rtol=1e-6)))
    assert found[0].residual < found[1].residual  # of its own system
    assert found[0].error > 0.1
    assert found[1].error == 0
    assert np.isnan(compare(H, solvers=(damped,))[0].error)


def test_products_are_those_that_were_made():
    made = []

    def hvp(y, t, v):
        made.append(1)
        return H @ v

    given = {"hvp": hvp, "mixed_vjp": lambda y, t, u: -u}
    condition = idf.Stationary(grad=lambda y, t: H @ y - t, verify=False, **given)
    theta = np.ones(N)
    y = np.linalg.solve(H, theta)
    for solver in ("cg", "minres", "gmres", "bicgstab", "lu", "cholesky"):
        _, report = idf.implicit_vjp(condition, y, theta, np.ones(N), solver=solver, return_report=True)
        counted, made[:] = len(made), []
        assert report.matvecs == counted, solver
        row = idf.compare_solvers(condition, np.ones(N), y, theta, solvers=(solver,), repeats=1, memory=False)[0]
        made.clear()
        assert row.products == counted


def test_a_solver_that_fails_is_a_row_not_an_error():
    found = compare(SADDLE, solvers=("cholesky", "cg", "lu", "minres", idf.CG(maxiter=2)))
    rows = {row.solver: row for row in found}
    assert rows["cholesky"].status == rows["cg"].status == "NOT_POSITIVE_DEFINITE"
    assert "not positive definite" in rows["cholesky"].message
    assert not rows["cg"].converged
    assert rows["lu"].converged
    assert rows["minres"].error <= 1e-8
    assert "CG(maxiter=2)" in rows
    assert found.fastest.solver in {"lu", "minres"}


def test_approximations_are_rows_with_their_true_and_their_estimated_error(tmp_path, monkeypatch):
    """Each registered one, at a few numbers of products where it has the choice; the picture holds a line for each."""
    monkeypatch.delitem(solvers._FACTORIES, "richardson", raising=False)  # of the page on writing a solver
    A = H / 4  # where a phantom gradient converges
    found = compare(A, solvers=("cholesky",), approximations=True, memory=False, repeats=1)
    names = {name for name in idf.solver_names() if getattr(get_solver(name), "approximate", False)}
    assert {row.used for row in found} == {"cholesky", *names}
    rows = {row.solver: row for row in found}
    assert {"Neumann(terms=5)", "Neumann(terms=10)", "Truncated(steps=5)", "OneStep()", "Nystrom(rank=12)"} <= set(rows)
    truth = np.linalg.solve(A, np.ones(N))
    for row, gradient in zip(found[1:], found.gradients[1:], strict=True):
        assert row.status == "APPROXIMATE"
        assert not row.converged
        error = np.linalg.norm(gradient - truth) / np.linalg.norm(truth)
        assert row.error == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert 0.5 <= row.estimate / row.error <= 2 or row.error < 1e-6
    assert rows["Truncated(steps=10)"].error < rows["Truncated(steps=5)"].error < rows["Neumann(terms=5)"].error
    assert found.fastest.solver == "cholesky"
    pytest.importorskip("matplotlib")
    figure = found.plot()
    figure.savefig(tmp_path / "errors.png")
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert {"cholesky", *names} <= set(labels)
    with pytest.raises(idf.InputError, match="no row has an error"):
        compare(SADDLE, solvers=("cg",), error=False).plot()


def test_without_a_reference_errors_are_unknown():
    found = compare(SADDLE, solvers=("cg", "cholesky"))
    assert all(np.isnan(row.error) for row in found)
    assert found.fastest is None


def test_it_prints_and_is_saved(tmp_path):
    found = compare(SADDLE, solvers=("lu", "cholesky"))
    text = str(found)
    assert "backend numpy, n 12, m 12" in text
    assert "NOT_POSITIVE_DEFINITE" in text
    assert "reference" in text
    assert len({line.index("status") for line in text.splitlines() if "status" in line}) == 1
    page = found._repr_html_()
    assert page.count("<tr>") == 3
    assert "<th>solver</th>" in page
    found.save(tmp_path / "rows.json")
    found.save(tmp_path / "rows.csv")
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [row["solver"] for row in kept["rows"]] == ["lu", "cholesky"]
    assert kept["facts"]["n"] == N
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["CONVERGED", "NOT_POSITIVE_DEFINITE"]
    assert found.to_dicts()[0]["solver"] == "lu"
    with pytest.raises(idf.InputError, match="csv"):
        found.save(tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"solvers": ("lu", "qr")}, idf.UnknownNameError, "'qr'"),
        ({"solvers": "lu"}, idf.InputError, "solvers"),
        ({"solvers": ()}, idf.InputError, "solvers"),
        ({"repeats": 0}, idf.InputError, "repeats"),
    ],
)
def test_bad_input_is_named(options, error, match):
    with pytest.raises(error, match=match):
        compare(H, **options)


def test_what_no_solver_can_help_is_an_error():
    with pytest.raises(idf.NonFiniteError, match="theta"):
        idf.compare_solvers(quadratic(H), np.ones(N), np.ones(N), np.full(N, np.nan))


def test_a_warning_about_the_point_comes_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        idf.compare_solvers(quadratic(H), np.ones(N), np.ones(N), np.zeros(N), solvers=("lu", "cg"))
    assert [w.category for w in seen] == [idf.NotASolutionWarning]


def test_a_batch_is_summed_up():
    A = np.stack([H, 2 * H])
    condition = idf.Stationary(
        grad=lambda y, t: (A @ y[..., None])[..., 0] - t, hessian=lambda y, t: A, mixed_vjp=lambda y, t, u: -u
    )
    theta = np.ones((2, N))
    y = np.linalg.solve(A, theta[..., None])[..., 0]
    found = idf.compare_solvers(condition, np.ones((2, N)), y, theta, solvers=("lu", "cg"), batched=True)
    assert found.facts["items"] == 2
    assert all(row.converged and row.error <= 1e-8 for row in found)


@pytest.mark.slow(on=("jax",))
@EACH
def test_on_the_frameworks(name):
    fw = framework(name)
    A, theta = fw.xp.asarray(H), fw.xp.asarray(np.ones(N))
    y = fw.xp.asarray(np.linalg.solve(H, np.ones(N)))
    found = idf.compare_solvers(lambda y, t: y @ (A @ y) / 2 - t @ y, lambda y, t: (y**2).sum(), y, theta,
                                solvers=("lu", "cg"), repeats=1)  # fmt: skip
    truth = 2 * np.linalg.solve(H, np.linalg.solve(H, np.ones(N)))
    for row, gradient in zip(found, found.gradients, strict=True):
        assert row.converged
        assert np.allclose(fw.numpy(gradient), truth, rtol=1e-8)
    assert found.facts["backend"] == name


@pytest.mark.slow(on=("jax",))
@EACH
def test_auto_goes_from_cg_to_minres_on_the_frameworks(name):
    fw, n = framework(name), 600
    d = np.where(np.arange(n) % 2, 1.0, -1.0) * np.linspace(1.0, 3.0, n)
    diagonal = fw.xp.asarray(d)
    x, report = idf.linear_solve(lambda v: diagonal * v, fw.xp.asarray(np.ones(n)), symmetric=True, return_report=True)
    assert report.solver == "minres"
    assert np.allclose(fw.numpy(x), 1 / d, atol=1e-8)
