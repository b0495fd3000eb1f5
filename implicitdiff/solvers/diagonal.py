"""The diagonal of A in place of A, as a solver and as Jacobi's preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner
from implicitdiff.outcome import Status
from implicitdiff.solvers.approximation import Applied, ApproximateState, Approximation
from implicitdiff.tolerances import DENSE

__all__ = ["Diagonal"]


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Approximation):
    """Divide by the diagonal of A: x_i = b_i / a_ii.

    Parameters
    ----------
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    The diagonal is free where the matrix is at hand; of products it takes n, once for each A, and n up to 4 096.
    ``CG(preconditioner=Diagonal())`` is Jacobi's preconditioner.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> linear_solve(np.array([[2.0, 0.1], [0.1, 4.0]]), np.ones(2), solver="diagonal")
    array([0.5 , 0.25])
    """

    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "diagonal"
    products_only: ClassVar[bool] = False

    def prepare(self, operator: Operator) -> Any:
        xp = operator.backend.xp
        if operator.sparse is not None:
            return xp.asarray(operator.sparse.diagonal(), dtype=operator.dtype, device=operator.device)
        if operator.matrix is None and operator.n > DENSE:
            raise InputError(
                f"solver 'diagonal' needs the diagonal of {operator.label}, and has products only (n = {operator.n}).\n"
                "Next: give the matrix (hessian= or jacobian=, dense or sparse), or another solver."
            )
        return xp.linalg.diagonal(operator.dense())

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        xp, d = state.operator.backend.xp, state.prepared
        usable = d != 0
        zero = space.where(xp.all(usable, axis=-1), 0, int(Status.SINGULAR))
        return Applied(r / xp.where(usable, d, xp.ones_like(d)), space.counter(), 0, zero)

    @classmethod
    def at_costs(cls, products: Sequence[int], n: int) -> list[Any]:
        return [cls()] if n <= DENSE else []

    def as_preconditioner(self, operator: Operator) -> Preconditioner:
        inverse = 1 / self.prepare(operator)
        return Preconditioner(lambda r: inverse * r, lambda r: inverse * r)
