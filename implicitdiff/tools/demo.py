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
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from implicitdiff import (
    Bilevel,
    BilevelResult,
    BilevelState,
    ErrorEstimate,
    Fixed,
    Report,
    Stationary,
    bilevel,
    implicit_grad,
)
from implicitdiff.tools.demo_problem import (
    CONDITION,
    DATASETS,
    Data,
    Floats,
    Model,
    Split,
    fit,
    grad,
    hvp,
    load,
    loss,
    loss_grad,
    losses,
    missing,
    mixed_vjp,
    softmax,
)

__all__ = ["BOUNDS", "DATASETS", "Outcome", "Split", "missing", "run", "softmax", "table"]

Progress = Callable[..., Any]  # tqdm, with its options

BOUNDS = (float(np.log(1e-3)), float(np.log(10.0)))
"""Log-penalties from weak to nearly switched off; the same for both models. The lower end matters: from 1e-4 on, the
penalties per feature can follow the noise of the validation set, and the test loss tells."""
GRID = 13
DIRECTIONS = 8
RATE = 0.4
"""Of Adam: in 20 steps log-penalties can go from one bound to the other."""


# -- outer problem -------------------------------------------------------------------------------------
def tune(
    data: Data, solver: Any, groups: NDArray[np.intp], start: Floats, W: Floats, **options: Any
) -> BilevelResult:  # fmt: skip
    """Minimise the validation loss over θ = z[groups], from z = start."""
    condition = Stationary(
        grad=lambda W, z, X, Y: grad(W, z[groups], X, Y),
        hvp=lambda W, z, V, X, Y: hvp(W, z[groups], V, X, Y),
        mixed_vjp=lambda W, z, U, X, Y: np.bincount(groups, mixed_vjp(W, z[groups], U, X, Y), len(z)),
    )
    return bilevel(condition, outer_of(data), W, start, args=data.train, bounds=BOUNDS, solver=solver, **options)


def outer_of(data: Data) -> tuple[Callable[..., float], Callable[..., tuple[Floats, None]]]:
    """Return the validation loss, and its gradient in the weights; it has none in the penalties."""
    return lambda W, z: loss(W, *data.validation), lambda W, z: (loss_grad(W, *data.validation), None)


def by_itself(data: Data, solver: Any, thetas: list[Floats]) -> tuple[float, float]:
    """Inner gradients and products that one gradient takes, from zero, to 1e-8: the mean over some penalties."""
    loop = Bilevel(CONDITION, outer_of(data), args=data.train, tolerance=Fixed(1e-8), solver=solver)
    W = np.zeros((len(data.features) + 1, data.train.Y.shape[1]))
    states = [loop.step(loop.init(W, theta)) for theta in thetas]
    gradients, products = ([float(getattr(s, name)) for s in states] for name in ("inner_gradients", "products"))
    return float(np.mean(gradients)), float(np.mean(products))


def shared_penalty(data: Data, solver: Any, progress: Progress) -> Floats:
    """Tune one penalty for all features on the same validation set: the best of a grid, refined by hypergradients."""
    p = len(data.features)
    W, tried = np.zeros((p + 1, data.train.Y.shape[1])), []
    for value in progress(np.linspace(BOUNDS[1], BOUNDS[0], GRID), desc="shared penalty", unit="fit"):
        W = fit(W, np.full(p, value), data.train)
        tried.append((loss(W, *data.validation), value, W))
    _, value, W = min(tried, key=lambda t: t[0])
    groups = np.zeros(p, dtype=np.intp)
    return tune(data, solver, groups, np.array([value]), W, steps=50, optimizer="L-BFGS-B").theta[groups]


def check_gradient(
    data: Data, solver: Any, theta: Floats, W: Floats, progress: Progress, h: float = 1e-3
) -> float:  # fmt: skip
    """Relative error of the hypergradient along random directions, against differences of the re-solved problem."""
    gradient = hypergradient(data, solver, Model(theta, fit(W, theta, data.train)))[0]
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, len(theta)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def value(moved: Floats) -> float:
        return loss(fit(W, moved, data.train), *data.validation)

    bar = progress(directions, desc="gradient check", unit="direction")
    differences = np.array([(value(theta + h * d) - value(theta - h * d)) / (2 * h) for d in bar])
    return float(np.linalg.norm(directions @ gradient - differences) / np.linalg.norm(differences))


def hypergradient(data: Data, solver: Any, model: Model) -> tuple[Floats, Report]:
    """The gradient of the validation loss, and its report with an estimate of its error."""
    options: Any = {"args": data.train, "solver": solver, "error": True, "return_report": True}
    return implicit_grad(CONDITION, loss_grad(model.W, *data.validation), model.W, model.theta, **options)


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
    loop: BilevelResult
    alone: tuple[float, float]
    """Inner gradients and products of one gradient by itself."""
    gradient_error: float
    report: Report
    """Of the gradient at the end, with its estimated error."""
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
    history, thetas, W = [(loss(shared.W, *data.validation), loss(shared.W, *data.test))], [theta], shared.W
    with _counter(quiet, steps) as count:

        def each(state: BilevelState) -> None:
            nonlocal W
            W = fit(W, state.theta, data.train)
            thetas.append(state.theta)
            history.append((loss(W, *data.validation), loss(W, *data.test)))
            count(f"validation loss {history[-1][0]:.4f}")

        loop = tune(data, solver, np.arange(p), theta, shared.W, steps=steps, callback=each, learning_rate=RATE)
    tuned = Model(loop.theta, fit(loop.y, loop.theta, data.train))
    error = check_gradient(data, solver, *tuned, progress)
    checks = by_itself(data, solver, thetas), error, hypergradient(data, solver, tuned)[1]
    return Outcome(data, solver, shared, tuned, np.array(history), loop, *checks, time.perf_counter() - began)


def table(outcome: Outcome) -> str:
    """Return what came out as aligned lines."""
    data, certificate = outcome.data, cast("ErrorEstimate", outcome.report.error)
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
    rounds, spent = len(outcome.loop.history), (outcome.loop.state.inner_gradients, outcome.loop.state.products)
    one = f"{outcome.alone[0]:.0f} and {outcome.alone[1]:.0f}"
    facts = {
        "adjoint solver": f"{outcome.report.solver} ({outcome.report.reason})",
        "outer loop": f"{rounds} steps of Adam by bilevel, for {spent[0]} inner gradients and {spent[1]} products; "
        f"estimated error of a gradient up to {max(row.error for row in outcome.loop.history):.0%}",
        "saved": f"{1 - sum(spent) / (rounds * sum(outcome.alone)):.0%}: a gradient by itself, to 1e-8, takes {one}",
        "seconds": f"{sum(row.seconds for row in outcome.loop.history):.2f} for the outer loop, "
        f"{outcome.seconds:.1f} for the whole demo",
        "gradient check": f"relative error {outcome.gradient_error:.1e} along {DIRECTIONS} directions, "
        "against central differences of the re-solved problem",
        "certificate": f"relative error {certificate.relative:.1e} by the library's own estimate, "
        f"{'trusted' if certificate.trusted else 'not trusted'}, for {certificate.products} products",
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
