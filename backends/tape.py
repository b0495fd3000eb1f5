"""Exact derivatives of functions written with HIPS autograd, for the NumPy backend.

A function is traced once at the point; each product then walks the recorded graph. A function that cannot be
traced (it calls plain NumPy) is told by ``None``, and the caller looks for another way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import array_api_compat.numpy as xp
import autograd
import autograd.numpy as anp
import numpy as np
from autograd.core import VJPNode, backward_pass
from autograd.tracer import trace

from implicitdiff.arrays import Array, probe_vector

__all__ = ["Tape", "concatenate", "differentiate", "differentiate_gradient", "gradients"]


def concatenate(parts: Any) -> Any:
    """Concatenate values that are being traced."""
    return anp.concatenate(list(parts), axis=-1)


def _record(function: Callable[[Array], Any], x: Array) -> tuple[Any, Any] | None:
    """Trace a function; None where it cannot be, or where its value does not come out of the trace."""
    try:
        value, node = trace(VJPNode.new_root(), function, x)
    except Exception:
        return None  # plain NumPy on a traced value; a true error of the user's comes back when it is called plainly
    return None if node is None else (value, node)


def _changes(function: Callable[[Array], Any], x: Array) -> bool:
    """Whether a function that left no trace depends on x all the same (through plain NumPy)."""
    moved = x + 1e-3 * probe_vector(xp, x.shape[-1], x.dtype, None) * (1 + np.abs(x))
    return not np.array_equal(np.asarray(function(x)), np.asarray(function(moved)), equal_nan=True)


class Tape:
    """Derivatives of a vector function recorded at one point."""

    kind = "autodiff"
    accuracy = 0.0

    def __init__(self, backend: Any, function: Callable[[Array, Array], Array], y: Array, theta: Array,
                 by_y: tuple[Any, Any], by_theta: tuple[Any, Any] | None) -> None:  # fmt: skip
        self.backend = backend
        self._function, self._y, self._theta = function, y, theta
        self._value, self._node_y = by_y
        self._node_theta = None if by_theta is None else by_theta[1]

    def value(self) -> Array:
        """G(y, θ)."""
        return np.asarray(self._value)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u."""
        return self._walk(self._node_y, u, self._y)

    hvp = vjp_y  # for a symmetric Jacobian: no second recording

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""
        return self._walk(self._node_theta, u, self._theta)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v: the adjoint of the adjoint."""
        return self._walk(self._adjoint_of_y, v, self._value)

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        if self._node_theta is None:
            return np.zeros((*t.shape[:-1], self._y.shape[-1]), dtype=self._y.dtype)
        return self._walk(self._adjoint_of_theta, t, self._value)

    @cached_property
    def _adjoint_of_y(self) -> Any:
        return self._adjoint(lambda y: self._function(y, self._theta), self._y)

    @cached_property
    def _adjoint_of_theta(self) -> Any:
        return self._adjoint(lambda theta: self._function(self._y, theta), self._theta)

    def _adjoint(self, function: Callable[[Array], Any], x: Array) -> Any:
        """Record u -> Jᵀu, whose adjoint is v -> J v."""

        def adjoint(u: Array) -> Any:
            return autograd.make_vjp(function)(x)[0](u)

        return trace(VJPNode.new_root(), adjoint, np.zeros_like(self._value))[1]

    def _walk(self, node: Any, u: Array, x: Array) -> Array:
        if node is None:
            return np.zeros((*u.shape[:-1], x.shape[-1]), dtype=x.dtype)

        def one(w: Array) -> Array:
            return np.asarray(backward_pass(w, node)).astype(x.dtype, copy=False)

        return self.backend.batched(one, tuple(x.shape[:-1]))(u)


def differentiate(backend: Any, function: Callable[..., Array], y: Array, theta: Array) -> Tape | None:
    """Record a vector function; None where it cannot be traced."""
    by_y = _record(lambda z: function(z, theta), y)
    by_theta = _record(lambda z: function(y, z), theta)
    if by_y is None or (by_theta is None and _changes(lambda z: function(y, z), theta)):
        return None
    return Tape(backend, function, y, theta, by_y, by_theta)


def differentiate_gradient(backend: Any, function: Callable[..., Array], y: Array, theta: Array) -> Tape | None:
    """Record ∇_y f of a scalar function (one scalar per item)."""
    if _record(lambda z: function(z, theta), y) is None:
        return None
    gradient = autograd.grad(lambda z, t: anp.sum(function(z, t)), 0)
    return differentiate(backend, gradient, y, theta)


def gradients(function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str] | None:
    """∂L/∂y and ∂L/∂θ of a scalar function; None where it cannot be traced at all."""
    along = (lambda z: function(z, theta), lambda z: function(y, z))
    found = [_record(f, x) for f, x in zip(along, (y, theta), strict=True)]
    for record, f, x in zip(found, along, (y, theta), strict=True):
        if record is None and _changes(f, x):
            return None
    out = []
    for record, x in zip(found, (y, theta), strict=True):
        if record is None:
            out.append(np.zeros_like(x))
            continue
        seed = np.ones_like(np.asarray(record[0]))
        out.append(np.asarray(backward_pass(seed, record[1])).astype(x.dtype, copy=False))
    return out[0], out[1], "autodiff"
