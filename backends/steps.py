"""Central differences whose step is found: from the noise, from what two steps disagree by, and shorter at a kink.

A derivative along a direction w is taken from the values at x ± a w and x ± 2 a w, by the formulas of fourth order.
The same values say how good it is. With ε the noise of a value,

    noise        about ε/a (or ε/a² for a second derivative),
    truncation   from q, by which the formulas of second order at a and at 2 a disagree, and by which the slopes to
                 both sides do beyond their curvature; extrapolation takes (nearly) q of q away where q is small.

The formulas of eighth order, from x ± 3 a w and x ± 4 a w beside, do the same with those of fourth order in place of
the second. Their steps are longer, and what noise is left of a smooth function is a tenth or less: so that the change
from the ones to the others is the error of the ones.

Where neither is small against the derivative, a is made larger or smaller, by what the balance of the two asks
for. A smooth function has q ~ a²; where q stays as a shrinks, there is a kink or a jump at the point itself, and no
derivative. A kink merely near by is out of reach of the shorter steps.

References
----------
P. E. Gill, W. Murray, M. A. Saunders, M. H. Wright, "Computing forward-difference intervals for numerical
optimization", SIAM J. Sci. Stat. Comput. 4 (1983) 310-321. DOI 10.1137/0904025
J. J. Moré, S. M. Wild, "Estimating derivatives of noisy simulations", ACM Trans. Math. Softw. 38 (2012) 19.
DOI 10.1145/2168773.2168777
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor
from implicitdiff.tolerances import AIM, AIM_OF_FINE, CAUTION, KINK, REFINED, VISIBLE

__all__ = ["FIRST", "SECOND", "Block", "Estimate", "Plan", "Stencil", "search"]

ROUNDS = 24
"""Steps that are tried at most."""


class Sample(NamedTuple):
    """What one step says, per component."""

    value: Array
    noise: Array
    spread: Array
    """What the formulas of second order disagree by, beyond noise."""
    change: Array
    """How far the values move, in units of the noise."""
    rate: Array
    """And relative to the step."""


@dataclass(frozen=True)
class Stencil:
    """Formulas for the first or the second derivative, of fourth order on values at −2a … 2a, or of eighth at −4a … 4a.

    ``stretch`` is a factor of every step, for differences that share no rounding with those at a stretch of one.
    """

    order: int
    stretch: float = 1.0
    degree: int = 4
    """Order of the formulas."""

    @property
    def power(self) -> int:
        """Power of the step by which truncation gains on noise."""
        return self.degree + self.order

    @property
    def accuracy(self) -> float:
        """Power of the noise that the error comes to."""
        return self.degree / self.power

    @property
    def aim(self) -> float:
        """Relative error at which no other step is tried."""
        return AIM if self.degree == 4 else AIM_OF_FINE

    @property
    def caution(self) -> float:
        """Factor of truncation, of which the more is to be feared the higher its order."""
        return 1.0 if self.degree == 4 else CAUTION

    def start(self, noise: Any) -> Any:
        """Return the step that balances truncation against a relative noise."""
        return noise ** (1 / self.power)

    def sample(
        self, xp: Any, at: Callable[[Array], Array], middle: Array, noise: Array, a: Array, rounded: Any = 1.0
    ) -> Sample:
        """Evaluate at the points; ``rounded`` is 0 where the argument is not rounded: at zero a step is exact."""
        pairs = [(at(k * a), at(-k * a)) for k in range(1, self.degree // 2 + 1)]
        eps = float(xp.finfo(middle.dtype).eps)
        largest = xp.max(xp.stack([xp.abs(value) for pair in pairs for value in pair]), axis=0)
        noise = xp.maximum(noise, 0.5 * eps * largest)
        odd = [f - g for f, g in pairs]
        even = [(f - middle) + (g - middle) for f, g in pairs]
        safe, unit, formulas = divisor(xp, noise), noise / a**self.order, _FORMULAS[self.degree, self.order]
        value = formulas.value(odd if self.order == 1 else even) / a**self.order
        if self.order == 1:
            unit = xp.maximum(unit, 0.5 * eps * rounded * xp.abs(value) / a)  # x itself is rounded, too
        uneven = xp.abs(formulas.uneven(odd if self.order == 1 else even)) / a**self.order
        bent = xp.abs(formulas.bent(even if self.order == 1 else odd)) / a**self.order
        level = formulas.bent_noise * unit
        if self.order == 2:  # a smooth function is as skew as that at a step only that is too long
            level = xp.maximum(0.1 * xp.abs(value), level)
        spread = xp.maximum(_above(xp, uneven, formulas.uneven_noise * unit), _above(xp, bent, level))
        f2, g2 = pairs[1]
        sides = (f2 - middle, g2 - middle) if self.order == 1 else (even[0], even[1])
        moved = xp.maximum(*map(xp.abs, sides))
        return Sample(value, formulas.noise * unit, spread, moved / safe, moved / (2 * a) ** self.order)


class _Formulas(NamedTuple):
    """Sums of odd differences f(ka) − f(−ka), or of even ones, f(ka) + f(−ka) − 2 f(0), over a or a².

    ``uneven`` is what two formulas of the order below disagree by, at a and at 2a; ``bent`` what is left of the
    differences of the other parity, beside their leading terms: a kink. With each, what noise makes of it at most.
    """

    value: Callable[[list[Array]], Array]
    noise: float
    uneven: Callable[[list[Array]], Array]
    uneven_noise: float
    bent: Callable[[list[Array]], Array]
    bent_noise: float


def _combined(*weights: float) -> Callable[[list[Array]], Array]:
    """A sum with weights; one of a few terms, as the rest may be zero."""

    def total(terms: list[Array]) -> Array:
        found = weights[0] * terms[0]
        for weight, term in zip(weights[1:], terms[1:], strict=True):
            found = found + weight * term if weight else found
        return found

    return total


_FORMULAS = {
    (4, 1): _Formulas(
        _combined(2 / 3, -1 / 12), 3, _combined(1 / 2, -1 / 4), 3.2, _combined(-2, 1 / 2), 17,
    ),
    (4, 2): _Formulas(
        _combined(4 / 3, -1 / 12), 9, _combined(1, -1 / 4), 9, _combined(-2, 1), 13,
    ),
    (8, 1): _Formulas(
        _combined(4 / 5, -1 / 5, 4 / 105, -1 / 280), 4.2, _combined(2 / 3, -5 / 12, 0, 1 / 24), 4.8,
        _combined(16 / 7, -5 / 7, 0, 1 / 28), 20,
    ),
    (8, 2): _Formulas(
        _combined(8 / 5, -1 / 5, 8 / 315, -1 / 560), 12, _combined(4 / 3, -5 / 12, 0, 1 / 48), 13,
        _combined(4, -5 / 2, 0, 1 / 4), 29,
    ),
}  # fmt: skip
"""By the order of the formulas and of the derivative.

B. Fornberg, "Generation of finite difference formulas on arbitrarily spaced grids", Math. Comp. 51 (1988) 699-706.
DOI 10.1090/S0025-5718-1988-0935077-0 (their weights)
"""


def _visible_rate(xp: Any, sample: Sample) -> Array:
    return xp.where(sample.change > VISIBLE, sample.rate, xp.full_like(sample.rate, float("inf")))


def _above(xp: Any, x: Array, level: Array) -> Array:
    """What stands above the noise, and zero for what does not."""
    return xp.where(x <= level, xp.zeros_like(x), x)


FIRST, SECOND = Stencil(1), Stencil(2)


class Plan(NamedTuple):
    """How to look for a step; arrays of shape (*items, components), or of that with one component for all.

    ``start`` is the first step, ``natural`` the longest that is taken where the function does not change at all;
    ``rows`` are sizes of the derivative that are usual, an error of ``floor`` of which is small, as one of
    ``tolerance`` of the derivative itself is.
    """

    start: Array
    natural: Array
    rows: Array
    tolerance: Any
    floor: Any
    separate: bool = False
    """Whether every component is a function of its own, with a step of its own."""
    rounded: Any = 1.0
    """Of `Stencil.sample`."""
    reach: Any = 1e6
    """How many natural lengths a step may come to at most."""
    caution: float = 1.0
    """Factor of what is said of truncation: a step somewhat too short costs little, and one too long much."""


class Estimate(NamedTuple):
    """A derivative with its error, per component."""

    value: Array
    error: Array
    step: Array
    kink: Array
    """Whether it is not one: the slopes to both sides differ however near one looks."""
    change: Array
    """How far the values moved, in units of the noise."""
    usual: Array
    """A size that such a derivative might have."""


class Block(NamedTuple):
    """What is known of the derivatives by y, or by θ."""

    rows: Array
    """Their usual size, for a step of each coordinate's own size."""
    error: Array
    """And their error."""
    start: Array
    """Step to begin with."""
    short: Array
    """That of a zero whose size is that of its leaf, and may be far too long for it."""
    tolerance: Array
    """Relative error of a derivative that is within reach."""
    moves: bool
    """Whether the function depends on them at all, by more than rounding."""
    visible: bool
    """Whether it shows above the noise that it does."""
    shown: Array
    """Which components show it."""
    kink: Array
    """Which of them have no derivative."""

    def cleaned(self, xp: Any, found: Estimate) -> Array:
        """Derivatives, with a zero for what is noise of a component that does not move above it at all.

        Scaled up, a row of noise would look like any other; a row of zeros makes a system singular, which is told.
        """
        noise = ~self.shown & (xp.abs(found.value) <= 3 * found.error)
        return xp.where(noise, xp.zeros_like(found.value), found.value)


class _Search(NamedTuple):
    best: Sample
    error: Array
    step: Array
    low: Array
    at_low: Sample
    error_low: Array
    """Truncation at the shortest step."""
    high: Array
    at_high: Sample
    error_high: Array
    stuck: Array
    change: Array
    rate: Array


Function = Callable[[Array, Array], Array]


def search(xp: Any, stencil: Stencil, function: Function, middle: Array, noise: Array, plan: Plan) -> Estimate:
    """Find a derivative of a -> function at a = 0.

    Parameters
    ----------
    function : callable
        ``(a, wanted) -> values (*items, components)``; components that are not wanted may be anything.
    middle, noise : array
        The value at 0, and its noise.
    plan : Plan
    """

    def look(a: Array, wanted: Array) -> Sample:
        return stencil.sample(xp, lambda t: function(t, wanted), middle, noise, a * stencil.stretch, plan.rounded)

    plan = plan._replace(caution=stencil.caution)
    yes = xp.ones_like(middle) > 0
    a = plan.start + xp.zeros_like(middle)
    first = look(a, yes)
    truncation = _truncation(xp, first, plan)
    s = _Search(
        first, _finite(xp, first.noise + truncation), a, a, first, truncation, a, first, truncation, ~yes, first.change,
        _visible_rate(xp, first),
    )  # fmt: skip
    for _ in range(ROUNDS):
        grow, shrink = _wishes(xp, s, stencil, plan)
        if not any_true(xp, grow | shrink):
            break
        a = xp.where(shrink, s.low * _shorter(xp, s, stencil, plan), s.high)
        a = xp.where(grow & ~shrink, _longer(xp, s, stencil, plan), a)
        s = _after(xp, s, look(a, grow | shrink), a, grow & ~shrink, shrink, plan)
    size = _weights(xp, s.best.value, plan)
    # an extreme point has no slope to hold an error against: what it moves by at the first step is one
    kink = s.stuck & (s.best.spread > s.best.noise) & (s.error > REFINED * size) & (s.best.spread > KINK * first.rate)
    rate = xp.where(xp.isfinite(s.rate) & (size <= s.error), s.rate, 0 * size)
    return Estimate(s.best.value, s.error, s.step, kink, s.change, xp.maximum(size + _zero(xp, s.error), rate))


def _finite(xp: Any, x: Array) -> Array:
    return xp.where(xp.isfinite(x), x, xp.full_like(x, float("inf")))


def _zero(xp: Any, x: Array) -> Array:
    return xp.where(xp.isfinite(x), x, xp.zeros_like(x))


def _weights(xp: Any, value: Array, plan: Plan) -> Array:
    """Sizes that errors are held against: of each derivative, or of its column where that is larger in its row."""
    size = xp.abs(value)
    size = xp.where(xp.isfinite(size), size, xp.zeros_like(size))
    if plan.separate:
        return size
    known = (plan.rows > 0) & (plan.tolerance < 1)  # the size of a row that is all noise is none
    rows = xp.where(known, plan.rows, xp.ones_like(plan.rows))
    share = xp.max(xp.where(known, size / rows, xp.zeros_like(size)), axis=-1, keepdims=True)
    return xp.maximum(size, share * plan.rows)


def _truncation(xp: Any, sample: Sample, plan: Plan) -> Array:
    """What extrapolation leaves of the spread q: about q², and of longer steps some times that."""
    size = _weights(xp, sample.value, plan)
    small = sample.spread < 0.1 * size
    left = plan.caution * sample.spread * (sample.spread / xp.where(small, size, xp.ones_like(size)))
    return xp.where(small, xp.minimum(left, sample.spread), sample.spread)


def _wishes(xp: Any, s: _Search, stencil: Stencil, plan: Plan) -> tuple[Array, Array]:
    """Whether a longer or a shorter step may do better."""
    size = _weights(xp, s.best.value, plan)
    bad = ~((s.error <= plan.tolerance * size) | (s.error <= plan.floor * plan.rows))
    grow = bad & (s.at_high.noise >= s.error_high)
    shrink = bad & ~(s.at_low.noise >= s.error_low)
    # beyond its natural length a step goes where there is something to see, and more of it
    further = (xp.abs(s.best.value) > s.error) & (s.error > REFINED * size)
    if stencil.order == 1:
        further = further | ((s.change > 0) & (s.change < 100))
    if not plan.separate:
        grow, shrink = xp.any(grow, axis=-1, keepdims=True), xp.any(shrink, axis=-1, keepdims=True)
        further = xp.any(further, axis=-1, keepdims=True)
    far = s.high < plan.reach * plan.natural
    grow = grow & ((s.high < 0.9 * plan.natural) | (further & far))
    shape = s.step.shape
    return xp.broadcast_to(grow, shape), xp.broadcast_to(shrink, shape)


def _shorter(xp: Any, s: _Search, stencil: Stencil, plan: Plan) -> Array:
    """Factor by which truncation meets noise: between 1/30 and 1/4."""
    safe = xp.where(s.error_low > 0, s.error_low, xp.ones_like(s.error_low))
    ratio = xp.where(s.error_low > s.at_low.noise, s.at_low.noise / safe, xp.ones_like(safe))
    factor = xp.where(xp.isfinite(ratio), ratio, 0 * safe) ** (1 / stencil.power)
    factor = xp.minimum(xp.maximum(factor, xp.full_like(factor, 1 / 30)), xp.full_like(factor, 0.25))
    return factor if plan.separate else xp.min(factor, axis=-1, keepdims=True) + 0 * factor


def _longer(xp: Any, s: _Search, stencil: Stencil, plan: Plan) -> Array:
    """Step at which noise is small enough, or meets truncation; carefully beyond what is natural."""
    size = _weights(xp, s.best.value, plan)
    noise, error = s.at_high.noise, s.error_high
    enough = xp.where(size > 0, noise / xp.where(size > 0, plan.tolerance * size, xp.ones_like(size)), 1e30 + 0 * size)
    wanted = 1.5 * enough ** (1 / stencil.order)
    meeting = (noise / divisor(xp, error)) ** (1 / stencil.power)
    factor = xp.where(error > 0, xp.minimum(wanted, meeting), wanted)
    factor = xp.minimum(xp.maximum(factor, xp.full_like(factor, 3.0)), xp.full_like(factor, 1e3))
    if not plan.separate:
        factor = xp.max(factor, axis=-1, keepdims=True) + 0 * factor
    below = s.high < 0.9 * plan.natural
    longer = s.high * xp.where(below, factor, xp.minimum(factor, xp.full_like(factor, 10.0)))
    return xp.where(below, xp.minimum(longer, plan.natural + 0 * longer), longer)


def _after(xp: Any, s: _Search, new: Sample, a: Array, grow: Array, shrink: Array, plan: Plan) -> _Search:
    """Keep the better of two estimates, component by component."""
    grow, shrink = grow & (a > 0), shrink & (a > 0)
    lasting = shrink & (new.spread > 0.3 * s.at_low.spread) & (new.spread > 0)  # of a smooth function it is a² / 16
    truncation = xp.where(lasting, new.spread, _truncation(xp, new, plan))
    known = xp.where(lasting, xp.maximum(s.error, s.best.spread), s.error)  # which took it for smooth
    error = _finite(xp, new.noise + truncation)
    blind = shrink & (6 * new.noise >= s.at_low.spread)  # noise hides what the two formulas disagreed by
    error = xp.where(blind, xp.maximum(error, s.at_low.spread), error)
    better = (grow | shrink) & ~blind & (error < known)

    def pick(mask: Array, x: Array, y: Array) -> Array:
        return xp.where(mask, x, y)

    def choose(mask: Array, x: Sample, y: Sample) -> Sample:
        return Sample(*(pick(mask, p, q) for p, q in zip(x, y, strict=True)))

    change = xp.where(grow | shrink, xp.maximum(s.change, new.change), s.change)
    return _Search(
        choose(better, new, s.best), pick(better, error, known), pick(better, a, s.step),
        pick(shrink, a, s.low), choose(shrink, new, s.at_low), pick(shrink, truncation, s.error_low),
        pick(grow, a, s.high), choose(grow, new, s.at_high), pick(grow, truncation, s.error_high),
        pick(shrink & ~blind, lasting, s.stuck), change,
        xp.where(grow | shrink, xp.minimum(s.rate, _visible_rate(xp, new)), s.rate),
    )  # fmt: skip
