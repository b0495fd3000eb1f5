"""CuPy: cuSOLVER and cuBLAS, vectors that stay on the device and are worked on in place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import array_api_compat.cupy as xp
import cupy
import cupyx
import numpy as np
from cupyx.scipy import linalg

from implicitdiff.arrays import Array
from implicitdiff.backends.array_api import ArrayAPIBackend
from implicitdiff.backends.lending import BorrowedAutodiff
from implicitdiff.errors import BackendError, DerivativeError, DTypeError, UnknownNameError
from implicitdiff.linalg.vector_space import ArraySpace

__all__ = ["CupyBackend", "CupyItemsSpace", "CupySpace"]

# One pass over the memory each; a is a number on the device, or one for each item.
_axpy = cupy.ElementwiseKernel("T a, T x", "T y", "y += a * x", "implicitdiff_axpy")
_scale = cupy.ElementwiseKernel("T a", "T x", "x *= a", "implicitdiff_scale")

_MODES = ("auto", "torch", "finite_differences")
_warning = threading.RLock()  # what is done with warnings is done for all threads


class CupyItemsSpace(ArraySpace):
    """Many vectors, shape (..., n); scalars stay on the device, and nothing waits for them."""

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        _axpy(a[..., None], x, y)
        return y

    def subtract(self, x: Array, y: Array) -> Array:
        return cupy.subtract(x, y, out=x)

    def scale(self, a: Any, x: Array) -> Array:
        _scale(a[..., None], x)
        return x

    def copy(self, x: Array) -> Array:
        return cupy.array(x, dtype=x.dtype, order="C", copy=True)


class CupySpace(CupyItemsSpace):
    """One vector, shape (n,): inner products are cuBLAS's."""

    def inner(self, x: Array, y: Array) -> Array:
        return cupy.dot(x, y)


class CupyBackend(ArrayAPIBackend):
    """Backend for CuPy arrays.

    All arrays of a call have to lie on the current device: CuPy makes new ones there.

    Parameters
    ----------
    autodiff : {"auto", "torch", "finite_differences"}, default "auto"
        Where derivatives come from that the user did not give. ``"torch"`` lends its autodiff to functions that run on
        any framework's arrays; ``"auto"`` takes it where Torch is installed and takes the function, else central
        finite differences.
    """

    name = "cupy"

    def __init__(self, autodiff: str = "auto") -> None:
        super().__init__(xp)
        if autodiff not in _MODES:
            raise UnknownNameError(f"autodiff = {autodiff!r}: expected one of {', '.join(_MODES)}.")
        self.name = "cupy"
        self.autodiff = autodiff

    # -- arrays of the user ------------------------------------------------------------------------
    def is_array(self, x: Any) -> bool:
        return isinstance(x, cupy.ndarray)

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        found = super().as_array(x, device, dtype)
        return found if found is None or found.dtype.kind in "fc" else found.astype(dtype)

    def common_device(self, arrays: Sequence[Array], name: str) -> Any:
        found = super().common_device(arrays, name)
        current = cupy.cuda.Device()
        if found is not None and found != current:
            raise BackendError(
                f"{name} lies on {found}, and the current device is {current}.\n"
                f"Next: call this in `with cupy.cuda.Device({found.id}):`, as CuPy makes new arrays on the current one."
            )
        return found

    def device(self, x: Array) -> Any:
        return x.device

    def to_host(self, x: Array) -> Any:
        return x.get()

    def guard(self, x: Array) -> Array:
        return x.copy()  # a callback that works in place on its argument would silently spoil the iteration

    def astype(self, x: Array, dtype: Any) -> Array:
        return x.astype(dtype, copy=False)

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return self._lent("differentiate", function, y, theta) or super().differentiate(function, y, theta)

    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        found = self._lent("differentiate_gradient", function, y, theta)
        return found or super().differentiate_gradient(function, y, theta)

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        return self._lent("gradients", function, y, theta) or super().gradients(function, y, theta)

    def _lent(self, what: str, *at: Any) -> Any:
        """Derive by Torch; None where finite differences are wanted, or all that is left."""
        if self.autodiff == "torch" or (self.autodiff == "auto" and find_spec("torch") is not None):
            try:
                return getattr(BorrowedAutodiff(self, "torch"), what)(*at)
            except (DerivativeError, DTypeError):  # as far as this one may look, it calls CuPy by name
                if self.autodiff == "torch":
                    raise
        return None

    def synchronize(self, tree: Any) -> None:
        cupy.cuda.Device().synchronize()

    def peak_memory(self, function: Callable[[], Any]) -> int | None:
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        function()
        cupy.cuda.Device().synchronize()
        return pool.total_bytes() - before  # the pool keeps what it took

    # -- loops and linear algebra ----------------------------------------------------------------------
    def waits(self, held: Any) -> bool:
        return isinstance(held, cupy.ndarray)

    def vector_space(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        return (CupySpace if len(shape) == 1 else CupyItemsSpace)(xp, shape, dtype, device)

    def to_numpy(self, x: Array) -> Any:
        return cupy.asnumpy(x)

    def to_double(self, x: Array) -> Array:
        return x.astype(cupy.float64, copy=False)

    def lu_factor(self, matrix: Array) -> Any:
        if matrix.ndim == 2:
            with _warning, warnings.catch_warnings():
                # A zero pivot comes with a warning; here it comes out as the reciprocal condition number.
                warnings.simplefilter("ignore", RuntimeWarning)
                return linalg.lu_factor(matrix, check_finite=False)
        if 0 in matrix.shape:
            return matrix
        # cuBLAS has no batched solve with pivots for many columns that CuPy offers: see ArrayAPIBackend.lu_factor
        with cupyx.errstate(linalg="ignore"):
            inverse = cupy.linalg.inv(matrix)
        # What comes out for a singular item is not told, so every inverse is tried out.
        gap = cupy.max(cupy.abs(matrix @ inverse - cupy.eye(matrix.shape[-1], dtype=matrix.dtype)), axis=(-2, -1))
        return cupy.where((gap < 0.5)[..., None, None], inverse, cupy.nan)

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        if isinstance(factor, tuple):
            return linalg.lu_solve(factor, b, trans=int(transposed), check_finite=False)
        return super().lu_solve(factor, b, transposed)

    def cho_factor(self, matrix: Array) -> Array:
        if 0 in matrix.shape:
            return matrix
        try:
            with cupyx.errstate(linalg="raise"):
                return cupy.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return cupy.full_like(matrix, cupy.nan) if matrix.ndim == 2 else self._sound_factors(matrix)

    def _sound_factors(self, matrix: Array) -> Array:
        """Factors of the items that are positive definite: of the others cuSOLVER leaves a factor half done."""
        with cupyx.errstate(linalg="ignore"):
            factor = cupy.linalg.cholesky(matrix)
        gap = cupy.max(cupy.abs(factor @ xp.matrix_transpose(factor) - matrix), axis=(-2, -1))
        size = cupy.max(cupy.abs(matrix), axis=(-2, -1))
        sound = gap <= float(xp.finfo(matrix.dtype).eps) ** 0.5 * size
        return cupy.where(sound[..., None, None], factor, cupy.nan)

    def cho_solve(self, factor: Array, b: Array) -> Array:
        half = linalg.solve_triangular(factor, b, lower=True)
        return linalg.solve_triangular(factor, half, trans="T", lower=True)
