"""What is given of derivatives, held against its function as in a program: in arrays, and without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from implicitdiff import FixedPoint, Root
from implicitdiff.problem import Problem
from implicitdiff.registry import get_backend
from implicitdiff.rules import Rules
from implicitdiff.verification.consistency import contradicted

A, C = np.array([[2.0, 0.7, 0.0], [-0.4, 1.5, 0.3], [0.1, 0.0, 1.0]]), np.array([[1.0, 2.0], [0.0, -1.0], [0.5, 0.3]])
Y, T = np.array([0.5, -1.2, 0.8]), np.array([1.2, -0.7])
S = A @ Y + Y**3 / 10 - C @ T**2


def F(y: Any, t: Any) -> Any:
    return A @ y + y**3 / 10 - C @ t**2 - S.astype(y.dtype)


def slope(y: Any) -> Any:
    return A + np.diag(0.3 * y**2)


RIGHT: dict[str, Callable[..., Any]] = {
    "jvp": lambda y, t, v: slope(y) @ v, "vjp": lambda y, t, u: slope(y).T @ u,
    "mixed_jvp": lambda y, t, d: -C @ (2 * t * d), "mixed_vjp": lambda y, t, u: -2 * t * (C.T @ u),
}  # fmt: skip
WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "doubled": {"jvp": lambda y, t, v: 2 * slope(y) @ v},
    "5 % off": {"vjp": lambda y, t, u: 1.05 * slope(y).T @ u},
    "swapped": {"jvp": RIGHT["vjp"], "vjp": RIGHT["jvp"]},
    "sign": {"mixed_vjp": lambda y, t, u: 2 * t * (C.T @ u)},
    "factor": {"mixed_jvp": lambda y, t, d: -C @ (t * d)},
}


def wrong(condition: Any, y: Any = Y, theta: Any = T) -> bool:
    found = contradicted(Rules(Problem(get_backend("numpy"), condition, y, theta)).maps.checked)
    assert found is not None
    return bool(found)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_right_products(dtype: str) -> None:
    assert not wrong(Root(F, **RIGHT), Y.astype(dtype), T.astype(dtype))
    assert not wrong(FixedPoint(lambda y, t: 0 * y + np.sin(t[0]), jvp=lambda y, t, v: 0 * v), Y.astype(dtype))


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_products(mistake: str) -> None:
    assert wrong(Root(F, **{**RIGHT, **WRONG[mistake]}))


def test_a_kink_is_no_mistake() -> None:
    """The derivative of one side, at the kink."""
    bent = lambda y, t: np.where(y > 1, 3 * y - 2, y) - t
    assert not wrong(Root(bent, jvp=lambda y, t, v: 3 * v, vjp=lambda y, t, u: 3 * u), np.ones(2), np.ones(2))


def test_no_mistake_is_hidden_by_what_cancels() -> None:
    """In single precision, where curvature hides a little; and of I − ∂T, of which little may be left in y − T."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        M, K = rng.normal(size=(3, 3)), rng.normal(size=(3, 2))
        y, t = rng.normal(size=3), rng.normal(size=2)
        bent = lambda y, t, M=M, K=K: M @ y + np.sin(y) - K @ t**2
        sign = lambda y, t, u, K=K: 2 * t * (K.T @ u)
        assert wrong(Root(bent, mixed_vjp=sign), y.astype("float32"), t.astype("float32"))
        T = lambda y, t, M=M, K=K: y - M @ y / 9 - K @ t
        assert wrong(FixedPoint(T, jvp=lambda y, t, v, M=M: v - 2 * (M @ v) / 9), y, t)
