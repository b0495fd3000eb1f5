"""Plane rotations, by which factorisations are brought up to date a column at a time."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array

__all__ = ["ratio", "rotation"]


def rotation(space: Any, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """c, s and r with c a + s b = r >= 0 and s a − c b = 0."""
    r = space.sqrt(a * a + b * b)
    some = r > 0
    safe = space.where(some, r, space.scalar(1.0))
    return space.where(some, a / safe, space.scalar(1.0)), b / safe, r


def ratio(space: Any, a: Array, b: Array) -> Array:
    """a / b, and zero where b is."""
    some = b != 0
    return space.where(some, a / space.where(some, b, space.scalar(1.0)), space.scalar(0.0))
