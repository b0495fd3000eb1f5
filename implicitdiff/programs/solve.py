"""Programs solved: at the scale one, by Newton's method where that gets there, else by Clarabel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from implicitdiff.programs.interior_point import by_clarabel
from implicitdiff.programs.newton import by_newton
from implicitdiff.programs.program import NON_FINITE, NONCONVEX, SOLVED, UNFIT, Found, Numbers, Program
from implicitdiff.programs.scaling import Scaling
from implicitdiff.tolerances import SEMIDEFINITE, STRICTLY_CONVEX

__all__ = ["solve_all", "solve_sparse"]

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
        programs = [(self.program.at(i), self.there[i]) for i in left]
        for i, one in zip(left, _each(programs, self.settings), strict=True):
            y[i], z[i], status[i] = one
        return y, z, status


def solve_sparse(Q: Any, q: Numbers, K: Any, r: Numbers, p: int, settings: Any) -> tuple[Numbers, Numbers, list[str]]:
    """The same for programs that share Q and K, SciPy's sparse arrays, with q and r of shape (items, ...)."""
    there = ~((r == np.inf) & (np.arange(r.shape[-1]) >= p))
    finite = np.isfinite(q).all(axis=-1) & np.isfinite(np.where(there, r, 0.0)).all(axis=-1)
    usable = np.flatnonzero(finite & np.isfinite(Q.data).all() & np.isfinite(K.data).all())
    y, z = np.full(q.shape, np.nan), np.full(r.shape, np.nan)
    status = np.full(len(q), NON_FINITE, dtype=object)
    if len(usable) and not _is_convex_sparse(Q):
        status[usable] = NONCONVEX
        usable = usable[:0]
    programs = [(Program(Q, q[i], K, np.where(there[i], r[i], 0.0), p), there[i]) for i in usable]
    for i, one in zip(usable, _each(programs, settings), strict=True):
        y[i], z[i], status[i] = one
    return y, z, list(status)


def _each(programs: Sequence[tuple[Program, Numbers]], settings: Any) -> list[Found]:
    """Solve one by one: in threads, since Clarabel releases the interpreter while it works."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, run = min(cores, len(programs)), partial(_alone, settings=settings)
    if workers < 2 or len(programs) < _THREADED:
        return list(map(run, programs))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, programs))


def _alone(one: tuple[Program, Numbers], *, settings: Any) -> Found:
    """Solve a program with the rows that are there."""
    program, there = one
    z, program = np.zeros(len(there)), program._replace(K=program.K[there], r=program.r[there])
    scaling = Scaling(program)
    found = by_clarabel(scaling.program, settings)
    if found.status == UNFIT:  # y is of another size than the data
        scaling = Scaling(program, np.max(np.abs(scaling.sigma * found.y)))
        found = by_clarabel(scaling.program, settings)
    z[there] = scaling.multipliers(found.z)
    return Found(scaling.solution(found.y), z, found.status)


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


def _is_convex_sparse(Q: Any) -> bool:
    """The same of a sparse Q: without pivots off the diagonal, LU is LDLᵀ, and D has as many signs as Q has."""
    from scipy import sparse
    from scipy.sparse.linalg import splu

    size = np.sqrt(np.abs(Q.diagonal()))
    size = np.where(size > 0, size, 1.0)
    unit = (Q.multiply(1 / size[:, None]).multiply(1 / size)).tocsc()
    shift = SEMIDEFINITE * max(float(abs(unit).max()), 1.0) * sparse.eye_array(Q.shape[0])
    options = {"SymmetricMode": True}
    try:
        lu = splu((unit + shift).tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    except RuntimeError:  # exactly singular, where the diagonal was made positive
        return False
    return bool(np.array_equal(lu.perm_r, lu.perm_c) and np.all(lu.U.diagonal() > 0))
