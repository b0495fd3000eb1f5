"""Linear problems for JAX whose functions are the same in every test, so that each program is compiled once.

F(y, θ) = A y − C θ with A and C in ``args``, and C the signed cyclic shift of `conftest`: a sign or a transpose in the
wrong place changes the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import JAX, Outcome, exact_solve, outcome, shift, solution_at

from implicitdiff import FixedPoint, Root, Stationary, implicit_grad, implicit_jvp, implicit_vjp, linear_solve

if not JAX:
    pytest.skip("needs JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

(LIB,) = JAX


def _fun(y: Any, theta: Any, A: Any, C: Any) -> Any:
    return A @ y - C @ theta


def _quadratic(y: Any, theta: Any, A: Any, C: Any) -> Any:
    return y @ A @ y / 2 - y @ C @ theta


CONDITIONS = {
    "root": Root(_fun),
    "objective": Stationary(_quadratic, kind="saddle"),
    "hvp": Stationary(grad=_fun, hvp=lambda y, t, v, A, C: A @ v, mixed_vjp=lambda y, t, u, A, C: -C.T @ u,
                      kind="saddle", mixed_jvp=lambda y, t, d, A, C: -C @ d),
    "hessian": Stationary(grad=_fun, hessian=lambda y, t, A, C: A, kind="saddle"),
    "jacobian": Root(_fun, jacobian=lambda y, t, A, C: A),
    "adjoint": Root(_fun, vjp=lambda y, t, u, A, C: A.T @ u),
    "fixed-point": FixedPoint(lambda y, t, A, C: y - _fun(y, t, A, C)),
}  # fmt: skip
CALLS = {"vjp": implicit_vjp, "jvp": implicit_jvp, "grad": implicit_grad}
SYMMETRIC_DOORS = ("vjp:hvp", "jvp:hessian", "grad:objective")
GENERAL_DOORS = ("vjp:root", "jvp:root", "solve:matrix")
OTHER_DOORS = ("jvp:jacobian", "vjp:adjoint", "vjp:fixed-point")
TWO_DOORS = ("vjp:hvp", "jvp:root")
"""A symmetric and a general one, where every door would compile for too long."""


QUICK = ("cg", "auto")
"""One that iterates, and the default, which assembles what is small and factorises it."""


def quickly(names: Sequence[str]) -> list[Any]:
    """Solvers to parametrize with: each compiles programs of its own, and all but a few are left to the slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


def arguments(door: str, A: np.ndarray, b: np.ndarray, dtype: Any = np.float64) -> list[Any]:
    """The arrays for a door: A and b, or y, θ, the vector, A and C."""
    A, b = A.astype(dtype), b.astype(dtype)
    if door == "solve:matrix":
        return [jnp.asarray(A), jnp.asarray(b)]
    C, y = shift(len(b)).astype(dtype), solution_at(len(b)).astype(dtype)
    vector = C.T @ b if door.startswith("jvp") else b
    return [jnp.asarray(x) for x in (y, C.T @ (A @ y), vector, A, C)]


def call(door: str, solver: Any, options: dict[str, Any], *arrays: Any) -> Any:
    """Ask at a door."""
    if door == "solve:matrix":
        return linear_solve(*arrays, solver=solver, **options)
    route, form = door.split(":")
    y, theta, vector, A, C = arrays
    first = (vector, y, theta) if route == "grad" else (y, theta, vector)
    return CALLS[route](CONDITIONS[form], *first, args=(A, C), solver=solver, **options)


def through(
    door: str, A: np.ndarray, b: np.ndarray, solver: Any, *, dtype: Any = np.float64, **options: Any
) -> Outcome:
    """Call eagerly: what is wrong is raised or warned about."""
    return outcome(lambda: call(door, solver, options, *arguments(door, A, b, dtype)))


@functools.cache
def _compiled(door: str, solver: Any) -> Any:
    return jax.jit(functools.partial(call, door, solver, {"return_report": True}))


def compiled(door: str, A: np.ndarray, b: np.ndarray, solver: Any) -> tuple[np.ndarray, bool]:
    """Call under the user's own jit: the value, and whether the report says that it converged."""
    found = outcome(lambda: _compiled(door, solver)(*arguments(door, A, b)))
    assert found.quiet, found.text
    value, report = found.value
    assert bool(report.converged) is bool(report.status == 0)
    return np.asarray(value), bool(report.converged)


def assert_compiled_nan(door: str, A: np.ndarray, b: np.ndarray, solver: Any) -> None:
    """Under jit nothing can be raised: the value is NaN throughout, and the report knows."""
    value, converged = compiled(door, A, b, solver)
    assert np.all(np.isnan(value)), f"a number from a failed solve: {value}"
    assert not converged


def assert_compiled_right(door: str, A: np.ndarray, b: np.ndarray, solver: Any, truth: np.ndarray, rtol: float) -> None:
    """The right numbers under jit, and a report that says so."""
    value, converged = compiled(door, A, b, solver)
    assert converged
    np.testing.assert_allclose(value, truth, rtol=0, atol=rtol * np.linalg.norm(truth))


def assert_compiled_right_or_nan(
    door: str, A: np.ndarray, b: np.ndarray, solver: Any, truth: np.ndarray, rtol: float
) -> None:
    """Never a wrong number."""
    value, converged = compiled(door, A, b, solver)
    if converged:
        np.testing.assert_allclose(value, truth, rtol=0, atol=rtol * np.linalg.norm(truth))
    else:
        assert np.all(np.isnan(value)), f"a number from a failed solve: {value}"


def solved(A: np.ndarray, b: np.ndarray, door: str, value: Any) -> float:
    """Relative residual of what a door returned."""
    reverse = door.startswith(("vjp", "grad"))
    x = np.asarray(value).astype(np.longdouble)
    x = shift(len(b)) @ x if reverse else x
    wide = (A.T if reverse else A).astype(np.longdouble)
    return float(np.linalg.norm(b - wide @ x) / np.linalg.norm(b))


def truth_at(door: str, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A⁻¹ b, or Cᵀ A⁻ᵀ b for the reverse doors."""
    return shift(len(b)).T @ exact_solve(A.T, b) if door.startswith(("vjp", "grad")) else exact_solve(A, b)
