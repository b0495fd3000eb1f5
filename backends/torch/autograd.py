"""Exact derivatives by Torch's reverse mode, and the contexts in which they are recorded.

The graph of a function is recorded once at the point, on tensors of our own, and each product is one sweep through
it. Forward products are the adjoint of the adjoint. ``torch.func.jvp`` would be shorter, and is not safe in threads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.curvature import GradientDifferences
from implicitdiff.backends.differences import Differences, scalar_gradients
from implicitdiff.backends.torch.captured import Graph
from implicitdiff.errors import NoiseError

if TYPE_CHECKING:
    from implicitdiff.backends.torch.arrays import TorchArrays

__all__ = [
    "Recording",
    "callback",
    "computing",
    "differentiate",
    "differentiate_gradient",
    "gradients",
    "mode",
    "over_items",
    "recordable",
]

Function = Callable[..., Array]
_ABOUT_RECORDING = ("requires grad", "require grad", "requires_grad", "graph leaves", "modified inplace")
"""How Torch says that it takes plain tensors only: NumPy, DLPack, ``out=``, in-place work on leaves, deep copies."""
BLOCK = 2**24
"""Numbers in one block of right-hand sides that go through the graph together."""


# -- contexts ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Record no derivatives, make no inference tensors, and leave non-finite scalars to be found in the result."""
    with np.errstate(all="ignore"), mode(recording=False):
        yield


@contextlib.contextmanager
def mode(*, recording: bool) -> Iterator[None]:
    """Set whether derivatives are recorded; inference mode, in which they cannot be, is left for that time."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            yield
    else:
        with torch.set_grad_enabled(recording):
            yield


def callback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a user's function take derivatives of its own, as it could where the user wrote it."""

    def called(*args: Any) -> Any:
        with mode(recording=True):
            return function(*(_recordable_tree(a) for a in args))

    return called


def recordable(x: Array) -> Array:
    """Return the tensor itself, or a copy of one that was made in inference mode and cannot be recorded."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def _recordable_tree(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return recordable(x)
    if type(x) in (list, tuple):
        return type(x)(map(_recordable_tree, x))
    return {k: _recordable_tree(v) for k, v in x.items()} if type(x) is dict else x


# -- many at once ------------------------------------------------------------------------------------
def over_items(function: Function) -> Function:
    """Let a function work over a leading axis of all its arguments: by vmap, or one by one where that cannot be."""
    vectorised: list[bool] = []  # whether vmap worked, once it was tried

    def many(*xs: Array) -> Array:
        if xs[0].shape[0] and vectorised != [False]:
            try:
                out = torch.func.vmap(function)(*xs)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a function that looks at its numbers; a true error comes back below, from its own line
                vectorised[:] = [False]
            else:
                vectorised[:] = [True]
                return out
        if not xs[0].shape[0]:
            return _none(function, *xs)
        # a callback may return the same buffer each time
        return torch.stack([function(*(x[i] for x in xs)).clone() for i in range(xs[0].shape[0])])

    return many


def _none(function: Function, *xs: Array) -> Array:
    """Return the result for no items: its shape is that for an item of ones."""
    one = function(*(torch.ones(x.shape[1:], dtype=x.dtype, device=x.device) for x in xs))
    return one.new_zeros((0, *one.shape))


# -- derivatives -------------------------------------------------------------------------------------
class Recording:
    """Derivatives of a vector function recorded at one point.

    Parameters
    ----------
    value : tensor, shape (*items, n)
        G(y, θ), with its graph.
    y, theta : tensor
        The leaves of that graph.
    accuracy : float
        Relative error of the products, where they are less accurate than their dtype.
    """

    kind = "autodiff"

    def __init__(self, value: Array, y: Array, theta: Array, accuracy: float = 0.0) -> None:
        self._graph, self._y, self._theta, self.accuracy = value, y, theta, accuracy

    def value(self) -> Array:
        """G(y, θ)."""
        return self._graph.detach()

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u for u of shape (*rhs, *items, n)."""
        return _pull(self._graph, self._y, u)

    hvp = vjp_y  # for a symmetric Jacobian: one sweep instead of two

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""
        return _pull(self._graph, self._theta, u)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v: the adjoint of u -> (∂G/∂y)ᵀ u."""
        return _pull(*self._adjoint_of_y, v)

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        return _pull(*self._adjoint_of_theta, t)

    @cached_property
    def _adjoint_of_y(self) -> tuple[Array | None, Array]:
        return _adjoint(self._graph, self._y)

    @cached_property
    def _adjoint_of_theta(self) -> tuple[Array | None, Array]:
        return _adjoint(self._graph, self._theta)


def _adjoint(value: Array, x: Array) -> tuple[Array | None, Array]:
    """Record u -> Jᵀ u; the graph, and u."""
    with mode(recording=True):
        u = torch.zeros_like(value, requires_grad=True)
        if not value.requires_grad:
            return None, u
        (found,) = torch.autograd.grad(value, x, u, create_graph=True, allow_unused=True)
    return found, u


def _pull(value: Array | None, x: Array, u: Array) -> Array:
    """Jᵀ u for value = J x + …; zeros where the value does not depend on x."""
    if value is None or not value.requires_grad:
        return x.new_zeros((*u.shape[: u.ndim - x.ndim], *x.shape))
    if u.ndim == x.ndim:
        (found,) = torch.autograd.grad(value, x, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if found is None else found
    step = max(1, BLOCK // max(value.numel(), x.numel(), 1))
    parts = [_pull_block(value, x, u[i : i + step]) for i in range(0, u.shape[0], step)]
    return torch.cat(parts) if parts else x.new_zeros((0, *x.shape))


def _pull_block(value: Array, x: Array, u: Array) -> Array:
    # Not is_grads_batched, whose vmap is an older one: it copies a matrix for each of the right-hand sides.
    try:
        return torch.func.vmap(lambda one: _pull(value, x, one))(u)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return torch.stack([_pull(value, x, one) for one in u])  # a node that vmap does not know


def _leaf(x: Array) -> Array:
    return x.detach().requires_grad_()


def _record_condition(function: Function, *xs: Array) -> Array | None:
    """Record a function that a solution is one of: random numbers must not matter to it."""
    generator = torch.cuda.default_generators[xs[0].device.index] if xs[0].is_cuda else torch.default_generator
    before = generator.get_state()
    value = _record(function, *xs)
    if value is None or torch.equal(before, generator.get_state()):
        return value
    again = function(*(x.detach() for x in xs))
    if bool(((again != value) & ~(again.isnan() & value.isnan())).any()):
        raise NoiseError(
            "the condition is not deterministic: called twice at one point, its values differ.\n"
            "Likely cause: it draws random numbers (dropout in training mode, a sample), and so it has no solution.\n"
            "Next: module.eval(), or draw beforehand and pass what was drawn in args."
        )
    return value


def _record(function: Function, *xs: Array) -> Array | None:
    """Record a function at leaves; None where it runs on plain tensors only (it goes through NumPy)."""
    try:
        with mode(recording=True):
            return function(*xs).clone()  # a function may return a buffer, which its next call takes for another graph
    except (torch.OutOfMemoryError, Warning):
        raise
    except Exception as error:
        function(*(x.detach() for x in xs))  # an error that has nothing to do with recording comes back here
        if not any(sign in str(error) for sign in _ABOUT_RECORDING):
            raise  # ... or does not, at a second call: it is the user's, too
        return None


def _look(backend: TorchArrays, value: Array, *leaves: Array) -> Graph:
    """Walk through a graph, and look for tensors in it that are none of these leaves, where that matters."""
    graph = Graph(value)
    if backend.captures is not None:
        backend.captures.look(graph, *leaves)
    return graph


def _hidden(backend: TorchArrays, function: Function, graph: Graph, y: Array, theta: Array) -> bool:
    """Whether a function depends on an argument that its graph does not end in: it was detached on the way."""
    plain = y.detach(), theta.detach()
    for i, leaf in enumerate((y, theta)):
        if graph.ends_in(leaf) or 0 in leaf.shape:
            continue
        moved = list(plain)
        moved[i] = backend.space(plain[i]).nearby(plain[i])
        here = function(*plain).clone()  # it may be a buffer that the next call fills again
        if bool((here != function(*moved)).any()):
            return True
    return False


def _in_own_precision(backend: TorchArrays) -> Any:
    """Let the finite differences run in the function's own precision: Torch does not mix two in a matrix product."""
    engine = copy.copy(backend)
    engine.to_double = lambda x: x  # type: ignore[method-assign]
    return engine


def differentiate(backend: TorchArrays, function: Function, y: Array, theta: Array) -> Any:
    """Record a vector function; differences where it cannot be."""
    leaves = _leaf(y), _leaf(theta)
    value = _record_condition(function, *leaves)
    if value is None:
        return Differences(_in_own_precision(backend), function, y, theta)
    graph = _look(backend, value, *leaves)
    if _hidden(backend, function, graph, *leaves):
        return Differences(_in_own_precision(backend), function, y, theta)
    return Recording(value, *leaves, graph.accuracy(y.dtype))


def differentiate_gradient(backend: TorchArrays, function: Function, y: Array, theta: Array) -> Any:
    """Record ∇_y f of a scalar function (one scalar per item)."""
    leaves = _leaf(y), _leaf(theta)
    value = _record_condition(function, *leaves)
    if value is None:
        return GradientDifferences(_in_own_precision(backend), function, y, theta)
    graph = _look(backend, value, *leaves)
    if not graph.ends_in(leaves[0]) and _hidden(backend, function, graph, *leaves):
        return GradientDifferences(_in_own_precision(backend), function, y, theta)

    def gradient(y: Array, theta: Array) -> Array:
        with mode(recording=True):
            y = y if y.requires_grad else _leaf(y)
            return _gradient(function(y, theta), y)

    with mode(recording=True):
        found = _gradient(value, leaves[0])
    graph = Graph(found)
    if _hidden(backend, gradient, graph, *leaves):
        return GradientDifferences(_in_own_precision(backend), function, y, theta)
    return Recording(found, *leaves, graph.accuracy(y.dtype))


def _gradient(value: Array, y: Array) -> Array:
    if not value.requires_grad:
        return torch.zeros_like(y)
    (found,) = torch.autograd.grad(value, y, torch.ones_like(value), create_graph=True, allow_unused=True)
    return torch.zeros_like(y) if found is None else found


def gradients(backend: TorchArrays, function: Function, y: Array, theta: Array) -> tuple[Array, Array, str]:
    """∂L/∂y and ∂L/∂θ of a scalar function."""
    leaves = _leaf(y), _leaf(theta)
    value = _record(function, *leaves)
    if value is None or _hidden(backend, function, _look(backend, value, *leaves), *leaves):
        return scalar_gradients(_in_own_precision(backend), function, y, theta)
    if not value.requires_grad:
        return torch.zeros_like(y), torch.zeros_like(theta), "autodiff"
    found = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)
    by_y, by_theta = (torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))
    return by_y, by_theta, "autodiff"
