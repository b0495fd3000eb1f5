"""Batches of samples: what a single loop costs beside one that solves, in passes over the data.

Logistic regression on many samples with one log-penalty for each feature. Both loops run until the outer value, of
weights that are trained to rounding without the library, has made 99 % of the way to the optimum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize

from benchmarks.measure import Setting, Spread
from benchmarks.report import Row
from implicitdiff import SABA, Bilevel, Stationary

__all__ = ["Samples", "batches"]

Array = Any
WAY = 0.99
"""Of the way from the outer value at the start to the least one."""


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(−z))."""
    return 0.5 * (1 + np.tanh(z / 2))


class Samples:
    """Samples, of which half the features say nothing, and the best penalties.

    Parameters
    ----------
    inner, outer : int
        Numbers of samples.
    features : int
    """

    bounds = (-9.0, 1.0)

    def __init__(self, inner: int, outer: int, features: int = 20) -> None:
        rng = np.random.default_rng(0)
        weights = rng.normal(size=features) * (np.arange(features) < features // 2)
        X = rng.normal(size=(inner + outer, features))
        signs = np.where(rng.uniform(size=inner + outer) < sigmoid(X @ weights), 1.0, -1.0)
        self.S, self.Sv = np.split(X * signs[:, None], [inner])
        self.start = np.full(features, np.log(0.3))
        self.first, self.least = self.value(self.start)[0], self._least()

    def grad(self, y: Array, theta: Array, i: Array = slice(None)) -> Array:
        """∇_y of the mean training loss."""
        S = self.S[i]
        return -S.T @ sigmoid(-(S @ y)) / len(S) + np.exp(theta) * y

    def hvp(self, y: Array, theta: Array, v: Array, i: Array = slice(None)) -> Array:
        """Product with the Hessian."""
        S = self.S[i]
        p = sigmoid(S @ y)
        return S.T @ (p * (1 - p) * (S @ v)) / len(S) + np.exp(theta) * v

    def loss(self, y: Array, theta: Array, j: Array = slice(None)) -> float:
        """L."""
        return float(np.mean(np.logaddexp(0, -(self.Sv[j] @ y))))

    def slopes(self, y: Array, theta: Array, j: Array = slice(None)) -> tuple[Array, None]:
        """Its derivative by y."""
        S = self.Sv[j]
        return -S.T @ sigmoid(-(S @ y)) / len(S), None

    def condition(self) -> Stationary:
        """The training problem, on all samples or a batch."""
        return Stationary(grad=self.grad, hvp=self.hvp, mixed_vjp=lambda y, theta, u, *i: np.exp(theta) * y * u)

    def value(self, theta: Array) -> tuple[float, Array]:
        """L of trained weights, and its gradient."""
        y = np.zeros_like(theta)
        for _ in range(30):
            p = sigmoid(self.S @ y)
            A = self.S.T @ ((p * (1 - p))[:, None] * self.S) / len(self.S) + np.diag(np.exp(theta))
            y = y - np.linalg.solve(A, self.grad(y, theta))
        return self.loss(y, theta), -np.exp(theta) * y * np.linalg.solve(A, self.slopes(y, theta)[0])

    def _least(self) -> float:
        found = minimize(self.value, self.start, jac=True, method="L-BFGS-B", bounds=[self.bounds] * self.start.size)
        return float(found.fun)

    def passes(self, loop: Bilevel, every: int, most: int) -> tuple[float, float]:
        """Gradients and products until the goal is reached, and the outer value then."""
        goal = self.first + WAY * (self.least - self.first)
        state = loop.init(np.zeros_like(self.start), self.start)
        for step in range(1, most + 1):
            state = loop.step(state)
            if step % every == 0 and (value := self.value(state.theta)[0]) <= goal:
                return float(state.inner_gradients + state.products), value
        return float("inf"), value


def batches(setting: Setting) -> list[Row]:
    """Passes of SABA, and of the loop that solves."""
    size, batch = ((600, 300), 30) if setting.short else ((20_000, 10_000), 50)
    problem = Samples(*size, features=6 if setting.short else 20)
    outer = problem.loss, problem.slopes
    options: dict[str, Any] = {"bounds": problem.bounds}
    blocks = size[0] // batch
    tolerance = SABA(size, (batch, batch // 2))
    single = Bilevel(problem.condition(), outer, tolerance=tolerance, learning_rate=0.1, **options)
    solving = Bilevel(problem.condition(), outer, learning_rate=1.0, **options)
    made, value = problem.passes(single, max(blocks // 20, 1), 100 * blocks)
    ours, (reference, _) = made / blocks, problem.passes(solving, 1, 500)
    missed = max(0.0, (value - problem.least) / (problem.first - problem.least))
    ratio, where = Spread(*3 * (ours / reference,)), f"{size[0]} samples, {problem.start.size} penalties"
    facts = {"batch": batch, "steps": made / 2}
    return [Row("single loop, SABA / sweeps", where, ours, reference, ratio, None, missed, 1 - WAY, "passes", facts)]
