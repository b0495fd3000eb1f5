"""Covariances, Gauss-Newton systems by QR, what a Gauss-Newton matrix costs, and what is told of residuals."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, Library
from helpers_residuals import THETA, X, condition, jacobian, matrices, residual, solved

from implicitdiff import (
    LSMR,
    AccuracyWarning,
    CallbackError,
    Cholesky,
    InconsistentDerivativesError,
    InputError,
    LeastSquares,
    Root,
    SingularError,
    UnknownNameError,
    check_derivatives,
    implicit_vjp,
    linearize,
)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("given", [(), ("jacobian",), ("jvp",)], ids=lambda given: "+".join(given) or "derived")
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_covariance(lib: Library, given: tuple[str, ...]) -> None:
    y = solved("squares")
    r, J = residual(y, THETA), jacobian(y, THETA)
    expected = np.linalg.inv(J.T @ J)
    lin = linearize(condition(lib, "squares", given), lib.array(y), lib.array(THETA))
    rtol = 1e-9 if lib.name == "array_api_strict" else 1e-13
    np.testing.assert_allclose(lib.numpy(lin.covariance(scale=False)), expected, rtol=rtol)
    expected = expected * (r @ r) / (len(X) - 2)
    np.testing.assert_allclose(lib.numpy(lin.covariance()), expected, rtol=rtol)
    np.testing.assert_allclose(lib.numpy(lin.standard_errors()), np.sqrt(np.diag(expected)), rtol=rtol)


def test_covariance_of_a_batch_and_of_trees() -> None:
    thetas = np.stack([THETA, 1.1 * THETA])
    ys = np.stack([solved("squares", t) for t in thetas])
    found = linearize(condition(NUMPY, "squares"), ys, thetas, batched=True).covariance()
    for y, theta, one in zip(ys, thetas, found, strict=True):
        np.testing.assert_allclose(one, linearize(condition(NUMPY, "squares"), y, theta).covariance(), rtol=1e-12)
    tree = LeastSquares(lambda y, t: {"all": y["a"] * np.exp(-y["b"] * t[0] * X) - t[1:]})
    y = solved("squares")
    found = linearize(tree, {"a": np.array(y[0]), "b": np.array(y[1])}, THETA).standard_errors()
    expected = linearize(condition(NUMPY, "squares"), y, THETA).standard_errors()
    np.testing.assert_allclose([found["a"], found["b"]], expected, rtol=1e-12)


def exact_hilbert(k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A section of a Hilbert matrix, rounded, and the exact (JᵀJ)⁻¹ of these numbers."""
    J = 1.0 / (1.0 + np.add.outer(np.arange(k), np.arange(n)))
    rows = [[Fraction(x) for x in row] for row in J]
    A = [[sum(r[i] * r[j] for r in rows) for j in range(n)] + [Fraction(int(i == j)) for j in range(n)]
         for i in range(n)]  # fmt: skip
    for i in range(n):
        A[i] = [x / A[i][i] for x in A[i]]
        for j in set(range(n)) - {i}:
            A[j] = [x - A[j][i] * z for x, z in zip(A[j], A[i], strict=True)]
    return J, np.array([[float(x) for x in row[n:]] for row in A])


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_condition_of_the_jacobian_is_not_squared(lib: Library) -> None:
    """Against exact arithmetic, by rational numbers."""
    J, inverse = exact_hilbert(12, 6)
    M, y, data = lib.array(J), np.ones(6), J @ np.ones(6)
    line = LeastSquares(lambda y, t: M @ y - t, jacobian=lambda y, t: M, hessian="gauss-newton")
    v, rounding = np.cos(np.arange(6.0)), float(np.linalg.cond(J) * np.finfo(float).eps)
    expected, tolerance = J @ (inverse @ v), 30 * rounding
    found, report = implicit_vjp(line, lib.array(y), lib.array(data), lib.array(v), return_report=True)
    assert np.linalg.norm(lib.numpy(found) - expected) < tolerance * np.linalg.norm(expected)
    assert 1e-2 < report.rcond * np.linalg.cond(J) < 1e2
    assert "QR" in report.reason
    squared = np.linalg.norm(J @ np.linalg.solve(J.T @ J, v) - expected)
    assert squared > 1e2 * tolerance * np.linalg.norm(expected)  # what the normal equations leave
    covariance = lib.numpy(linearize(line, lib.array(y), lib.array(data)).covariance(scale=False))
    assert np.linalg.norm(covariance - inverse) < tolerance * np.linalg.norm(inverse)


def test_damping_of_a_gauss_newton_system() -> None:
    y, v, delta = solved("squares"), np.array([1.0, -2.0]), 0.3
    A, B = matrices("squares", "gauss-newton", y)
    expected = -B.T @ np.linalg.solve(A + delta * np.eye(2), v)
    for given in ((), ("jacobian",), ("jvp", "vjp")):
        curve = condition(NUMPY, "squares", given, hessian="gauss-newton")
        found, report = implicit_vjp(curve, y, THETA, v, solver=Cholesky(damping=delta), return_report=True)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        assert report.damping == delta


@pytest.mark.slow(on=("jax", "array_api_strict"))
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
@pytest.mark.parametrize("kind", ["squares", "loss"])
def test_the_certificate_tells_what_gauss_newton_costs(lib: Library, kind: str) -> None:
    y, v = solved(kind), np.array([1.0, -2.0])
    (A, B), (G, _) = matrices(kind, "exact", y), matrices(kind, "gauss-newton", y)
    right, near = (-B.T @ np.linalg.solve(M, v) for M in (A, G))
    curve = condition(lib, kind, hessian="gauss-newton")
    _, report = implicit_vjp(curve, lib.array(y), lib.array(THETA), lib.array(v), error=True, return_report=True)
    error = report.error
    assert error.cause == "Gauss-Newton"
    assert error.trusted
    assert error.absolute == pytest.approx(np.linalg.norm(near - right), rel=1e-3)
    assert error.parts["Gauss-Newton"] == pytest.approx(error.absolute, rel=1e-3)
    np.testing.assert_allclose(lib.numpy(error.correction), near - right, atol=1e-6)


def test_polish_takes_steps_with_the_whole_hessian() -> None:
    curve = condition(NUMPY, "squares", hessian="gauss-newton")
    y, v = solved("squares"), np.array([1.0, -2.0])
    with pytest.warns(AccuracyWarning, match="for Gauss-Newton: no Newton step takes that away"):
        found = implicit_vjp(curve, y * (1 + 1e-4), THETA, v, polish=2)
    A, B = matrices("squares", "gauss-newton", y)
    np.testing.assert_allclose(found, -B.T @ np.linalg.solve(A, v), rtol=1e-8)


def test_a_singular_jacobian_is_told() -> None:
    same = LeastSquares(lambda y, t: (y[0] + y[1]) * X - t[1:])
    y = np.array([0.25, 0.25])
    with pytest.raises(SingularError, match="not full rank"):
        linearize(same, y, THETA).covariance()
    assert np.all(np.isnan(linearize(same, y, THETA, on_failure="nan").covariance()))
    near = LeastSquares(lambda y, t: (y[0] + y[1]) * X - t, hessian="gauss-newton")
    with pytest.raises(SingularError):
        implicit_vjp(near, y, 0.5 * X, np.ones(2))
    few = LeastSquares(lambda y, t: y[:1] + 0 * y[1:] - t, hessian="gauss-newton")
    with pytest.raises(SingularError):
        implicit_vjp(few, np.ones(2), np.ones(1), np.ones(2))


def test_what_has_no_covariance_is_told() -> None:
    y, arrays = solved("squares"), (solved("squares"), THETA)
    with pytest.raises(InputError, match="the condition is Root"):
        linearize(Root(lambda y, t: y - t[:2]), *arrays).covariance()
    with pytest.raises(InputError, match="another loss"):
        linearize(condition(NUMPY, "loss"), *arrays).standard_errors()
    square = LeastSquares(lambda y, t: y - t)
    with pytest.raises(InputError, match="2 residuals and 2 unknowns"):
        linearize(square, y, y).covariance()
    np.testing.assert_allclose(linearize(square, y, y).covariance(scale=False), np.eye(2), rtol=1e-12)


def test_wrong_products_are_told() -> None:
    def twice(y: Any, t: Any) -> Any:
        return 2 * jacobian(y, t)

    y = solved("squares")
    swapped = LeastSquares(residual, jvp=lambda y, t, v: jacobian(y, t) @ v, vjp=lambda y, t, u: -jacobian(y, t).T @ u)
    with pytest.raises(InconsistentDerivativesError, match="jacobian is not the derivative of residual"):
        implicit_vjp(LeastSquares(residual, jacobian=twice), y, THETA, np.ones(2))
    with pytest.raises(
        InconsistentDerivativesError, match=r"vjp is not the derivative of residual.*\n.*the other sign"
    ):
        implicit_vjp(swapped, y, THETA, np.ones(2))
    assert not check_derivatives(swapped, y, THETA).ok
    assert check_derivatives(LeastSquares(residual, jacobian=jacobian), y, THETA).ok


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(InputError, match="residual is int"):
        LeastSquares(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="loss is float"):
        LeastSquares(residual, loss=1.0)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="exact, gauss-newton"):
        LeastSquares(residual, hessian="newton")  # type: ignore[arg-type]
    y = solved("squares")
    with pytest.raises(CallbackError, match="jacobian returned an array of shape"):
        implicit_vjp(LeastSquares(residual, jacobian=lambda y, t: np.ones((3, 2))), y, THETA, np.ones(2))
    for given in ({}, {"jacobian": jacobian}):
        with pytest.raises(CallbackError, match="residual returned an empty tree"):
            implicit_vjp(LeastSquares(lambda y, t: None, **given), y, THETA, np.ones(2))
    with pytest.raises(CallbackError, match="loss returned an array"):
        implicit_vjp(LeastSquares(residual, loss=lambda r: r), y, THETA, np.ones(2))


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("given", [("jvp", "vjp"), ("jacobian",)], ids="+".join)
@pytest.mark.parametrize("solver", ["lsmr", "pinv", "cholesky", "auto"])
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_methods_that_solve_with_the_jacobian(lib: Library, solver: str, given: tuple[str, ...]) -> None:
    """κ(J) = 1e4, and that of the normal equations 1e8."""
    k, n = 70, 40
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(m, n)))[0] for m in (k, n))
    s, v = np.where(np.arange(n) < n // 2, 1.0, 1e-4) * np.linspace(1.0, 1.1, n), rng.normal(size=n)
    J, inverse = (U * s) @ V.T, (V / s**2) @ V.T
    M, Mt, y = lib.array(J), lib.array(J.T.copy()), rng.normal(size=n)
    functions: dict[str, Any] = {
        "jvp": lambda y, t, v: M @ v,
        "vjp": lambda y, t, u: Mt @ u,
        "jacobian": lambda y, t: M,
    }
    line = LeastSquares(
        lambda y, t: M @ y - t, hessian="gauss-newton", **{name: functions[name] for name in given}
    )  # fmt: skip
    arrays = [lib.array(x) for x in (y, J @ y, v)]
    found, report = implicit_vjp(line, *arrays, solver=solver, return_report=True)
    expected = J @ (inverse @ v)
    assert np.linalg.norm(lib.numpy(found) - expected) < 1e-8 * np.linalg.norm(expected)
    if solver == "lsmr":
        assert report.iterations < 150
    if solver == "pinv":
        assert report.rank == n


def test_auto_takes_products_with_the_jacobian_where_there_are_many_unknowns() -> None:
    n = 300
    scale = np.linspace(1.0, 3.0, n)
    line = LeastSquares(
        lambda y, t: np.concatenate([scale * y, y]) - t, jvp=lambda y, t, v: np.concatenate([scale * v, v]),
        vjp=lambda y, t, u: scale * u[:n] + u[n:], hessian="gauss-newton",
    )  # fmt: skip
    y, v = np.cos(np.arange(n)), np.sin(np.arange(n))
    theta = np.concatenate([scale * y, y])
    found, report = implicit_vjp(line, y, theta, v, return_report=True)
    u = v / (1 + scale**2)
    np.testing.assert_allclose(found, np.concatenate([scale * u, u]), rtol=1e-8)
    assert report.solver == "lsmr"
    damped = implicit_vjp(line, y, theta, v, solver=LSMR(damping=0.5))
    u = v / (1.5 + scale**2)
    np.testing.assert_allclose(damped, np.concatenate([scale * u, u]), rtol=1e-8)


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
@pytest.mark.parametrize("sparsity", ["pattern", "detect"])
def test_sparse_matrices(sparsity: str, hessian: Any) -> None:
    """A chain: each residual sees two neighbours, and A is tridiagonal."""
    n = 40

    def chain(y: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.concatenate([y - t, np.sin(y[1:] - y[:-1])])

    y = np.cos(np.arange(n) / 3)
    bonds = np.sin(y[1:] - y[:-1]) * np.cos(y[1:] - y[:-1])
    theta = y + np.concatenate([[0.0], bonds]) - np.concatenate([bonds, [0.0]])
    pattern = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) < 2
    plain = LeastSquares(chain, hessian=hessian)
    few = LeastSquares(chain, hessian=hessian, sparsity="detect" if sparsity == "detect" else pattern)
    v = np.sin(np.arange(n))
    found, report = implicit_vjp(few, y, theta, v, return_report=True)
    np.testing.assert_allclose(found, implicit_vjp(plain, y, theta, v), rtol=1e-6, atol=1e-9)
    assert "sparse" in report.reason
