"""The vector spaces of the iterative solvers over JAX: nothing is written in place, and an index may be traced."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from implicitdiff.arrays import Array
from implicitdiff.backends.jax.varying import alike, anywhere
from implicitdiff.linalg.vector_space import ArraySpace, TreeSpace, TreeVector

__all__ = ["JaxSpace", "JaxTreeSpace"]

STAGES = (16, 64)
"""Vectors of a basis that are multiplied at once in the first steps.

A compiled program has no room that grows; the work of a step follows the vectors that there are, not those that may
come.
"""


class JaxSpace(ArraySpace):
    """Vectors of shape (..., n)."""

    def put_row(self, matrix: Array, j: Any, row: Array) -> Array:
        return matrix.at[..., j, :].set(row)

    def copy_row(self, matrix: Array, j: Any) -> Array:
        return _taken_out(super().copy_row(matrix, j))

    def copy(self, x: Array) -> Array:
        return x  # nobody can change it

    def select(self, mask: Array, x: Array, y: Array) -> Array:
        return super().select(anywhere(mask, x, y), x, y)

    def stages(self, k: int) -> tuple[int, ...]:
        return (*(size for size in STAGES if size < k), k)

    def project(self, basis: Array, j: Any, x: Array, room: int) -> Array:
        known = (basis[..., :room, :] @ x[..., None])[..., 0]  # vectors beyond j are zero
        return _padded(known, basis.shape[-2])

    def combine(self, basis: Array, j: Any, c: Array, room: int) -> Array:
        def part(first: int, end: int) -> Array:
            return (c[..., None, first:end] @ basis[..., first:end, :])[..., 0, :]

        return _by_stages(j, self.stages(room), part)

    def solve_triangular(self, upper: Array, b: Array) -> Array:
        return lax.linalg.triangular_solve(upper, b[..., None], left_side=True, lower=False)[..., 0]


class JaxTreeSpace(TreeSpace):
    """Vectors that are tuples of leaves, each with the sharding that it has."""

    def select(self, mask: Array, x: TreeVector, y: TreeVector) -> TreeVector:
        return x.map(lambda a, b: jnp.where(anywhere(mask, a, b), a, b), y)

    def ones(self, leaf: Array) -> Array:
        return (leaf == leaf).astype(leaf.dtype)  # made of the leaf, so that a compiled program shards it likewise

    def put_leaf(self, rows: Array, j: Any, leaf: Array) -> Array:
        return rows.at[j].set(leaf)

    def put_row(self, matrix: Array, j: Any, row: Array) -> Array:
        return matrix.at[..., j, :].set(row)

    def copy_row(self, matrix: Array, j: Any) -> Array:
        return _taken_out(super().copy_row(matrix, j))

    def stages(self, k: int) -> tuple[int, ...]:
        return (*(size for size in STAGES if size < k), k)

    def project(self, basis: TreeVector, j: Any, x: TreeVector, room: int) -> Array:
        known = super().project(basis.map(lambda rows: rows[:room]), j, x, room)
        return _padded(known, basis.leaves[0].shape[0])

    def combine(self, basis: TreeVector, j: Any, c: Array, room: int) -> TreeVector:
        def part(first: int, end: int) -> TreeVector:
            rows = basis.map(lambda leaf: leaf[first:end])
            return super(JaxTreeSpace, self).combine(rows, j, c[first:end], end - first)

        return _by_stages(j, self.stages(room), part)

    def solve_triangular(self, upper: Array, b: Array) -> Array:
        return lax.linalg.triangular_solve(upper, b[..., None], left_side=True, lower=False)[..., 0]


def _taken_out(row: Array) -> Array:
    """Return a row as it is before its matrix is written to: else a compiler copies the whole matrix for it."""
    return lax.optimization_barrier(row)


def _by_stages(j: Any, stages: tuple[int, ...], part: Callable[[int, int], Any]) -> Any:
    """Add up the parts of a sum over rows 0 … j: the first stage, and each later one where j is in it or beyond."""
    out = part(0, stages[0])
    for first, end in itertools.pairwise(stages):
        more = jnp.asarray(j >= first)

        def once(state: tuple[Any, Any], first: int = first, end: int = end) -> tuple[Any, Any]:
            return jnp.zeros_like(state[0]), jax.tree.map(jnp.add, state[1], part(first, end))

        out = lax.while_loop(lambda state: state[0], once, alike((more, out)))[1]  # a cond does both under vmap
    return out


def _padded(c: Array, rows: int) -> Array:
    return jnp.pad(c, [(0, 0)] * (c.ndim - 1) + [(0, rows - c.shape[-1])])
