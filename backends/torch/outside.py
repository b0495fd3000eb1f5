"""Calls of functions of NumPy's arrays, under whatever transforms of Torch are at work, and not differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitdiff.arrays import Array

__all__ = ["Outside"]


class Outside(torch.autograd.Function):
    """The values of a function of NumPy's arrays, on the device of the first of its arguments."""

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Array) -> tuple[Array, ...]:
        device = tensors[0].device
        return tuple(torch.from_numpy(x).to(device) for x in function(*(x.detach().cpu().numpy() for x in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Array | None) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Callable[..., Any], *tensors: Array) -> Any:
        each = [
            x.unsqueeze(0) if d is None else x.movedim(d, 0) for x, d in zip(tensors, in_dims[1:], strict=True)
        ]  # the function takes an axis of length one for one that is shared
        found = Outside.apply(function, *each)
        return found, (0,) * len(found)
