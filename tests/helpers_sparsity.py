"""A chain of equations, whose Jacobian is tridiagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

N = 40
RNG = np.random.default_rng(7)
Y, V = RNG.normal(size=N), RNG.normal(size=N)
I = np.arange(N - 1)
TRIDIAGONAL = (np.concatenate([I, I + 1]), np.concatenate([I + 1, I]))
UPPER = np.diag(np.ones(N - 1), 1)


def chain(xp: Any, back: float = -0.5) -> Callable[[Any, Any], Any]:
    """F with a tridiagonal Jacobian; it is symmetric for ``back=1``."""

    def F(y: Any, theta: Any) -> Any:
        zero = 0 * y[..., :1]
        after, before = xp.concat([y[..., 1:], zero], axis=-1), xp.concat([zero, y[..., :-1]], axis=-1)
        return 3 * y + y**3 + after + back * before - theta

    return F


def energy(xp: Any) -> Callable[[Any, Any], Any]:
    """f with a tridiagonal Hessian."""

    def f(y: Any, theta: Any) -> Any:
        own = y**4 / 4 + 1.5 * y**2 - theta * y
        return xp.sum(own, axis=-1) + xp.sum(y[..., 1:] * y[..., :-1], axis=-1)

    return f


def chain_matrix(y: np.ndarray, symmetric: bool = False) -> np.ndarray:
    return np.diag(3 + 3 * y**2) + UPPER + (1.0 if symmetric else -0.5) * UPPER.T


def theta_of(y: np.ndarray, symmetric: bool = False) -> np.ndarray:
    return 3 * y + y**3 + (chain_matrix(y, symmetric) - np.diag(3 + 3 * y**2)) @ y
