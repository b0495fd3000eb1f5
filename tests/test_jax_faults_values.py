"""FAULTS 19 to 37 on JAX: the point, NaN and Inf, batches, shapes and dtypes; told eagerly, NaN under jit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import NUMPY, SOLVERS, SYMMETRIC_ONLY, TORCH, assert_right, assert_right_or_told, assert_told, outcome
from helpers_jax import LIB, jax, jnp, quickly

from implicitdiff import (
    BackendError,
    CallbackError,
    DerivativeError,
    DTypeError,
    FixedPoint,
    NonFiniteError,
    NonFiniteProductError,
    NotASolutionWarning,
    Root,
    ShapeError,
    SolveError,
    SolveWarning,
    Stationary,
    Status,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
)

CUBE = Root(lambda y, th: y**3 - th)  # A = 3 y², B = −1
SCALED = Root(lambda y, th: th["s"] * y - th["t"])  # A = s: zero or NaN in an item where s is
ONE = jnp.ones(3)
items = pytest.mark.parametrize("bad", ["y", "theta", "cotangent"])


def cubes(y: Any, v: Any, solver: str = "auto", **options: Any) -> Any:
    return implicit_vjp(CUBE, y, y**3, v, solver=solver, **options)


# -- 19 to 22: the point -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", quickly(SOLVERS))
def test_19_20_whether_it_is_a_solution(solver: str) -> None:
    y = jnp.asarray([1.0, 2.0, 3.0])
    truth = 1 / (3 * np.asarray(y) ** 2)
    assert_right(LIB, outcome(lambda: implicit_vjp(CUBE, y * (1 + 1e-9), y**3, ONE, solver=solver)), truth, 1e-7)
    found = outcome(lambda: implicit_vjp(CUBE, y, y**3 + 0.1, ONE, solver=solver, return_report=True))
    assert_told(found, NotASolutionWarning, r"F\(y, theta\)‖ = 0\.173")
    assert found.value[1].stationarity == pytest.approx(0.1 * 3**0.5)


def test_19_under_jit_the_report_knows() -> None:
    _, report = jax.jit(lambda th: implicit_vjp(CUBE, ONE, th, ONE, return_report=True))(ONE + 0.1)
    assert float(report.stationarity) == pytest.approx(0.1 * 3**0.5)


def _linear(y: Any, theta: Any, k: Any) -> Any:
    return SKEW @ y - theta[:2] ** 2 * theta[2]


GIVEN = Root(
    _linear, jvp=lambda y, t, v, k: (SKEW + k["transposed"] * (SKEW.T - SKEW)) @ v, vjp=lambda y, t, u, k: SKEW.T @ u,
    mixed_jvp=lambda y, t, d, k: jax.jvp(lambda t: _linear(y, t, k), (t,), (d,))[1] * k["doubled"],
    mixed_vjp=lambda y, t, u, k: jax.vjp(lambda t: _linear(y, t, k), t)[1](u)[0] * k["sign"],
)  # fmt: skip
SKEW = jnp.asarray([[2.0, 0.7], [-0.4, 1.5]])


def test_68_given_products_that_are_wrong_are_nan_under_jit() -> None:
    theta = jnp.asarray([1.2, -0.7, 0.5])
    y = jnp.linalg.solve(SKEW, theta[:2] ** 2 * theta[2])
    pull = jax.jit(lambda k: implicit_vjp(GIVEN, y, theta, ONE[:2], args=(k,), solver="lu", return_report=True))
    right = {"transposed": 0.0, "doubled": 1.0, "sign": 1.0}
    value, report = pull(right)
    assert bool(report.converged)
    assert bool(jnp.isfinite(value).all())
    for wrong in ({"transposed": 1.0}, {"doubled": 2.0}, {"sign": -1.0}):
        value, report = pull({**right, **wrong})
        assert report.status == Status.CONTRADICTED
        assert bool(jnp.isnan(value).all())


def test_77_kind_that_is_not_so_is_nan_under_jit() -> None:
    low = Stationary(lambda y, t: (y[0] ** 2 - y[1] ** 2) / 2 - y @ t, kind="minimum")
    pull = jax.jit(lambda y, t: implicit_vjp(low, y, t, jnp.asarray([1.0, 0.5]), solver="lu"))
    assert bool(jnp.isnan(pull(jnp.asarray([1.0, -2.0]), jnp.asarray([1.0, 2.0]))).all())


@pytest.mark.parametrize("solver", quickly(SOLVERS))
def test_22_expansive_fixed_point(solver: str) -> None:
    M = np.asarray([[-3.0, 0.4], [0.1, -2.0]])
    y, A = np.asarray([1.0, 2.0]), np.eye(2) - M
    condition = FixedPoint(lambda y, th: jnp.asarray(M) @ y + th)
    truth = np.linalg.solve(A.T, np.ones(2))
    found = outcome(lambda: implicit_vjp(condition, jnp.asarray(y), jnp.asarray(A @ y), jnp.ones(2), solver=solver))
    if solver in SYMMETRIC_ONLY:
        assert_right_or_told(LIB, found, truth, 1e-7, SolveError, "symmetric|residual|definite")
    else:
        assert_right(LIB, found, truth, 1e-7)


# -- 23 to 27: NaN and Inf -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", quickly(SOLVERS))
@items
def test_23_24_25_non_finite_inputs(solver: str, bad: str) -> None:
    arrays = {"y": ONE, "theta": ONE, "cotangent": ONE}
    arrays[bad] = ONE.at[1].set(jnp.inf)
    call = lambda y, th, v: implicit_vjp(CUBE, y, th, v, solver=solver)
    assert_told(outcome(lambda: call(*arrays.values())), NonFiniteError, rf"^{bad} holds NaN or Inf")
    assert np.all(np.isnan(jax.jit(call)(*arrays.values())))


def test_25_tangent() -> None:
    bad = ONE.at[1].set(jnp.nan)
    assert_told(outcome(lambda: implicit_jvp(CUBE, ONE, ONE, bad)), NonFiniteError, "^tangent holds")
    assert np.all(np.isnan(jax.jit(lambda t: implicit_jvp(CUBE, ONE, ONE, t))(bad)))


@pytest.mark.parametrize("solver", quickly(SOLVERS))
def test_26_only_in_the_products(solver: str) -> None:
    # f = Σ |y|^1.5 + ½ (y − θ)²: the gradient is 0 at 0, the curvature is not finite there
    f = lambda y, th: jnp.sum(jnp.abs(y) ** 1.5) + jnp.sum((y - th) ** 2) / 2
    zero = jnp.zeros(3)
    call = lambda y, v: implicit_vjp(f, y, 0 * y, v, solver=solver)
    assert_told(outcome(lambda: call(zero, ONE)), NonFiniteProductError, "NaN or Inf")
    assert np.all(np.isnan(jax.jit(call)(zero, ONE)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in ("auto", "cg"))) for name in SOLVERS]
)
def test_27_one_bad_item(solver: str) -> None:
    ask = lambda y, th, v, **o: implicit_vjp(SCALED, y, th, v, batched=True, solver=solver, **o)["t"]
    one = lambda y, th, v: implicit_vjp(SCALED, y, th, v, solver=solver)["t"]
    compiled = jax.jit(ask), jax.jit(jax.vmap(one))
    for kind in ("zero operator", "NaN operator", "NaN y", "NaN cotangent"):
        check_one_bad_item(kind, ask, compiled)


def check_one_bad_item(kind: str, ask: Callable[..., Any], compiled: tuple[Callable[..., Any], ...]) -> None:
    s = np.asarray([[1.0, 2.0], [2.0, 1.0], [4.0, 5.0]])
    y, v = np.ones((3, 2)), np.asarray([[1.0, 2.0]] * 3)
    truth = v / s
    {"zero operator": s, "NaN operator": s, "NaN y": y, "NaN cotangent": v}[kind][1] = (
        0.0 if kind == "zero operator" else np.nan
    )
    theta = {"s": jnp.asarray(s), "t": jnp.asarray(np.nan_to_num(s * y))}
    arrays = jnp.asarray(y), theta, jnp.asarray(v)
    kinds = (SolveError, NonFiniteError)
    assert_told(outcome(lambda: ask(*arrays)), kinds, r"item 1")
    if kind == "zero operator":
        assert_told(outcome(lambda: ask(*arrays, on_failure="warn")), SolveWarning, r"item 1")
    silent = outcome(lambda: ask(*arrays, on_failure="nan"))
    assert silent.quiet, silent.text
    for value in (silent.value, *(function(*arrays) for function in compiled)):
        np.testing.assert_allclose(np.asarray(value)[[0, 2]], truth[[0, 2]], rtol=1e-8)
        assert np.all(np.isnan(np.asarray(value)[1]))


def test_27_vmap_over_some_of_the_arguments() -> None:
    """What is mapped is traced, what is not is an array: both are JAX's."""
    by_item = jax.jit(lambda s: implicit_vjp(Root(lambda y, th: s * y - th), ONE, s * ONE, ONE))
    found = jax.vmap(by_item)(jnp.arange(3.0))
    np.testing.assert_allclose(np.asarray(found)[1:], [[1.0] * 3, [0.5] * 3])
    assert np.all(np.isnan(np.asarray(found)[0]))


# -- 28 to 32: shapes ----------------------------------------------------------------------------------------------
BROADCASTS = Root(lambda y, th: y - th)


@pytest.mark.parametrize("traced", [False, True])
def test_28_29_wrong_shapes(traced: bool) -> None:
    wrap = jax.jit if traced else (lambda f: f)
    column = jnp.ones((3, 1))
    for call in (implicit_vjp, lambda *a: implicit_grad(a[0], a[3], *a[1:3])):
        found = outcome(lambda c=call: wrap(lambda y, th, v: c(BROADCASTS, y, th, v))(ONE, column, ONE))
        assert_told(found, CallbackError, r"^fun returned .*\(3, 3\).*\n.*\(3,\)")
    for shape in ((2,), (4,), (3, 1), ()):
        found = outcome(lambda s=shape: wrap(lambda v: implicit_vjp(CUBE, ONE, ONE, v))(jnp.ones(s)))
        assert_told(found, ShapeError, r"(?s)^cotangent .*\(3,\)")
        found = outcome(lambda s=shape: wrap(lambda t: implicit_jvp(CUBE, ONE, ONE, t))(jnp.ones(s)))
        assert_told(found, ShapeError, r"(?s)^tangent .*\(3,\)")


@pytest.mark.parametrize("solver", quickly(SOLVERS))
@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 2)])
def test_30_31_32_any_shape(solver: str, shape: tuple[int, ...]) -> None:
    y = jnp.ones(shape) * 2
    call = lambda y, v: implicit_vjp(CUBE, y, y**3, v, solver=solver)
    for found in (outcome(lambda: call(y, 3 * y)), outcome(lambda: jax.jit(call)(y, 3 * y))):
        assert_right(LIB, found, np.full(shape, 0.5), 1e-8)
    assert_right(LIB, outcome(lambda: implicit_jvp(CUBE, y, y**3, 3 * y, solver=solver)), np.full(shape, 0.5), 1e-8)


@pytest.mark.parametrize(("n", "m"), [(0, 2), (2, 0), (1, 2)])
def test_31_empty_jacobian(n: int, m: int) -> None:
    W = jnp.ones((n, m))
    condition = Root(lambda y, th: 2 * y - W @ th)
    found = outcome(lambda: implicit_jacobian(condition, jnp.zeros(n), jnp.zeros(m)))
    assert_right(LIB, found, np.full((n, m), 0.5), 1e-8)


def test_32_leaves_are_named() -> None:
    for leaf in ("adam", object(), b"x"):
        tree = {"w": [leaf, ONE]}
        for y, theta in ((tree, ONE), (ONE, tree)):
            found = outcome(lambda y=y, th=theta: implicit_vjp(CUBE, y, th, y))
            assert_told(found, (DTypeError, BackendError), r"(y|theta)\['w'\]\[0\]")
    assert_told(outcome(lambda: implicit_vjp(CUBE, ONE, ONE, "ones")), ShapeError, "^cotangent is(.|\n)*Expected")
    found = outcome(lambda: implicit_vjp(CUBE, ONE, ONE, ONE, solver="cg", x0="ones"))
    assert_told(found, (BackendError, ShapeError), "^x0")


# -- 33 to 37: dtypes and frameworks -------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("solver", quickly(SOLVERS))
@pytest.mark.parametrize(("dtype", "other"), [("float32", "float32"), ("float32", "float64"), ("float64", "float32")])
def test_33_mixed_precision(solver: str, dtype: str, other: str) -> None:
    y, theta = jnp.full(3, 2.0, dtype), jnp.full(3, 8.0, other)
    found = outcome(lambda: implicit_vjp(CUBE, y, theta, jnp.ones(3, dtype), solver=solver))
    assert_right(LIB, found, np.full(3, 1 / 12), 1e-5)
    assert found.value.dtype == other
    found = outcome(lambda: implicit_jacobian(CUBE, y, theta, solver=solver))
    assert_right(LIB, found, np.eye(3) / 12, 1e-5)
    assert found.value.dtype == dtype


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex128", "float16", "bfloat16"])
def test_34_35_36_unsupported(dtype: str, traced: bool) -> None:
    wrap = jax.jit if traced else (lambda f: f)
    bad = jnp.ones(3, dtype)
    for which in ("y", "theta"):
        arrays = (bad, ONE) if which == "y" else (ONE, bad)
        found = outcome(lambda a=arrays: wrap(lambda y, th: implicit_vjp(CUBE, y, th, ONE))(*a))
        assert_told(found, DTypeError, rf"^{which} has dtype {dtype}")


def test_37_mixed_frameworks() -> None:
    """NumPy's arrays are JAX's, as to JAX itself; those of another framework are not."""
    found = outcome(lambda: implicit_vjp(CUBE, ONE, NUMPY.array(np.ones(3)), ONE))
    assert_right(LIB, found, np.full(3, 1 / 3), 1e-6)
    if TORCH:
        found = outcome(lambda: implicit_vjp(CUBE, ONE, TORCH[0].array(np.ones(3)), ONE))
        assert_told(found, BackendError, "y is a jax array, theta a torch array")


# -- 49: closures --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", [Root, FixedPoint, Stationary])
def test_49_closure(kind: type, traced: bool) -> None:
    wrap: Callable[..., Any] = jax.jit if traced else (lambda f: f)
    fun = (lambda y, th: 0 * y + ONE) if kind is FixedPoint else (lambda y, th: y - ONE)
    condition = Stationary(grad=fun) if kind is Stationary else kind(fun)
    for call in (implicit_vjp, implicit_jvp):
        found = outcome(lambda c=call: wrap(lambda th: c(condition, ONE, th, ONE))(ONE))
        assert_told(found, DerivativeError, "(?s)F does not depend on theta.*closure")
    used = {"a": ONE, "unused": ONE}
    found = outcome(lambda: wrap(lambda th: implicit_vjp(Root(lambda y, th: y - th["a"]), ONE, th, ONE))(used))
    assert found.quiet, found.text
    np.testing.assert_array_equal(found.value["unused"], np.zeros(3))


SINGLE = """
import sys, warnings; warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from implicitdiff import Root, SolveError, implicit_vjp
cube, y = Root(lambda y, th: y**3 - th), jnp.asarray([1.0, 2.0])
assert not jax.config.jax_enable_x64
for solver in sys.argv[1:]:
    for g in (implicit_vjp(cube, y, y**3, y, solver=solver),
              jax.jit(lambda y: implicit_vjp(cube, y, y**3, y, solver=solver))(y)):
        assert g.dtype == np.float32, g.dtype
        np.testing.assert_allclose(g, [1 / 3, 1 / 6], rtol=1e-5)
try:
    implicit_vjp(cube, 0 * y, 0 * y, y)
except SolveError as error:
    assert "singular" in str(error) or "F" in str(error)
else:
    raise AssertionError("silent")
assert not jax.config.jax_enable_x64
"""


@pytest.mark.slow
@pytest.mark.parametrize("solvers", ["auto cg", pytest.param("lu cholesky minres gmres", marks=pytest.mark.exhaustive)])
def test_33_without_double_precision(solvers: str) -> None:
    command = [sys.executable, "-c", SINGLE, *solvers.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
