"""FAULTS 74: functions with a ``custom_vjp`` inside of a condition. Only their reverse products exist."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from frameworks import framework

from implicitdiff import (
    DerivativeError,
    FixedPoint,
    Root,
    Stationary,
    implicit_function,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
)

if find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)

fw = framework("jax")
jax, jnp = fw.jax, fw.xp


@jax.custom_vjp
def square(x: Any) -> Any:
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * u,))


@jax.custom_vjp
def opaque(x: Any) -> Any:
    return x**2


# linear in u, and JAX does not know it: it cannot be transposed
opaque.defvjp(lambda x: (x**2, x), lambda x, u: (2 * x * jnp.sign(u) * jnp.abs(u),))

W = jnp.array([[2.0, 0.3], [-0.1, 1.5]])
THETA, Y = jnp.array([1.0, 2.0]), jnp.array([0.7, 1.2])
SHIFT = W @ Y + Y**2 / 4 - THETA**2
ONES = jnp.ones(2)
TRUTH = np.linalg.solve(np.asarray(W + jnp.diag(Y / 2)), np.diag(2 * np.asarray(THETA)))
"""dy/dθ of W y + y²/4 = θ² + shift."""


def residual(y: Any, theta: Any, rule: Any = square) -> Any:
    return W @ y + rule(y) / 4 - rule(theta) - SHIFT


def by_other_rule(y: Any, theta: Any) -> Any:
    return residual(y, theta, opaque)


CONDITIONS = {
    "root": Root(residual),
    "rule that cannot be transposed": Root(by_other_rule),
    "fixed point": FixedPoint(lambda y, theta: y - residual(y, theta) / 2),
    "Jacobian given": Root(residual, jacobian=lambda y, theta: W + jnp.diag(y / 2)),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_forward_and_reverse(kind: str) -> None:
    condition = CONDITIONS[kind]
    solver = "gmres" if kind == "root" else "lu"
    assert np.allclose(implicit_jvp(condition, Y, THETA, ONES, solver=solver), TRUTH @ ONES, rtol=1e-9)
    assert np.allclose(implicit_vjp(condition, Y, THETA, ONES, solver=solver), ONES @ TRUTH, rtol=1e-9)


@pytest.mark.slow
def test_dense_jacobian_of_trees() -> None:
    """Leaves that are kept apart, and a Jacobian of all of them."""
    condition = Root(lambda y, theta: {"a": jax.vmap(residual, (0, None))(y["a"], theta)})
    y = {"a": jnp.tile(Y, (20, 1))}
    assert np.allclose(implicit_jvp(condition, y, THETA, ONES, solver="gmres")["a"], TRUTH @ ONES, rtol=1e-9)
    assert np.allclose(implicit_jacobian(condition, y, THETA)["a"], TRUTH, rtol=1e-9)


@pytest.mark.slow
def test_symmetric() -> None:
    """A gradient with such a rule: the Hessian is symmetric, and reverse products do."""
    ridge = Stationary(grad=lambda y, theta: square(y) * y + 2 * y - theta)
    y = jnp.array([0.5, -1.0])
    want = 1 / np.asarray(3 * y**2 + 2)
    for solver in ("cg", "cholesky"):
        assert np.allclose(implicit_vjp(ridge, y, y**3 + 2 * y, ONES, solver=solver), want, rtol=1e-9)


def test_wrapped_solver() -> None:
    """Through JAX's own derivatives, in both directions, under a map and compiled."""
    solve = implicit_function(Root(residual))(lambda theta: jax.lax.stop_gradient(Y) + 0 * theta)
    assert np.allclose(jax.jit(jax.jacrev(solve))(THETA), TRUTH, rtol=1e-9)
    assert np.allclose(jax.jacfwd(solve)(THETA), TRUTH, rtol=1e-9)
    many = jax.vmap(jax.grad(lambda theta: solve(theta).sum()))
    assert np.allclose(many(jnp.stack([THETA, THETA])), ONES @ TRUTH, rtol=1e-9)


def test_second_derivative_in_forward_mode_is_explained() -> None:
    """`jax.hessian` is forward over reverse; reverse over reverse is there."""
    solve = implicit_function(Root(residual))(lambda theta: jax.lax.stop_gradient(Y) + 0 * theta)
    with pytest.raises(DerivativeError, match=r"custom_vjp.*\n.*\n.*jacrev"):
        jax.hessian(lambda theta: solve(theta).sum())(THETA)
