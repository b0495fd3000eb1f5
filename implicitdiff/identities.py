"""Functions as keys: what is known of a function is kept as long as it lives, and forgotten with it."""

from __future__ import annotations

import threading
import types
import weakref
from typing import Any

import numpy as np

from implicitdiff.closures import PLAIN

__all__ = ["identity", "remember"]

_lock = threading.Lock()


def identity(function: Any, held: list[Any]) -> Any:
    """Return a key of a function, and list in ``held`` what has to live for it to mean the same.

    A function that is written inside another is the same function at each turn of a loop, as long as it finds the same
    objects in its closure.
    """
    if isinstance(function, types.MethodType):
        held += [function.__self__, function.__func__]
        return id(function.__self__), id(function.__func__)
    if type(function) is types.FunctionType:
        cells = [*_contents(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        others, parts, followed = [], list[Any](), True
        for x in cells:
            if type(x) in PLAIN or isinstance(x, np.generic):
                parts.append((type(x), x))
            else:
                others.append(x)
                parts.append(id(x))
                followed = followed and bool(type(x).__weakrefoffset__)
        if followed:
            held += others
            return function.__code__, id(function.__globals__), tuple(parts)
    held.append(function)
    return id(function)


def remember(table: dict[Any, Any], key: Any, value: Any, held: list[Any]) -> None:
    """Keep a value in a table under a key, until something of what has to live for that is gone."""

    def drop(_: Any) -> None:
        table.pop(key, None)

    kept: list[Any] = []
    for thing in held:
        try:
            kept.append(weakref.ref(thing, drop))
        except TypeError:  # kept, or its id could come to mean another
            kept.append(thing)
    with _lock:
        table[key] = value, kept


def _contents(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            found.append(None)
    return found
