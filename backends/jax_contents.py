"""What a function sees beside its arguments: another value there makes another program.

A compiled program holds the values that its functions found in their closures, defaults, globals and objects when it
was traced. A user who calls a function eagerly expects what is there now, so these values are looked at in every call.
"""

from __future__ import annotations

import math
import types
import weakref
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from implicitdiff.closures import DEPTH, PLAIN, inside, sees

__all__ = ["Contents", "captures_differentiated"]

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
    return sees(roots, lambda value: isinstance(value, jax.Array), _is_differentiated)


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
    if kind in PLAIN:
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
        parts = inside(value)
        tokens.append(len(parts))
        for part in parts:
            _collect(part, depth - 1, seen, tokens)


def _reference(value: Any) -> Any:
    if isinstance(value, types.MethodType):  # made anew at each look
        return id(value.__self__), id(value.__func__)
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)
