"""Quadratic programs solved in NumPy's arrays, by Clarabel, and polished: the solution on its active set.

Clarabel judges its residuals against absolute tolerances, so that the data are scaled first: columns by the diagonal of
Q, rows to norm one, the right-hand sides and the objective to one.

References
----------
P. J. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives", 2024.
arXiv:2405.12762
B. Stellato et al., "OSQP: an operator splitting solver for quadratic programs", Math. Program. Comput. 12 (2020)
637-672. DOI 10.1007/s12532-020-00179-2 (polishing by a regularised system and iterative refinement)
M. Hintermüller, K. Ito, K. Kunisch, "The primal-dual active set strategy as a semismooth Newton method", SIAM J. Optim.
13 (2003) 865-888. DOI 10.1137/S1052623401383558
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.linalg

from implicitdiff.errors import InputError
from implicitdiff.tolerances import POLISHED, POLISHING, POLISHING_STEPS, ROUNDED_LENGTH, SEMIDEFINITE, UNPOLISHED

__all__ = ["NONCONVEX", "NON_FINITE", "SOLVED", "Found", "Program", "clarabel_module", "settings_of", "solve_items"]

Numbers: TypeAlias = "np.ndarray[Any, Any]"
NONCONVEX = "Nonconvex"
"""The status of a program that is not handed to Clarabel, since its Q has negative curvature."""
NON_FINITE = "NonFinite"
"""... that holds NaN or Inf."""
SOLVED = "Solved"
UNFIT = "Solved, but not to the tolerance that holds here"
_THREADED = 4
"""Programs from which threads are worth starting."""


class Program(NamedTuple):
    """min ½ yᵀQy + qᵀy subject to the first p rows of K y = r, the others K y <= r."""

    Q: Numbers
    q: Numbers
    K: Numbers
    r: Numbers
    p: int


class Found(NamedTuple):
    """y, the multipliers of all rows, and how it ended: Clarabel's name for it."""

    y: Numbers
    z: Numbers
    status: str


def clarabel_module() -> Any:
    """Import Clarabel, or say how to get it."""
    try:
        return importlib.import_module("clarabel")
    except ImportError:
        raise InputError(
            "solve_qp needs Clarabel, which is not installed.\n"
            "Next: python -m pip install 'implicitdiff[qp]'; or QP, which differentiates the solution of any solver."
        ) from None


def settings_of(given: Mapping[str, Any]) -> Any:
    """Return Clarabel's settings, silent, with those that are given by name."""
    settings = clarabel_module().DefaultSettings()
    settings.verbose = False
    for name, value in given.items():
        if name.startswith("_") or not hasattr(settings, name):
            raise InputError(f"settings: Clarabel has none of the name {name!r}.")
        try:
            setattr(settings, name, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"settings: {name} = {value!r} is refused by Clarabel: {error}.") from None
    return settings


def solve_items(programs: list[Program], settings: Any) -> list[Found]:
    """Solve programs: in threads, since Clarabel releases the interpreter while it works."""
    run = partial(_solved, settings=settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(programs))
    if workers < 2 or len(programs) < _THREADED:
        return [run(program) for program in programs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, programs))


def _solved(program: Program, *, settings: Any) -> Found:
    """Solve one program, in its own units."""
    n, k = len(program.q), len(program.r)
    there = ~((program.r == np.inf) & (np.arange(k) >= program.p))  # a bound that is infinite is none
    program, z = program._replace(K=program.K[there], r=program.r[there]), np.zeros(k)
    unusable = Found(np.full(n, np.nan), np.full(k, np.nan), NON_FINITE)
    if not all(np.all(np.isfinite(x)) for x in program[:4]):
        return unusable
    scaling = _Scaling(program)
    if not _is_convex(scaling.program.Q):
        return unusable._replace(status=NONCONVEX)
    found = _by_clarabel(scaling.program, settings)
    if found.status == UNFIT:  # y is of another size than the data
        scaling = _Scaling(program, float(np.max(np.abs(scaling.sigma * found.y))))
        found = _by_clarabel(scaling.program, settings)
    z[there] = scaling.multipliers(found.z)
    return Found(scaling.solution(found.y), z, found.status)


class _Scaling:
    """Powers of two that bring a program to the scale one: y = σ D ỹ, rows by E, f by 1/c.

    ``size`` is σ, where it is known; else it comes from the data.
    """

    def __init__(self, given: Program, size: float = 0.0) -> None:
        Q, q, K, r, p = given
        diagonal = np.abs(np.diagonal(Q))
        columns = np.sqrt(np.where(diagonal > 0, diagonal, 0.0))
        steep = np.max(np.abs(K), axis=0, initial=0.0)
        self.d = _inverse(np.where(columns > 0, columns, steep))
        K = K * self.d
        self.e = _inverse(np.sqrt((K * K).sum(axis=1)))
        K, r, Q, q = K * self.e[:, None], r * self.e, Q * self.d * self.d[:, None], q * self.d
        curved = bool(np.any(Q))
        if not size:  # what y has to be away from zero for: equalities, inequalities that zero violates, the slope
            away = [np.abs(r[:p]), -r[p:], np.abs(q) if curved else np.zeros(1)]
            size = max(float(np.max(x, initial=0.0)) for x in away)
        if size == 0 and np.any(r):  # too small a unit is no harm: Clarabel's tolerances are relative for what is large
            size = float(np.min(np.abs(r[r != 0])))
        self.sigma = _inverse(_inverse(np.asarray(size)))
        self.c = _inverse(_inverse(np.maximum(self.sigma * float(np.max(np.abs(Q), initial=0.0)), np.max(np.abs(q)))))
        self.program = Program(Q * (self.sigma / self.c), q / self.c, K, r / self.sigma, p)

    def solution(self, y: Numbers) -> Numbers:
        """Return y in the units of the program."""
        return self.sigma * self.d * y

    def multipliers(self, z: Numbers) -> Numbers:
        """Return multipliers in its units."""
        return self.c * self.e * z


def _inverse(x: Numbers) -> Numbers:
    """1/x to the next power of two; 1 where x is zero."""
    return 2.0 ** -np.round(np.log2(np.where(x > 0, x, 1.0)))


def _is_convex(Q: Numbers) -> bool:
    """Whether Q is positive semidefinite, up to rounding; its diagonal is about one, or zero."""
    size = SEMIDEFINITE * float(np.max(np.abs(Q), initial=0.0))
    try:
        np.linalg.cholesky(Q + size * np.eye(len(Q)))
    except np.linalg.LinAlgError:
        return bool(np.linalg.eigvalsh(Q)[0] >= -size)
    return True


def _by_clarabel(program: Program, settings: Any) -> Found:
    """Solve a program at the scale one, and polish."""
    from scipy import sparse  # which import implicitdiff does not load

    clarabel, (Q, q, K, r, p) = clarabel_module(), program
    cones = [(clarabel.ZeroConeT, p), (clarabel.NonnegativeConeT, len(r) - p)]
    upper, rows = sparse.csc_matrix(np.triu(Q)), sparse.csc_matrix(K)
    solver = clarabel.DefaultSolver(upper, q, rows, r, [kind(size) for kind, size in cones if size], settings)
    told = solver.solve()
    found = Found(np.asarray(told.x), np.asarray(told.z), str(told.status))
    better = _polished(program, found.y, found.z)
    if better is not None:
        return Found(*better, SOLVED)
    fits = found.status != SOLVED or _is_solution(program, found.y, found.z, UNPOLISHED)
    return found if fits else found._replace(status=UNFIT)


# -- polishing -------------------------------------------------------------------------------------------
def _polished(program: Program, y: Numbers, z: Numbers) -> tuple[Numbers, Numbers] | None:
    """Solve on the active set, and move that where the solution contradicts it; None where none is found."""
    p = program.p
    held = None
    if not (np.all(np.isfinite(y)) and np.all(np.isfinite(z))):
        return None
    for _ in range(POLISHING_STEPS):
        before, held = held, z > program.r - program.K @ y  # pressed against more than is left
        held[:p] = True
        if before is not None and np.array_equal(held, before):
            break
        y, z = _on_active_set(program, held, y, z)
    return (y, z) if _is_solution(program, y, z, POLISHED) else None


def _on_active_set(program: Program, held: Numbers, y: Numbers, z: Numbers) -> tuple[Numbers, Numbers]:
    """Newton's method for Qy + q + Jᵀz = 0, Jy = r on the rows that are held: by a regularised matrix, refined."""
    Q, q, K, r, _ = program
    n, J, right = len(q), K[held], r[held]
    shift = POLISHING * np.r_[np.ones(n), -np.ones(len(J))]
    whole = np.block([[Q, J.T], [J, np.zeros((len(J), len(J)))]])
    x, b = np.r_[y, z[held]], np.r_[-q, right]
    with np.errstate(all="ignore"):
        factor = scipy.linalg.lu_factor(whole + np.diag(shift), check_finite=False)
        best, size = x, np.inf
        for _ in range(POLISHING_STEPS):
            left = b - whole @ x
            if not (now := float(np.max(np.abs(left), initial=0.0))) < size:
                break
            best, size = x, now
            x = x + scipy.linalg.lu_solve(factor, left, check_finite=False)
    full = np.zeros(len(r))
    full[held] = best[n:]
    return best[:n], full


def _is_solution(program: Program, y: Numbers, z: Numbers, tolerance: float) -> bool:
    """Whether y and z satisfy all of the conditions; rows are of norm one, and columns of one unit."""
    Q, q, K, r, p = program
    forces = np.abs(Q) @ np.abs(y) + np.abs(q) + np.abs(K).T @ np.abs(z)
    force, reach = tolerance * np.max(forces, initial=0.0), tolerance * (np.max(np.abs(y), initial=0.0) + np.abs(r))
    reach = reach + ROUNDED_LENGTH  # where y is zero; the scale of the data is one
    gap = K @ y - r
    balanced = np.all(np.abs(Q @ y + q + K.T @ z) <= force)
    feasible = np.all(np.abs(gap[:p]) <= reach[:p]) and np.all(gap[p:] <= reach[p:])
    signs = np.all(z[p:] >= -force)
    complementary = np.all((z[p:] <= force) | (gap[p:] >= -reach[p:]))
    return bool(balanced and feasible and signs and complementary)
