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


OPTIONS: dict[str, Check] = {
    "damping": (_number, "a finite number"),
    "rtol": (lambda value: value is None or (_number(value) and 0 < value < 1), "a number between 0 and 1"),
    "maxiter": (lambda value: value is None or _count(value), "a positive integer"),
    "restart": (lambda value: value is None or _count(value), "a positive integer"),
    "side": (lambda value: isinstance(value, str) and value in {"right", "left"}, "'right' or 'left'"),
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
            kind = UnknownNameError if isinstance(value, str) and name == "side" else InputError
            raise kind(f"{name} = {value!r}: {type(solver).__name__} expects {expected}.")
