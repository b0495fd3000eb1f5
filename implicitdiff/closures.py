"""What a function sees beside its arguments: its closure, its defaults, globals, and what objects hold."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["DEPTH", "PLAIN", "inside", "sees"]

DEPTH = 4
"""Functions within functions, attributes of objects, entries of containers: so far down."""

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), type(Ellipsis)))


def sees(roots: Iterable[Any], is_array: Callable[[Any], bool], wanted: Callable[[Any], bool]) -> bool:
    """Whether functions, or objects that hold some, see an array of a certain kind.

    Parameters
    ----------
    roots : iterable
    is_array : callable
        Whether a value is one to ask about, and to look into no further.
    wanted : callable
        What to ask about it.
    """
    seen: set[int] = set()

    def look(value: Any, depth: int) -> bool:
        if is_array(value):
            return wanted(value)
        if type(value) in PLAIN or isinstance(value, (types.ModuleType, type)) or id(value) in seen:
            return False
        seen.add(id(value))
        return depth > 0 and any(look(part, depth - 1) for part in inside(value))

    return any(look(root, DEPTH) for root in roots)


def inside(value: Any) -> tuple[Any, ...]:
    """What a value is made of, as far as Python shows it."""
    if isinstance(value, (list, tuple)):  # named tuples, too
        return tuple(value)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, set):
        return (len(value),)
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if hasattr(value, "__wrapped__"):
        return (value.__wrapped__,)
    called = getattr(type(value), "__call__", None)  # noqa: B004
    held = (vars(value),) if hasattr(value, "__dict__") else ()
    return (*held, called) if isinstance(called, types.FunctionType) else held


def _of_function(function: types.FunctionType) -> tuple[Any, ...]:
    """Cells, defaults, and the globals that its code names."""
    parts: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # not filled yet
            parts.append(None)
    parts += [function.__defaults__, function.__kwdefaults__]
    space = function.__globals__
    parts += [space[name] for name in _names(function.__code__) if name in space and _owned(space[name], space)]
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function looks up outside, those of the functions written inside it included."""
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _owned(value: Any, space: dict[str, Any]) -> bool:
    """Whether a global is looked into: not modules and classes, nor functions of other modules."""
    if isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        return False
    return not isinstance(value, types.FunctionType) or value.__globals__ is space
