"""What the user gives of derivatives, held against its function where nothing can be told: inside a compiled program.

`verification` runs outside of programs, looks at steps until one settles a question, and names the callable. Here there
are arrays only, in every call: one step along y and one along θ, two evaluations of G each, beside G at the point. What
a kink or noise adds to the difference shows in the second difference; only what is wrong by far more than that counts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

from implicitdiff.arrays import Array, quotient
from implicitdiff.conditions.base import Checked
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.tolerances import MISTAKE_TRACED, STEP_TRACED
from implicitdiff.verification.probes import draw
from implicitdiff.verification.trials import function_of

__all__ = ["contradicted"]


def contradicted(checked: Iterable[Checked]) -> Array | None:
    """Items in which what was given is not the derivative of its function; None where that cannot be looked at."""
    found = [wrong for c in checked if (wrong := _contradicted(c)) is not None]
    return None if not found else functools.reduce(operator.or_, found)


def _contradicted(checked: Checked) -> Array | None:
    function = function_of(checked)
    if function is None or not checked.point.y.n or is_tree_vector(checked.point.y.vector):
        return None
    backend = checked.point.backend
    y, theta = (backend.detached(raveler.vector) for raveler in (checked.point.y, checked.point.theta))
    xp = backend.xp
    h = STEP_TRACED.at(xp, y.dtype)
    z, t = draw(xp, y, 0) * xp.abs(y), draw(xp, theta, 1) * xp.abs(theta)  # in the units of y and θ: a zero stays
    middle = function(y, theta)

    def along(dy: Array | float, dt: Array | float) -> tuple[Array, Array]:
        above, below = function(y + h * dy, theta + h * dt), function(y - h * dy, theta - h * dt)
        return (above - below) / (2 * h), xp.abs(above - 2 * middle + below) / h

    by_y = along(z, 0.0)
    by_theta = along(0.0, t) if checked.point.theta.n else (0 * middle, 0 * middle)
    rows = xp.abs(by_y[0]) + xp.abs(by_theta[0])
    shift = z if checked.solved == 1 else 0 * by_y[0]  # of F = y − T
    duals = [_dual(checked, rows, change) for change in (by_y[0] - shift, by_theta[0])]
    wrong = xp.vecdot(z, z) < 0
    for u, (change, bend), number, less in _numbers(checked, duals, z, t, shift, by_y, by_theta):
        seen, unknown = xp.vecdot(u, change), 10 * xp.vecdot(xp.abs(u), bend)
        unknown = unknown + 30 * float(xp.finfo(y.dtype).eps) / h * xp.vecdot(xp.abs(u), rows + xp.abs(middle))
        size, rest = (xp.maximum(xp.abs(number - x), xp.abs(seen - x)) for x in (0.0, xp.vecdot(u, less)))
        wrong = wrong | (xp.abs(number - seen) > MISTAKE_TRACED * xp.minimum(size, rest) + unknown)
    return wrong


def _dual(checked: Checked, rows: Array, change: Array) -> Array:
    """A vector in the units of 1/G, up to a common factor, on which no two parts of a change cancel each other."""
    xp, y = checked.point.backend.xp, checked.point.y.vector
    s = xp.abs(draw(xp, change, 2))
    s = xp.where(change < 0, -s, s)
    if checked.symmetric:  # y_i G_i has the unit of f
        return s * xp.abs(y)
    rows = xp.abs(y) if checked.solved == 1 else rows  # T has the units of y
    usable = (rows > 0) & xp.isfinite(rows)
    return quotient(xp, s, rows, usable)


def _numbers(
    checked: Checked, duals: list[Array], z: Array, t: Array, shift: Array, by_y: Any, by_theta: Any
) -> list[tuple[Array, Any, Array, Array]]:
    """Each product that was given, as a number: u, the changes of G that it has to give, it, and what F has beside."""
    dot: Callable[[Array, Array], Array] = checked.point.backend.xp.vecdot
    c, found, (u, w), none = checked, [], duals, 0 * shift
    for product in (None if c.matrix[1] is None else c.matrix[1].forward, c.forward[1]):
        if product is not None:
            found.append((u, by_y, dot(u, product(z)), shift))
    if c.adjoint[1] is not None:
        found.append((u, by_y, dot(c.adjoint[1](u), z), shift))
    if c.point.theta.n and c.mixed_jvp is not None:
        found.append((w, by_theta, dot(w, c.mixed_jvp(t)), none))
    if c.point.theta.n and c.mixed_vjp is not None:
        found.append((w, by_theta, dot(c.mixed_vjp(w), t), none))
    return found
