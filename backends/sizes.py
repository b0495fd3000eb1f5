"""Sizes of coordinates and of the leaves that they stand in."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array, divisor

__all__ = ["leaf_sizes", "sizes_of"]


def leaf_sizes(function: Any, name: str, n: int) -> tuple[int, ...]:
    """Lengths of the leaves of y or of theta, where the function knows of them."""
    point = getattr(function, "point", None)
    leaves = tuple(leaf.size for leaf in getattr(getattr(point, name, None), "leaves", ()))
    return leaves if sum(leaves) == n else (n,)


def sizes_of(xp: Any, x: Array, leaves: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Size of each coordinate, that of its leaf, and whether the leaf is all zero."""
    one = xp.ones_like(x)
    if not x.shape[-1]:
        return one, one, one > 0
    size = xp.abs(x)
    size = xp.where(xp.isfinite(size), size, 0 * one)  # an infinite bound has no size, and no step moves it
    whole = xp.max(size, axis=-1, keepdims=True)
    whole = divisor(xp, whole)
    parts, start = [], 0
    for n in leaves:
        if n:
            largest = xp.max(size[..., start : start + n], axis=-1, keepdims=True)
            parts.append(xp.broadcast_to(largest, (*x.shape[:-1], n)))
        start += n
    leaf = xp.concat(parts, axis=-1)
    unknown = leaf == 0
    leaf = xp.where(unknown, whole, leaf)
    return xp.where(size > 0, size, leaf), leaf, unknown
