"""Refinement of an iterative solution until every equation is solved in its own units.

Equilibrated or not, a norm of the residual hides the small behind the large: where the solution has an entry of 1e15
in the units of Â beside others of one, a residual of 1e-10 ‖b‖ says nothing of the others. The componentwise backward
error

    ω = max_i |b − A x|_i / (|A| |x| + |b|)_i

does not change under any scaling of rows and columns. It is asked for where the matrix is at hand, and where it is
above the tolerance the system is solved again for the residual, whose norm is made of what is left.

References
----------
M. Arioli, J. W. Demmel, I. S. Duff, "Solving sparse linear systems with sparse backward error", SIAM J. Matrix Anal.
Appl. 10 (1989) 165-190. DOI 10.1137/0610013
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor
from implicitdiff.linalg.operator import Operator, Product, matrix_product
from implicitdiff.outcome import Counts, Status
from implicitdiff.tolerances import FACTORED

__all__ = ["refinable", "refined"]

ROUNDS = 5
"""Each makes the residual smaller by the tolerance of a solve: more would not be refinement."""


class _State(NamedTuple):
    x: Array
    r: Array
    omega: Array
    status: Array
    iterations: Any
    matvecs: Any
    active: Array
    round: Array


def refinable(state: Any) -> bool:
    """Whether a solve goes on until every equation is solved in its own units: A is scaled, and its matrix at hand."""
    op = state.operator
    factored = op.backend.traced and op.n <= FACTORED  # then the matrix is solved with afterwards
    return state.scaling is not None and ((op.matrix is not None and not factored) or op.sparse is not None)


def refined(
    op: Operator, solve: Callable[[Array], tuple[Array, Any, Counts]], b: Array, found: tuple[Array, Any, Counts]
) -> tuple[Array, Any, Counts]:
    """Solve again for the residual while the componentwise backward error is above the tolerance of the solve.

    Parameters
    ----------
    op : Operator
        With its matrix.
    solve : callable
        ``b -> (x, status, counts)``.
    b : array, shape (*rhs, *items, n)
    found : tuple
        What ``solve`` made of b.

    Returns
    -------
    tuple
        Like ``found``; an item that stays above the tolerance has STAGNATED.
    """
    backend, absolute = op.backend, _absolute(op)
    xp = backend.xp
    x, status, counts = found
    space, tolerance = backend.space(b), counts.tolerance

    def judged(x: Array, r: Array) -> Array:
        size = absolute(xp.abs(x)) + xp.abs(b)
        part = xp.abs(r) / divisor(xp, size)
        return xp.max(part, axis=-1)

    def body(s: _State) -> _State:
        d, ended, more = solve(space.select(s.active, s.r, 0 * s.r))
        better = s.active & (xp.asarray(ended) == int(Status.CONVERGED))
        x = space.select(better, s.x + d, s.x)
        r = b - op.matvec(x)
        omega = xp.where(better, judged(x, r), s.omega)
        done = better & (omega <= tolerance)
        status = xp.where(done, xp.zeros_like(s.status), s.status)
        again = better & ~done & (omega < 0.5 * s.omega) & (s.round + 1 < ROUNDS)
        spent = s.iterations + more.iterations, s.matvecs + more.matvecs + 1
        return _State(x, r, omega, status, *spent, again, s.round + 1)

    r = b - op.matvec(x)
    omega, status = judged(x, r), xp.asarray(status, device=op.device) + xp.zeros_like(xp.asarray(counts.iterations))
    active = (status == int(Status.CONVERGED)) & ~(omega <= tolerance)
    status = xp.where(active, xp.full_like(status, int(Status.STAGNATED)), status)
    zero = xp.zeros((), dtype=xp.int32, device=op.device)
    first = _State(x, r, omega, status, counts.iterations, counts.matvecs + 1, active, zero)
    end = backend.while_loop(lambda s: xp.any(s.active), body, first, limit=ROUNDS)
    return end.x, end.status, counts._replace(iterations=end.iterations, matvecs=end.matvecs)


def _absolute(op: Operator) -> Product:
    """The product with |A|."""
    if op.sparse is not None:
        size = abs(op.sparse).tocsr()
        return lambda x: (size @ x.T).T
    return matrix_product(op.backend.xp, op.backend.xp.abs(op.matrix))
