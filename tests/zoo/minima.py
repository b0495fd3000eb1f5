"""Problems of the zoo: stationary points of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import autograd
import numpy as np

from implicitdiff import LogBarrier, Stationary
from zoo.problem import Problem, Vector, space, tracking
from zoo.stopped import minimize, stopped_minimizers

Objective = Callable[..., Any]


def minimum(name: str, objective: Objective, y0: Vector, theta: Vector, args: tuple[Any, ...] = (),
            outer: Objective = tracking, **given: Any) -> Problem:  # fmt: skip
    """Make a problem of min f(y, θ): the solution meant is that of L-BFGS from y0."""
    start = lambda: minimize(lambda y: objective(y, theta, *args), y0, "L-BFGS-B", options={"maxiter": 2000})
    fields = {
        "condition": Stationary(objective), "residual": autograd.grad(objective), "start": start,
        "stops": stopped_minimizers(objective, y0),
    }  # fmt: skip
    return Problem(name, theta=theta, args=args, n=len(y0), outer=outer, **{**fields, **given})


def softplus(z: Any) -> Any:
    """log(1 + exp z)."""
    xp = space(z)
    return xp.log(1 + xp.exp(-xp.abs(z))) + (z + xp.abs(z)) / 2


def spread(rng: np.random.Generator, samples: int, n: int, decades: float = 1.0) -> Vector:
    """Features of sizes over some decades, so that there are slow directions."""
    return rng.normal(size=(samples, n)) * 10 ** np.linspace(0, -decades, n)


def ridge() -> Problem:
    rng = np.random.default_rng(1)
    X, Xv = spread(rng, 60, 12), spread(rng, 40, 12)
    w = 2 * rng.normal(size=12)
    b, bv = (Z @ w + 0.3 * rng.normal(size=len(Z)) for Z in (X, Xv))

    def objective(y: Any, theta: Any, X: Any, b: Any, Xv: Any, bv: Any) -> Any:
        xp = space(y, theta)
        r = X @ y - b
        return xp.sum(r * r) / 2 + xp.sum(xp.exp(theta) * y * y) / 2

    def outer(y: Any, theta: Any, X: Any, b: Any, Xv: Any, bv: Any) -> Any:
        r = Xv @ y - bv
        return space(y, theta).sum(r * r) / (2 * len(bv))

    return minimum("ridge", objective, np.zeros(12), np.linspace(-2, 1, 12), (X, b, Xv, bv), outer)


def classified(rng: np.random.Generator, n: int, flipped: float = 0.05, samples: int = 60) -> tuple[Vector, Vector]:
    """Signed features s_i x_i of training and validation samples."""
    w = rng.normal(size=n) * 3
    X, Xv = spread(rng, samples, n), spread(rng, 40, n)
    signs = [np.sign(Z @ w + 0.5 * rng.normal(size=len(Z))) * np.where(rng.uniform(size=len(Z)) < flipped, -1, 1)
             for Z in (X, Xv)]  # fmt: skip
    return X * signs[0][:, None], Xv * signs[1][:, None]


def validation(y: Any, theta: Any, X: Any, Xv: Any) -> Any:
    """Logistic loss of samples that were left out."""
    return space(y, theta).sum(softplus(-(Xv @ y))) / Xv.shape[0]


def logistic(n: int = 10, samples: int = 60) -> Problem:
    data = classified(np.random.default_rng(2), n, samples=samples)

    def objective(y: Any, theta: Any, X: Any, Xv: Any) -> Any:
        xp = space(y, theta)
        return xp.sum(softplus(-(X @ y))) + xp.sum(xp.exp(theta) * y * y) / 2

    return minimum("logistic", objective, np.zeros(n), np.linspace(-2, 0, n), data, validation)


def data_weights() -> Problem:
    rng = np.random.default_rng(3)

    def objective(y: Any, theta: Any, X: Any, Xv: Any) -> Any:
        xp = space(y, theta)
        return xp.sum(softplus(-(X @ y)) / (1 + xp.exp(-theta))) + 0.1 * xp.sum(y * y) / 2

    return minimum("data weights", objective, np.zeros(8), rng.normal(size=60), classified(rng, 8, 0.3), validation)


def multinomial(n: int = 5, classes: int = 3, samples: int = 60) -> Problem:
    rng = np.random.default_rng(4)
    X = spread(rng, samples, n)
    labels = np.argmax(X @ rng.normal(size=(n, classes)) * 3 + rng.gumbel(size=(samples, classes)), axis=1)

    def objective(y: Any, theta: Any, X: Any, Y: Any) -> Any:
        xp = space(y, theta)
        W = xp.reshape(y, (n, classes))
        scores = X @ W
        entropy = xp.log(xp.sum(xp.exp(scores), axis=1)) - xp.sum(scores * Y, axis=1)
        return xp.sum(entropy) + xp.sum(xp.exp(theta) * xp.sum(W * W, axis=0)) / 2

    decays = np.linspace(-1, 0.5, classes)
    return minimum("multinomial", objective, np.zeros(n * classes), decays, (X, np.eye(classes)[labels]))


def quartic() -> Problem:
    rng = np.random.default_rng(5)
    V = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    Q = (V * np.geomspace(1e-2, 3, 8)) @ V.T

    def objective(y: Any, theta: Any, Q: Any) -> Any:
        return space(y, theta).sum(y**4 / 4 + y * (Q @ y) / 2 - theta * y)

    return minimum("quartic", objective, np.zeros(8), rng.normal(size=8), (Q,))


def poisson() -> Problem:
    rng = np.random.default_rng(6)
    X = spread(rng, 50, 6, 0.7)
    counts = rng.poisson(np.exp(X @ rng.normal(size=6) * 0.5)).astype(float)

    def objective(y: Any, theta: Any, X: Any, counts: Any) -> Any:
        xp = space(y, theta)
        rate = X @ y + theta[-1]
        return xp.sum(xp.exp(rate) - counts * rate) + xp.sum(xp.exp(theta[:-1]) * y * y) / 2

    return minimum("poisson", objective, np.zeros(6), np.append(np.linspace(-1, 1, 6), 0.2), (X, counts))


def exponential_fit() -> Problem:
    times = np.linspace(0.0, 3.0, 24)
    data = 2 * np.exp(-0.7 * times) + np.exp(-3 * times) + 0.02 * np.random.default_rng(7).normal(size=24)

    def objective(y: Any, theta: Any, times: Any) -> Any:
        xp = space(y, theta)
        r = y[0] * xp.exp(-y[1] * times) + y[2] * xp.exp(-y[3] * times) - theta
        return xp.sum(r * r) / 2

    return minimum("exponential fit", objective, np.array([1.5, 0.5, 1.5, 4.0]), data, (times,))


def rosenbrock() -> Problem:
    def objective(y: Any, theta: Any) -> Any:
        return space(y, theta).sum(theta[0] * (y[1:] - y[:-1] ** 2) ** 2 + (theta[1] - y[:-1]) ** 2)

    return minimum("rosenbrock", objective, np.array([0.3, 0.2, 0.1, 0.0, 0.0]), np.array([10.0, 0.9]))


def denoising() -> Problem:
    """A robust chain: θ is the signal, and the log of the weight of the differences."""
    signal = np.repeat([0.0, 2.0, 1.0], 8) + 0.2 * np.random.default_rng(8).normal(size=24)

    def objective(y: Any, theta: Any) -> Any:
        xp = space(y, theta)
        d = y[1:] - y[:-1]
        smooth = xp.exp(theta[-1]) * xp.sum(xp.sqrt(0.01 + d * d))
        return xp.sum((y - theta[:-1]) ** 2) / 2 + smooth

    return minimum("denoising", objective, np.zeros(24), np.append(signal, -0.5))


def transport() -> Problem:
    """The dual of entropic transport between 5 and 6 points, the last potential 0; θ is the cost, and log ε."""
    rng = np.random.default_rng(9)
    cost = np.abs(rng.normal(size=5)[:, None] - rng.normal(size=6)) ** 1.5
    a, b = rng.dirichlet(np.ones(5) * 3), rng.dirichlet(np.ones(6) * 3)

    def objective(y: Any, theta: Any, a: Any, b: Any) -> Any:
        xp = space(y, theta)
        f, g = y[:5], xp.concatenate([y[5:], 0 * y[:1]])
        scale = xp.exp(theta[-1])
        mass = xp.sum(xp.exp((f[:, None] + g[None, :] - xp.reshape(theta[:-1], (5, 6))) / scale))
        return scale * mass - xp.sum(a * f) - xp.sum(b * g)

    return minimum("transport", objective, np.zeros(10), np.append(cost.ravel(), np.log(0.5)), (a, b))


def network() -> Problem:
    """A network of 3 tanh units with a decay for each layer, fitted by stochastic gradient descent."""
    rng = np.random.default_rng(10)
    X = rng.normal(size=(40, 3))
    teacher = np.array([2, 0, -1, -1, 1, 0, 0, 1, 1, 1, -0.5, 1, 0.0])
    target = np.tanh(X @ teacher[:9].reshape(3, 3)) @ teacher[9:12] + 0.1 * rng.normal(size=40)
    y0 = teacher + 0.5 * rng.normal(size=13)  # a warm start

    def fit(y: Any, X: Any, target: Any) -> Any:
        xp = space(y)
        hidden = xp.tanh(X @ xp.reshape(y[:9], (3, 3)))
        r = hidden @ y[9:12] + y[12] - target
        return xp.sum(r * r) / (2 * len(target))

    def objective(y: Any, theta: Any, X: Any, target: Any) -> Any:
        xp = space(y, theta)
        decay = xp.exp(theta)
        return fit(y, X, target) + decay[0] * xp.sum(y[:9] ** 2) / 2 + decay[1] * xp.sum(y[9:12] ** 2) / 2

    theta = np.log([0.02, 0.02])
    gradient = autograd.grad(objective)
    f = lambda y: objective(y, theta, X, target)

    @cache
    def trained() -> dict[int, Vector]:
        order, y, kept = np.random.default_rng(11), y0, {}
        for step in range(1, 401):
            batch = order.integers(40, size=8)
            y = y - 0.4 / (1 + step / 50) * gradient(y, theta, X[batch], target[batch])
            kept[step] = y
        return kept

    def start() -> Vector:
        return minimize(f, trained()[400], "L-BFGS-B", options={"maxiter": 2000})

    def stops(problem: Problem) -> Iterator[tuple[str, Vector]]:
        for step in (60, 150, 400):
            yield f"SGD {step}", trained()[step]
        for steps in (5, 20, 40):
            yield f"SGD, L-BFGS {steps}", minimize(f, trained()[400], "L-BFGS-B", options={"maxiter": steps})

    return minimum("network", objective, y0, theta, (X, target), start=start, stops=stops)


def barrier() -> Problem:
    """A central path: min t f − Σ log(−g)."""
    rng = np.random.default_rng(12)
    G = rng.normal(size=(9, 5))

    def objective(y: Any, theta: Any, G: Any) -> Any:
        return space(y, theta).sum(theta * y + y * y / 4)

    def ineq(y: Any, theta: Any, G: Any) -> Any:
        return G @ y - 1

    def whole(y: Any, theta: Any, G: Any) -> Any:
        xp = space(y, theta)
        return 4 * objective(y, theta, G) - xp.sum(xp.log(-ineq(y, theta, G)))

    def guarded(y: Any, theta: Any, G: Any) -> Any:  # a line search comes back
        inside = all(bool(room > 0) for room in 1 - G @ y)
        return whole(y, theta, G) if inside else 1e10 + 0 * space(y).sum(y)

    def admit(y: Vector, d: Vector) -> Vector:
        while np.min(1 - G @ (y + d)) <= 0:  # a barrier method does not leave the set
            d = d / 2
        return y + d

    condition = LogBarrier(objective, ineq=ineq, t=4.0)
    return minimum("barrier", guarded, np.zeros(5), rng.normal(size=5), (G,), condition=condition, admit=admit,
                   residual=autograd.grad(whole))  # fmt: skip


MINIMA = (ridge, logistic, data_weights, multinomial, quartic, poisson, exponential_fit, rosenbrock, denoising,
          transport, network, barrier)  # fmt: skip
