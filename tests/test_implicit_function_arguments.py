"""Faults 69 and 72 at the decorator: theta and data by name, aux as a function, records in place of the solution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Library
from frameworks import framework
from scipy.optimize import OptimizeResult

from implicitdiff import CallbackError, InputError, Root, implicit_function


def residual(y: Any, th: Any, scale: Any, shift: Any = 0.0) -> Any:
    return scale * (y - th["a"]) - shift * th["b"]


def problem(lib: Library, **options: Any) -> SimpleNamespace:
    """y = a + shift b / scale, with theta a dict and data of the condition beside an option of the solver."""
    seen: list[float] = []

    @implicit_function(Root(residual), **options)
    def fit(th: Any, scale: Any, shift: Any = 0.0, *, tol: float = 1e-8) -> Any:
        seen.append(tol)
        return th["a"] + shift / scale * th["b"]

    th = {"a": lib.array(np.array([1.0, 2.0])), "b": lib.array(np.array([3.0, 5.0]))}
    return SimpleNamespace(fit=fit, th=th, scale=lib.array(np.array([2.0, 4.0])), v=lib.array(np.ones(2)), seen=seen)


CALLS = {
    "by position": lambda p, f, *v: f(p.th, *v, p.scale, 3.0, tol=1e-4),
    "data by name": lambda p, f, *v: f(p.th, *v, shift=3.0, scale=p.scale, tol=1e-4),
    "theta by its name": lambda p, f, *v: f(*v, th=p.th, scale=p.scale, shift=3.0, tol=1e-4),
    "some": lambda p, f, *v: f(p.th, *v, p.scale, tol=1e-4, shift=3.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_fault_69_by_name(lib: Library, name: str) -> None:
    p, call = problem(lib), CALLS[name]
    np.testing.assert_allclose(lib.numpy(call(p, p.fit)), [5.5, 5.75])
    pulled = call(p, p.fit.vjp, p.v)
    np.testing.assert_allclose(lib.numpy(pulled["b"]), [1.5, 0.75])
    np.testing.assert_allclose(lib.numpy(call(p, p.fit.jvp, p.th)), [5.5, 5.75])
    assert set(p.seen) == {1e-4}


def test_fault_69_wrong_names() -> None:
    fit = implicit_function(residual)(lambda th, tol=1e-8, scale=1.0: th)
    with pytest.raises(TypeError, match="without its parameter 'th'"):
        fit(theta=1.0)
    with pytest.raises(InputError, match=r"(?s)scale is data.*tol, which stands before"):
        fit(1.0, scale=2.0)
    with pytest.raises(TypeError, match="theta and a cotangent"):
        fit.vjp()
    with pytest.raises(InputError, match="has_aux is str"):
        implicit_function(residual, has_aux="yes")


def test_fault_69_aux_as_a_function(lib: Library) -> None:
    """It is called at the solution with theta and the data."""
    p = problem(lib, has_aux=lambda y, th, scale, shift=0.0: {"value": y * th["a"] * scale, "flag": "done"})
    _, aux = p.fit(p.th, shift=3.0, scale=p.scale)
    assert aux["flag"] == "done"
    np.testing.assert_allclose(lib.numpy(aux["value"]), [2 * 5.5, 8 * 5.75])
    np.testing.assert_allclose(lib.numpy(p.fit.vjp(p.th, p.v, p.scale, 3.0)["b"]), [1.5, 0.75])


class RootResults(OptimizeResult):
    """As SciPy's."""


class Table:
    """As a table of pandas."""

    __module__ = "pandas"

    def to_numpy(self) -> Any:
        return np.ones(2)


@pytest.mark.parametrize(
    ("record", "field"), [(OptimizeResult(x=np.ones(2)), "x"), (RootResults(root=1.0), "root"), (Table(), "to_numpy")]
)
@pytest.mark.parametrize("has_aux", [False, True])
def test_fault_72_records(lib: Library, record: Any, field: str, has_aux: bool) -> None:
    solve = implicit_function(Root(residual), has_aux=has_aux)(lambda theta: (record, None) if has_aux else record)
    with pytest.raises(CallbackError, match=rf"(?s)returned {type(record).__name__}.*return its \.{field}"):
        solve(lib.array(np.ones(2)))


def test_fault_69_aux_is_differentiated_by_jax() -> None:
    """d(Σ y + ½ ‖y‖² + Σ θ) at y = a θ², a given by name: 2 θ + 2 θ³ + 1."""
    jax = framework("jax")

    @implicit_function(Root(lambda y, t, a: y - a * t**2), has_aux=lambda y, t, a: (y**2).sum() / 2 + t.sum())
    def solve(th: Any, a: Any) -> Any:
        return a * th**2

    def loss(theta: Any) -> Any:
        y, aux = solve(th=theta, a=1.0)
        return y.sum() + aux

    np.testing.assert_allclose(jax.gradient(loss)(jax.xp.asarray([2.0, 3.0])), [21.0, 61.0])
