"""Pytrees end here: flattening, with names of the leaves for messages.

A tree is an array (or a Python float), or any nesting of the containers that ``optree`` knows: tuples,
named tuples, lists, dicts, deques and registered classes. ``None`` is an empty tree. A bare array, by far
the most common tree, is recognised without importing ``optree``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Tree", "flatten", "is_leaf", "map_leaves", "same_structure"]


class Tree(NamedTuple):
    """A flattened tree.

    Attributes
    ----------
    leaves : list
        The leaves, in the order of the structure.
    spec : object or None
        The structure; None for a bare leaf.
    """

    leaves: list[Any]
    spec: Any

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Put other leaves into the same structure."""
        if self.spec is None:
            (leaf,) = leaves
            return leaf
        return self.spec.unflatten(leaves)

    def path(self, index: int, name: str) -> str:
        """How a user would write leaf ``index`` of the tree called ``name``: ``theta['w'][0]``."""
        return name if self.spec is None else str(self.spec.accessors()[index].codify(name))


def is_leaf(tree: Any) -> bool:
    """Whether the object is a leaf for certain: an array, a number or a string."""
    return hasattr(tree, "dtype") or isinstance(tree, (bool, int, float, complex, str, bytes))


def flatten(tree: Any) -> Tree:
    """Flatten a tree into its leaves and its structure."""
    if is_leaf(tree):
        return Tree([tree], None)
    import optree  # a bare array needs none of it

    leaves, spec = optree.tree_flatten(tree)
    if "jax" in sys.modules and not all(map(is_leaf, leaves)):
        return _registered_with_jax(tree)
    return Tree(leaves, None if spec.is_leaf() else spec)


class _JaxSpec:
    """The structure of a tree with containers that only JAX knows."""

    def __init__(self, paths: list[str], treedef: Any) -> None:
        self.paths, self.treedef = paths, treedef

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return self.treedef.unflatten(leaves)

    def accessors(self) -> list[_JaxSpec]:
        return [_JaxSpec([path], None) for path in self.paths]

    def codify(self, name: str) -> str:
        return name + self.paths[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _JaxSpec) and bool(self.treedef == other.treedef)

    __hash__ = None  # type: ignore[assignment]


def _registered_with_jax(tree: Any) -> Tree:
    """Flatten a tree with containers that were registered with JAX (dataclasses), which is loaded already."""
    trees = sys.modules["jax"].tree_util
    found, treedef = trees.tree_flatten_with_path(tree)
    if treedef == trees.tree_structure(0):
        return Tree([tree], None)
    return Tree([leaf for _, leaf in found], _JaxSpec([trees.keystr(path) for path, _ in found], treedef))


def same_structure(a: Tree, b: Tree) -> bool:
    """Whether two flattened trees have the same containers."""
    if a.spec is None or b.spec is None:
        return a.spec is b.spec
    return bool(a.spec == b.spec)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to each leaf."""
    flat = flatten(tree)
    return flat.unflatten([function(leaf) for leaf in flat.leaves])
