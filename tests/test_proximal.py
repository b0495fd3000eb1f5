"""Projected and proximal fixed points against closed forms and finite differences of the re-solved problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, Library
from frameworks import framework
from helpers_proximal import (
    CASE,
    CASES,
    EVERY,
    LINEAR,
    STEP,
    B,
    M,
    N,
    Q,
    V,
    X,
    arguments,
    condition,
    off,
    truth,
    xp_of,
)

from implicitdiff import (
    CG,
    LU,
    ProjectedGradient,
    ProximalGradient,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
    projections,
    proxes,
)
from implicitdiff.backends.numpy import NumpyBackend


# -- against the re-solved problem -------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@EVERY
@CASE
@pytest.mark.parametrize("restrict", [None, False])
def test_against_the_resolved_problem(lib: Library, case: str, restrict: bool | None) -> None:
    """Forward and reverse, in q and in the number of the set or the penalty."""
    if lib in JAX and restrict is False:
        pytest.skip("compiled, None means the same")
    _, by_q, by_t = truth(case)
    y, theta, data = arguments(lib, case)
    lin = linearize(condition(case, restrict=restrict), y, theta, **data)
    g, w = lin.vjp(lib.array(V)), lin.jvp({"q": lib.array(V), "t": lib.array(1.0)})
    assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-6
    assert abs(float(g["t"]) - by_t @ V) <= 1e-6 * np.linalg.norm(by_t)
    assert off(lib.numpy(w), by_q @ V + by_t) <= 1e-6


@pytest.mark.slow(on=("array_api_strict",))
@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
@CASE
@pytest.mark.parametrize("method", ["gmres", "lu"])
def test_methods_for_general_systems(lib: Library, case: str, method: str) -> None:
    _, by_q, _ = truth(case)
    y, theta, data = arguments(lib, case)
    for step in (STEP, 1.0):
        whole = condition(case, restrict=False, step=step)
        g, report = implicit_vjp(whole, y, theta, lib.array(V), solver=method, return_report=True, **data)
        assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-6
        assert report.solver == method


@pytest.mark.slow(on=("jax", "array_api_strict"))
@EVERY
@pytest.mark.parametrize("case", [name for name in CASES if name != "ball"])
@pytest.mark.parametrize("method", ["cg", "cholesky", "minres", "auto"])
def test_methods_on_the_support(lib: Library, case: str, method: str) -> None:
    """There the system is symmetric and positive definite."""
    if lib in JAX and case not in ("lasso", "simplex", "group lasso"):
        pytest.skip("each takes seconds to compile, and would see the same code")
    _, by_q, by_t = truth(case)
    y, theta, data = arguments(lib, case)
    g, report = implicit_vjp(
        condition(case, restrict=True), y, theta, lib.array(V), solver=method, return_report=True, **data
    )
    assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-6
    w = implicit_jvp(
        condition(case, restrict=True), y, theta, {"q": lib.array(V), "t": lib.array(1.0)}, solver=method, **data
    )
    assert off(lib.numpy(w), by_q @ V + by_t) <= 1e-6
    assert "on the support" in report.reason
    if method != "auto":
        assert report.solver == method


@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
@CASE
def test_support_is_found_where_it_helps(lib: Library, case: str) -> None:
    """The order of the system is that of the support, where D is diagonal or a projector."""
    free = CASES[case][3]
    y, theta, data = arguments(lib, case)
    _, report = implicit_vjp(condition(case), y, theta, lib.array(V), return_report=True, **data)
    if free is None:
        assert report.solver == "lu"
        assert "on the support" not in report.reason
    else:
        order = int(np.sum(free(truth(case)[0])))
        assert report.solver == "cholesky"
        assert f"on the support, {order} of {N}" in report.reason if order < N else "on the support;" in report.reason


# -- closed forms ------------------------------------------------------------------------------------
@pytest.mark.slow(on=("array_api_strict",))
@EVERY
def test_lasso_closed_form(lib: Library) -> None:
    """On the support S, dy/db = (X_SᵀX_S)⁻¹ X_Sᵀ and dy/dλ = −(X_SᵀX_S)⁻¹ sign(y_S); 0 elsewhere."""

    def loss(y: Any, theta: Any, X: Any) -> Any:
        return 0.5 * xp_of(y).sum((X @ y - theta["b"]) ** 2)

    lasso = ProximalGradient(loss, lambda x, theta, step: proxes.lasso(x, theta["t"], step), step=STEP)
    y = truth("lasso")[0]
    on = y != 0
    assert 0 < on.sum() < N
    by_b, by_t = np.zeros((N, M)), np.zeros(N)
    by_b[on] = np.linalg.solve(X[:, on].T @ X[:, on], X[:, on].T)
    by_t[on] = -np.linalg.solve(X[:, on].T @ X[:, on], np.sign(y[on]))
    theta = {"b": lib.array(B), "t": lib.array(1.0)}
    J = implicit_jacobian(lasso, lib.array(y), theta, args=(lib.array(X),))
    exact = lib.name in ("torch", "jax")
    assert off(lib.numpy(J["b"]), by_b) <= (1e-13 if exact else 1e-6)
    assert off(lib.numpy(J["t"]), by_t) <= (1e-13 if exact else 1e-6)


@pytest.mark.slow(on=("array_api_strict",))
@EVERY
def test_ridge_closed_form(lib: Library) -> None:
    """y = (Q + λI)⁻¹ q, so dy/dq = (Q + λI)⁻¹ and dy/dλ = −(Q + λI)⁻¹ y."""
    inverse = np.linalg.inv(Q + np.eye(N))
    y = inverse @ LINEAR
    _, theta, data = arguments(lib, "ridge")
    J = implicit_jacobian(condition("ridge"), lib.array(y), theta, **data)
    exact = lib.name in ("torch", "jax")
    assert off(lib.numpy(J["q"]), inverse) <= (1e-12 if exact else 1e-6)
    assert off(lib.numpy(J["t"]), -inverse @ y) <= (1e-12 if exact else 1e-6)


@pytest.mark.slow(on=("jax",))
@EVERY
def test_nothing_selected(lib: Library) -> None:
    """Beyond the largest penalty y = 0, and its derivative is 0: no doubt is cast on F."""
    _, theta, data = arguments(lib, "lasso")
    theta["t"] = lib.array(2 * float(np.abs(LINEAR).max()))
    g, report = implicit_vjp(
        condition("lasso"), lib.array(np.zeros(N)), theta, lib.array(V), return_report=True, **data
    )
    assert not lib.numpy(g["q"]).any()
    assert float(g["t"]) == 0
    assert report.converged


def test_support_follows_the_map_and_not_rounding() -> None:
    """A y that is 1e-9 where it should be 0 has the same derivative (a support read off y would have N entries)."""
    y, by_q, _ = truth("lasso")
    theta, data = arguments(NUMPY, "lasso")[1:]
    for noise in (1e-9, -1e-9):
        J = implicit_jacobian(condition("lasso"), y + noise, theta, **data)
        assert off(J["q"], by_q) <= 1e-6


# -- what is given -----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["dense", "sparse", "products"])
def test_given_derivatives(form: str) -> None:
    """Nothing of f is derived; a matrix is cut down to the support."""
    H = scipy.sparse.csc_array(Q) if form == "sparse" else Q
    given: dict[str, Any] = (
        {"hessian": lambda y, theta: H} if form != "products" else {"hvp": lambda y, theta, v: H @ v}
    )
    lasso = ProximalGradient(
        None, proxes_lasso, grad=lambda y, theta: Q @ y - theta["q"], step=STEP,
        mixed_vjp=lambda y, theta, u: {"q": -u, "t": np.array(0.0)}, **given,
    )  # fmt: skip
    y, by_q, by_t = truth("lasso")
    theta = arguments(NUMPY, "lasso")[1]
    lin = linearize(lasso, y, theta, solver="auto")
    g = lin.vjp(V)
    assert off(g["q"], by_q.T @ V) <= 1e-6
    assert abs(g["t"] - by_t @ V) <= 1e-6
    assert lin.report.solver == "cholesky"
    assert {"dense": "the matrix is given", "sparse": "the matrix is sparse", "products": "assembled"}[
        form
    ] in lin.report.reason


def proxes_lasso(x: Any, theta: Any, step: float) -> Any:
    return proxes.lasso(x, theta["t"], step)


def test_large_problem_costs_products_of_the_support() -> None:
    """5 000 unknowns, of which few are free: CG meets the condition of the support alone, in as many iterations."""
    n, k = 5000, 20
    diagonal = np.linspace(1, 3, n)
    q = np.where(np.arange(n) < k, 5.0, 0.1)
    y = np.where(np.arange(n) < k, (q - 1) / diagonal, 0.0)
    lasso = ProximalGradient(
        grad=lambda y, theta: diagonal * y - theta, prox=lambda x, theta, step: proxes.lasso(x, 1.0, step),
        hvp=lambda y, theta, v: diagonal * v, mixed_vjp=lambda y, theta, u: -u,
        mixed_jvp=lambda y, theta, t: -t, step=0.3,
    )  # fmt: skip
    g, report = implicit_vjp(lasso, y, q, np.ones(n), solver="cg", return_report=True)
    np.testing.assert_allclose(g, np.where(np.arange(n) < k, 1 / diagonal, 0.0), atol=1e-9)
    assert f"on the support, {k} of {n}" in report.reason
    assert report.iterations <= k


@CASE
def test_damping_on_the_support(case: str) -> None:
    """(A + δI) is what is solved with, restricted or not."""
    y, theta, data = arguments(NUMPY, case)
    v = {"q": V, "t": np.array(1.0)}
    for derivative, vector in ((implicit_vjp, V), (implicit_jvp, v)):
        whole = derivative(condition(case, restrict=False), y, theta, vector, solver=LU(damping=0.3), **data)
        part = derivative(condition(case), y, theta, vector, solver=LU(damping=0.3), **data)
        whole, part = ((x["q"], x["t"]) if isinstance(x, dict) else (x,) for x in (whole, part))
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_warm_start() -> None:
    """The adjoint of one call starts the next: nothing is left to do."""
    y, theta, data = arguments(NUMPY, "lasso")
    lin = linearize(condition("lasso"), y, theta, solver=CG(rtol=1e-8), **data)
    lin.vjp(V)
    lin.vjp(V, x0=lin.report.solution)
    assert lin.report.iterations == 0


@pytest.mark.parametrize("mode", ["torch", pytest.param("jax", marks=pytest.mark.exhaustive), "finite_differences"])
def test_modes_of_numpy(mode: str) -> None:
    """A framework lends its autodiff to both maps; or both are differenced, and the report says so."""
    if mode != "finite_differences":
        framework(mode)
    y, by_q, _ = truth("simplex")
    theta, data = arguments(NUMPY, "simplex")[1:]
    J, report = implicit_jacobian(
        condition("simplex"), y, theta, backend=NumpyBackend(mode), return_report=True, **data
    )
    assert off(J["q"], by_q) <= 1e-6
    assert report.derivatives["A"] == ("finite differences" if mode == "finite_differences" else "autodiff")


def test_autograd() -> None:
    """HIPS autograd derives both maps exactly."""
    anp = pytest.importorskip("autograd.numpy")
    y, by_q, _ = truth("simplex")
    theta = arguments(NUMPY, "simplex")[1]

    def f(y: Any, theta: Any) -> Any:
        return 0.5 * anp.sum(y * anp.dot(Q, y)) - anp.sum(theta["q"] * y)

    onto = ProjectedGradient(f, lambda x, theta: projections.simplex(x, total=theta["t"]), step=STEP)
    J, report = implicit_jacobian(onto, y, theta, return_report=True)
    assert off(J["q"], by_q) <= 1e-8
    assert report.derivatives == {"A": "autodiff", "B": "autodiff"}
