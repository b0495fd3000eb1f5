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
        others = [x for x in cells if not _is_value(x)]
        if all(type(x).__weakrefoffset__ for x in others):
            held += others
            parts = tuple((type(x), x) if _is_value(x) else id(x) for x in cells)
            return function.__code__, id(function.__globals__), parts
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


def _is_value(x: Any) -> bool:
    return type(x) in PLAIN or isinstance(x, np.generic)


def _contents(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            found.append(None)
    return found
