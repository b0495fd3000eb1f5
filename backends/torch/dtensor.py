"""Tensors that are spread over processes (DTensor): nothing is gathered, and each leaf keeps its placements.

A vector is then a tuple of leaves. Only what decides about the course of a method, a handful of scalars, is reduced
over the processes, so that all of them take the same number of iterations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import torch

from implicitdiff.arrays import Array, probe_vector
from implicitdiff.backends.torch.autograd import mode
from implicitdiff.backends.torch.captured import Graph
from implicitdiff.errors import BackendError, DerivativeError
from implicitdiff.linalg.vector_space import TreeSpace, TreeVector, is_tree_vector

if TYPE_CHECKING:
    from implicitdiff.backends.torch.arrays import TorchArrays

__all__ = ["DTensorSpace", "TreeRecording", "differentiate", "differentiate_gradient", "gradients", "is_spread"]

Function = Callable[..., Any]


def is_spread(x: Any) -> bool:
    """Whether it is a DTensor; without loading what makes them."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def whole(x: Array) -> Array:
    """Reduce a scalar, or what else is small, to a plain tensor that is the same in all processes."""
    return x.full_tensor() if is_spread(x) else x


def placed(x: Array, like: Array) -> Array:
    """Move a tensor to the placements of another; sums over processes that are still to be made are made."""
    if not is_spread(x) or not is_spread(like) or x.placements == like.placements:
        return x
    return x.redistribute(like.device_mesh, like.placements)


def settled(x: TreeVector) -> TreeVector:
    """Detach what a callback returned, and make the sums over processes that it left to be made."""
    return x.map(_settled)


def _settled(leaf: Array) -> Array:
    leaf = leaf.detach()
    if not is_spread(leaf) or not any(p.is_partial() for p in leaf.placements):
        return leaf
    from torch.distributed.tensor import Replicate

    return leaf.redistribute(placements=[Replicate() if p.is_partial() else p for p in leaf.placements])


class DTensorSpace(TreeSpace):
    """Vectors that are tuples of DTensors; scalars are plain tensors."""

    def __init__(self, like: TreeVector) -> None:
        super().__init__(xp, like)
        self.device = like.leaves[0].device

    def total(self, x: Array) -> Array:
        return whole(torch.sum(x))

    def top(self, x: Array) -> Array:
        return whole(torch.max(x))

    def finite(self, x: TreeVector) -> Array:
        # counted, since the largest of several numbers of which one is NaN need not be NaN over processes
        bad = [self.total((~torch.isfinite(leaf)).to(leaf.dtype)) for leaf in x.leaves]
        return sum(bad[1:], start=bad[0]) == 0

    def copy(self, x: TreeVector) -> TreeVector:
        return x.map(placed, self.like)

    def subtract(self, x: TreeVector, y: TreeVector) -> TreeVector:
        return x - y.map(placed, x)

    def axpy(self, a: Any, x: TreeVector, y: TreeVector) -> TreeVector:
        return y.map(lambda q, p: q + a * placed(p, q), x)

    def select(self, mask: Array, x: TreeVector, y: TreeVector) -> TreeVector:
        return x if bool(mask) else y

    def worst(self, x: TreeVector) -> Array:
        return torch.tensor(-1)  # a position in a leaf that is spread over processes means nothing

    def entry(self, x: TreeVector, index: Array) -> Array:
        return torch.tensor(float("nan"))

    def _wave(self, leaf: Array, number: int) -> Array:
        out = torch.ones_like(leaf)
        for axis, k in enumerate(leaf.shape):
            wave = probe_vector(xp, k, leaf.dtype, leaf.device, number)
            out = out * _everywhere(wave.reshape([k if i == axis else 1 for i in range(leaf.ndim)]), leaf)
        return out

    def basis(self, k: int) -> TreeVector:
        raise BackendError(
            "gmres keeps a basis of vectors, which cannot be made of DTensors.\n"
            "Next: solver='cg' or 'minres' where A is symmetric."
        )


def _everywhere(x: Array, like: Array) -> Array:
    """Turn a tensor that is the same in all processes into one that goes together with another."""
    if not is_spread(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


# -- derivatives -------------------------------------------------------------------------------------
class TreeRecording:
    """Derivatives of a function between tuples of leaves, recorded at one point.

    Parameters
    ----------
    value : sequence of tensor
        The leaves of G(y, θ), with their graph.
    y, theta : TreeVector or tensor
        The leaves of that graph.
    """

    kind = "autodiff"
    accuracy = 0.0

    def __init__(self, value: Sequence[Array], y: Any, theta: Any) -> None:
        self._graph, self._y, self._theta = list(value), y, theta
        self._adjoints: dict[str, tuple[list[Array], list[Array]]] = {}

    def value(self) -> Any:
        """G(y, θ)."""
        return _same(self._y, [v.detach() for v in self._graph])

    def vjp_y(self, u: Any) -> Any:
        """(∂G/∂y)ᵀ u."""
        return _same(self._y, _pull(self._graph, leaves(self._y), leaves(u)))

    hvp = vjp_y

    def vjp_theta(self, u: Any) -> Any:
        """(∂G/∂θ)ᵀ u."""
        return _same(self._theta, _pull(self._graph, leaves(self._theta), leaves(u)))

    def jvp_y(self, v: Any) -> Any:
        """(∂G/∂y) v."""
        return self._forward("y", self._y, v)

    def jvp_theta(self, t: Any) -> Any:
        """(∂G/∂θ) t."""
        return self._forward("theta", self._theta, t)

    def _forward(self, name: str, x: Any, v: Any) -> Any:
        """J v, as the adjoint of u -> Jᵀ u."""
        if name not in self._adjoints:
            with mode(recording=True):
                u = [torch.zeros_like(g, requires_grad=True) for g in self._graph]
                self._adjoints[name] = _pull(self._graph, leaves(x), u, create_graph=True), u
        image, u = self._adjoints[name]
        return _same(self._y, _pull(image, u, leaves(v)))


def leaves(x: Any) -> list[Array]:
    """Return the leaves of a vector: itself where it is one tensor."""
    return list(x.leaves) if is_tree_vector(x) else [x]


def _same(like: Any, parts: Sequence[Array]) -> Any:
    return TreeVector(parts) if is_tree_vector(like) else parts[0]


def _pull(values: list[Array], xs: list[Array], us: list[Array], *, create_graph: bool = False) -> list[Array]:
    """Jᵀ u, each leaf with the placements of x."""
    pairs = [(v, placed(u, v)) for v, u in zip(values, us, strict=True) if v.requires_grad]
    found: Sequence[Array | None] = [None] * len(xs)
    if pairs:
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, xs, grads, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else placed(g, x) for g, x in zip(found, xs, strict=True)]


def _fresh(x: Any) -> Any:
    return _same(x, [leaf.detach().requires_grad_() for leaf in leaves(x)])


def differentiate(backend: TorchArrays, function: Function, y: Any, theta: Any) -> TreeRecording:
    """Record a vector function."""
    y, theta = _fresh(y), _fresh(theta)
    with mode(recording=True):
        value = [placed(v, leaf) for v, leaf in zip(leaves(function(y, theta)), leaves(y), strict=True)]
    _check_recorded(backend, function, value, y, theta)
    return TreeRecording(value, y, theta)


def differentiate_gradient(backend: TorchArrays, function: Function, y: Any, theta: Any) -> TreeRecording:
    """Record ∇_y f of a scalar function."""

    def gradient(y: Any, theta: Any) -> Any:
        with mode(recording=True):
            at = y if leaves(y)[0].requires_grad else _fresh(y)
            value = whole(function(at, theta))
            return _same(y, _pull([value], leaves(at), [torch.ones_like(value)], create_graph=True))

    y, theta = _fresh(y), _fresh(theta)
    with mode(recording=True):
        _check_recorded(backend, function, [whole(function(y, theta))], y, theta)
    return differentiate(backend, gradient, y, theta)


def gradients(backend: TorchArrays, function: Function, y: Any, theta: Any) -> tuple[Any, Any, str]:
    """∂L/∂y and ∂L/∂θ of a scalar function."""
    y, theta = _fresh(y), _fresh(theta)
    with mode(recording=True):
        value = whole(function(y, theta))
    _check_recorded(backend, function, [value], y, theta)
    one = [torch.ones_like(value)]
    by_y, by_theta = (_same(x, _pull([value], leaves(x), one)) for x in (y, theta))
    return by_y, by_theta, "autodiff"


def _check_recorded(backend: TorchArrays, function: Function, values: list[Array], y: Any, theta: Any) -> None:
    """Raise where a function depends on an argument that its graph does not end in: it was detached on the way."""
    graphs = [Graph(v) for v in values]
    if backend.captures is not None:
        for graph in graphs:
            backend.captures.look(graph, *leaves(y), *leaves(theta))
    plain = [_same(x, [leaf.detach() for leaf in leaves(x)]) for x in (y, theta)]
    for i, x in enumerate((y, theta)):
        missed = [not any(graph.ends_in(leaf) for graph in graphs) for leaf in leaves(x)]
        if not any(missed):
            continue
        moved = list(plain)
        nearby = leaves(backend.space(plain[i]).nearby(plain[i]))
        moved[i] = _same(
            x, [far if miss else at for far, at, miss in zip(nearby, leaves(plain[i]), missed, strict=True)]
        )
        here, there = leaves(function(*plain)), leaves(function(*moved))
        if any(bool(whole(torch.sum(a != b))) for a, b in zip(here, there, strict=True)):
            raise DerivativeError(
                "a function of DTensors leaves Torch's recording on the way (NumPy, detach, full_tensor of a copy).\n"
                "Next: write it in Torch throughout: nothing can be differenced over processes."
            )
