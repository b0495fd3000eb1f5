"""Any array-API library: eager loop, products given by the user, finite differences where none is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array, any_true
from implicitdiff.backends.base import Backend
from implicitdiff.backends.curvature import GradientDifferences
from implicitdiff.backends.differences import Differences, scalar_gradients
from implicitdiff.errors import BackendError
from implicitdiff.pytree import hint
from implicitdiff.ravel import reject_dtype

__all__ = ["ArrayAPIBackend"]

LOOK_EVERY = 10
"""Bodies of a loop between two looks at its condition on an accelerator, where each look waits for the device."""


class ArrayAPIBackend(Backend):
    """Backend of a namespace that follows the array API standard.

    Parameters
    ----------
    xp : module
        The array namespace.
    """

    name = "array_api"

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.name = xp.__name__.rpartition(".")[2]
        self._root = framework(xp.zeros(0))
        self._supported = (xp.float32, xp.float64)

    # -- arrays of the user ------------------------------------------------------------------------
    def as_leaf(self, leaf: Any, where: str) -> Array:
        if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
            return self.xp.asarray(leaf, dtype=self.xp.float64)
        if isinstance(leaf, (bool, int, complex)) and not hasattr(leaf, "dtype"):
            raise reject_dtype(type(leaf).__name__, where)
        if not self.is_array(leaf):
            kind = f"an array of {framework(leaf)}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise BackendError(f"{where} is {kind}; expected an array of {self.name}.{hint(leaf, where)}")
        if leaf.dtype not in self._supported:
            raise reject_dtype(leaf.dtype, where)
        return leaf

    def is_array(self, x: Any) -> bool:
        """Whether it is an array of this framework."""
        return framework(x) == self._root and hasattr(x, "shape")

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return Differences(self, function, y, theta)

    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return GradientDifferences(self, function, y, theta)

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        return scalar_gradients(self, function, y, theta)

    # -- loops and linear algebra ----------------------------------------------------------------------
    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        held, done = cond(state), 0
        if limit is None or not self.waits(held):
            while held and done != limit:
                state, done = body(state), done + 1
                held = cond(state)
            return state
        while done < limit and held:
            stride = min(LOOK_EVERY, limit - done)
            for _ in range(stride):
                state = body(state)
            done += stride
            held = cond(state)
        return state

    def waits(self, held: Any) -> bool:
        """Whether to look at a condition is to wait for an accelerator: then it is done now and then only."""
        return False

    def lu_factor(self, matrix: Array) -> Any:
        # The standard has no LU. The inverse, computed once, serves every right-hand side; the step of
        # refinement that follows each solve makes up for its larger residual.
        xp = self.xp
        if matrix.ndim == 2:
            return self._inverse(matrix)
        items = [self._inverse(matrix[i, ...]) for i in range(matrix.shape[0])]
        return xp.stack(items) if items else matrix

    def _inverse(self, matrix: Array) -> Array:
        try:
            return self.xp.linalg.inv(matrix)
        except Exception as error:  # each library has its own type for a singular matrix
            if "ingular" not in str(error):
                raise
            return self.xp.full_like(matrix, float("nan"))

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        inverse = self.xp.matrix_transpose(factor) if transposed else factor
        return inverse @ b

    def cho_factor(self, matrix: Array) -> Array:
        if matrix.ndim == 2:
            return self._cholesky(matrix)
        items = [self._cholesky(matrix[i, ...]) for i in range(matrix.shape[0])]
        return self.xp.stack(items) if items else matrix

    def _cholesky(self, matrix: Array) -> Array:
        nan = self.xp.full_like(matrix, float("nan"))
        try:
            factor = self.xp.linalg.cholesky(matrix)
        except Exception as error:  # likewise
            if "definite" not in str(error):
                raise
            return nan
        return factor if not any_true(self.xp, ~self.xp.isfinite(factor)) else nan

    def cho_solve(self, factor: Array, b: Array) -> Array:
        half = triangular_solve(self.xp, factor, b)
        return triangular_solve(self.xp, self.xp.matrix_transpose(factor), half, lower=False)


def framework(x: Any) -> str:
    """Top-level module of an object's type."""
    return type(x).__module__.partition(".")[0]


def triangular_solve(xp: Any, factor: Array, b: Array, *, lower: bool = True) -> Array:
    """Forward or back substitution, one row at a time over all items and columns.

    Parameters
    ----------
    factor : array, shape (*items, n, n)
        A triangular matrix.
    b : array, shape (*items, n, k)
    """
    n = factor.shape[-1]
    x = xp.zeros_like(b)
    for i in range(n) if lower else range(n - 1, -1, -1):
        known = slice(0, i) if lower else slice(i + 1, n)
        row = factor[..., i, known]
        rest = b[..., i, :]
        if row.shape[-1]:
            rest = rest - (row[..., None, :] @ x[..., known, :])[..., 0, :]
        x[..., i, :] = rest / factor[..., i, i][..., None]
    return x
