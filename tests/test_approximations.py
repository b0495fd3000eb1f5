"""Approximations by name: against what their formulas say, their true residual, their measured error, what is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES, Library, relative_error
from frameworks import EACH, framework
from problems import Counted, close, linear_root, matrix, solve_both, vector, with_eigenvalues

import implicitdiff as idf
from implicitdiff import Status, linear_solve
from implicitdiff.solvers import get_solver

LIBS = pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
NAMES = tuple(name for name in idf.solver_names() if getattr(get_solver(name), "approximate", False))
EACH_NAME = pytest.mark.parametrize("name", NAMES)
QUIET: dict[str, Any] = {"on_failure": "ignore", "return_report": True}
N = 12


def tame(n: int = N, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with eigenvalues in [0.4, 1.6], for which every series here converges."""
    return with_eigenvalues(np.linspace(0.4, 1.6, n), seed)


def asymmetric(n: int = N) -> np.ndarray:
    """Return I − W with ‖W‖ = 0.6, far from symmetric."""
    W = np.random.default_rng(4).normal(size=(n, n))
    return np.eye(n) - 0.6 * W / np.linalg.norm(W, 2)


def test_all_are_there() -> None:
    expected = {"neumann", "one_step", "phantom", "truncated", "chebyshev", "diagonal", "nystrom"}
    assert expected <= set(NAMES)
    classes = {"Neumann", "OneStep", "Phantom", "Truncated", "Chebyshev", "Diagonal", "Nystrom", "BiCGSTAB"}
    assert classes <= set(idf.__all__)


# -- what the formulas say -------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("terms", [1, 2, 10, 100])
def test_neumann_leaves_its_power_of_the_error(lib: Library, terms: int) -> None:
    """On a diagonal A each entry is off by exactly (1 − αμ)^K."""
    mu, alpha, b = np.linspace(1.0, 20.0, N), 1 / 20, vector(N)
    x = linear_solve(
        lib.array(np.diag(mu)), lib.array(b), solver=idf.Neumann(terms=terms, step=alpha), on_failure="ignore"
    )
    np.testing.assert_allclose(lib.numpy(x), (1 - (1 - alpha * mu) ** terms) * b / mu, rtol=1e-12, atol=1e-15)


def test_the_step_is_one_over_the_largest_eigenvalue_with_its_sign() -> None:
    mu = np.r_[np.linspace(1.0, 10.0, N - 1), 20.0]
    for sign in (1, -1):
        x, report = linear_solve(sign * np.diag(mu), np.ones(N), solver="neumann", return_report=True)
        found = (1 - (1 - (mu * sign * x)[:-2]) ** (1 / 20)) / mu[:-2]  # α, from each entry
        np.testing.assert_allclose(found, 1 / 20, rtol=1e-3)
        assert 20 < report.matvecs <= 50


def test_phantom_and_one_step_are_terms_of_the_series() -> None:
    A, b = asymmetric(), vector(N)
    damped = np.eye(N) - 0.5 * A
    expected = 0.5 * sum(np.linalg.matrix_power(damped, j) @ b for j in range(5))
    close(linear_solve(A, b, solver="phantom"), expected, 1e-14)
    close(linear_solve(A, b, solver=idf.OneStep(step=0.7)), 0.7 * b, 1e-15)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_truncated_is_the_best_in_its_krylov_space(steps: int) -> None:
    A, b = with_eigenvalues(np.geomspace(1.0, 100.0, 30)), vector(30)
    K = np.stack([np.linalg.matrix_power(A, j) @ b for j in range(steps)], axis=1)
    K = np.linalg.qr(K)[0]
    best = K @ np.linalg.solve(K.T @ A @ K, K.T @ b)
    x, report = linear_solve(lambda v: A @ v, b, solver=idf.Truncated(steps=steps), symmetric=True, return_report=True)
    close(x, best, 1e-8)
    assert report.iterations == steps


@pytest.mark.parametrize("terms", [1, 4, 15])
def test_chebyshev_leaves_its_polynomial(terms: int) -> None:
    mu, (a, c), b = np.linspace(1.0, 9.0, N), (1.0, 9.0), vector(N)
    T = np.polynomial.chebyshev.Chebyshev.basis(terms)
    left = T((c + a - 2 * mu) / (c - a)) / T((c + a) / (c - a))
    for sign, bounds in ((1, (a, c)), (-1, (-c, -a))):
        x = linear_solve(sign * np.diag(mu), b, solver=idf.Chebyshev(terms=terms, bounds=bounds))
        np.testing.assert_allclose(sign * x, (1 - left) * b / mu, rtol=1e-11, atol=1e-14)


def test_chebyshev_finds_its_bounds() -> None:
    A, b = with_eigenvalues(np.linspace(1.0, 10.0, 40)), vector(40)
    x, report = linear_solve(A, b, solver=idf.Chebyshev(terms=30), return_report=True)
    assert report.residual < 1e-5
    close(x, np.linalg.solve(A, b), 1e-4)


@pytest.mark.parametrize("form", ["matrix", "product"])
def test_diagonal(form: str) -> None:
    A, b = matrix("gen"), vector()
    product = Counted(A)
    x, report = linear_solve(A if form == "matrix" else product, b, solver="diagonal", return_report=True)
    close(x, b / np.diagonal(A), 1e-15)
    assert report.matvecs == (1 if form == "matrix" else 31) == (product.calls + (form == "matrix"))


@LIBS
@pytest.mark.parametrize("sketch", ["gauss", "columns"])
@pytest.mark.parametrize("sign", [1, -1])
def test_nystrom_is_exact_for_a_low_rank_beside_the_identity(lib: Library, sketch: str, sign: int) -> None:
    C = np.random.default_rng(1).normal(size=(40, 5))
    A, b = sign * (C @ C.T + 0.3 * np.eye(40)), vector(40)
    solver = idf.Nystrom(rank=5, rho=0.3, sketch=sketch)
    x, report = linear_solve(lib.array(A), lib.array(b), solver=solver, return_report=True)
    assert relative_error(lib, x, np.linalg.solve(A, b)) <= 1e-11
    assert report.matvecs == 6
    assert report.status == Status.APPROXIMATE
    whole = linear_solve(lib.array(A), lib.array(b), solver=idf.Nystrom(rank=40, sketch=sketch))
    assert relative_error(lib, whole, np.linalg.solve(A, b)) <= 1e-9


def test_one_step_of_newtons_method_is_exact() -> None:
    """T is a step of Newton's method, so ∂T = 0 at the solution; of a contraction it is off by its rate."""
    theta = np.array([2.0, 9.0])
    newton = idf.FixedPoint(lambda y, t: (y + t / y) / 2)
    g, report = idf.implicit_vjp(newton, np.sqrt(theta), theta, np.ones(2), solver="one_step", return_report=True)
    np.testing.assert_allclose(g, 0.5 / np.sqrt(theta), rtol=1e-9)
    assert report.status == Status.APPROXIMATE
    slow = idf.FixedPoint(lambda y, t: 0.3 * y + 0.7 * np.asarray(t))
    g = idf.implicit_vjp(slow, theta, theta, np.ones(2), solver="one_step")
    np.testing.assert_allclose(g, 0.7, rtol=1e-8)


# -- what holds of all -----------------------------------------------------------------------------------
@LIBS
@EACH_NAME
@pytest.mark.parametrize("form", ["matrix", "product"])
def test_the_status_and_the_true_residual(lib: Library, name: str, form: str) -> None:
    A, b = tame(), vector(N)
    given = lib.array(A)
    product = given if form == "matrix" else lambda v: given @ v
    tags = {} if form == "matrix" else {"symmetric": True}
    x, report = linear_solve(product, lib.array(b), solver=name, return_report=True, **tags)
    assert report.status == Status.APPROXIMATE
    assert not report.converged
    assert report.residual == pytest.approx(np.linalg.norm(b - A @ lib.numpy(x)) / np.linalg.norm(b), abs=1e-14)
    assert report.residual < 1
    assert report.solver == name


@EACH_NAME
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "columns"])
def test_products_are_counted(name: str, columns: tuple[int, ...]) -> None:
    product = Counted(tame())
    b = vector(N, columns=columns)
    _, report = linear_solve(product, b, solver=name, symmetric=True, return_report=True)
    assert report.matvecs == product.calls


@EACH_NAME
def test_both_ways_of_an_asymmetric_system(name: str) -> None:
    """The transposed system is that of Aᵀ: forward and reverse are the transposes of each other."""
    A = asymmetric()
    solver = get_solver(name)
    if solver.symmetric_only:
        with pytest.raises(idf.NotSymmetricError):
            solve_both(A, vector(N), name)
        return
    theta = vector(N, seed=5)
    y, root = np.linalg.solve(A, theta), linear_root(A)
    forward = idf.implicit_jacobian(root, y, theta, solver=name)
    one = np.stack([idf.implicit_jvp(root, y, theta, e, solver=name) for e in np.eye(N)], axis=1)
    reverse = np.stack([idf.implicit_vjp(root, y, theta, e, solver=name) for e in np.eye(N)])
    close(one, forward, 1e-12)
    close(reverse, forward, 1e-12)
    if name in {"one_step", "diagonal"}:  # symmetric, whatever A is
        return
    assert np.linalg.norm(forward - np.linalg.inv(A)) < np.linalg.norm(forward - np.linalg.inv(A).T)


@LIBS
@EACH_NAME
def test_a_batch_is_its_items(lib: Library, name: str) -> None:
    A, b = np.stack([tame(), tame(seed=3), np.eye(N)]), vector(3, columns=(N,))
    x, report = linear_solve(lib.array(A), lib.array(b), solver=name, batched=True, return_report=True)
    for i in range(3):
        alone, one = linear_solve(lib.array(A[i]), lib.array(b[i]), solver=name, return_report=True)
        close(lib.numpy(x)[i], lib.numpy(alone), 1e-12)
        assert lib.numpy(report.residual)[i] == pytest.approx(one.residual, rel=1e-6, abs=1e-14)
    assert lib.numpy(report.status).tolist() == [Status.APPROXIMATE] * 3


@EACH_NAME
def test_damping_is_that_of_the_problem(name: str) -> None:
    A, b = 0.5 * tame(), vector(N)
    damped = linear_solve(A, b, solver=replace(get_solver(name), damping=0.3))
    close(damped, linear_solve(A + 0.3 * np.eye(N), b, solver=name), 1e-12)


@EACH_NAME
def test_a_start_is_gone_on_from(name: str) -> None:
    """x0 is corrected by the approximation of its residual; one that is worse than zero is dropped."""
    A, b = tame(), vector(N)
    exact = np.linalg.solve(A, b)
    cold, first = linear_solve(A, b, solver=name, return_report=True)
    again, second = linear_solve(A, b, solver=name, x0=cold, return_report=True)
    assert np.linalg.norm(again - exact) < max(np.linalg.norm(cold - exact), 1e-12)
    assert second.residual <= max(first.residual**1.5, 1e-12)
    dropped = linear_solve(A, b, solver=name, x0=1e6 * vector(N, seed=8))
    close(dropped, cold, 1e-12)


# -- what is told ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "solver",
    [idf.Neumann(step=0.3), idf.Neumann(terms=1000, step=3.0), idf.Phantom(tau=0.9),
     idf.Chebyshev(bounds=(1.0, 4.0))],
)  # fmt: skip
def test_divergence_is_told(solver: Any) -> None:
    A, b = with_eigenvalues(np.linspace(1.0, 10.0, N)), vector(N)
    with pytest.raises(idf.NotConvergedError, match=f"{solver.name} diverged") as caught:
        linear_solve(A, b, solver=solver)
    assert len(str(caught.value).splitlines()) <= 5
    assert caught.value.report.status == Status.DIVERGED
    assert np.isnan(linear_solve(A, b, solver=solver, on_failure="nan")).all()


@LIBS
def test_divergence_of_one_item(lib: Library) -> None:
    A, b = np.stack([tame(), 10 * tame()]), vector(2, columns=(N,))
    x, report = linear_solve(lib.array(A), lib.array(b), solver=idf.Neumann(step=1.0), batched=True, **QUIET)
    assert lib.numpy(report.status).tolist() == [Status.APPROXIMATE, Status.DIVERGED]
    close(lib.numpy(x)[0], lib.numpy(linear_solve(lib.array(A[0]), lib.array(b[0]), solver=idf.Neumann(step=1.0))))


@pytest.mark.parametrize(
    ("A", "solver", "status"),
    [
        (np.diag((-1.0) ** np.arange(N) * np.arange(1, N + 1)), "truncated", Status.NOT_POSITIVE_DEFINITE),
        (np.diag((-1.0) ** np.arange(N) * np.arange(1, N + 1)), "chebyshev", Status.NOT_POSITIVE_DEFINITE),
        (np.diag((-1.0) ** np.arange(N) * np.arange(1, N + 1)), "neumann", Status.DIVERGED),
        (np.diag((-1.0) ** np.arange(N) * np.arange(1, N + 1)), "nystrom", Status.NOT_POSITIVE_DEFINITE),
        (np.diag(np.r_[0.0, np.ones(N - 1)]), "diagonal", Status.SINGULAR),
        (asymmetric(), "truncated", Status.NOT_SYMMETRIC),
        (asymmetric(), "nystrom", Status.NOT_SYMMETRIC),
    ],
)
def test_the_wrong_matrix_is_told(A: np.ndarray, solver: str, status: Status) -> None:
    _, report = linear_solve(A, vector(N), solver=solver, **QUIET)
    assert report.status == status
    _, report = linear_solve(lambda v: A @ v, vector(N), solver=solver, **QUIET)
    assert report.status == status


@EACH_NAME
def test_products_that_are_nan_are_told(name: str) -> None:
    _, report = linear_solve(lambda v: v * np.nan, vector(N), solver=name, symmetric=True, **QUIET)
    assert not Status(report.status).ok


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (idf.Neumann, {"terms": 0}), (idf.Neumann, {"step": "large"}), (idf.Neumann, {"step": 0.0}),
        (idf.Phantom, {"steps": 2.5}), (idf.Phantom, {"tau": -0.5}), (idf.Truncated, {"steps": -1}),
        (idf.Chebyshev, {"bounds": (0.0, 1.0)}), (idf.Chebyshev, {"bounds": [1.0, 2.0]}), (idf.Nystrom, {"rank": 0}),
        (idf.Nystrom, {"rho": -1.0}), (idf.Nystrom, {"seed": 0.5}), (idf.Nystrom, {"sketch": "rows"}),
        (idf.OneStep, {"damping": "x"}),
    ],
)  # fmt: skip
def test_options_are_refused_by_name(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(idf.InputError, match=rf"^{next(iter(options))} = .*: {kind.__name__} expects "):
        kind(**options)


def test_the_diagonal_of_a_large_product_is_not_assembled() -> None:
    with pytest.raises(idf.InputError, match="needs the diagonal"):
        linear_solve(lambda v: 2 * v, np.ones(5000), solver="diagonal")


# -- as preconditioners ----------------------------------------------------------------------------------
def test_nystrom_and_the_diagonal_as_preconditioners() -> None:
    """A sketch takes what is large out of the spectrum; its products are counted."""
    values = np.r_[np.geomspace(10.0, 1e4, 20), np.linspace(1.0, 2.0, 180)]
    A, b = Counted(with_eigenvalues(values)), vector(200)
    exact = np.linalg.solve(A.a, b)
    options: dict[str, Any] = {"symmetric": True, "return_report": True}
    _, plain = linear_solve(A, b, solver="cg", **options)
    A.calls = 0
    for method in (idf.CG, idf.MINRES, idf.Auto):
        x, helped = linear_solve(A, b, solver=method(preconditioner=idf.Nystrom(rank=30)), **options)
        close(x, exact, 1e-8)
        assert helped.iterations < plain.iterations / 3
        assert helped.matvecs == A.calls or method is idf.Auto
        A.calls = 0
    scale = np.logspace(-2, 2, N)
    B = scale[:, None] * tame() * scale
    _, jacobi = linear_solve(lambda v: B @ v, vector(N), solver=idf.CG(preconditioner=idf.Diagonal()), **options)
    _, plain = linear_solve(lambda v: B @ v, vector(N), solver="cg", on_failure="ignore", **options)
    assert jacobi.iterations < plain.iterations
    with pytest.raises(idf.InputError, match="products with A at each step"):
        linear_solve(A, b, solver=idf.CG(preconditioner=idf.Neumann()), symmetric=True)


# -- the measured error ----------------------------------------------------------------------------------
def small_problem(xp: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Return a condition, its solution, θ, and the gradient of Σ y: f = yᵀHy/2 + Σ y⁴/12 − θᵀy."""
    H = xp.asarray(tame())
    y = np.linspace(0.2, 0.9, N)
    theta = tame() @ y + y**3 / 3
    condition = idf.Stationary(lambda y, t: y @ (H @ y) / 2 + xp.sum(y**4) / 12 - t @ y)
    return condition, y, theta, np.linalg.solve(tame() + np.diag(y**2), np.ones(N))


def total(y: Any, theta: Any) -> Any:
    return y.sum()


@EACH_NAME
def test_the_error_is_measured_and_limited(name: str) -> None:
    condition, y, theta, truth = small_problem(np)
    g, report = idf.implicit_grad(condition, total, y, theta, solver=name, error=True, return_report=True)
    assert report.status == Status.APPROXIMATE
    if np.linalg.norm(g - truth) > 1e-7 * np.linalg.norm(truth):
        assert 0.5 <= report.error.absolute / np.linalg.norm(g - truth) <= 2
        assert report.error.cause == "linear solve"
    close(g - report.error.correction, truth, 0.02)
    relative = np.linalg.norm(g - truth) / np.linalg.norm(g)
    idf.implicit_grad(condition, total, y, theta, solver=name, max_error=3 * relative + 1e-6)
    if relative > 1e-6:
        with pytest.raises(idf.InaccurateError, match="linear solve"):
            idf.implicit_grad(condition, total, y, theta, solver=name, max_error=relative / 3)


def test_a_polish_is_a_step_of_newtons_method() -> None:
    condition, y, theta, _ = small_problem(np)
    with pytest.warns(idf.NotASolutionWarning):
        _, report = idf.implicit_grad(condition, total, y + 0.01, theta, solver="one_step", return_report=True)
    options: dict[str, Any] = {"solver": "one_step", "polish": 2, "return_report": True}
    _, report = idf.implicit_grad(condition, total, y + 0.01, theta, **options)
    np.testing.assert_allclose(report.polished_y, y, atol=1e-6)


def through(fw: Any, solver: Any) -> tuple[Any, Any, np.ndarray]:
    """Return θ ↦ Σ y*(θ) with its derivative by a solver, θ, and the same gradient on NumPy."""
    _, y, theta, _ = small_problem(np)
    condition = small_problem(fw.xp)[0]
    expected = idf.implicit_grad(small_problem(np)[0], total, y, theta, solver=solver)
    solved = idf.implicit_function(condition, solver=solver)(lambda theta: fw.xp.asarray(y))
    return (lambda theta: solved(theta).sum()), fw.xp.asarray(theta), expected


@EACH
@pytest.mark.parametrize("solver", NAMES)
def test_backward_passes(name: str, solver: str) -> None:
    fw = framework(name)
    loss, theta, expected = through(fw, solver)
    np.testing.assert_allclose(fw.numpy(fw.gradient(loss)(theta)), expected, rtol=1e-9)


@EACH
@pytest.mark.parametrize("solver", ["neumann", "truncated", "nystrom"])
def test_compiled_and_forward(name: str, solver: str) -> None:
    fw = framework(name)
    loss, theta, expected = through(fw, solver)
    if name == "jax":
        np.testing.assert_allclose(fw.numpy(fw.compiled_gradient(loss)(theta)), expected, rtol=1e-9)
    forward = fw.numpy(fw.transforms()["jacfwd"](loss)(theta))
    # k steps of CG are not linear in b: column by column they are other numbers
    np.testing.assert_allclose(forward, expected, rtol=1e-5 if solver == "truncated" else 1e-9)


@pytest.mark.slow(on=("jax",))
@EACH
def test_the_error_under_compilation(name: str) -> None:
    fw = framework(name)
    _, y, theta, truth = small_problem(np)
    condition, solver = small_problem(fw.xp)[0], idf.Neumann(terms=3)

    def with_error(y: Any, theta: Any) -> Any:
        g, report = idf.implicit_grad(condition, total, y, theta, solver=solver, error=True, return_report=True)
        return g, report.error.absolute, report.status

    ask = with_error if name == "torch" else fw.compiled(with_error)
    g, error, status = ask(fw.xp.asarray(y), fw.xp.asarray(theta))
    assert int(status) == Status.APPROXIMATE
    assert 0.5 <= float(error) / np.linalg.norm(fw.numpy(g) - truth) <= 2


@pytest.mark.slow(on=("jax",))
@EACH
def test_second_derivatives_are_refused(name: str) -> None:
    fw = framework(name)
    loss, theta, _ = through(fw, "neumann")
    transforms = fw.transforms()
    for twice in (transforms["hessian"], lambda f: transforms["jacrev"](transforms["grad"](f))):
        with pytest.raises(idf.DerivativeError, match="a second derivative is asked for, through solver='neumann'"):
            twice(loss)(theta)
    exact, _, _ = through(fw, "lu")
    assert np.isfinite(fw.numpy(transforms["jacrev"](transforms["grad"](exact))(theta))).all()
