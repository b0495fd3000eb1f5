"""JAX called eagerly: compiled once, again only where it has to be, and no function of the user's kept alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from frameworks import framework

from implicitdiff import (
    CG,
    DerivativeError,
    FixedPoint,
    NotASolutionWarning,
    Root,
    SingularError,
    SolveWarning,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)

if find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)

fw = framework("jax")
jax, jnp = fw.jax, fw.xp


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """Durations of the compilations since the start of the test."""
    found: list[float] = []

    def listen(key: str, duration: float, **_: Any) -> None:
        if key == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def objective(y: Any, theta: Any, shift: Any = 0.0) -> Any:
    return jnp.sum((y - theta**2 - shift) ** 2)


def squares() -> tuple[Any, Any]:
    theta = jnp.asarray([1.0, -2.0, 3.0])
    return theta**2, theta


def total(y: Any, theta: Any) -> Any:
    return jnp.sum(y)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda y, theta: implicit_grad(objective, total, y, theta, solver="cg"),
    "condition made anew": lambda y, theta: implicit_grad(Stationary(objective), total, y, theta),
    "solver with options": lambda y, theta: implicit_vjp(objective, y, theta, jnp.ones(3), solver=CG(rtol=1e-12)),
    "jacobian": lambda y, theta: implicit_jacobian(objective, y, theta),
    "data": lambda y, theta: implicit_vjp(objective, y + theta[0], theta, jnp.ones(3), args=(theta[0],)),
    "a float among the data": lambda y, theta: implicit_vjp(
        objective, y + float(theta[1]), theta, jnp.ones(3), args=(float(theta[1]),)
    ),
    "linearize": lambda y, theta: linearize(objective, y, theta).vjp(jnp.ones(3)),
    # transformed outside of jit: one program, too, and not each of its operations
    "vmap": lambda y, theta: jax.vmap(lambda y, t: implicit_vjp(objective, y, t, jnp.ones(())))(y, theta),
    "grad of vjp": lambda y, theta: jax.grad(lambda t: jnp.sum(implicit_vjp(objective, y, t, jnp.ones(3)) ** 2) / 4)(
        theta
    ),
    "grad of linear_solve": lambda y, theta: jax.grad(lambda b: jnp.sum(linear_solve(jnp.eye(3), b) ** 2))(theta),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", CALLS)
def test_compiled_once(way: str, compilations: list[float]) -> None:
    """A second call with other numbers compiles nothing."""
    y, theta = squares()
    first = CALLS[way](y, theta)
    assert np.allclose(first.sum(), 2 * theta.sum(), rtol=1e-8)
    theta = 2 * theta
    y, shifted = theta**2, theta[0] + 1.0
    jax.block_until_ready((y, shifted, y + shifted))
    compilations.clear()
    second = CALLS[way](y, theta)
    assert compilations == []
    assert np.allclose(second.sum(), 2 * theta.sum(), rtol=1e-8)


def test_gradient_of_a_wrapped_solver_is_compiled_once(compilations: list[float]) -> None:
    """``jax.grad`` outside of ``jit``, too."""
    solve = implicit_function(objective, solver="cg")(lambda theta: np.asarray(theta) ** 2)
    gradient = jax.grad(lambda theta: jnp.sum(solve(theta) ** 2))
    _, theta = squares()
    gradient(theta)
    twice = jax.block_until_ready(2 * theta)
    compilations.clear()
    found = gradient(twice)
    assert compilations == []
    assert np.allclose(found, 4 * np.asarray(twice) ** 3, rtol=1e-8)


@pytest.mark.slow
def test_functions_are_not_kept_alive() -> None:
    """The compiled program goes with the user's functions."""
    from implicitdiff.backends.jax import programs as jax_programs

    y, theta = squares()
    gc.collect()  # of other tests
    before = len(jax_programs._programs)

    def inner(y: Any, theta: Any) -> Any:
        return jnp.sum((y - theta**2) ** 2)

    def outer(y: Any, theta: Any) -> Any:
        return jnp.sum(y)

    implicit_grad(inner, outer, y, theta)
    linearize(inner, y, theta).jvp(theta)
    assert len(jax_programs._programs) > before
    alive = [weakref.ref(inner), weakref.ref(outer)]
    del inner, outer
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert len(jax_programs._programs) == before


class Model:
    """A condition that is a method, with data in an attribute."""

    def __init__(self, scale: float) -> None:
        self.scale = jnp.asarray(scale)

    def inner(self, y: Any, theta: Any) -> Any:
        return jnp.sum((y - self.scale * theta) ** 2)


def test_replaced_closure_is_seen() -> None:
    """What a function closes over may be replaced: the program is not that of the old one."""
    _, theta = squares()
    model = Model(2.0)
    assert np.allclose(implicit_vjp(model.inner, 2 * theta, theta, jnp.ones(3)), 2.0)
    model.scale = jnp.asarray(5.0)
    assert np.allclose(implicit_vjp(model.inner, 5 * theta, theta, jnp.ones(3)), 5.0)
    factor = 3.0

    def inner(y: Any, theta: Any) -> Any:
        return jnp.sum((y - factor * theta) ** 2)

    assert np.allclose(implicit_vjp(inner, 3 * theta, theta, jnp.ones(3)), 3.0)
    factor = 7.0
    assert np.allclose(implicit_vjp(inner, 7 * theta, theta, jnp.ones(3)), 7.0)


@pytest.mark.slow
def test_functions_that_are_partial_or_compiled() -> None:
    """Any callable will do: a partial, a compiled function, an object."""
    from functools import partial

    y, theta = squares()
    for condition in (partial(objective, shift=0.0), jax.jit(objective), Root(jax.jit(lambda y, t: y - t**2))):
        assert np.allclose(implicit_vjp(condition, y, theta, jnp.ones(3)), 2 * theta)


@pytest.mark.slow
def test_threads() -> None:
    """Eight threads, each with problems of its own."""
    _, theta = squares()

    def work(k: int) -> bool:
        scaled = (1.0 + k) * theta
        got = implicit_grad(objective, total, scaled**2, scaled, solver=CG(rtol=1e-12))
        if k > 4:  # a function of the thread's own has to be compiled
            return bool(np.allclose(got, 2 * scaled))
        own = implicit_vjp(lambda y, t: jnp.sum((y - k * t) ** 2), k * theta, theta, jnp.ones(3))
        return bool(np.allclose(got, 2 * scaled) and np.allclose(own, float(k)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(1, 17)))


@jax.tree_util.register_dataclass
@dataclass
class Weights:
    """A container that JAX knows."""

    slope: Any
    offset: Any


@pytest.mark.parametrize("solver", ["lu", "cg"])
def test_registered_dataclass(solver: str) -> None:
    """y and theta may be containers that are registered with JAX; messages name their leaves."""
    theta = Weights(jnp.asarray([1.0, 2.0]), jnp.asarray(3.0))
    y = Weights(theta.slope**2, theta.offset**2)

    def inner(y: Weights, theta: Weights) -> Any:
        return jnp.sum((y.slope - theta.slope**2) ** 2) + (y.offset - theta.offset**2) ** 2

    gradient = implicit_grad(inner, lambda y, t: jnp.sum(y.slope) + y.offset, y, theta, solver=solver)
    assert isinstance(gradient, Weights)
    assert np.allclose(gradient.slope, 2 * theta.slope)
    assert np.allclose(gradient.offset, 6.0)
    bad = Weights(theta.slope, jnp.asarray(np.nan))
    with pytest.raises(ValueError, match=r"theta\.offset holds NaN"):
        implicit_grad(inner, lambda y, t: y.offset, y, bad, solver=solver)


def test_not_a_solution_under_grad() -> None:
    """The gradient of a wrapped solver that found no solution warns, where it can."""
    solve = implicit_function(FixedPoint(lambda y, theta: jnp.cos(theta * y)))(lambda theta: jnp.ones(()))
    with pytest.warns(NotASolutionWarning, match="not a solution"):
        jax.grad(solve)(jnp.asarray(1.0))


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["grad", "jvp", pytest.param("jacrev", marks=pytest.mark.exhaustive)])
def test_failed_solve_is_told_by_an_eager_derivative(derivative: str) -> None:
    """JAX's own derivatives, taken with numbers, say why they are NaN, and do as on_failure says."""

    def flat(y: Any, theta: Any) -> Any:
        return jnp.sum((y[0] - theta) ** 2)

    def take(on_failure: str) -> Any:
        solve = implicit_function(flat, on_failure=on_failure)(lambda theta: jnp.stack([jnp.mean(theta), 0.0]))
        if derivative == "jvp":
            return jax.jvp(solve, (jnp.ones(2),), (jnp.ones(2),))[1]
        return (
            jax.grad(lambda t: solve(t).sum())(jnp.ones(2)) if derivative == "grad" else jax.jacrev(solve)(jnp.ones(2))
        )

    with pytest.raises(SingularError, match="singular"):
        take("raise")
    if derivative != "grad":
        return
    with pytest.warns(SolveWarning, match="SingularError"):
        assert np.all(np.isnan(take("warn")))
    assert np.all(np.isnan(take("nan")))


def test_derivative_of_aux_is_told() -> None:
    """What the solver returns beside y has no derivative: none is lost in silence, and none is asked for in vain."""
    _, theta = squares()
    solve = implicit_function(objective, has_aux=True)(lambda t: (t**2, {"total": jnp.sum(t), "steps": 3}))

    def loss(theta: Any, weight: Any) -> Any:
        y, aux = solve(theta)
        assert aux["steps"] == 3
        return jnp.sum(y) + (0 if weight is None else weight * aux["total"])

    assert np.allclose(jax.jit(lambda t: jax.grad(loss)(t, None))(theta), 2 * theta)
    with pytest.raises(DerivativeError, match="aux"):
        jax.grad(loss)(theta, 1.0)
    assert np.all(np.isnan(jax.jit(lambda t: jax.grad(loss)(t, 1.0))(theta)))


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_in_theta_is_nan_in_the_derivative(compiled: bool) -> None:
    """Also where neither A nor B sees theta, in both modes."""
    solve = implicit_function(lambda y, theta: jnp.sum((y - theta) ** 2))(lambda theta: theta)
    theta, ones = jnp.asarray([np.nan, 1.0]), jnp.ones(2)

    def both(theta: Any) -> Any:
        return jax.jvp(solve, (theta,), (ones,))[1], jax.grad(lambda t: solve(t)[1])(theta)

    for found in (jax.jit(both) if compiled else both)(theta):
        assert np.all(np.isnan(found))


def test_failed_solve_is_nan_under_jit() -> None:
    """No exception can be raised from a program: NaN, and the report says so."""

    def flat(y: Any, theta: Any) -> Any:
        return (y[0] - theta[0]) ** 2

    @jax.jit
    def gradient(y: Any, theta: Any) -> Any:
        return implicit_vjp(flat, y, theta, jnp.ones(2), return_report=True)

    value, report = gradient(jnp.ones(2), jnp.ones(2))
    assert np.all(np.isnan(value))
    assert not report.converged
    assert report.solver == "lu"


def test_single_precision_by_default() -> None:
    """With x64 off, everything is single precision, and accurate to it."""
    with jax.enable_x64(False):
        theta = jnp.asarray([1.0, -2.0, 3.0])
        assert theta.dtype == jnp.float32
        gradient, report = implicit_grad(objective, total, theta**2, theta, return_report=True)
        assert gradient.dtype == jnp.float32
        assert np.allclose(gradient, 2 * theta, rtol=1e-5)
        assert report.converged


@pytest.mark.slow
def test_parameters_in_leaves() -> None:
    """With products alone θ stays a tree, of which no vector is made."""
    theta, y, ones = {"a": jnp.ones(3), "b": 2 * jnp.ones(2)}, jnp.full(40, 12.0), jnp.ones(40)
    root = Root(lambda y, t: 2 * y - jnp.sum(t["a"]) * jnp.sum(t["b"] ** 2))
    g = implicit_vjp(root, y, theta, ones, solver="bicgstab")
    np.testing.assert_allclose(g["a"], 160.0, rtol=1e-6)
    np.testing.assert_allclose(g["b"], 240.0, rtol=1e-6)
    np.testing.assert_allclose(implicit_jvp(root, y, theta, theta, solver="bicgstab"), 36.0, rtol=1e-6)
    total = implicit_grad(root, lambda y, t: jnp.sum(y) + jnp.sum(t["a"]), y, theta, solver="bicgstab")
    np.testing.assert_allclose(total["a"], 161.0, rtol=1e-6)


@pytest.mark.slow
def test_equilibrium_layer_with_shared_weights() -> None:
    """Inside vmap the weights stay leaves, and a few products do where factors would be made for every item."""
    n, rng = 40, np.random.default_rng(0)
    w = rng.normal(size=(n, n))
    theta = {"w": jnp.asarray(0.7 * w / np.linalg.norm(w, 2)), "b": jnp.asarray(rng.normal(size=n))}
    x = jnp.asarray(rng.normal(size=(3, n)))

    def layer(z: Any, theta: Any, x: Any) -> Any:
        return jnp.tanh(theta["w"] @ z + x + theta["b"])

    def solved(theta: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 100, lambda _, z: layer(z, theta, x), 0 * x)

    found = jax.jit(
        lambda z, v: jax.tree.map(
            lambda g: g.sum(0),
            jax.vmap(lambda z, x, v: implicit_vjp(FixedPoint(layer), z, theta, v, args=(x,)))(z, x, v),
        )
    )
    z, v = jax.vmap(lambda x: solved(theta, x))(x), jnp.asarray(rng.normal(size=(3, n)))
    g, rows, slope = found(z, v), np.asarray(z), 1 - np.asarray(z) ** 2
    u = [np.linalg.solve((np.eye(n) - s[:, None] * theta["w"]).T, c) * s for s, c in zip(slope, v, strict=True)]
    np.testing.assert_allclose(g["b"], sum(u), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(g["w"], np.asarray(u).T @ rows, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_an_estimate_leaves_a_program() -> None:
    """With its parts, the correction and the polished y; of a batch, one of each."""
    y, theta = jnp.array([1.01, 2.02]), jnp.array([1.0, 2.0])
    objective = lambda y, t: jnp.sum(y**4 / 4 - t**3 * y)
    ask = lambda y, t: implicit_grad(
        objective, lambda y, t: jnp.sum(y**2), y, t, error=True, return_report=True, on_failure="ignore"
    )
    exact = 2 * theta  # y = θ
    gradient, report = jax.jit(ask)(y, theta)
    error = report.error
    assert float(error.absolute) == pytest.approx(float(jnp.linalg.norm(gradient - exact)), rel=0.2)
    assert set(error.parts) >= {"inner solution", "linear solve"}
    assert jnp.linalg.norm(gradient - error.correction - exact) < 0.1 * error.absolute
    _, many = jax.vmap(ask)(jnp.stack([y, theta]), jnp.stack([theta, theta]))
    assert many.error.absolute.shape == (2,)
    assert many.error.absolute[1] < 1e-9 < many.error.absolute[0]
