"""Steps of a loop under JAX: compiled once, with data as arguments, and solvers that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["compiled", "from_host"]

_NOT_TRACEABLE = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError,
)  # fmt: skip


def compiled(backend: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function(backend, data, *trees)`` as a program of data and trees.

    Arrays in data are arguments of the program: as constants, large ones would be copied into it.
    """
    programs: list[Any] = []

    def call(data: Any, *trees: Any) -> Any:
        leaves, form = jax.tree.flatten(data)
        moves = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
        if not programs:

            def run(arrays: list[Any], *trees: Any) -> Any:
                found = iter(arrays)
                merged = [next(found) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
                return function(backend, jax.tree.unflatten(form, merged), *trees)

            programs.append(jax.jit(run))
        return programs[0]([leaf for leaf, m in zip(leaves, moves, strict=True) if m], *trees)

    return call


def from_host(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Return a function that is traced where it can be, and else called on the host."""

    def call(*trees: Any) -> Any:
        try:
            jax.eval_shape(function, *trees)
        except _NOT_TRACEABLE:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)

            def numbers(*host: Any) -> Any:
                found = function(*host)
                return jax.tree.map(lambda leaf, form: np.asarray(leaf, dtype=form.dtype), found, shapes)

            return jax.pure_callback(numbers, shapes, *trees)
        return function(*trees)

    return call
