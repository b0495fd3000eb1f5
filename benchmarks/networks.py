"""Networks: weight decay of a perceptron, distilled data, meta-learning over 16 tasks.

The gradients of the loops are held against central differences of training problems that are solved again, to a slope
of 1e-8 by the framework's own gradient; the meta-gradient against those of tasks that SciPy solves again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.frameworks import Framework
from benchmarks.measure import Setting, Spread, interleave
from benchmarks.report import Row, Skipped
from benchmarks.sequences import space
from implicitdiff import Bilevel, Fixed, Stationary, implicit_vjp

__all__ = ["Digits", "Tasks", "networks"]

Array = Any
STEP = 1e-3
"""Of central differences of log-penalties, pixels and common weights."""
SOLVED = 1e-8
"""Largest slope of a training loss that is solved for."""


def cross_entropy(scores: Array, one_hot: Array) -> Array:
    """Mean over the rows."""
    xp = space(scores)
    scores = scores - xp.sum(scores, axis=1)[:, None] / scores.shape[1]
    return xp.sum(xp.log(xp.sum(xp.exp(scores), axis=1)) - xp.sum(scores * one_hot, axis=1)) / scores.shape[0]


class Digits:
    """Digits by a perceptron with a hidden layer, and by a softmax regression on ten images that are learned.

    Parameters
    ----------
    samples : int
        For training, and as many for validation.
    hidden : int
    """

    def __init__(self, samples: int = 300, hidden: int = 64) -> None:
        from sklearn.datasets import load_digits

        bunch, rng = load_digits(), np.random.default_rng(0)
        order = rng.permutation(len(bunch.data))
        images, labels = bunch.data[order] / 16, np.eye(10)[bunch.target[order]]
        self.train = images[:samples], labels[:samples]
        self.validation = images[samples : 2 * samples], labels[samples : 2 * samples]
        shapes = {"W1": (64, hidden), "b1": (hidden,), "W2": (hidden, 10), "b2": (10,)}
        self.start = {
            name: rng.normal(size=shape) * (0.0 if name[0] == "b" else 1 / 8) for name, shape in shapes.items()
        }
        self.decay = np.log(np.full(2, 0.1))
        self.zero, self.grey = {"W": np.zeros((64, 10)), "b": np.zeros(10)}, np.full((10, 64), 0.5)


def perceptron(y: Any, x: Array) -> Array:
    """Scores of a layer of tanh and a linear one."""
    return space(x).tanh(x @ y["W1"] + y["b1"]) @ y["W2"] + y["b2"]


def with_decay(y: Any, theta: Array, x: Array, one_hot: Array, *_: Array) -> Array:
    """Training loss, with a log-penalty for each layer."""
    xp = space(x)
    of_layers = [xp.sum(y[f"W{k}"] ** 2) + xp.sum(y[f"b{k}"] ** 2) for k in (1, 2)]
    return cross_entropy(perceptron(y, x), one_hot) + xp.sum(xp.exp(theta) * xp.stack(of_layers)) / 2


def on_images(y: Any, theta: Array, one_hot: Array) -> Array:
    """Training loss on images that are parameters."""
    xp = space(theta)
    decay = 0.01 * (xp.sum(y["W"] ** 2) + xp.sum(y["b"] ** 2))
    return cross_entropy(theta @ y["W"] + y["b"], one_hot) + decay / 2


class Solved:
    """A training problem that is solved to rounding where the loop has been.

    Parameters
    ----------
    fw : Framework
    training : callable
        f(y, theta, *args).
    loss : callable
        L(y).
    args : tuple
    """

    def __init__(self, fw: Framework, training: Callable[..., Any], loss: Callable[..., Any], args: Any) -> None:
        self.fw, self.training, self.loss, self.args = fw, training, loss, args
        self.newton, self.lbfgs = (
            Bilevel(training, loss, args=args, inner=inner, tolerance=Fixed(rtol), optimizer="sgd")
            for inner, rtol in (("newton-cg", 1e-10), ("lbfgs", 1e-7))
        )

    def minimum(self, y: dict[str, Array], theta: Array) -> dict[str, Array]:
        """Return the minimum of the training loss below y, and see that it is one by the framework's own gradient."""
        for loop in (self.lbfgs, self.newton):
            y = loop.step(loop.init(y, self.fw.put(theta))).y
        slope = self.fw.grad(self.training)(y, self.fw.put(theta), *self.args)
        left = max(float(np.abs(self.fw.numpy(part)).max()) for part in slope.values())
        if not left < SOLVED:
            raise RuntimeError(f"the training problem was not solved: a slope of {left:.1e} is left")
        return y

    def error(self, state: Any, theta: Array, direction: Array) -> float:
        """Relative error of a gradient of the loop along a direction."""
        moved = [theta + sign * STEP * direction for sign in (1, -1)]
        ends = [float(self.loss(self.minimum(state.y, at))) for at in moved]
        slope = (ends[0] - ends[1]) / (2 * STEP)
        return abs(float(np.sum(self.fw.numpy(state.gradient) * direction)) - slope) / abs(slope)


LIMIT = 2.0
"""Seconds that 20 outer steps may take."""


def timed_loop(fw: Framework, case: str, loop: Bilevel, first: Any, solved: Solved, direction: Array) -> Row:
    """Seconds of 20 steps against the limit, after a run that compiles; two gradients against differences."""

    def steps() -> list[Any]:
        states = [first]
        for _ in range(20):
            states.append(loop.step(states[-1]))
            float(states[-1].value)  # as who looks at the history would
        return states

    states, seconds = steps(), []
    for _ in range(3):
        began = time.perf_counter()
        states = steps()
        seconds.append(time.perf_counter() - began)
    errors = [solved.error(states[k + 1], fw.numpy(states[k].theta), direction) for k in (0, 19)]
    end = states[-1]
    told = max(float(s.error) for s in states[1:])
    facts = {"products": int(end.products), "inner gradients": int(end.inner_gradients), "estimated error": told,
             "first value": float(states[1].value), "last value": float(end.value)}  # fmt: skip
    ratio = Spread(*(float(f(seconds)) / LIMIT for f in (np.median, min, max)))
    size = f"n = {sum(fw.numpy(leaf).size for leaf in end.y.values())}, 20 steps"
    return Row(
        case, size, float(np.median(seconds)), LIMIT, ratio, 1.0, max(errors), 0.1, "s", facts, fw.name, fw.device
    )


def weight_decay(fw: Framework, setting: Setting) -> Row:
    """Penalties of the two layers of a perceptron, from where it was trained to."""
    problem = Digits(*((60, 8) if setting.short else (300, 64)))
    args, unseen = tuple(map(fw.put, problem.train)), tuple(map(fw.put, problem.validation))

    def loss(y: Any, theta: Any = None) -> Any:
        return cross_entropy(perceptron(y, unseen[0]), unseen[1])

    solved = Solved(fw, with_decay, loss, args)
    start = {name: fw.put(leaf) for name, leaf in problem.start.items()}
    loop = Bilevel(with_decay, loss, args=args)
    first = loop.init(solved.minimum(start, problem.decay), fw.put(problem.decay))
    return timed_loop(fw, "weight decay of a perceptron / 2 s", loop, first, solved, np.array([1.0, 0.5]))


def distillation(fw: Framework, setting: Setting) -> Row:
    """The pixels of ten images on which a softmax regression is trained."""
    problem = Digits(60 if setting.short else 900)
    args, seen = (fw.put(np.eye(10)),), tuple(map(fw.put, problem.train))

    def loss(y: Any, theta: Any = None) -> Any:
        return cross_entropy(seen[0] @ y["W"] + y["b"], seen[1])

    solved = Solved(fw, on_images, loss, args)
    loop = Bilevel(on_images, loss, args=args, learning_rate=0.05, bounds=(0.0, 1.0))
    first = loop.init({name: fw.put(leaf) for name, leaf in problem.zero.items()}, fw.put(problem.grey))
    direction = problem.train[0][:10] - 0.5
    return timed_loop(fw, "distillation of ten images / 2 s", loop, first, solved, direction)


# -- many tasks, one start ---------------------------------------------------------------------------------
PULL = 0.3
"""Weight of the distance of a task's weights from the common ones."""


class Tasks:
    """Regressions of sine curves from few points, each by a small network that is pulled towards common weights.

    Parameters
    ----------
    count, points, hidden : int
    """

    def __init__(self, count: int = 16, points: int = 10, hidden: int = 20) -> None:
        rng = np.random.default_rng(0)
        self.hidden, self.theta = hidden, rng.normal(size=3 * hidden) / 2
        size, phase = rng.uniform(0.5, 2, size=(count, 1)), rng.uniform(0, np.pi, size=(count, 1))
        self.support, self.query = (
            (x, size * np.sin(x + phase)) for x in rng.uniform(-3, 3, size=(2, count, points))
        )  # fmt: skip
        self.weights = self.solved(self.theta)

    def residual(self, w: Array, x: Array, t: Array) -> Array:
        """Errors of one network."""
        h = self.hidden
        a, b, c = w[:h], w[h : 2 * h], w[2 * h :]
        return space(x).tanh(x[:, None] * a + b) @ c - t

    def slopes(self, w: Array, x: Array) -> Array:
        """Derivatives of the residuals, by hand."""
        h = self.hidden
        u = np.tanh(x[:, None] * w[:h] + w[h : 2 * h])
        inner = (1 - u**2) * w[2 * h :]
        return np.concatenate([inner * x[:, None], inner, u], axis=1)

    def solved(self, theta: Array) -> Array:
        """Weights of all tasks, by SciPy."""
        root, unit = PULL**0.5, np.eye(theta.size)

        def one(x: Array, t: Array) -> Array:
            scale = x.size**-0.5
            return least_squares(
                lambda w: np.concatenate([scale * self.residual(w, x, t), root * (w - theta)]), theta,
                lambda w: np.concatenate([scale * self.slopes(w, x), root * unit]), method="lm", xtol=1e-14, ftol=1e-14,
                gtol=1e-14,
            ).x  # fmt: skip

        return np.stack([one(x, t) for x, t in zip(*self.support, strict=True)])

    def loss(self, weights: Array) -> float:
        """Half the mean square error at the query points, summed over tasks."""
        each = zip(weights, *self.query, strict=True)
        return sum(float(np.mean(self.residual(w, x, t) ** 2)) / 2 for w, x, t in each)

    def cotangents(self) -> Array:
        """Its gradient by the weights."""
        each = zip(self.weights, *self.query, strict=True)
        return np.stack([self.slopes(w, x).T @ self.residual(w, x, t) / x.size for w, x, t in each])


def meta_learning(fw: Framework, setting: Setting) -> list[Row]:
    """The meta-gradient of 16 tasks in one call, against its products for all tasks as one problem."""
    tasks = Tasks(*((4, 6, 4) if setting.short else (16, 10, 20)))

    def training(w: Any, theta: Any, x: Any, t: Any) -> Any:
        return (tasks.residual(w, x, t) ** 2).sum() / (2 * t.shape[0]) + PULL * ((w - theta) ** 2).sum() / 2

    def of_all(w: Any, theta: Any, x: Any, t: Any) -> Any:
        h = tasks.hidden
        a, b, c = w[:, None, :h], w[:, None, h : 2 * h], w[:, None, 2 * h :]
        r = (space(x).tanh(x[:, :, None] * a + b) * c).sum(2) - t
        return (r**2).sum() / (2 * t.shape[1]) + PULL * ((w - theta) ** 2).sum() / 2

    arrays = [fw.put(x) for x in (tasks.weights, tasks.theta, tasks.cotangents(), *tasks.support)]

    def ours(w: Any, theta: Any, v: Any, *args: Any, **more: Any) -> Any:
        return implicit_vjp(Stationary(training), w, theta, v, args=args, in_axes=(0, None, 0), solver="cg", **more)

    value, report = ours(*arrays, return_report=True)
    direction = np.cos(np.arange(tasks.theta.size))
    ends = [tasks.loss(tasks.solved(tasks.theta + sign * STEP * direction)) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * STEP)
    error = abs(float(fw.numpy(value) @ direction) - slope) / abs(slope)
    count = int(np.max(np.asarray(report.matvecs)))
    run = fw.products(of_all, *arrays)
    way, function = next(iter(fw.ways(ours, arrays).items()))
    times = interleave({"ours": function, "products": fw.timed(lambda: run(count))}, setting)
    size = f"{len(tasks.weights)} tasks x n = {tasks.theta.size}"
    return [fw.row(f"meta-gradient{way} / its {count} products", size, times, "ours", "products", None, error, 1e-4)]


def networks(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """All of them."""
    slow = [] if setting.short else [weight_decay(fw, setting)]
    return [*slow, distillation(fw, setting), *meta_learning(fw, setting)]
