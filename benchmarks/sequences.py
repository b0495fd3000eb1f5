"""Three problems whose outer loops ask for one gradient after another: their penalties are tuned by hypergradients.

Each is min over y of f(y, θ), with y and θ vectors, and an outer loss of y alone. Functions are over the namespace of
their arrays, so that autograd, Torch and JAX derive them; NumPy has the products by hand. The truth about a gradient
comes from Newton's method to rounding and a solve to rounding, without the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from benchmarks.measure import Setting, Spread
from benchmarks.report import Row
from implicitdiff import CG, Stationary, implicit_vjp

__all__ = ["PROBLEMS", "Adam", "SequenceProblem", "breast_cancer", "digits", "grid", "points", "sequences"]

Array = NDArray[Any]


def space(*values: Any) -> Any:
    """Namespace of arrays, of which autograd may be tracing some."""
    if any(type(x).__module__.startswith("autograd") for x in values):
        import autograd.numpy

        return autograd.numpy
    return array_api_compat.array_namespace(*values)


@dataclass
class SequenceProblem:
    """An inner problem with its outer loss, and where the loop starts.

    Parameters
    ----------
    name : str
    objective, outer : callable
        f(y, θ, *args) and L(y, θ), over any namespace; the outer loss closes over its own data.
    grad, hvp, mixed_vjp, slope : callable
        ∇_y f, products with the Hessian and with Bᵀ, and ∂L/∂y(y), on NumPy.
    theta, y : array
        Where the loop and its first inner solve start.
    args : tuple
        Data.
    """

    name: str
    objective: Callable[..., Any]
    outer: Callable[..., Any]
    grad: Callable[..., Array]
    hvp: Callable[..., Array]
    mixed_vjp: Callable[..., Array]
    slope: Callable[[Array], Array]
    theta: Array
    y: Array
    args: tuple[Any, ...]

    @cached_property
    def condition(self) -> Stationary:
        """The condition on NumPy, by the products above."""
        return Stationary(self.objective, grad=self.grad, hvp=self.hvp, mixed_vjp=self.mixed_vjp)

    @property
    def n(self) -> int:
        """Number of inner variables."""
        return self.y.size

    def inner(self, y: Array, theta: Array, rtol: float = 1e-12) -> Array:
        """Solve the inner problem by Newton's method from y, to rounding."""
        size = np.linalg.norm(self.grad(0 * y, theta, *self.args))
        for _ in range(100):
            g = self.grad(y, theta, *self.args)
            if np.linalg.norm(g) <= rtol * size:
                return y
            step = self.adjoint(y, theta, -g, min(1e-2, np.linalg.norm(g) / size))
            length, here = 1.0, self.objective(y, theta, *self.args)
            while self.objective(y + length * step, theta, *self.args) > here + 1e-12 * abs(here) and length > 1e-3:
                length /= 2
            y = y + length * step
        raise RuntimeError(f"{self.name}: the inner problem was not solved")

    def adjoint(self, y: Array, theta: Array, b: Array, rtol: float = 1e-13) -> Array:
        """A⁻¹ b by SciPy's CG."""
        operator = LinearOperator(
            (y.size, y.size), matvec=lambda v: self.hvp(y, theta, v, *self.args), dtype=np.float64
        )
        return cg(operator, b, rtol=rtol, atol=0.0, maxiter=20 * y.size)[0]

    def gradient(self, y: Array, theta: Array) -> Array:
        """dL/dθ at a solution, to rounding."""
        return -self.mixed_vjp(y, theta, self.adjoint(y, theta, self.slope(y)), *self.args)


class Adam:
    """Adam with the usual constants, on NumPy."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        self.rate, self.m, self.v, self.t = learning_rate, 0.0, 0.0, 0

    def __call__(self, theta: Array, g: Array) -> Array:
        """Make a step."""
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return theta - self.rate * m / (np.sqrt(v) + 1e-8)


def softplus(z: Any) -> Any:
    """log(1 + exp z)."""
    xp = space(z)
    return xp.log(1 + xp.exp(-xp.abs(z))) + (z + xp.abs(z)) / 2


def _halves(name: str, share: float) -> tuple[Array, Array, Array, Array]:
    """Standardised features and labels of a training and a validation set."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    X, labels = bunch.data.astype(np.float64), bunch.target
    order = np.random.default_rng(0).permutation(len(X))
    train, rest = np.split(order, [int(share * len(X))])
    mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
    X = (X - mean) / np.where(scale > 0, scale, 1.0)
    return X[train], labels[train], X[rest], labels[rest]


def breast_cancer() -> SequenceProblem:
    """Logistic regression with one log-penalty for each of 30 features."""
    X, labels, Xv, labels_v = _halves("breast_cancer", 0.5)
    S, Sv = X * (2 * labels - 1)[:, None], Xv * (2 * labels_v - 1)[:, None]

    def objective(y: Any, theta: Any, S: Any) -> Any:
        xp = space(y, theta)
        return xp.sum(softplus(-(S @ y))) / S.shape[0] + xp.sum(xp.exp(theta) * y * y) / 2

    def outer(y: Any, theta: Any) -> Any:
        Z = like(Sv, y)
        return space(y).sum(softplus(-(Z @ y))) / Z.shape[0]

    def sigmoid(z: Array) -> Array:
        return 1 / (1 + np.exp(-z))

    def grad(y: Array, theta: Array, S: Array) -> Array:
        return -S.T @ sigmoid(-(S @ y)) / len(S) + np.exp(theta) * y

    def hvp(y: Array, theta: Array, v: Array, S: Array) -> Array:
        p = sigmoid(S @ y)
        return S.T @ (p * (1 - p) * (S @ v)) / len(S) + np.exp(theta) * v

    def mixed_vjp(y: Array, theta: Array, u: Array, S: Array) -> Array:
        return np.exp(theta) * y * u

    def slope(y: Array) -> Array:
        return -Sv.T @ sigmoid(-(Sv @ y)) / len(Sv)

    theta = np.full(30, np.log(0.03))
    return SequenceProblem(
        "breast cancer, 30 penalties", objective, outer, grad, hvp, mixed_vjp, slope, theta, np.zeros(30), (S,)
    )


def digits() -> SequenceProblem:
    """Softmax regression of 10 classes with one log-penalty for each of 64 pixels: 640 weights."""
    X, labels, Xv, labels_v = _halves("digits", 0.5)
    Y, Yv = np.eye(10)[labels], np.eye(10)[labels_v]

    def cross_entropy(y: Any, X: Any, Y: Any) -> Any:
        xp = space(y)
        scores = X @ xp.reshape(y, (64, 10))
        scores = scores - xp.sum(scores, axis=1)[:, None] / 10
        return (xp.sum(xp.log(xp.sum(xp.exp(scores), axis=1))) - xp.sum(scores * Y)) / X.shape[0]

    def objective(y: Any, theta: Any, X: Any, Y: Any) -> Any:
        xp = space(y, theta)
        W = xp.reshape(y, (64, 10))
        return cross_entropy(y, X, Y) + xp.sum(xp.exp(theta)[:, None] * W * W) / 2

    def outer(y: Any, theta: Any) -> Any:
        return cross_entropy(y, like(Xv, y), like(Yv, y))

    def probabilities(y: Array, X: Array) -> Array:
        scores = X @ y.reshape(64, 10)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def grad(y: Array, theta: Array, X: Array, Y: Array) -> Array:
        G = X.T @ (probabilities(y, X) - Y) / len(X) + np.exp(theta)[:, None] * y.reshape(64, 10)
        return G.ravel()

    def hvp(y: Array, theta: Array, v: Array, X: Array, Y: Array) -> Array:
        V, P = v.reshape(64, 10), probabilities(y, X)
        Z = P * (X @ V)
        Z -= P * Z.sum(axis=1, keepdims=True)
        return (X.T @ Z / len(X) + np.exp(theta)[:, None] * V).ravel()

    def mixed_vjp(y: Array, theta: Array, u: Array, X: Array, Y: Array) -> Array:
        return np.exp(theta) * (y * u).reshape(64, 10).sum(axis=1)

    def slope(y: Array) -> Array:
        return (Xv.T @ (probabilities(y, Xv) - Yv) / len(Xv)).ravel()

    theta = np.full(64, np.log(1e-3))
    return SequenceProblem(
        "digits, 64 penalties", objective, outer, grad, hvp, mixed_vjp, slope, theta, np.zeros(640), (X, Y)
    )


def grid(side: int = 64, blocks: int = 8) -> SequenceProblem:
    """A Markov random field on a grid of side², with one log-weight of its smooth edges for each of blocks² squares.

    f = ½ ‖y − z‖² + Σ over neighbours exp(θ of their square) ρ(y_i − y_j), ρ(d) = √(d² + ε²): an image is restored.
    """
    rng, eps = np.random.default_rng(0), 0.1
    i, j = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    clean = ((i - side / 3) ** 2 + (j - side / 2) ** 2 < (side / 4) ** 2) + 0.5 * (j > 3 * side / 4) + i / side
    noisy = clean + 0.2 * rng.normal(size=clean.shape)
    square = (i * blocks // side) * blocks + j * blocks // side
    E = np.eye(blocks * blocks)[square]  # (side, side, blocks²)
    right, down = E[:, :-1].reshape(-1, blocks**2), E[:-1].reshape(-1, blocks**2)
    args = (noisy.ravel(), right, down)

    def edges(y: Any) -> tuple[Any, Any]:
        image = space(y).reshape(y, (side, side))
        return image[:, 1:] - image[:, :-1], image[1:, :] - image[:-1, :]

    def objective(y: Any, theta: Any, z: Any, right: Any, down: Any) -> Any:
        xp = space(y, theta)
        value = xp.sum((y - z) ** 2) / 2
        for d, R in zip(edges(y), (right, down), strict=True):
            value = value + xp.sum((R @ xp.exp(theta)) * xp.reshape(xp.sqrt(d * d + eps**2), (-1,)))
        return value

    def outer(y: Any, theta: Any) -> Any:
        return space(y).sum((y - like(clean.ravel(), y)) ** 2) / 2

    def gathered(parts: list[Array]) -> Array:
        out = np.zeros((side, side))
        out[:, 1:] += parts[0]
        out[:, :-1] -= parts[0]
        out[1:] += parts[1]
        out[:-1] -= parts[1]
        return out.ravel()

    def weighted(theta: Array, parts: list[Array], right: Array, down: Array) -> list[Array]:
        w = np.exp(theta)[square]
        return [w[:, :-1] * parts[0], w[:-1] * parts[1]]

    def grad(y: Array, theta: Array, z: Array, right: Array, down: Array) -> Array:
        parts = [d / np.sqrt(d * d + eps**2) for d in edges(y)]
        return y - z + gathered(weighted(theta, parts, right, down))

    def hvp(y: Array, theta: Array, v: Array, z: Array, right: Array, down: Array) -> Array:
        parts = [dv * eps**2 / (d * d + eps**2) ** 1.5 for d, dv in zip(edges(y), edges(v), strict=True)]
        return v + gathered(weighted(theta, parts, right, down))

    def mixed_vjp(y: Array, theta: Array, u: Array, z: Array, right: Array, down: Array) -> Array:
        parts = [du * d / np.sqrt(d * d + eps**2) for d, du in zip(edges(y), edges(u), strict=True)]
        return np.exp(theta) * (parts[0].ravel() @ right + parts[1].ravel() @ down)

    def slope(y: Array) -> Array:
        return y - clean.ravel()

    theta, y = np.full(blocks**2, np.log(0.6)), noisy.ravel().copy()
    name = f"grid of {side}², {blocks**2} weights"
    return SequenceProblem(name, objective, outer, grad, hvp, mixed_vjp, slope, theta, y, args)


def like(data: Array, y: Any) -> Any:
    """Data as an array of the library, dtype and device of another."""
    xp = space(y)
    if xp is np or type(y).__module__.startswith(("autograd", "numpy")):
        return data
    return xp.asarray(data, dtype=y.dtype, device=array_api_compat.device(y))


PROBLEMS = {"breast cancer": breast_cancer, "digits": digits, "grid": grid}


# -- one adjoint after another ----------------------------------------------------------------------------
Point = tuple[Array, Array, Array, Array]
SETUPS = {"breast cancer": (100, 1.8e-6, 5.6e-6), "digits": (400, 1e-6, 3.2e-6), "grid": (100, 5.6e-5, 5.6e-5)}
"""Pairs, and the largest relative residuals (on a grid of four a decade), cold and with pairs, at which no gradient of
the loop is off by more than 1e-4."""


def points(problem: SequenceProblem, steps: int = 60) -> list[Point]:
    """θ, y, ∂L/∂y and the gradient along a loop of exact gradients and steps of Adam."""
    theta, y, step, found = problem.theta, problem.y, Adam(), list[Point]()
    for _ in range(steps):
        y = problem.inner(y, theta)
        g = problem.gradient(y, theta)
        found.append((theta, y, problem.slope(y), g))
        theta = step(theta, g)
    return found


def followed(problem: SequenceProblem, path: list[Point], solver: Any, *, shared: bool) -> tuple[int, float]:
    """Solve for all adjoints; return the products of the solves, and the largest true error of a gradient.

    Products are all that a solve makes: iterations, residuals, and what finds the scale of a small system. F is not
    given, so that nothing is spent on looking at y.
    """
    condition = Stationary(hvp=problem.hvp, mixed_vjp=problem.mixed_vjp, kind="minimum")
    state: Any = "new"
    products, worst = 0, 0.0
    for theta, y, v, g in path:
        value, after, report = implicit_vjp(
            condition, y, theta, v, args=problem.args, solver=solver, state=state, return_report=True
        )
        state = after if shared else "new"
        products += report.matvecs
        worst = max(worst, float(np.linalg.norm(value - g) / np.linalg.norm(g)))
    return products, worst


def sequences(setting: Setting) -> list[Row]:
    """Products of the adjoints of an outer loop: cold, started from the last ones, and with their pairs."""
    rows = []
    for name, (pairs, cold_rtol, rtol) in SETUPS.items():
        if setting.short and name != "breast cancer":
            continue
        problem = PROBLEMS[name]()
        path = points(problem, 6 if setting.short else 60)
        cold, _ = followed(problem, path, CG(rtol=cold_rtol), shared=False)
        tight, _ = followed(problem, path, CG(rtol=1e-8), shared=False)
        started, error = followed(problem, path, CG(rtol=cold_rtol), shared=True)
        recycled, off = followed(problem, path, CG(rtol=rtol, recycle=pairs), shared=True)
        size, facts = f"{problem.name}, {len(path)} steps", {"pairs": pairs, "rtol": rtol, "rtol, cold": cold_rtol}
        for what, ours, theirs, bar, wrong in (
            ("extrapolated / cold", started, cold, None, error),
            (f"{pairs} pairs / cold", recycled, cold, None if setting.short else 0.15, off),
            (f"{pairs} pairs / cold at 1e-8", recycled, tight, None, off),
        ):
            ratio = Spread(*3 * (ours / theirs,))
            rows.append(Row(f"adjoints, {what}", size, ours, theirs, ratio, bar, wrong, 1e-4, "products", facts))
    return rows
