"""LDLᵀ factorisation with symmetric pivoting: symmetric A of either sign, such as saddle systems.

References
----------
J. R. Bunch, L. Kaufman, "Some stable methods for calculating inertia and solving symmetric linear systems", Math. Comp.
31 (1977) 163-179. DOI 10.1090/S0025-5718-1977-0428694-0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator
from implicitdiff.solvers import hosted
from implicitdiff.solvers.base import Structure
from implicitdiff.solvers.dense import DenseSolver, DenseState

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["LDLT"]


@dataclass(frozen=True, eq=False, repr=False)
class LDLT(DenseSolver):
    """LDLᵀ by Bunch and Kaufman: half the work of LU for a symmetric A that need not be positive definite.

    NumPy and Torch have it. Elsewhere, in a batch on NumPy, and for a sparse A, it is LU that runs, and the report says
    so.

    Parameters
    ----------
    damping : float, default 0
        Solve (A + damping I) x = b.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> linear_solve(np.array([[1.0, 2.0], [2.0, 0.0]]), np.array([5.0, 2.0]), solver="ldlt")
    array([1., 2.])
    """

    name: ClassVar[str] = "ldlt"
    symmetric: ClassVar[bool] = True
    structure: ClassVar[Structure] = "symmetric"

    def init(self, operator: Operator) -> Any:
        if operator.sparse is not None or operator.entries is not None:
            return hosted.init(operator, symmetric=False)
        return super().init(operator)

    def factor(self, backend: Backend, matrix: Array) -> Any:
        return backend.ldl_factor(matrix)

    def apply(self, backend: Backend, factor: Any, b: Array, transposed: bool) -> Array:
        return backend.ldl_solve(factor, b)

    def describe(self, state: Any) -> list[tuple[str, str]]:
        if not isinstance(state, DenseState):
            return [("lu", "chosen by name as ldlt; the matrix is sparse")]
        if not state.operator.backend.has_ldl(state.matrix):
            return [("lu", f"chosen by name as ldlt, which {state.operator.backend.name} does not have here")]
        return super().describe(state)
