"""What a function sees beside its arguments: another value there makes another program.

A compiled program holds the values that its functions found in their closures, defaults, globals, objects, classes and
modules when it was traced. A user who calls a function eagerly expects what is there now, so these values are looked at
in every call. What cannot be compared counts as changed.
"""

from __future__ import annotations

import array
import datetime
import decimal
import enum
import fractions
import functools
import math
import pathlib
import random
import re
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from implicitdiff.closures import LIMIT, PLAIN, Memory, inside, is_library, sees

__all__ = ["Contents", "captures_differentiated", "reference", "same"]

_CONTAINERS = (list, tuple, dict, set, frozenset, deque, Mapping, slice, np.ndarray)
_FIXED = (
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.MethodWrapperType, np.ufunc, np.dtype,
    enum.Enum, enum.EnumMeta, Memory,
)  # fmt: skip
"""What has no contents that change."""
_VALUES = (range, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction,
           pathlib.PurePath, re.Pattern)  # fmt: skip
"""What is compared as it is."""
_ASIDE = frozenset(("_io", "_thread", "asyncio", "concurrent", "inspect", "io", "jax", "jaxlib", "logging", "operator",
                    "threading", "typing", "warnings"))  # fmt: skip
"""Libraries whose objects have nothing in them that a derivative is made of, unless they wrap a function."""
_STATES: dict[type, Callable[[Any], Any]] = {
    random.Random: lambda source: source.getstate(),
    np.random.Generator: lambda source: source.bit_generator.state,
    np.random.RandomState: lambda source: source.get_state(),
}


class Contents:
    """The values that some functions see, so that they can be compared later without keeping them alive.

    Parameters
    ----------
    roots : iterable
        Functions, and objects that hold some.
    held : iterable
        Objects that are known to be equal to those of before: what counts is what they hold.

    Attributes
    ----------
    unknown : str or None
        Type of a value that cannot be compared: then the contents equal none.
    """

    def __init__(self, roots: Iterable[Any], held: Iterable[Any] = ()) -> None:
        self.unknown: str | None = None
        self._tokens: list[Any] = []
        seen: dict[int, tuple[int, Any]] = {}  # the values, too, or another could come to bear the id of one
        left = [part for value in held if type(value) not in PLAIN for part in inside(value)]
        left += roots
        while left:
            value = left.pop()
            if id(value) in seen:
                self._tokens.append(seen[id(value)][0])
            elif len(self._tokens) > LIMIT:
                self.unknown = f"more than {LIMIT} values"
                break
            else:
                self._collect(value, seen, left)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contents):
            return NotImplemented
        if self.unknown is not None or len(self._tokens) != len(other._tokens):
            return False
        return all(map(same, self._tokens, other._tokens))

    __hash__ = None  # type: ignore[assignment]

    def _collect(self, value: Any, seen: dict[int, tuple[int, Any]], left: list[Any]) -> None:
        """Append the token of a value, and its parts to what is left: equal tokens stand for what looks the same."""
        token = _token(value)
        if token is not None:
            self._tokens.append(token)
            return
        seen[id(value)] = len(seen), value
        parts = _parts(value)
        if not parts and not isinstance(value, (*_CONTAINERS, type)) and type(value) is not object:
            self.unknown = f"{type(value).__module__}.{type(value).__qualname__}"
        self._tokens.append(reference(type(value) if isinstance(value, _CONTAINERS) else value))
        self._tokens.append(len(parts))
        left += parts


def captures_differentiated(roots: Iterable[Any]) -> bool:
    """Whether some functions see a value, beside their arguments, that JAX is differentiating."""
    return sees(roots, lambda value: isinstance(value, jax.Array), _is_differentiated)


def _is_differentiated(tracer: Any) -> bool:
    """Whether a tracer carries a tangent, be it under a map."""
    while isinstance(tracer, jax.core.Tracer):
        if type(tracer).__name__ in {"JVPTracer", "LinearizeTracer"}:
            return True
        tracer = getattr(tracer, "val", None)
    return False


def _parts(value: Any) -> tuple[Any, ...]:
    """What is to be compared of a value in its place."""
    if isinstance(value, (types.FunctionType, dict, list, tuple)):
        return inside(value)
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, np.ndarray):  # of objects
        return tuple(value.ravel())
    state = _STATES.get(type(value))
    return inside(value) if state is None else (state(value),)


def _token(value: Any) -> Any:
    """What a value is compared by, where it is not by its parts; None where it is."""
    kind: Any = type(value)
    token = _by_type(kind)
    if token is not None:
        return token(value)
    if isinstance(value, type):
        return reference(value) if is_library(value.__module__) else None
    if _is_aside(value, kind.__module__.partition(".")[0]):
        return reference(value)
    return None


@functools.lru_cache(maxsize=4096)
def _by_type(kind: Any) -> Callable[[Any], Any] | None:
    """What makes the tokens of values of a type; None where that depends on the value, or it has parts."""
    if kind in PLAIN:
        return _plain
    if issubclass(kind, np.ndarray):
        return _array
    if issubclass(kind, np.generic):
        return lambda value: (value.dtype.str, value.tobytes())
    if issubclass(kind, (bytearray, memoryview, array.array)):
        return lambda value: (kind, zlib.crc32(bytes(value)))
    if issubclass(kind, _VALUES):
        return lambda value: (kind, value)
    if kind.__module__.partition(".")[0] == "torch" and hasattr(kind, "_version"):
        return lambda value: (reference(value), value._version)
    return reference if issubclass(kind, (*_FIXED, jax.Array, jax.core.Tracer)) else None


def _plain(value: Any) -> Any:
    if type(value) is float:
        return value, math.copysign(1.0, value)
    return reference if value is None else value


def _array(value: Any) -> Any:
    if value.dtype == object:
        return None
    return type(value), value.shape, value.dtype.str, zlib.crc32(np.ascontiguousarray(value).data)


def _is_aside(value: Any, library: str) -> bool:
    """Whether a value belongs to a library whose objects hold nothing, unless they wrap a function."""
    if library not in _ASIDE or isinstance(value, (types.FunctionType, *_CONTAINERS)):
        return False
    return not hasattr(value, "__wrapped__") and not (library == "jax" and callable(value))


def same(a: Any, b: Any) -> bool:
    """Whether two tokens stand for the same thing, which is still there."""
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        a, b = a(), b()
        return a is b and a is not None
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def reference(value: Any) -> Any:
    """Make a token of the identity of a value; it does not keep the value alive."""
    if isinstance(value, types.MethodType):  # made anew at each look
        return id(value.__self__), id(value.__func__)
    try:
        return weakref.ref(value)
    except TypeError:
        return type(value).__qualname__, id(value)
