"""Projected and proximal fixed points in batches, under the frameworks' transformations, and with faults."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, outcome
from frameworks import EACH, framework
from helpers_proximal import (
    CASES,
    EVERY,
    LINEAR,
    STEP,
    Q,
    V,
    arguments,
    condition,
    objective,
    off,
    solve,
    truth,
    xp_of,
)

from implicitdiff import (
    DerivativeError,
    InputError,
    NotASolutionWarning,
    NotSymmetricError,
    ProjectedGradient,
    ProximalGradient,
    RegularityWarning,
    SolveError,
    implicit_function,
    implicit_vjp,
    projections,
    proxes,
)


# -- batches -----------------------------------------------------------------------------------------
@pytest.mark.slow(on=("jax", "array_api_strict"))
@EVERY
@pytest.mark.parametrize("case", ["lasso", "simplex", "group lasso"])
@pytest.mark.parametrize("restrict", [None, True])
def test_batches(lib: Library, case: str, restrict: bool | None) -> None:
    """Items with supports of different sizes are as good as one by one."""
    ts = np.array([0.5, 1.0, 2.0]) * CASES[case][1]
    y = np.stack([solve(case, LINEAR, t) for t in ts])
    assert case != "lasso" or len({(row != 0).sum() for row in y}) > 1
    P = CASES[case][0]
    per_item = lib.per_item or lib.name == "jax"

    def f(y: Any, theta: Any, Q: Any) -> Any:
        return 0.5 * xp_of(y).sum(y * (y @ Q), axis=-1) - xp_of(y).sum(theta["q"] * y, axis=-1)

    def number(theta: Any) -> Any:
        return theta["t"] if per_item or CASES[case][2] is False or case == "group lasso" else theta["t"][:, None]

    if case == "group lasso" and not per_item:
        pytest.skip("one penalty for each item and group is not what the function takes")
    if CASES[case][2]:
        c: Any = ProximalGradient(f, lambda x, theta, step: P(x, number(theta), step), step=STEP, restrict=restrict)
    else:
        c = ProjectedGradient(f, lambda x, theta: P(x, number(theta), 1.0), step=STEP, restrict=restrict)
    theta = {"q": lib.array(np.stack([LINEAR] * 3)), "t": lib.array(ts)}
    g, report = implicit_vjp(
        c, lib.array(y), theta, lib.array(np.stack([V] * 3)), args=(lib.array(Q),), batched=True, return_report=True
    )
    assert all(np.asarray(report.converged))
    for i, t in enumerate(ts):
        one = implicit_vjp(condition(case), y[i], {"q": LINEAR, "t": np.array(t)}, V, args=(Q,))
        assert off(lib.numpy(g["q"])[i], one["q"]) <= 1e-6
        assert abs(lib.numpy(g["t"])[i] - one["t"]) <= 1e-6


# -- the frameworks' own derivatives -----------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(
    ("case", "restrict"),
    [("lasso", None), ("lasso", True), ("simplex", True), ("box", None), ("group lasso", True), ("ball", None)],
)
def test_native_derivatives(name: str, case: str, restrict: bool | None) -> None:
    """Gradient and second derivative of a loss through the solver, by the framework's own transformations."""
    fw = framework(name)
    t0, h = CASES[case][1], 1e-4
    Qf = fw.xp.asarray(Q)
    P, is_prox = CASES[case][0], CASES[case][2]

    def f(y: Any, theta: Any) -> Any:
        return objective(y, theta, Qf)

    def prox(x: Any, theta: Any, step: float) -> Any:
        return P(x, theta["t"], step)

    c = (
        ProximalGradient(f, prox, step=STEP, restrict=restrict)
        if is_prox
        else ProjectedGradient(f, lambda x, theta: prox(x, theta, 1.0), step=STEP, restrict=restrict)
    )
    solver = implicit_function(c)(lambda theta: solve(case, np.asarray(theta["q"]), float(theta["t"])))
    q = fw.xp.asarray(LINEAR)

    def loss(t: Any) -> Any:
        y = solver({"q": q, "t": t})
        return (y * y * fw.xp.asarray(V)).sum()

    def plain(t: float) -> float:
        return float((solve(case, LINEAR, t) ** 2) @ V)

    t = fw.xp.asarray(np.asarray(t0))
    first = (plain(t0 + h) - plain(t0 - h)) / (2 * h)
    second = (plain(t0 + h) - 2 * plain(t0) + plain(t0 - h)) / h**2
    np.testing.assert_allclose(fw.numpy(fw.gradient(loss)(t)), first, rtol=1e-6)
    np.testing.assert_allclose(fw.numpy(fw.transforms()["hessian"](loss)(t)), second, rtol=1e-4, atol=1e-5)
    if name == "jax":
        np.testing.assert_allclose(fw.numpy(fw.compiled_gradient(loss)(t)), first, rtol=1e-6)


def test_jax_tells_a_theta_in_a_closure() -> None:
    """Neither f nor the projection sees theta: nothing could be told once the program runs."""
    jax = framework("jax").jax
    q, Qf = jax.numpy.asarray(LINEAR), jax.numpy.asarray(Q)
    y = jax.numpy.asarray(truth("simplex")[0])
    onto = ProjectedGradient(lambda y, theta: objective(y, {"q": q}, Qf), lambda x, theta: projections.simplex(x))
    with pytest.raises(DerivativeError, match="does not depend on theta"):
        jax.jit(lambda theta: implicit_vjp(onto, y, theta, jax.numpy.asarray(V)))(q)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_one_of_the_two_may_do_without_theta(lib: Library) -> None:
    """The penalty is a constant, or f is: both are fine."""
    y, theta, data = arguments(lib, "lasso")
    _, by_q, by_t = truth("lasso")
    fixed = ProximalGradient(objective, lambda x, theta, step: proxes.lasso(x, 1.0, step), step=STEP)
    assert off(lib.numpy(implicit_vjp(fixed, y, theta, lib.array(V), **data)["q"]), by_q.T @ V) <= 1e-6
    q = lib.array(LINEAR)
    only = ProximalGradient(lambda y, t, Q: objective(y, {"q": q}, Q), proxes.lasso, step=STEP)
    assert abs(float(implicit_vjp(only, y, theta["t"], lib.array(V), **data)) - by_t @ V) <= 1e-5


# -- faults ------------------------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@EVERY
@pytest.mark.parametrize("case", ["lasso", "box", "simplex"])
def test_a_kink_is_told(lib: Library, case: str) -> None:
    """A multiplier of exactly zero: a warning that names the coordinate."""
    y = np.array([0.5, 0.5, 0.0])
    # min ½‖y − q‖² with y_2 = 0 at the very edge of moving
    P, q = {
        "lasso": (lambda x, theta: proxes.lasso(x, 1.0), np.array([1.5, 1.5, 1.0])),
        "box": (lambda x, theta: projections.box(x, 0.0, 1.0), np.array([0.5, 0.5, 0.0])),
        "simplex": (lambda x, theta: projections.simplex(x), np.array([0.7, 0.7, 0.2])),
    }[case]
    c = ProjectedGradient(lambda y, theta: 0.5 * xp_of(y).sum((y - theta) ** 2), P)
    with pytest.warns(RegularityWarning, match="projection has a kink"):
        implicit_vjp(c, lib.array(y), lib.array(q), lib.array(np.ones(3)))
    clear = q + np.array([0.0, 0.0, -0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        implicit_vjp(c, lib.array(y), lib.array(clear), lib.array(np.ones(3)))


@pytest.mark.slow(on=("jax", "array_api_strict"))
@EVERY
def test_a_point_that_is_no_solution_is_told(lib: Library) -> None:
    y, theta, data = arguments(lib, "simplex")
    with pytest.warns(NotASolutionWarning):
        implicit_vjp(condition("simplex"), y + 0.1, theta, lib.array(V), **data)


@pytest.mark.parametrize("method", ["cg", "cholesky", "minres"])
def test_symmetric_methods_on_the_whole_system(method: str) -> None:
    """What is not symmetric is refused, with what to do."""
    for case, restrict in (("lasso", False), ("ball", None)):
        y, theta, data = arguments(NUMPY, case)
        with pytest.raises(NotSymmetricError, match="restrict=True"):
            implicit_vjp(condition(case, restrict=restrict), y, theta, V, solver=method, **data)


@pytest.mark.slow(on=("jax", "array_api_strict"))
@EVERY
def test_a_restriction_that_does_not_fit_is_found_out(lib: Library) -> None:
    """On the sphere D is singular on its own support: an error, and no number."""
    y, theta, data = arguments(lib, "ball")
    with pytest.raises(SolveError):
        implicit_vjp(condition("ball", restrict=True), y, theta, lib.array(V), **data)


def test_a_saddle_on_the_support() -> None:
    """Where f is not convex on the support, Cholesky says so, and auto finds another way."""
    Qs = np.diag([1.0, -2.0, 1.0])
    c = ProximalGradient(
        lambda y, theta: 0.5 * (y @ (Qs @ y)) - theta @ y, lambda x, theta, step: proxes.lasso(x, 1.0, step), step=0.1
    )
    q = np.array([3.0, -3.0, 0.1])
    y = np.array([2.0, 2.0, 0.0])  # Qy − q + sign(y) = 0 on the support
    with pytest.raises(SolveError, match="not positive definite"):
        implicit_vjp(c, y, q, np.ones(3), solver="cholesky")
    g = implicit_vjp(c, y, q, np.ones(3))
    np.testing.assert_allclose(g, [1.0, -0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProximalGradient(objective), "prox is NoneType"),
        (lambda: ProjectedGradient(objective, 3), "projection is int"),
        (lambda: ProximalGradient(None, proxes.lasso), "neither fun nor grad"),
        (lambda: ProximalGradient(objective, proxes.lasso, step=0.0), "step is 0.0"),
        (lambda: ProximalGradient(objective, proxes.lasso, step="big"), "step is 'big'"),
        (lambda: ProximalGradient(objective, proxes.lasso, hvp=1), "hvp is int"),
        (lambda: ProximalGradient(objective, proxes.lasso, restrict="yes"), "restrict is 'yes'"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_shapes_are_checked() -> None:
    """A projection of the wrong shape is named."""
    y, theta, data = arguments(NUMPY, "simplex")
    wrong = ProjectedGradient(objective, lambda x, theta: x[:3], step=STEP)
    with pytest.raises(ValueError, match="projection"):
        implicit_vjp(wrong, y, theta, V, **data)


@pytest.mark.skipif(not TORCH, reason="needs torch")
def test_single_precision() -> None:
    """float32 comes out as float32, right to its rounding, and without a false alarm."""
    (lib,) = TORCH
    y, by_q, _ = truth("simplex")
    theta = {"q": lib.array(LINEAR, dtype="float32"), "t": lib.array(1.0, dtype="float32")}
    y32, v, data = (lib.array(x, dtype="float32") for x in (y, V, Q))
    g = implicit_vjp(condition("simplex"), y32, theta, v, args=(data,))
    assert str(g["q"].dtype) == "torch.float32"
    assert off(lib.numpy(g["q"]), by_q.T @ V) <= 1e-4


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *JAX], ids=lambda lib: lib.name)
def test_box_in_mixed_units(lib: Library) -> None:
    """A step for each coordinate: with one for all, what is held at a bound seems to be next to a kink."""
    H, D = np.array([[2.0, 0.5, 0.0], [0.5, 2.0, 0.5], [0.0, 0.5, 2.0]]), np.array([1e-6, 1.0, 1e6])
    y, multipliers, v = np.array([1.0, 0.3, 0.0]), np.array([1.0, 0.0, -1.0]), np.array([1.0, 2.0, 3.0])
    Hs, ones = lib.array(H / np.outer(D, D)), lib.array(1 / D)
    condition = ProjectedGradient(
        projection=lambda x, t: projections.box(x, lib.array(0 * D), lib.array(D)), grad=lambda y, t: Hs @ y - t * ones,
        hvp=lambda y, t, u: Hs @ u, mixed_vjp=lambda y, t, u: -u * ones, mixed_jvp=lambda y, t, d: -d * ones,
    )  # fmt: skip
    given = [lib.array(x) for x in (y * D, H @ y + multipliers, v / D)]
    found = outcome(lambda: implicit_vjp(condition, *given))
    assert found.quiet, found.text
    assert np.allclose(lib.numpy(found.value), [0.0, 1.0, 0.0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow(on=("jax",))
@EVERY
@pytest.mark.parametrize("items", [0, 2])
def test_lasso_in_mixed_units(lib: Library, items: int) -> None:
    """A step for each coordinate where prox takes one, in batches and under jit, too: what is zero stays zero."""
    H = np.array([[2.0, 0.5, 0.1, 0.0], [0.5, 2.0, 0.5, 0.2], [0.1, 0.5, 2.0, 0.5], [0.0, 0.2, 0.5, 2.0]])
    D = np.array([1e-6, 1.0, 1e6, 1e3])
    y, v, penalty = np.array([1.0, 0.0, -0.5, 0.0]), np.array([1.0, 2.0, 3.0, 4.0]), 0.3
    theta = H @ y + penalty * np.array([1.0, 0.5, -1.0, -0.2])
    support = y != 0
    expected = np.zeros(4)
    expected[support] = np.linalg.solve(H[np.ix_(support, support)], v[support])
    Hs, ones, level = lib.array(H / np.outer(D, D)), lib.array(1 / D), lib.array(penalty / D)
    condition = ProximalGradient(
        grad=lambda y, t: y @ Hs - t * ones, prox=lambda x, t, step: proxes.lasso(x, level, step),
        hvp=lambda y, t, u: u @ Hs, mixed_vjp=lambda y, t, u: -u * ones, mixed_jvp=lambda y, t, d: -d * ones,
    )  # fmt: skip
    given = [lib.array(np.stack([x] * items) if items else x) for x in (y * D, theta, v / D)]
    call = lambda *given: implicit_vjp(condition, *given, batched=items > 0)
    for ask in (call, framework("jax").compiled(call)) if lib.name == "jax" else (call,):
        found = outcome(lambda ask=ask: ask(*given))
        assert found.quiet, found.text
        assert np.allclose(lib.numpy(found.value), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow(on=("jax",))
@EVERY
def test_a_prox_that_takes_one_step_only(lib: Library) -> None:
    """A prox that cannot be called with an array of steps is given a number, whatever the units."""
    D, y, v = np.array([1.0, 1.0, 1e3, 1e3]), np.array([1.0, -2.0, 0.5, 1.0]), np.array([1.0, 2.0, 3.0, 4.0])
    diagonal, ones = lib.array(2 / D**2), lib.array(1 / D)

    def prox(x: Any, t: Any, step: Any) -> Any:
        assert not getattr(step, "shape", ())
        return x / (1 + step)

    condition = ProximalGradient(
        grad=lambda y, t: diagonal * y - t * ones, prox=prox, hvp=lambda y, t, u: diagonal * u,
        mixed_vjp=lambda y, t, u: -u * ones, mixed_jvp=lambda y, t, d: -d * ones,
    )  # fmt: skip
    curved = 2 / D**2 + 1  # f + ½‖y‖², in the user's units
    given = [lib.array(x) for x in (y * D, curved * y * D * D, v)]
    found = outcome(lambda: implicit_vjp(condition, *given))
    assert found.quiet, found.text
    assert np.allclose(lib.numpy(found.value), v / D / curved, rtol=1e-9)
