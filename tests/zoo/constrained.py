"""Problems of the zoo: minima under constraints, and minima with kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import autograd
import numpy as np

from implicitdiff import KKT, QP, ProjectedGradient, ProximalGradient, projections, proxes
from zoo.problem import Problem, Vector, space
from zoo.stopped import iterated, stopped_slsqp

Function = Callable[..., Any]


def lagrangian(objective: Function, active: Function, n: int) -> tuple[Function, Function]:
    """Residual of (y, z) for the constraints c(y, t) = 0 that are active at y*, and y ↦ (y, z) by least squares."""
    slope, rows = autograd.grad(objective), autograd.jacobian(active)

    def residual(x: Any, t: Any, *args: Any) -> Any:
        y, z = x[:n], x[n:]
        xp = space(x, t)
        pull = autograd.grad(lambda v: space(v).sum(z * active(v, t, *args)))(y)
        return xp.concatenate([slope(y, t, *args) + pull, active(y, t, *args)])

    def extend(y: Vector, t: Vector, *args: Any) -> Vector:
        return np.append(y, -np.linalg.lstsq(rows(y, t, *args).T, slope(y, t, *args), rcond=None)[0])

    return residual, extend


def nlp() -> Problem:
    """Two equalities, one of them a sphere; θ are their right-hand sides, and weights."""
    n = 6

    def objective(y: Any, theta: Any) -> Any:
        xp = space(y, theta)
        return xp.sum(xp.exp(theta[2:]) * xp.exp(y)) + xp.sum(y[1:] * y[:-1]) / 2

    def eq(y: Any, theta: Any) -> Any:
        xp = space(y, theta)
        return xp.stack([xp.sum(y * y) - theta[0], xp.sum(y) - theta[1]])

    theta = np.concatenate([[3.0, 0.5], np.linspace(-0.5, 0.5, n)])
    y0 = np.linspace(0.9, -0.7, n)
    residual, extend = lagrangian(objective, eq, n)
    stops = stopped_slsqp(objective, y0, lambda p: {"type": "eq", "fun": lambda y: eq(y, p.t)}, (5, 8, 11, 14))

    def start() -> Vector:
        y = dict(stopped_slsqp(objective, y0, lambda p: {"type": "eq", "fun": lambda y: eq(y, p.t)}, (100,))(problem))
        return extend(y["SLSQP 100"], theta)

    problem = Problem("nlp", KKT(objective, eq=eq), theta, (), residual, start, n, stops, extend=extend)
    return problem


def quadratic(rng: np.random.Generator, n: int, smallest: float = 0.02) -> Vector:
    """A symmetric positive definite matrix."""
    V = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return (V * np.geomspace(smallest, 2, n)) @ V.T


def inequality_program() -> Problem:
    """A QP with 4 inequalities, of which 2 are active; θ is all of its data, {G, Q, h, q}."""
    rng = np.random.default_rng(31)
    n, Q = 6, quadratic(rng, 6, 0.2)
    y_star, mu = rng.normal(size=n), np.array([0.8, 0.5])
    G = rng.normal(size=(4, n))
    h, q = G @ y_star + np.array([0.0, 0.0, 0.6, 0.9]), -Q @ y_star - G[:2].T @ mu

    def pack(t: Any) -> dict[str, Any]:
        return {"G": t[:24].reshape(4, n), "Q": t[24:60].reshape(n, n), "h": t[60:64], "q": t[64:]}

    def objective(y: Any, t: Any) -> Any:
        of = pack(t)
        return space(y, t).sum(y * ((of["Q"] + of["Q"].T) @ y) / 4 + of["q"] * y)

    def active(y: Any, t: Any) -> Any:
        of = pack(t)
        return of["G"][:2] @ y - of["h"][:2]

    def outer(y: Any, theta: Any) -> Any:
        xp = space(y)
        return xp.sum((y - 0.3) ** 2) / 2 + xp.sum(xp.sin(2 * y)) / 2

    residual, extend = lagrangian(objective, active, n)
    along = np.eye(n) - np.linalg.pinv(G[:2]) @ G[:2]
    admit = lambda y, d: y + along @ d * np.linalg.norm(d) / np.linalg.norm(along @ d)
    limits = lambda p: {"type": "ineq", "fun": lambda y: p.theta["h"] - p.theta["G"] @ y}
    return Problem(
        "inequality program", QP(), {"G": G, "Q": Q, "h": h, "q": q}, (), residual, lambda: np.append(y_star, mu), n,
        stopped_slsqp(objective, np.zeros(n), limits, (1, 2, 3, 4)), outer, admit, extend, pack,
    )  # fmt: skip


def proximal(name: str, condition: Any, after: Function, objective: Function, theta: Vector, args: tuple[Any, ...],
             n: int, rate: float, at: tuple[int, ...], **given: Any) -> Problem:  # fmt: skip
    """Make a problem of y = P(y − s ∇f(y, θ), θ), solved by iterations of that."""
    gradient = autograd.grad(objective)

    def step(y: Any, t: Any, *args: Any) -> Any:
        return after(y - rate * gradient(y, t, *args), t)

    def residual(y: Any, t: Any, *args: Any) -> Any:
        return y - step(y, t, *args)

    def start() -> Vector:
        y = np.ones(n) / n
        for _ in range(300):
            y = step(y, theta, *args)
        return y

    return Problem(name, condition, theta, args, residual, start, n, iterated(step, np.ones(n) / n, at), **given)


def box_program() -> Problem:
    """Logistic-like costs in a box, some entries at its bounds; θ are the linear costs and the upper bound of all."""
    rng = np.random.default_rng(32)
    n, Q = 10, quadratic(rng, 10)

    def objective(y: Any, theta: Any, Q: Any) -> Any:
        return space(y, theta).sum(y * (Q @ y) / 2 + theta[:-1] * y + y**4 / 8)

    def clip(x: Any, theta: Any) -> Any:
        xp = space(x, theta)
        return xp.where(x <= -1, -1 + 0 * x, xp.where(x >= theta[-1], theta[-1] + 0 * x, x))

    theta = np.append(rng.normal(size=n), 0.8)
    condition = ProjectedGradient(objective, lambda x, t: projections.box(x, -1.0, t[-1]))
    admit = lambda y, d: np.clip(y + d, -1.0, theta[-1])  # a projected method stays in the box
    return proximal("box program", condition, clip, objective, theta, (Q,), n, 0.25, (5, 15, 40, 100), admit=admit)


def simplex_program() -> Problem:
    """A portfolio: weights that add up to 1, some of them zero; θ are the returns, and the aversion to risk."""
    rng = np.random.default_rng(33)
    n, Q = 8, quadratic(rng, 8, 0.1)

    def objective(y: Any, theta: Any, Q: Any) -> Any:
        xp = space(y, theta)
        return xp.exp(theta[-1]) * xp.sum(y * (Q @ y)) / 2 - xp.sum(theta[:-1] * y)

    def project(x: Any, theta: Any) -> Any:  # the threshold by bisection's fixed point, so that it is derived exactly
        values = np.array(getattr(x, "_value", x), dtype=float)
        while type(values) is not np.ndarray:  # a trace in a trace
            values = values._value
        order = np.sort(values)[::-1]
        k = np.flatnonzero(order - (np.cumsum(order) - 1) / np.arange(1, n + 1) > 0)[-1]
        kept = (values >= order[k]).astype(float)
        xp = space(x)
        return kept * (x - (xp.sum(kept * x) - 1) / (k + 1))

    theta = np.append(rng.normal(size=n) / 2, 0.5)
    condition = ProjectedGradient(objective, lambda x, t: projections.simplex(x))
    admit = lambda y, d: projections.simplex(y + d)
    return proximal("simplex program", condition, project, objective, theta, (Q,), n, 0.3, (4, 10, 25, 60), admit=admit)


def kept_support(y: Vector, d: Vector) -> Vector:
    """Off on the support alone: where y* is zero, a proximal method has it zero."""
    on = y != 0
    return y + np.where(on, d, 0.0) * np.linalg.norm(d) / np.linalg.norm(d[on])


def regression(rng: np.random.Generator, n: int) -> tuple[Vector, Vector]:
    """Data with few features that matter."""
    X = rng.normal(size=(40, n)) @ (np.eye(n) + 0.5 * np.eye(n, k=1))
    return X, X @ (rng.normal(size=n) * (np.arange(n) % 3 == 0) * 2) + 0.5 * rng.normal(size=40)


def soft(x: Any, penalty: Any) -> Any:
    """Soft thresholding."""
    xp = space(x, penalty)
    return xp.where(x > penalty, x - penalty, xp.where(x < -penalty, x + penalty, 0 * x))


def lasso() -> Problem:
    """θ are the log penalty, and the targets; perturbed off the support as well."""
    rng = np.random.default_rng(34)
    X, b = regression(rng, 12)

    def objective(y: Any, theta: Any, X: Any) -> Any:
        r = X @ y - theta[1:]
        return space(y, theta).sum(r * r) / 80

    rate, theta = 40 / np.linalg.norm(X, 2) ** 2, np.append(np.log(0.1), b)
    condition = ProximalGradient(objective, lambda x, t, s: proxes.lasso(x, space(x, t).exp(t[0]), s))
    after = lambda x, t: soft(x, rate * space(x, t).exp(t[0]))
    return proximal("lasso", condition, after, objective, theta, (X,), 12, rate, (4, 10, 25, 60))


def elastic_net() -> Problem:
    """A robust loss with an elastic net; θ are the two log penalties."""
    rng = np.random.default_rng(35)
    X, b = regression(rng, 15)

    def objective(y: Any, theta: Any, X: Any, b: Any) -> Any:
        xp = space(y, theta)
        return xp.sum(xp.sqrt(1 + (X @ y - b) ** 2)) / 40

    rate, theta = 40 / np.linalg.norm(X, 2) ** 2, np.log([0.1, 0.1])

    def prox(x: Any, t: Any, s: Any) -> Any:
        penalties = space(x, t).exp(t)
        return proxes.elastic_net(x, penalties[0], penalties[1], s)

    def after(x: Any, t: Any) -> Any:
        xp = space(x, t)
        return soft(x, rate * xp.exp(t[0])) / (1 + rate * xp.exp(t[1]))

    return proximal("elastic net", ProximalGradient(objective, prox), after, objective, theta, (X, b), 15, rate,
                    (6, 15, 40, 100), admit=kept_support)  # fmt: skip


CONSTRAINED = (nlp, inequality_program, box_program, simplex_program, lasso, elastic_net)
