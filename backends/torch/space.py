"""The vector spaces of the iterative solvers over Torch, worked on in place."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from implicitdiff.arrays import Array
from implicitdiff.arrays import numpy_namespace as np_xp
from implicitdiff.backends.torch import namespace as torch_xp
from implicitdiff.linalg.host_space import HostSpace
from implicitdiff.linalg.vector_space import ArraySpace

__all__ = ["TorchItemsSpace", "TorchSpace", "space_on_host"]

_HOST = {torch.float32: np.float32, torch.float64: np.float64}


class TorchSpace(HostSpace):
    """One vector of shape (n,) in the host's memory.

    Vectors are tensors. Scalars and the small matrices of Arnoldi's process are NumPy's: an operation on a tensor of
    one number costs as much as one on a vector of a thousand.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(np_xp, shape, _HOST[dtype])
        self._tensor_dtype = dtype
        self._around = ArraySpace(torch_xp, shape, dtype, "cpu")

    def inner(self, x: Array, y: Array) -> Array:
        return self._type(torch.dot(x, y).item())

    def norm(self, x: Array) -> Array:
        return np.sqrt(self.inner(x, x))

    def largest(self, x: Array) -> Array:
        return self._type(torch.linalg.vector_norm(x, math.inf).item())

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        return y.add_(x, alpha=float(a))

    def aypx(self, a: Any, x: Array, y: Array) -> Array:
        return y.mul_(float(a)).add_(x)

    def subtract(self, x: Array, y: Array) -> Array:
        return x.sub_(y)

    def scale(self, a: Any, x: Array) -> Array:
        return x.mul_(float(a))

    def copy(self, x: Array) -> Array:
        return x.clone() if isinstance(x, torch.Tensor) else np.array(x)

    def zeros(self) -> Array:
        return torch.zeros(self.shape, dtype=self._tensor_dtype)

    # -- around a solve scalars are tensors, too ----------------------------------------------------
    def size(self, x: Array) -> Array:
        return self._around.size(x)

    def finite(self, x: Array) -> Array:
        return (x * 0).sum() == 0  # as for `TorchItemsSpace`

    def is_zero(self, x: Array) -> Array:
        return ~x.any()

    def probe(self) -> Array:
        return self._around.probe()

    def nan(self) -> Array:
        return self._around.nan()

    def nearby(self, x: Array, zero: float = 1.0) -> Array:
        return self._around.nearby(x, zero)

    def worst(self, x: Array) -> Array:
        return self._around.worst(x)

    def entry(self, x: Array, index: Array) -> Array:
        return self._around.entry(x, index)

    # -- a basis for Arnoldi -------------------------------------------------------------------------
    def basis(self, k: int) -> Array:
        return torch.zeros((k, *self.shape), dtype=self._tensor_dtype)

    def project(self, basis: Array, j: Any, x: Array, room: int) -> Array:
        out = np.zeros(basis.shape[0], dtype=self.dtype)
        out[: j + 1] = torch.mv(basis[: j + 1], x).numpy()
        return out

    def combine(self, basis: Array, j: Any, c: Array, room: int) -> Array:
        return torch.from_numpy(c[: j + 1]) @ basis[: j + 1]


@lru_cache(maxsize=256)
def space_on_host(shape: tuple[int, ...], dtype: Any) -> TorchSpace:
    """Return the space of vectors of that shape in the host's memory, which keeps nothing of any of them."""
    return TorchSpace(shape, dtype)


class TorchItemsSpace(ArraySpace):
    """Many vectors, shape (..., n), or vectors on an accelerator: scalars stay tensors, and nothing waits for them."""

    def finite(self, x: Array) -> Array:
        return (x * 0).sum(dim=-1) == 0  # a fifth of the time of torch.isfinite and all

    def is_zero(self, x: Array) -> Array:
        return ~x.any()

    def axpy(self, a: Any, x: Array, y: Array) -> Array:
        return y.addcmul_(x, a[..., None])

    def subtract(self, x: Array, y: Array) -> Array:
        return x.sub_(y)

    def scale(self, a: Any, x: Array) -> Array:
        return x.mul_(a[..., None])

    def copy(self, x: Array) -> Array:
        return x.clone(memory_format=torch.contiguous_format)

    def where(self, mask: Array, a: Any, b: Any) -> Array:
        if isinstance(a, int) and isinstance(b, int):
            a = self.counter(a)
        return torch.where(mask, a, b)
