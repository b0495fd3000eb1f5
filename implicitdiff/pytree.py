"""Pytrees end here: flattening, with names of the leaves for messages.

A tree is an array (or a Python float), or any nesting of the containers that ``optree`` knows: tuples,
named tuples, lists, dicts, deques and registered classes. ``None`` is an empty tree. A bare array, by far
the most common tree, is recognised without importing ``optree``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Tree", "copied", "flatten", "hint", "is_leaf", "map_leaves", "same_structure"]


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


def copied(leaf: Any) -> Any:
    """Return a leaf in memory of its own, if it is an array or a sparse matrix that may be changed in place."""
    if type(leaf).__module__.partition(".")[0] in {"jax", "jaxlib"} or not hasattr(leaf, "dtype"):
        return leaf
    if hasattr(leaf, "clone"):
        return leaf.clone()
    if hasattr(leaf, "tocsc") or hasattr(leaf, "flags"):
        return leaf.copy()
    space = getattr(leaf, "__array_namespace__", None)
    return leaf if space is None else space().asarray(leaf, copy=True)


def hint(leaf: Any, where: str) -> str:
    """What to hand in, in place of something that holds an array and is none."""
    if hasattr(leaf, "to_numpy"):
        return f"\nNext: pass {where}.to_numpy()."
    if isinstance(leaf, dict) or hasattr(leaf, "converged"):  # a result of SciPy, which optree takes for a leaf
        for name in ("x", "root"):
            if hasattr(leaf, name):
                return f"\nNext: pass its solution, {where}.{name}."
    return ""


def same_structure(a: Tree, b: Tree) -> bool:
    """Whether two flattened trees have the same containers."""
    if a.spec is None or b.spec is None:
        return a.spec is b.spec
    return bool(a.spec == b.spec)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to each leaf."""
    flat = flatten(tree)
    return flat.unflatten([function(leaf) for leaf in flat.leaves])
