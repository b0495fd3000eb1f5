"""FAULTS 69, 70 and 72: what people hand in, losses that do not use their arguments, data filled anew."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from conftest import JAX, PLAIN, assert_told, outcome

from implicitdiff import (
    BackendError,
    CallbackError,
    DerivativeError,
    Root,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
)

three = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
jax_only = pytest.mark.skipif(not JAX, reason="needs jax")
A = np.array([1.0, 2.0])


def square(y, t):
    return 0.5 * ((y - t) ** 2).sum()


# -- 72: empty, SciPy's results, pandas, lists -----------------------------------------------------------------------
@three
@pytest.mark.parametrize("solver", ["auto", "cg", "gmres"])
@pytest.mark.parametrize("given", ["both", "mixed_vjp", "mixed_jvp"])
def test_72_no_parameters_or_no_unknowns(lib, solver, given):
    full, empty = lib.array([1.0, 1.0]), lib.array([])
    for y, theta in ((full, empty), (empty, full)):
        mixed = {"mixed_vjp": lambda y, t, u: 0.0 * t, "mixed_jvp": lambda y, t, d: 0.0 * y}
        mixed = mixed if given == "both" else {given: mixed[given]}
        condition = Stationary(grad=lambda y, t: y - 1.0, hvp=lambda y, t, v: v, **mixed, verify=False)
        n, m = y.shape[0], theta.shape[0]
        assert implicit_vjp(condition, y, theta, y, solver=solver).shape == (m,)
        assert implicit_jacobian(condition, y, theta, solver=solver).shape == (n, m)
        if m or given != "mixed_vjp":
            assert implicit_jvp(condition, y, theta, theta, solver=solver).shape == (n,)


def test_72_results_of_scipy_and_pandas():
    result = scipy.optimize.minimize(square, np.zeros(2), args=(A,), tol=1e-10)
    assert_told(outcome(lambda: implicit_vjp(square, result, A, A)), BackendError, r"OptimizeResult[\s\S]*y\.x\.")
    root = scipy.optimize.root_scalar(lambda y: y * y - 2.0, bracket=(0, 2))
    condition = Root(lambda y, t: y * y - t)
    assert_told(outcome(lambda: implicit_vjp(condition, root, A, A)), BackendError, r"RootResults[\s\S]*y\.root\.")

    class Series:
        dtype, shape = np.dtype(float), (2,)

        def to_numpy(self):
            return A

    assert_told(outcome(lambda: implicit_vjp(square, A, Series(), A)), BackendError, r"theta\.to_numpy\(\)")


@three
def test_72_lists_of_numbers(lib):
    y = lib.array(A)
    condition = Stationary(grad=lambda y, t: y - t, hvp=lambda y, t, v: v, mixed_vjp=lambda y, t, u: -u)
    assert list(lib.numpy(implicit_vjp(condition, y, y, [1.0, 2]))) == [1.0, 2.0]
    assert list(lib.numpy(implicit_jvp(condition, y, y, (1.0, 2.0)))) == [1.0, 2.0]
    pairs = Root(lambda y, t: [y[0] - t[0], y[1] - 2.0 * t[1]])  # written for lists: they stay lists
    assert implicit_vjp(pairs, [1.0, 4.0], [1.0, 2.0], [1.0, 1.0]) == pytest.approx([1.0, 2.0])


def test_72_a_list_where_the_function_wants_an_array():
    found = outcome(lambda: implicit_vjp(square, [1.0, 2.0], [1.0, 2.0], [1.0, 1.0]))
    assert isinstance(found.error, TypeError)  # the user's own, from the user's line
    notes = getattr(found.error, "__notes__", ["y is a list"])
    assert any("y is a list" in note for note in notes)


@jax_only
def test_72_frameworks_mixed_are_explained():
    import jax.numpy as jnp

    told = r"written in jax, and y is an array of numpy"
    assert_told(outcome(lambda: implicit_vjp(lambda y, t: jnp.sum((y - t) ** 2), A, A, A)), CallbackError, told)
    assert_told(outcome(lambda: implicit_vjp(Root(lambda y, t: jnp.asarray(y - t)), A, A, A)), CallbackError, told)


# -- 69: a loss that does not use its arguments ----------------------------------------------------------------------
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_69_a_loss_of_the_enclosing_scope(lib):
    y, theta = lib.array(A), lib.array(A)
    condition = Stationary(grad=lambda y, t: y - t, hvp=lambda y, t, v: v, mixed_vjp=lambda y, t, u: -u)
    size = lib.xp.sum(y * y)
    found = outcome(lambda: implicit_grad(condition, lambda _, t: size, y, theta))
    assert_told(found, DerivativeError, "outer does not depend on y or theta")
    # a perfect fit: the gradient is exactly zero, and right
    found = outcome(lambda: implicit_grad(condition, lambda z, t: lib.xp.sum((z - y) ** 2), y, theta))
    assert found.quiet, found.text
    assert np.all(np.abs(lib.numpy(found.value)) < 1e-12)


@jax_only
def test_69_under_jit():
    import jax
    import jax.numpy as jnp

    def gradient(t):
        y = t**1.0
        return implicit_grad(square, lambda _, t: jnp.sum(y * y), y, t)

    assert_told(outcome(lambda: jax.jit(gradient)(jnp.asarray(A))), DerivativeError, "outer uses y")


# -- 70: data filled anew --------------------------------------------------------------------------------------------
@three
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_70_data_filled_anew_under_a_linearization(lib, solver):
    X, t = lib.array(np.diag([2.0, 4.0])), lib.array(A)
    condition = Stationary(
        grad=lambda y, t, X: X @ y - t, hvp=lambda y, t, v, X: X @ v, mixed_vjp=lambda y, t, u, X: -u
    )
    lin = linearize(condition, lib.array([0.5, 0.5]), t, args=(X,), solver=solver)
    first = lib.numpy(lin.vjp(lib.array([1.0, 1.0])))
    X *= 10.0
    assert np.allclose(first, [0.5, 0.25])
    assert np.allclose(lib.numpy(lin.vjp(lib.array([2.0, 2.0]))), [1.0, 0.5])
