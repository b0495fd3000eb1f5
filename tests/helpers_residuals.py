"""A curve fitted to data, with its derivatives in closed form, for every array library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import Library

from implicitdiff import LeastSquares

X = np.linspace(0.2, 3.0, 9)
DATA = 2.0 * np.exp(-0.7 * X) + 0.4 * np.cos(5.0 * X)
THETA = np.concatenate([[1.3], DATA])
"""A rate, and the data."""
KINDS = ("squares", "loss", "regularizer", "both")


def weight(r: Any) -> Any:
    """∇ℓ of ℓ = Σ √(1 + r²)."""
    return r / (1 + r * r) ** 0.5


def residual(y: Any, t: Any) -> np.ndarray:
    return y[0] * np.exp(-y[1] * t[0] * X) - t[1:]


def jacobian(y: Any, t: Any) -> np.ndarray:
    e = np.exp(-y[1] * t[0] * X)
    return np.stack([e, -y[0] * t[0] * X * e], axis=-1)


def slope(kind: str) -> Callable[[Any, Any], np.ndarray]:
    """F by hand."""

    def F(y: Any, t: Any) -> np.ndarray:
        r = residual(y, t)
        found = jacobian(y, t).T @ (weight(r) if kind in {"loss", "both"} else r)
        return found + (t[0] * y if kind in {"regularizer", "both"} else 0.0)

    return F


def columns(F: Callable[[Any], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The derivative of an analytic function, by complex steps."""
    return np.stack([np.imag(F(x + 1e-30j * e)) / 1e-30 for e in np.eye(len(x))], axis=-1)


def solved(kind: str, theta: np.ndarray = THETA) -> np.ndarray:
    """The solution, by Newton's method."""
    F, y = slope(kind), np.array([1.9, 0.55])
    for _ in range(40):
        step = np.linalg.solve(columns(lambda y: F(y, theta), y), F(y, theta))
        y = y - step
    assert np.max(np.abs(step)) < 1e-13
    return y


def matrices(kind: str, hessian: str, y: np.ndarray, theta: np.ndarray = THETA) -> tuple[np.ndarray, np.ndarray]:
    """A and B."""
    F = slope(kind)
    A, B = columns(lambda y: F(y, theta), y), columns(lambda t: F(y, t), theta)
    if hessian == "gauss-newton":
        r, J = residual(y, theta), jacobian(y, theta)
        h = (1 + r * r) ** -1.5 if kind in {"loss", "both"} else np.ones_like(r)
        A = J.T @ (h[:, None] * J) + (theta[0] * np.eye(2) if kind in {"regularizer", "both"} else 0.0)
    return A, B


def condition(lib: Library, kind: str, given: tuple[str, ...] = (), items: bool = False, **options: Any) -> Any:
    """The condition in a library; with ``items`` its functions take a leading axis."""
    xp, x = lib.xp, lib.array(X)

    def curve(y: Any, t: Any) -> Any:
        return xp.exp(-y[..., 1:2] * t[..., :1] * x)

    def stacked(y: Any, t: Any) -> Any:
        e = curve(y, t)
        return xp.stack([e, -y[..., :1] * t[..., :1] * x * e], axis=-1)

    def of_u(y: Any, t: Any, u: Any) -> Any:
        return xp.sum(stacked(y, t) * u[..., :, None], axis=-2)

    functions = {
        "jvp": lambda y, t, v: xp.sum(stacked(y, t) * v[..., None, :], axis=-1),
        "vjp": of_u,
        "jacobian": stacked,
    }
    options = {**options, **{name: functions[name] for name in given}}
    if kind in {"loss", "both"}:
        options["loss"] = lambda r: xp.sum((1 + r * r) ** 0.5, axis=-1)
    if kind in {"regularizer", "both"}:
        options["regularizer"] = lambda y, t: t[..., 0] * xp.sum(y * y, axis=-1) / 2
    return LeastSquares(lambda y, t: y[..., :1] * curve(y, t) - t[..., 1:], **options)
