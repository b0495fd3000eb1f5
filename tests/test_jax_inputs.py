"""FAULTS 73: what JAX takes for an array is one here: NumPy's arrays and scalars, Python's numbers, typed literals."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from frameworks import framework

from implicitdiff import BackendError, implicit_function, implicit_jvp, implicit_vjp, linear_solve, linearize

if find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)

fw = framework("jax")
jax, jnp = fw.jax, fw.xp

THETA = np.array([1.0, -2.0])


def squares(y: Any, theta: Any, scale: Any = 1.0) -> Any:
    return ((y - scale * theta**2) ** 2).sum()


def product(y: Any, theta: Any) -> Any:
    return (y - theta[0] * theta[1]) ** 2


ONES = np.ones(2)
MIXTURES: dict[str, Callable[[], Any]] = {
    "y": lambda: implicit_vjp(squares, THETA**2, jnp.asarray(THETA), ONES),
    "theta": lambda: implicit_vjp(squares, jnp.asarray(THETA) ** 2, THETA, jnp.ones(2)),
    "cotangent": lambda: implicit_vjp(squares, THETA**2, THETA, jnp.ones(2)),
    "tangent": lambda: implicit_jvp(squares, THETA**2, THETA, jnp.ones(2)),
    "args": lambda: implicit_vjp(squares, THETA**2, THETA, ONES, args=(jnp.asarray(1.0),)),
    "linearize": lambda: linearize(squares, THETA**2, jnp.asarray(THETA)).vjp(ONES),
    "under jit": lambda: jax.jit(lambda t: implicit_vjp(squares, THETA**2, t, ONES))(THETA),
}


@pytest.mark.parametrize("which", MIXTURES)
def test_numpy_beside_jax(which: str) -> None:
    """NumPy's arrays beside JAX's are JAX's; the derivative of θ² is 2 θ."""
    got = MIXTURES[which]()
    assert isinstance(got, jax.Array)
    assert np.allclose(got, 2 * THETA, rtol=1e-12)


def test_numbers_in_a_tree() -> None:
    """Python floats, NumPy scalars and arrays of no axis, in one tree."""
    for a, b in ((jnp.asarray(2.0), 3.0), (np.float64(2.0), jnp.asarray(3.0)), (np.asarray(2.0), jnp.asarray(3.0))):
        got = implicit_vjp(product, np.float64(6.0), (a, b), 1.0)
        assert np.allclose(got, (3.0, 2.0), rtol=1e-12)


def test_numpy_alone_stays_with_numpy() -> None:
    """JAX that is loaded does not take what is wholly NumPy's."""
    assert type(implicit_vjp(squares, THETA**2, THETA, ONES)) is np.ndarray
    assert type(linear_solve(np.eye(2), ONES)) is np.ndarray
    assert isinstance(linear_solve(jnp.eye(2), ONES), jax.Array)


def test_other_frameworks_do_not_mix() -> None:
    """JAX takes NumPy's arrays, and nobody else's."""
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match=r"y is a torch array, theta a jax array"):
        implicit_vjp(squares, torch.ones(2), jnp.ones(2), jnp.ones(2))
    with pytest.raises(BackendError, match=r"torch"):
        implicit_vjp(squares, (torch.ones(2), np.ones(2)), jnp.ones(2), jnp.ones(2))


@jax.custom_vjp
def solved(theta: Any) -> Any:
    return theta[0] * theta[1]


def _pull(theta: Any, cotangent: Any) -> Any:
    return (implicit_vjp(product, np.float64(6.0), theta, cotangent),)


solved.defvjp(lambda theta: (solved(theta), theta), _pull)


@pytest.mark.slow
def test_typed_literals() -> None:
    """What JAX hands to a rule for the number that it was given is a literal with a dtype, and no array of its own."""
    gradient = jax.grad(solved)
    assert np.allclose(gradient((2.0, 3.0)), (3.0, 2.0))
    for transform in (jax.jit, jax.vmap):
        by_first = transform(lambda a: gradient((a, 3.0))[0])
        assert np.allclose(by_first(jnp.full(2, 2.0) if transform is jax.vmap else 2.0), 3.0)


@pytest.mark.slow
def test_numpy_under_vmap() -> None:
    """Some of theta is mapped, some is NumPy's, and y, too."""
    many = jax.vmap(lambda a: implicit_vjp(product, np.float64(6.0), (a, np.float64(3.0)), np.float64(1.0)))
    assert np.allclose(many(jnp.full(4, 2.0)), np.array([[3.0], [2.0]]))


@pytest.mark.slow
def test_wrapped_solver_of_numbers() -> None:
    """A wrapped solver at a number of Python, at a NumPy array, with NumPy data."""
    solve = implicit_function(squares)(lambda theta, scale=1.0: scale * theta**2)
    assert np.allclose(jax.grad(lambda t: solve(t, np.float64(2.0)).sum())(THETA), 4 * THETA)
    assert np.allclose(jax.jvp(solve, (THETA,), (ONES,))[1], 2 * THETA)
