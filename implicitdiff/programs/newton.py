"""Newton's method on the active set, of a whole batch at once: for strictly convex programs, a few small systems each.

The unknown is which inequalities are active. With those of a guess as equalities, the multipliers z solve

    S z = −(r + K Q⁻¹q),  S = K Q⁻¹Kᵀ,  and  y = −Q⁻¹(q + Kᵀz),

and active is next what is pressed against by more than is left, z > r − K y. That ends within some steps or not at
all, so that the result is one only where it satisfies all of the conditions.

References
----------
M. Hintermüller, K. Ito, K. Kunisch, "The primal-dual active set strategy as a semismooth Newton method", SIAM J. Optim.
13 (2003) 865-888. DOI 10.1137/S1052623401383558
"""

from __future__ import annotations

import numpy as np

from implicitdiff.arrays import times
from implicitdiff.programs.program import Numbers, Program, is_solution, transposed
from implicitdiff.tolerances import POLISHED, POLISHING, POLISHING_STEPS

__all__ = ["by_newton"]

_REFINED = 2


def by_newton(program: Program) -> tuple[Numbers, Numbers, Numbers]:
    """Solve a batch of strictly convex programs at the scale one.

    Returns
    -------
    tuple of array
        y and z, and whether they are the solution, per item.
    """
    Q, q, K, r, p = program
    inverse = np.linalg.inv(Q)
    image = inverse @ transposed(K)
    S, free = K @ image, times(inverse, q)
    held = np.zeros(r.shape, dtype=bool)
    held[:, :p] = True
    z, open_ = np.zeros(r.shape), np.arange(len(r))
    right = -(r + times(K, free))
    for _ in range(POLISHING_STEPS):
        z[open_] = _on_rows(S[open_], held[open_], right[open_])
        y = -(free[open_] + times(image[open_], z[open_]))
        now = z[open_] > r[open_] - times(K[open_], y)
        now[:, :p] = True
        changed = np.any(now != held[open_], axis=-1)
        held[open_] = now
        open_ = open_[changed]
        if not len(open_):
            break
    y = -(free + times(image, z))
    for _ in range(_REFINED):  # what rounding, and the regularised systems, left
        slope, gap = times(Q, y) + q + times(transposed(K), z), times(K, y) - r
        step = _on_rows(S, held, gap - times(transposed(image), slope))
        z = z + step
        y = y - times(inverse, slope) - times(image, step)
    z = np.where(held, z, 0.0)
    y = _without_rounding(y, np.abs(free) + times(np.abs(image), np.abs(z)), np.any(held & (r != 0.0), axis=-1))
    return y, z, is_solution(program, y, z, POLISHED)


def _without_rounding(y: Numbers, terms: Numbers, away: Numbers) -> Numbers:
    """Return y, with 0 for less than the rounding of its terms, where the rows that are held go through the origin."""
    nothing: Numbers = np.where((np.abs(y) <= np.finfo(y.dtype).eps * terms) & ~away[..., None], 0.0, y)
    return nothing


def _on_rows(S: Numbers, held: Numbers, right: Numbers) -> Numbers:
    """Solve S z = b on the rows that are held, with z = 0 on the others; regularised, since rows may be dependent."""
    diagonal = np.where(held, POLISHING, 1.0)
    M = np.where(held[..., None] & held[..., None, :], S, 0.0) + diagonal[..., None] * np.eye(S.shape[-1])
    found: Numbers = np.linalg.solve(M, np.where(held, right, 0.0)[..., None])[..., 0]
    return found
