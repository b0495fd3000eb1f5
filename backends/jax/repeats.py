"""Programs that are compiled again and again, and never run twice: told once, with the cure.

A program belongs to the user's functions, by their identity, and to what they see. A function that is written anew for
each call is another one each time, though its code is the same: that is what programs are counted by.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from implicitdiff.backends.jax.contents import reference, same
from implicitdiff.closures import PLAIN
from implicitdiff.errors import RecompilationWarning
from implicitdiff.outcome import warn

__all__ = ["Repeats", "code_of", "repeats_of"]

MANY = 10
"""Programs in a row of which none was run twice: a few conditions of one factory are no fault."""


@dataclass
class Repeats:
    """Programs made of the same code.

    Parameters
    ----------
    count : int
        How many were made since one was run again.
    tokens : sequence
        What the latest was made of.
    """

    count: int = 0
    tokens: Sequence[Any] = ()


_known: dict[Any, Repeats] = {}
_warned: set[Any] = set()


def code_of(value: Any) -> Any:
    """What remains of a value where it is made anew: the code of a function, the type of a number or an object."""
    while isinstance(value, (types.MethodType, functools.partial)) or hasattr(value, "__wrapped__"):
        value = next(getattr(value, name) for name in ("__func__", "func", "__wrapped__") if hasattr(value, name))
    if isinstance(value, (str, bool)) or value is None:
        return value
    return getattr(value, "__code__", type(value))


def repeats_of(code: Any, rest: Any, named: Sequence[tuple[str, Any]], *, changed: bool) -> Repeats:
    """Count a program that is about to be compiled, and warn where too many like it were run once only.

    Parameters
    ----------
    code : hashable
        Of the functions.
    rest : hashable
        What else tells one kind of program from another: mode, shapes.
    named : sequence of (str, object)
        The parts of a program that may be made anew, under the names that the user knows them by.
    changed : bool
        Whether there is a program of that key, for other values that its functions see.
    """
    repeats = _known.setdefault((code, rest), Repeats())
    repeats.count += 1
    tokens = [value if type(value) in PLAIN else reference(value) for _, value in named]
    if repeats.count > MANY and code not in _warned:
        _warned.add(code)
        pairs = zip(named, repeats.tokens, tokens, strict=True)
        changing = None if changed else next((part for part, old, new in pairs if not same(old, new)), None)
        what, cure = _explained(changing)
        warn(
            f"JAX compiled this derivative {repeats.count} times, and ran none of the programs twice: {what}.\n"
            f"Next: {cure}; or call from within jax.jit.",
            RecompilationWarning,
        )
    repeats.tokens = tokens
    return repeats


def _explained(part: tuple[str, Any] | None) -> tuple[str, str]:
    """What is different at each call, and what to do."""
    data = "pass what changes in args or theta, as arrays"
    if part is None:
        return "its functions see another value, beside their arguments, at each call", data
    name, value = part
    if callable(value):
        code = getattr(code_of(value), "co_filename", None)
        where = f" ({value.__name__}, {Path(code).name}:{code_of(value).co_firstlineno})" if code else ""
        return f"{name}{where} is another function at each call", f"make it once, before the loop, and {data}"
    if name == "args":
        return f"args holds {value!r}, which is part of the program, and another at each call", data
    return f"{name} is another object at each call", "make it once, before the loop"
