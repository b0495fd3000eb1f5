"""A function of y and θ as differences see it: the sizes of its coordinates, its noise, and how far it can be known.

Every coordinate is moved relative to its own size; one that is 0 relative to the largest of its leaf, whose entries
share a unit as a rule; and where a whole leaf is 0, its unit is found by trying. What is known of the function as a
whole (its noise, the sizes of its rows, the accuracy within reach) is measured once, along one direction without
structure in each of y and θ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from implicitdiff.arrays import Array, any_true, divisor, probe_vector
from implicitdiff.backends.base import Backend
from implicitdiff.backends.noise import noise_along, noise_within
from implicitdiff.backends.sizes import leaf_sizes, sizes_of
from implicitdiff.backends.steps import FIRST, Block, Estimate, Plan, Stencil, search
from implicitdiff.errors import ImplicitDiffError, NoiseError
from implicitdiff.tolerances import AGREES, AIM_OF_WHOLE, NOISE_SHOWN, OFF, SHRUNK, VISIBLE, is_double

__all__ = ["Sampler", "leaf_sizes", "sizes_of"]

Function = Callable[[Array, Array], Array]

CURVED = 8
"""Sizes that are tried for a zero: each halves the logarithm of what the one before was off by, or better."""


class Sampler:
    """Values of a function near one point of (y, θ).

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> values``, one or a vector of them per item.
    y, theta : array
        The point; a function of it is evaluated in that precision.
    stencil : Stencil
        Of the derivative that is wanted.
    leaves : tuple of tuples of int
        Lengths of the leaves of y, and of those of theta.
    scalar : bool
        Whether there is one value per item.
    rounding : bool
        Whether the noise is known to be that of rounding.
    what : str
        Name of the function, for messages.
    """

    def __init__(
        self, backend: Backend, function: Function, y: Array, theta: Array, stencil: Stencil = FIRST, *,
        leaves: tuple[tuple[int, ...], tuple[int, ...]] | None = None, scalar: bool = False, rounding: bool = False,
        what: str = "the function",
    ) -> None:  # fmt: skip
        self.backend, self.xp, self.what = backend, backend.xp, what
        self.stencil = replace(stencil, stretch=backend.stretch, degree=backend.degree)
        self._function, self._scalar, self._rounding = function, scalar, rounding
        self._dtypes = y.dtype, theta.dtype
        self.n, self.m = int(y.shape[-1]), int(theta.shape[-1])
        self.x = backend.concat([y, theta]) if self.m else y
        known = leaves or ((self.n,), (self.m,))
        found = [sizes_of(self.xp, x, sizes) for x, sizes in zip((y, theta), known, strict=True)]
        self.size, self.leaf, self._unknown = (
            backend.concat(list(pair)) if self.m else pair[0] for pair in zip(*found, strict=True)
        )
        self.leaves = (*known[0], *known[1]) if self.m else known[0]
        # which have the size of their leaf, as far as is not known better; noise that is not measured may be more
        self.lent = (self.x == 0) & ~self._unknown & (not rounding)
        self.eps = float(self.xp.finfo(self.x.dtype).eps)

    def at(self, x: Array) -> Array:
        """Values at another x = (y, θ), shape (*items, components); a copy, as it may be a buffer."""
        middle = self.middle
        try:
            return self._value(x)
        except ImplicitDiffError:
            raise
        except (ArithmeticError, ValueError):  # it stands at the point itself: x is outside of its domain
            return self.xp.full_like(middle, float("nan"))

    def _value(self, x: Array) -> Array:
        y = self.backend.astype(x[..., : self.n], self._dtypes[0])
        theta = self.backend.astype(x[..., self.n :], self._dtypes[1])
        value = self._function(y, theta)
        value = value[..., None] if self._scalar else value
        return self.xp.asarray(value, dtype=self.x.dtype, copy=True)

    def adopt(self, other: Sampler) -> None:
        """Take over what another sampler of the same function has found out about it."""
        other.by_y  # noqa: B018  (which may change the sizes)
        self.size, self.leaf, self.lent, self.random = other.size, other.leaf, other.lent, other.random
        self.__dict__.update(middle=other.middle, noise=other.noise)

    @cached_property
    def middle(self) -> Array:
        """The value at the point."""
        return self._value(self.x)

    def _rounding_of(self, values: Array) -> Array:
        return 0.5 * self.eps * self.xp.abs(values)

    @cached_property
    def _probe(self) -> Array:
        """A direction without structure, entries between 1/4 and 1."""
        z = probe_vector(self.xp, self.n + self.m, self.x.dtype, self.backend.device(self.x))
        return self.xp.where(z < 0, z - 0.5, z + 0.5) / 2 + self.xp.zeros_like(self.x)

    @cached_property
    def noise(self) -> Array:
        """Noise of each component: along a direction that moves everything, and from call to call."""
        self._find_units()
        self._find_curved()
        least = self._rounding_of(self.middle)
        if self._rounding:
            return least
        again = self.xp.abs(self.at(self.x) - self.middle)
        again = self.xp.where(self.xp.isfinite(again), again, 0 * least)
        self.random = any_true(self.xp, again > 1e3 * self.eps * self.xp.abs(self.middle))
        w, least = self._probe * self.size, self.xp.maximum(least, again)
        known = self.xp.where(self.lent, 0 * w, w)
        along, without = (lambda t, w=w: self.at(self.x + t * w) for w in (w, known))
        found = noise_along(self.xp, along, self.middle, least)
        if any_true(self.xp, self.lent):
            # in a unit far below that of its leaf a zero is moved by so much that what it does looks like noise
            return noise_within(self.xp, along, without, self.middle, least, found)
        return found

    random = False
    """Whether the same point gives another value each time; known once the noise is."""

    def _find_units(self) -> None:
        """Find the sizes of leaves that are all zero, by trying."""
        if not any_true(self.xp, self._unknown):
            return
        start = 0
        for n in self.leaves:
            here = self._inside(start, start + n) & self._unknown
            start += n
            if not any_true(self.xp, here):
                continue
            w = self.xp.where(here, self._probe * self.size, 0 * self.size)
            found = self.along(w, noise=self._rounding_of(self.middle))
            first = self.stencil.start(self.eps)
            size = self.xp.max(found.step, axis=-1, keepdims=True) / first
            self.size = self.xp.where(here, self.size * size, self.size)
            self.leaf = self.xp.where(here, self.leaf * size, self.leaf)

    def _find_curved(self) -> None:
        """Give every zero of y the size at which f bends as it does by the others, where its leaf's is far from that.

        A curvature between two coordinates is a difference of three, and drowns where one of these is far larger. Of a
        function that is not quadratic what bends at a step far too long says little: so again, from there.
        """
        xp, here = self.xp, self._inside(0, self.n)
        if not (self._scalar and self.stencil.order == 2 and any_true(xp, here & self.lent)):
            return
        others = xp.where(here & ~self.lent, self._probe * self.size, 0 * self.size)
        usual = self._curvature(others)
        for i in range(self.n):
            lent = xp.zeros_like(self.lent)
            lent[..., i] = self.lent[..., i]
            for _ in range(CURVED if any_true(xp, lent) else 0):
                own = self._curvature(xp.where(lent, self.size, 0 * self.size))
                known = (usual > 0) & (own > 0)
                ratio = xp.where(known, usual, xp.ones_like(usual)) / xp.where(known, own, xp.ones_like(own))
                ratio = xp.where(ratio > 0, ratio, xp.full_like(ratio, 1e-8))  # f overflows so far away
                far = lent & ((ratio > OFF) | (ratio < 1 / OFF))
                if not any_true(xp, far):
                    break
                self.size = xp.where(far, self.size * ratio**0.5, self.size)

    def _curvature(self, w: Array) -> Array:
        """|D²(w)|, zero where noise hides it, and infinite where it overflows."""
        found = self.along(w, noise=self._rounding_of(self.middle))
        value = self.xp.abs(found.value)
        value = self.xp.where(self.xp.isfinite(value), value, self.xp.full_like(value, float("inf")))
        return self.xp.where((value > found.error) | ~self.xp.isfinite(value), value, self.xp.zeros_like(value))

    def _inside(self, start: int, stop: int) -> Array:
        index = self.xp.arange(self.n + self.m, device=self.backend.device(self.x))
        return self.xp.broadcast_to((index >= start) & (index < stop), self.x.shape)

    def along(self, w: Array, *, noise: Array | None = None, block: Block | None = None, start: Any = None) -> Estimate:
        """Derivative of every component along a direction w, which moves coordinates by about their size.

        Without a block nothing is known yet, not even whether the sizes of the coordinates are good ones.
        """
        xp = self.xp
        share = xp.max(xp.abs(w) / self.leaf, axis=-1, keepdims=True)
        share = divisor(xp, share)
        level = self.noise if noise is None else noise
        reach = self.reach() if noise is None else 1e6 + 0 * share
        if block is None:
            size = xp.abs(self.x)
            whole = xp.max(xp.where(xp.isfinite(size), size, xp.zeros_like(size)), axis=-1, keepdims=True)
            largest = xp.max(xp.abs(w), axis=-1, keepdims=True)
            natural = xp.maximum(0.1 * whole / xp.where(largest > 0, largest, whole), 0.1 / share)
            natural = xp.minimum(natural, 0.1 * reach / share)
            start = self.stencil.start(self.eps) if start is None else start
            plan = Plan(start + 0 * natural, natural, 0 * self.middle, self.stencil.aim, 0.0)
        else:
            floor = AIM_OF_WHOLE * xp.minimum(share, xp.ones_like(share))
            lent = xp.any(self.lent & (w != 0), axis=-1, keepdims=True)
            start = xp.where(lent, block.short, block.start)
            plan = Plan(start, 0.1 / share, block.rows, block.tolerance, floor)
        moved = xp.any((self.x != 0) & (w != 0), axis=-1, keepdims=True)
        plan = plan._replace(rounded=xp.astype(moved, w.dtype), reach=reach)
        return search(xp, self.stencil, lambda a, wanted: self.at(self.x + a[..., :1] * w), self.middle, level, plan)

    @cached_property
    def noisy(self) -> Array:
        """Whether the noise is more than rounding, against what the function changes by near the point, per item."""
        change = self.xp.abs(self.at(self.x + 0.1 * self._probe * self.size) - self.middle)
        change = self.xp.where(self.xp.isfinite(change), change, self.xp.zeros_like(change))
        level = 1e3 * self.eps * self.xp.maximum(self.xp.abs(self.middle), change)
        return self.xp.any((self.noise > level) & (level > 0), axis=-1, keepdims=True)

    def reach(self) -> Array:
        """How many natural lengths a step may be long.

        At the level of rounding, what moves nothing may be of a unit that its size says nothing of. A larger noise
        hides what lies between the ends of a step as long as y itself, and their slope may be anything.
        """
        if self._rounding or not any_true(self.xp, self.noisy):
            return 1e6 + self.xp.zeros_like(self.x[..., :1])
        return self.xp.where(self.noisy, self.xp.full_like(self.x[..., :1], 3.0), 1e6)

    # -- what is known as a whole ---------------------------------------------------------------------
    @cached_property
    def by_y(self) -> Block:
        """What is known of the derivatives by y."""
        return self._block(0, self.n)

    @cached_property
    def by_theta(self) -> Block:
        """What is known of the derivatives by θ."""
        return self._block(self.n, self.n + self.m)

    def _block(self, start: int, stop: int) -> Block:
        xp, here = self.xp, self._inside(start, stop)
        w = xp.where(here, self._probe * self.size, 0 * self.size)
        found = self._repeated(self._doubted(self._agreed(w, here), w), w)
        first = self.stencil.start(self.eps)
        # what moves nothing until it is moved by far more than its size: its size says nothing of its unit
        known = xp.abs(found.value) > 10 * found.error
        reach = xp.max(xp.where(known, found.step, 0 * found.step), axis=-1, keepdims=True) / first
        reach = xp.where(reach > 1e3, reach, xp.ones_like(reach))
        moves = xp.any(found.change > 0, axis=-1, keepdims=True)
        shown = found.change > VISIBLE
        visible = xp.any(shown, axis=-1, keepdims=True)
        faint = moves & ~visible & self._quiet
        error = xp.where(xp.isfinite(found.error), found.error, xp.zeros_like(found.error))
        rows, ratio = found.usual, xp.where(shown | ~visible, self._relative_noise(found.usual), 0 * found.usual)
        grown = xp.where(here, self.leaf * reach, self.leaf)
        self.size = xp.where(here & (reach > 1), xp.minimum(self.size * reach, grown), self.size)
        self.leaf = grown
        usual = xp.maximum(xp.max(ratio, axis=-1, keepdims=True), xp.full_like(reach, self.eps))
        begin = xp.where(reach > 1, reach * 0 + first, self.stencil.start(usual))
        tolerance = xp.maximum(3 * error / divisor(xp, rows), self.stencil.aim + 0 * rows)
        hidden = any_true(xp, moves & ~visible & ~faint)
        return Block(
            rows * reach, error * reach, begin, xp.minimum(begin, self._short(ratio)), tolerance,
            any_true(xp, moves & ~faint), not hidden, shown, found.kink & shown,
        )  # fmt: skip

    @cached_property
    def _quiet(self) -> Array:
        """Items whose noise is rounding: what does not show above it is zero beside the value; of a map T, say."""
        xp, known = self.xp, 1e3 * self.eps * self.xp.abs(self.middle)
        level = xp.all(self.noise <= known, axis=-1, keepdims=True) & xp.any(known > 0, axis=-1, keepdims=True)
        return level & (self.stencil.order == 1 and not self._scalar)

    def _repeated(self, found: Estimate, w: Array) -> Estimate:
        """Compare with a step that is no multiple of the first one: what they disagree by is noise, not seen yet.

        A function that is rounded is flat where noise is looked for, and often lies on one line at a and 2a.
        """
        if self._scalar or any_true(xp := self.xp, self.lent & (w != 0)):  # two steps were compared already
            return found
        for _ in range(3):
            again = self.along(w, start=0.618 * xp.max(found.step, axis=-1, keepdims=True))
            gap = xp.abs(again.value - found.value)
            off = gap > 10 * (found.error + again.error) + AGREES * found.usual
            if not any_true(xp, off):
                break
            noise = xp.maximum(self.noise, gap * xp.minimum(found.step, again.step))
            self.noise = xp.where(off, noise, self.noise)
            self.__dict__.pop("noisy", None)
            found = self.along(w)
        return found

    def _doubted(self, found: Estimate, w: Array) -> Estimate:
        """Hold what only steps far beyond the sizes of coordinates show against the noise so far away.

        Terms that cancel, as y does in y − F where T ignores it, grow with the step, and so does their rounding.
        """
        xp, beyond = self.xp, found.step > 1e3 * self.stencil.start(self.eps)
        if not any_true(xp, beyond):
            return found
        step = xp.max(found.step, axis=-1, keepdims=True)
        far = self.at(self.x + step * w)
        noise = noise_along(xp, lambda t: self.at(self.x + (1 + t) * step * w), far, self._rounding_of(far))
        more = xp.isfinite(noise) & (noise > self.noise) & beyond
        safe = xp.where(more, noise, xp.ones_like(noise))
        change, error = found.change * self.noise / safe, 3 * safe / found.step**self.stencil.order
        error = xp.where(more, xp.maximum(found.error, error), found.error)
        return found._replace(change=xp.where(more, change, found.change), error=error)

    def _relative_noise(self, rows: Array) -> Array:
        """Noise relative to what a step of each coordinate's own size changes, where it is small."""
        xp = self.xp
        ratio = xp.where(rows > 0, self.noise / divisor(xp, rows), 0 * rows)
        return xp.where(ratio < NOISE_SHOWN, ratio, 0 * ratio)

    def _short(self, ratio: Array) -> Array:
        """Step at which noise leaves five digits of some component: far below where truncation would be seen."""
        xp = self.xp
        ratio = xp.min(divisor(xp, ratio), axis=-1, keepdims=True)
        short = (1e6 * ratio) ** (1 / self.stencil.order)
        return xp.minimum(short, xp.full_like(short, self.stencil.start(self.eps)))

    def _agreed(self, w: Array, here: Array) -> Estimate:
        """Derivative along w; where zeros have the size of their leaf, one that a far shorter step agrees with.

        A step of many times the unit of a coordinate averages over what the function does within that unit, and does
        so smoothly. Unless the usual step is good for all of them, steps from such zeros begin short, and grow.
        """
        xp, found, first = self.xp, self.along(w), self.stencil.start(self.eps)
        if not any_true(xp, here & self.lent):
            return found
        alone = xp.where(self.lent, w, 0 * w)
        far = self.along(alone)
        near = self.along(alone, start=self._short(self._relative_noise(far.usual)))
        gap, level = xp.abs(far.value - near.value), far.error + near.error
        good = (gap <= 10 * level + AGREES * xp.abs(far.value)) & (xp.minimum(far.step, found.step) > SHRUNK * first)
        good = xp.all(good, axis=-1, keepdims=True)
        self.lent = self.lent & ~(here & good)
        if not any_true(xp, here & self.lent):
            return found
        rest = self.along(w - alone)
        both = Estimate(
            rest.value + near.value, rest.error + near.error, rest.step, rest.kink | near.kink,
            xp.maximum(rest.change, near.change), xp.maximum(rest.usual, near.usual),
        )  # fmt: skip
        return Estimate(*(xp.where(good, x, y) for x, y in zip(found, both, strict=True)))

    def accuracy(self, block: Block) -> float:
        """Relative error of a derivative, in the units of each component, where there is one."""
        xp = self.xp
        rows = block.rows
        if not self._scalar:  # what changes a value by less is zero beside it
            rows = xp.maximum(rows, self.eps**0.5 * xp.abs(self.middle))
        usable = (rows > 0) & xp.isfinite(rows) & block.shown & ~block.kink
        relative = xp.where(usable, block.error / xp.where(usable, rows, 1 + 0 * rows), 0 * rows)
        if 0 in relative.shape:
            return 0.0
        return float(xp.max(relative))

    def whole(self, by: str) -> Array:
        """A direction that moves every coordinate of y, or of θ."""
        here = self._inside(0, self.n) if by == "y" else self._inside(self.n, self.n + self.m)
        return self.xp.where(here, self._probe * self.size, 0 * self.size)

    def check(self, block: Block, by: str) -> None:
        """Raise where the function depends on y, or on θ, by less than its noise.

        Raises
        ------
        NoiseError
        """
        if block.moves and not block.visible:
            raise self.too_noisy(f"the derivative by {by} lies below the noise of {self.what}")

    def too_noisy(self, head: str) -> NoiseError:
        """Build the error for what lies below the noise."""
        level = float(self.xp.max(self.noise))
        if self.random:
            cause = f"{self.what} is not deterministic: called twice at one point, its values differ (dropout?)."
        elif self._single():
            cause = f"{self.what} returns single precision (float32), or computes in it."
        else:
            cause = "a large constant that is added, an inner tolerance, single precision or rounding inside of it."
        return NoiseError(
            f"{head} (about {level:.1g}).\nLikely cause: {cause}\n"
            "Next: give the derivatives (grad, hvp, jvp, vjp), or write the function so that autodiff takes it (with "
            "autograd.numpy, on NumPy)."
        )

    def _single(self) -> bool:
        """Whether the values at hand have no more than single precision."""
        values = self.middle
        return (
            is_double(self.eps)
            and not any_true(self.xp, self.xp.astype(self.xp.astype(values, self.xp.float32), values.dtype) != values)
            and any_true(self.xp, values != 0)
        )
