"""A quadratic program, or a batch of them, and what a solution of it is."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from implicitdiff.arrays import times
from implicitdiff.tolerances import ROUNDED_LENGTH

__all__ = [
    "NONCONVEX",
    "NON_FINITE",
    "SOLVED",
    "UNFIT",
    "Found",
    "Numbers",
    "Program",
    "is_solution",
    "is_sparse",
    "transposed",
]

Numbers: TypeAlias = "np.ndarray[Any, Any]"
SOLVED = "Solved"
NONCONVEX = "Nonconvex"
"""The status of a program that is not handed to Clarabel, since its Q has negative curvature."""
NON_FINITE = "NonFinite"
"""... that holds NaN or Inf."""
UNFIT = "Solved, but not to the tolerance that holds here"


class Program(NamedTuple):
    """min ½ yᵀQy + qᵀy subject to the first p rows of K y = r, the others K y <= r.

    All may have a leading axis of items; or it is one program, of which Q and K may be SciPy's sparse arrays.
    """

    Q: Any
    q: Numbers
    K: Any
    r: Numbers
    p: int

    def at(self, which: Any) -> Program:
        """Return some of a batch."""
        return Program(self.Q[which], self.q[which], self.K[which], self.r[which], self.p)


class Found(NamedTuple):
    """y, the multipliers of all rows, and how it ended: Clarabel's name for it."""

    y: Numbers
    z: Numbers
    status: str


def is_sparse(x: Any) -> bool:
    """Whether it is one of SciPy's sparse arrays."""
    return hasattr(x, "tocsc")


def transposed(x: Any) -> Any:
    """Transpose matrices."""
    return x.T if is_sparse(x) else np.swapaxes(x, -1, -2)


def _largest(x: Numbers) -> Numbers:
    return np.max(np.abs(x), axis=-1, initial=0.0, keepdims=True)


def is_solution(program: Program, y: Numbers, z: Numbers, tolerance: float) -> Numbers:
    """Whether y and z satisfy all of the conditions, per item; rows are of norm one, and columns of one unit."""
    Q, q, K, r, p = program
    sums = times(abs(Q), np.abs(y)) + np.abs(q) + times(abs(transposed(K)), np.abs(z))
    force, reach = tolerance * _largest(sums), tolerance * (_largest(y) + np.abs(r))
    reach = reach + ROUNDED_LENGTH  # where y is zero; the scale of the data is one
    gap, mu = times(K, y) - r, z[..., p:]
    conditions = [
        np.abs(times(Q, y) + q + times(transposed(K), z)) <= force,
        np.abs(gap[..., :p]) <= reach[..., :p],
        gap[..., p:] <= reach[..., p:],
        mu >= -force,
        (mu <= force) | (gap[..., p:] >= -reach[..., p:]),
    ]
    return np.logical_and.reduce([np.all(holds, axis=-1) for holds in conditions])
