"""A point (y, θ) and the user's functions at it, turned into functions of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.errors import CallbackError
from implicitdiff.ravel import Ravel

__all__ = ["Point"]


class Point:
    """The solution, the parameters and the data, raveled.

    Parameters
    ----------
    backend : Backend
    y, theta : Ravel
    args : tuple
        Data handed to every callback after y and theta.

    Attributes
    ----------
    items : tuple of int
        ``()``, or ``(number of items,)`` for a batch.
    """

    def __init__(self, backend: Any, y: Ravel, theta: Ravel, args: tuple[Any, ...]) -> None:
        self.backend, self.y, self.theta, self.args = backend, y, theta, args
        self.items = y.items

    def vector_function(self, function: Callable[..., Any], name: str) -> Callable[[Array, Array], Array]:
        """``f(y, theta, *args) -> like y`` as a function of two vectors."""

        def flat(y: Array, theta: Array) -> Array:
            out = function(*self._trees(y, theta), *self.args)
            native = y.dtype == self.y.dtype and theta.dtype == self.theta.dtype
            return self.y.like(out, name, dtype=self.y.dtype if native else None, callback=True)

        return flat

    def scalar_function(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...] | None = None
    ) -> Callable[[Array, Array], Array]:
        """``f(y, theta, *args) -> scalar`` (one per item) as a function of two vectors."""
        given = self.args if args is None else args

        def flat(y: Array, theta: Array) -> Array:
            out = self.backend.as_array(value := function(*self._trees(y, theta), *given), self.y.device, self.y.dtype)
            if out is None or tuple(out.shape) != self.items:
                got = type(value).__name__ if out is None else f"an array of shape {tuple(out.shape)}"
                what = "a scalar" if not self.items else f"one scalar per item, shape {self.items}"
                raise CallbackError(f"{name} returned {got}.\nExpected {what}.")
            return out

        return flat

    def product(
        self, function: Callable[..., Any], name: str, takes: Ravel, returns: Ravel
    ) -> Callable[[Array], Array]:
        """``f(y, theta, v, *args)`` as a linear map on vectors (*rhs, *items, k)."""
        guard = self.backend.guard
        y, theta = self._trees(self.y.vector, self.theta.vector)

        def one(v: Array) -> Array:
            out = function(y, theta, takes.unravel(guard(v)), *self.args)
            return returns.like(out, name, dtype=returns.dtype, callback=True)

        return self.backend.batched(one, self.items)

    def call(self, function: Callable[..., Any]) -> Any:
        """``f(y, theta, *args)`` at the point, as the user wrote it."""
        return function(*self._trees(self.y.vector, self.theta.vector), *self.args)

    def _trees(self, y: Array, theta: Array) -> tuple[Any, Any]:
        guard = self.backend.guard
        return self.y.unravel(guard(y)), self.theta.unravel(guard(theta))
