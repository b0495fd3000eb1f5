"""Projected and proximal fixed points against closed forms and finite differences of the re-solved problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import array_api_compat
import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, TORCH, Library
from frameworks import EACH, framework

from implicitdiff import (
    CG,
    DerivativeError,
    InputError,
    NotASolutionWarning,
    NotSymmetricError,
    ProjectedGradient,
    ProximalGradient,
    RegularityWarning,
    SolveError,
    implicit_function,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
    projections,
    proxes,
)
from implicitdiff.backends.numpy import NumpyBackend

EVERY = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
RNG = np.random.default_rng(0)
N, M = 8, 12
X, B = RNG.normal(size=(M, N)), RNG.normal(size=M)
Q = X.T @ X
LIPSCHITZ = float(np.linalg.norm(Q, 2))
STEP = 1 / LIPSCHITZ
LINEAR = X.T @ B
GROUPS = (0, 0, 1, 1, 1, 2, 2, 2)
ROWS = np.array([[1.0, -1.0, 2.0, 0.0, 0.5, 1.0, 0.0, -2.0]])
V = np.arange(1.0, N + 1)

# name: (P(x, t, step), t, whether it is a prox, order on the support (None: not restricted by itself))
CASES: dict[str, tuple[Callable[..., Any], float, bool, int | None]] = {
    "box": (lambda x, t, step: projections.box(x, -t, 2 * t), 0.2, False, 3),
    "ball": (lambda x, t, step: projections.ball(x, radius=t), 0.2, False, None),
    "simplex": (lambda x, t, step: projections.simplex(x, total=t), 1.0, False, 5),
    "l1 ball": (lambda x, t, step: projections.l1_ball(x, radius=t), 0.4, False, 3),
    "affine": (lambda x, t, step: projections.affine(x, rows(x), t * rows(x)[:, 0]), 1.0, False, N),
    "lasso": (lambda x, t, step: proxes.lasso(x, t, step), 3.0, True, 3),
    "ridge": (lambda x, t, step: proxes.ridge(x, t, step), 1.0, True, N),
    "elastic net": (lambda x, t, step: proxes.elastic_net(x, t, 2 * t, step), 2.0, True, 5),
    "group lasso": (lambda x, t, step: proxes.group_lasso(x, t, step, groups=GROUPS), 3.0, True, None),
}
CASE = pytest.mark.parametrize("case", list(CASES))


def rows(x: Any) -> Any:
    """Return the constraint's matrix where x is."""
    return xp_of(x).asarray(ROWS) if type(x) is not np.ndarray else ROWS


def xp_of(x: Any) -> Any:
    return array_api_compat.array_namespace(x)


def objective(y: Any, theta: Any, Q: Any) -> Any:
    """½ yᵀQy − qᵀy."""
    xp = xp_of(y)
    return 0.5 * xp.sum(y * (Q @ y)) - xp.sum(theta["q"] * y)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error against the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def condition(case: str, **options: Any) -> Any:
    P, _, is_prox, _ = CASES[case]
    options = {"step": STEP, **options}
    if is_prox:
        return ProximalGradient(objective, lambda x, theta, step: P(x, theta["t"], step), **options)
    return ProjectedGradient(objective, lambda x, theta: P(x, theta["t"], 1.0), **options)


def solve(case: str, q: np.ndarray, t: float) -> np.ndarray:
    """Projected or proximal gradient descent, until nothing moves."""
    P, y = CASES[case][0], np.zeros(N)
    for _ in range(20000):
        new = P(y - STEP * (Q @ y - q), t, STEP)
        if np.array_equal(new, y):
            break
        y = new
    return y


@cache
def truth(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, and its derivatives in q and t by central differences of the re-solved problem."""
    t, h = CASES[case][1], 1e-6
    by_q = [(solve(case, LINEAR + h * e, t) - solve(case, LINEAR - h * e, t)) / (2 * h) for e in np.eye(N)]
    by_t = (solve(case, LINEAR, t + h) - solve(case, LINEAR, t - h)) / (2 * h)
    return solve(case, LINEAR, t), np.stack(by_q, -1), by_t


def arguments(lib: Library, case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    theta = {"q": lib.array(LINEAR), "t": lib.array(CASES[case][1])}
    return lib.array(truth(case)[0]), theta, {"args": (lib.array(Q),)}


# -- against the re-solved problem -------------------------------------------------------------------
@EVERY
@CASE
@pytest.mark.parametrize("restrict", [None, False])
def test_against_the_resolved_problem(lib: Library, case: str, restrict: bool | None) -> None:
    """Forward and reverse, in q and in the number of the set or the penalty."""
    _, by_q, by_t = truth(case)
    y, theta, data = arguments(lib, case)
    lin = linearize(condition(case, restrict=restrict), y, theta, **data)
    g, w = lin.vjp(lib.array(V)), lin.jvp({"q": lib.array(V), "t": lib.array(1.0)})
    assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-6
    assert abs(float(g["t"]) - by_t @ V) <= 1e-6 * np.linalg.norm(by_t)
    assert off(lib.numpy(w), by_q @ V + by_t) <= 1e-6


@EVERY
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


@EVERY
@pytest.mark.parametrize("case", [name for name in CASES if name != "ball"])
@pytest.mark.parametrize("method", ["cg", "cholesky", "minres", "auto"])
def test_methods_on_the_support(lib: Library, case: str, method: str) -> None:
    """There the system is symmetric and positive definite."""
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
    order = CASES[case][3]
    y, theta, data = arguments(lib, case)
    _, report = implicit_vjp(condition(case), y, theta, lib.array(V), return_report=True, **data)
    if order is None:
        assert report.solver == "lu"
        assert "on the support" not in report.reason
    else:
        assert report.solver == "cholesky"
        assert f"on the support, {order} of {N}" in report.reason if order < N else "on the support;" in report.reason


# -- closed forms ------------------------------------------------------------------------------------
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
    theta = {"b": lib.array(B), "t": lib.array(3.0)}
    J = implicit_jacobian(lasso, lib.array(y), theta, args=(lib.array(X),))
    exact = lib.name in ("torch", "jax")
    assert off(lib.numpy(J["b"]), by_b) <= (1e-13 if exact else 1e-7)
    assert off(lib.numpy(J["t"]), by_t) <= (1e-13 if exact else 1e-7)


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
    assert {"dense": "the matrix is given", "sparse": "the matrix is sparse", "products": "n = 3"}[
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
        whole = derivative(condition(case, restrict=False), y, theta, vector, solver=lu(0.3), **data)
        part = derivative(condition(case), y, theta, vector, solver=lu(0.3), **data)
        whole, part = ((x["q"], x["t"]) if isinstance(x, dict) else (x,) for x in (whole, part))
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def lu(damping: float) -> Any:
    from implicitdiff import LU

    return LU(damping=damping)


def test_warm_start() -> None:
    """The adjoint of one call starts the next: nothing is left to do."""
    y, theta, data = arguments(NUMPY, "lasso")
    lin = linearize(condition("lasso"), y, theta, solver=CG(rtol=1e-8), **data)
    lin.vjp(V)
    lin.vjp(V, x0=lin.report.solution)
    assert lin.report.iterations == 0


@pytest.mark.parametrize("mode", ["torch", "jax", "finite_differences"])
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


# -- batches -----------------------------------------------------------------------------------------
@EVERY
@pytest.mark.parametrize("case", ["lasso", "simplex", "group lasso"])
@pytest.mark.parametrize("restrict", [None, True])
def test_batches(lib: Library, case: str, restrict: bool | None) -> None:
    """Items with supports of different sizes are as good as one by one."""
    ts = np.array([0.5, 1.0, 2.0]) * CASES[case][1]
    y = np.stack([solve(case, LINEAR, t) for t in ts])
    assert case != "lasso" or len({(row != 0).sum() for row in y}) > 1
    P = CASES[case][0]
    per_item = lib.per_item or lib.name == "jax"

    def f(y: Any, theta: Any, Q: Any) -> Any:
        return 0.5 * xp_of(y).sum(y * (y @ Q), axis=-1) - xp_of(y).sum(theta["q"] * y, axis=-1)

    def number(theta: Any) -> Any:
        return theta["t"] if per_item or CASES[case][2] is False or case == "group lasso" else theta["t"][:, None]

    if case == "group lasso" and not per_item:
        pytest.skip("one penalty for each item and group is not what the function takes")
    if CASES[case][2]:
        c: Any = ProximalGradient(f, lambda x, theta, step: P(x, number(theta), step), step=STEP, restrict=restrict)
    else:
        c = ProjectedGradient(f, lambda x, theta: P(x, number(theta), 1.0), step=STEP, restrict=restrict)
    theta = {"q": lib.array(np.stack([LINEAR] * 3)), "t": lib.array(ts)}
    g, report = implicit_vjp(
        c, lib.array(y), theta, lib.array(np.stack([V] * 3)), args=(lib.array(Q),), batched=True, return_report=True
    )
    assert all(np.asarray(report.converged))
    for i, t in enumerate(ts):
        one = implicit_vjp(condition(case), y[i], {"q": LINEAR, "t": np.array(t)}, V, args=(Q,))
        assert off(lib.numpy(g["q"])[i], one["q"]) <= 1e-6
        assert abs(lib.numpy(g["t"])[i] - one["t"]) <= 1e-6


# -- the frameworks' own derivatives -----------------------------------------------------------------
@EACH
@pytest.mark.parametrize("case", ["lasso", "simplex", "box", "group lasso", "ball"])
@pytest.mark.parametrize("restrict", [None, True])
def test_native_derivatives(name: str, case: str, restrict: bool | None) -> None:
    """Gradient and second derivative of a loss through the solver, by the framework's own transformations."""
    if case == "ball" and restrict:
        pytest.skip("not regular on its support")
    fw = framework(name)
    t0, h = CASES[case][1], 1e-4
    Qf = fw.xp.asarray(Q)
    P, is_prox = CASES[case][0], CASES[case][2]

    def f(y: Any, theta: Any) -> Any:
        return objective(y, theta, Qf)

    def prox(x: Any, theta: Any, step: float) -> Any:
        return P(x, theta["t"], step)

    c = (
        ProximalGradient(f, prox, step=STEP, restrict=restrict)
        if is_prox
        else ProjectedGradient(f, lambda x, theta: prox(x, theta, 1.0), step=STEP, restrict=restrict)
    )
    solver = implicit_function(c)(lambda theta: solve(case, np.asarray(theta["q"]), float(theta["t"])))
    q = fw.xp.asarray(LINEAR)

    def loss(t: Any) -> Any:
        y = solver({"q": q, "t": t})
        return (y * y * fw.xp.asarray(V)).sum()

    def plain(t: float) -> float:
        return float((solve(case, LINEAR, t) ** 2) @ V)

    t = fw.xp.asarray(np.asarray(t0))
    first = (plain(t0 + h) - plain(t0 - h)) / (2 * h)
    second = (plain(t0 + h) - 2 * plain(t0) + plain(t0 - h)) / h**2
    np.testing.assert_allclose(fw.numpy(fw.gradient(loss)(t)), first, rtol=1e-6)
    np.testing.assert_allclose(fw.numpy(fw.transforms()["hessian"](loss)(t)), second, rtol=1e-4, atol=1e-5)
    if name == "jax":
        np.testing.assert_allclose(fw.numpy(fw.compiled_gradient(loss)(t)), first, rtol=1e-6)


def test_jax_tells_a_theta_in_a_closure() -> None:
    """Neither f nor the projection sees theta: nothing could be told once the program runs."""
    jax = framework("jax").jax
    q, Qf = jax.numpy.asarray(LINEAR), jax.numpy.asarray(Q)
    y = jax.numpy.asarray(truth("simplex")[0])
    onto = ProjectedGradient(lambda y, theta: objective(y, {"q": q}, Qf), lambda x, theta: projections.simplex(x))
    with pytest.raises(DerivativeError, match="does not depend on theta"):
        jax.jit(lambda theta: implicit_vjp(onto, y, theta, jax.numpy.asarray(V)))(q)


@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_one_of_the_two_may_do_without_theta(lib: Library) -> None:
    """The penalty is a constant, or f is: both are fine."""
    y, theta, data = arguments(lib, "lasso")
    _, by_q, by_t = truth("lasso")
    fixed = ProximalGradient(objective, lambda x, theta, step: proxes.lasso(x, 3.0, step), step=STEP)
    assert off(lib.numpy(implicit_vjp(fixed, y, theta, lib.array(V), **data)["q"]), by_q.T @ V) <= 1e-6
    q = lib.array(LINEAR)
    only = ProximalGradient(lambda y, t, Q: objective(y, {"q": q}, Q), proxes.lasso, step=STEP)
    assert abs(float(implicit_vjp(only, y, theta["t"], lib.array(V), **data)) - by_t @ V) <= 1e-5


# -- faults ------------------------------------------------------------------------------------------
@EVERY
@pytest.mark.parametrize("case", ["lasso", "box", "simplex"])
def test_a_kink_is_told(lib: Library, case: str) -> None:
    """A multiplier of exactly zero: a warning that names the coordinate."""
    y = np.array([0.5, 0.5, 0.0])
    # min ½‖y − q‖² with y_2 = 0 at the very edge of moving
    P, q = {
        "lasso": (lambda x, theta: proxes.lasso(x, 1.0), np.array([1.5, 1.5, 1.0])),
        "box": (lambda x, theta: projections.box(x, 0.0, 1.0), np.array([0.5, 0.5, 0.0])),
        "simplex": (lambda x, theta: projections.simplex(x), np.array([0.7, 0.7, 0.2])),
    }[case]
    c = ProjectedGradient(lambda y, theta: 0.5 * xp_of(y).sum((y - theta) ** 2), P)
    with pytest.warns(RegularityWarning, match="projection has a kink"):
        implicit_vjp(c, lib.array(y), lib.array(q), lib.array(np.ones(3)))
    clear = q + np.array([0.0, 0.0, -0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        implicit_vjp(c, lib.array(y), lib.array(clear), lib.array(np.ones(3)))


@EVERY
def test_a_point_that_is_no_solution_is_told(lib: Library) -> None:
    y, theta, data = arguments(lib, "simplex")
    with pytest.warns(NotASolutionWarning):
        implicit_vjp(condition("simplex"), y + 0.1, theta, lib.array(V), **data)


@pytest.mark.parametrize("method", ["cg", "cholesky", "minres"])
def test_symmetric_methods_on_the_whole_system(method: str) -> None:
    """What is not symmetric is refused, with what to do."""
    for case, restrict in (("lasso", False), ("ball", None)):
        y, theta, data = arguments(NUMPY, case)
        with pytest.raises(NotSymmetricError, match="restrict=True"):
            implicit_vjp(condition(case, restrict=restrict), y, theta, V, solver=method, **data)


@EVERY
def test_a_restriction_that_does_not_fit_is_found_out(lib: Library) -> None:
    """On the sphere D is singular on its own support: an error, and no number."""
    y, theta, data = arguments(lib, "ball")
    with pytest.raises(SolveError):
        implicit_vjp(condition("ball", restrict=True), y, theta, lib.array(V), **data)


def test_a_saddle_on_the_support() -> None:
    """Where f is not convex on the support, Cholesky says so, and auto finds another way."""
    Qs = np.diag([1.0, -2.0, 1.0])
    c = ProximalGradient(
        lambda y, theta: 0.5 * (y @ (Qs @ y)) - theta @ y, lambda x, theta, step: proxes.lasso(x, 1.0, step), step=0.1
    )
    q = np.array([3.0, -3.0, 0.1])
    y = np.array([2.0, 2.0, 0.0])  # Qy − q + sign(y) = 0 on the support
    with pytest.raises(SolveError, match="not positive definite"):
        implicit_vjp(c, y, q, np.ones(3), solver="cholesky")
    g = implicit_vjp(c, y, q, np.ones(3))
    np.testing.assert_allclose(g, [1.0, -0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProximalGradient(objective), "prox is NoneType"),
        (lambda: ProjectedGradient(objective, 3), "projection is int"),
        (lambda: ProximalGradient(None, proxes.lasso), "neither fun nor grad"),
        (lambda: ProximalGradient(objective, proxes.lasso, step=0.0), "step is 0.0"),
        (lambda: ProximalGradient(objective, proxes.lasso, step="big"), "step is 'big'"),
        (lambda: ProximalGradient(objective, proxes.lasso, hvp=1), "hvp is int"),
        (lambda: ProximalGradient(objective, proxes.lasso, restrict="yes"), "restrict is 'yes'"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_shapes_are_checked() -> None:
    """A projection of the wrong shape is named."""
    y, theta, data = arguments(NUMPY, "simplex")
    wrong = ProjectedGradient(objective, lambda x, theta: x[:3], step=STEP)
    with pytest.raises(ValueError, match="projection"):
        implicit_vjp(wrong, y, theta, V, **data)


@pytest.mark.skipif(not TORCH, reason="needs torch")
def test_single_precision() -> None:
    """float32 comes out as float32, right to its rounding, and without a false alarm."""
    (lib,) = TORCH
    y, by_q, _ = truth("simplex")
    theta = {"q": lib.array(LINEAR, dtype="float32"), "t": lib.array(1.0, dtype="float32")}
    y32, v, data = (lib.array(x, dtype="float32") for x in (y, V, Q))
    g = implicit_vjp(condition("simplex"), y32, theta, v, args=(data,))
    assert str(g["q"].dtype) == "torch.float32"
    assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-4
