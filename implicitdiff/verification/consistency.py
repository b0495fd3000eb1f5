"""What the user gives of derivatives, held against its function where nothing can be told: inside a compiled program.

`verification` runs outside of programs, looks at steps until one settles a question, and names the callable. Here there
are arrays only, in every call: one step along y and one along θ, two evaluations of G each, beside G at the point. What
a kink or noise adds to the difference shows in the second difference; only what is wrong by far more than that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array, quotient
from implicitdiff.conditions.base import Checked
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.tolerances import MISTAKE_TRACED, STEP_TRACED
from implicitdiff.verification.probes import draw
from implicitdiff.verification.trials import function_of

__all__ = ["contradicted"]


def contradicted(checked: Checked | None) -> Array | None:
    """Items in which what was given is not the derivative of G; None where that cannot be looked at."""
    function = None if checked is None else function_of(checked)
    if checked is None or function is None or not checked.point.y.n or is_tree_vector(checked.point.y.vector):
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
    u = _dual(checked, rows)
    rounding = 30 * float(xp.finfo(y.dtype).eps) / h * xp.vecdot(xp.abs(u), rows + xp.abs(middle))
    wrong = xp.vecdot(u, u) < 0
    for (change, bend), number in _numbers(checked, u, z, t, by_y, by_theta):
        seen, unknown = xp.vecdot(u, change), rounding + 10 * xp.vecdot(xp.abs(u), bend)
        wrong = wrong | (xp.abs(number - seen) > MISTAKE_TRACED * xp.maximum(xp.abs(number), xp.abs(seen)) + unknown)
    return wrong


def _dual(checked: Checked, rows: Array) -> Array:
    """A vector without structure in the units of 1/G, up to a common factor."""
    xp, y = checked.point.backend.xp, checked.point.y.vector
    s = draw(xp, y, 2)
    if checked.symmetric:  # y_i G_i has the unit of f
        return s * xp.abs(y)
    rows = xp.abs(y) if checked.solved == 1 else rows  # T has the units of y
    usable = (rows > 0) & xp.isfinite(rows)
    return quotient(xp, s, rows, usable)


def _numbers(checked: Checked, u: Array, z: Array, t: Array, by_y: Any, by_theta: Any) -> list[tuple[Any, Array]]:
    """Each product that was given, as a number, with the changes of G that it has to give."""
    dot: Callable[[Array, Array], Array] = checked.point.backend.xp.vecdot
    c, found = checked, []
    for product in (None if c.matrix[1] is None else c.matrix[1].forward, c.forward[1]):
        if product is not None:
            found.append((by_y, dot(u, product(z))))
    if c.adjoint[1] is not None:
        found.append((by_y, dot(c.adjoint[1](u), z)))
    if c.point.theta.n and c.mixed_jvp is not None:
        found.append((by_theta, dot(u, c.mixed_jvp(t))))
    if c.point.theta.n and c.mixed_vjp is not None:
        found.append((by_theta, dot(c.mixed_vjp(u), t)))
    return found
