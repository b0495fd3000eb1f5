"""Faults 38 to 40: memory layouts, unmodified inputs, floating-point state, aliasing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import NUMPY, Library, assert_right, assert_told, outcome
from helpers_faults import MODES, Case, make, numbers, run, snapshot

from implicitdiff import (
    FixedPoint,
    ImplicitDiffError,
    Root,
    Stationary,
    implicit_function,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)


def _padded(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), 9.0)
    wide[..., ::3] = x
    return wide[..., ::3]


def _unaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "strided": _padded,
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "fortran": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "unaligned": _unaligned,
}


# -- 38: layouts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("items", [(), (3,)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault_38_layouts(solver: str, layout: str, mode: str, items: tuple[int, ...]) -> None:
    case = make(NUMPY, items=items)
    lay = LAYOUTS[layout]
    odd = replace(case, y=lay(case.y), theta=lay(case.theta), v=lay(case.v), t=lay(case.t))
    before = snapshot(NUMPY, odd.y, odd.theta, odd.v, odd.t)
    found = outcome(lambda: run(mode, odd, solver=solver, **({"batched": True} if items else {})))
    assert_right(NUMPY, found, case.expected(mode), 1e-8)
    assert snapshot(NUMPY, odd.y, odd.theta, odd.v, odd.t) == before


@pytest.mark.parametrize("mode", MODES)
def test_fault_38_stride_zero(solver: str, mode: str) -> None:
    # y³ + 2 y = θ² in every component: dy/dθ = 2 θ / (3 y² + 2)
    def zeros(x: float) -> np.ndarray:
        return np.broadcast_to(np.float64(x), (4,))

    y, theta = zeros(1.0), zeros(3.0**0.5)
    products = {
        "grad": lambda y, th: y**3 + 2 * y - th**2,
        "hvp": lambda y, th, v: 3 * y**2 * v + 2 * v,
        "mixed_vjp": lambda y, th, u: -2 * th * u,
        "mixed_jvp": lambda y, th, t: -2 * th * t,
    }
    case = Case(NUMPY, None, y, theta, np.eye(4) * (2 * 3.0**0.5 / 5), zeros(2.0), zeros(-1.0), products)
    assert_right(NUMPY, outcome(lambda: run(mode, case.using(Stationary, *products), solver=solver)),
                 case.expected(mode), 1e-8)  # fmt: skip
    derived = case.using(Root, "grad")
    assert_right(NUMPY, outcome(lambda: run(mode, derived, solver=solver)), case.expected(mode), 1e-6)


def test_fault_38_transposed_matrix_of_unknowns(solver: str) -> None:
    y = numbers((3, 2)).T
    theta = np.asfortranarray(y**3)
    condition = Root(lambda y, th: y**3 - th, jvp=lambda y, th, v: 3 * y**2 * v)
    v = np.broadcast_to(np.array([[1.0], [2.0]]), (2, 3))
    found = outcome(lambda: implicit_vjp(condition, y, theta, v, solver=solver))
    assert_right(NUMPY, found, v / (3 * y**2), 1e-6)


@pytest.mark.parametrize("layout", [*LAYOUTS, "broadcast"])
def test_fault_38_linear_solve(solver: str, layout: str) -> None:
    A = np.eye(3) * 2 if layout == "broadcast" else numbers((3, 3)) @ numbers((3, 3)).T + 3 * np.eye(3)
    x = np.full(3, 0.5) if layout == "broadcast" else numbers((3,))
    lay = LAYOUTS.get(layout, lambda x: np.broadcast_to(np.float64(1.0), x.shape) if x.ndim == 1 else x)
    matrix, b = lay(A), lay(A @ x)
    before = snapshot(NUMPY, matrix, b)
    assert_right(NUMPY, outcome(lambda: linear_solve(matrix, b, solver=solver)), x, 1e-8)
    assert snapshot(NUMPY, matrix, b) == before


@pytest.mark.parametrize("items", [(), (3,)])
@pytest.mark.parametrize("mode", MODES)
def test_fault_38_inputs_are_unmodified(lib: Library, solver: str, mode: str, items: tuple[int, ...]) -> None:
    case = make(lib, items=items)
    inputs = (case.y, case.theta, case.v, case.t)
    before = snapshot(lib, *inputs)
    for condition in (case.condition, case.using(Root, "grad").condition):
        found = outcome(lambda c=condition: run(mode, replace(case, condition=c), solver=solver,
                                                **({"batched": True} if items else {})))  # fmt: skip
        assert_right(lib, found, case.expected(mode), 1e-6)
    assert snapshot(lib, *inputs) == before


def test_fault_38_start_vector_is_unmodified(lib: Library, solver: str) -> None:
    case = make(lib)
    x0 = lib.array(numbers((4,), 9.0))
    before = snapshot(lib, x0)
    found = outcome(lambda: implicit_vjp(case.condition, case.y, case.theta, case.v, solver=solver, x0=x0))
    assert_right(lib, found, case.expected("vjp"), 1e-7)
    assert snapshot(lib, x0) == before


@pytest.mark.parametrize("name", ["grad", "hvp", "mixed_vjp", "fun"])
def test_fault_38_callback_that_works_in_place(lib: Library, solver: str, name: str) -> None:
    case = make(lib)
    rest = [k for k in ("grad", "hvp", "mixed_vjp") if k != name]

    def greedy(y: Any, th: Any, *vector: Any) -> Any:
        out = case.products["grad" if name == "fun" else name](y, th, *vector)
        target = vector[0] if vector else y
        target *= 0
        return out

    bad = case.using(Root, "grad", "mixed_vjp", vjp=greedy, hvp=case.products["hvp"]) if name == "fun" else \
        case.using(Stationary, *rest, **{name: greedy})  # fmt: skip
    if name == "fun":
        bad = replace(bad, condition=Root(greedy))
    before = snapshot(lib, case.y, case.theta, case.v)
    found = outcome(lambda: run("vjp", bad, solver=solver))
    assert snapshot(lib, case.y, case.theta, case.v) == before, "the user's array was changed"
    if found.error is None:
        assert_right(lib, found, case.expected("vjp"), 1e-6)
    else:
        assert ("by an inplace operation" if lib.name == "torch" else "read-only") in found.text


@pytest.mark.parametrize("name", ["grad", "hvp", "mixed_vjp", "mixed_jvp"])
@pytest.mark.parametrize("mode", MODES)
def test_fault_38_callback_with_a_buffer_of_its_own(lib: Library, solver: str, mode: str, name: str) -> None:
    case = make(lib)
    buffer = lib.xp.zeros(3 if name == "mixed_vjp" else 4, dtype=lib.xp.float64)

    def reusing(*args: Any) -> Any:
        buffer[...] = case.products[name](*args)
        return buffer

    rest = [k for k in ("grad", "hvp", "mixed_vjp", "mixed_jvp") if k != name]
    found = outcome(lambda: run(mode, case.using(Stationary, *rest, **{name: reusing}), solver=solver))
    assert_right(lib, found, case.expected(mode), 1e-7)


@pytest.mark.parametrize("kind", [Root, Stationary])
def test_fault_38_differenced_function_with_a_buffer_of_its_own(lib: Library, solver: str, kind: type) -> None:
    case = make(lib)
    buffer = lib.xp.zeros(4, dtype=lib.xp.float64)

    def reusing(y: Any, th: Any) -> Any:
        buffer[...] = case.products["grad"](y, th)
        return buffer

    found = outcome(lambda: run("vjp", replace(case, condition=Root(reusing) if kind is Root else
                                               Stationary(grad=reusing)), solver=solver))  # fmt: skip
    assert_right(lib, found, case.expected("vjp"), 1e-6)


def test_fault_38_zero_derivative_of_a_function_with_a_buffer_of_its_own(lib: Library, solver: str) -> None:
    # at θ = 0 the derivative of θ² is zero, which is told from a closure by F at another θ: in the same buffer
    zero, buffer = lib.array(np.zeros(2)), lib.xp.zeros(2, dtype=lib.xp.float64)

    def reusing(y: Any, th: Any) -> Any:
        buffer[...] = y - th**2
        return buffer

    condition = Root(reusing, jvp=lambda y, th, v: v, vjp=lambda y, th, u: u)
    found = outcome(lambda: implicit_vjp(condition, zero, zero, lib.array([1.0, 2.0]), solver=solver))
    assert found.quiet, f"false alarm: {found.text}"
    np.testing.assert_allclose(lib.numpy(found.value), np.zeros(2), atol=1e-9)


def test_fault_38_result_is_not_the_buffer_of_a_callback(lib: Library, solver: str) -> None:
    case = make(lib)
    buffer = lib.xp.zeros(3, dtype=lib.xp.float64)

    def reusing(*args: Any) -> Any:
        buffer[...] = case.products["mixed_vjp"](*args)
        return buffer

    lin = linearize(case.using(Stationary, "grad", "hvp", mixed_vjp=reusing).condition, case.y, case.theta,
                    solver=solver)  # fmt: skip
    first = lin.vjp(case.v)
    lin.vjp(2 * case.v)
    np.testing.assert_allclose(lib.numpy(first), case.expected("vjp"), rtol=1e-7)


def test_fault_38_linearization_keeps_its_point(lib: Library, solver: str) -> None:
    case = make(NUMPY if lib.readonly else lib)
    lin = linearize(case.condition, case.y, case.theta, solver=solver)
    case.y[...] = 7.0
    case.theta[...] = 7.0
    np.testing.assert_allclose(lib.numpy(lin.vjp(case.v)), case.expected("vjp"), rtol=1e-7)


def test_fault_38_solver_with_a_buffer_of_its_own(lib: Library, solver: str) -> None:
    xp = lib.xp
    buffer = xp.zeros(3, dtype=xp.float64)

    @implicit_function(Root(lambda y, th: y**3 - th, jvp=lambda y, th, v: 3 * y**2 * v), solver=solver)
    def cube_root(theta: Any) -> Any:
        buffer[...] = theta ** (1 / 3)
        return buffer

    one, eight = lib.array(np.ones(3)), lib.array([8.0, 27.0, 64.0])
    lin = cube_root.linearize(eight)
    cube_root(one)
    found = outcome(lambda: lin.vjp(one))
    assert_right(lib, found, 1 / (3 * np.array([2.0, 3.0, 4.0]) ** 2), 1e-6)


# -- 39: floating-point state of the caller (no_grad and inference_mode belong to other frameworks) -----------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("derived", [False, True])
def test_fault_39_under_errstate_raise(lib: Library, solver: str, mode: str, derived: bool) -> None:
    case = make(lib)
    case = case.using(Root, "grad") if derived else case
    with np.errstate(all="raise"):
        found = outcome(lambda: run(mode, case, solver=solver))
        assert set(np.geterr().values()) == {"raise"}
    assert_right(lib, found, case.expected(mode), 1e-6)


def test_fault_39_zero_cotangent_under_errstate_raise(lib: Library, solver: str) -> None:
    case = make(lib)
    with np.errstate(all="raise"):
        found = outcome(lambda: run("vjp", replace(case, v=lib.array(np.zeros(4))), solver=solver))
    assert_right(lib, found, np.zeros(3), 0.0)


# -- 40: aliasing -----------------------------------------------------------------------------------------
def test_fault_40_solver_returns_theta_itself(lib: Library, solver: str) -> None:
    theta = lib.array([1.0, -2.0, 3.0])
    before = snapshot(lib, theta)
    for condition in (
        Root(lambda y, th: y - th),
        FixedPoint(lambda y, th: th),
        Stationary(grad=lambda y, th: y - th, hvp=lambda y, th, v: v, mixed_vjp=lambda y, th, u: -u,
                   mixed_jvp=lambda y, th, t: -t),
    ):  # fmt: skip
        identity = implicit_function(condition, solver=solver)(lambda theta: theta)
        expected = lib.numpy(theta)
        assert_right(lib, outcome(lambda f=identity: f.vjp(theta, theta)), expected, 1e-7)
        assert_right(lib, outcome(lambda f=identity: f.jvp(theta, theta)), expected, 1e-7)
        assert_right(lib, outcome(lambda f=identity: f.jacobian(theta)), np.eye(3), 1e-7)
    assert snapshot(lib, theta) == before


def test_fault_40_products_that_return_their_argument(lib: Library, solver: str) -> None:
    # A = I returns v itself, B = I returns u itself: dy/dθ = −1
    y, theta = lib.array(np.zeros(3)), lib.array(np.zeros(3))
    condition = Root(lambda y, th: y + th, jvp=lambda y, th, v: v, vjp=lambda y, th, u: u,
                     mixed_vjp=lambda y, th, u: u, mixed_jvp=lambda y, th, t: t)  # fmt: skip
    v = lib.array([1.0, 2.0, 3.0])
    before = snapshot(lib, v)
    lin = linearize(condition, y, theta, solver=solver)
    for found in (outcome(lambda: lin.vjp(v)), outcome(lambda: lin.jvp(v)), outcome(lambda: lin.vjp(v, x0=v))):
        assert_right(lib, found, [-1.0, -2.0, -3.0], 1e-9)
    assert_right(lib, outcome(lin.jacobian), -np.eye(3), 1e-9)
    assert snapshot(lib, v) == before


def test_fault_40_result_shares_no_memory_with_the_inputs(lib: Library, solver: str) -> None:
    y, theta, v = (lib.array(np.ones(3)) for _ in range(3))
    condition = Root(lambda y, th: y + th - 2, jvp=lambda y, th, v: v, vjp=lambda y, th, u: u,
                     mixed_vjp=lambda y, th, u: u, mixed_jvp=lambda y, th, t: t)  # fmt: skip
    lin = linearize(condition, y, theta, solver=solver)
    for call in (lin.vjp, lin.jvp):
        result = call(v)
        before = snapshot(lib, y, theta, v, lin.y, lin.theta)
        result += 5.0  # the result is the caller's own: writable, and nobody else's
        assert snapshot(lib, y, theta, v, lin.y, lin.theta) == before
        np.testing.assert_allclose(lib.numpy(call(v)), -np.ones(3), rtol=1e-9)


def test_fault_40_jacobian_is_writable(lib: Library, solver: str) -> None:
    case = make(lib)
    lin = linearize(case.condition, case.y, case.theta, solver=solver)
    J = lin.jacobian()
    J *= 0.0
    assert_right(lib, outcome(lin.jacobian), case.expected("jacobian"), 1e-8)


def test_fault_40_one_array_for_everything(lib: Library, solver: str) -> None:
    # y, θ, cotangent and start are one and the same array
    x = lib.array([1.0, 1.0])
    condition = Root(lambda y, th: y**3 - th, jvp=lambda y, th, v: 3 * y**2 * v)
    found = outcome(lambda: implicit_vjp(condition, x, x, x, x0=x, solver=solver))
    assert_right(lib, found, [1 / 3, 1 / 3], 1e-7)
    assert_right(lib, outcome(lambda: implicit_jvp(condition, x, x, x, solver=solver)), [1 / 3, 1 / 3], 1e-7)


def test_fault_40_solver_that_changes_theta_in_place(lib: Library, solver: str) -> None:
    lib = NUMPY if lib.readonly else lib

    @implicit_function(Root(lambda y, th: y - 2 * th**2), solver=solver)
    def careless(theta: Any) -> Any:
        y = 2 * theta**2
        theta *= 0
        return y

    theta = lib.array([1.0, 2.0])
    found = outcome(lambda: careless.vjp(theta, lib.array([1.0, 1.0])))
    if found.quiet:
        assert_right(lib, found, [4.0, 8.0], 1e-6)
    else:
        assert_told(found, (ImplicitDiffError, UserWarning, ValueError), "not a solution|read-only|in place")
