"""Quadratic problems over sets and with penalties, solved by projected and proximal gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import array_api_compat
import numpy as np
import pytest
from conftest import JAX, PLAIN, Library

from implicitdiff import ProjectedGradient, ProximalGradient, projections, proxes

EVERY = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
RNG = np.random.default_rng(0)
N, M = 8, 40
X, B = RNG.normal(size=(M, N)) / 4, 2 * RNG.normal(size=M)
Q = X.T @ X
LIPSCHITZ = float(np.linalg.norm(Q, 2))
STEP = 1 / LIPSCHITZ
LINEAR = X.T @ B
GROUPS = (0, 0, 1, 1, 1, 2, 2, 2)
ROWS = np.array([[1.0, -1.0, 2.0, 0.0, 0.5, 1.0, 0.0, -2.0]])
V = np.arange(1.0, N + 1)

# name: (P(x, t, step), t, whether it is a prox, which coordinates are free (None: not restricted by itself))
CASES: dict[str, tuple[Callable[..., Any], float, bool, Callable[[np.ndarray], Any] | None]] = {
    "box": (lambda x, t, step: projections.box(x, -t, 2 * t), 0.2, False, lambda y: (y > -0.2) & (y < 0.4)),
    "ball": (lambda x, t, step: projections.ball(x, radius=t), 0.2, False, None),
    "simplex": (lambda x, t, step: projections.simplex(x, total=t), 1.0, False, lambda y: y > 0),
    "l1 ball": (lambda x, t, step: projections.l1_ball(x, radius=t), 1.0, False, lambda y: y != 0),
    "affine": (lambda x, t, step: projections.affine(x, rows(x), t * rows(x)[:, 0]), 1.0, False, lambda y: y == y),
    "lasso": (lambda x, t, step: proxes.lasso(x, t, step), 1.0, True, lambda y: y != 0),
    "ridge": (lambda x, t, step: proxes.ridge(x, t, step), 1.0, True, lambda y: y != 0),
    "elastic net": (lambda x, t, step: proxes.elastic_net(x, t, 2 * t, step), 1.0, True, lambda y: y != 0),
    "group lasso": (lambda x, t, step: proxes.group_lasso(x, t, step, groups=GROUPS), 1.5, True, None),
}
CASE = pytest.mark.parametrize("case", list(CASES))


def rows(x: Any) -> Any:
    """Return the constraint's matrix where x is."""
    return xp_of(x).asarray(ROWS) if type(x) is not np.ndarray else ROWS


def xp_of(x: Any) -> Any:
    return array_api_compat.array_namespace(x)


def objective(y: Any, theta: Any, Q: Any) -> Any:
    """½ yᵀQy − qᵀy."""
    xp = xp_of(y)
    return 0.5 * xp.sum(y * (Q @ y)) - xp.sum(theta["q"] * y)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error against the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def condition(case: str, **options: Any) -> Any:
    P, _, is_prox, _ = CASES[case]
    options = {"step": STEP, **options}
    if is_prox:
        return ProximalGradient(objective, lambda x, theta, step: P(x, theta["t"], step), **options)
    return ProjectedGradient(objective, lambda x, theta: P(x, theta["t"], 1.0), **options)


def solve(case: str, q: np.ndarray, t: float) -> np.ndarray:
    """Projected or proximal gradient descent, until nothing moves."""
    P, y = CASES[case][0], np.zeros(N)
    for _ in range(20000):
        new = P(y - STEP * (Q @ y - q), t, STEP)
        change, y = np.abs(new - y).max(), new
        if change <= 1e-16:
            break
    return y


@cache
def truth(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, and its derivatives in q and t by central differences of the re-solved problem."""
    t, h = CASES[case][1], 1e-6
    by_q = [(solve(case, LINEAR + h * e, t) - solve(case, LINEAR - h * e, t)) / (2 * h) for e in np.eye(N)]
    by_t = (solve(case, LINEAR, t + h) - solve(case, LINEAR, t - h)) / (2 * h)
    return solve(case, LINEAR, t), np.stack(by_q, -1), by_t


def arguments(lib: Library, case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    theta = {"q": lib.array(LINEAR), "t": lib.array(CASES[case][1])}
    return lib.array(truth(case)[0]), theta, {"args": (lib.array(Q),)}
