"""Values that JAX is tracing or transforming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from implicitdiff.closures import sees

__all__ = ["is_traced", "is_transformed", "underivable"]


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is a value that JAX is tracing."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _is_within_program(value: Any) -> bool:
    """Whether JAX is tracing a program, as under ``jit``, and does not only transform operations on numbers."""
    while isinstance(value, jax.core.Tracer):
        inner = getattr(value, "val", getattr(value, "primal", None))
        if inner is None:
            return True
        value = inner
    return False


def is_transformed(functions: Iterable[Any], given: Any) -> bool:
    """Whether JAX transforms operations one by one (as ``vmap`` does, without ``jit``), and only what is in `given`.

    Each of hundreds of operations is compiled by itself then; one program made of them all is compiled once.
    """
    if any(map(_is_within_program, jax.tree.leaves(given))):
        return False
    return not sees(functions, lambda value: isinstance(value, jax.Array), is_traced)


def underivable(tree: Any, error: Callable[[], Exception]) -> Any:
    """Return a tree of values of which a derivative is an error."""

    @jax.custom_jvp
    def once(values: Any) -> Any:
        return values

    @once.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise error()

    return once(tree)
