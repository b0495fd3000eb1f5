"""Programs solved: at the scale one, by Newton's method where that gets there, else by Clarabel."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from implicitdiff.programs.interior_point import by_clarabel
from implicitdiff.programs.newton import by_newton
from implicitdiff.programs.program import NON_FINITE, NONCONVEX, SOLVED, UNFIT, Numbers, Program
from implicitdiff.programs.scaling import Scaling
from implicitdiff.tolerances import SEMIDEFINITE, STRICTLY_CONVEX

__all__ = ["solve_all"]

_THREADED = 4
"""Programs from which threads are worth starting."""


def solve_all(program: Program, settings: Any) -> tuple[Numbers, Numbers, list[str]]:
    """Solve a batch.

    Parameters
    ----------
    program : Program
        With one leading axis; r may be infinite where there is no such inequality.
    settings : clarabel.DefaultSettings

    Returns
    -------
    tuple
        y and z, and a status for each; NaN where nothing could be tried.
    """
    absent = (program.r == np.inf) & (np.arange(program.r.shape[-1]) >= program.p)
    K, r = np.where(absent[..., None], 0.0, program.K), np.where(absent, 0.0, program.r)  # 0 <= 0
    y, z = np.full(program.q.shape, np.nan), np.full(program.r.shape, np.nan)
    status = np.full(len(y), NON_FINITE, dtype=object)
    parts = [np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in (program.Q, program.q, K, r)]
    usable = np.logical_and.reduce(parts)
    if usable.any():
        solver = _Batch(program._replace(K=K, r=r).at(usable), ~absent[usable], settings)
        y[usable], z[usable], status[usable] = solver.solved()
    return y, z, list(status)


class _Batch:
    """Finite programs, scaled, and which rows are there."""

    def __init__(self, program: Program, there: Numbers, settings: Any) -> None:
        self.program, self.there, self.settings = program, there, settings
        self.scaling = Scaling(program)

    def solved(self) -> tuple[Numbers, Numbers, Numbers]:
        """Return y, z and the status of each."""
        scaled = self.scaling.program
        y, z = np.full(scaled.q.shape, np.nan), np.full(scaled.r.shape, np.nan)
        status = np.full(len(y), NONCONVEX, dtype=object)
        convex, strictly = _curvature(scaled.Q)
        if strictly.any():
            y[strictly], z[strictly], found = by_newton(scaled.at(strictly))
            status[np.flatnonzero(strictly)[found]] = SOLVED
        y, z = self.scaling.solution(y), self.scaling.multipliers(z)
        left = np.flatnonzero(convex & (status != SOLVED))
        for i, one in zip(left, self._each(left), strict=True):
            y[i], z[i], status[i] = one
        return y, z, status

    def _each(self, left: Numbers) -> list[Any]:
        """Solve one by one: in threads, since Clarabel releases the interpreter while it works."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, len(left))
        if workers < 2 or len(left) < _THREADED:
            return list(map(self._alone, left))
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self._alone, left))

    def _alone(self, i: int) -> tuple[Numbers, Numbers, str]:
        there = self.there[i]
        one, z = self.program.at(slice(i, i + 1)), np.zeros(len(there))
        one = one._replace(K=one.K[:, there], r=one.r[:, there])
        scaling = Scaling(one)
        found = by_clarabel(scaling.program.at(0), self.settings)
        if found.status == UNFIT:  # y is of another size than the data
            scaling = Scaling(one, np.max(np.abs(scaling.sigma * found.y), axis=-1))
            found = by_clarabel(scaling.program.at(0), self.settings)
        z[there] = scaling.multipliers(found.z)[0]
        return scaling.solution(found.y)[0], z, found.status


def _curvature(Q: Numbers) -> tuple[Numbers, Numbers]:
    """Whether Q is positive semidefinite, up to rounding, and definite by far; its diagonal is of one size, or zero."""
    size = np.max(np.abs(Q), axis=(-2, -1), initial=0.0)
    shifted = Q + (SEMIDEFINITE * size)[..., None, None] * np.eye(Q.shape[-1])
    try:
        pivots = np.diagonal(np.linalg.cholesky(shifted), axis1=-2, axis2=-1) ** 2
    except np.linalg.LinAlgError:
        if len(Q) > 1:
            convex, strictly = zip(*map(_curvature, Q[:, None]), strict=True)
            return np.concatenate(convex), np.concatenate(strictly)
        return np.linalg.eigvalsh(Q)[:, 0] >= -SEMIDEFINITE * size, np.zeros(1, dtype=bool)
    return np.ones(len(Q), dtype=bool), np.min(pivots, axis=-1, initial=np.inf) > STRICTLY_CONVEX * size
