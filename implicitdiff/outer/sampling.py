"""Batches of samples by counting: which ones step t draws is a function of the seed and of t alone.

Nothing is kept from one draw to the next, so that a loop goes on bit for bit from a saved state, within a compiled
program as out of it. The numbers are made by integer arithmetic modulo 2³², which is the same in every framework: so
are the batches. Each word (the seed, which of several draws, the step, the place in the batch) is mixed into those
before it by the last steps of MurmurHash3 (A. Appleby, 2011, public domain), after which any change of a bit changes
every other bit by even chance.
"""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array

__all__ = ["drawn"]

FIRST, SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32
"""Multipliers of MurmurHash3, as signed numbers of 32 bits."""
APART = 0x9E3779B9 - 2**32
"""2³² over the golden ratio: words that follow one another are put far apart."""
POSITIVE = 0x7FFFFFFF


def _mixed(x: Array) -> Array:
    """Let every bit depend on every other; a shift of signed numbers is masked, since it repeats the sign."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * FIRST
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def drawn(xp: Any, device: Any, seed: int, stream: int, step: Any, size: int, below: int) -> Array:
    """Return `size` integers that are drawn evenly and independently from 0 … below - 1.

    Parameters
    ----------
    xp, device
        Of the array.
    seed, stream : int
        What tells draws at the same step apart.
    step : 0-d array of int
    size, below : int
        Below 2³¹.

    Returns
    -------
    array of int, shape (size,)
    """
    place = xp.arange(size, dtype=xp.int32, device=device)
    x = xp.zeros_like(place)  # of one axis throughout: a scalar of NumPy would warn when it overflows
    for word in (seed, stream, x + xp.astype(xp.asarray(step), xp.int32), place):
        x = _mixed((x + APART) ^ word)
    return (x & POSITIVE) % below
