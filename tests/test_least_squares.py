"""`LeastSquares` against closed forms: products given or derived, losses, regularizers, Gauss-Newton, covariance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import JAX, PLAIN, Library
from helpers_residuals import KINDS, THETA, condition, matrices, solved

from implicitdiff import (
    LeastSquares,
    implicit_function,
    implicit_jacobian,
    implicit_vjp,
)

EACH_HESSIAN = pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
EACH_LIBRARY = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
ACCURACY = {"numpy": 1e-9, "array_api_strict": 1e-7, "torch": 1e-12, "jax": 1e-12}
"""NumPy: of J by complex steps, differences are taken; the array standard alone: differences of differences."""


def right(lib: Library, found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(lib.numpy(found), expected, rtol=ACCURACY[lib.name], atol=ACCURACY[lib.name])


@EACH_HESSIAN
@pytest.mark.parametrize("kind", KINDS)
@EACH_LIBRARY
def test_derivative(lib: Library, kind: str, hessian: str) -> None:
    y = solved(kind)
    A, B = matrices(kind, hessian, y)
    found = implicit_jacobian(condition(lib, kind, hessian=hessian), lib.array(y), lib.array(THETA))
    right(lib, found, -np.linalg.solve(A, B))


@EACH_HESSIAN
@pytest.mark.parametrize("given", [("jvp",), ("vjp",), ("jacobian",), ("jvp", "vjp")], ids="+".join)
@pytest.mark.parametrize("kind", ["squares", "both"])
@EACH_LIBRARY
def test_given_products(lib: Library, kind: str, given: tuple[str, ...], hessian: str) -> None:
    y = solved(kind)
    A, B = matrices(kind, hessian, y)
    v = np.array([1.0, -2.0])
    found, report = implicit_vjp(
        condition(lib, kind, given, hessian=hessian), lib.array(y), lib.array(THETA), lib.array(v), return_report=True
    )
    right(lib, found, -B.T @ np.linalg.solve(A.T, v))
    if hessian == "gauss-newton" or lib.name == "torch":  # else of f, or of what a given Jᵀ makes of r
        assert "given" in report.derivatives["A"]


@EACH_HESSIAN
@pytest.mark.parametrize("given", [(), ("vjp",), ("jacobian",)], ids=lambda given: "+".join(given) or "derived")
@EACH_LIBRARY
def test_batch(lib: Library, given: tuple[str, ...], hessian: str) -> None:
    thetas = np.stack([THETA, 1.1 * THETA])
    ys = np.stack([solved("both", t) for t in thetas])
    found = implicit_jacobian(
        condition(lib, "both", given, hessian=hessian), lib.array(ys), lib.array(thetas), batched=True
    )
    pairs = [matrices("both", hessian, y, t) for y, t in zip(ys, thetas, strict=True)]
    right(lib, found, np.stack([-np.linalg.solve(A, B) for A, B in pairs]))


@pytest.mark.slow(on=("jax",))
@EACH_HESSIAN
@pytest.mark.parametrize("given", [(), ("jacobian",)], ids=["derived", "jacobian"])
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_function_that_is_differentiable(lib: Library, given: tuple[str, ...], hessian: str) -> None:
    """`implicit_function`, by the framework's own backward pass where it has one."""
    A, B = matrices("both", hessian, solved("both"))
    solver = implicit_function(condition(lib, "both", given, hessian=hessian))(lambda theta: lib.array(solved("both")))
    v = np.array([1.0, -2.0])
    expected = -B.T @ np.linalg.solve(A.T, v)
    if lib.name == "torch":
        theta = lib.array(THETA).requires_grad_()
        (solver(theta) @ lib.array(v)).backward()
        found = theta.grad
    elif lib.name == "jax":
        import jax

        found = jax.jit(jax.grad(lambda theta: solver(theta) @ lib.array(v)))(lib.array(THETA))
    else:
        found = solver.linearize(lib.array(THETA)).vjp(lib.array(v))
    right(lib, found, expected)


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_a_regularizer_of_y_alone(hessian: str) -> None:
    """... as a loss may be one of the residuals alone."""
    theta = np.array([1.0, 2.0, 0.5])
    forms = (lambda y: 0.1 * (y**2).sum(), lambda y, theta: 0.1 * (y**2).sum(), lambda y, *rest: 0.1 * (y**2).sum())
    X = np.array([[1.0, 0.5], [0.2, 2.0], [1.0, 1.0]])
    y = np.linalg.solve(X.T @ X + 0.2 * np.eye(2), X.T @ theta)
    truth = np.linalg.solve(X.T @ X + 0.2 * np.eye(2), X.T)
    for regularizer in forms:
        for given in ({}, {"jacobian": lambda y, theta: X}):
            made = LeastSquares(lambda y, theta: X @ y - theta, regularizer=regularizer, hessian=hessian, **given)
            np.testing.assert_allclose(implicit_jacobian(made, y, theta), truth, rtol=1e-6)
