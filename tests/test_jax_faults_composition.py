"""FAULTS 38 to 54 on JAX: what functions see, transformations, threads, callbacks, wrapped solvers, Ctrl-C."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import SOLVERS, assert_told, outcome
from helpers_jax import jax, jnp, quickly

from implicitdiff import (
    GMRES,
    CallbackError,
    DerivativeError,
    ImplicitDiffError,
    NotASolutionWarning,
    Root,
    ShapeError,
    SolveError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)

ONE = jnp.ones(3)
K = jnp.asarray([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.0, 0.3, 4.0]])
MIXED = Root(lambda y, th: K @ y + y**3 - th**2)


def newton(theta: Any) -> Any:
    """Solve K y + y³ = θ²."""
    y = 0.2 * theta
    for _ in range(12):
        y = y - jnp.linalg.solve(K + jnp.diag(3 * y**2), K @ y + y**3 - theta**2)
    return y


solved = implicit_function(MIXED)(newton)


# -- 38 and 40: memory ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", quickly(SOLVERS))
def test_40_one_array_for_everything(solver: str) -> None:
    cube = Root(lambda y, th: y**3 - th)
    before = np.array(ONE)
    for call in (implicit_vjp, implicit_jvp):
        np.testing.assert_allclose(call(cube, ONE, ONE, ONE, x0=ONE, solver=solver), ONE / 3, rtol=1e-7)
    identity = implicit_function(Root(lambda y, th: y - th), solver=solver)(lambda theta: theta)
    np.testing.assert_allclose(jax.jacobian(identity)(ONE), np.eye(3), rtol=1e-9)
    np.testing.assert_array_equal(ONE, before)


def test_38_numpy_vectors_of_any_layout() -> None:
    v = np.arange(6.0)[::-2]
    v.flags.writeable = False
    cube = Root(lambda y, th: y**3 - th)
    for vector in (v, np.broadcast_to(2.0, (3,)), np.asfortranarray(np.ones((3, 3)))[:, 1]):
        np.testing.assert_allclose(implicit_vjp(cube, ONE, ONE, vector), vector / 3, rtol=1e-8)


# -- what functions see: a program is compiled once, and must not outlive it -----------------------------------------
STATE: dict[str, Any] = {"global": 2.0, "entries": {"k": [2.0]}, "array": np.full(3, 2.0)}
LEVEL = 2.0


def by_global(y: Any, theta: Any) -> Any:
    return LEVEL * y - theta


def by_default(y: Any, theta: Any, k: Any = 2.0) -> Any:
    return k * y - theta


class Scaled:
    """A callable with data in an attribute."""

    def __init__(self) -> None:
        self.k = 2.0

    def __call__(self, y: Any, theta: Any) -> Any:
        return self.k * y - theta


def _changes() -> dict[str, tuple[Callable[..., Any], Callable[[], Any]]]:
    """Functions of which what they see is 2.0, and how it becomes 4.0."""
    array, entries, model, held = np.full(3, 2.0), {"k": [2.0]}, Scaled(), {"k": 2.0}
    inner = lambda y: entries["k"][0] * y
    return {
        "global": (by_global, lambda: globals().update(LEVEL=4.0)),
        "default": (by_default, lambda: setattr(by_default, "__defaults__", (4.0,))),
        "array in place": (lambda y, th: array * y - th, lambda: array.fill(4.0)),
        "entry": (lambda y, th: entries["k"][0] * y - th, lambda: entries["k"].__setitem__(0, 4.0)),
        "function within": (lambda y, th: inner(y) - th, lambda: entries.update(k=[4.0])),
        "attribute": (model, lambda: setattr(model, "k", 4.0)),
        "partial": (functools.partial(lambda held, y, th: held["k"] * y - th, held), lambda: held.update(k=4.0)),
        "entry of a global": (lambda y, th: STATE["global"] * y - th, lambda: STATE.update({"global": 4.0})),
    }


@pytest.mark.parametrize("name", _changes())
def test_49_what_a_function_sees_has_changed(name: str) -> None:
    fun, change = _changes()[name]
    condition = Root(fun)
    np.testing.assert_allclose(implicit_vjp(condition, ONE, 2 * ONE, ONE), np.full(3, 0.5))
    change()
    np.testing.assert_allclose(implicit_vjp(condition, ONE, 4 * ONE, ONE), np.full(3, 0.25))


def test_49_a_captured_value_that_is_differentiated() -> None:
    """Derivatives reach through a closure as they do in JAX, or JAX refuses; they are never zero."""

    def loss(k: Any) -> Any:
        return jnp.sum(implicit_vjp(Root(lambda y, th: k * y - th), ONE, 2 * ONE, ONE))

    assert float(jax.jit(jax.grad(loss))(2.0)) == pytest.approx(-3 / 4)

    def captured(theta: Any) -> Any:
        return jnp.sum(implicit_function(Root(lambda y, th: y - theta))(lambda th: th)(ONE))

    found = outcome(lambda: jax.grad(captured)(ONE))
    assert_told(found, DerivativeError, "enclosing scope.*differentiating")

    def mapped(theta: Any) -> Any:
        return jnp.sum(jax.vmap(lambda t: implicit_function(Root(lambda y, th: y - t))(lambda th: th)(ONE[0]))(theta))

    assert_told(outcome(lambda: jax.jit(jax.grad(mapped))(ONE)), DerivativeError, "enclosing scope.*differentiating")
    kept = lambda theta: captured(jax.lax.stop_gradient(theta))
    np.testing.assert_array_equal(jax.grad(kept)(ONE), np.zeros(3))


# -- 47 and 48: transformations ------------------------------------------------------------------------------------
def loss(solve: Callable[..., Any], theta: Any) -> Any:
    """A loss in which the solution stands beside other terms: none may be dropped."""
    y = solve(theta)
    return jnp.sum(y**2) + jnp.sum(theta**3) + jnp.sum(y * theta**2)


THETA = jnp.asarray([1.0, 2.0, 1.5])
MANY = jnp.stack([THETA, 2 * THETA, THETA - 0.5])
TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "grad": lambda f: jax.grad(f)(THETA),
    "jit": lambda f: jax.jit(jax.grad(f))(THETA),
    "hessian": lambda f: jax.hessian(f)(THETA),
    "jit hessian": lambda f: jax.jit(jax.hessian(f))(THETA),
    "reverse twice": lambda f: jax.jacrev(jax.grad(f))(THETA),
    "third order": lambda f: jax.jacfwd(jax.hessian(f))(THETA),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(MANY),
    "grad of vmap": lambda f: jax.grad(lambda t: jnp.sum(jax.vmap(f)(t) ** 2))(MANY),
    "jit grad of vmap": lambda f: jax.jit(jax.grad(lambda t: jnp.sum(jax.vmap(f)(t))))(MANY),
    "scan": lambda f: jax.lax.scan(lambda c, t: (c, jax.grad(f)(t)), 0.0, MANY)[1],
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(THETA),
    "jvp": lambda f: jax.jvp(f, (THETA,), (ONE,))[1],
}


LONG = {"third order", "jit hessian", "reverse twice", "checkpoint", "jit grad of vmap", "vmap of grad"}  # to compile


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LONG)) for name in TRANSFORMS]
)
def test_47_48_transformations(name: str) -> None:
    transform = TRANSFORMS[name]
    truth = transform(functools.partial(loss, newton))  # through the iterations
    np.testing.assert_allclose(transform(functools.partial(loss, solved)), truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["grad", "vmap of grad", pytest.param("jit hessian", marks=pytest.mark.exhaustive)])
def test_48_solver_outside_of_jax(name: str) -> None:
    outside = implicit_function(MIXED)(lambda theta: np.array(newton_in_numpy(np.asarray(theta))))
    transform = TRANSFORMS[name]
    truth = transform(functools.partial(loss, newton))
    np.testing.assert_allclose(transform(functools.partial(loss, outside)), truth, rtol=1e-7, atol=1e-9)


def newton_in_numpy(theta: np.ndarray) -> np.ndarray:
    k, y = np.asarray(K), 0.2 * theta
    for _ in range(12):
        y = y - np.linalg.solve(k + np.diag(3 * y**2), k @ y + y**3 - theta**2)
    return y


@pytest.mark.parametrize("solver", quickly(SOLVERS))
@pytest.mark.parametrize("traced", [False, True])
def test_48_failures_are_told_or_nan(solver: str, traced: bool) -> None:
    flat = Stationary(lambda y, th: (y[0] - y[1]) ** 2 + y[2] ** 2 - y @ th)
    wrapped = implicit_function(flat, solver=solver)(lambda theta: jnp.zeros(3))
    gradient = jax.grad(lambda t: wrapped(t)[0])
    if not traced:  # with numbers at hand it is told why
        with pytest.raises(SolveError, match=r"singular|positive definite"):
            gradient(jnp.zeros(3))
        return
    found = jax.jit(gradient)(jnp.zeros(3))
    assert np.all(np.isnan(found)), f"silently wrong: {found}"


def test_48_not_a_solution_is_told_eagerly() -> None:
    wrapped = implicit_function(MIXED)(lambda theta: newton(theta) + 0.1)
    assert_told(outcome(lambda: jax.grad(lambda t: jnp.sum(wrapped(t)))(THETA)), NotASolutionWarning, "not a solution")


# -- 50: threads ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_50_eight_threads(shared: bool) -> None:
    barrier, lin = threading.Barrier(8), linearize(MIXED, newton(THETA), THETA)
    truth = np.asarray(jax.jacobian(newton)(THETA))

    def work(i: int) -> float:
        own = Root(lambda y, th: K @ y + y**3 - th**2)
        here = lin if shared else linearize(own, newton(THETA), THETA)
        barrier.wait(timeout=120)
        scale, worst = float(i + 1), 0.0
        for _ in range(3):
            if i % 2:
                worst = max(worst, float(jnp.max(jnp.abs(here.vjp(scale * ONE) - scale * truth.sum(0)))))
            else:
                worst = max(worst, float(jnp.max(jnp.abs(here.jvp(scale * ONE) - scale * truth.sum(1)))))
        return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) < 1e-8


# -- 51 and 52: callbacks ------------------------------------------------------------------------------------------
class UsersOwnError(RuntimeError):
    pass


GOOD = {"grad": lambda y, th: y - th, "hvp": lambda y, th, v: v, "mixed_vjp": lambda y, th, u: -u}


def ask(name: str, callback: Callable[..., Any]) -> Any:
    """Call with one callback replaced."""
    if name == "outer":
        return implicit_grad(MIXED, callback, newton(THETA), THETA)
    if name == "solver":
        return implicit_function(MIXED)(callback).vjp(THETA, ONE)
    if name == "A":
        return linear_solve(callback, ONE, symmetric=True)
    if name == "preconditioner":
        return implicit_vjp(MIXED, newton(THETA), THETA, ONE, solver=GMRES(preconditioner=(callback, callback)))
    condition = Root(callback) if name == "fun" else Stationary(**{**GOOD, name: callback})
    return implicit_vjp(condition, ONE, ONE, ONE)


CALLBACKS = ("fun", "grad", "hvp", "mixed_vjp", "outer", "solver", "A", "preconditioner")


@pytest.mark.parametrize("name", CALLBACKS)
def test_51_callback_raises(name: str) -> None:
    def user_function_that_raises(*args: Any) -> Any:
        raise UsersOwnError("oh")

    with pytest.raises(UsersOwnError) as caught:
        ask(name, user_function_that_raises)
    assert any(f.name == "user_function_that_raises" for f in traceback.extract_tb(caught.value.__traceback__))


@pytest.mark.parametrize("value", [None, 1.0, (ONE, ONE), "1.0", jnp.ones(7), jnp.ones((3, 1))], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "solver"])
def test_52_wrong_return(name: str, value: Any) -> None:
    if name == "outer" and type(value) is float:
        pytest.skip("a scalar it is")
    found = outcome(lambda: ask(name, lambda *args: value))
    assert_told(found, (CallbackError, ShapeError), rf"(?s)^{name} returned .*Expected|preconditioner.*returned")


# -- 53 and 54 -----------------------------------------------------------------------------------------------------
SOLVED = {
    "None": None, "pair": (ONE, {"nfev": 3}), "number beside it": (ONE, 3), "string": "solved", "object": object(),
    "longer": jnp.ones(4), "column": jnp.ones((3, 1)), "NaN": ONE * np.nan,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["vjp", "jvp", "grad"])
@pytest.mark.parametrize("result", SOLVED)
def test_53_wrapped_solver_returns_the_wrong_thing(result: str, mode: str) -> None:
    wrapped = implicit_function(MIXED)(lambda theta: SOLVED[result])
    if mode == "grad":
        found = outcome(lambda: jax.grad(lambda t: jnp.sum(wrapped(t)))(THETA))
    else:
        found = outcome(lambda: getattr(wrapped, mode)(THETA, ONE))
    if result == "NaN" and mode == "grad":  # a failed item is NaN there
        assert found.error or np.all(np.isnan(found.value))
        return
    assert found.error is not None, found.value
    if result in {"longer", "column"}:  # the user's own function does not take it: JAX names the shapes
        assert "(3,)" in found.text or "(3, 1)" in found.text
    elif mode != "grad":
        assert isinstance(found.error, ImplicitDiffError)
        assert ("has_aux" in found.text) or result in {"None", "string", "object", "NaN"}


@pytest.mark.parametrize("name", ["fun", "hvp", "outer", "solver"])
def test_54_ctrl_c(name: str) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(name, interrupted)
    np.testing.assert_allclose(ask("hvp", GOOD["hvp"]), ONE)  # and the next call works
