"""JᵀJ x = b through J: z of least norm with Jᵀ z = b, then J x = z. Neither sees the condition number of J squared.

Both systems are consistent, and for the methods of least squares, whatever the shape of J. Where J has not full rank,
x is the solution of least norm, if there is one.

References
----------
Å. Björck, "Numerical Methods for Least Squares Problems", SIAM, 1996, section 1.4. DOI 10.1137/1.9781611971484
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts

__all__ = ["GramState", "in_two_steps", "two_steps"]


class GramState(NamedTuple):
    """JᵀJ, and a method with its states for J and Jᵀ."""

    operator: Operator
    solver: Any
    root: Any
    back: Any


def two_steps(solver: Any, operator: Any) -> GramState:
    """Prepare a method of least squares for J and Jᵀ; damping is in J already."""
    J, plain = operator.root, replace(solver, damping=0.0)
    back = None if J.matrix is None else J.backend.xp.matrix_transpose(J.matrix)
    states = [
        plain.init(
            Operator(
                J.backend, rows, columns, J.items, J.dtype, J.device, forward=forward, adjoint=adjoint, matrix=matrix,
                kind=J.kind, label=J.label, symmetric=False, accuracy=J.accuracy,
            )
        )
        for rows, columns, forward, adjoint, matrix in (
            (J.rows, J.columns, J.matvec, J.rmatvec, J.matrix), (J.columns, J.rows, J.rmatvec, J.matvec, back),
        )
    ]  # fmt: skip
    return GramState(operator, plain, *states)


def in_two_steps(state: GramState, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
    """Solve the two systems; the residual is the larger of theirs, and the condition that of J."""
    xp, device = state.operator.backend.xp, state.operator.device
    z, first, one = state.solver.solve(state.back, b, None)
    x, second, two = state.solver.solve(state.root, z, x0)

    def larger(a: Any, b: Any) -> Any:
        return a if b is None else b if a is None else xp.maximum(*(xp.asarray(n, device=device) for n in (a, b)))

    norm = larger(one.operator_norm, two.operator_norm)
    counts = Counts(
        one.iterations + two.iterations, one.matvecs + two.matvecs, larger(one.residual, two.residual),
        None if norm is None else norm**2, two.rcond, larger(one.tolerance, two.tolerance), two.condition,
        rank=two.rank, leak=one.leak,
    )  # fmt: skip
    return x, larger(first, second), counts
