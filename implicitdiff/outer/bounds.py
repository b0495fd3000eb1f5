"""Bounds of θ, and projections onto a set of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError
from implicitdiff.ravel import Raveler

__all__ = ["bounds_of", "within"]


def bounds_of(bounds: Any, theta: Raveler) -> tuple[Array, Array] | None:
    """Return lower and upper bounds as vectors.

    Parameters
    ----------
    bounds : (low, high), scipy.optimize.Bounds or None
        Each a number, or like theta; None is no bound.

    Raises
    ------
    InputError
        Where they are none of these, or cross.
    """
    if bounds is None:
        return None
    pair = (bounds.lb, bounds.ub) if hasattr(bounds, "lb") and hasattr(bounds, "ub") else bounds
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError("bounds: expected (low, high), each a number, None, or structured like theta.")
    low, high = (_vector(side, theta, sign) for side, sign in zip(pair, (-1, 1), strict=True))
    if not theta.backend.traced and bool(theta.backend.xp.any(~(low <= high))):
        raise InputError("bounds: a lower bound is above its upper bound, or NaN.")
    return low, high


def _vector(side: Any, theta: Raveler, sign: int) -> Array:
    xp, like = theta.backend.xp, theta.vector
    if side is None:
        return xp.full_like(like, sign * float("inf"))
    if isinstance(side, (int, float)) or getattr(side, "shape", None) == ():
        return xp.full_like(like, float(side))
    if type(side).__module__ == "numpy" and theta.backend.name != "numpy":
        side = xp.asarray(side.tolist(), dtype=theta.dtype, device=theta.device)
    return theta.like(side, "bounds", dtype=theta.dtype)


def within(
    theta: Array, raveler: Raveler, bounds: tuple[Array, Array] | None, project: Callable[[Any], Any] | None
) -> Array:
    """Return θ in its bounds, and projected."""
    xp = raveler.backend.xp
    if bounds is not None:
        theta = xp.minimum(xp.maximum(theta, bounds[0]), bounds[1])
    if project is not None:
        found = project(raveler.unravel(raveler.backend.guard(theta)))
        theta = xp.asarray(raveler.like(found, "project", dtype=raveler.dtype, callback=True), copy=True)
    return raveler.backend.detached(theta)
