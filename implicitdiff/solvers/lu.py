"""LU factorisation with partial pivoting: any regular A, assembled or sparse.

References
----------
G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th ed., Johns Hopkins University Press, 2013, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from implicitdiff.arrays import Array
from implicitdiff.solvers.dense import DenseSolver

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["LU"]


@dataclass(frozen=True, eq=False, repr=False)
class LU(DenseSolver):
    """LU with partial pivoting: factored once, for all right-hand sides and the transposed system.

    A is assembled from its products where no matrix is given (n products); a sparse one goes through SuperLU.

    Parameters
    ----------
    damping : float, default 0
        Solve (A + damping I) x = b.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> linear_solve(np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([2.0, 3.0]), solver="lu")
    array([2., 1.])
    """

    name: ClassVar[str] = "lu"

    def factor(self, backend: Backend, matrix: Array) -> Any:
        return backend.lu_factor(matrix)

    def apply(self, backend: Backend, factor: Any, b: Array, transposed: bool) -> Array:
        return backend.lu_solve(factor, b, transposed)
