"""Solutions that are not exact: solvers stopped early, and y* perturbed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import autograd
import numpy as np
import scipy.optimize

from zoo.problem import Problem, Vector

Stops = Callable[[Problem], Iterator[tuple[str, Vector]]]
SIZES = (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
"""‖ŷ − y*‖ / ‖y*‖ of the perturbed solutions."""
DIRECTIONS = ("random", "slowest", "descent")


def directions(problem: Problem) -> dict[str, Vector]:
    """Unit vectors: random, the smallest singular direction of A, and what gradient descent has not yet reduced."""
    A = problem.matrices(problem.x)[0]
    _, sigma, V = np.linalg.svd(A)
    start = np.random.default_rng(7).normal(size=len(sigma))
    left = V.T @ ((1 - (sigma / sigma[0]) ** 2) ** 30 * (V @ start))
    found = {"random": start, "slowest": V[-1], "descent": left}
    return {name: d[: problem.n] / np.linalg.norm(d[: problem.n]) for name, d in found.items()}


def perturbed(problem: Problem) -> Iterator[tuple[str, Vector]]:
    """Solutions that are off by a known distance, in directions that flatter an estimate and in those that do not."""
    for name, d in directions(problem).items():
        for size in SIZES:
            yield f"{name} {size:g}", problem.admit(problem.y, size * np.linalg.norm(problem.y) * d)


def stopped(problem: Problem) -> Iterator[tuple[str, Vector]]:
    """Where real solvers were stopped, of those within 100 % of y* and not already there to ten digits."""
    for how, y in problem.stops(problem):
        off = np.linalg.norm(y - problem.y) / np.linalg.norm(problem.y)
        if 1e-10 < off < 1:
            yield how, y


def inexact(problem: Problem) -> Iterator[tuple[str, Vector]]:
    """All of them."""
    yield from perturbed(problem)
    yield from stopped(problem)


# -- solvers ---------------------------------------------------------------------------------------------------------
def minimize(f: Callable[[Vector], Any], y: Vector, method: str, **options: Any) -> Vector:
    """SciPy's `minimize`, quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scipy.optimize.minimize(
            autograd.value_and_grad(f), y, jac=True, method=method,
            **({"hessp": autograd.hessian_vector_product(f)} if method == "Newton-CG" else {}), **options,
        ).x  # fmt: skip


def descended(f: Callable[[Vector], Any], y: Vector, rate: float, steps: Iterable[int]) -> Iterator[tuple[int, Vector]]:
    """Gradient descent that halves its rate where f does not fall."""
    gradient, value, done = autograd.grad(f), f(y), 0
    for step in steps:
        for _ in range(step - done):
            g = gradient(y)
            while not f(y - rate * g) <= value:
                rate /= 2
                if rate < 1e-12:
                    return
            y = y - rate * g
            value = f(y)
        done = step
        yield step, y


def stopped_minimizers(objective: Callable[..., Any], y0: Vector) -> Stops:
    """L-BFGS, Newton-CG and gradient descent."""

    def stops(problem: Problem) -> Iterator[tuple[str, Vector]]:
        f = lambda y: objective(y, problem.t, *problem.args)
        for steps in (4, 8, 16):
            yield f"L-BFGS {steps}", minimize(f, y0, "L-BFGS-B", options={"maxiter": steps})
        for steps in (2, 4, 6):
            yield f"Newton-CG {steps}", minimize(f, y0, "Newton-CG", options={"maxiter": steps})
        rate = 1 / np.linalg.norm(problem.matrices(problem.x)[0], 2)
        for steps, y in descended(f, y0, rate, (30, 100, 300)):
            yield f"descent {steps}", y

    return stops


def stopped_roots(y0: Vector) -> Stops:
    """SciPy's `root` with loose tolerances."""

    def stops(problem: Problem) -> Iterator[tuple[str, Vector]]:
        F = lambda y: problem.residual(y, problem.t, *problem.args)
        for method, options in (("hybr", {"xtol": 0.3}), ("hybr", {"xtol": 1e-2}), ("krylov", {"maxiter": 2}),
                                ("krylov", {"maxiter": 4}), ("lm", {"xtol": 0.1, "ftol": 0.1}),
                                ("df-sane", {"maxfev": 60})):  # fmt: skip
            with (
                warnings.catch_warnings(),
                contextlib.suppress(scipy.optimize.NoConvergence),
                np.errstate(all="ignore"),
            ):
                warnings.simplefilter("ignore")
                yield f"{method} {options}", scipy.optimize.root(F, y0, method=method, options=options).x

    return stops


def iterated(step: Callable[..., Any], y0: Vector, at: Iterable[int]) -> Stops:
    """Plain iterations y ← step(y, θ)."""

    def stops(problem: Problem) -> Iterator[tuple[str, Vector]]:
        y, done = y0, 0
        for k in at:
            for _ in range(k - done):
                y = step(y, problem.t, *problem.args)
            done = k
            yield f"{k} iterations", y

    return stops


def stopped_slsqp(
    objective: Callable[..., Any], y0: Vector, constraints: Callable[[Problem], Any], at: Iterable[int]
) -> Stops:
    """SLSQP after some iterations."""

    def stops(problem: Problem) -> Iterator[tuple[str, Vector]]:
        f = lambda y: objective(y, problem.t, *problem.args)
        for steps in at:
            yield (
                f"SLSQP {steps}",
                minimize(f, y0, "SLSQP", constraints=constraints(problem), options={"maxiter": steps}),
            )

    return stops
