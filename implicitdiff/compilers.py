"""What a compiler of Python code is to step over: a solve looks at numbers, and is no graph."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["is_within_compiled", "public", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")

_within: ContextVar[bool] = ContextVar("within a compiled function", default=False)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.compile`` call a function as it is, in one break of the graph around it.

    Every public function that takes arrays goes through here: traced into, a solver's loop would be compiled step by
    step, for each number of steps anew. JAX needs none of it: its tracers go where its arrays go.
    """
    return _wrapped(function, None)


def public(options: type, defaults: Mapping[str, Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Spell out in a function's signature what it takes as ``**options``, refuse anything else; `untraced`, too.

    Parameters
    ----------
    options : TypedDict
        Names and types.
    defaults : mapping
        Value of an option that is not given, by its name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults[name],
                annotation=getattr(kind, "__forward_arg__", kind),
            )
            for name, kind in options.__annotations__.items()
        ]
        call = _wrapped(function, frozenset(p.name for p in (*fixed, *added)))
        vars(call)["__signature__"] = signature.replace(parameters=[*fixed, *added])
        return call

    return decorate


def _wrapped(function: Callable[P, R], known: frozenset[str] | None) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = sys.modules.get("torch")  # where it was never imported, nothing is compiled by it
        if torch is not None and torch.compiler.is_compiling():
            return torch.compiler.disable(_stepped_over)(function, known, args, kwargs)
        if known is not None and not known.issuperset(kwargs):
            raise _unknown(function, known, kwargs)
        return function(*args, **kwargs)

    return call


def _unknown(function: Any, known: frozenset[str], kwargs: Mapping[str, Any]) -> TypeError:
    name = next(name for name in kwargs if name not in known)
    return TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")


def _stepped_over(
    function: Callable[..., Any], known: frozenset[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if known is not None and not known.issuperset(kwargs):
        raise _unknown(function, known, kwargs)
    token = _within.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        _within.reset(token)


def is_within_compiled() -> bool:
    """Whether this was called from a function that ``torch.compile`` made, which steps over it."""
    return _within.get()
