"""The right-hand side in its own unit, and one step from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.outcome import Counts, Status

__all__ = ["one_step", "unit_of"]


def unit_of(space: Any, b: Array) -> tuple[Callable[[], Array], Array]:
    """Return a function that makes b / ‖b‖ anew (it is not kept: one vector less), and ‖b‖."""
    one = space.scalar(1.0)
    largest = space.largest(b)
    largest = space.where((largest > 0) & space.isfinite(largest), largest, one)
    root = 1 / space.sqrt(largest)  # twice its root, since 1 / 1e-308 may overflow

    def scaled() -> Array:
        return space.scale(root, space.scale(root, space.copy(b)))

    norm = space.norm(scaled())
    safe = space.where(norm > 0, norm, one)

    def unit() -> Array:
        return space.scale(1 / safe, scaled())

    return unit, norm * largest


def one_step(state: Any, b: Array) -> tuple[Array, Any, Counts]:
    """One step of minimal residual: what a compiled program that cannot branch can afford, in time and in size."""
    backend = state.operator.backend
    scaling, precondition = state.scaling, state.preconditioner
    right = b if scaling is None else scaling.scaled(b)
    space = backend.space(right)
    unit, scale = unit_of(space, right)
    r = unit()
    z = r if precondition.identity else precondition(r)
    image = state.operator.matvec(z)
    square = space.inner(image, image)
    alpha = space.inner(image, r) / space.where(square > 0, square, space.scalar(1.0))
    x = space.scale(scale * alpha, space.copy(z))
    x = x if scaling is None else scaling.restored(x)
    return x, space.where(space.finite(x), int(Status.APPROXIMATE), int(Status.NON_FINITE)), Counts(matvecs=1)
