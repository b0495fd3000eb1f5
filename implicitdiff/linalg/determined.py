"""Whether a system has one solution alone, seen by the method that solves it, where that solves singular ones, too.

K z = K z is solved by z, and by nothing else where K is regular. A method that finds some x of a singular system finds
another one: d = x − z lies in the null space. What an ill-conditioned K leaves of d by its tolerance gets smaller when
K d is solved for in turn; what lies in the null space is not seen by K, and stays.
"""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array, any_true, divisor, item_norm, marked
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts, Status
from implicitdiff.tolerances import KEPT_IN_NULL_SPACE

__all__ = ["determined"]


def determined(prepared: Any, used: Operator, state: Any, status: Array, counts: Counts) -> tuple[Array, Counts]:
    """Fail the items of which a method finds one solution of many; looked at once, where that can be kept.

    Parameters
    ----------
    prepared : Prepared
    used : Operator
        K, or its transpose.
    state : object
        Of the method, for it.
    status, counts
        Of a solve.

    Returns
    -------
    tuple
        Status and counts.
    """
    if not used.regular or not (counts.rcond is None or getattr(prepared.solver, "consistent", False)):
        return status, counts
    xp, only, spent = used.backend.xp, prepared.determined, 0
    if only is None:
        only, spent = _full_rank(used, prepared.solver, state, counts)
        prepared.determined = None if used.backend.traced else only
    wrong = ~only & (status <= int(Status.LEAST_SQUARES))
    return marked(xp, wrong, int(Status.SINGULAR), status), counts._replace(matvecs=counts.matvecs + spent)


def _full_rank(op: Operator, solver: Any, state: Any, counts: Counts) -> tuple[Array, int]:
    """Whether K has full rank, per item, and the products that it took; in the units of its columns."""
    xp, n, scaling = op.backend.xp, op.n, getattr(state, "scaling", None)
    unit = xp.ones((*op.items, n), dtype=op.dtype, device=op.device)
    unit = unit if scaling is None else op.backend.astype(unit * scaling.columns, op.dtype)
    z = unit * op.backend.space(unit).probe()
    d, first = _left(op, solver, state, z)
    size = item_norm(xp, d / unit)
    tolerance = xp.max(xp.asarray(counts.tolerance)) ** 0.5
    doubt = ~(size <= tolerance * item_norm(xp, z / unit)) & (first <= int(Status.LEAST_SQUARES))
    if not op.backend.traced and not any_true(xp, doubt):
        return ~doubt, 1
    rest, second = _left(op, solver, state, d)
    kept = item_norm(xp, rest / unit) / divisor(xp, size)
    return ~(doubt & (second <= int(Status.LEAST_SQUARES)) & (kept > KEPT_IN_NULL_SPACE)), 2


def _left(op: Operator, solver: Any, state: Any, x: Array) -> tuple[Array, Array]:
    """Solve for K x, and return x less what is found, and how it ended."""
    found, status, _ = solver.solve(state, op.matvec(x), None)
    return x - found, op.backend.xp.asarray(status, device=op.device)
