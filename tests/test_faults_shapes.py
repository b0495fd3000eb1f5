"""Faults 28 to 32: shapes, empty problems and containers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Library, assert_right, assert_told, outcome, relative_error
from helpers_faults import MODES, Case, make, numbers, run

from implicitdiff import (
    BackendError,
    CallbackError,
    DTypeError,
    FixedPoint,
    NotASolutionWarning,
    Root,
    ShapeError,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)


class Pair(NamedTuple):
    first: Any
    second: Any


# -- 28: broadcasting -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Root, FixedPoint, Stationary])
def test_fault_28_residual_broadcasts(lib: Library, kind: type, mode: str) -> None:
    case = make(lib, n=3, m=3)
    theta, t = (lib.array(lib.numpy(x)[:, None]) for x in (case.theta, case.t))
    condition = Stationary(grad=lambda y, th: y - th) if kind is Stationary else kind(lambda y, th: y - th)
    case = replace(case, condition=condition, theta=theta, t=t)
    found = outcome(lambda: run(mode, case))
    assert_told(found, CallbackError, r"^(grad|fun) returned .*\(3, 3\).*\n.*\(3,\)")


def test_fault_28_every_solver(lib: Library, solver: str) -> None:
    y, theta = lib.array([1.0, 2.0]), lib.array([[1.0], [2.0]])
    found = outcome(lambda: implicit_vjp(Root(lambda y, th: y - th), y, theta, y, solver=solver))
    assert_told(found, CallbackError, r"\(2, 2\).*\n.*\(2,\)")


@pytest.mark.parametrize("name", ["hvp", "mixed_jvp", "mixed_vjp"])
def test_fault_28_product_broadcasts(lib: Library, solver: str, name: str) -> None:
    case = make(lib, n=3, m=3)
    column = lib.array(np.ones((3, 1)))
    others = [k for k in ("grad", "hvp", "mixed_vjp", "mixed_jvp") if k != name]
    bad = case.using(Stationary, *others, **{name: lambda *args: case.products[name](*args) * column})
    found = outcome(lambda: run("jvp" if name == "mixed_jvp" else "vjp", bad, solver=solver))
    assert_told(found, CallbackError, rf"^{name} returned .*\(3, 3\).*\n.*\(3,\)")


def test_fault_28_objective_that_broadcasts_inside(lib: Library) -> None:
    # the sum hides the (n, n) array; that y is no stationary point of it does not stay hidden
    xp, y = lib.xp, lib.array([1.0, 2.0, 4.0])
    found = outcome(lambda: implicit_vjp(lambda y, th: xp.sum((y - th) ** 2), y, lib.array([[1.0], [2.0], [4.0]]), y))
    assert_told(found, NotASolutionWarning, "not a solution")


# -- 29: wrong lengths ------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), (1, 4), (), (0,)])
def test_fault_29_cotangent(lib: Library, solver: str, shape: tuple[int, ...]) -> None:
    case = make(lib)
    bad = lib.array(np.ones(shape))
    pattern = r"^(cotangent|outer) .*" + re_shape(shape) + r".*\n?.*\(4,\)"
    for call in (
        lambda: implicit_vjp(case.condition, case.y, case.theta, bad, solver=solver),
        lambda: implicit_grad(case.condition, bad, case.y, case.theta, solver=solver),
        lambda: linearize(case.condition, case.y, case.theta, solver=solver).vjp(bad),
    ):
        assert_told(outcome(call), ShapeError, pattern)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), ()])
def test_fault_29_tangent(lib: Library, shape: tuple[int, ...]) -> None:
    case = make(lib)
    found = outcome(lambda: implicit_jvp(case.condition, case.y, case.theta, lib.array(np.ones(shape))))
    assert_told(found, ShapeError, r"^tangent .*" + re_shape(shape) + r".*\n?.*\(3,\)")


def test_fault_29_start_vector(lib: Library, solver: str) -> None:
    case = make(lib)
    x0 = lib.array(np.ones(3))
    found = outcome(lambda: implicit_vjp(case.condition, case.y, case.theta, case.v, solver=solver, x0=x0))
    assert_told(found, ShapeError, r"^x0 .*\(3,\).*\(4,\)")


def test_fault_29_batches_of_different_length(lib: Library) -> None:
    case = make(lib, items=(3,))
    short = lib.array(lib.numpy(case.theta)[:2])
    found = outcome(lambda: run("vjp", replace(case, theta=short), batched=True))
    assert_told(found, ShapeError, "y holds 3 items, theta 2")
    found = outcome(lambda: run("vjp", replace(case, v=lib.array(lib.numpy(case.v)[:2])), batched=True))
    assert_told(found, ShapeError, r"^cotangent .*\(2, 4\).*\n?.*\(3, 4\)")
    found = outcome(lambda: run("jvp", replace(case, t=short), batched=True))
    assert_told(found, ShapeError, r"^tangent .*\(2, 3\).*\n?.*\(3, 3\)")
    scalar = lib.array(1.0)
    found = outcome(lambda: run("vjp", replace(case, theta=scalar), batched=True))
    assert_told(found, ShapeError, "theta.*batched")


@pytest.mark.parametrize("which", ["y", "theta"])
def test_fault_29_point_that_the_condition_does_not_take(lib: Library, solver: str, which: str) -> None:
    # F = y − 2 θ takes any length: only F's own shape tells
    y, theta = lib.array(np.ones(4)), lib.array(np.full(4, 0.5))
    long = lib.array(np.ones(5))
    condition = Root(lambda y, th: y - 2 * th)
    bad = {"y": (long, theta), "theta": (y, long)}[which]
    found = outcome(lambda: implicit_vjp(condition, *bad, lib.array(np.ones(bad[0].shape)), solver=solver))
    assert found.error is not None
    named = ("(4)", "(5)") if lib.name == "torch" else ("(4,)", "(5,)")
    assert any(n in str(found.error) for n in named), found.text  # the framework's own, or ours


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (4,), (2, 4, 4)])
@pytest.mark.parametrize("kind", [Stationary, Root])
def test_fault_29_given_matrix(lib: Library, kind: type, shape: tuple[int, ...]) -> None:
    case = make(lib)
    name = "hessian" if kind is Stationary else "jacobian"
    bad = case.using(kind, "grad", "mixed_vjp", **{name: lambda y, th: lib.array(np.ones(shape))})
    assert_told(outcome(lambda: run("vjp", bad)), CallbackError, rf"^{name} returned .*{re_shape(shape)}.*\n.*\(4, 4\)")


def test_fault_29_linear_solve(lib: Library, solver: str) -> None:
    A, b = lib.array(np.eye(3)), lib.array(np.ones(3))
    short = lib.array(np.ones(2))
    assert_told(outcome(lambda: linear_solve(A, short, solver=solver)), ShapeError, r"\(3, 3\).*\(2,\)")
    rectangle = lib.array(np.ones((3, 2)))
    assert_told(outcome(lambda: linear_solve(rectangle, b, solver=solver)), ShapeError, r"\(3, 2\).*\(3,\)")
    assert_told(outcome(lambda: linear_solve(A, b, solver=solver, x0=short)), ShapeError, r"x0.*\(2,\).*\(3,\)")


def re_shape(shape: tuple[int, ...]) -> str:
    """Pattern of a printed shape."""
    return str(shape).replace("(", r"\(").replace(")", r"\)")


# -- 30, 31: 0-d, empty and single ------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("kind", [Stationary, Root])
def test_fault_30_scalar_y(lib: Library, solver: str, mode: str, derived: bool, kind: type) -> None:
    # y³ + 2 y = θ²: dy/dθ = 2 θ / (3 y² + 2)
    one = lib.array(1.0)
    y, theta = lib.array(1.0), lib.array(3.0**0.5)
    slope = 2 * 3.0**0.5 / 5
    products = {
        "grad": lambda y, th: y**3 + 2 * y - th**2,
        "hvp": lambda y, th, v: 3 * y**2 * v + 2 * v,
        "mixed_vjp": lambda y, th, u: -2 * th * u,
        "mixed_jvp": lambda y, th, t: -2 * th * t,
    }
    case = Case(lib, None, y, theta, np.array(slope), one, one, products)
    case = case.using(kind, *(("grad",) if derived else products))
    expected = slope + (2 * 3.0**0.5 if mode == "grad" else 0.0)
    assert_right(lib, outcome(lambda: run(mode, case, solver=solver)), expected, 1e-6 if derived else 1e-8)


@pytest.mark.parametrize("fun", [lambda y, th: (y - th**2) ** 2, lambda y, th: -((y - th**2) ** 2)])
def test_fault_30_python_floats(solver: str, fun: Callable[..., Any]) -> None:
    if fun(1.0, 2.0) < 0 and solver in {"cholesky", "cg"}:
        pytest.skip("a maximum is not for this solver")
    g, report = implicit_grad(fun, lambda y, th: 2 * y + th, 4.0, 2.0, solver=solver, return_report=True)
    assert isinstance(g, float)
    assert g == pytest.approx(9.0, rel=1e-5)
    assert report.converged


@pytest.mark.parametrize("items", [(), (3,)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (1, 3), (3, 0), (0, 0)])
def test_fault_31_empty_and_single(
    lib: Library, solver: str, n: int, m: int, mode: str, items: tuple[int, ...]
) -> None:
    case = make(lib, n, m, items=items)
    found = outcome(lambda: run(mode, case, solver=solver, **({"batched": True} if items else {})))
    assert_right(lib, found, case.expected(mode), 1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 2), (3, 0)])
@pytest.mark.parametrize("kind", [Stationary, Root])
def test_fault_31_derived_products(lib: Library, solver: str, kind: type, n: int, m: int, mode: str) -> None:
    case = make(lib, n, m).using(kind, "grad")
    assert_right(lib, outcome(lambda: run(mode, case, solver=solver)), case.expected(mode), 1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_fault_31_objective_only(lib: Library, solver: str, n: int) -> None:
    xp, theta = lib.xp, lib.array(np.full(n, 3.0))
    condition = Stationary(lambda y, th: xp.sum((y - th**2) ** 2))
    found = outcome(lambda: implicit_grad(condition, lambda y, th: 2 * xp.sum(y), theta**2, theta, solver=solver))
    assert_right(lib, found, np.full(n, 12.0), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_fault_31_no_items(lib: Library, solver: str, mode: str) -> None:
    case = make(lib, items=(0,))
    found = outcome(lambda: run(mode, case, solver=solver, batched=True))
    assert_right(lib, found, case.expected(mode), 1e-8)


@pytest.mark.parametrize("empty", [{}, [], (), None])
def test_fault_31_empty_tree(lib: Library, empty: Any) -> None:
    y = lib.array(np.ones(2))
    found = outcome(lambda: implicit_vjp(Stationary(grad=lambda y, th: y - 1, hvp=lambda y, th, v: v), y, empty, y))
    assert found.quiet, found.text
    assert found.value == empty


@pytest.mark.parametrize("n", [0, 1])
def test_fault_31_linear_solve(lib: Library, solver: str, n: int) -> None:
    A, b = lib.array(2 * np.eye(n)), lib.array(np.ones(n))
    assert_right(lib, outcome(lambda: linear_solve(A, b, solver=solver)), np.full(n, 0.5), 1e-10)
    many = lib.array(np.ones((n, 3)))
    assert_right(lib, outcome(lambda: linear_solve(A, many, solver=solver)), np.full((n, 3), 0.5), 1e-10)


# -- 32: containers ---------------------------------------------------------------------------------------
def _tree_problem(lib: Library) -> tuple[Any, Any, Any, Any, Any]:
    """y = {'a': (2, 2), 'b': [(), (3,)]} against theta = Pair((3,), {'c': (), 'none': None})."""
    xp = lib.xp
    y = {"a": lib.array(numbers((2, 2))), "b": [lib.array(0.5), (lib.array(numbers((3,), 1.0)), None)]}
    theta = Pair(lib.array(numbers((3,), 4.0)), {"c": lib.array(1.3), "none": None})
    a0, s0, b0 = (lib.numpy(x) for x in (y["a"], y["b"][0], y["b"][1][0]))
    p0, c0 = lib.numpy(theta.first), lib.numpy(theta.second["c"])
    ra, rs, rb = (lib.array(x) for x in (3 * a0 - p0.sum() * c0, 2 * s0 - p0[0] * c0**2, 4 * b0 + s0 - p0**2))

    def fun(y: Any, th: Any) -> Any:
        p, c, (s, (b, _)) = th.first, th.second["c"], y["b"]
        return {"a": 3 * y["a"] - xp.sum(p) * c - ra, "b": [2 * s - p[0] * c**2 - rs, (4 * b + s - p**2 - rb, None)]}

    return Root(fun), y, theta, p0, float(c0)


def _tree_truth(p: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """da/dp, da/dc, ds/dp, db/dp, db/dc and ds/dc."""
    ds_dp, ds_dc = np.array([c**2 / 2, 0, 0]), p[0] * c
    da_dp, da_dc = np.full((2, 2, 3), c / 3), np.full((2, 2), p.sum() / 3)
    return da_dp, da_dc, ds_dp, (2 * np.diag(p) - ds_dp) / 4, np.full(3, -ds_dc / 4), ds_dc


@pytest.mark.parametrize("solver", ["lu", "gmres", "auto"])
def test_fault_32_nested_containers(lib: Library, solver: str) -> None:
    condition, y, theta, p, c = _tree_problem(lib)
    da_dp, da_dc, ds_dp, db_dp, db_dc, ds_dc = _tree_truth(p, c)
    J = outcome(lambda: implicit_jacobian(condition, y, theta, solver=solver))
    assert J.quiet, J.text
    assert isinstance(J.value["a"], Pair)
    blocks = [J.value["a"].first, J.value["a"].second["c"], J.value["b"][0].first, J.value["b"][1][0].first]
    for got, expected in zip(blocks, (da_dp, da_dc, ds_dp, db_dp), strict=True):
        assert relative_error(lib, got, expected) < 1e-6
    assert J.value["b"][1][1] is None
    v = {"a": lib.array(np.zeros((2, 2))), "b": [lib.array(1.0), (lib.array([1.0, 2.0, -1.0]), None)]}
    g = outcome(lambda: implicit_vjp(condition, y, theta, v, solver=solver))
    assert g.quiet, g.text
    assert isinstance(g.value, Pair)
    assert g.value.second["none"] is None
    weights = np.array([1.0, 2.0, -1.0])
    assert relative_error(lib, g.value.first, ds_dp + weights @ db_dp) < 1e-6
    assert relative_error(lib, g.value.second["c"], ds_dc + weights @ db_dc) < 1e-6
    w = outcome(lambda: implicit_jvp(condition, y, theta, theta, solver=solver))
    assert w.quiet, w.text
    assert relative_error(lib, w.value["a"], da_dp @ p + da_dc * c) < 1e-6


@pytest.mark.parametrize("leaf", [3, True, "adam", 1 + 2j, b"x", object(), np.array([1, 2]), np.array(["a"])])
@pytest.mark.parametrize("which", ["y", "theta"])
def test_fault_32_leaves_that_are_no_real_arrays(lib: Library, which: str, leaf: Any) -> None:
    one = lib.array(np.ones(2))
    tree = {"w": [leaf, one]}
    y, theta = (tree, one) if which == "y" else (one, tree)
    condition = Stationary(grad=lambda y, th: y, hvp=lambda y, th, v: v, mixed_vjp=lambda y, th, u: th)
    found = outcome(lambda: implicit_vjp(condition, y, theta, y))
    assert_told(found, (DTypeError, BackendError), rf"{which}\['w'\]\[0\]")


def test_fault_32_python_float_leaves() -> None:
    condition = Root(lambda y, th: {"u": 2 * y["u"] - th["s"] * 3, "w": y["w"] - th["s"]})
    y, theta = {"u": 3.0, "w": np.array([2.0, 2.0])}, {"s": 2.0}
    g = implicit_vjp(condition, y, theta, {"u": 1.0, "w": np.array([1.0, 1.0])})
    assert isinstance(g["s"], float)
    assert g["s"] == pytest.approx(3.5, rel=1e-7)


@pytest.mark.parametrize(
    "bad",
    [[1.0, 2.0], {"w": 1.0}, None, {"w": [1.0], "extra": 2.0}, "zeros"],
    ids=["list", "leaf", "none", "key", "str"],
)
def test_fault_32_cotangent_of_another_structure(lib: Library, bad: Any) -> None:
    condition = Root(lambda y, th: {"w": [y["w"][0] - th]})
    y, theta = {"w": [lib.array(np.ones(2))]}, lib.array(np.ones(2))
    found = outcome(lambda: implicit_vjp(condition, y, theta, bad))
    assert_told(found, ShapeError, r"^cotangent is(.|\n)*Expected")


def test_fault_32_n_dimensional_arrays(lib: Library, solver: str) -> None:
    y, theta = lib.array(numbers((2, 3, 2))), lib.array(numbers((2, 3, 2)) ** 3)
    found = outcome(lambda: implicit_jacobian(
        Root(lambda y, th: y**3 - th, jvp=lambda y, th, v: 3 * y**2 * v), y, theta, solver=solver))  # fmt: skip
    flat = np.diag(1 / (3 * lib.numpy(y).reshape(-1) ** 2))
    assert_right(lib, found, flat.reshape(2, 3, 2, 2, 3, 2), 1e-6)
