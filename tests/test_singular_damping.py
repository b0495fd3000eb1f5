"""damping="auto": the least δ for which A + δI is positive definite, found and reported."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES, TORCH, Library, relative_error
from frameworks import EACH, framework
from problems import Counted, vector, with_eigenvalues

import implicitdiff as idf
from implicitdiff import CG, LU, MINRES, InputError, Stationary, linear_solve
from implicitdiff.solvers import get_solver

EXACT = [name for name in idf.solver_names() if not getattr(get_solver(name), "approximate", False)]
LIBS = pytest.mark.parametrize("lib", [*LIBRARIES[:2], *TORCH], ids=lambda lib: lib.name)
SPECTRA = {
    "positive": np.linspace(0.1, 5, 30),
    "indefinite": np.linspace(-0.7, 5, 30),
    "negative": -np.linspace(1, 2, 30),
}
SPECTRA["singular"] = np.append(np.linspace(1, 2, 29), 0.0)


def auto(name: str) -> Any:
    return replace(get_solver(name), damping="auto")


def test_every_solver_takes_it() -> None:
    assert all("damping" in {f.name for f in fields(get_solver(name))} for name in EXACT)
    with pytest.raises(InputError, match="'auto'"):
        CG(damping="automatic")  # type: ignore[arg-type]


@LIBS
@pytest.mark.parametrize("form", ["matrix", "product"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", EXACT)
def test_the_least_damping(lib: Library, name: str, spectrum: str, form: str) -> None:
    """A + δI is positive definite, A + 0.98 δI is not; a positive definite A is left alone."""
    values = SPECTRA[spectrum]
    a, b = with_eigenvalues(values), vector()
    M = lib.array(a)
    A = M if form == "matrix" else (lambda v: M @ v)
    x, report = linear_solve(A, lib.array(b), solver=auto(name), symmetric=True, return_report=True)
    found, least = float(report.damping), -min(values)
    if spectrum == "positive":
        assert found == 0
    elif spectrum == "singular":
        assert 0 < found <= 1e-7
    else:
        assert least < found <= 1.02 * least
    assert report.converged
    truth = np.linalg.solve(a + found * np.eye(30), b)
    assert relative_error(lib, x, truth) <= (1e-7 if spectrum != "singular" else 1e-3)


@LIBS
@pytest.mark.parametrize("name", ["auto", "lu", "cg", "minres"])
def test_each_item_of_a_batch_has_its_own(lib: Library, name: str) -> None:
    a = np.stack([with_eigenvalues(SPECTRA[key]) for key in ("positive", "indefinite", "negative")])
    b = np.ones((3, 30))
    x, report = linear_solve(lib.array(a), lib.array(b), solver=auto(name), batched=True, return_report=True)
    found = lib.numpy(report.damping)
    np.testing.assert_allclose(found, [0.0, 0.707, 2.02], rtol=1e-3)
    truth = np.stack([np.linalg.solve(item + d * np.eye(30), row) for item, d, row in zip(a, found, b, strict=True)])
    assert relative_error(lib, x, truth) <= 1e-7


def test_large_systems_by_the_lanczos_process() -> None:
    """Sixty products more, all of them counted; δ is a bound from above, and close."""
    values = np.concatenate([[-1.3, -0.2], np.linspace(0.5, 30, 598)])
    product = Counted(np.diag(values))
    x, report = linear_solve(product, b := vector(600), solver=CG(damping="auto"), symmetric=True, return_report=True)
    assert 1.3 < report.damping <= 1.02 * 1.3
    assert report.matvecs == product.calls <= report.iterations + 70
    np.testing.assert_allclose(x, b / (values + report.damping), rtol=1e-6)


def test_a_saddle_gets_a_minimum_beside_it() -> None:
    """Through a condition: the report has δ, forward and reverse are of one A + δI."""
    a = with_eigenvalues(SPECTRA["indefinite"])
    condition = Stationary(
        hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -u, mixed_jvp=lambda y, t, d: -d, kind="saddle"
    )
    y, v = np.ones(30), vector(seed=3)
    for solver in (LU(damping="auto"), CG(damping="auto"), MINRES(damping="auto")):
        lin = idf.linearize(condition, y, a @ y, solver=solver)
        found = lin.vjp(v)
        truth = np.linalg.solve(a + lin.report.damping * np.eye(30), v)
        np.testing.assert_allclose(found, truth, rtol=1e-6)
        np.testing.assert_allclose(lin.jvp(v), truth, rtol=1e-6)


@EACH
def test_in_a_compiled_program(name: str) -> None:
    f = framework(name)
    a, b = with_eigenvalues(SPECTRA["indefinite"]), vector()
    A, right = f.xp.asarray(a), f.xp.asarray(b)
    solve = f.compiled(lambda A, b: linear_solve(A, b, solver=CG(damping="auto"), return_report=True))
    x, report = solve(A, right)
    found = float(report.damping)
    assert 0.7 < found <= 0.715
    np.testing.assert_allclose(f.numpy(x), np.linalg.solve(a + found * np.eye(30), b), rtol=1e-7)


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize("jit", [False, True])
def test_constraints_in_a_batch(name: str, jit: bool) -> None:
    """Each item has a δ of its own, on H alone: min ½ yᵀHy − tᵀy on aᵀy = 0 with an indefinite H."""
    f = framework(name)
    H = np.stack([with_eigenvalues(SPECTRA[key])[:6, :6] for key in ("positive", "indefinite", "negative")])
    a, v, t = np.ones(6), vector()[:6], np.zeros((3, 6))
    matrices = f.xp.asarray(H)
    lagrangian = idf.QP(A=f.xp.asarray(a[None]), b=f.xp.asarray(np.zeros(1)))
    data = {"Q": matrices, "q": f.xp.asarray(t)}

    def pulled(data: Any) -> Any:
        return idf.implicit_vjp(lagrangian, 0 * data["q"], data, f.xp.asarray(np.stack([v] * 3)), batched=True,
                                solver=LU(damping="auto"), return_report=True)  # fmt: skip

    found, report = (f.compiled(pulled) if jit else pulled)(data)
    least = np.maximum(0.0, -np.linalg.eigvalsh(H)[:, 0])
    delta = f.numpy(report.damping)
    np.testing.assert_allclose(delta, least, rtol=0.02, atol=1e-12)
    for i in range(3):
        whole = np.block([[H[i] + delta[i] * np.eye(6), a[:, None]], [a[None], 0.0]])
        np.testing.assert_allclose(f.numpy(found["q"])[i], -np.linalg.solve(whole, np.append(v, 0.0))[:6], atol=1e-8)
