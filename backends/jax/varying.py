"""Values that differ between the devices of a ``shard_map``, and those that do not.

Under ``jax.shard_map`` JAX knows of every value over which axes of the mesh it varies, and refuses to let one that
varies stand where one was that does not: in the carry of a loop, in a tangent. What is made inside (unit vectors,
zeros, a probe) does not vary; it has to be marked as what it stands beside.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

__all__ = ["alike", "anywhere", "is_mapped", "varying"]


def is_mapped() -> bool:
    """Whether a ``shard_map`` is being traced."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _axes(leaf: Any) -> frozenset[str]:
    """Axes of the mesh over which a value varies; none outside of a ``shard_map``."""
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", None) or ())  # as it was called until JAX 0.9


def _cast(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _axes(leaf)))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf


def varying(tree: Any, like: Any) -> Any:
    """Return a tree whose leaves vary over the axes over which those of another tree vary, too."""
    return jax.tree.map(lambda leaf, other: _cast(leaf, _axes(other)), tree, like)


def alike(tree: Any) -> Any:
    """Return a tree whose leaves all vary over the axes over which any of them does."""
    axes = frozenset[str]().union(*map(_axes, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _cast(leaf, axes), tree) if axes else tree


def anywhere(mask: Any, *values: Any) -> Any:
    """Return a mask for values that the devices share: true where it is true on any of them."""
    own = frozenset[str]().union(*map(_axes, jax.tree.leaves(values)))
    over = tuple(sorted(_axes(mask) - own))
    if not over:
        return mask
    return lax.pmax(mask.astype("int32"), over) > 0
