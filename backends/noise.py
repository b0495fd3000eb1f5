"""The noise of a computed function: rounding, a tolerance inside, single precision, random numbers.

References
----------
J. J. Moré, S. M. Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33 (2011) 1292-1314.
DOI 10.1137/100786125
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from implicitdiff.arrays import Array, any_true, divisor
from implicitdiff.tolerances import RESTLESS

__all__ = ["difference_table", "noise_along", "noise_within"]

POINTS = 8
"""Values; the table then has rows up to the seventh difference."""

SPACINGS = (1e-6, 1e-4, 1e-2)
"""Relative distance between them. A function that is rounded to a few digits shows its noise at a larger one only."""


SHORTER = (1e-9, 1e-12, 1e-15)
"""Where it has to be told from a function that does many things within the first of these."""


def difference_table(xp: Any, values: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Estimate the standard deviation of the noise of equally spaced values, per component.

    Differences of order k take a smooth function away, and the noise stays: scaled by γ_k = (k!)²/(2k)!, its mean
    square is σ² in every row. The first row counts whose differences change sign and whose estimate agrees with
    those of the two next rows up to a factor of four; where there is none, the smallest estimate does.

    Returns
    -------
    noise : array
        One standard deviation per component.
    seen : array of bool
        Whether the values were far enough apart: fewer than half of them equal to their neighbour.
    sure : array of bool
        Whether there was such a row: a smooth function, or one with a kink, has none.
    """
    middle = values[0]
    size = xp.max(xp.abs(xp.stack([v - middle for v in values])), axis=0)
    scale = divisor(xp, size)
    row = [(v - middle) / scale for v in values]
    sigmas, mixed = [], []
    for k in range(1, len(values)):
        row = [b - a for a, b in itertools.pairwise(row)]
        table = xp.stack(row)
        if k == 1:
            seen = 2 * xp.sum(xp.astype(table == 0, middle.dtype), axis=0) < table.shape[0]
        gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
        sigmas.append(xp.sqrt(gamma * xp.mean(table * table, axis=0)))
        mixed.append((xp.min(table, axis=0) < 0) & (xp.max(table, axis=0) > 0))
    noise = sigmas[2]
    for sigma in sigmas[3:]:
        noise = xp.minimum(noise, sigma)
    sure = size < 0
    for k in range(len(sigmas) - 3, -1, -1):
        three = xp.stack(sigmas[k : k + 3])
        agree = mixed[k] & (xp.max(three, axis=0) <= 4 * xp.min(three, axis=0))
        noise, sure = xp.where(agree, sigmas[k], noise), sure | agree
    return noise * scale, seen, sure


def noise_along(xp: Any, function: Callable[[float], Array], middle: Array, least: Array) -> Array:
    """Noise of t -> function(t) near t = 0, per component, at least ``least``.

    Parameters
    ----------
    function : callable
        Along a direction that moves every coordinate relative to its size.
    middle : array
        Its value at 0.
    least : array
        What the arithmetic makes anyhow, and what counts where the values say nothing.
    """
    noise, wanted, flat, before = least, xp.ones_like(least) > 0, least < 0, 0.0
    for spacing in SPACINGS:
        values = [function(spacing * (j + 1)) for j in range(POINTS)]  # beside the point, which may be a jump
        found, seen, sure = difference_table(xp, values)
        # what a smooth function changes by was not there at the last distance: it is rounded, in steps of that or more
        step = xp.abs(values[-1] - values[0]) * (before / spacing / POINTS)
        found = xp.where(flat & (step > 10 * least), xp.maximum(found, 0.3 * step), found)
        flat, before = ~seen, spacing
        usable = wanted & xp.isfinite(found) & (sure | (spacing == SPACINGS[0]))
        # a jump between values that are equal was noise, even if later ones are apart by so many jumps each
        noise = xp.where(usable, xp.maximum(found, noise), noise)
        wanted = wanted & ~seen & xp.isfinite(found)
        if not any_true(xp, wanted):
            break
    return noise


def noise_within(
    xp: Any,
    along: Callable[[float], Array],
    without: Callable[[float], Array],
    middle: Array,
    least: Array,
    noise: Array,
) -> Array:
    """Noise of t -> along(t), given what was seen of it, where that may be what a function does within the distances.

    It is looked at where those coordinates rest of which the unit is not known (``without`` them), and at ever shorter
    distances, at which a function is smooth, and noise is not.
    """

    def smaller(function: Callable[[float], Array], spacing: float, noise: Array) -> Array:
        found, seen, _ = difference_table(xp, [function(spacing * (j + 1)) for j in range(POINTS)])
        return xp.where(seen & (found < noise), xp.maximum(found, least), noise)

    noise = smaller(without, SPACINGS[0], noise)
    if any_true(xp, noise > RESTLESS * xp.abs(along(POINTS * SPACINGS[0]) - middle)):
        for spacing in SHORTER:
            noise = smaller(along, spacing, noise)
    return noise
