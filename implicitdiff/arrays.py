"""Small helpers over an array namespace: norms that cannot overflow, probes, finiteness."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

import numpy as np
from scipy.linalg import blas

from implicitdiff.tolerances import UNITS_OF_ZERO

__all__ = [
    "SAFE",
    "Array",
    "all_finite_items",
    "any_true",
    "around",
    "divisor",
    "ends",
    "everywhere",
    "item_norm",
    "item_numbers",
    "listed",
    "marked",
    "named_items",
    "nan_where",
    "needed",
    "nowhere",
    "numpy_namespace",
    "probe_vector",
    "quotient",
    "times",
    "to_python",
]

numpy_namespace: Any = np if hasattr(np, "unstack") else importlib.import_module("array_api_compat.numpy")
"""NumPy as the array standard has it: itself from 2.1 on, where a layer between costs a third of a small call."""

Array = Any
"""An array of whatever framework is at work."""

KEPT = 2**14
"""Entries up to which a sequence of probes is kept: 128 KiB."""

SAFE = {"f": (1e-25, 1e35), "d": (1e-250, 1e300)}
"""Between which a sum of squares has lost nothing that counts, in single and in double precision."""
_NRM2 = {"f": blas.snrm2, "d": blas.dnrm2}


def times(matrix: Array, x: Array) -> Array:
    """Product of matrices (*items, r, c) with vectors (*rhs, *items, c)."""
    return (matrix @ x[..., None])[..., 0]


def item_norm(xp: Any, x: Array) -> Array:
    """2-norm over the last axis, scaled first so that neither 1e-200 nor 1e200 is lost.

    Parameters
    ----------
    xp : module
        Array namespace.
    x : array, shape (..., n)
        Vectors; n >= 1.

    Returns
    -------
    array, shape (...)
    """
    if type(x) is np.ndarray and x.ndim == 1 and x.dtype.char in "fd":
        return x.dtype.type(_NRM2[x.dtype.char](x))  # BLAS scales, too
    if type(x) is np.ndarray:
        square = np.vecdot(x, x)
        tiny, huge = SAFE[x.dtype.char]
        if np.all((square > tiny) & (square < huge)):  # neither under- nor overflow: no need to scale
            return np.sqrt(square)
    own = getattr(xp, "item_norm", None)  # of a namespace of ours, where numbers may be looked at
    found = None if own is None else own(x)
    if found is not None:
        return found
    largest = xp.max(xp.abs(x), axis=-1)
    usable = xp.isfinite(largest) & (largest > 0)
    scale = xp.where(usable, largest, xp.ones_like(largest))
    scaled = x / scale[..., None]
    return scale * xp.linalg.vector_norm(scaled, axis=-1)


def all_finite_items(xp: Any, x: Array) -> Array:
    """Whether every entry of the last axis is finite, per item."""
    return xp.all(xp.isfinite(x), axis=-1)


def any_true(xp: Any, mask: Array) -> bool:
    """Whether any entry is true, as a Python bool (a synchronisation on an accelerator)."""
    if mask is True or mask is False or type(mask) is np.bool_:
        return bool(mask)
    if not mask.shape:  # one number, as nearly always
        return bool(mask)
    return bool(mask.any() if isinstance(mask, np.ndarray) else xp.any(mask))


def nowhere(mask: Array) -> bool:
    """Whether a mask of NumPy is false everywhere, so that what is for its items can be left out; False elsewhere.

    It costs no synchronisation, and tells nothing of what is traced.
    """
    return not mask.any() if isinstance(mask, np.ndarray) else isinstance(mask, (np.bool_, bool)) and not mask


def marked(xp: Any, mask: Array, code: int, status: Array) -> Array:
    """Return integers with a code in the items of a mask; as they are, where the mask is seen to be empty."""
    return status if nowhere(mask) else xp.where(mask, xp.full_like(status, code), status)


def ends(xp: Any, x: Array) -> tuple[Array, Array]:
    """Least and largest entry of the last axis."""
    if type(x) is np.ndarray:  # NumPy's functions ask whether these are really arrays
        return x.min(axis=-1), x.max(axis=-1)
    return xp.min(x, axis=-1), xp.max(x, axis=-1)


def everywhere(mask: Array) -> bool:
    """Whether a mask of NumPy is true everywhere; False elsewhere."""
    return bool(mask.all()) if isinstance(mask, np.ndarray) else isinstance(mask, (np.bool_, bool)) and bool(mask)


def divisor(xp: Any, x: Array) -> Array:
    """Return x where it is positive, else one: what is safe to divide by."""
    good = x > 0
    return x if everywhere(good) else xp.where(good, x, xp.ones_like(x))


def quotient(xp: Any, a: Any, b: Array, usable: Array) -> Array:
    """a/b where b is usable, else zero."""
    if everywhere(usable):
        return a / b
    return xp.where(usable, a / xp.where(usable, b, xp.ones_like(b)), xp.zeros_like(b))


def needed(backend: Backend, mask: Array) -> bool:
    """Whether work on the items of a mask is needed, or may be: where values are not seen, it has to be done."""
    return backend.traced or any_true(backend.xp, mask)


def nan_where(backend: Backend, mask: Array, x: Any) -> Any:
    """Return a vector with NaN in the items of a mask, in all of its right-hand sides."""
    space = backend.space(x)
    return space.select(backend.xp.broadcast_to(mask, space.items), space.nan(), x)


def probe_vector(xp: Any, n: int, dtype: Any, device: Any, start: int = 0, *, constant: bool = True) -> Array:
    """Return n entries of a fixed sequence without structure, from number ``start`` on, of order one.

    A quasi-random sequence needs no generator, hence no seed and no state to touch, and is made on
    the device itself; a short one on the host is kept. To a compiler that is a constant: cosines of a counter it would
    work into every loop that reads them, and so compute them again for each entry of a matrix.
    """
    if constant and n <= KEPT and device in (None, "cpu") and isinstance(dtype, np.dtype):
        return xp.asarray(_kept_probe(n, dtype, start), copy=True)
    return _made_probe(xp, n, dtype, device, start)


@lru_cache(maxsize=256)
def _kept_probe(n: int, dtype: np.dtype[Any], start: int) -> Array:
    z = _made_probe(numpy_namespace, n, dtype, None, start)
    z.flags.writeable = False
    return z


def _made_probe(xp: Any, n: int, dtype: Any, device: Any, start: int) -> Array:
    index = xp.arange(start + 1, start + n + 1, dtype=dtype, device=device)
    z = index * index
    z *= math.sqrt(3.0)  # in place, where the library can: this must not need more memory than the solve
    z += 1.0
    z = xp.cos(z)
    z *= 0.5
    index *= math.sqrt(2.0)
    z += xp.cos(index)
    return z


def around(space: Any, x: Any) -> list[Any]:
    """Return points near x, one for each unit that a zero of x may have."""
    first, second = (space.nearby(x, zero) for zero in UNITS_OF_ZERO[:2])
    if bool(space.is_zero(second - first)):  # there is none
        return [first]
    return [first, second, *(space.nearby(x, zero) for zero in UNITS_OF_ZERO[2:])]


def item_numbers(xp: Any, mask: Array) -> list[int]:
    """Return the numbers of the true items of a one-dimensional mask."""
    numbers = xp.nonzero(xp.reshape(mask, (-1,)))[0]
    return [int(numbers[i]) for i in range(numbers.shape[0])]


def listed(names: Sequence[Any], limit: int = 8) -> str:
    """Join names by commas; a list that is cut says how many more there are."""
    more = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {more} more" if more > 0 else "")


def named_items(xp: Any, mask: Array) -> str:
    """Name the true items of a one-dimensional mask: ``item 3``, or ``items 3, 5 and 7 more``."""
    numbers = item_numbers(xp, mask)
    return f"{'item' if len(numbers) == 1 else 'items'} {listed(numbers)}"


def to_python(x: Array) -> Any:
    """A 0-d array as the Python number it holds; anything else unchanged."""
    return x.item() if hasattr(x, "item") and getattr(x, "shape", None) == () else _number(x)


def _number(x: Array) -> Any:
    if getattr(x, "shape", None) == ():
        for kind, convert in (("bool", bool), ("int", int)):
            if kind in str(x.dtype):
                return convert(x)
        return float(x)
    return x
