"""The step of a projected or proximal fixed point, from the curvature of f.

y = P(y − s ∇f(y, θ), θ) for every s > 0. In the coordinates of y = d ŷ with s = d² the Hessian is of size one, and a
gradient step goes as far as y is from the minimum of f: no farther, where the distance to a kink of P would be lost in
x, and no less, where ∇f would be. d is a power of two, one for all coordinates.

Where the coordinates of y have units of their own, one step cannot serve them all. With S = diag(d)² and D = ∂P/∂x the
same solution is one of y = P(y − S ∇f) if P leaves the units apart, as a box does, and only then: D S = S D, and y is
reproduced. That is looked at, and the step of each coordinate taken from the diagonal of H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from implicitdiff.arrays import Array, any_true, divisor
from implicitdiff.conditions.base import Embedding
from implicitdiff.conditions.units import curvature_units, energy, leaf_sizes, power_of_two
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.tolerances import SMALL, STEP_FAR, STEP_SUITS, STEPS_APART, TINY

__all__ = ["Metric", "metric_at"]


@dataclass(frozen=True)
class Metric:
    """A step s, and what it is made of.

    Attributes
    ----------
    point : Point
    number : float or array, shape (items,)
        s for the function P, where it takes one.
    step : float or array
        s, to be multiplied with vectors.
    units : array or None
        d, where each coordinate has a step of its own.
    better : array or None
        d of the coordinates, where they seem to have units of their own.
    """

    point: Any
    number: Any
    step: Any
    units: Array | None = None
    better: Array | None = None

    @classmethod
    def of(cls, point: Any, step: Any, better: Array | None = None) -> Metric:
        """Return the metric of one step, or of one for each item, shape (*items, 1)."""
        if isinstance(step, float):
            return cls(point, step, step)
        number, backend = step[..., 0], point.backend
        if backend.traced or backend.shared:
            return cls(point, number, step, better=better)
        if not point.items:
            return cls(point, float(number), float(number), better=better)
        if not any_true(backend.xp, backend.xp.max(number) > STEP_FAR * number):  # one for all of the batch will do
            least = float(backend.xp.min(number))
            return cls(point, least, least, better=better)
        return cls(point, number if backend.vmap is not None else step, step, better=better)

    def near(self, step: float | None, *, binding: bool) -> Metric:
        """Return the metric of a step that is given; where that is far off, this one, or, if it binds, to be tried."""
        if step is None:
            return self
        if not isinstance(self.step, float):
            xp = self.point.backend.xp
            usable = (self.step <= STEP_FAR * step) & (step <= STEP_FAR * self.step)
            found = xp.where(usable, xp.full_like(self.step, step), self.step)
            given = replace(Metric.of(self.point, step), better=self.better)
            return given if binding else replace(self, number=None, step=found)
        far = not 1 / STEP_FAR <= step / self.step <= STEP_FAR
        if not binding:
            return self if far or self.better is not None else Metric.of(self.point, step)
        better, y = self.better, self.point.y.vector
        if better is None and far and not is_tree_vector(y):
            better = self.point.backend.xp.full_like(y, self.step**0.5)
        return replace(Metric.of(self.point, step), better=better)

    def finer(self) -> Metric | None:
        """Return the metric with a step for each coordinate, if that is to be tried."""
        if self.better is None:
            return None
        square = self.better * self.better
        plain = self.point.y.tree.spec is None and len(self.point.y.leaves[0].shape) == 1
        return Metric(self.point, square if plain else self.number, square, units=self.better)

    def suits(self, y: Array, x: Array, image: Array, D: Operator) -> Array:
        """Whether P reproduces y from x, and D commutes with the units, per item."""
        xp, d = self.point.backend.xp, self.units
        size = xp.max((xp.abs(y) + xp.abs(x)) / d, axis=-1, keepdims=True)
        probe = self.point.y.space.probe() + xp.zeros_like(y)
        gap = xp.abs(D.matvec(d * probe) / d - D.matvec(probe))
        return xp.all((xp.abs(y - image) / d <= STEP_SUITS * size) & (gap <= STEP_SUITS + 1e3 * D.accuracy), axis=-1)

    def only(self, suits: Array, other: Metric) -> Metric:
        """Return this metric where it suits, and the other one where not: in a program, where that is not seen."""
        xp, d = self.point.backend.xp, cast("Array", self.units)
        step = xp.where(suits[..., None], self.step, other.step + 0 * d)
        d = xp.where(suits[..., None], d, (other.step + 0 * d) ** 0.5)
        return Metric(self.point, other.number if self.number is other.number else step, step, units=d)

    # -- between y and ŷ -----------------------------------------------------------------------------
    @property
    def inner(self) -> Any:
        """The step in the coordinates of ŷ."""
        return self.step if self.units is None else 1.0

    def up(self, v: Any) -> Any:
        """D v."""
        return v if self.units is None else self.units * v

    def down(self, v: Any) -> Any:
        """D⁻¹ v."""
        return v if self.units is None else v / self.units

    def embedding(self) -> Embedding | None:
        """From y to ŷ and back."""
        return None if self.units is None else Embedding(self.up, self.up)

    def scaled(self, H: Operator) -> Operator:
        """The Hessian by ŷ."""
        d = self.units
        if d is None:
            return H
        matrix, sparse = H.matrix, H.sparse
        if matrix is not None:
            matrix = d[..., :, None] * matrix * d[..., None, :]
        if sparse is not None:
            sparse = sparse.multiply(d[:, None]).multiply(d[None, :]).tocsc()
        return H.rewrapped(lambda product: lambda x: d * product(d * x), matrix=matrix, sparse=sparse, leaves=())

    def sizes(self, point: Any, x: Array) -> Array:
        """The size of the coordinates of x, each in its unit."""
        xp = point.backend.xp
        if not point.y.n:
            return x
        size = xp.abs(self.down(x))
        leaf = leaf_sizes(point, size) if self.units is None else xp.max(size, axis=-1, keepdims=True) + 0 * size
        whole = xp.max(leaf, axis=-1, keepdims=True)
        tiny = float(xp.finfo(x.dtype).smallest_normal) ** 0.5
        leaf = xp.where(leaf > 0, leaf, xp.where(whole > 0, whole, tiny * xp.ones_like(whole)))
        return self.up(leaf)


def metric_at(point: Any, H: Operator, slope: Any) -> Metric:
    """Return the step 1 / ‖H‖, and those of the coordinates where they seem to have units of their own.

    In a compiled program units cannot be looked for. There the steps of the coordinates are made of a matrix that is
    given, or of a small one, whatever their units.

    Parameters
    ----------
    point : Point
    H : Operator
        ∂²f/∂y².
    slope : array, shape (*items, n)
        ∇f.
    """
    backend, y = point.backend, point.y.vector
    xp = backend.xp
    if not point.y.n or 0 in point.items:
        return Metric.of(point, 1.0)
    if is_tree_vector(y):
        return Metric.of(point, _of_trees(point, H))
    leaf = leaf_sizes(point, y)
    whole = xp.max(leaf, axis=-1, keepdims=True)
    leaf = xp.where(leaf > 0, leaf, divisor(xp, whole))
    u = power_of_two(xp, leaf)
    d = u / xp.sqrt(energy(point, u, slope, H.matvec(u * point.y.space.probe())))
    better = None
    if backend.shared:
        pass
    elif not backend.traced:
        if H.matrix is not None or (point.y.n <= SMALL and H.sparse is None and _mixed(point, H, leaf)):
            d = power_of_two(xp, curvature_units(backend, xp.abs(y), xp.abs(slope), leaf, H.dense()))
        better = d if any_true(xp, xp.max(d, axis=-1) > 32 * xp.min(d, axis=-1)) else None
    elif H.matrix is not None or (point.y.n <= TINY and H.sparse is None):
        fine = power_of_two(xp, curvature_units(backend, xp.abs(y), xp.abs(slope), leaf, H.dense()))
        better = backend.detached(fine)  # neither the solution nor its derivatives depend on it
    least = xp.min(d, axis=-1, keepdims=True)
    return Metric.of(point, least * least, better)


def _of_trees(point: Any, H: Operator) -> float:
    space = point.y.space
    probe = space.probe()
    found = float(space.size(H.matvec(probe))) / float(space.size(probe))
    return 1 / found if 0 < found < float("inf") else 1.0


def _mixed(point: Any, H: Operator, leaf: Array) -> bool:
    """Whether entries of y, or of the image of one vector in their units, are of very different sizes."""
    xp = point.backend.xp
    size = xp.abs(point.y.vector)
    unit = xp.where(size > 0, size, leaf)
    image = xp.abs(H.matvec(unit * point.y.space.probe()))
    image = xp.where(image > 0, image, xp.max(image, axis=-1, keepdims=True))
    return any(any_true(xp, xp.max(x, axis=-1) > STEPS_APART * xp.min(x, axis=-1)) for x in (unit, image))
