"""Derivatives as seen from outside: u'G' z for vectors u and z, by central differences of G along z.

Nothing is assumed of the size of y, θ or G, nor of the noise of G. Directions are without structure, each coordinate
in its own unit; a step is a part of that unit. A number is compared at one step first, which settles nearly all; where
it does not agree, at a ladder of steps, whose disagreement among each other tells what noise and truncation allow.

References
----------
C. J. F. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Adv. Eng. Softw. 4 (1982) 75-76.
DOI 10.1016/S0141-1195(82)80057-0 (a ladder of steps, and the error from its differences)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor, probe_vector
from implicitdiff.ravel import Raveler
from implicitdiff.tolerances import MISTAKE, is_double

__all__ = ["Along", "Gap", "draw", "measured", "settled", "units"]


_STEPS = {False: (2e-5, 2e-4, 2e-3, 2e-6, 2e-2, 2e-7, 0.1), True: (5e-3, 2e-2, 1e-3, 8e-2, 2e-4, 0.2)}
_STEPS_OF_VALUES = {False: (1e-4, 1e-3, 1e-5, 1e-2, 1e-6, 0.1), True: (3e-2, 8e-3, 0.1, 2e-3, 0.3)}
_STEPS_WITHOUT_UNIT = (1e-9, 1e-12, 1e2, 1e5)
"""More steps where a leaf is all zero: nothing says what is small there."""


def draw(xp: Any, like: Array, number: int) -> Array:
    """Return a vector without structure, the same in every item: entries of either sign, between 1/2 and 1."""
    import array_api_compat

    z = probe_vector(xp, like.shape[-1], like.dtype, array_api_compat.device(like))
    z = xp.sin((2 * number + 3) * (1 + 5 * z))
    return xp.where(z < 0, z / 2 - 0.5, z / 2 + 0.5) + xp.zeros_like(like)


def units(xp: Any, raveler: Raveler, vector: Array) -> tuple[Array, bool]:
    """Return |x_i|, and 1 where a leaf is all zero; and whether none is.

    A zero among others says nothing of its unit, and is not moved: a step that is too large sees something else.
    """
    known, parts = True, []
    for part in raveler.parts(xp.abs(vector)):
        if part.shape[-1]:
            zero = xp.max(part, axis=-1, keepdims=True) == 0
            known = known and not bool(xp.any(zero))
            parts.append(xp.where(zero, xp.ones_like(part), part))
    if not parts:
        return xp.zeros_like(vector), True
    return (parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)), known


class Along:
    """Changes of G along a direction (dy, dθ), at several steps.

    Parameters
    ----------
    xp : module
        Array namespace of all of this.
    function : callable
        G on vectors; with ``scalar`` it is f, and G = ∇f.
    y, theta : array
        The point.
    dy, dtheta : array or None
        The direction, in the units of y and θ; None stands for zeros.
    scalar : array or None
        Units of y, where only values of f are known.
    known : bool
        Whether the units are known.
    width : int, optional
        Number of entries of G, where it is not that of y.
    beside : Along, optional
        The same along a direction without structure, where the terms of this one may cancel.
    """

    def __init__(
        self, xp: Any, function: Callable[[Array, Array], Array], y: Array, theta: Array, dy: Array | None,
        dtheta: Array | None, *, scalar: Array | None = None, known: bool = True, width: int | None = None,
        beside: Along | None = None,
    ) -> None:  # fmt: skip
        self.xp, self.function, self.y, self.theta = xp, function, y, theta
        self.dy, self.dtheta, self.scalar, self.beside = dy, dtheta, scalar, beside
        self._nowhere = float("nan") * (y[..., :width] if scalar is None else y[..., 0])
        self.eps = float(xp.finfo(y.dtype).eps)
        steps = (_STEPS if scalar is None else _STEPS_OF_VALUES)[not is_double(self.eps)]
        self.steps: tuple[float, ...] = steps if known else (*steps, *_STEPS_WITHOUT_UNIT)
        self._changes: dict[int, Array] = {}

    def _at(self, h: float, u: Array | None = None, k: float = 0.0) -> Array:
        y, theta = self.y, self.theta
        y = y if self.dy is None or not h else y + h * self.dy
        theta = theta if self.dtheta is None or not h else theta + h * self.dtheta
        y = y if u is None else y + k * u
        try:
            found = self.function(y, theta)
        except Exception:  # outside of where it is defined: nothing is seen there
            return self._nowhere
        return self.xp.asarray(found, copy=True)  # it may be a buffer that the next call fills again

    def change(self, i: int) -> Array:
        """[G(+) − G(−)] / 2h at step i."""
        if i not in self._changes:
            h = self.steps[i]
            self._changes[i] = (self._at(h) - self._at(-h)) / (2 * h)
        return self._changes[i]

    def seen(self, u: Array, i: int) -> Array:
        """u'[G(+) − G(−)] / 2h, per item."""
        if self.scalar is None:
            return self.xp.vecdot(u, self.change(i))
        xp, h = self.xp, self.steps[i]
        ratio = xp.max(xp.abs(u) / xp.where(self.scalar > 0, self.scalar, xp.ones_like(u)), axis=-1)
        safe = divisor(xp, ratio)
        v = u / safe[..., None]
        above, below = (self._at(s, v, h) - self._at(s, v, -h) for s in (h, -h))
        return ratio * (above - below) / (4 * h * h)

    def jump(self, u: Array, i: int, j: int) -> Array:
        """How far the derivatives to both sides are apart: the jump at a kink, and nothing where G is smooth.

        There the sides differ in proportion to the step, which two steps i and j tell.
        """
        if self.scalar is not None:
            return 0 * self.xp.vecdot(u, u)
        middle, h, k = self._at(0.0), self.steps[i], self.steps[j]
        bends = [self.xp.vecdot(u, (self._at(s) - 2 * middle + self._at(-s)) / s) for s in (h, k)]
        return self.xp.abs(h * bends[1] - k * bends[0]) / (h - k)

    def rounding(self, u: Array) -> Array:
        """How much of u'G is rounding, where G is not zero: below it, G does not change at all."""
        if self.scalar is not None:
            return 0 * self.xp.vecdot(u, u)
        return self.eps * self.xp.vecdot(self.xp.abs(u), self.xp.abs(self._at(0.0)))

    def floor(self, u: Array) -> Array:
        """What rounding of a product may come to."""
        if self.scalar is not None:
            return 0 * self.xp.vecdot(u, u)
        change = self.xp.abs(self.change(0))
        change = change if self.beside is None else self.xp.maximum(change, self.xp.abs(self.beside.change(0)))
        return 50 * self.eps * self.xp.vecdot(self.xp.abs(u), change)


class Gap(NamedTuple):
    """How a number compares with differences, per item."""

    found: Array
    seen: Array
    """By differences, at the step where they are steadiest."""
    difference: Array
    """Relative."""
    allowed: Array
    """Relative: the tolerance, and what noise and truncation explain."""

    @property
    def bad(self) -> Array:
        """Items in which they differ, and are known well enough to say so."""
        return self.difference > self.allowed  # False where either is NaN


def _size(xp: Any, found: Array, seen: Array, shift: Array | None) -> Array:
    """Size of what is compared; with F = y − T that of F, where it is smaller."""
    size = xp.maximum(xp.abs(found), xp.abs(seen))
    if shift is None:
        return size
    rest = xp.maximum(xp.abs(shift - found), xp.abs(shift - seen))
    return xp.where(rest < size, rest, size)


def settled(found: Array, along: Along, u: Array, shift: Array | None = None) -> bool:
    """Whether a number agrees with differences at some step, in every item; or is not finite, which others tell."""
    xp = along.xp
    fine = ~xp.isfinite(found)
    for i in range(len(along.steps)):
        seen = along.seen(u, i)
        fine = fine | (xp.abs(found - seen) <= 0.1 * MISTAKE * _size(xp, found, seen, shift))
        if bool(xp.all(fine)):
            return True
    return False


def measured(found: Array, along: Along, u: Array, shift: Array | None = None) -> Gap:
    """Compare a number with differences at all steps."""
    xp = along.xp
    order = sorted(range(len(along.steps)), key=lambda i: along.steps[i])
    seen = [along.seen(u, i) for i in order]
    huge = xp.full_like(found, float("inf"))
    best, value, at = huge, xp.full_like(found, float("nan")), xp.full_like(found, float("nan"))
    # In the smallest steps noise prevails. That of G itself is their disagreement times the step, and no step does
    # better than it lets it, even if neighbours happen to agree.
    noise = xp.maximum(*(xp.abs(seen[k] - seen[k + 1]) * along.steps[order[k]] for k in (0, 1)))
    noise = xp.maximum(noise, along.rounding(u))
    for k in range(1, len(order) - 1):
        error = xp.maximum(xp.abs(seen[k] - seen[k - 1]), xp.abs(seen[k] - seen[k + 1]))
        error = xp.maximum(error, noise / along.steps[order[k]])
        better = error < best  # False for NaN
        best, value = xp.where(better, error, best), xp.where(better, seen[k], value)
        at = xp.where(better, xp.full_like(at, float(k)), at)
    jump = xp.zeros_like(found)
    for k in range(1, len(order) - 1):
        here = at == k
        if bool(xp.any(here)):
            jump = xp.where(here, along.jump(u, order[k], order[k - 1]), jump)
    size = _size(xp, found, value, shift)
    safe = divisor(xp, size)
    unknown = 10 * best + jump + along.floor(u)
    return Gap(found, value, xp.abs(found - value) / safe, MISTAKE + unknown / safe)
