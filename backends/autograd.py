"""Exact derivatives of functions written with HIPS autograd, for the NumPy backend.

A function is traced once at the point; each product then walks the recorded graph. A function that cannot be
traced (it calls plain NumPy) is told by ``None``, and the caller looks for another way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.core import VJPNode, backward_pass, make_vjp
from autograd.tracer import isbox, new_box, trace_stack

from implicitdiff.arrays import Array, probe_vector
from implicitdiff.arrays import numpy_namespace as xp
from implicitdiff.backends.base import Backend
from implicitdiff.errors import NoiseError

__all__ = ["Tape", "concatenate", "differentiate", "differentiate_gradient", "gradients"]


def concatenate(parts: Any) -> Any:
    """Concatenate values that are being traced."""
    return anp.concatenate(list(parts), axis=-1)


_lock = threading.RLock()  # autograd numbers its nested traces in one global counter


def _trace(function: Callable[[Array], Any], x: Array) -> tuple[Any, Any] | None:
    """Run a function on a recorded value; None where the result does not come out of the recording.

    ``autograd.tracer.trace`` without its warning, which would be about our own probing.
    """
    with _lock, trace_stack.new_trace() as number:
        start = new_box(x, number, VJPNode.new_root())
        end = function(start)
        return (end._value, end._node) if isbox(end) and end._trace == start._trace else None


def _record(function: Callable[[Array], Any], x: Array) -> tuple[Any, Any] | None:
    """Trace a function; None where it cannot be, or where its value does not come out of the trace."""
    try:
        return _trace(function, x)
    except Exception:
        return None  # plain NumPy on a traced value; a true error of the user's comes back when it is called plainly


def _changes(function: Callable[[Array], Any], x: Array) -> bool:
    """Whether a function that left no trace depends on x all the same (through plain NumPy)."""
    size = np.abs(x)
    largest = np.max(size, axis=-1, keepdims=True, initial=0.0)
    size = np.where(size > 0, size, np.where(largest > 0, largest, 1.0))
    moved = x + 1e-3 * probe_vector(xp, x.shape[-1], x.dtype, None) * size
    here = np.array(function(x))  # a copy: it may be a buffer that the next call fills again
    return not np.array_equal(here, np.asarray(function(moved)))  # NaN tells nothing: do not call it constant


class Tape:
    """Derivatives of a vector function recorded at one point."""

    kind = "autodiff"
    accuracy = 0.0

    def __init__(self, backend: Backend, function: Callable[[Array, Array], Array], y: Array, theta: Array,
                 by_y: Any, by_theta: Any) -> None:  # fmt: skip
        self.backend = backend
        self.function, self.y, self.theta = function, y, theta
        self._node_y, self._node_theta = by_y, by_theta

    @cached_property
    def _value(self) -> Array:
        value = np.asarray(self.function(self.y, self.theta))
        return value.astype(self.y.dtype, copy=False)  # autograd's where makes float64 of float32

    def value(self) -> Array:
        """G(y, θ)."""
        return self._value

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u."""
        return self._walk(self._node_y, u, self.y)

    hvp = vjp_y  # for a symmetric Jacobian: no second recording

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""
        return self._walk(self._node_theta, u, self.theta)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v: the adjoint of the adjoint."""
        return self._walk(self._adjoint_of_y, v, self._value)

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        return self._walk(self._adjoint_of_theta, t, self._value)

    @cached_property
    def _adjoint_of_y(self) -> Any:
        return self._adjoint(lambda y: self.function(y, self.theta), self.y, self._node_y)

    @cached_property
    def _adjoint_of_theta(self) -> Any:
        return self._adjoint(lambda theta: self.function(self.y, theta), self.theta, self._node_theta)

    def _adjoint(self, function: Callable[[Array], Any], x: Array, node: Any) -> Any:
        """Record u -> Jᵀu, whose adjoint is v -> J v."""
        if node is None:
            return None

        def adjoint(u: Array) -> Any:
            return make_vjp(function, x)[0](u)

        found = _trace(adjoint, np.zeros_like(self._value))
        return None if found is None else found[1]

    def _walk(self, node: Any, u: Array, x: Array) -> Array:
        if node is None:
            return np.zeros((*u.shape[:-1], x.shape[-1]), dtype=x.dtype)

        def one(w: Array) -> Array:
            return np.asarray(backward_pass(w, node)).astype(x.dtype, copy=False)

        return self.backend.batched(one, tuple(x.shape[:-1]))(u)


def differentiate(backend: Backend, function: Callable[..., Array], y: Array, theta: Array) -> Tape | None:
    """Record a vector function; None where it cannot be traced."""
    nodes, values = [], []
    for along, x in ((lambda z: function(z, theta), y), (lambda z: function(y, z), theta)):
        record = _record(along, x)
        if record is None and _changes(along, x):
            return None
        nodes.append(None if record is None else record[1])  # None: the derivative is zero
        values += [] if record is None else [np.asarray(_plain(record[0]))]
    tape = Tape(backend, function, y, theta, *nodes)
    _check_deterministic(tape, values)
    return tape


def differentiate_gradient(backend: Backend, function: Callable[..., Array], y: Array, theta: Array) -> Tape | None:
    """Record ∇_y f of a scalar function (one scalar per item)."""
    if _record(lambda z: function(z, theta), y) is None:
        return None

    def gradient(z: Any, t: Any) -> Any:
        pullback, value = make_vjp(lambda w: function(w, t), z)
        return pullback(np.ones_like(_plain(value)))

    return differentiate(backend, gradient, y, theta)


def _check_deterministic(tape: Tape, values: list[Array]) -> None:
    """Raise where two recordings at one point are of values that differ by more than rounding.

    At a solution values are what is left of terms that cancel, so the measure is what the function moves with
    its arguments: Σ |∂G/∂x| |x|, along a vector of signs.
    """
    if len(values) < 2 or np.array_equal(values[0], values[1]):
        return
    first, second = values
    signs = np.where(probe_vector(xp, first.shape[-1], first.dtype, None) < 0, -1.0, 1.0).astype(first.dtype)
    signs = np.broadcast_to(signs, first.shape)
    moved = (np.abs(tape.vjp_y(signs) * tape.y), np.abs(tape.vjp_theta(signs) * tape.theta), np.abs(first))
    scale = sum(np.sum(part, axis=-1, keepdims=True) for part in moved)
    if np.any(np.abs(first - second) > np.sqrt(np.finfo(first.dtype).eps) * scale):
        raise NoiseError(
            f"{getattr(tape.function, 'name', 'the function')} is not deterministic: its values at one point differ.\n"
            "Likely cause: dropout, or random numbers drawn inside of it.\n"
            "Next: switch dropout off (evaluation mode), or draw the numbers once and hand them in by args."
        )


def _plain(value: Any) -> Any:
    while isbox(value):
        value = value._value
    return value


def gradients(function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str] | None:
    """∂L/∂y and ∂L/∂θ of a scalar function; None where it cannot be traced at all."""
    out = []
    for along, x in ((lambda z: function(z, theta), y), (lambda z: function(y, z), theta)):
        record = _record(along, x)
        if record is None and _changes(along, x):
            return None
        if record is None:
            out.append(np.zeros_like(x))
            continue
        seed = np.ones_like(np.asarray(record[0]))
        out.append(np.asarray(backward_pass(seed, record[1])).astype(x.dtype, copy=False))
    return out[0], out[1], "autodiff"
