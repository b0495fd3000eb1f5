"""What the matrix says beside an iterative method, where it is at hand and small: how well a solution is determined.

A Krylov space need not hold the direction in which A is weakest, and then neither the residual nor the space tells how
wrong the solution is. The factors of a small matrix do, for less than the iterations cost. Inside a compiled program
they also do what `refinement` does with more iterations: solve each equation in its own units.
"""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array, item_norm, quotient
from implicitdiff.linalg.operator import Operator, matrix_product
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import KrylovState
from implicitdiff.solvers.checks import amplification
from implicitdiff.solvers.dense import DenseState, weakest
from implicitdiff.solvers.lu import LU
from implicitdiff.tolerances import ALONG, FACTORED, LOST

__all__ = ["ranked"]


def ranked(
    op: Operator, state: Any, b: Array, found: tuple[Array, Array, Counts], consistent: bool
) -> tuple[Array, Array, Counts]:
    """Return x, status and counts with what the matrix says of them.

    Parameters
    ----------
    op : Operator
        A as it was asked for.
    state : object
        Of the method; anything but a `KrylovState` without a preconditioner, with a small matrix, is left alone.
    b : array, shape (*rhs, *items, n)
    found : tuple
        How the solve ended.
    consistent : bool
        Whether the method is one for singular systems, too, if they are consistent.
    """
    x, status, counts = found
    matrix = _matrix(op, state)
    if matrix is None or is_tree_vector(x):
        return found
    xp, double, scaling = op.backend.xp, op.backend.to_double, state.scaling
    factored, w = weakest(LU(), state.operator, double(matrix))
    wide = double(x if scaling is None else scaling.start(x))
    condition = _condition(factored, wide)
    lost = op.resolution * condition > LOST
    if consistent:
        parts = [xp.abs(xp.sum(v * wide, axis=-1)) / item_norm(xp, v) for v in (w[i, ...] for i in range(w.shape[0]))]
        # exactly singular, the factors tell no direction
        free = lost & ~(xp.max(xp.stack(parts), axis=0) >= ALONG * item_norm(xp, wide))
        condition, lost = xp.where(free, 0 * condition, condition), lost & ~free
    else:
        free = lost
    solved = status <= int(Status.APPROXIMATE)
    if op.backend.traced:
        right = double(b if scaling is None else scaling.scaled(b))
        d = LU().rows(factored, right - matrix_product(xp, factored.matrix)(wide))
        wide = xp.where((solved & ~free & ~lost)[..., None] & xp.isfinite(d), wide + d, wide)
        x = op.backend.astype(wide if scaling is None else scaling.restored(wide), x.dtype)
    known = 0.0 if counts.condition is None else xp.asarray(counts.condition, device=op.device)
    status = xp.where(solved & lost, int(Status.SINGULAR), status)
    return x, status, Counts(*counts)._replace(condition=xp.maximum(condition, 0 * condition + known))


def _matrix(op: Operator, state: Any) -> Array | None:
    """The equilibrated matrix, if it is at hand and small."""
    if not isinstance(state, KrylovState) or not state.preconditioner.identity or not 1 < op.n <= FACTORED:
        return None
    scaling, matrix = state.scaling, state.operator.matrix
    if matrix is not None:
        return matrix
    matrix = op.at_hand if op.matrix is None else op.matrix  # assembled for its scales, if at all
    if matrix is None or scaling is None:
        return matrix
    return scaling.rows[..., :, None] * matrix * scaling.columns[..., None, :]


def _condition(factored: DenseState, x: Array) -> Array:
    """What an error of A is multiplied by in x; nothing where x is zero."""
    op, rcond = factored.operator, factored.rcond
    xp = op.backend.xp
    found = amplification(xp, op, factored.scaling, factored.norm, rcond, x)
    if found is None:
        found = xp.where(rcond > 0, quotient(xp, 1.0, rcond, rcond > 0), xp.inf + 0 * rcond)
    return xp.where(item_norm(xp, x) > 0, found, 0 * found)
