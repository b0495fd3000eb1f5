"""What a function sees beside its arguments: another value there makes another program.

A compiled program holds the values that its functions found in their closures, defaults, globals and objects when it
was traced. A user who calls a function eagerly expects what is there now, so these values are looked at in every call.
"""

from __future__ import annotations

import functools
import math
import types
import weakref
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

__all__ = ["Contents", "captures_differentiated"]

DEPTH = 4
"""Functions within functions, attributes of objects, entries of containers: so far down."""

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), type(Ellipsis)))
_CONTAINERS = frozenset((list, tuple, dict, set))
_FIXED = (types.ModuleType, types.BuiltinFunctionType, type, jax.Array, np.ufunc, np.dtype)
"""What has no contents that change."""


class Contents:
    """The values that some functions see, so that they can be compared later without keeping them alive.

    Parameters
    ----------
    roots : iterable
        Functions, and objects that hold some.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._tokens: list[Any] = []
        seen: set[int] = set()
        for root in roots:
            _collect(root, DEPTH, seen, self._tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contents):
            return NotImplemented
        return len(self._tokens) == len(other._tokens) and all(map(_same, self._tokens, other._tokens))

    __hash__ = None  # type: ignore[assignment]


def captures_differentiated(roots: Iterable[Any]) -> bool:
    """Whether some functions see a value, beside their arguments, that JAX is differentiating."""
    seen: set[int] = set()

    def look(value: Any, depth: int) -> bool:
        if isinstance(value, jax.core.Tracer):
            return _is_differentiated(value)
        if type(value) in _PLAIN or isinstance(value, (*_FIXED, np.ndarray, np.generic)) or id(value) in seen:
            return False
        seen.add(id(value))
        return depth > 0 and any(look(part, depth - 1) for part in _inside(value))

    return any(look(root, DEPTH) for root in roots)


def _is_differentiated(tracer: Any) -> bool:
    """Whether a tracer carries a tangent, be it under a map."""
    while isinstance(tracer, jax.core.Tracer):
        if type(tracer).__name__ in {"JVPTracer", "LinearizeTracer"}:
            return True
        tracer = getattr(tracer, "val", None)
    return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        a, b = a(), b()
        return a is b and a is not None
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _collect(value: Any, depth: int, seen: set[int], tokens: list[Any]) -> None:
    """Append the tokens of a value: equal ones stand for values that a function cannot tell apart."""
    kind = type(value)
    if kind in _PLAIN:
        tokens.append((kind, value, math.copysign(1.0, value) if kind is float else None))
        return
    if isinstance(value, _FIXED):
        tokens.append(_reference(value))
        return
    if isinstance(value, np.ndarray) and value.dtype != object:
        tokens.append((value.shape, value.dtype.str, zlib.crc32(np.ascontiguousarray(value).data)))
        return
    if isinstance(value, np.generic):
        tokens.append((value.dtype.str, value.tobytes()))
        return
    if kind not in _CONTAINERS:
        tokens.append(_reference(value))
    if depth and id(value) not in seen:
        seen.add(id(value))
        inside = _inside(value)
        tokens.append(len(inside))
        for part in inside:
            _collect(part, depth - 1, seen, tokens)


def _reference(value: Any) -> Any:
    if isinstance(value, types.MethodType):  # made anew at each look
        return id(value.__self__), id(value.__func__)
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def _inside(value: Any) -> tuple[Any, ...]:
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
