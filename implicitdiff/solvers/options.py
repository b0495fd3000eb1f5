"""What the options of a solver may be: one table, read by every solver when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from implicitdiff.errors import InputError, UnknownNameError

__all__ = ["OPTIONS", "check_options"]

Check = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    """Whether it is a finite real number of Python or NumPy."""
    kind = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _bounds(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(map(_number, value))
    return pair and bool(value[0] * value[1] > 0 and value[0] < value[1])


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


OPTIONS: dict[str, Check] = {
    "damping": (lambda value: _number(value) or value == "auto", "a finite number, or 'auto'"),
    "rtol": (lambda value: value is None or (_number(value) and 0 < value < 1), "a number between 0 and 1"),
    "maxiter": (lambda value: value is None or _count(value), "a positive integer"),
    "recycle": (_whole, "a number of pairs, 0 or more"),
    "restart": (lambda value: value is None or _count(value), "a positive integer"),
    "side": (lambda value: isinstance(value, str) and value in {"right", "left"}, "'right' or 'left'"),
    "terms": (_count, "a positive integer"),
    "steps": (_count, "a positive integer"),
    "step": (
        lambda value: value is None or (value == "auto" if isinstance(value, str) else _number(value) and value != 0),
        "a finite number other than 0, or 'auto'",
    ),
    "tau": (lambda value: _number(value) and value > 0, "a positive number"),
    "bounds": (lambda value: value is None or _bounds(value), "a pair (a, b) of numbers of one sign, a < b"),
    "rank": (_count, "a positive integer"),
    "rho": (lambda value: value is None or (_number(value) and value > 0), "a positive number"),
    "seed": (_whole, "a whole number"),
    "sketch": (lambda value: isinstance(value, str) and value in {"gauss", "columns"}, "'gauss' or 'columns'"),
}
"""Name of an option, the values that it may have, and what to call them."""


def check_options(solver: Any) -> None:
    """Raise for the first field of a solver whose value is none of those that `OPTIONS` allows.

    Raises
    ------
    InputError
        Naming the solver, the option, what it is and what was expected.
    """
    for name in getattr(solver, "__dataclass_fields__", ()):
        allowed, expected = OPTIONS.get(name, (None, ""))
        value = getattr(solver, name)
        if allowed is not None and not allowed(value):
            kind = UnknownNameError if isinstance(value, str) and name in {"side", "sketch", "step"} else InputError
            raise kind(f"{name} = {value!r}: {type(solver).__name__} expects {expected}.")
