"""One root with its derivatives in closed form, and a y that is a little off: what estimates are asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import Library

from implicitdiff import Root, implicit_grad, implicit_jacobian, implicit_jvp, implicit_vjp

THETA = np.array([0.5, 2.0, 1.0])
A = np.array([[3.0, 1.0, 0.2], [0.5, 2.0, -1.0], [0.0, 0.4, 2.5]])
OFF = np.array([0.02, -0.01, 0.03])


def solution(theta: np.ndarray = THETA) -> np.ndarray:
    """Of A y + y³/4 = θ, by Newton's method."""
    y = np.zeros(3)
    for _ in range(50):
        y = y - np.linalg.solve(A + np.diag(0.75 * y**2), A @ y + y**3 / 4 - theta)
    return y


def root(lib: Library) -> Root:
    """The condition, with its products: asymmetric."""
    M, Mt = lib.array(A), lib.array(A.T.copy())
    return Root(
        lambda y, t: M @ y + y**3 / 4 - t,
        jvp=lambda y, t, v: M @ v + 0.75 * y**2 * v,
        vjp=lambda y, t, u: Mt @ u + 0.75 * y**2 * u,
        mixed_jvp=lambda y, t, d: -d,
        mixed_vjp=lambda y, t, u: -u,
    )


def truth() -> dict[str, np.ndarray]:
    """The derivatives at the exact solution."""
    y = solution()
    J = np.linalg.inv(A + np.diag(0.75 * y**2))
    return {"gradient": y + J.T @ (y - 1 + THETA), "jvp": J @ np.ones(3), "vjp": J.T @ np.ones(3), "jacobian": J}


def outer(lib: Library) -> Any:
    xp = lib.xp
    return lambda y, t: xp.sum((y - 1) ** 2) / 2 + xp.sum(t * y)


def call(lib: Library, mode: str, y: np.ndarray | None = None, **options: Any) -> Any:
    """A derivative at a y that is off."""
    y = lib.array(solution() + OFF if y is None else y)
    theta, one = lib.array(THETA), lib.array(np.ones(3))
    if mode == "gradient":
        return implicit_grad(root(lib), outer(lib), y, theta, **options)
    if mode == "jacobian":
        return implicit_jacobian(root(lib), y, theta, **options)
    return (implicit_vjp if mode == "vjp" else implicit_jvp)(root(lib), y, theta, one, **options)
