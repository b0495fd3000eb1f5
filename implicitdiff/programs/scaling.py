"""Powers of two that bring programs to the scale one."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff.programs.program import Numbers, Program, is_sparse

__all__ = ["Scaling"]


class Scaling:
    """y = σ D ỹ, rows times E, f over c: columns of one unit, rows of norm one, right-hand sides and slopes of one.

    Parameters
    ----------
    given : Program
        Without infinities.
    size : array, shape (items,) or (), optional
        σ, where it is known; else it comes from the data.

    Attributes
    ----------
    program : Program
        At the scale one.
    """

    def __init__(self, given: Program, size: Numbers | None = None) -> None:
        Q, q, K, r, p = given
        diagonal = np.sqrt(np.abs(Q.diagonal() if is_sparse(Q) else np.diagonal(Q, axis1=-2, axis2=-1)))
        self.d = _inverse(np.where(diagonal > 0, diagonal, _column_sizes(K)))
        K = _scaled(K, np.ones_like(r), self.d)
        self.e = _inverse(np.sqrt((K * K).sum(axis=-1)))
        K, r = _scaled(K, self.e, np.ones_like(q)), r * self.e
        Q, q = _scaled(Q, self.d, self.d), q * self.d
        curvature = abs(Q).max() if is_sparse(Q) else np.max(np.abs(Q), axis=(-2, -1), initial=0.0)
        if size is None:
            size = _size(curvature > 0, q, r, p)
        self.sigma = _power(size)[..., None]
        self.c = _power(np.maximum(self.sigma[..., 0] * curvature, np.max(np.abs(q), axis=-1, initial=0.0)))[..., None]
        f = self.sigma / self.c
        self.program = Program(Q * (f[0] if is_sparse(Q) else f[..., None]), q / self.c, K, r / self.sigma, p)

    def solution(self, y: Numbers) -> Numbers:
        """Return y in the units of the program."""
        return self.sigma * self.d * y

    def multipliers(self, z: Numbers) -> Numbers:
        """Return multipliers in its units."""
        return self.c * self.e * z


def _scaled(M: Any, rows: Numbers, columns: Numbers) -> Any:
    """Return a matrix with scaled rows and columns."""
    if is_sparse(M):
        return M.multiply(rows[:, None]).multiply(columns).tocsc()
    return M * rows[..., None] * columns[..., None, :]


def _column_sizes(K: Any) -> Numbers:
    """Largest entry of each column."""
    if is_sparse(K):
        return abs(K).max(axis=0).toarray().ravel() if K.shape[0] else np.zeros(K.shape[1])
    found: Numbers = np.max(np.abs(K), axis=-2, initial=0.0)
    return found


def _size(curved: Numbers, q: Numbers, r: Numbers, p: int) -> Numbers:
    """What y has to be away from zero for: equalities, inequalities that zero violates, the slope."""
    slope = np.where(curved, np.max(np.abs(q), axis=-1, initial=0.0), 0.0)
    away = np.maximum(np.max(np.abs(r[..., :p]), axis=-1, initial=0.0), np.max(-r[..., p:], axis=-1, initial=0.0))
    # too small a unit is no harm: Clarabel's tolerances are relative for what is large
    least = np.min(np.where(r != 0, np.abs(r), np.inf), axis=-1, initial=np.inf)
    size = np.maximum(away, slope)
    return np.where(size > 0, size, np.where(np.isfinite(least), least, 0.0))


def _power(x: Numbers) -> Numbers:
    """x to the next power of two; 1 where it is zero."""
    return np.asarray(2.0 ** np.round(np.log2(np.where(x > 0, x, 1.0))))


def _inverse(x: Numbers) -> Numbers:
    return 1.0 / _power(x)
