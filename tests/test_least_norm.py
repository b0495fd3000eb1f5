"""The derivative of the solution of least norm, against differences of ``numpy.linalg.lstsq``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, STRICT, TORCH, Library

from implicitdiff import (
    DerivativeError,
    LeastSquares,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
)

rng = np.random.default_rng(0)
LEFT, RIGHT = rng.normal(size=(2, 7, 2)), rng.normal(size=(2, 2, 5))
DATA = rng.normal(size=(2, 7))
T = np.array([0.3, -0.2])


def matrix(t: Any) -> Any:
    """Seven rows, five columns, rank two; its null space turns with both parameters."""
    return (LEFT[0] + t[0] * LEFT[1]) @ (RIGHT[0] + t[1] * RIGHT[1])


def solution(t: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(matrix(t), DATA[0] + t[0] * t[1] * DATA[1], rcond=1e-10)[0]


def differences() -> np.ndarray:
    h = 1e-5
    return np.stack([(solution(T + h * e) - solution(T - h * e)) / (2 * h) for e in np.eye(2)], axis=-1)


def residual_in(lib: Library) -> Callable[[Any, Any], Any]:
    (a, b), (c, d), (e, f) = ([lib.array(x) for x in pair] for pair in (LEFT, RIGHT, DATA))
    return lambda y, t: (a + t[0] * b) @ ((c + t[1] * d) @ y) - e - t[0] * t[1] * f


@pytest.mark.slow(on=("jax", "array_api_strict"))
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
@pytest.mark.parametrize(
    ("lib", "solver"),
    [(lib, name) for lib in (NUMPY, *TORCH) for name in ("auto", "lsmr", "lu", "minres")]
    + [(lib, "auto") for lib in (STRICT, *JAX)],
    ids=lambda x: getattr(x, "name", x),
)
def test_least_squares(lib: Library, solver: str, hessian: Any) -> None:
    given = {"jacobian": lambda y, t: matrix(t)} if lib.name == "numpy" else {}
    line = LeastSquares(residual_in(lib), hessian=hessian, singular="minimum-norm", **given)
    y, t, expected = lib.array(solution(T)), lib.array(T), differences()
    v = np.arange(5.0)
    found = implicit_jvp(line, y, t, lib.array([1.0, 2.0]), solver=solver)
    np.testing.assert_allclose(lib.numpy(found), expected @ [1.0, 2.0], rtol=1e-6, atol=1e-7)
    found = implicit_vjp(line, y, t, lib.array(v), solver=solver)
    np.testing.assert_allclose(lib.numpy(found), v @ expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_quadratic_and_what_is_made_of_it(lib: Library) -> None:
    r = residual_in(lib)
    energy = Stationary(lambda y, t: lib.xp.sum(r(y, t) ** 2) / 2, singular="minimum-norm")
    y, t, expected = lib.array(solution(T)), lib.array(T), differences()
    np.testing.assert_allclose(lib.numpy(implicit_jacobian(energy, y, t)), expected, rtol=1e-6, atol=1e-7)
    w = lib.array(np.arange(5.0))
    found = implicit_grad(energy, lambda y, t: lib.xp.sum(w * y) + t[0], y, t)
    np.testing.assert_allclose(lib.numpy(found), np.arange(5.0) @ expected + [1.0, 0.0], rtol=1e-6, atol=1e-7)


def test_the_other_things_that_are_meant() -> None:
    """Beside the solution of least norm, and where A depends on y, it is −A⁺B."""
    line = LeastSquares(residual_in(NUMPY), singular="minimum-norm")
    M, y = matrix(T), solution(T)
    null = np.linalg.svd(M)[2][-1]
    J = implicit_jacobian(line, y + null, T)
    assert np.abs(null @ J).max() < 1e-6
    assert np.abs(null @ implicit_jacobian(line, y, T)).max() > 0.05
    fold = LeastSquares(lambda y, t: np.stack([(y[0] + t[1] * y[1]) ** 2 - t[0]]), singular="minimum-norm")
    t = np.array([4.0, 0.5])
    y = 2.0 * np.array([1.0, 0.5]) / 1.25
    J = implicit_jacobian(fold, y, t)
    assert np.abs(np.array([-0.5, 1.0]) @ J).max() < 1e-5


@pytest.mark.slow
def test_derivatives_by_the_frameworks() -> None:
    torch = pytest.importorskip("torch")
    lib = next(lib for lib in PLAIN if lib.name == "torch")
    follow = implicit_function(LeastSquares(residual_in(lib), singular="minimum-norm"))(
        lambda t: lib.array(solution(lib.numpy(t)))
    )
    t = lib.array(T).requires_grad_()
    follow(t).sum().backward()
    np.testing.assert_allclose(lib.numpy(t.grad), differences().sum(axis=0), rtol=1e-6, atol=1e-7)
    with pytest.raises(DerivativeError, match="not differentiated again"):
        torch.autograd.grad(follow(t).sum(), t, create_graph=True)
    for lib in JAX:
        import jax

        chased = implicit_function(LeastSquares(residual_in(lib), singular="minimum-norm"))(
            lambda t: np.asarray(solution(np.asarray(t)))
        )
        found = jax.jit(jax.grad(lambda t, chased=chased: chased(t).sum()))(lib.array(T))
        np.testing.assert_allclose(lib.numpy(found), differences().sum(axis=0), rtol=1e-6, atol=1e-7)
