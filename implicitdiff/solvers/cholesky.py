"""Cholesky factorisation A = L Lᵀ: symmetric positive definite A, assembled or sparse.

References
----------
G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th ed., Johns Hopkins University Press, 2013, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from implicitdiff.arrays import Array
from implicitdiff.linalg.gram_operator import triangle
from implicitdiff.solvers.base import Structure
from implicitdiff.solvers.dense import DenseSolver

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend
    from implicitdiff.linalg.equilibration import Scaling
    from implicitdiff.linalg.operator import Operator

__all__ = ["Cholesky"]


@dataclass(frozen=True, eq=False, repr=False)
class Cholesky(DenseSolver):
    """Cholesky: half the work of LU, and a proof that A is positive definite.

    Of the JᵀJ of a Gauss-Newton system the factor is made by a QR factorisation of J (`LeastSquares`).

    Parameters
    ----------
    damping : float, default 0
        Solve (A + damping I) x = b.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> linear_solve(np.array([[4.0, 2.0], [2.0, 3.0]]), np.array([2.0, 1.0]), solver="cholesky")
    array([0.5, 0. ])
    """

    name: ClassVar[str] = "cholesky"
    symmetric: ClassVar[bool] = True
    definite: ClassVar[bool] = True
    structure: ClassVar[Structure] = "positive definite"

    def factor(self, backend: Backend, matrix: Array) -> Any:
        return backend.cho_factor(matrix)

    def factors(self, operator: Operator, matrix: Array, scaling: Scaling | None) -> Any:
        root = getattr(operator, "root", None)
        if root is None:
            return self.factor(operator.backend, matrix)
        J = operator.backend.to_double(root.dense())
        return triangle(operator.backend, J if scaling is None else J * scaling.columns[..., None, :])

    def apply(self, backend: Backend, factor: Any, b: Array, transposed: bool) -> Array:
        return backend.cho_solve(factor, b)

    def broken(self, xp: Any, factor: Any) -> Array | None:
        return ~xp.all(xp.isfinite(factor), axis=(-2, -1))
