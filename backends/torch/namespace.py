"""Torch as the array standard has it, without the layer between where that takes longer than the work.

A small call makes some fifty of these, on tensors of one number each.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat.torch as standard
import torch

from implicitdiff.arrays import SAFE, Array

# not what answers to any name: doctest looks through a module, and asks torch.classes for its ``__wrapped__``
globals().update(
    {
        name: value
        for name, value in vars(standard).items()
        if not name.startswith("__") and (type(value) is ModuleType or not isinstance(value, ModuleType))
    }
)

_SAFE = {torch.float32: SAFE["f"], torch.float64: SAFE["d"]}


def __getattr__(name: str) -> Any:
    """Find what is loaded late."""
    return getattr(standard, name)


def where(condition: Array, x1: Any, x2: Any, /) -> Array:
    """As the standard has it; of tensors of one dtype there is nothing to promote."""
    if type(x1) is torch.Tensor and type(x2) is torch.Tensor and x1.dtype is x2.dtype:
        return torch.where(condition, x1, x2)
    return standard.where(condition, x1, x2)


def item_norm(x: Array) -> Array | None:
    """2-norms over the last axis, where numbers on the host show that nothing has to be scaled; else None."""
    if not x.is_cpu or x.dtype not in _SAFE or torch._C._functorch.is_functorch_wrapped_tensor(x) or not x.numel():
        return None
    norm = torch.linalg.vector_norm(x, dim=-1)
    least, most = (norm, norm) if norm.ndim == 0 else torch.aminmax(norm)
    tiny, huge = _SAFE[x.dtype]
    return norm if tiny < least.item() ** 2 and most.item() ** 2 < huge else None
