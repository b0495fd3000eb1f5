"""Problems of the zoo: roots and fixed points."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff import FixedPoint, Root
from zoo.problem import Problem, Vector, space
from zoo.stopped import iterated, stopped_roots


def root(name: str, fun: Any, y0: Vector, theta: Vector, args: tuple[Any, ...] = (), **given: Any) -> Problem:
    """Make a problem of F(y, θ) = 0: the solution meant is Newton's from y0."""
    fields = {"start": lambda: y0, "stops": stopped_roots(y0)} | given
    return Problem(name, Root(fun), theta, args, residual=fun, n=len(y0), **fields)


def fixed_point(name: str, T: Any, y0: Vector, theta: Vector, args: tuple[Any, ...] = (),
                at: tuple[int, ...] = (3, 6, 12, 25)) -> Problem:  # fmt: skip
    """Make a problem of y = T(y, θ), solved by plain iterations."""

    def residual(y: Any, theta: Any, *args: Any) -> Any:
        return y - T(y, theta, *args)

    def start() -> Vector:
        y = y0
        for _ in range(200):
            y = T(y, theta, *args)
        return y

    return Problem(name, FixedPoint(T), theta, args, residual, start, len(y0), iterated(T, y0, at))


def equilibrium_layer() -> Problem:
    rng = np.random.default_rng(21)
    W = rng.normal(size=(12, 12))
    W, U = 0.9 * W / np.linalg.norm(W, 2), rng.normal(size=(12, 4))

    def T(y: Any, theta: Any, W: Any, U: Any) -> Any:
        return space(y, theta).tanh(W @ y + U @ theta)

    return fixed_point("equilibrium layer", T, np.zeros(12), rng.normal(size=4), (W, U))


def value_iteration() -> Problem:
    """Soft value iteration: values of 8 states for two rewards each; θ are the rewards."""
    rng = np.random.default_rng(22)
    P = rng.dirichlet(np.ones(8) * 0.5, size=(2, 8))

    def T(y: Any, theta: Any, P: Any) -> Any:
        xp = space(y, theta)
        first, second = (theta[8 * k : 8 * k + 8] + 0.9 * (P[k] @ y) for k in (0, 1))
        return xp.log(xp.exp(2 * first) + xp.exp(2 * second)) / 2

    return fixed_point("value iteration", T, np.zeros(8), rng.normal(size=16), (P,), at=(10, 30, 60, 100))


def page_rank() -> Problem:
    """The stationary distribution of a walk that restarts with θ."""
    rng = np.random.default_rng(23)
    P = rng.dirichlet(np.ones(15) * 0.2, size=15).T

    def T(y: Any, theta: Any, P: Any) -> Any:
        xp = space(y, theta)
        damping = 1 / (1 + xp.exp(-theta[-1]))
        target = xp.exp(theta[:-1])
        return damping * (P @ y) + (1 - damping) * target / xp.sum(target)

    return fixed_point("page rank", T, np.ones(15) / 15, np.append(rng.normal(size=15), 1.7), (P,))


def sinkhorn() -> Problem:
    """Sinkhorn's iteration for one log-scaling, less its mean; θ is the cost."""
    rng = np.random.default_rng(24)
    a, b = rng.dirichlet(np.ones(6) * 3, size=2)

    def T(y: Any, theta: Any, a: Any, b: Any) -> Any:
        xp = space(y, theta)
        K = xp.exp(-xp.reshape(theta, (6, 6)) / 0.3)
        v = b / (K.T @ xp.exp(y))
        new = xp.log(a) - xp.log(K @ v)
        return new - xp.sum(new) / 6

    cost = (rng.normal(size=6)[:, None] - rng.normal(size=6)) ** 2 / 2
    return fixed_point("sinkhorn", T, np.zeros(6), cost.ravel(), (a, b))


def kepler() -> Problem:
    """Eccentric anomalies from mean ones, and one eccentricity for all: θ = (M, e)."""

    def F(y: Any, theta: Any) -> Any:
        return y - theta[-1] * space(y, theta).sin(y) - theta[:-1]

    means = np.array([0.2, 0.9, 1.7, 2.5, 3.4, 4.8])
    return root("kepler", F, means + 0.3, np.append(means, 0.7))


def bratu() -> Problem:
    """−u'' = λ exp(u) with λ linear along the interval: θ are its ends."""
    n = 40
    grid = np.linspace(0, 1, n + 2)[1:-1]

    def F(y: Any, theta: Any, grid: Any) -> Any:
        xp = space(y, theta)
        zero = 0 * y[:1]
        wide = xp.concatenate([zero, y, zero])
        bend = (2 * wide[1:-1] - wide[:-2] - wide[2:]) * (n + 1) ** 2
        return bend - (theta[0] + (theta[1] - theta[0]) * grid) * xp.exp(y)

    return root("bratu", F, np.zeros(n), np.array([1.5, 3.0]), (grid,))


def brusselator() -> Problem:
    """Steady state of a chain of 10 Brusselators that exchange both substances; θ are the feeds, and b."""
    k = 10

    def F(y: Any, theta: Any) -> Any:
        xp = space(y, theta)
        u, v = y[:k], y[k:]

        def exchange(z: Any) -> Any:
            flow = z[1:] - z[:-1]
            return xp.concatenate([flow, 0 * z[:1]]) - xp.concatenate([0 * z[:1], flow])

        rate = u * u * v
        first = theta[:k] - (theta[k] + 1) * u + rate + 0.3 * exchange(u)
        return xp.concatenate([first, theta[k] * u - rate + 0.8 * exchange(v)])

    feeds = 1 + 0.3 * np.sin(np.arange(k))
    return root("brusselator", F, np.concatenate([feeds, 1.5 / feeds]), np.append(feeds, 1.5))


def riccati() -> Problem:
    """AᵀX + XA − X S X + Q = 0 for X (4, 4); θ are the diagonal of Q and the log of the weight of S."""
    rng = np.random.default_rng(25)
    M, b = rng.normal(size=(4, 4)), rng.normal(size=(4, 2))

    def F(y: Any, theta: Any, M: Any, S: Any, unit: Any) -> Any:
        xp = space(y, theta)
        X = xp.reshape(y, (4, 4))
        Q = theta[:4, None] * unit
        return xp.reshape(M.T @ X + X @ M - xp.exp(theta[4]) * (X @ S @ X) + Q, (16,))

    theta = np.array([1.0, 2.0, 0.5, 1.5, 0.2])
    import scipy.linalg

    X = scipy.linalg.solve_continuous_are(M, b, np.diag(theta[:4]), np.eye(2) * np.exp(-theta[4]))
    y0 = (X + 0.1 * np.linalg.norm(X) * np.eye(4)).ravel()
    return root("riccati", F, y0, theta, (M, b @ b.T, np.eye(4)), start=lambda: X.ravel())


def eigenpair() -> Problem:
    """The lowest eigenpair of M + diag θ, y = (vector, value), normalised."""
    rng = np.random.default_rng(26)
    M = rng.normal(size=(7, 7))
    M, theta = (M + M.T) / 2, rng.normal(size=7)

    def F(y: Any, theta: Any, M: Any) -> Any:
        xp = space(y, theta)
        v, value = y[:-1], y[-1:]
        return xp.concatenate([M @ v + (theta - value) * v, (xp.sum(v * v, keepdims=True) - 1) / 2])

    values, vectors = np.linalg.eigh(M + np.diag(theta))
    exact = np.append(vectors[:, 0], values[0])
    rough = np.append(vectors[:, 0] + 0.2 * rng.normal(size=7), values[0] + 0.2)
    return root("eigenpair", F, rough, theta, (M,), start=lambda: exact)


def genes() -> Problem:
    """Steady state of 6 genes that repress one another in a ring; θ are the log rates and one affinity."""

    def F(y: Any, theta: Any) -> Any:
        xp = space(y, theta)
        before = xp.concatenate([y[-1:], y[:-1]])
        return xp.exp(theta[:-1]) / (1 + (before / theta[-1]) ** 2) + 0.2 - y

    return root("genes", F, np.ones(6), np.append(np.linspace(0.0, 0.8, 6), 1.1))


def power_flow() -> Problem:
    """Voltage angles of 6 buses on a ring with a chord; θ are their injections, and the strengths of the lines."""
    lines = np.array([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 0), (1, 4)])
    D = np.zeros((8, 7))
    D[np.arange(8), lines[:, 0]], D[np.arange(8), lines[:, 1]] = 1, -1

    def F(y: Any, theta: Any, D: Any) -> Any:
        xp = space(y, theta)
        return D.T @ (xp.exp(theta[6:]) * xp.sin(D @ y)) - theta[:6]

    injections = np.array([0.6, -0.5, 0.7, -0.3, 0.4, -0.6])
    return root("power flow", F, np.zeros(6), np.concatenate([injections, np.linspace(-0.1, 0.3, 8)]), (D[:, 1:],))


EQUATIONS = (equilibrium_layer, value_iteration, page_rank, sinkhorn, kepler, bratu, brusselator, riccati, eigenpair,
             genes, power_flow)  # fmt: skip
