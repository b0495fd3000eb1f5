"""Results that hold a part of which no derivative is known: whoever asks for it is told, and nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitdiff.arrays import Array
from implicitdiff.compilers import is_within_compiled
from implicitdiff.errors import DerivativeError
from implicitdiff.pytree import flatten, map_leaves

__all__ = ["owned", "with_refused"]

Error = Callable[[], Exception]


class Refused(torch.autograd.Function):
    """Zero, as a function of tensors by which it cannot be differentiated; the first input makes the error."""

    @staticmethod
    def forward(error: Error, *tensors: Array) -> Array:
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        ctx.error, *_ = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> Any:
        raise ctx.error()

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Array | None) -> Array:
        # Forward mode pushes through everything, asked for or not. What is used of it is not a number.
        return next(t for t in tangents if t is not None).new_full((), float("nan"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], error: Error, *tensors: Array) -> tuple[Array, None]:
        firsts = (x if d is None else x.select(d, 0) for x, d in zip(tensors, in_dims[1:], strict=True))
        return refused(error, *firsts), None


refused: Any = Refused.apply  # typed for nothing


def with_refused(tree: Any, tensors: Sequence[Array], error: Error) -> Any:
    """Return a tree of results whose floating-point tensors depend on others, to raise where that is followed."""
    tensors = [x for x in tensors if x.is_floating_point()]
    if not tensors or not any(map(_is_real, flatten(tree).leaves)):
        return tree
    zero = refused(error, *tensors)
    return map_leaves(lambda leaf: leaf + zero.to(leaf) if _is_real(leaf) else leaf, tree)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


class Once(torch.autograd.Function):
    """The identity, of memory of its own, that can be differentiated once in reverse mode."""

    @staticmethod
    def forward(x: Array) -> Array:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> Array:
        if not torch.is_grad_enabled():
            return cotangent
        return cotangent + refused(_twice_through_compiled, *ctx.saved_tensors).to(cotangent.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Array) -> Array:
        return tangent.clone()


once: Any = Once.apply


def _twice_through_compiled() -> DerivativeError:
    return DerivativeError(
        "a second derivative of a result of a function that torch.compile made is asked for.\n"
        "Likely cause: create_graph=True around it; what is compiled drops terms of second derivatives, in silence.\n"
        "Next: compute second derivatives without torch.compile."
    )


def owned(tree: Any) -> Any:
    """Return results in memory of their own, and where Torch's compiler is at work, for one derivative only.

    A function that was compiled ahead of time has a backward pass which is differentiated no further. Torch tells so
    where it sees that it would have to be, which it does not for a view, nor where the pass needs no input.
    """
    return map_leaves(once if is_within_compiled() else _no_view, tree)


def _no_view(leaf: Array) -> Array:
    return leaf.clone() if leaf._is_view() else leaf
