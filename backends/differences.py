"""Derivatives by central differences, for functions of which nothing else is known.

How steps are chosen stands in `steps`, what is measured of a function first in `sampling`. Everything is evaluated in
double precision, where the framework has it.

References
----------
P. E. Gill, W. Murray, M. H. Wright, "Practical Optimization", Academic Press, 1981, section 4.6.
J. Domke, "Generic methods for optimization-based modeling", AISTATS 2012 (Hessian-vector products by differences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from implicitdiff.arrays import Array, any_true, divisor
from implicitdiff.backends.base import Backend
from implicitdiff.backends.sampling import Sampler, leaf_sizes
from implicitdiff.backends.steps import FIRST, Block, Estimate, Plan, Stencil, search
from implicitdiff.errors import DerivativeError
from implicitdiff.tolerances import AIM_OF_WHOLE, SAFETY, TOGETHER, USELESS

__all__ = ["Differences", "groups", "name_of", "not_differentiable", "scalar_gradients", "sweep", "unit_vectors"]

Function = Callable[[Array, Array], Array]

KEPT = 2**22
"""Entries of a matrix of columns that is kept for the next product."""


class Differences:
    """Derivatives of a vector function G(y, θ).

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> G``, on vectors (*items, n) and (*items, m). Where it is one of a point, it knows the leaves.
    y, theta : array
        The point.
    rounding : bool
        Whether the noise of G is known to be that of rounding.
    """

    kind = "finite differences"

    def __init__(self, backend: Backend, function: Function, y: Array, theta: Array, *, rounding: bool = False) -> None:
        self.backend, self.xp, self.function = backend, backend.xp, function
        self.dtype, self.theta_dtype = y.dtype, theta.dtype
        self.y, self.theta = backend.to_double(y), backend.to_double(theta)
        self.piecewise = getattr(getattr(function, "point", None), "piecewise", False)
        self.sampler = self._sampler(FIRST, rounding=rounding or self.piecewise)
        # a part of a larger F (a projection, say) may bend: whoever composes it looks for kinks
        self.strict = getattr(getattr(function, "point", None), "whole", True)
        self._columns: dict[str, Array] = {}

    def _sampler(self, stencil: Stencil, **options: Any) -> Sampler:
        f, n, m = self.function, self.y.shape[-1], self.theta.shape[-1]
        leaves = leaf_sizes(f, "y", n), leaf_sizes(f, "theta", m)
        return Sampler(
            self.backend, self.function, self.y, self.theta, stencil, leaves=leaves, what=name_of(self.function),
            **options,
        )  # fmt: skip

    @cached_property
    def accuracy(self) -> float:
        """Relative error of a product with ∂G/∂y, in the units of G and y."""
        s = self.sampler
        if 0 in self.y.shape:
            return 0.0
        best = float(s.eps ** (s.stencil.accuracy))
        return best if self.piecewise else max(s.accuracy(s.by_y), best)

    def value(self) -> Array:
        """G(y, θ)."""
        return self.backend.astype(self.sampler.middle, self.dtype)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v for v of shape (*rhs, *items, n)."""
        return self._forward(v, "y", self.dtype)

    hvp = jvp_y

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t for t of shape (*rhs, *items, m)."""
        return self._forward(t, "theta", self.dtype)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u, one pass over the coordinates of y for all right-hand sides."""
        return self._backward(u, "y", self.dtype)

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u, one pass over the coordinates of θ for all right-hand sides."""
        return self._backward(u, "theta", self.theta_dtype)

    # -- columns and directions --------------------------------------------------------------------------
    def _block(self, by: str) -> Block:
        """What is known of the derivatives by y or θ, where they stand above the noise."""
        s = self.sampler
        block = s.by_y if by == "y" else s.by_theta
        s.check(block, by)
        if self.strict and len(s.middle.shape) == 1 and any_true(self.xp, block.kink) and not s.random:
            raise not_differentiable(s, by, None)
        unsure = s.random and any_true(self.xp, ~block.shown & (block.rows > 0))
        if s.accuracy(block) > USELESS or unsure:
            raise s.too_noisy(
                f"the derivative by {by} is known to {s.accuracy(block):.0%} only, for the noise of {s.what}"
            )
        return block

    def _joint(self, v: Array, by: str) -> Array:
        """A vector of y's or θ's as one of both."""
        xp, s = self.xp, self.sampler
        other = xp.zeros((*v.shape[:-1], s.m if by == "y" else s.n), dtype=v.dtype, device=self.backend.device(v))
        if not other.shape[-1]:
            return v
        return self.backend.concat([v, other] if by == "y" else [other, v])

    def _forward(self, v: Array, by: str, dtype: Any) -> Array:
        s = self.sampler
        if 0 in v.shape or 0 in self.y.shape or not self._block(by).moves:
            shape = (*v.shape[:-1], s.middle.shape[-1])
            return self.xp.zeros(shape, dtype=dtype, device=self.backend.device(v))
        block = self._block(by)

        def one(v: Array) -> Array:
            total = 0 * s.middle
            for w, length in groups(self.xp, self._joint(v, by), s.size):
                total = total + self._along(w, block, by, None) * length
            return total

        items = tuple(s.x.shape[:-1])
        return self.backend.astype(self.backend.batched(one, items)(self.backend.to_double(v)), dtype)

    def _along(self, w: Array, block: Block, by: str, number: int | None) -> Array:
        return block.cleaned(self.xp, self._tell_kink(self.sampler.along(w, block=block), by, number))

    def _tell_kink(self, found: Estimate, by: str, number: int | None) -> Estimate:
        """Raise where there is no derivative; in a batch it is NaN, and told as such, item by item."""
        if not self.strict or not any_true(self.xp, found.kink):
            return found
        xp, s = self.xp, self.sampler
        block = s.by_y if by == "y" else s.by_theta
        bends = found.error * found.step**s.stencil.order  # rounding of terms as large as the row bends, too
        kink = found.kink & block.shown & (bends > SAFETY * s.eps * block.rows)
        if not any_true(xp, kink):
            return found
        if len(found.value.shape) > 1 and not (s.random or any_true(xp, s.noisy & kink)):
            return found._replace(value=xp.where(kink, xp.full_like(found.value, float("nan")), found.value))
        raise not_differentiable(s, by, number)

    def columns(self, by: str) -> Iterator[Array]:
        """Columns of ∂G/∂y or ∂G/∂θ, one after the other."""
        s, block = self.sampler, self._block(by)
        for i in range(s.n if by == "y" else s.m):
            unit = unit_vector(self.xp, s.x, i if by == "y" else s.n + i) * s.size
            yield self._along(unit, block, by, i) / self.xp.sum(unit, axis=-1, keepdims=True)

    def _backward(self, u: Array, by: str, dtype: Any) -> Array:
        xp, s, count = self.xp, self.sampler, self.sampler.n if by == "y" else self.sampler.m
        u = self.backend.to_double(u)
        if not count or 0 in u.shape or not self._block(by).moves:
            return xp.zeros((*u.shape[:-1], count), dtype=dtype, device=self.backend.device(u))
        columns = self._columns.get(by)
        if columns is None and count * math.prod(s.middle.shape) <= KEPT:
            columns = self._columns[by] = xp.stack(list(self.columns(by)))
        rows = self.columns(by) if columns is None else (columns[i, ...] for i in range(count))
        parts = [xp.vecdot(xp.broadcast_to(xp.astype(c, u.dtype), u.shape), u) for c in rows]
        return self.backend.astype(xp.stack(parts, axis=-1), dtype)


def name_of(function: Any) -> str:
    """What the user knows a function under."""
    return getattr(function, "name", "the function")


def not_differentiable(sampler: Sampler, by: str, number: int | None) -> DerivativeError:
    """Build the error for a kink or a jump at the point; noise looks like one."""
    what = sampler.what
    if sampler.random or any_true(sampler.xp, sampler.noisy):
        return sampler.too_noisy(f"a derivative by {by} lies below the noise of {what}, or {what} has a kink there")
    where = f"a direction of {by}" if number is None else f"{by}, entry {number} (in raveled order)"
    return DerivativeError(
        f"{what} has a kink or a jump at the point, along {where}: it has no derivative there.\n"
        "Likely cause: relu, abs, sign, clip, where or max, exactly where it switches; or noise that looks like one.\n"
        "Next: move theta, or smooth the function; give the derivative of the side that you mean."
    )


def unit_vector(xp: Any, x: Array, i: int) -> Array:
    """Unit vector e_i, broadcast over the items of x."""
    unit = xp.zeros_like(x)
    unit[..., i] = 1.0
    return unit


def unit_vectors(xp: Any, x: Array) -> Iterator[Array]:
    """Unit vectors e_1 … e_n."""
    return (unit_vector(xp, x, i) for i in range(x.shape[-1]))


def groups(xp: Any, v: Array, size: Array) -> Iterator[tuple[Array, Array]]:
    """Split a vector by how far it moves its coordinates relative to their sizes, a thousandfold in each part.

    In one part the largest would set the step, and what the others do would drown in the noise.

    Yields
    ------
    part : array
        Scaled so that its largest entry moves a coordinate by its size.
    length : array, shape (*items, 1)
        What it was divided by.
    """
    moved = xp.abs(v) / size
    for _ in range(6):
        largest = xp.max(moved, axis=-1, keepdims=True)
        if not any_true(xp, largest > 0):
            return
        now = (moved >= TOGETHER * largest) & (moved > 0)  # an item may be done, and others not
        safe = divisor(xp, largest)
        yield xp.where(now, v, 0 * v) / safe, largest
        moved = xp.where(now, 0 * moved, moved)


def scalar_gradients(backend: Backend, function: Function, y: Array, theta: Array) -> tuple[Array, Array, str]:
    """∂L/∂y and ∂L/∂θ of a scalar function."""
    leaves = leaf_sizes(function, "y", y.shape[-1]), leaf_sizes(function, "theta", theta.shape[-1])
    sampler = Sampler(
        backend, function, backend.to_double(y), backend.to_double(theta), FIRST, leaves=leaves, scalar=True,
        what=name_of(function),
    )  # fmt: skip
    found = gradient(sampler, whole=True)
    by_y, by_theta = found[..., : sampler.n], found[..., sampler.n :]
    return backend.astype(by_y, y.dtype), backend.astype(by_theta, theta.dtype), "finite differences"


def gradient(sampler: Sampler, *, whole: bool) -> Array:
    """Gradient of a scalar function by y, or (``whole``) by y and θ."""
    s, xp = sampler, sampler.xp
    parts = []
    blocks = [("y", 0, s.n), ("theta", s.n, s.n + s.m)][: 2 if whole else 1]
    seen = []
    for by, start, stop in blocks:
        shape = (*s.x.shape[:-1], stop - start)
        parts.append(xp.zeros(shape, dtype=s.x.dtype, device=s.backend.device(s.x)))
        if 0 in shape:
            continue
        block = s.by_y if by == "y" else s.by_theta
        if not block.moves:
            continue
        seen.append(block.visible)
        found = sweep(s, block, range(start, stop))
        if not (block.visible or whole):
            s.check(block, by)
        if any_true(xp, found.kink) and len(shape) == 1:
            raise not_differentiable(s, by, int(xp.argmax(xp.astype(found.kink, s.x.dtype))))
        parts[-1] = found.value / s.size[..., start:stop]
    if seen and not any(seen):
        raise s.too_noisy(f"the gradient lies below the noise of {s.what}")
    whole_gradient = parts[0] if len(parts) == 1 else s.backend.concat(parts)
    known = xp.isfinite(s.middle)  # of a value that is NaN no change is seen, and no derivative is known
    return xp.where(known, whole_gradient, xp.full_like(whole_gradient, float("nan")))


def sweep(s: Sampler, block: Block, coordinates: range) -> Estimate:
    """Derivatives along every coordinate by its size, each with a step of its own."""
    xp = s.xp
    here = slice(coordinates.start, coordinates.stop)
    share = s.size[..., here] / s.leaf[..., here]
    rows = block.rows + 0 * share
    start = xp.where(s.lent[..., here], block.short, block.start)
    plan = Plan(start + 0 * share, 0.1 / share, rows, block.tolerance, AIM_OF_WHOLE * share, separate=True)
    plan = plan._replace(rounded=xp.astype(s.x[..., here] != 0, share.dtype), reach=s.reach())

    def values(a: Array, wanted: Array) -> Array:
        out = xp.zeros_like(a) + s.middle
        for k, i in enumerate(coordinates):
            if any_true(xp, wanted[..., k]):
                x = xp.asarray(s.x, copy=True)
                x[..., i] = x[..., i] + a[..., k] * s.size[..., i]
                out[..., k] = s.at(x)[..., 0]
        return out

    middle = s.middle + 0 * share
    return search(xp, s.stencil, values, middle, s.noise + 0 * share, plan)
