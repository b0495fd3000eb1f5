"""Kinks of a projection or proximal operator: at a point, and between two points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Observations
from implicitdiff.conditions.metric import Metric
from implicitdiff.conditions.point import Point
from implicitdiff.linalg.operator import Operator

__all__ = ["Choices", "kinks"]


@dataclass(frozen=True, eq=False, repr=False)
class Choices:
    """What the form of the system depends on: the step, and where P is bent.

    Parameters
    ----------
    metric : Metric
    D : Operator
        ∂P/∂x.
    """

    metric: Metric
    D: Operator

    def changed(self, D: Operator) -> Array:
        """Where ∂P/∂x jumps between two points: the support, or what is active, is another."""
        space = D.backend.space(self.metric.point.y.vector)
        probe = space.probe()
        jump = D.backend.xp.abs(D.matvec(probe) - self.D.matvec(probe))
        return jump > 0.5 * D.backend.xp.max(D.backend.xp.abs(probe), axis=-1, keepdims=True)


def kinks(point: Point, kind: str, outer: Callable[[Array, Array], Array], x: Array, metric: Metric) -> Observations:
    """Look whether P is bent at x: a second difference is of second order in its step only where P is smooth."""
    backend, theta = point.backend, point.theta.vector
    xp, eps = backend.xp, float(backend.xp.finfo(x.dtype).eps)
    z = backend.space(x).probe() + xp.zeros_like(x)
    z = xp.where(z < 0, z - 0.5, z + 0.5)
    reach = 2 * eps ** (1 / 3) if kind == "finite differences" else eps**0.5  # as far as the derivative looked
    h = reach * metric.sizes(point, x)
    middle = outer(x, theta)
    bent = xp.abs((outer(x + h * z, theta) - middle) - (middle - outer(x - h * z, theta))) > 0.05 * h
    quiet = ~xp.any(bent, axis=-1)
    return Observations(xp.ones_like(quiet), quiet, bent)
