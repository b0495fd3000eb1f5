"""Faults 49 to 52: closures, threads, callbacks that raise or return the wrong thing."""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import NUMPY, Library, assert_right, assert_told, outcome
from helpers_faults import MODES, Case, make, run

from implicitdiff import (
    CG,
    GMRES,
    MINRES,
    CallbackError,
    DerivativeError,
    FixedPoint,
    Root,
    ShapeError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_vjp,
    linear_solve,
    linearize,
)
from implicitdiff.backends.numpy import NumpyBackend


# -- 49: theta captured by closure ------------------------------------------------------------------------
def _captured(lib: Library, kind: str, outer: Any) -> Any:
    xp = lib.xp
    return {
        "objective": lambda y, th: xp.sum((y - outer**2) ** 2),
        "grad": Stationary(grad=lambda y, th: y - outer**2),
        "grad and hvp": Stationary(grad=lambda y, th: y - outer**2, hvp=lambda y, th, v: v),
        "root": Root(lambda y, th: y - outer**2),
        "root and jvp": Root(lambda y, th: y - outer**2, jvp=lambda y, th, v: v, vjp=lambda y, th, u: u),
        "fixed point": FixedPoint(lambda y, th: 0 * y + outer**2),
    }[kind]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["objective", "grad", "grad and hvp", "root", "root and jvp", "fixed point"])
def test_fault_49_closure(lib: Library, kind: str, mode: str) -> None:
    theta = lib.array([1.0, 2.0, 3.0])
    case = make(lib, n=3, m=3)
    case = replace(case, condition=_captured(lib, kind, theta), y=theta**2, theta=theta)
    found = outcome(lambda: run(mode, case))
    assert_told(found, DerivativeError, "(?s)does not depend on theta.*closure")


def test_fault_49_closure_in_other_units(lib: Library) -> None:
    """y of 1e-6 and of 0: the other point at which F is asked is one percent away, or exp would overflow there."""
    xp, theta = lib.xp, lib.array([1.0, 2.0, 1.0])
    condition = Root(lambda y, _: xp.exp(y * 1e6) - theta, jvp=lambda y, _, v: 1e6 * theta * v)
    y = lib.array(1e-6 * np.log([1.0, 2.0, 1.0]))
    for other in (theta, lib.array([1e-9, 0.0, 1e-9])):
        found = outcome(lambda: implicit_vjp(condition, y, other, y, solver="lu"))
        assert_told(found, DerivativeError, "does not depend on theta")


UNITS = [1e-20, 1e-9, 1.0, 1e9, 1e20]


@pytest.mark.parametrize("of_theta", UNITS)
@pytest.mark.parametrize("of_y", UNITS)
def test_fault_49_zeros_in_any_unit(lib: Library, of_y: float, of_theta: float) -> None:
    """y or θ is 0, in whatever unit: F that sees θ where it is not 0 is no fault, and F that never does is one."""
    xp, one, zero = lib.xp, lib.array([1.0, -2.0]), lib.array([0.0, 0.0])

    def g(condition: Root, y: Any, theta: Any) -> Any:
        return outcome(lambda: implicit_vjp(condition, y, theta, one / of_y, solver="lu"))

    def seen(y: Any, theta: Any) -> Any:
        return y / of_y + (y / of_y) ** 2 * theta / of_theta

    sees = Root(
        seen, jvp=lambda y, t, v: v * (1 + 2 * y / of_y * (t / of_theta)) / of_y,
        vjp=lambda y, t, u: u * (1 + 2 * y / of_y * (t / of_theta)) / of_y,
        mixed_vjp=lambda y, t, u: u * (y / of_y) ** 2 / of_theta,
    )  # fmt: skip
    for theta in (of_theta * one, zero, lib.array([0.0, of_theta])):
        assert_right(lib, g(sees, zero, theta), np.zeros(2), 0.0)
    flat = {"jvp": lambda y, t, v: v / of_y, "vjp": lambda y, t, u: u / of_y}
    at_one = Root(
        lambda y, t: y / of_y - one - (t / of_theta) ** 2, **flat,
        mixed_vjp=lambda y, t, u: -2 * u * (t / of_theta) / of_theta,
    )  # fmt: skip
    assert_right(lib, g(at_one, of_y * one, zero), np.zeros(2), 0.0)
    blind = Root(lambda y, t: xp.exp(y / of_y) - one**0, **flat, mixed_vjp=lambda y, t, u: 0 * u)
    for theta in (of_theta * one, zero):
        assert_told(g(blind, zero, theta), DerivativeError, "does not depend on theta")
    # beside an entry that has a size, a zero has one of its own
    mixed, scale = lib.array([0.0, 1.0]), lib.array([of_y, 1.0])
    beside = Root(
        lambda y, t: y / scale - mixed + (y[:1] / of_y) ** 2 * t, jvp=lambda y, t, v: v / scale,
        vjp=lambda y, t, u: u / scale, mixed_vjp=lambda y, t, u: u * (y[:1] / of_y) ** 2,
    )  # fmt: skip
    assert_right(lib, outcome(lambda: implicit_vjp(beside, mixed, one, one, solver="lu")), np.zeros(2), 0.0)


def test_fault_49_closure_with_every_solver(lib: Library, solver: str) -> None:
    theta = lib.array([1.0, 2.0])
    for kind in ("objective", "root"):
        condition = _captured(lib, kind, theta)
        found = outcome(lambda c=condition: implicit_vjp(c, theta**2, theta, theta, solver=solver))
        assert_told(found, DerivativeError, "does not depend on theta")


def test_fault_49_closure_in_a_batch(lib: Library, solver: str) -> None:
    theta = lib.array([[1.0, 2.0], [1.0, 2.0]])
    condition = Root(lambda y, th: y - theta[0, ...] ** 2, jvp=lambda y, th, v: v)
    found = outcome(lambda: implicit_vjp(condition, theta**2, theta, theta, batched=True, solver=solver))
    assert_told(found, DerivativeError, "does not depend on theta")


@pytest.mark.parametrize("mode", MODES)
def test_fault_49_a_derivative_that_is_zero_here_is_no_fault(lib: Library, solver: str, mode: str) -> None:
    case = replace(make(lib, n=3, m=3), condition=Root(lambda y, th: y - th**2, jvp=lambda y, th, v: v),
                   y=lib.array(np.zeros(3)), theta=lib.array(np.zeros(3)), truth=np.zeros((3, 3)))  # fmt: skip
    found = outcome(lambda: run(mode, case, solver=solver))
    assert found.quiet, f"false alarm: {found.text}"
    np.testing.assert_allclose(lib.numpy(found.value), case.expected(mode), atol=1e-9)


def test_fault_49_zero_vectors_and_unused_parameters_are_no_fault(lib: Library, solver: str) -> None:
    case = make(lib)
    found = outcome(lambda: run("vjp", replace(case, v=lib.array(np.zeros(4))), solver=solver))
    assert_right(lib, found, np.zeros(3), 0.0)
    found = outcome(lambda: run("jvp", replace(case, t=lib.array(np.zeros(3))), solver=solver))
    assert_right(lib, found, np.zeros(4), 0.0)
    used, unused = lib.array([2.0]), lib.array([5.0, 6.0])
    condition = Root(lambda y, th: y - 3 * th["used"])
    g = outcome(lambda: implicit_vjp(condition, 3 * used, {"used": used, "unused": unused}, used, solver=solver))
    assert g.quiet, g.text
    np.testing.assert_allclose(lib.numpy(g.value["used"]), [6.0], rtol=1e-7)
    np.testing.assert_array_equal(lib.numpy(g.value["unused"]), [0.0, 0.0])


def test_fault_49_loss_that_does_not_see_theta_is_no_fault(lib: Library) -> None:
    pytest.importorskip("autograd")
    case, xp = make(lib), lib.xp
    found = outcome(lambda: implicit_grad(case.condition, lambda y, th: xp.sum(case.v * y), case.y, case.theta))
    assert_right(lib, found, case.expected("vjp"), 1e-7)


# -- 50: threads ------------------------------------------------------------------------------------------
def _in_threads(call: Callable[[int], Any], count: int = 8, rounds: int = 4) -> list[Any]:
    """Run a call from eight threads that start together."""
    barrier = threading.Barrier(count)

    def one(i: int) -> list[Any]:
        barrier.wait(timeout=60)
        return [call(i) for _ in range(rounds)]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.slow(on=("array_api_strict",))
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fault_50_shared_linearization(lib: Library, solver: str, derived: bool, symmetric: bool) -> None:
    if not symmetric and solver in {"cholesky", "cg", "minres"}:
        pytest.skip("not for a general operator")
    case = make(lib, n=12, m=5, symmetric=symmetric)
    if derived:
        case = case.using(Stationary if symmetric else Root, "grad")
    lin = linearize(case.condition, case.y, case.theta, solver=solver)  # factored by whoever comes first
    vjp, jvp = case.expected("vjp"), case.expected("jvp")

    def call(i: int) -> float:
        scale = float(i + 1)
        if i % 2:
            return float(np.max(np.abs(lib.numpy(lin.vjp(case.v * scale)) - scale * vjp))) / scale
        return float(np.max(np.abs(lib.numpy(lin.jvp(case.t * scale)) - scale * jvp))) / scale

    assert np.max(_in_threads(call)) < 1e-5


@pytest.mark.slow(on=("array_api_strict",))
@pytest.mark.parametrize("derived", [False, True])
def test_fault_50_separate_objects(lib: Library, solver: str, derived: bool) -> None:
    cases = [make(lib, n=3 + i, m=2 + i) for i in range(8)]
    cases = [c.using(Root, "grad") if derived else c for c in cases]

    def call(i: int) -> float:
        mode = MODES[i % len(MODES)]
        return float(np.max(np.abs(lib.numpy(run(mode, cases[i], solver=solver)) - cases[i].expected(mode))))

    assert np.max(_in_threads(call, rounds=2)) < 1e-5


def test_fault_50_other_threads_keep_their_warnings() -> None:
    # A function is tried with complex numbers. A filter for warnings that is set meanwhile is that of every thread.
    case = make(NUMPY)
    inside, seen = threading.Event(), threading.Event()

    def fun(y: Any, th: Any) -> Any:
        if not isinstance(y, np.ndarray) or not isinstance(th, np.ndarray):
            raise TypeError("plain NumPy only")  # no tracing
        if np.iscomplexobj(y) and not inside.is_set():
            inside.set()
            seen.wait(timeout=10)
        return case.products["grad"](y, th)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        before = list(warnings.filters)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run, "vjp", case.using(Root, grad=fun), backend=NumpyBackend())
            inside.wait(timeout=10)
            meanwhile = list(warnings.filters)
            seen.set()
            np.testing.assert_allclose(future.result(timeout=60), case.expected("vjp"), rtol=1e-7)
        assert [f for f in meanwhile if f in before] == before  # one more, about complex numbers, and nothing lost
        assert all(f[2] is np.exceptions.ComplexWarning for f in meanwhile if f not in before)
        assert warnings.filters == before


# -- 51: a callback raises --------------------------------------------------------------------------------
class _UsersOwnError(RuntimeError):
    pass


RAISES = [np.linalg.LinAlgError("Singular matrix"), FloatingPointError("x"), StopIteration(3)]
CALLBACKS = ("fun", "grad", "hvp", "hessian", "mixed_vjp", "mixed_jvp", "jvp", "vjp", "jacobian", "outer", "solver")


def _with_callback(case: Case, name: str, callback: Callable[..., Any]) -> tuple[Case, str]:
    """Return a case in which this callback is the user's, and a mode that calls it."""
    general = ("grad", "hvp", "vjp", "mixed_vjp", "mixed_jvp")
    if name in {"grad", "hvp", "mixed_vjp", "mixed_jvp"}:
        rest = [k for k in ("grad", "hvp", "mixed_vjp", "mixed_jvp") if k != name]
        return case.using(Stationary, *rest, **{name: callback}), "jvp" if name == "mixed_jvp" else "vjp"
    if name == "hessian":
        return case.using(Stationary, "grad", "mixed_vjp", hessian=callback), "vjp"
    if name == "jacobian":
        return case.using(Root, "grad", "mixed_vjp", jacobian=callback), "vjp"
    if name == "jvp":
        return case.using(Root, *(k for k in general if k != "hvp"), jvp=callback), "jvp"
    if name == "vjp":
        return case.using(Root, *(k for k in general if k != "vjp"), vjp=callback), "vjp"
    return replace(case, condition=callback), "vjp"  # fun: a bare objective


def _call_with(case: Case, name: str, callback: Callable[..., Any], solver: str) -> Any:
    if name == "outer":
        return implicit_grad(case.condition, callback, case.y, case.theta, solver=solver)
    if name == "solver":
        return implicit_function(case.condition, solver=solver)(callback).vjp(case.theta, case.v)
    case, mode = _with_callback(case, name, callback)
    # a direct method assembles A from the given jvp and has no use for vjp
    return run(mode, case, solver="gmres" if name == "vjp" else solver)


def _assert_error_is_kept(lib: Library, solver: str, name: str, error: Exception) -> None:
    def user_function_that_raises(*args: Any) -> Any:
        raise error

    general = name in {"jvp", "vjp", "jacobian"} and solver in {"lu", "gmres", "auto"}
    case = make(lib, symmetric=not general)
    with pytest.raises(type(error)) as caught:
        _call_with(case, name, user_function_that_raises, solver)
    assert caught.value is error
    frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "user_function_that_raises"


@pytest.mark.parametrize("name", CALLBACKS)
def test_fault_51_callback_raises(lib: Library, solver: str, name: str) -> None:
    _assert_error_is_kept(lib, solver, name, _UsersOwnError("oh"))


@pytest.mark.parametrize("error", RAISES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", CALLBACKS)
def test_fault_51_any_type(lib: Library, name: str, error: Exception) -> None:
    _assert_error_is_kept(lib, "auto", name, error)


@pytest.mark.parametrize("name", ["hvp", "grad"])
@pytest.mark.parametrize("late", [2, 3])
def test_fault_51_callback_raises_late(lib: Library, solver: str, name: str, late: int) -> None:
    case = make(lib, n=6)
    calls = 0

    def unreliable(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == late:
            raise _UsersOwnError("late")
        return case.products[name](*args)

    rest = [k for k in ("grad", "hvp", "mixed_vjp") if k != name] if name == "hvp" else []
    bad = case.using(Stationary if name == "hvp" else Root, *rest, **{name: unreliable})
    found = outcome(lambda: run("vjp", bad, solver=solver))
    while calls < late:  # Torch records a function in one call, and needs no other
        assert_right(lib, found, case.expected("vjp"), 1e-6)
        found = outcome(lambda: run("vjp", bad, solver=solver))
    if found.quiet:  # a trial of the complex step may take the error for a "no"
        assert_right(lib, found, case.expected("vjp"), 1e-6)
    else:
        assert isinstance(found.error, _UsersOwnError)
    assert_right(lib, outcome(lambda: run("vjp", bad, solver=solver)), case.expected("vjp"), 1e-6)


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
def test_fault_51_preconditioner_raises(lib: Library, kind: type) -> None:
    case = make(lib)

    def user_preconditioner(v: Any) -> Any:
        raise _UsersOwnError("no")

    with pytest.raises(_UsersOwnError) as caught:
        run("vjp", case, solver=kind(preconditioner=user_preconditioner))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "user_preconditioner"


# -- 52: a callback returns the wrong thing ---------------------------------------------------------------
WRONG: dict[str, Callable[[Library], Any]] = {
    "None": lambda lib: None,
    "float": lambda lib: 1.0,
    "str": lambda lib: "1.0",
    "list": lambda lib: [1.0, 2.0, 3.0, 4.0],
    "tuple": lambda lib: (lib.array(np.ones(4)), lib.array(np.ones(4))),
    "object": lambda lib: object(),
    r"\(7,\)": lambda lib: lib.array(np.ones(7)),
    r"\(4, 1\)": lambda lib: lib.array(np.ones((4, 1))),
    r"\(4, 4, 1\)": lambda lib: lib.array(np.ones((4, 4, 1))),
}


@pytest.mark.parametrize("got", WRONG)
@pytest.mark.parametrize("name", [c for c in CALLBACKS if c != "solver"])
def test_fault_52_wrong_return(lib: Library, name: str, got: str) -> None:
    case = make(lib, symmetric=name not in {"jvp", "vjp", "jacobian"})
    if got == "float" and name in {"fun", "outer"}:
        pytest.skip("a scalar it is; that it is constant belongs to fault 49")
    if got == r"\(4, 4, 1\)" and name in {"hessian", "jacobian"}:
        pytest.skip("holds a matrix")
    value = WRONG[got](lib)
    found = outcome(lambda: _call_with(case, name, lambda *args: value, "auto"))
    what = {"float": r"float|\(\)", "str": "str", "tuple": r"tuple|\(", "list": r"list|\["}.get(got, got)
    assert_told(found, CallbackError, rf"(?s)^{name} returned .*({what}).*Expected")


@pytest.mark.parametrize("got", ["None", "tuple", r"\(7,\)"])
@pytest.mark.parametrize("name", ["grad", "hvp", "mixed_vjp", "mixed_jvp"])
def test_fault_52_wrong_return_with_every_solver(lib: Library, solver: str, name: str, got: str) -> None:
    case, value = make(lib), WRONG[got](lib)
    found = outcome(lambda: _call_with(case, name, lambda *args: value, solver))
    assert_told(found, CallbackError, rf"(?s)^{name} returned .*Expected")


@pytest.mark.parametrize("got", ["None", "tuple", r"\(7,\)", r"\(4, 1\)"])
@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
def test_fault_52_preconditioner(lib: Library, kind: type, got: str) -> None:
    case, value = make(lib), WRONG[got](lib)
    found = outcome(lambda: run("vjp", case, solver=kind(preconditioner=lambda v: value)))
    assert_told(found, (CallbackError, ShapeError), "preconditioner.*returned")


def test_fault_52_batched_callbacks(lib: Library, solver: str) -> None:
    # written for one item where all are wanted, or for all where the framework maps over them
    case = make(lib, items=(3,))
    shapes, kinds = [(4,), (3, 4)], [(), (3,)]
    if lib.per_item:
        shapes.reverse()
        kinds.reverse()
    wrong = lib.array(np.ones(shapes[0]))
    bad = case.using(Stationary, "grad", "mixed_vjp", hvp=lambda y, th, v: wrong)
    found = outcome(lambda: run("vjp", bad, batched=True, solver=solver))
    got, expected = (str(shape).replace("(", r"\(").replace(")", r"\)") for shape in shapes)
    assert_told(found, CallbackError, rf"(?s)^hvp returned .*{got}.*Expected.*{expected}")
    values = lib.array(np.ones(kinds[0]))
    scalar = replace(case, condition=lambda y, th: values * lib.xp.sum(y * y))
    what = r"\(3,\).*Expected a scalar" if lib.per_item else r"\(\).*Expected one scalar per item.*\(3,\)"
    found = outcome(lambda: run("vjp", scalar, batched=True, solver=solver))
    assert_told(found, CallbackError, rf"(?s)^fun returned.*{what}")


@pytest.mark.parametrize("got", ["None", "float", "tuple", "list", r"\(7,\)", r"\(4, 1\)"])
def test_fault_52_linear_solve_with_a_function(lib: Library, solver: str, got: str) -> None:
    b, value = lib.array(np.ones(4)), WRONG[got](lib)
    found = outcome(lambda: linear_solve(lambda v: value, b, solver=solver, symmetric=True))
    assert_told(found, (CallbackError, ShapeError), r"(?s)^A returned .*\(4,\)")


def test_fault_51_linear_solve_with_a_function(lib: Library, solver: str) -> None:
    def user_product(v: Any) -> Any:
        raise _UsersOwnError("no")

    with pytest.raises(_UsersOwnError) as caught:
        linear_solve(user_product, lib.array(np.ones(4)), solver=solver, symmetric=True)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "user_product"


def test_fault_52_linear_solve_with_a_buffer(lib: Library, solver: str) -> None:
    A, b = lib.array([[3.0, 1.0], [1.0, 2.0]]), lib.array([1.0, -3.0])
    buffer = lib.xp.zeros(2, dtype=lib.xp.float64)

    def product(v: Any) -> Any:
        buffer[...] = A @ v
        return buffer

    assert_right(lib, outcome(lambda: linear_solve(product, b, solver=solver, symmetric=True)), [1.0, -2.0], 1e-8)
