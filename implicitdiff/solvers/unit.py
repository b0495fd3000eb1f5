"""One step of minimal residual, from the right-hand side in its own unit."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.cycles import unit_of

__all__ = ["one_step"]


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
