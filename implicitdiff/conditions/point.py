"""A point (y, θ) and the user's functions at it, turned into functions of vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array
from implicitdiff.axes import check_mapped, filled, mapped_of
from implicitdiff.errors import CallbackError
from implicitdiff.pytree import flatten
from implicitdiff.ravel import Raveler, foreign

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Point", "VectorFunction"]


@dataclass(frozen=True, eq=False)
class VectorFunction:
    """A user's function as one of two vectors.

    Parameters
    ----------
    call : callable
        The function of vectors.
    point : Point
        Where it was made.
    name : str
        What the user knows the function under.
    on : callable
        Makes the same of another point, with arrays of another framework.
    """

    call: Callable[[Array, Array], Array]
    point: Point
    name: str
    on: Callable[[Point], VectorFunction]

    def __call__(self, y: Array, theta: Array) -> Array:
        return self.call(y, theta)


class Point:
    """The solution, the parameters and the data, raveled.

    The functions made here take and return vectors with the leading axis of items. Where the framework has a vmap,
    the user's own functions are those of one item, and the vmap is ours.

    Parameters
    ----------
    backend : Backend
    y, theta : Raveler
    args : tuple
        Data handed to every callback after y and theta.
    mapped : tuple of bool
        Of its leaves, which differ from item to item; none, where it is empty. Without a vmap a callback takes all of
        them at once, as they are.

    Attributes
    ----------
    items : tuple of int
        ``()``, or ``(number of items,)`` for a batch.
    whole : bool
        Whether a function made here is all of F: then it has to depend on θ.
    choices : object or None
        Of another point nearby (`Maps.choices`): the system here is to have the form that it has there.
    """

    def __init__(
        self, backend: Backend, y: Raveler, theta: Raveler, args: tuple[Any, ...], mapped: tuple[bool, ...] = ()
    ) -> None:
        self.backend, self.y, self.theta, self.args, self.mapped = backend, y, theta, args, mapped
        self.items, self.whole = y.items, True
        self.piecewise = False
        self.choices: Any = None
        self._one: Point | None = None
        self._own: list[Any] = []
        if self.items and mapped:
            check_mapped(backend, args, mapped, self.items)
        if self.items and backend.vmap is not None:
            self._own = mapped_of(args, mapped)
            self._one = Point(backend, y.of_one_item(), theta.of_one_item(), args, mapped)

    def part(self, *, piecewise: bool = False) -> Point:
        """Return the same point for functions that make up F together, of which not each has to depend on θ.

        ``piecewise`` ones have kinks everywhere, as projections do: no reason to take what they do for noise.
        """
        found = copy.copy(self)
        found.whole, found.piecewise = False, piecewise
        return found

    @property
    def _vmap(self) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
        if self.backend.vmap is None:
            raise TypeError(f"{self.backend.name} has no vmap")
        return self.backend.vmap

    def _over_items(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Map a function of one item, of vectors and the args that are its own, over the items."""
        many, own = self._vmap(function), self._own
        return (lambda *vectors: many(*vectors, *own)) if own else many

    def _args(self, own: tuple[Any, ...]) -> tuple[Any, ...]:
        """The data of one item, given what differs of it."""
        return filled(self.args, self.mapped, own) if own else self.args

    @property
    def lead(self) -> int:
        """Number of leading axes of items that the user's functions see."""
        return 0 if self.backend.vmap is not None else len(self.items)

    def vector_function(self, function: Callable[..., Any], name: str) -> VectorFunction:
        """``f(y, theta, *args) -> like y`` as a function of two vectors."""
        return VectorFunction(self._vectors(function, name), self, name, lambda p: p.vector_function(function, name))

    def numbered_function(
        self, function: Callable[..., Any], name: str, number: Any
    ) -> Callable[[Array, Array], Array]:
        """``f(y, theta, number, *args) -> like y`` as a function of two vectors, with one number for each item."""
        one = self._one
        if one is None or not getattr(number, "shape", ()):
            return self.vector_function(lambda y, theta, *args: function(y, theta, number, *args), name)

        def of_one_item(y: Array, theta: Array, of_item: Array, *own: Any) -> Array:
            return one._vectors(lambda y, theta, *args: function(y, theta, of_item, *args), name)(y, theta, *own)

        many = self._over_items(of_one_item)
        return lambda y, theta: many(y, theta, number)

    def scalar_function(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...] | None = None
    ) -> VectorFunction:  # fmt: skip
        """``f(y, theta, *args) -> scalar`` (one per item) as a function of two vectors."""
        flat = self._scalars(function, name, args)
        return VectorFunction(flat, self, name, lambda p: p.scalar_function(function, name, args))

    def raveled_function(self, function: Callable[..., Any], name: str) -> VectorFunction:
        """``f(y, theta, *args) -> tree of arrays`` as a function of two vectors with values of shape (*items, k)."""
        return VectorFunction(self._raveled(function, name), self, name, lambda p: p.raveled_function(function, name))

    def _raveled(self, function: Callable[..., Any], name: str) -> Callable[..., Array]:
        if self._one is not None:
            return self._over_items(self._one._raveled(function, name))
        backend, lead = self.backend, len(self.items)
        call = backend.callback(function)

        def part(leaf: Any) -> Array:
            out = backend.as_array(leaf, self.y.device, self.y.dtype)
            if out is None or tuple(out.shape[:lead]) != self.items:
                got = type(leaf).__name__ if out is None else f"an array of shape {tuple(out.shape)}"
                what = f"arrays with the leading axis {self.items}" if lead else "an array, or a tree of arrays"
                raise CallbackError(f"{name} returned {got}.\nExpected {what}.")
            return backend.reshape(out, (*self.items, math.prod(out.shape[lead:])))

        def flat(y: Array, theta: Array, *own: Any) -> Array:
            parts = [part(leaf) for leaf in flatten(call(*self._trees(y, theta), *self._args(own))).leaves]
            if not parts:
                raise CallbackError(f"{name} returned an empty tree.\nExpected an array, or a tree of arrays.")
            return parts[0] if len(parts) == 1 else backend.concat(parts)

        return flat

    def _vectors(self, function: Callable[..., Any], name: str) -> Callable[..., Array]:
        if self._one is not None:
            return self._over_items(self._one._vectors(function, name))
        call = self.backend.callback(function)

        def flat(y: Array, theta: Array, *own: Any) -> Array:
            out = _asked(call, self._trees(y, theta), self._args(own))
            native = y.dtype == self.y.dtype and theta.dtype == self.theta.dtype
            return self.y.like(out, name, dtype=self.y.dtype if native else None, callback=True)

        return flat

    def _scalars(self, function: Callable[..., Any], name: str, args: tuple[Any, ...] | None) -> Callable[..., Array]:
        if self._one is not None:
            return self._over_items(self._one._scalars(function, name, args))
        call = self.backend.callback(function)

        def flat(y: Array, theta: Array, *own: Any) -> Array:
            value = _asked(call, self._trees(y, theta), self._args(own) if args is None else args)
            out = self.backend.as_array(value, self.y.device, self.y.dtype)
            if out is None or tuple(out.shape) != self.items:
                got = type(value).__name__ if out is None else f"an array of shape {tuple(out.shape)}"
                what = "a scalar" if not self.items else f"one scalar per item, shape {self.items}"
                raise CallbackError(f"{name} returned {got}.\nExpected {what}.{foreign(value, self.backend)}")
            return out

        return flat

    def product(
        self, function: Callable[..., Any], name: str, takes: Raveler, returns: Raveler
    ) -> Callable[[Array], Array]:
        """``f(y, theta, v, *args)`` as a linear map on vectors (*rhs, *items, k)."""
        y, theta, item = self.y.vector, self.theta.vector, self._one
        if item is not None:
            of_item = item._bilinear(function, name, takes.of_one_item(), returns.of_one_item())
            many = self._over_items(lambda y, theta, v, *own: of_item(*item._trees(y, theta), v, *own))
            return self.backend.batched(lambda v: many(y, theta, v), self.items)
        return self.backend.batched(
            partial(self._bilinear(function, name, takes, returns), *self._trees(y, theta)), self.items
        )

    def call(self, function: Callable[..., Any], name: str, *vectors: Array) -> Any:
        """``f(y, theta, *vectors, *args)`` at the point, as the user wrote it: a matrix, per item."""
        return self.matrix_function(function, name)(self.y.vector, self.theta.vector, *vectors)

    def matrix_function(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``f(y, theta, *vectors, *args) -> matrix`` as a function of vectors; it returns what the user's does."""
        call, item = self.backend.callback(function), self._one
        if item is None:
            return lambda y, theta, *vectors: call(*self._trees(y, theta), *vectors, *self.args)

        count = len(self._own)

        def of_one_item(y: Array, theta: Array, *more: Any) -> Array:
            vectors, own = more[: len(more) - count], more[len(more) - count :]
            value = call(*item._trees(y, theta), *vectors, *item._args(own))
            out = self.backend.as_array(value, self.y.device, self.y.dtype)
            if out is None:
                raise CallbackError(f"{name} returned {type(value).__name__}.\nExpected a matrix.")
            return out

        return self._over_items(of_one_item)

    def nest(self, jacobian: Array) -> Any:
        """Turn a matrix (*items, n, m) into the structure of y over the structure of theta."""
        backend, lead = self.backend, tuple(jacobian.shape[:-2])
        rows, start = [], 0
        for leaf in self.y.leaves:
            block = jacobian[..., start : start + leaf.size, :]
            start += leaf.size
            row, begin = [], 0
            for other in self.theta.leaves:
                part = block[..., begin : begin + other.size]
                begin += other.size
                row.append(backend.astype(backend.reshape(part, (*lead, *leaf.shape, *other.shape)), leaf.dtype))
            rows.append(self.theta.tree.unflatten(row))
        return self.y.tree.unflatten(rows)

    def _bilinear(
        self, function: Callable[..., Any], name: str, takes: Raveler, returns: Raveler
    ) -> Callable[..., Array]:
        call, guard, unravel = self.backend.callback(function), self.backend.guard, takes.unravel
        like, dtype = returns.like, returns.dtype

        def one(y: Any, theta: Any, v: Array, *own: Any) -> Array:
            out = call(y, theta, unravel(guard(v)), *(self._args(own) if own else self.args))
            return like(out, name, dtype=dtype, callback=True)

        return one

    def _trees(self, y: Array, theta: Array) -> tuple[Any, Any]:
        guard = self.backend.guard
        return self.y.unravel(guard(y)), self.theta.unravel(guard(theta))


def _asked(call: Callable[..., Any], trees: tuple[Any, Any], args: tuple[Any, ...]) -> Any:
    """Call a user's function; where a list of numbers is what it cannot work with, say so beside its own error."""
    try:
        return call(*trees, *args)
    except TypeError as error:
        for name, tree in zip(("y", "theta"), trees, strict=True):
            if isinstance(tree, (list, tuple)) and tree and hasattr(error, "add_note"):
                error.add_note(
                    f"{name} is a {type(tree).__name__}, and is handed on as one; np.asarray({name}) is an array."
                )
        raise
