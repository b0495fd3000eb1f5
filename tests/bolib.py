"""Ten bilevel problems with known optima, of the collection BOLIB.

S. Zhou, A. B. Zemkoho, A. Tin, "BOLIB: Bilevel optimization library of test problems", 2018. arXiv:1812.00230

Minimise F(x, y) over x with G(x) >= 0, where y minimises f(x, y) with g(x, y) >= 0; every lower problem is strongly
convex in y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

Array = Any


class Problem(NamedTuple):
    """One problem; functions take x, then y."""

    name: str
    F: Callable[[Array, Array], Any]
    f: Callable[[Array, Array], Any]
    G: Callable[[Array], list[Any]] | None
    g: Callable[[Array, Array], list[Any]] | None
    x: tuple[float, ...]
    y: tuple[float, ...]
    optimum: float
    feasible: tuple[float, float] | None = None
    """Of x, where the lower problem has a solution, where that is not all of G."""


def nearest(x: Array, y: Array) -> Any:
    """Squared distance of two points of the plane."""
    return (x[0] - y[0]) ** 2 + (x[1] - y[1]) ** 2


def box(x: Array, y: Array) -> list[Any]:
    """y from a half to three halves."""
    return [y[0] - 0.5, y[1] - 0.5, 1.5 - y[0], 1.5 - y[1]]


PROBLEMS = (
    Problem(
        "ClarkWesterberg1990a", lambda x, y: (x[0] - 3) ** 2 + (y[0] - 2) ** 2, lambda x, y: (y[0] - 5) ** 2,
        lambda x: [8 - x[0], x[0]],
        lambda x, y: [2 * x[0] - y[0] + 1, -x[0] + 2 * y[0] - 2, -x[0] - 2 * y[0] + 14], (1,), (1,), 5.0,
    ),
    Problem(  # from the collection's start, x = 4, to a local optimum: 25 at x = 5; at x = 1 there is one y
        "Colson2002BIPA2", lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2,
        lambda x, y: x[0] ** 3 - 1.5 * x[0] * y[0] + (y[0] - 1) ** 2, lambda x: [x[0]],
        lambda x, y: [3 * x[0] - y[0] - 3, -x[0] + y[0] / 2 + 4, -x[0] - y[0] + 7, y[0]],
        (2,), (0,), 17.0, (1 + 1e-5, 5.0),
    ),
    Problem(
        "DeSilva1978", lambda x, y: y[0] ** 2 + y[1] ** 2 + (x[0] - 1) ** 2 + (x[1] - 1) ** 2 - 2, nearest,
        None, box, (0, 0), (1, 1), -1.0,
    ),
    Problem(  # the collection's -2.1962 is not optimal
        "FalkLiu1995", lambda x, y: y[0] ** 2 + y[1] ** 2 + (x[0] - 1.5) ** 2 + (x[1] - 1.5) ** 2 - 4.5, nearest,
        None, box, (0, 0), (1, 1), -2.25 ,
    ),
    Problem(
        "HendersonQuandt1958", lambda x, y: x[0] * (x[0] / 2 + y[0] / 2 - 95),
        lambda x, y: y[0] * (x[0] / 2 + y[0] - 100), lambda x: [200 - x[0], x[0]], lambda x, y: [y[0]],
        (0,), (0,), -3266.666667,
    ),
    Problem(
        "MacalHurter1997", lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
        lambda x, y: -50 * x[0] * y[0] + y[0] ** 2 / 2 + 500 * y[0], None, None, (1,), (1,), 81.327869,
    ),
    Problem(
        "MuuQuy2003Ex1", lambda x, y: x[0] ** 2 - 4 * x[0] + y[0] ** 2 + y[1] ** 2,
        lambda x, y: y[0] ** 2 + y[0] * y[1] - y[0] * (3 * x[0] - 1) + y[1] ** 2 / 2 + y[1] * (x[0] + 1),
        lambda x: [x[0], 2 - x[0]], lambda x, y: [2 * x[0] - 2 * y[0] - y[1] + 1, y[0], y[1]],
        (1,), (0, 0), -2.0769231,
    ),
    Problem(
        "ShimizuAiyoshi1981Ex2", lambda x, y: -20 * y[0] + 20 * y[1] + (x[0] - 30) ** 2 + (x[1] - 20) ** 2, nearest,
        lambda x: [x[0] + 2 * x[1] - 30, -x[0] - x[1] + 25, 15 - x[1]],
        lambda x, y: [10 - y[0], 10 - y[1], y[0], y[1]], (1, 1), (1, 1), 225.0,
    ),
    Problem(
        "LamparielloSagratella2017Ex32", lambda x, y: x[0] ** 2 + y[0] ** 2, lambda x, y: (x[0] + y[0] - 1) ** 2,
        None, None, (1,), (1,), 0.5,
    ),
    Problem(
        "Yezza1996Ex41", lambda x, y: (y[0] - 2) ** 2 / 2 + (-x[0] + y[0] + 2) ** 2 / 2,
        lambda x, y: x[0] + y[0] ** 2 / 2 - y[0], None, lambda x, y: [y[0], x[0] - y[0]], (-1,), (-1,), 0.5,
    ),
)  # fmt: skip


def solve(problem: Problem, x: Array, y: Array) -> Array:
    """The lower problem by SciPy, from y; its solution from rounding onto the constraints that it touches."""
    options = {"ftol": 1e-15, "maxiter": 200}
    constraints = [] if problem.g is None else [{"type": "ineq", "fun": lambda y: np.array(problem.g(x, y))}]
    return scipy.optimize.minimize(
        lambda y: problem.f(x, y), y, method="SLSQP", constraints=constraints, options=options
    ).x
