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

__all__ = ["PROBLEMS", "Adam", "SequenceProblem", "breast_cancer", "digits", "grid", "pixels", "points",
           "sequences"]  # fmt: skip

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


def _halves(name: str, share: float, *, standardised: bool = True) -> tuple[Array, Array, Array, Array]:
    """Features, standardised or not, and labels, of a training and a validation set."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    X, labels = bunch.data.astype(np.float64), bunch.target
    order = np.random.default_rng(0).permutation(len(X))
    train, rest = np.split(order, [int(share * len(X))])
    if standardised:
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


@dataclass
class Softmax:
    """Softmax regression on 64 features, of 10 classes: training data are arguments, validation data its own."""

    Xv: Array
    Yv: Array

    @staticmethod
    def cross_entropy(y: Any, X: Any, Y: Any) -> Any:
        """Mean loss of the weights."""
        xp = space(y)
        scores = X @ xp.reshape(y, (64, 10))
        scores = scores - xp.sum(scores, axis=1)[:, None] / 10
        return (xp.sum(xp.log(xp.sum(xp.exp(scores), axis=1))) - xp.sum(scores * Y)) / X.shape[0]

    def objective(self, y: Any, theta: Any, X: Any, Y: Any) -> Any:
        """Loss with a penalty for each feature, exp(θ)/2 times its squared weights."""
        xp = space(y, theta)
        W = xp.reshape(y, (64, 10))
        return self.cross_entropy(y, X, Y) + xp.sum(xp.exp(theta)[:, None] * W * W) / 2

    def outer(self, y: Any, theta: Any) -> Any:
        """Loss on the validation data."""
        return self.cross_entropy(y, like(self.Xv, y), like(self.Yv, y))

    @staticmethod
    def probabilities(y: Array, X: Array) -> Array:
        """Of the classes, for each datum."""
        scores = X @ y.reshape(64, 10)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def grad(self, y: Array, theta: Array, X: Array, Y: Array) -> Array:
        """∇_y of the objective."""
        G = X.T @ (self.probabilities(y, X) - Y) / len(X) + np.exp(theta)[:, None] * y.reshape(64, 10)
        return G.ravel()

    def hvp(self, y: Array, theta: Array, v: Array, X: Array, Y: Array) -> Array:
        """Product with its Hessian."""
        V, P = v.reshape(64, 10), self.probabilities(y, X)
        Z = P * (X @ V)
        Z -= P * Z.sum(axis=1, keepdims=True)
        return (X.T @ Z / len(X) + np.exp(theta)[:, None] * V).ravel()

    def mixed_vjp(self, y: Array, theta: Array, u: Array, X: Array, Y: Array) -> Array:
        """Product with Bᵀ."""
        return np.exp(theta) * (y * u).reshape(64, 10).sum(axis=1)

    def slope(self, y: Array) -> Array:
        """∇ of the outer loss."""
        return (self.Xv.T @ (self.probabilities(y, self.Xv) - self.Yv) / len(self.Xv)).ravel()

    def problem(self, name: str, X: Array, Y: Array, penalty: float) -> SequenceProblem:
        """Return the problem on training data, from a log-penalty."""
        functions = self.objective, self.outer, self.grad, self.hvp, self.mixed_vjp, self.slope
        return SequenceProblem(name, *functions, np.full(64, penalty), np.zeros(640), (X, Y))


def digits() -> SequenceProblem:
    """Softmax regression of 10 classes with one log-penalty for each of 64 standardised pixels: 640 weights."""
    X, labels, Xv, labels_v = _halves("digits", 0.5)
    softmax = Softmax(Xv, np.eye(10)[labels_v])
    return softmax.problem("digits, 64 penalties", X, np.eye(10)[labels], float(np.log(1e-3)))


def pixels() -> SequenceProblem:
    """Return the same with the pixels as they are, from 0 to 1, from log-penalties of −6: κ = 235."""
    X, labels, Xv, labels_v = _halves("digits", 0.5, standardised=False)
    softmax = Softmax(Xv / 16, np.eye(10)[labels_v])
    return softmax.problem("digits, pixels as they are, 64 penalties", X / 16, np.eye(10)[labels], -6.0)


@dataclass
class Restoration:
    """A Markov random field on a grid of side², with one log-weight of its smooth edges for each of blocks² squares.

    f = ½ ‖y − z‖² + Σ over neighbours exp(θ of their square) ρ(y_i − y_j), ρ(d) = √(d² + ε²): an image is restored.
    The arguments are the noisy image z, and which square each edge to the right, and down, is of.
    """

    clean: Array
    square: Array
    eps: float = 0.1

    def edges(self, y: Any) -> tuple[Any, Any]:
        """Differences to the right, and down."""
        image = space(y).reshape(y, self.clean.shape)
        return image[:, 1:] - image[:, :-1], image[1:, :] - image[:-1, :]

    def objective(self, y: Any, theta: Any, z: Any, right: Any, down: Any) -> Any:
        """Energy of an image."""
        xp = space(y, theta)
        value = xp.sum((y - z) ** 2) / 2
        for d, R in zip(self.edges(y), (right, down), strict=True):
            value = value + xp.sum((R @ xp.exp(theta)) * xp.reshape(xp.sqrt(d * d + self.eps**2), (-1,)))
        return value

    def outer(self, y: Any, theta: Any) -> Any:
        """Half the squared distance from the clean image."""
        return space(y).sum((y - like(self.clean.ravel(), y)) ** 2) / 2

    def gathered(self, theta: Array, parts: list[Array]) -> Array:
        """Return the sum over the edges of each pixel, weighted."""
        out, w = np.zeros(self.clean.shape), np.exp(theta)[self.square]
        right, down = w[:, :-1] * parts[0], w[:-1] * parts[1]
        out[:, 1:] += right
        out[:, :-1] -= right
        out[1:] += down
        out[:-1] -= down
        return out.ravel()

    def grad(self, y: Array, theta: Array, z: Array, right: Array, down: Array) -> Array:
        """∇_y of the energy."""
        return y - z + self.gathered(theta, [d / np.sqrt(d * d + self.eps**2) for d in self.edges(y)])

    def hvp(self, y: Array, theta: Array, v: Array, z: Array, right: Array, down: Array) -> Array:
        """Product with its Hessian."""
        pairs = zip(self.edges(y), self.edges(v), strict=True)
        return v + self.gathered(theta, [dv * self.eps**2 / (d * d + self.eps**2) ** 1.5 for d, dv in pairs])

    def mixed_vjp(self, y: Array, theta: Array, u: Array, z: Array, right: Array, down: Array) -> Array:
        """Product with Bᵀ."""
        pairs = zip(self.edges(y), self.edges(u), strict=True)
        parts = [du * d / np.sqrt(d * d + self.eps**2) for d, du in pairs]
        return np.exp(theta) * (parts[0].ravel() @ right + parts[1].ravel() @ down)

    def slope(self, y: Array) -> Array:
        """∇ of the outer loss."""
        return y - self.clean.ravel()


def grid(side: int = 64, blocks: int = 8) -> SequenceProblem:
    """Restore an image of side² pixels, with blocks² log-weights (`Restoration`)."""
    rng = np.random.default_rng(0)
    i, j = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    clean = ((i - side / 3) ** 2 + (j - side / 2) ** 2 < (side / 4) ** 2) + 0.5 * (j > 3 * side / 4) + i / side
    noisy = (clean + 0.2 * rng.normal(size=clean.shape)).ravel()
    square = (i * blocks // side) * blocks + j * blocks // side
    E = np.eye(blocks * blocks)[square]  # (side, side, blocks²)
    args = noisy, E[:, :-1].reshape(-1, blocks**2), E[:-1].reshape(-1, blocks**2)
    field = Restoration(clean, square)
    functions = field.objective, field.outer, field.grad, field.hvp, field.mixed_vjp, field.slope
    name = f"grid of {side}², {blocks**2} weights"
    return SequenceProblem(name, *functions, np.full(blocks**2, np.log(0.6)), noisy.copy(), args)


def like(data: Array, y: Any) -> Any:
    """Data as an array of the library, dtype and device of another."""
    xp = space(y)
    if xp is np or type(y).__module__.startswith(("autograd", "numpy")):
        return data
    return xp.asarray(data, dtype=y.dtype, device=array_api_compat.device(y))


PROBLEMS = {"breast cancer": breast_cancer, "digits": digits, "pixels": pixels, "grid": grid}


# -- one adjoint after another ----------------------------------------------------------------------------
Point = tuple[Array, Array, Array, Array]
PAIRS = 100
SETUPS = {"breast cancer": (1.8e-6, 1e-5), "digits": (1e-6, 1e-5), "grid": (5.6e-5, 3.2e-5)}
"""The largest relative residuals (on a grid of four a decade), cold and with pairs, at which no gradient of the loop is
off by more than 1e-4."""


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
    for name, (cold_rtol, rtol) in SETUPS.items():
        if setting.short and name != "breast cancer":
            continue
        problem = PROBLEMS[name]()
        path = points(problem, 6 if setting.short else 60)
        cold, _ = followed(problem, path, CG(rtol=cold_rtol), shared=False)
        tight, _ = followed(problem, path, CG(rtol=1e-8), shared=False)
        started, error = followed(problem, path, CG(rtol=cold_rtol), shared=True)
        recycled, off = followed(problem, path, CG(rtol=rtol, recycle=PAIRS), shared=True)
        size, facts = f"{problem.name}, {len(path)} steps", {"pairs": PAIRS, "rtol": rtol, "rtol, cold": cold_rtol}
        for what, ours, theirs, bar, wrong in (
            ("extrapolated / cold", started, cold, None, error),
            (f"{PAIRS} pairs / cold", recycled, cold, None if setting.short else 0.15, off),
            (f"{PAIRS} pairs / cold at 1e-8", recycled, tight, None, off),
        ):
            ratio = Spread(*3 * (ours / theirs,))
            rows.append(Row(f"adjoints, {what}", size, ours, theirs, ratio, bar, wrong, 1e-4, "products", facts))
    return rows
