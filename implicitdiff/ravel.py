"""From pytrees to vectors and back: validation on the way in, structure on the way out."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array, named_items
from implicitdiff.errors import BackendError, CallbackError, DTypeError, ShapeError
from implicitdiff.linalg.vector_space import TreeVector, is_tree_vector
from implicitdiff.pytree import Tree, flatten, same_structure

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Leaf", "LeafRaveler", "Raveler", "foreign"]


COMPLEX = "Complex data is unsupported: stack real and imaginary parts."


class Leaf(NamedTuple):
    """What is known of one leaf: its shape without the batch axis, dtype, and whether it was a plain number."""

    shape: tuple[int, ...]
    dtype: Any
    number: bool
    size: int


class Raveler:
    """How a tree of arrays becomes a vector of shape (..., n), and back.

    Parameters
    ----------
    backend : Backend
        Of the arrays.
    tree : pytree
        The tree that fixes structure, shapes and dtypes.
    name : str
        What the user calls it, for messages.
    batched : bool
        Whether every leaf carries a leading axis of independent items.
    copy : bool
        Whether to copy: the vector then stays what it is when the user's arrays change.
    bare : bool
        Whether to leave out the vector, and know the structure alone.

    Attributes
    ----------
    n : int
        Length of the vector.
    dtype, device
        Of the vector; the dtype is the leaves' common one.
    items : tuple of int
        ``()`` or ``(number of items,)``.
    """

    def __init__(
        self, backend: Backend, tree: Any, name: str, batched: bool = False, copy: bool = False, *, bare: bool = False
    ) -> None:
        self.backend, self.name = backend, name
        self.tree = flatten(tree)
        arrays = [backend.as_leaf(leaf, self.tree.path(i, name)) for i, leaf in enumerate(self.tree.leaves)]
        self.items = self._items(arrays, name) if batched else ()
        self.leaves: list[Leaf] = []
        for original, array in zip(self.tree.leaves, arrays, strict=True):
            shape = tuple(map(int, array.shape[len(self.items) :]))
            self.leaves.append(Leaf(shape, array.dtype, isinstance(original, float), math.prod(shape)))
        self.n = sum([leaf.size for leaf in self.leaves])
        self.dtype = backend.common_dtype([leaf.dtype for leaf in self.leaves])
        self.device = backend.common_device(arrays, name)
        # one bare array, by far the most common tree, needs none of the walk over leaves
        self._plain = self.tree.spec is None and not self.leaves[0].number
        self._shape = (*self.items, *self.leaves[0].shape) if self._plain else ()
        self._bare = self._plain and len(self.leaves[0].shape) == 1  # and a vector as it is
        self._flat = (*self.items, self.n)
        if bare:
            return
        self.vector = self._join(arrays, self.dtype)
        if copy:
            self.vector = self._copied()

    def _items(self, arrays: list[Array], name: str) -> tuple[int, ...]:
        counts = {a.shape[0] if len(a.shape) else None for a in arrays}
        if len(counts) != 1 or None in counts:
            shapes = ", ".join(str(tuple(a.shape)) for a in arrays) or "no leaves"
            raise ShapeError(
                f"{name}: with batched=True every leaf needs the same leading axis of items; got {shapes}."
            )
        return (int(arrays[0].shape[0]),)

    def _join(self, arrays: list[Array], dtype: Any) -> Array:
        backend = self.backend
        if len(arrays) == 1 and (dtype is None or arrays[0].dtype == dtype):
            return backend.reshape(arrays[0], self._flat)
        if not arrays:
            return backend.xp.zeros((*self.items, 0), dtype=dtype, device=self.device)
        lead = len(self.items)
        parts = [backend.reshape(a, (*self.items, math.prod(a.shape[lead:]))) for a in arrays]
        if dtype is not None:
            parts = [p if p.dtype == dtype else backend.astype(p, dtype) for p in parts]
        return parts[0] if len(parts) == 1 else backend.concat(parts)

    def _copied(self) -> Any:
        return self.backend.xp.asarray(self.vector, copy=True)

    @property
    def space(self) -> Any:
        """Return the space of the vector."""
        return self.backend.space(self.vector)

    def divide(self, vector: Array) -> Any:
        """Return a raveled vector in the form of this raveler's vectors."""
        return vector

    def of_one_item(self) -> Raveler:
        """Return the raveler of one item of a batch: the same structure, and no vector of its own."""
        one = self.structure()
        one.items, one._shape, one._flat = (), self._shape[len(self.items) :], (self.n,)
        return one

    def structure(self) -> Raveler:
        """Return the raveler without its vector."""
        bare = copy.copy(self)
        del bare.vector
        return bare

    def unravel(self, vector: Array) -> Any:
        """Turn vectors (*lead, n) into a tree of leaves (*lead, *shape).

        A vector of another dtype than the raveler's own (complex, or wider for a finite difference)
        is handed on as it is.
        """
        if self._bare:
            return vector
        backend, lead = self.backend, tuple(vector.shape[:-1])
        if self._plain:
            return backend.reshape(vector, (*lead, *self.leaves[0].shape))
        cast = vector.dtype == self.dtype
        leaves, start = [], 0
        for leaf in self.leaves:
            part = vector if leaf.size == self.n else vector[..., start : start + leaf.size]
            if leaf.shape != (leaf.size,):
                part = backend.reshape(part, (*lead, *leaf.shape))
            if cast and leaf.dtype != self.dtype:
                part = backend.astype(part, leaf.dtype)
            leaves.append(backend.number(part) if leaf.number and not lead else part)
            start += leaf.size
        return self.tree.unflatten(leaves)

    def like(self, tree: Any, name: str, *, dtype: Any = None, callback: bool = False) -> Array:
        """Ravel another tree of the same structure and shapes.

        Parameters
        ----------
        tree : pytree
            Structured like the tree of this raveler.
        name : str
            What to call it in a message.
        dtype : dtype, optional
            Of the vector; None keeps the leaves' own.
        callback : bool
            Whether it was returned by a user's function (decides the type of the error).

        Raises
        ------
        ShapeError or CallbackError
            Where structure or shapes differ.
        """
        backend = self.backend
        if self._plain and backend.is_array(tree) and tree.shape == self._shape:
            if (dtype is not None and tree.dtype != dtype) or backend.device(tree) != self.device:
                self.check_placed(tree, name, dtype)
            tree = tree if dtype is None else backend.astype(tree, dtype)  # with no graph, too
            return tree if self._bare else backend.reshape(tree, self._flat)
        leaves = self._matching(flatten(tree), name, callback, dtype)
        return self._join(leaves, dtype)

    def _matching(self, tree: Tree, name: str, callback: bool, dtype: Any) -> list[Array]:
        tree = tree if callback else self._numbers(tree)
        wrong = CallbackError if callback else ShapeError
        verb = "returned" if callback else "is"
        if not same_structure(tree, self.tree) or len(tree.leaves) != len(self.leaves):
            raise wrong(
                f"{name} {verb} {_describe(tree)}.\nExpected the structure of {self.name}: {_describe(self.tree)}."
            )
        arrays = []
        for i, (got, leaf) in enumerate(zip(tree.leaves, self.leaves, strict=True)):
            array = self.backend.as_array(got, self.device, self.dtype)
            expected = (*self.items, *leaf.shape)
            if array is None or tuple(array.shape) != expected:
                what = _one(got)
                where = self.tree.path(i, self.name)
                hint = (_broadcast_hint(array, expected) or foreign(got, self.backend)) if callback else ""
                raise wrong(f"{name} {verb} {what}.\nExpected shape {expected}, like {where}.{hint}")
            self.check_placed(array, name, dtype)
            arrays.append(array)
        return arrays

    def _numbers(self, tree: Tree) -> Tree:
        """Return a list of numbers as one array, where one array belongs."""
        if self.tree.spec is not None or tree.spec is None or not all(type(x) in (int, float) for x in tree.leaves):
            return tree
        try:
            found = np.asarray(tree.spec.unflatten(tree.leaves), dtype=float)
        except (TypeError, ValueError):  # dicts, ragged lists
            return tree
        return Tree([self.backend.xp.asarray(found, dtype=self.dtype, device=self.device)], None)

    def check_placed(self, array: Array, name: str, dtype: Any) -> None:
        """Raise for complex numbers where real ones belong, and for another device."""
        if dtype is not None and array.dtype != dtype and "complex" in str(array.dtype):
            raise DTypeError(f"{name} is complex ({array.dtype}), and {self.name} is real.\n{COMPLEX}")
        device = self.backend.device(array)
        if self.device is not None and device != self.device:
            raise BackendError(
                f"{name} lies on {device}, {self.name} on {self.device}.\nNothing is copied across devices."
            )

    def check_partner(self, other: Raveler) -> None:
        """Raise where the other tree lies on another device or has another number of items."""
        if self.device != other.device and self.n and other.n:
            raise BackendError(
                f"{self.name} lies on {self.device}, {other.name} on {other.device}.\n"
                "Nothing is copied across devices: move one of them."
            )
        if self.items != other.items:
            raise ShapeError(
                f"{self.name} holds {self.items[0]} items, {other.name} {other.items[0]}: "
                "with batched=True both carry the same leading axis."
            )

    def parts(self, vector: Array) -> list[Array]:
        """Cut a vector into the raveled leaves."""
        ends = list(itertools.accumulate(leaf.size for leaf in self.leaves))
        return [vector[..., end - leaf.size : end] for leaf, end in zip(self.leaves, ends, strict=True)]

    def finite(self, vector: Any) -> Array:
        """Whether a vector is finite, per item."""
        parts = self._apart(vector)
        if parts is None:
            return self.backend.space(vector).finite(vector)
        return functools.reduce(operator.and_, [self.backend.space(x).finite(x) for x in parts])

    def is_zero(self, vector: Any) -> Array:
        """Whether a vector is exactly zero in every item."""
        parts = self._apart(vector)
        if parts is None:
            return self.backend.space(vector).is_zero(vector)
        return functools.reduce(operator.and_, [self.backend.space(x).is_zero(x) for x in parts])

    def _apart(self, vector: Any) -> list[Any] | None:
        # In a compiled program the leaves are looked at one by one, and need not be concatenated for it.
        apart = self.backend.traced and not is_tree_vector(vector) and 1 < len(self.leaves) <= 16
        return [x for x in self.parts(vector) if x.shape[-1]] or None if apart else None

    def coordinate(self, index: int, item: int | None = None) -> str:
        """How a user would write entry ``index`` of the vector: ``y['pressure'][3]``, of that item in a batch."""
        for i, leaf in enumerate(self.leaves):
            if 0 <= index < leaf.size:
                position = []
                for length in reversed(leaf.shape):
                    index, k = divmod(index, length)
                    position.append(k)
                place = ([] if item is None else [item]) + position[::-1]
                return self.tree.path(i, self.name) + (f"[{', '.join(map(str, place))}]" if place else "")
            index -= leaf.size
        return f"an entry of {self.name}"

    def bad_leaf(self, vector: Any) -> str:
        """Name the first leaf of a vector that is not finite, and the items where there is a batch."""
        xp = self.backend.xp
        for i, part in enumerate(self.parts(vector)):
            part = xp.isfinite(part)
            if not bool(xp.all(part)):
                where = self.tree.path(i, self.name)
                if not self.items:
                    return where
                return f"{where} ({named_items(xp, ~xp.all(part, axis=-1))})"
        return self.name


class LeafRaveler(Raveler):
    """A raveler that keeps the leaves apart: its vectors are `TreeVector`, of leaves of one dtype."""

    @staticmethod
    def length(tree: Any) -> int:
        """Number of entries of all leaves."""
        return sum(math.prod(leaf.shape) for leaf in flatten(tree).leaves)

    def _join(self, arrays: list[Array], dtype: Any) -> Any:
        if dtype is None:
            return TreeVector(arrays)
        return TreeVector([a if a.dtype == dtype else self.backend.astype(a, dtype) for a in arrays])

    def _copied(self) -> Any:
        return self.vector.map(lambda leaf: self.backend.xp.asarray(leaf, copy=True))

    def divide(self, vector: Array) -> Any:
        pieces = zip(super().parts(vector), self.leaves, strict=True)
        return TreeVector([self.backend.reshape(part, leaf.shape) for part, leaf in pieces])

    def parts(self, vector: Any) -> list[Array]:
        return list(vector.leaves)

    def bad_leaf(self, vector: Any) -> str:
        for i, leaf in enumerate(vector.leaves):
            one = TreeVector([leaf])
            if not bool(self.backend.space(one).finite(one)):  # a leaf may be spread over processes
                return self.tree.path(i, self.name)
        return self.name

    def unravel(self, vector: Any) -> Any:
        return self.tree.unflatten(vector.leaves)

    def like(self, tree: Any, name: str, *, dtype: Any = None, callback: bool = False) -> Any:
        return self._join(self._matching(flatten(tree), name, callback, dtype), dtype)


def _one(x: Any) -> str:
    shape = getattr(x, "shape", None)
    if shape is None:
        return f"{x!r} ({type(x).__name__})" if isinstance(x, (str, int, float)) else type(x).__name__
    return f"an array of shape {tuple(shape)} ({type(x).__module__.partition('.')[0]})"


def foreign(value: Any, backend: Backend) -> str:
    """Say where a function's value is an array of another framework than y."""
    kind = type(value).__module__.partition(".")[0].removesuffix("lib")
    if not hasattr(value, "dtype") or backend.is_array(value) or kind == backend.name:
        return ""
    return (
        f"\nLikely cause: it is written in {kind}, and y is an array of {backend.name}."
        f"\nNext: make y and theta arrays of {kind}."
    )


def _describe(tree: Tree) -> str:
    if tree.spec is None:
        return _one(tree.leaves[0])
    text = str(tree.spec.unflatten([_Shown(_one(leaf)) for leaf in tree.leaves]))
    return text if len(text) < 200 else text[:200] + "…"


class _Shown(str):
    """A leaf's description, printed without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _broadcast_hint(array: Any, expected: tuple[int, ...]) -> str:
    shape = getattr(array, "shape", None)
    if shape is None or len(shape) <= len(expected):
        return ""
    return "\nLikely cause: y and theta broadcast against each other, as (n,) with (n, 1) does."


def reject_dtype(dtype: Any, where: str) -> DTypeError:
    """Build the error for a leaf that is not float32 or float64."""
    name = str(dtype)
    if "complex" in name:
        advice = COMPLEX
    elif "16" in name and "int" not in name:
        advice = "Half precision is unsupported: cast to float32 around the call."
    else:
        advice = "Only floating-point data has derivatives: cast it, e.g. with astype(float)."
    return DTypeError(f"{where} has dtype {name}. {advice}")
