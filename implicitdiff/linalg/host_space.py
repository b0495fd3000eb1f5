"""One vector whose scalars are the host's own numbers: what a method decides by is seen, and nothing is masked."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.linalg.vector_space import ArraySpace

__all__ = ["HostSpace"]


class HostSpace(ArraySpace):
    """Vectors of shape (n,) in the host's memory, with NumPy's scalars; counters and masks are Python's, or NumPy's.

    Parameters
    ----------
    xp : module
        Array namespace of the scalars.
    shape : tuple of int
        (n,).
    dtype : dtype
        Of NumPy: of the scalars.
    """

    host: ClassVar[bool] = True

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(xp, shape, np.dtype(dtype), "cpu")
        self._type = np.dtype(dtype).type

    def select(self, mask: Array, x: Array, y: Array) -> Array:
        return x if mask else y

    def where(self, mask: Array, a: Any, b: Any) -> Array:
        return a if mask else b

    def scalar(self, value: float) -> Array:
        return self._type(value)

    def counter(self, value: int = 0) -> Array:
        return value

    def any(self, mask: Array) -> Array:
        return mask

    def sqrt(self, a: Array) -> Array:
        return np.sqrt(a) if a > 0 else self._type(0) * a

    def isfinite(self, a: Array) -> Array:
        return np.bool_(math.isfinite(a))  # ~True is −2, and deprecated

    def maximum(self, a: Array, b: Array) -> Array:
        return b if b > a or b != b else a
