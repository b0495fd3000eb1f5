"""What functions need that run on the arrays of any framework, traced and recorded ones included."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff.arrays import Array, divisor
from implicitdiff.errors import InputError

__all__ = ["check_not_negative", "constant", "expanded", "filled", "item_sum", "namespace", "norm", "plain", "without"]


def namespace(x: Array, *others: Any) -> Any:
    """Return the array namespace of x; where HIPS autograd records one of the values, ``autograd.numpy``."""
    if any(type(value).__module__.startswith("autograd") for value in (x, *others)):
        import autograd.numpy

        return autograd.numpy
    if type(x).__module__.partition(".")[0] == "torch":  # array_namespace has a cache that torch.compile warns about
        import array_api_compat.torch

        return array_api_compat.torch
    import array_api_compat

    return array_api_compat.array_namespace(x)


def item_sum(xp: Any, x: Array, lead: int) -> Array:
    """Sum over all axes but the first ``lead``."""
    axes = tuple(range(lead, len(x.shape)))
    return xp.sum(x, axis=axes) if axes else x


def constant(xp: Any, x: Array, values: np.ndarray) -> Array:
    """Return numbers as an array of the dtype of x, where x is."""
    values = values.astype(str(x.dtype).rpartition(".")[2])
    if xp.__name__ == "autograd.numpy" or type(x).__module__.startswith("jax"):
        return xp.asarray(values)  # autograd has no devices, and a traced value of JAX does not know its own
    return xp.asarray(values, device=x.device)


def plain(x: Any) -> Any:
    """Return what HIPS autograd has wrapped to record it; anything else as it is."""
    while type(x).__module__.startswith("autograd"):
        x = x._value
    return x


def without(xp: Any, x: Array, value: float, instead: float) -> Array:
    """Put another number in place of each entry of a value; the derivative there is 0."""
    found = x == value
    if isinstance(found, (np.ndarray, np.generic)) and not found.any():
        return x  # as nearly always: and HIPS autograd would widen single precision
    return xp.where(found, xp.zeros_like(x) + instead, x)


def filled(xp: Any, x: Array, value: Any) -> Array:
    """Return a number, or an array that broadcasts, as an array of the shape of x."""
    return xp.zeros_like(x) + value


def expanded(value: Any) -> Any:
    """Give an array of one number per vector the axis of the vectors; a number stays one."""
    return value[..., None] if getattr(value, "shape", ()) else value


def norm(xp: Any, x: Array, members: Array | None = None) -> Array:
    """Euclidean norm over the last axis, kept; its derivative at 0 comes out as 0, and nothing overflows.

    Parameters
    ----------
    xp : module
    x : array, shape (..., n)
    members : array, shape (n, groups), optional
        1 where a coordinate belongs to a group: then the norm of each group.

    Returns
    -------
    array, shape (..., 1) or (..., groups)
    """
    # Homogeneous in the scale: what autodiff makes of its derivative cancels.
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
    scale = divisor(xp, largest)
    square = (x / scale) ** 2
    total = xp.sum(square, axis=-1, keepdims=True) if members is None else square @ members
    # √ has no derivative at 0, and a NaN in the branch that is not taken would reach the result.
    root = xp.sqrt(divisor(xp, total))
    return xp.where(total > 0, scale * root, xp.zeros_like(total))


def check_not_negative(**numbers: Any) -> None:
    """Raise for a negative number; of arrays, whose values may not be seen, nothing is asked."""
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not value >= 0:
            raise InputError(f"{name} is {value}; expected a number >= 0.")
