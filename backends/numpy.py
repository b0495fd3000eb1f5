"""NumPy: LAPACK through SciPy, in-place vector work, exact derivatives of functions written with autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from scipy.linalg import lapack

from implicitdiff.arrays import Array
from implicitdiff.arrays import numpy_namespace as xp
from implicitdiff.backends.array_api import ArrayAPIBackend, triangular_solve
from implicitdiff.backends.lending import AUTODIFF_SOURCES, BorrowedAutodiff
from implicitdiff.backends.numpy_complex import (
    ComplexGradientDifferences,
    ComplexStep,
    complex_gradients,
    is_analytic,
)
from implicitdiff.backends.numpy_space import Slices, SliceSpace, space_of
from implicitdiff.errors import DerivativeError, InputError, UnknownNameError

__all__ = ["NumpyBackend"]

_MODES = ("auto", "autograd", "complex_step", "finite_differences", *AUTODIFF_SOURCES)


class NumpyBackend(ArrayAPIBackend):
    """Backend for NumPy arrays.

    Parameters
    ----------
    autodiff : {"auto", "autograd", "complex_step", "finite_differences", "torch", "jax"}, default "auto"
        Where derivatives come from that the user did not give. ``"auto"`` takes autograd for functions
        written with it, else the complex step for functions that accept complex numbers (checked against a
        finite difference), else central finite differences. ``"torch"`` and ``"jax"`` lend their autodiff to
        functions that run on any framework's arrays.
    reduce : callable, optional
        Sums a Python float over the processes, and returns the sum in each: ``comm.allreduce`` of mpi4py. Every process
        then holds a slice of y, of every vector and of what the products return; the products, all of them given, do
        their own communication. Every process makes the same calls.
    """

    name = "numpy"

    def __init__(self, autodiff: str = "auto", *, reduce: Callable[[float], float] | None = None) -> None:
        super().__init__(xp)
        if autodiff not in _MODES:
            raise UnknownNameError(f"autodiff = {autodiff!r}: expected one of {', '.join(_MODES)}.")
        self.name = "numpy"
        self.autodiff = autodiff
        self.slices = None if reduce is None else Slices(reduce)
        self.linear = None if self.slices is None else self._of_slices

    # -- arrays of the user ------------------------------------------------------------------------
    def is_array(self, x: Any) -> bool:
        if type(x) is np.ndarray:
            return x.dtype != object
        return isinstance(x, (np.ndarray, np.generic)) and x.dtype != object

    def as_leaf(self, leaf: Any, where: str) -> Array:
        if type(leaf) is np.ndarray and leaf.dtype in self._supported:
            return leaf
        return np.asarray(super().as_leaf(leaf, where))

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        if type(x).__module__.startswith("autograd"):
            return x  # a value being traced
        if isinstance(x, complex) and not hasattr(x, "dtype"):
            return np.asarray(x)
        found = super().as_array(x, device, dtype)
        return found if found is None or found.dtype.kind in "fc" else found.astype(dtype)

    def device(self, x: Array) -> Any:
        return "cpu"

    def number(self, x: Array) -> Any:
        return x[()]

    def guard(self, x: Array) -> Array:
        # A callback that works in place on its argument would silently spoil the iteration.
        if type(x) is np.ndarray:
            x = x.view()
            x.setflags(write=False)
        return x

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    def concat(self, parts: Any) -> Array:
        if any(type(p).__module__.startswith("autograd") for p in parts):
            from implicitdiff.backends import autograd as tape

            return tape.concatenate(parts)
        return np.concatenate(parts, axis=-1)

    def astype(self, x: Array, dtype: Any) -> Array:
        return x.astype(dtype) if x.dtype != dtype else x

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        self._refuse_to_derive("a product")
        if self.autodiff in AUTODIFF_SOURCES:
            return BorrowedAutodiff(self, self.autodiff).differentiate(function, y, theta)
        if self._tape():
            from implicitdiff.backends import autograd as tape

            found = tape.differentiate(self, function, y, theta)
            if found is not None:
                return found
        if self._may_be_complex(function, y, theta):
            return ComplexStep(self, function, y, theta)
        return super().differentiate(function, y, theta)

    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        self._refuse_to_derive("a product")
        if self.autodiff in AUTODIFF_SOURCES:
            return BorrowedAutodiff(self, self.autodiff).differentiate_gradient(function, y, theta)
        if self._tape():
            from implicitdiff.backends import autograd as tape

            found = tape.differentiate_gradient(self, function, y, theta)
            if found is not None:
                return found
        if self._may_be_complex(function, y, theta, scalar=True):
            return ComplexGradientDifferences(self, function, y, theta)
        return super().differentiate_gradient(function, y, theta)

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        self._refuse_to_derive("the gradient of outer")
        if self.autodiff in AUTODIFF_SOURCES:
            return BorrowedAutodiff(self, self.autodiff).gradients(function, y, theta)
        if self._tape():
            from implicitdiff.backends import autograd as tape

            found = tape.gradients(function, y, theta)
            if found is not None:
                return found
        if self._may_be_complex(function, y, theta, scalar=True):
            return complex_gradients(self, function, y, theta)
        return super().gradients(function, y, theta)

    def _refuse_to_derive(self, what: str) -> None:
        if self.slices is not None:  # a difference or a tape would see this process's slice only
            raise DerivativeError(
                f"{what} is needed and not given, and each process holds a slice: nothing can be derived.\n"
                "Next: give hvp (or jvp and vjp), mixed_vjp and mixed_jvp, and the cotangent dL/dy in place of outer."
            )

    def _tape(self) -> bool:
        if self.autodiff == "autograd" and "autograd" not in sys.modules:
            raise InputError('autodiff = "autograd", and autograd was not imported: write the function with it.')
        return self.autodiff in {"auto", "autograd"} and "autograd" in sys.modules

    def _may_be_complex(self, function: Callable[..., Array], y: Array, theta: Array, *, scalar: bool = False) -> bool:
        if self.autodiff == "complex_step":
            return True
        if self.autodiff != "auto":
            return False
        return is_analytic(self, function, y, theta, scalar=scalar)

    # -- loops and linear algebra ----------------------------------------------------------------------
    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        own = len(items) + 1

        def many(x: Array) -> Array:
            if x.ndim == own:
                return product(x)
            if self.slices is not None:
                self.slices.refuse_many()
            if not x.shape[0]:
                return np.asarray(product(np.zeros_like(x, shape=x.shape[1:])))[None][:0]
            first = product(x[0])
            out = np.empty((x.shape[0], *first.shape), dtype=first.dtype)
            out[0] = first
            for i in range(1, x.shape[0]):
                out[i] = product(x[i])
            return out

        return many

    def peak_memory(self, function: Callable[[], Any]) -> int | None:
        import tracemalloc

        if tracemalloc.is_tracing():  # somebody else's
            return None
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def address(self, x: Array) -> Any:
        if not isinstance(x, np.ndarray) or not x.size or not x.flags.c_contiguous:
            return None
        return x.__array_interface__["data"][0], x.size, x.dtype

    def local(self, y: Any, theta: Any) -> bool:
        return self.slices is None

    def _of_slices(self, prepared: Any, b: Any, x0: Any, transposed: bool) -> Any:
        cast("Slices", self.slices).check(prepared, b)
        return prepared.solve(b, x0, transposed=transposed)

    def space(self, x: Array) -> Any:
        return space_of(x.shape, x.dtype) if self.slices is None else self.vector_space(x.shape, x.dtype, "cpu")

    def vector_space(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        if self.slices is not None:
            return SliceSpace(shape, dtype, self.slices)
        return space_of(tuple(shape), dtype)

    def to_double(self, x: Array) -> Array:
        return x.astype(np.float64, copy=False)

    def lu_factor(self, matrix: Array) -> Any:
        if matrix.ndim == 2:
            return lapack.dgetrf(matrix)[:2]
        try:
            return np.linalg.inv(matrix)  # one loop in C; see ArrayAPIBackend.lu_factor
        except np.linalg.LinAlgError:  # some item: find out which
            return super().lu_factor(matrix)

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        if isinstance(factor, tuple):
            lu, pivots = factor
            # SciPy's wrapper counts the pivots up to 1-based and down again in place: threads need a copy each.
            return lapack.dgetrs(lu, pivots.copy(), b, trans=int(transposed))[0]
        return super().lu_solve(factor, b, transposed)

    def has_ldl(self, matrix: Array) -> bool:
        return matrix.ndim == 2 and hasattr(lapack, "dsytrs")  # which SciPy does not always have

    def ldl_factor(self, matrix: Array) -> Any:
        if not self.has_ldl(matrix):
            return super().ldl_factor(matrix)
        work = max(64 * matrix.shape[0], 1)  # for blocks; without it LAPACK goes column by column
        return lapack.dsytrf(matrix.T, lower=1, lwork=work)[:2]  # symmetric: Aᵀ is A in LAPACK's order

    def ldl_solve(self, factor: Any, b: Array) -> Array:
        if len(factor) == 2 and getattr(factor[1], "dtype", None) == np.int32 and self.has_ldl(factor[0]):
            return lapack.dsytrs(*factor, b, lower=1)[0]
        return super().ldl_solve(factor, b)

    def cho_factor(self, matrix: Array) -> Array:
        if matrix.ndim == 2:
            return self._cholesky(matrix)
        try:
            return np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:  # some item: find out which
            return np.stack([self._cholesky(m) for m in matrix])

    def _cholesky(self, matrix: Array) -> Array:
        factor, info = lapack.dpotrf(matrix.T, lower=1, clean=1)  # symmetric: Aᵀ is A in LAPACK's order
        return factor if info == 0 else np.full_like(matrix, np.nan)

    def cho_solve(self, factor: Array, b: Array) -> Array:
        if factor.ndim == 2:
            return lapack.dpotrs(factor, b, lower=1)[0]
        with np.errstate(all="ignore"):
            half = triangular_solve(np, factor, b)
            return triangular_solve(np, np.matrix_transpose(factor), half, lower=False)
