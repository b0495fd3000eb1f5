"""What a compiler of Python code is to step over: a solve looks at numbers, and is no graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["is_within_compiled", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")

_within: ContextVar[bool] = ContextVar("within a compiled function", default=False)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.compile`` call a function as it is, in one break of the graph around it.

    Every public function that takes arrays goes through here: traced into, a solver's loop would be compiled step by
    step, for each number of steps anew. JAX needs none of it: its tracers go where its arrays go.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = sys.modules.get("torch")  # where it was never imported, nothing is compiled by it
        if torch is not None and torch.compiler.is_compiling():
            return torch.compiler.disable(_stepped_over)(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _stepped_over(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    token = _within.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        _within.reset(token)


def is_within_compiled() -> bool:
    """Whether this was called from a function that ``torch.compile`` made, which steps over it."""
    return _within.get()
