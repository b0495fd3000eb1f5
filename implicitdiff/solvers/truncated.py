"""Conjugate gradients, stopped after a number of steps: the best of the approximations that use products only.

References
----------
A. Rajeswaran, C. Finn, S. Kakade, S. Levine, "Meta-learning with implicit gradients", NeurIPS 2019. arXiv:1909.04630
(a few steps of CG for the system of an implicit gradient)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import as_preconditioner
from implicitdiff.solvers.approximation import Applied, ApproximateState, Approximation
from implicitdiff.solvers.base import KrylovState, Start, Structure
from implicitdiff.solvers.cg import CG

__all__ = ["Truncated"]


@dataclass(frozen=True, eq=False, repr=False)
class Truncated(Approximation):
    """A number of steps of CG, whatever the residual is then: symmetric positive definite A, products only.

    Parameters
    ----------
    steps : int, default 10
        Steps, of a product each; one more is for the true residual. It stops earlier where only rounding is left.
    preconditioner : optional
        As for `CG`.
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    After k steps x is the best there is, in the norm of A, of all that k products can make: with condition number κ the
    error falls like ((√κ − 1) / (√κ + 1))^k. A that is not positive definite, or not symmetric, is told.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Truncated, linear_solve
    >>> A = np.diag([1.0, 2.0, 4.0])
    >>> x, report = linear_solve(A, np.ones(3), solver=Truncated(steps=2), return_report=True)
    >>> print(report.status.name, report.matvecs, round(report.residual, 4))
    APPROXIMATE 3 0.1852
    """

    steps: int = 10
    preconditioner: Any = None
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "truncated"
    cost: ClassVar[str] = "steps"
    structure: ClassVar[Structure] = "positive definite"

    def prepare(self, operator: Operator) -> Any:
        return as_preconditioner(self.preconditioner, operator)

    def transpose(self, state: ApproximateState) -> ApproximateState:
        operator = state.operator.transpose()
        return state if operator is state.operator else ApproximateState(operator, state.prepared.transpose())

    def matrix_free(self, n: int) -> bool:
        return self.preconditioner is None

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        size = space.norm(r)
        target = space.eps * size
        budget = space.counter(self.steps)
        start = Start(space.zeros(), space.copy(r), target, (size > 0) | ~space.isfinite(size), budget)
        found = CG(maxiter=self.steps).cycle(KrylovState(state.operator, state.prepared), space, start)
        return Applied(found.x, found.iterations, found.matvecs, found.status)
