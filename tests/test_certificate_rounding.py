"""The estimated error where rounding, or differences, are all there is, against 60 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from implicitdiff import Stationary, implicit_grad
from implicitdiff.backends.numpy import NumpyBackend


def ridge(seed, condition):
    """½‖Xy − b‖² + ½ Σ θ_i y_i² with a Hessian of that condition number; y as LAPACK solves for it."""
    rng = np.random.default_rng(seed)
    V, U = (np.linalg.qr(rng.normal(size=(rows, 6)))[0] for rows in (6, 12))
    X, b, theta = (U * np.geomspace(1, condition**-0.5, 6)) @ V.T, rng.normal(size=12), np.full(6, 0.3 / condition)
    return X, b, theta, np.linalg.solve(X.T @ X + np.diag(theta), X.T @ b)


def to_sixty_digits(X, b, theta):
    """dL/dθ for L = ½‖y‖², which is −u ∘ y with H u = y."""
    with mpmath.workdps(60):
        X, b = mpmath.matrix(X.tolist()), mpmath.matrix(b.tolist())
        H = X.T * X + mpmath.diag([mpmath.mpf(float(t)) for t in theta])
        y = mpmath.lu_solve(H, X.T * b)
        return np.array([float(-u * v) for u, v in zip(mpmath.lu_solve(H, y), y)])


@pytest.mark.parametrize("seed", range(7))
def test_rounding_is_named_and_measured(seed):
    X, b, theta, y = ridge(seed, 2e2 * 8.0**seed)
    condition = Stationary(
        grad=lambda y, t: X.T @ (X @ y - b) + t * y, hvp=lambda y, t, v: X.T @ (X @ v) + t * v,
        mixed_vjp=lambda y, t, u: u * y, mixed_jvp=lambda y, t, d: d * y,
    )  # fmt: skip
    outer = lambda y, t: (y * y).sum() / 2
    g, report = implicit_grad(condition, outer, y, theta, error=True, return_report=True, solver="lu")
    true = np.linalg.norm(g - to_sixty_digits(X, b, theta))
    assert report.error.cause == "rounding"
    assert report.error.trusted
    assert 0.7 <= report.error.absolute / true <= 1.5


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("given", ["fun", "grad"])
def test_differences_are_named_and_measured(seed, given):
    """Of the gradient, first differences; of the objective, second ones, and first ones for its gradient."""
    X, b, theta, y = ridge(seed, 10.0 * 4.0**seed)
    fun = lambda y, t: ((X @ y - b) ** 2).sum() / 2 + (t * y * y).sum() / 2
    grad = lambda y, t: X.T @ (X @ y - b) + t * y
    condition = Stationary(fun) if given == "fun" else Stationary(grad=grad)
    outer = lambda y, t: (y * y).sum() / 2
    g, report = implicit_grad(
        condition, outer, y, theta, error=True, return_report=True, backend=NumpyBackend("finite_differences")
    )
    true = np.linalg.norm(g - to_sixty_digits(X, b, theta))
    assert report.error.cause == "finite differences"
    assert report.error.trusted
    assert 0.7 <= report.error.absolute / true <= 1.5
