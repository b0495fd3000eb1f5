"""The vector spaces of the iterative solvers over NumPy: one vector, many, and a slice of one in each process."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from scipy.linalg import blas

from implicitdiff.arrays import Array
from implicitdiff.arrays import numpy_namespace as xp
from implicitdiff.errors import BackendError, InputError
from implicitdiff.linalg.host_space import HostSpace
from implicitdiff.linalg.vector_space import ArraySpace
from implicitdiff.solvers.base import Krylov

__all__ = ["NumpyBatchSpace", "NumpySpace", "SliceSpace", "Slices", "space_of"]

KEPT = 1024
"""Up to so many entries a probe vector is kept for the next call."""
_BLAS = {
    np.dtype(np.float64): (blas.ddot, blas.daxpy, blas.dscal),
    np.dtype(np.float32): (blas.sdot, blas.saxpy, blas.sscal),
}


class NumpySpace(HostSpace):
    """One vector of shape (n,), worked on in place, by BLAS where it does the same: it is called for less."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(xp, shape, dtype)
        self._dot, self._axpy, self._scal = _BLAS[self.dtype]

    def inner(self, x: Array, y: Array) -> Array:
        return self._type(self._dot(x, y))

    def norm(self, x: Array) -> Array:
        return self._type(math.sqrt(self._dot(x, x)))

    def largest(self, x: Array) -> Array:
        return self._type(max(x.max(), -x.min()))

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        return self._axpy(x, y, a=a)

    def aypx(self, a: Any, x: Array, y: Array) -> Array:
        return self._axpy(x, self._scal(a, y))

    def subtract(self, x: Array, y: Array) -> Array:
        return np.subtract(x, y, out=x)

    def scale(self, a: Any, x: Array) -> Array:
        return self._scal(a, x) if a else np.multiply(x, a, out=x)  # 0 · NaN is NaN, not so in every BLAS

    def copy(self, x: Array) -> Array:
        return np.array(x, dtype=self.dtype, order="C")

    def finite(self, x: Array) -> Array:
        if x.shape[0] and math.isfinite(self._dot(x, x)):  # one pass where squares do not overflow
            return np.True_
        return np.isfinite(x).all()

    def is_zero(self, x: Array) -> Array:
        if x.shape[0] and self._dot(x, x) > 0:
            return np.False_
        return ~x.any()

    def probe(self) -> Array:
        return self._probe if self.shape[0] <= KEPT else super().probe()

    @cached_property
    def _probe(self) -> Array:
        z = super().probe()
        z.setflags(write=False)
        return z


class NumpyBatchSpace(ArraySpace):
    """Many vectors, shape (..., n), worked on in place."""

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        y += a[..., None] * x
        return y

    def subtract(self, x: Array, y: Array) -> Array:
        return np.subtract(x, y, out=x)

    def scale(self, a: Any, x: Array) -> Array:
        return np.multiply(x, a[..., None], out=x)


@lru_cache(maxsize=256)
def space_of(shape: tuple[int, ...], dtype: Any) -> ArraySpace:
    """Return the space of vectors of that shape, which keeps nothing of any of them."""
    return NumpySpace(shape, dtype) if len(shape) == 1 else NumpyBatchSpace(xp, shape, dtype, "cpu")


class Slices:
    """A vector of which each process holds a slice.

    Parameters
    ----------
    reduce : callable
        Sums a Python float over the processes.
    """

    def __init__(self, reduce: Callable[[float], float]) -> None:
        self.reduce = reduce

    def refuse_many(self) -> None:
        """Raise for what takes several vectors at once."""
        raise BackendError(
            "several vectors at once (a Jacobian, a batch, a product assembled from its transpose), and each process "
            "holds a slice of one.\nNext: one vjp or jvp after the other, with all products given."
        )

    def check(self, prepared: Any, b: Array) -> None:
        """Raise, in all processes, for what a slice is not enough for."""
        operator, solver = prepared.operator, prepared.solver
        approximation = getattr(solver, "approximate", False) and getattr(solver, "products_only", False)
        if not (isinstance(solver, Krylov) or approximation):
            raise BackendError(
                f"solver {getattr(solver, 'name', solver)!r} needs the whole matrix, and each process holds a slice.\n"
                "Next: solver='cg', 'minres', 'gmres' or 'bicgstab'."
            )
        if operator.matrix is not None or operator.sparse is not None or operator.sparsity is not None:
            raise BackendError("a matrix is given for A, and each process holds a slice.\nNext: give its products.")
        if self.reduce(float(b.shape[-1] == 0)):
            raise InputError("a process holds no entry at all.\nNext: use fewer processes.")


class SliceSpace(NumpySpace):
    """The slice of a vector, shape (n,), that this process holds.

    Whatever decides about the course of a method is reduced over the processes first, so that all take the same.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, slices: Slices) -> None:
        if len(shape) != 1:
            slices.refuse_many()
        super().__init__(shape, dtype)
        self._sum = slices.reduce

    def _reduced(self, value: Any) -> Array:
        return self._type(self._sum(float(value)))

    @cached_property
    def length(self) -> int:
        return int(self._sum(float(self.shape[-1])))

    def inner(self, x: Array, y: Array) -> Array:
        return self._reduced(np.dot(x, y))

    def norm(self, x: Array) -> Array:
        return np.sqrt(self.inner(x, x))

    def largest(self, x: Array) -> Array:
        # The sum of each process's largest entry: zero, infinite or NaN when the largest is, and of its size
        # otherwise, which is all that it is asked for.
        return self._reduced(np.max(np.abs(x), initial=0.0))

    def size(self, x: Array) -> Array:
        largest = self.largest(x)
        if not (largest > 0 and math.isfinite(largest)):
            return largest
        return largest * self.norm(x / largest)

    def finite(self, x: Array) -> Array:
        return np.bool_(self._sum(float(np.count_nonzero(~np.isfinite(x)))) == 0)

    def is_zero(self, x: Array) -> Array:
        return np.bool_(self._sum(float(np.count_nonzero(x))) == 0)

    def project(self, basis: Array, j: Any, x: Array, room: int) -> Array:
        out = super().project(basis, j, x, room)
        for i in range(j + 1):
            out[i] = self._sum(float(out[i]))
        return out
