"""One program at the scale one by Clarabel, and polished: the solution on its active set.

Clarabel judges its residuals against absolute tolerances, so that the data have to be scaled before.

References
----------
P. J. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives", 2024.
arXiv:2405.12762
B. Stellato et al., "OSQP: an operator splitting solver for quadratic programs", Math. Program. Comput. 12 (2020)
637-672. DOI 10.1007/s12532-020-00179-2 (polishing by a regularised system and iterative refinement)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.linalg

from implicitdiff.errors import InputError
from implicitdiff.programs.program import SOLVED, UNFIT, Found, Numbers, Program, is_solution, is_sparse
from implicitdiff.tolerances import POLISHED, POLISHING, POLISHING_STEPS, UNPOLISHED

__all__ = ["by_clarabel", "settings_of"]


def _clarabel() -> Any:
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
    settings = _clarabel().DefaultSettings()
    settings.verbose = False
    for name, value in given.items():
        if name.startswith("_") or not hasattr(settings, name):
            raise InputError(f"settings: Clarabel has none of the name {name!r}.")
        try:
            setattr(settings, name, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"settings: {name} = {value!r} is refused by Clarabel: {error}.") from None
    return settings


def by_clarabel(program: Program, settings: Any) -> Found:
    """Solve a program at the scale one, and polish."""
    from scipy import sparse  # which import implicitdiff does not load

    clarabel, (Q, q, K, r, p) = _clarabel(), program
    cones = [(clarabel.ZeroConeT, p), (clarabel.NonnegativeConeT, len(r) - p)]
    upper, rows = sparse.csc_matrix(sparse.triu(Q)), sparse.csc_matrix(K)
    solver = clarabel.DefaultSolver(upper, q, rows, r, [kind(size) for kind, size in cones if size], settings)
    told = solver.solve()
    found = Found(np.asarray(told.x), np.asarray(told.z), str(told.status))
    better = _polished(program, found.y, found.z)
    if better is not None:
        return Found(*better, SOLVED)
    fits = found.status != SOLVED or is_solution(program, found.y, found.z, UNPOLISHED)
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
    return (y, z) if is_solution(program, y, z, POLISHED) else None


def _on_active_set(program: Program, held: Numbers, y: Numbers, z: Numbers) -> tuple[Numbers, Numbers]:
    """Newton's method for Qy + q + Jᵀz = 0, Jy = r on the rows that are held: by a regularised matrix, refined."""
    Q, q, K, r, _ = program
    n, J, right = len(q), K[held], r[held]
    shift = POLISHING * np.r_[np.ones(n), -np.ones(len(right))]
    whole, solve = _factored(Q, J, shift)
    x, b = np.r_[y, z[held]], np.r_[-q, right]
    with np.errstate(all="ignore"):
        best, size = x, np.inf
        for _ in range(POLISHING_STEPS):
            left = b - whole @ x
            if not (now := float(np.max(np.abs(left), initial=0.0))) < size:
                break
            best, size = x, now
            x = x + solve(left)
    full = np.zeros(len(r))
    full[held] = best[n:]
    return best[:n], full


def _factored(Q: Any, J: Any, shift: Numbers) -> tuple[Any, Callable[[Numbers], Numbers]]:
    """Return [[Q, Jᵀ], [J, 0]], and what solves with it once it is shifted."""
    if is_sparse(Q):
        from scipy import sparse
        from scipy.sparse.linalg import splu

        whole = sparse.block_array([[Q, J.T], [J, None]], format="csc")
        return whole, splu((whole + sparse.diags_array(shift)).tocsc()).solve
    whole = np.block([[Q, J.T], [J, np.zeros((len(J), len(J)))]])
    with np.errstate(all="ignore"):
        factor = scipy.linalg.lu_factor(whole + np.diag(shift), check_finite=False)
    return whole, lambda b: scipy.linalg.lu_solve(factor, b, check_finite=False)
