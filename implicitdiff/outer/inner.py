"""Solvers of the inner problem that go on from a y: Newton-CG, L-BFGS, gradient descent, and the user's own.

L-BFGS and gradient descent see F alone. A step is halved where F at its end points back along it: past the minimum on
the line by more than it was short of it before.

References
----------
J. Nocedal, "Updating quasi-Newton matrices with limited storage", Math. Comp. 35 (1980) 773-782. DOI 10.2307/2006193
J. Barzilai, J. M. Borwein, "Two-point step size gradient methods", IMA J. Numer. Anal. 8 (1988) 141-148.
DOI 10.1093/imanum/8.1.141
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor
from implicitdiff.errors import CallbackError, InputError, UnknownNameError
from implicitdiff.outer.equations import Equations
from implicitdiff.outer.sweeps import Corrected, newton
from implicitdiff.tolerances import EASED, OVERSHOT, SMALLEST_STEP

__all__ = ["INNER", "Inner", "inner_of", "newton_cg"]

Inner = Callable[[Equations, Corrected, Array, Any], Corrected]
"""Lowers ‖F‖ to a tolerance, or as far as it gets."""
PAIRS = 10
"""Steps that L-BFGS remembers."""
MOST_NEWTON, MOST_STEPS = 50, 5000
"""Most steps of one inner solve."""
FORCING = 0.1
"""Relative residual of a Newton step."""


def newton_cg(equations: Equations, s: Corrected, theta: Array, tolerance: Any) -> Corrected:
    """Newton steps, each solved to a digit, until ‖F‖ is at the tolerance or falls no more."""
    xp = equations.backend.xp

    def body(found: tuple[Corrected, Array]) -> tuple[Corrected, Array]:
        s, count = found
        after = newton(equations, s, theta, FORCING)
        more = after.damping > s.damping  # then the next one is made otherwise
        damping = xp.where(more, after.damping, EASED * after.damping)
        return after._replace(usable=s.usable & (after.usable | more), damping=damping), count + 1

    def going(found: tuple[Corrected, Array]) -> Array:
        s, count = found
        return ~(s.size <= tolerance) & s.usable & (count < MOST_NEWTON)

    return equations.backend.while_loop(going, body, (s, equations.count(0)))[0]


class _Descent(NamedTuple):
    y: Array
    F: Array
    size: Array
    steps: Array
    """Differences of y, newest first, (memory, n)."""
    turns: Array
    """Of F."""
    count: Array
    gradients: Array
    stuck: Array


def _descend(equations: Equations, s: Corrected, theta: Array, tolerance: Any, memory: int) -> Corrected:
    """Descend along −H F, with H of the latest differences (of one: Barzilai and Borwein's step)."""
    backend, xp = equations.backend, equations.backend.xp
    space = backend.space(s.y)
    none = xp.zeros((max(memory, 1), *s.y.shape), dtype=s.y.dtype, device=equations.y.device)
    first = _Descent(s.y, s.F, s.size, none, none, equations.count(0), equations.count(0), ~(s.size == s.size))

    def body(d: _Descent) -> _Descent:
        direction = -_times_inverse(xp, d, memory)
        first = d.count == 0
        unit = divisor(xp, space.size(d.y))  # the first step is as long as y
        direction = xp.where(first, -d.F * unit / divisor(xp, d.size), direction)
        slope = xp.vecdot(d.F, direction)

        def there(t: Array) -> tuple[Array, Array, Array]:
            y = backend.detached(d.y + t * direction)
            F = equations.at(y, theta).residual()
            return y, F, xp.vecdot(F, direction)

        def past(found: Any) -> Any:
            t, (_, _, after), _ = found
            return ~(after <= OVERSHOT * xp.abs(slope)) & (t > SMALLEST_STEP**2)

        one = equations.number(1.0)
        start = one, there(one), equations.count(1)
        _, (y, F, _), count = backend.while_loop(past, lambda f: (f[0] / 4, there(f[0] / 4), f[2] + 1), start)
        steps = xp.concat([(y - d.y)[None, ...], d.steps[:-1, ...]], axis=0)
        turns = xp.concat([(F - d.F)[None, ...], d.turns[:-1, ...]], axis=0)
        stuck = ~xp.all(xp.isfinite(F)) | ~(slope < 0) | xp.all(y == d.y)
        return _Descent(y, F, space.size(F), steps, turns, d.count + 1, d.gradients + count, stuck)

    end = backend.while_loop(lambda d: ~(d.size <= tolerance) & ~d.stuck & (d.count < MOST_STEPS), body, first)
    better = end.size <= s.size
    select = backend.space(s.y).select
    return s._replace(
        y=select(better, end.y, s.y), F=select(better, end.F, s.F), size=xp.where(better, end.size, s.size),
        gradients=s.gradients + end.gradients, usable=s.usable & (end.size <= tolerance),
    )  # fmt: skip


def _times_inverse(xp: Any, d: _Descent, memory: int) -> Array:
    """H F by the two loops over the pairs; a pair of no curvature is left out."""
    curvature = xp.vecdot(d.steps, d.turns)
    good = curvature > 0
    rho = xp.where(good, 1 / divisor(xp, curvature), xp.zeros_like(curvature))
    square = xp.vecdot(d.turns[0, ...], d.turns[0, ...])
    gamma = xp.where(good[0], curvature[0] / divisor(xp, square), xp.ones_like(square))
    if memory == 0:
        return gamma * d.F
    q, weights = d.F, []
    for i in range(memory):
        weights.append(rho[i] * xp.vecdot(d.steps[i, ...], q))
        q = q - weights[i] * d.turns[i, ...]
    q = gamma * q
    for i in reversed(range(memory)):
        q = q + (weights[i] - rho[i] * xp.vecdot(d.turns[i, ...], q)) * d.steps[i, ...]
    return q


def lbfgs(equations: Equations, s: Corrected, theta: Array, tolerance: Any) -> Corrected:
    """Limited-memory BFGS."""
    return _descend(equations, s, theta, tolerance, PAIRS)


def gradient(equations: Equations, s: Corrected, theta: Array, tolerance: Any) -> Corrected:
    """Gradient descent with Barzilai and Borwein's steps."""
    return _descend(equations, s, theta, tolerance, 0)


INNER: dict[str, Inner] = {"newton-cg": newton_cg, "lbfgs": lbfgs, "gradient": gradient}


def inner_of(inner: Any, condition: Any, args: tuple[Any, ...]) -> Inner:
    """Return the inner solver that an argument names, or is.

    Raises
    ------
    UnknownNameError
        For a name that is none.
    InputError
        For anything else that cannot be called, or L-BFGS and gradient descent where F is no gradient.
    """
    if isinstance(inner, str):
        if inner not in INNER:
            raise UnknownNameError(f"inner = {inner!r}: expected {', '.join(INNER)}, or inner(y, theta, tolerance).")
        if inner != "newton-cg" and not hasattr(condition, "kind"):
            raise InputError(
                f"inner = {inner!r} descends along −F, and F of {type(condition).__name__} is no gradient.\n"
                "Next: inner='newton-cg', or a solver of your own, inner(y, theta, tolerance, *args) -> y."
            )
        return INNER[inner]
    if not callable(inner):
        raise InputError(f"inner is {type(inner).__name__}; expected a name or inner(y, theta, tolerance, *args) -> y.")
    return _Own(inner, args)


class _Own:
    """The user's own solver, which goes on from y; one that takes no tolerance solves as well as it does."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.how = _takes(function, len(args))

    def __call__(self, equations: Equations, s: Corrected, theta: Array, tolerance: Any) -> Corrected:
        backend, raveler = equations.backend, equations.y
        trees = raveler.unravel(backend.guard(s.y)), equations.theta.unravel(backend.guard(theta))

        def call(y: Any, theta: Any, tolerance: Any, *args: Any) -> Any:
            if self.how == "keyword":
                return self.function(y, theta, *args, tolerance=tolerance)
            return self.function(y, theta, *((tolerance,) if self.how == "third" else ()), *args)

        limit = s.size * 0 + tolerance
        limit = limit if backend.traced else float(limit)
        found = backend.black_box(call, trees[0])(*trees, limit, *self.args)
        y = backend.xp.asarray(raveler.like(found, "inner", dtype=raveler.dtype, callback=True), copy=True)
        F = equations.at(y, theta).residual()
        size = backend.space(F).size(F)
        if not backend.traced and not bool(backend.xp.isfinite(size)):
            raise CallbackError("inner returned a y where F(y, theta) is not finite.")
        return s._replace(y=backend.detached(y), F=F, size=size, gradients=s.gradients + 1)


def _takes(function: Callable[..., Any], data: int) -> str:
    """How a solver takes its tolerance: as the third argument, by name, or not at all."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "third"
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in plain]
    if "tolerance" in named[3:] or any(p.name == "tolerance" for p in parameters if p.kind is p.KEYWORD_ONLY):
        return "keyword"
    if named[2:3] == ["tolerance"] or len(named) >= 3 + data:
        return "third"
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = sum(p.default is p.empty for p in plain)
    return "third" if any_number and needed >= 3 else "none"
