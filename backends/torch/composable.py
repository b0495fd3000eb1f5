"""Products that Torch may differentiate again, or map over: all by ``torch.func``, nothing detached.

`torch_autograd` records one graph and hands out numbers; that is what a solve needs. Here the same products are
functions of (y, θ, v) under whatever transforms are at work, which is what the derivative of a derivative needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.array_api import ArrayAPIBackend
from implicitdiff.backends.torch.arrays import TorchArrays
from implicitdiff.backends.torch.autograd import over_items
from implicitdiff.mode import Mode

__all__ = ["Composable"]

Function = Callable[..., Array]


def vjp(function: Function, *xs: Array) -> tuple[Any, Callable[..., Any]]:
    """Return the value and the pullback of a function, as `torch.func.vjp`, at whatever depth of transforms.

    That makes zeros, for an argument which does not matter, of a tensor whose level may be gone: Torch stops with an
    assertion of its own. Here every argument matters, by the sum of none of its entries.
    """

    def touching(*xs: Array) -> Any:
        value = function(*xs)
        nothing = sum(x.reshape(-1)[:0].sum() for x in xs)
        if isinstance(value, tuple):
            return tuple(v + nothing.to(v.dtype) for v in value)
        return value + nothing.to(value.dtype)

    value, pull = torch.func.vjp(touching, *xs)[:2]
    return value, pull


class Composed:
    """Derivatives of a vector function G(y, θ) that are functions of y and θ themselves."""

    kind = "autodiff"
    accuracy = 0.0

    def __init__(self, function: Function, y: Array, theta: Array) -> None:
        self._function, self._y, self._theta = function, y, theta

    def value(self) -> Array:
        """G(y, θ)."""
        return self._function(self._y, self._theta)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u for u of shape (*rhs, *items, n)."""
        return self._apply(self._by_y[1], u)

    hvp = vjp_y

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""
        return self._apply(self._by_theta[1], u)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v: the adjoint of u -> (∂G/∂y)ᵀ u."""
        return self._apply(transposed(self._by_y), v)

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        return self._apply(transposed(self._by_theta), t)

    @cached_property
    def _by_y(self) -> tuple[Array, Function]:
        return pullback(lambda y: self._function(y, self._theta), self._y)

    @cached_property
    def _by_theta(self) -> tuple[Array, Function]:
        return pullback(lambda theta: self._function(self._y, theta), self._theta)

    def _apply(self, product: Function, x: Array) -> Array:
        return torch.func.vmap(product)(x) if x.ndim > self._y.ndim else product(x)


def pullback(function: Function, x: Array) -> tuple[Array, Function]:
    """Return the value at x, and u -> Jᵀ u."""
    value, pull = vjp(function, x)
    return value, lambda u: pull(u)[0]


def transposed(linear: tuple[Array, Function]) -> Function:
    """Turn the value and u -> Jᵀ u into v -> J v."""
    value, pull = linear
    return pullback(pull, torch.zeros_like(value))[1]


class Composable(TorchArrays):
    """The second mode of the backend, for conditions whose products are themselves differentiated."""

    mode, shared = Mode.INLINE, True

    def as_leaf(self, leaf: Any, where: str) -> Array:
        return ArrayAPIBackend.as_leaf(self, leaf, where)

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def if_any(self, wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
        return function(value)

    def detached(self, x: Array) -> Array:
        return x.detach()

    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        done = 0
        while done != limit and self._holds(cond(state), limit):
            state, done = body(state), done + 1
        return state

    def _holds(self, condition: Any, limit: int | None) -> bool:
        """Whether a loop goes on: to its limit, where `torch.vmap` shows no values."""
        try:
            return bool(condition)
        except RuntimeError:
            if limit is None:
                raise
            return True

    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        many_of = over_items(product)
        return lambda x: (product if x.ndim == len(items) + 1 else many_of)(x)

    def differentiate(self, function: Function, y: Array, theta: Array) -> Any:
        return Composed(function, y, theta)

    def differentiate_gradient(self, function: Function, y: Array, theta: Array) -> Any:
        def gradient(y: Array, theta: Array) -> Array:
            value, pull = pullback(lambda z: function(z, theta), y)
            return pull(torch.ones_like(value))

        return Composed(gradient, y, theta)

    def gradients(self, function: Function, y: Array, theta: Array) -> tuple[Array, Array, str]:
        value, pull = vjp(function, y, theta)
        return *pull(torch.ones_like(value)), "autodiff"
