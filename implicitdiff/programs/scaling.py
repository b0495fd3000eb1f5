"""Powers of two that bring programs to the scale one."""

from __future__ import annotations

import numpy as np

from implicitdiff.programs.program import Numbers, Program

__all__ = ["Scaling"]


class Scaling:
    """y = σ D ỹ, rows times E, f over c: columns of one unit, rows of norm one, right-hand sides and slopes of one.

    Parameters
    ----------
    given : Program
        A batch; there are no infinities in it.
    size : array, shape (items,), optional
        σ, where it is known; else it comes from the data.

    Attributes
    ----------
    program : Program
        At the scale one.
    """

    def __init__(self, given: Program, size: Numbers | None = None) -> None:
        Q, q, K, r, p = given
        diagonal = np.sqrt(np.abs(np.diagonal(Q, axis1=-2, axis2=-1)))
        steep = np.max(np.abs(K), axis=-2, initial=0.0)
        self.d = _inverse(np.where(diagonal > 0, diagonal, steep))
        K = K * self.d[..., None, :]
        self.e = _inverse(np.sqrt((K * K).sum(axis=-1)))
        K, r = K * self.e[..., None], r * self.e
        Q, q = Q * self.d[..., None, :] * self.d[..., None], q * self.d
        if size is None:
            size = _size(Q, q, r, p)
        self.sigma = _power(size)[..., None]
        curved = self.sigma[..., 0] * np.max(np.abs(Q), axis=(-2, -1), initial=0.0)
        self.c = _power(np.maximum(curved, np.max(np.abs(q), axis=-1, initial=0.0)))[..., None]
        self.program = Program(Q * (self.sigma / self.c)[..., None], q / self.c, K, r / self.sigma, p)

    def solution(self, y: Numbers) -> Numbers:
        """Return y in the units of the program."""
        return self.sigma * self.d * y

    def multipliers(self, z: Numbers) -> Numbers:
        """Return multipliers in its units."""
        return self.c * self.e * z


def _size(Q: Numbers, q: Numbers, r: Numbers, p: int) -> Numbers:
    """What y has to be away from zero for: equalities, inequalities that zero violates, the slope."""
    curved = np.any(Q, axis=(-2, -1))
    slope = np.where(curved, np.max(np.abs(q), axis=-1, initial=0.0), 0.0)
    away = np.maximum(np.max(np.abs(r[..., :p]), axis=-1, initial=0.0), np.max(-r[..., p:], axis=-1, initial=0.0))
    # too small a unit is no harm: Clarabel's tolerances are relative for what is large
    least = np.min(np.where(r != 0, np.abs(r), np.inf), axis=-1, initial=np.inf)
    size = np.maximum(away, slope)
    return np.where(size > 0, size, np.where(np.isfinite(least), least, 0.0))


def _power(x: Numbers) -> Numbers:
    """x to the next power of two; 1 where it is zero."""
    found: Numbers = 2.0 ** np.round(np.log2(np.where(x > 0, x, 1.0)))
    return found


def _inverse(x: Numbers) -> Numbers:
    return 1.0 / _power(x)
