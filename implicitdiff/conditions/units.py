"""Units of the coordinates of y and of constraints, so that what is near or small is so in any units.

A coordinate y_j has a unit u_j, a constraint c_i then has R_i = ‖J_i ∘ u‖: as much as it changes when y does. It is as
far away as |c_i| / R_i. What u_j is lies between |y_j|, which may be tiny by accident, and ℓ_j, the largest entry of
its leaf, which may be of another unit. Where that leaves no doubt about the active set, nothing more is asked. Else the
curvature tells: in the units d_j = |H_jj|^(-1/2) the Hessian of f has ones on its diagonal, so that y_j / d_j and
d_j ∂f/∂y_j, how far to go and how strong the pull, are all of one unit, and u_j = d_j max_k (|y_k| / d_k, d_k |∂_k f|),
but not less than |y_j|, nor more than ℓ_j where that seems to be of the same unit.

A multiplier of constraint i is a force μ_i R_i in the unit of f. It is held against R_i² / T_i², T_i = ‖J_i ∘ d‖, the
force that moves y by as much as y is, and against ∇f where J_i acts. And μ_i T_i² is how far c_i would go if it were
dropped: the constraint is pressed against where that is more than −c_i, the distance that is left (primal-dual
identification).

References
----------
F. Facchinei, A. Fischer, C. Kanzow, "On the accurate identification of active constraints", SIAM J. Optim. 9 (1998)
14-32. DOI 10.1137/S1052623496305882
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, item_norm, needed, quotient
from implicitdiff.linalg.rows import (
    absolute,
    diagonal_of,
    row_norms,
    row_sizes,
    rows_times,
    scaled_rows,
    squared,
)
from implicitdiff.tolerances import ENERGY_NOISE, SMALL, UNITS_APART

__all__ = ["Units", "center", "curvature_units", "energy", "leaf_sizes", "power_of_two", "units_at"]


class Units(NamedTuple):
    """The units at a point, per item; powers of two."""

    reach: Array
    """u, shape (*items, n)."""
    bend: Array
    """d, shape (*items, n)."""
    distance: Array
    """R, shape (*items, k)."""
    give: Array
    """T, shape (*items, k)."""
    force: Array
    """What multipliers are held against, in the unit of f, shape (*items, k)."""


class _Measured(NamedTuple):
    """The problem to first order, and the limits of a distance that count as zero and as a violation."""

    point: Any
    values: Array
    rows: Array
    gradient: Array
    inequality: Array
    near: float
    far: float


def units_at(point: Any, first: Any, limits: Any) -> Units:
    """Find the units at a point.

    Parameters
    ----------
    point : Point
    first : FirstOrder
    limits : Limits
    """
    backend, y = point.backend, point.y.vector
    xp, n = backend.xp, point.y.n
    k = first.values.shape[-1]
    inequality = xp.arange(k, device=point.y.device) >= first.p
    here = _Measured(point, first.values, first.rows, first.gradient, inequality, limits.active, limits.violated)
    if n == 0:
        zero = xp.zeros_like(first.values)
        return Units(y, y, zero, zero, zero)
    leaf, known = _leaves(here)
    if first.hessian is not None:
        return _by_curvature(here, leaf, known, first.hessian)
    blind = backend.traced
    if blind and n + k <= SMALL:
        return _by_curvature(here, leaf, known, _assembled(point, first.curve))
    u = power_of_two(xp, leaf)
    image = first.curve(u * point.y.space.probe())
    d = u / xp.sqrt(energy(point, u, here.gradient, image))
    u = power_of_two(xp, xp.maximum(u, leaf_sizes(point, here.gradient * d * d)))
    found = _measured(here, u, d)
    if blind or n + k > SMALL:
        return found
    doubt = _doubtful(here, found) | ~(known & _speaks(xp, abs(y) / d, abs(here.gradient) * d) & _alike(xp, abs(image)))
    if not any_true(xp, doubt):
        return found
    sure = _by_curvature(here, leaf, known, _assembled(point, first.curve))
    return Units(*(xp.where(doubt[..., None], new, old) for new, old in zip(sure, found, strict=True)))


def _speaks(xp: Any, y: Array, slope: Array) -> Array:
    """Whether y, beside how far ∇f would go, is more than what is left of a zero; both in one unit, per item."""
    return xp.max(y, axis=-1) >= UNITS_APART * xp.max(slope, axis=-1)


def _alike(xp: Any, x: Array) -> Array:
    """Whether entries are of one unit, as far as their sizes tell; zeros are of any."""
    x = xp.where(x > 0, x, xp.max(x, axis=-1, keepdims=True))
    return xp.max(x, axis=-1) * UNITS_APART <= xp.min(x, axis=-1)


def leaf_sizes(point: Any, x: Array) -> Array:
    """The largest entry of each leaf of a vector like y, at each of its coordinates; 0 where a leaf is zero."""
    xp = point.backend.xp
    parts = [part for part in point.y.parts(xp.abs(x)) if part.shape[-1]]
    spread = [xp.broadcast_to(xp.max(part, axis=-1, keepdims=True), part.shape) for part in parts]
    return spread[0] if len(spread) == 1 else point.backend.concat(spread)


def _leaves(here: _Measured) -> tuple[Array, Array]:
    """ℓ, and whether there is anything to tell it from, per item."""
    xp, leaf = here.point.backend.xp, leaf_sizes(here.point, here.point.y.vector)
    # where y is zero, the distance to a constraint is a length as well
    steep = row_sizes(xp, here.rows)
    usable = xp.isfinite(here.values) & (steep > 0)
    away = quotient(xp, xp.abs(here.values), steep, usable)
    whole = xp.max(leaf, axis=-1, keepdims=True)
    whole = xp.where(whole > 0, whole, xp.max(away, axis=-1, keepdims=True))
    known = whole > 0
    leaf = xp.where(leaf > 0, leaf, xp.where(known, whole, xp.ones_like(whole)))
    return leaf, known[..., 0]


def energy(point: Any, u: Array, gradient: Array, image: Array) -> Array:
    """The size of u ∘ H ∘ u, in the unit of f; that of u ∘ ∇f, or 1, where it is zero.

    It is seen on one vector: the ``image`` under H of u ∘ z, z the probe of the space of y.
    """
    xp = point.backend.xp
    found = item_norm(xp, u * image) / item_norm(xp, point.y.space.probe())
    slope = item_norm(xp, u * gradient)
    found = xp.where(found > 0, found, divisor(xp, slope))
    return 4.0 ** xp.round(xp.log2(found)[..., None] / 2)


def _assembled(point: Any, product: Callable[[Array], Array]) -> Array:
    xp, n, items = point.backend.xp, point.y.n, point.items
    unit = xp.eye(n, dtype=point.y.dtype, device=point.y.device)
    unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(items), n)), (n, *items, n))
    return xp.moveaxis(product(unit), 0, -1)


def _by_curvature(here: _Measured, leaf: Array, known: Array, hessian: Array) -> Units:
    """The units that the Hessian shows; where it is flat, the leaf's."""
    xp, y, slope = here.point.backend.xp, abs(here.point.y.vector), abs(here.gradient)
    d = curvature_units(here.point.backend, y, slope, leaf, hessian)
    scale = xp.max(xp.maximum(y / d, slope * d), axis=-1, keepdims=True)
    known = known & _speaks(xp, y / d, slope * d) & _alike(xp, d)
    u = xp.maximum(y, xp.where(known[..., None], xp.minimum(leaf, d * scale), d * scale))
    return _measured(here, power_of_two(xp, xp.where(u > 0, u, d)), power_of_two(xp, d))


def curvature_units(backend: Any, y: Array, slope: Array, leaf: Array, hessian: Array) -> Array:
    """d_j = |H_jj|^(-1/2), of |y|, |∇f|, ℓ and H; where H is flat, ℓ_j in relation to the others."""
    xp = backend.xp
    one, zero = xp.ones_like(y), xp.zeros_like(y)
    diagonal = xp.abs(diagonal_of(xp, hessian))
    curved = diagonal > 0
    d = xp.where(curved, one / xp.sqrt(xp.where(curved, diagonal, one)), zero)
    if not needed(backend, ~curved):
        return d
    size = absolute(xp, hessian)
    across = row_sizes(xp, scaled_rows(size, None, d))  # no curvature of its own: by those that it goes with
    far = xp.max(xp.where(curved, xp.maximum(y / xp.where(curved, d, one), slope * d), zero), axis=-1, keepdims=True)
    linked = ~curved & (across * leaf > ENERGY_NOISE * far)
    d = xp.where(linked, one / xp.where(linked, across, one), d)
    curved = curved | linked
    safe = xp.where(curved, d, one)
    scale = xp.max(xp.where(curved, xp.maximum(y / safe, slope * d), zero), axis=-1, keepdims=True)
    linear = xp.sqrt(xp.max(slope * leaf, axis=-1, keepdims=True))
    scale = xp.where(scale > 0, scale, divisor(xp, linear))
    return xp.where(curved, d, leaf / scale)


def power_of_two(xp: Any, x: Array) -> Array:
    """Round to the next power of two; x is positive."""
    return 2.0 ** xp.round(xp.log2(x))


def _measured(here: _Measured, u: Array, d: Array) -> Units:
    """Measure the constraints in units of the coordinates."""
    xp = here.point.backend.xp
    distance, give = (row_norms(xp, scaled_rows(here.rows, None, unit)) for unit in (u, d))
    share = squared(scaled_rows(here.rows, 1 / _safe(xp, distance), u))
    stiff = xp.where(give > 0, distance / _safe(xp, give), xp.zeros_like(give)) ** 2
    return Units(u, d, distance, give, stiff + rows_times(share, xp.abs(here.gradient) * u))


def _safe(xp: Any, x: Array) -> Array:
    return divisor(xp, x)


def _doubtful(here: _Measured, high: Units) -> Array:
    """Whether the active set may be another one where |y_j| is the unit, and not ℓ_j; per item."""
    xp = here.point.backend.xp
    low = row_norms(xp, scaled_rows(here.rows, None, xp.abs(here.point.y.vector)))
    out = xp.where(here.inequality, here.values, xp.abs(here.values))

    def decided(limit: float, distance: Array, sign: int) -> Array:
        return sign * out > limit * distance

    far = decided(here.near, low, -1) != decided(here.near, high.distance, -1)
    broken = decided(here.far, low, 1) != decided(here.far, high.distance, 1)
    held = here.inequality & ~decided(here.near, high.distance, -1)
    stiff = (high.distance / _safe(xp, high.give)) ** 2
    thin = held & (high.force - stiff < UNITS_APART * stiff)
    return xp.any((here.inequality & far) | broken | thin, axis=-1)


def center(xp: Any, units: Units) -> Array:
    """One unit for all of y, shape (*items, 1): the geometric mean."""
    if not units.bend.shape[-1]:
        return xp.ones((*units.bend.shape[:-1], 1), dtype=units.bend.dtype)
    return 2.0 ** xp.round(xp.mean(xp.log2(units.bend), axis=-1, keepdims=True))
