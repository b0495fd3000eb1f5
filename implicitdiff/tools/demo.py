"""The demo: one L2 penalty per feature of a softmax regression, tuned by hypergradients on real data.

The inner problem, for the weights W (a row per feature, one more for the intercepts b) of a softmax regression on the
training set, has one log-penalty θ_j for each feature j::

    W*(θ) = argmin  mean cross-entropy(W) + ½ Σ_j exp(θ_j) ‖W_j‖² + ½ (Σ_c b_c)²

The last term moves no prediction: adding a constant to all intercepts changes nothing else, so without it A would be
singular. The outer problem is to minimise the validation loss at W*(θ), and one linear solve gives its gradient in
all θ_j. The test set is looked at, and never used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from implicitdiff import ErrorEstimate, Report, Stationary, implicit_grad

__all__ = ["BOUNDS", "DATASETS", "Outcome", "missing", "run", "table"]

Floats = NDArray[np.float64]
Progress = Callable[..., Any]  # tqdm, with its options

DATASETS = {"digits": (0.11, 0.45), "breast_cancer": (0.25, 0.45), "wine": (0.25, 0.45)}
"""Shares of training and validation set. Few samples to train on make penalties matter; a validation set that is
large against the number of penalties keeps them from being fitted to its noise."""
BOUNDS = (float(np.log(1e-3)), float(np.log(10.0)))
"""Log-penalties from weak to nearly switched off; the same for both models. The lower end matters: from 1e-4 on, the
penalties per feature can follow the noise of the validation set, and the test loss tells."""
GRID = 13
DIRECTIONS = 8


# -- data ----------------------------------------------------------------------------------------------
class Split(NamedTuple):
    """Standardised features with a column of ones behind, shape (samples, p + 1), and one-hot classes."""

    X: Floats
    Y: Floats


@dataclass(frozen=True)
class Data:
    """A data set in three parts; the training set alone sets the standardisation."""

    name: str
    train: Split
    validation: Split
    test: Split
    features: list[str]
    mean: Floats

    def __str__(self) -> str:
        sizes = (len(part.X) for part in (self.train, self.validation, self.test))
        samples = "{} samples to train, {} to validate, {} to test".format(*sizes)
        return f"{self.name}: {len(self.features)} features, {self.train.Y.shape[1]} classes; {samples}"


def missing(*, plotting: bool, quiet: bool) -> str | None:
    """Say which packages to install that are needed and not there, by a command that works in a checkout as well."""
    needed = {"sklearn": True, "tqdm": not quiet, "matplotlib": plotting}
    absent = [name for name, used in needed.items() if used and find_spec(name) is None]
    if not absent:
        return None
    packages = [name.replace("sklearn", "scikit-learn") for name in absent]
    instead = ", or --quiet" if absent == ["tqdm"] else ""
    return f"the demo needs {' and '.join(packages)}: python -m pip install {' '.join(packages)}{instead}"


def load(name: str, seed: int) -> Data:
    """Load a data set that ships with scikit-learn and split it, every class in the same shares."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = getattr(datasets, f"load_{name}")()
    X, y = bunch.data.astype(np.float64), bunch.target
    parts, (train, validation) = [], DATASETS[name]
    for share in (train, validation / (1 - train)):
        first, X, first_y, y = train_test_split(X, y, train_size=share, random_state=seed, stratify=y)
        parts.append((first, first_y))
    mean, scale = parts[0][0].mean(axis=0), parts[0][0].std(axis=0)
    scale[scale == 0] = 1.0  # a pixel that is always blank

    def split(X: Floats, y: Any) -> Split:
        return Split(np.column_stack([(X - mean) / scale, np.ones(len(X))]), np.eye(len(bunch.target_names))[y])

    names = [str(feature) for feature in bunch.feature_names]
    return Data(name, split(*parts[0]), split(*parts[1]), split(X, y), names, mean)


# -- inner problem -------------------------------------------------------------------------------------
def softmax(S: Floats) -> Floats:
    """Probabilities from scores, shape (samples, classes)."""
    E = np.exp(S - S.max(axis=1, keepdims=True))
    return E / E.sum(axis=1, keepdims=True)


def losses(W: Floats, X: Floats, Y: Floats) -> Floats:
    """Cross-entropy of each sample."""
    S = X @ W
    S -= S.max(axis=1, keepdims=True)
    return np.log(np.exp(S).sum(axis=1)) - (S * Y).sum(axis=1)


def loss(W: Floats, X: Floats, Y: Floats) -> float:
    """Mean cross-entropy."""
    return float(losses(W, X, Y).mean())


def loss_grad(W: Floats, X: Floats, Y: Floats) -> Floats:
    """Gradient of the mean cross-entropy in W."""
    return X.T @ (softmax(X @ W) - Y) / len(X)


def penalty_grad(W: Floats, theta: Floats) -> Floats:
    """Gradient of the penalty; linear in W, so it is its own Hessian product."""
    out = W * np.append(np.exp(theta), 0.0)[:, None]
    out[-1] += W[-1].sum()
    return out


def objective(W: Floats, theta: Floats, X: Floats, Y: Floats) -> float:
    """Inner objective."""
    return loss(W, X, Y) + 0.5 * float(np.vdot(W, penalty_grad(W, theta)))


def grad(W: Floats, theta: Floats, X: Floats, Y: Floats) -> Floats:
    """Gradient of the inner objective in W."""
    return loss_grad(W, X, Y) + penalty_grad(W, theta)


def hvp(W: Floats, theta: Floats, V: Floats, X: Floats, Y: Floats) -> Floats:
    """Product of V with the Hessian of the inner objective in W."""
    P, D = softmax(X @ W), X @ V
    D -= (P * D).sum(axis=1, keepdims=True)
    return X.T @ (P * D) / len(X) + penalty_grad(V, theta)


def mixed_vjp(W: Floats, theta: Floats, U: Floats, X: Floats, Y: Floats) -> Floats:
    """∂⟨∇_W f, U⟩/∂θ."""
    return np.exp(theta) * (W[:-1] * U[:-1]).sum(axis=1)


CONDITION = Stationary(grad=grad, hvp=hvp, mixed_vjp=mixed_vjp)


def fit(W: Floats, theta: Floats, train: Split, tol: float = 1e-11, maxiter: int = 100) -> Floats:
    """Minimise the inner objective by Newton-CG from W until the norm of the gradient is below ``tol``."""
    X, Y = train
    for _ in range(maxiter):
        g = grad(W, theta, X, Y)
        size = float(np.linalg.norm(g))
        if size <= tol:
            return W
        step = _newton_step(W, theta, g, X, Y, rtol=min(0.1, size))
        value, slope, t = objective(W, theta, X, Y), float(np.vdot(g, step)), 1.0
        enough = 1e-14 * abs(value)  # near the minimum the decrease drowns in rounding
        while objective(W + t * step, theta, X, Y) > value + 1e-4 * t * slope + enough:
            t /= 2
        W = W + t * step
    raise RuntimeError(f"the inner problem was not solved in {maxiter} steps: gradient norm {size:.1e} > {tol:.1e}")


def _newton_step(W: Floats, theta: Floats, g: Floats, X: Floats, Y: Floats, rtol: float) -> Floats:
    P = softmax(X @ W)
    diagonal = (X**2).T @ (P * (1 - P)) / len(X) + penalty_grad(np.ones_like(W), theta)
    shape, n = W.shape, W.size
    A = LinearOperator((n, n), lambda v: hvp(W, theta, v.reshape(shape), X, Y).ravel(), dtype=np.float64)
    M = LinearOperator((n, n), lambda v: v / diagonal.ravel(), dtype=np.float64)
    step: Floats = cg(A, -g.ravel(), rtol=rtol, M=M)[0]
    return step.reshape(shape)


class Model(NamedTuple):
    """Log-penalties, shape (p,), and the weights that they lead to."""

    theta: Floats
    W: Floats


# -- outer problem -------------------------------------------------------------------------------------
@dataclass
class Cost:
    """What the adjoint solves took, all together."""

    solves: int = 0
    iterations: int = 0
    matvecs: int = 0
    seconds: float = 0.0
    solver: str = ""
    """Really used, and why."""

    def add(self, report: Report) -> None:
        """Count one solve."""
        self.solves += 1
        self.iterations += report.iterations
        self.matvecs += report.matvecs
        self.seconds += report.seconds
        self.solver = f"{report.solver} ({report.reason})"


@dataclass
class Hypergradient:
    """Validation loss and its gradient in θ. Weights and adjoint start from those of the call before."""

    data: Data
    solver: Any
    weights: Floats
    adjoint: Floats | None = None
    cost: Cost = field(default_factory=Cost)

    def __call__(self, theta: Floats) -> tuple[float, Floats]:
        """Validation loss at W*(θ), and its gradient."""
        self.weights = fit(self.weights, theta, self.data.train)
        value, cotangent = loss(self.weights, *self.data.validation), loss_grad(self.weights, *self.data.validation)
        gradient, report = implicit_grad(
            CONDITION, cotangent, self.weights, theta, args=self.data.train, solver=self.solver, x0=self.adjoint,
            return_report=True,
        )  # fmt: skip
        self.adjoint = report.solution
        self.cost.add(report)
        return value, gradient


def tune(
    problem: Hypergradient, groups: NDArray[np.intp], start: Floats, steps: int, each: Callable[[Floats], None]
) -> Floats:
    """Minimise the validation loss over θ = z[groups] by L-BFGS-B from z = start; ``each`` sees θ after each step."""

    def function(z: Floats) -> tuple[float, Floats]:
        value, gradient = problem(z[groups])
        total = np.zeros(len(start))
        np.add.at(total, groups, gradient)
        return value, total

    found = scipy.optimize.minimize(
        function, start, jac=True, method="L-BFGS-B", bounds=[BOUNDS] * len(start),
        callback=lambda z: each(z[groups]), options={"maxiter": steps},
    )  # fmt: skip
    return np.asarray(found.x)[groups]


def shared_penalty(data: Data, solver: Any, progress: Progress) -> Floats:
    """Tune one penalty for all features on the same validation set: the best of a grid, refined by hypergradients."""
    p = len(data.features)
    W, tried = np.zeros((p + 1, data.train.Y.shape[1])), []
    for value in progress(np.linspace(BOUNDS[1], BOUNDS[0], GRID), desc="shared penalty", unit="fit"):
        W = fit(W, np.full(p, value), data.train)
        tried.append((loss(W, *data.validation), value, W))
    _, value, W = min(tried, key=lambda t: t[0])
    return tune(Hypergradient(data, solver, W), np.zeros(p, dtype=np.intp), np.array([value]), 50, lambda theta: None)


def check_gradient(
    data: Data, solver: Any, theta: Floats, W: Floats, progress: Progress, h: float = 1e-3
) -> float:  # fmt: skip
    """Relative error of the hypergradient along random directions, against differences of the re-solved problem."""
    gradient = Hypergradient(data, solver, W)(theta)[1]
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, len(theta)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def value(moved: Floats) -> float:
        return loss(fit(W, moved, data.train), *data.validation)

    bar = progress(directions, desc="gradient check", unit="direction")
    differences = np.array([(value(theta + h * d) - value(theta - h * d)) / (2 * h) for d in bar])
    return float(np.linalg.norm(directions @ gradient - differences) / np.linalg.norm(differences))


def certify(data: Data, solver: Any, model: Model) -> ErrorEstimate:
    """Estimate the error of the hypergradient, without solving anything again."""
    options: Any = {"args": data.train, "solver": solver, "error": True, "return_report": True}
    report = implicit_grad(CONDITION, loss_grad(model.W, *data.validation), model.W, model.theta, **options)[1]
    return cast("ErrorEstimate", report.error)


# -- the demo ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """What came out: both models, the loss after each outer step, the cost, and the error of the gradient."""

    data: Data
    solver: str
    shared: Model
    tuned: Model
    history: Floats
    """Validation and test loss after each outer step, shape (steps + 1, 2)."""
    cost: Cost
    gradient_error: float
    certificate: ErrorEstimate
    """Of the gradient at the end: its estimated error."""
    seconds: float


@contextlib.contextmanager
def _counter(quiet: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Show a count of steps: a function to call after each, with what to say of it."""
    if quiet:
        yield lambda text: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="outer steps", unit="step") as bar:

        def step(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        yield step


def _shown(quiet: bool) -> Progress:
    """What goes through values and shows how far it is; with ``quiet``, without tqdm, goes through them alone."""
    if quiet:
        return lambda values, **_: values
    from tqdm import tqdm

    progress: Progress = tqdm
    return progress


def run(name: str = "digits", solver: str = "auto", steps: int = 20, seed: int = 0, quiet: bool = False) -> Outcome:
    """Tune the shared penalty, then one per feature starting from it, then check the gradient at the end."""
    progress = _shown(quiet)
    began = time.perf_counter()
    data = load(name, seed)
    p = len(data.features)
    theta = shared_penalty(data, solver, progress)
    shared = Model(theta, fit(np.zeros((p + 1, data.train.Y.shape[1])), theta, data.train))
    problem = Hypergradient(data, solver, shared.W)
    history = [(loss(shared.W, *data.validation), loss(shared.W, *data.test))]
    with _counter(quiet, steps) as count:

        def each(theta: Floats) -> None:
            W = problem.weights = fit(problem.weights, theta, data.train)
            history.append((loss(W, *data.validation), loss(W, *data.test)))
            count(f"validation loss {history[-1][0]:.4f}")

        theta = tune(problem, np.arange(p), theta, steps, each)
    tuned = Model(theta, fit(problem.weights, theta, data.train))
    error = check_gradient(data, solver, *tuned, progress)
    checks = problem.cost, error, certify(data, solver, tuned)
    return Outcome(data, solver, shared, tuned, np.array(history), *checks, time.perf_counter() - began)


def table(outcome: Outcome) -> str:
    """Return what came out as aligned lines."""
    data, cost = outcome.data, outcome.cost
    models = (outcome.shared, outcome.tuned)
    rows = [("", "shared penalty", "per feature", "change")]
    for label, part in (("validation loss", data.validation), ("test loss", data.test)):
        a, b = (loss(m.W, *part) for m in models)
        rows.append((label, f"{a:.4f}", f"{b:.4f}", f"{100 * (b / a - 1):+.1f} %"))
    a, b = (100 * float(np.mean((data.test.X @ m.W).argmax(1) == data.test.Y.argmax(1))) for m in models)
    rows.append(("test accuracy", f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f} points"))
    shared, low, high = np.exp([models[0].theta[0], models[1].theta.min(), models[1].theta.max()])
    note = " (bound)" if models[0].theta[0] in BOUNDS else ""
    rows.append(("penalty", f"{shared:.3g}{note}", f"{low:.3g} to {high:.3g}", ""))
    lines = [f"{a:<16}{b:>16}{c:>18}{d:>16}".rstrip() for a, b, c, d in rows]
    start = "each starting from the one before" if cost.iterations else "each with a factorisation of its own"
    facts = {
        "adjoint solver": cost.solver,
        "adjoint solves": f"{cost.solves}, {start}",
        "iterations": f"{cost.iterations}",
        "matvecs": f"{cost.matvecs}",
        "seconds": f"{cost.seconds:.2f} for the adjoint solves, {outcome.seconds:.1f} for the whole demo",
        "gradient check": f"relative error {outcome.gradient_error:.1e} along {DIRECTIONS} directions, "
        "against central differences of the re-solved problem",
        "certificate": f"relative error {outcome.certificate.relative:.1e} by the library's own estimate, "
        f"{'trusted' if outcome.certificate.trusted else 'not trusted'}, for {outcome.certificate.products} products",
    }
    return "\n".join(
        [str(data), "", *lines, "", verdict(outcome), ""] + [f"{name:<16}{text}" for name, text in facts.items()]
    )


def verdict(outcome: Outcome) -> str:
    """Say whether the test loss really fell: its paired change over the samples, against the standard error."""
    test = outcome.data.test
    change = losses(outcome.tuned.W, *test) - losses(outcome.shared.W, *test)
    mean, error = float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))
    if error == 0:
        return "The test loss did not change." if mean == 0 else f"The test loss changed by {mean:+.4f}."
    size = f"by {abs(mean):.4f}, {abs(mean) / error:.1f} standard errors"
    if abs(mean) <= 2 * error:
        return f"The test loss {'rose' if mean > 0 else 'fell'} {size}: too little to tell from chance."
    if mean < 0:
        return f"The test loss fell {size}: penalties of their own help on samples never used for tuning."
    return f"The test loss rose {size}: {len(outcome.tuned.theta)} penalties were fitted to the validation set's noise."
