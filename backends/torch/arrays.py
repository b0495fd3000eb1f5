"""Torch tensors: exact derivatives from one recorded graph, torch.linalg, in-place vector work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.array_api import ArrayAPIBackend
from implicitdiff.backends.torch import autograd as torch_autograd
from implicitdiff.backends.torch import dtensor as torch_dtensor
from implicitdiff.backends.torch import namespace as xp
from implicitdiff.backends.torch.captured import Captures
from implicitdiff.backends.torch.space import TorchItemsSpace, space_on_host
from implicitdiff.errors import BackendError
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.pytree import flatten

__all__ = ["TorchArrays"]


class TorchArrays(ArrayAPIBackend):
    """What the core needs of Torch, on plain tensors; `TorchBackend` adds how Torch differentiates our results."""

    name = "torch"
    captures: Captures | None = None
    """Takes note of the tensors that functions use beside their arguments, where Torch may be asked about them."""

    def __init__(self) -> None:
        super().__init__(xp)
        self.name = "torch"

    # -- arrays of the user ------------------------------------------------------------------------
    def is_array(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor)

    def as_leaf(self, leaf: Any, where: str) -> Array:
        found = super().as_leaf(leaf, where)
        if found.layout != torch.strided:
            raise BackendError(f"{where} is a sparse tensor ({found.layout}); expected a dense one: x.to_dense().")
        return torch_autograd.recordable(found.detach())

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        found = super().as_array(x, device, dtype)
        if found is None or found.is_floating_point() or found.is_complex():
            return found if found is None else _unrecorded(found)
        return found.to(dtype)

    def common_dtype(self, dtypes: Sequence[Any]) -> Any:
        return torch.float32 if dtypes and all(d == torch.float32 for d in dtypes) else torch.float64

    def device(self, x: Array) -> Any:
        return x.device

    def to_host(self, x: Array) -> Any:
        return x.detach().cpu().numpy()

    def guard(self, x: Array) -> Array:
        if is_tree_vector(x):
            return x.map(torch.clone)
        return x.clone()  # a callback that works in place on its argument would silently spoil the iteration

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        if torch_dtensor.is_spread(x):
            raise BackendError(
                "y or theta holds DTensors, which this would have to concatenate (a direct method, a Jacobian, a "
                "matrix, a batch, a preconditioner).\nNothing is gathered behind your back.\n"
                "Next: solver='cg' (or 'minres') with vjp, jvp or grad, and leaves of one dtype."
            )
        return x.reshape(shape)

    def concat(self, parts: Sequence[Array]) -> Array:
        return torch.cat(list(parts), dim=-1)

    def astype(self, x: Array, dtype: Any) -> Array:
        return _unrecorded(x.to(dtype))

    # -- the user's functions ------------------------------------------------------------------------
    def computing(self) -> AbstractContextManager[Any]:
        return torch_autograd.computing()

    def trees(self, y: Any, theta: Any) -> bool:
        groups = [flatten(tree).leaves for tree in (y, theta)]
        if not all(groups) or not any(torch_dtensor.is_spread(leaf) for group in groups for leaf in group):
            return False
        return all(len({getattr(leaf, "dtype", None) for leaf in group}) == 1 for group in groups)

    def address(self, x: Any) -> Any:
        if type(x) not in {torch.Tensor, torch.nn.Parameter} or not x.is_contiguous() or not x.numel():
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None
        return x.data_ptr(), x.numel(), x.dtype

    def local(self, y: Any, theta: Any) -> bool:
        return not any(torch_dtensor.is_spread(leaf) for tree in (y, theta) for leaf in flatten(tree).leaves)

    def is_vector(self, tree: Any) -> bool:
        return super().is_vector(tree) and not torch_dtensor.is_spread(tree)

    def space(self, x: Any) -> Any:
        return torch_dtensor.DTensorSpace(x) if is_tree_vector(x) else super().space(x)

    def callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        call = torch_autograd.callback(function)
        return call if self.captures is None else (lambda *args: self._seen(call(*args)))

    def vmap(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Turn a function of one item into one over a leading axis of items."""
        call = torch_autograd.over_items(function)
        return call if self.captures is None else (lambda *xs: self._seen(call(*xs)))

    def _seen(self, out: Any) -> Any:
        """Look at what was made of plain tensors: it has a graph where it was made of others, too."""
        if self.captures is not None and not torch.is_grad_enabled():
            self.captures.see(out)
        return out

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return _derivatives(y, theta).differentiate(self, function, y, theta)

    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return _derivatives(y, theta).differentiate_gradient(self, function, y, theta)

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        return _derivatives(y, theta).gradients(self, function, y, theta)

    # -- loops and linear algebra ----------------------------------------------------------------------
    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        many_of = torch_autograd.over_items(product)

        def many(x: Array) -> Array:
            if is_tree_vector(x):
                found = product(x)
                return torch_dtensor.settled(found) if is_tree_vector(found) else found.detach()
            # What a callback returns may be recorded, through a tensor of its own that requires a gradient.
            return cast("Array", self._seen((product if x.ndim == len(items) + 1 else many_of)(x))).detach()

        return many

    def synchronize(self, tree: Any) -> None:
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in flatten(tree).leaves):
            torch.cuda.synchronize()

    def peak_memory(self, function: Callable[[], Any]) -> int | None:
        if not torch.cuda.is_available():
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before, 0) or None  # None: it ran on the CPU

    def waits(self, held: Any) -> bool:
        return isinstance(held, torch.Tensor) and held.device.type != "cpu"

    def vector_space(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        if len(shape) == 1 and torch.device(device).type == "cpu":
            return space_on_host(tuple(shape), dtype)
        return TorchItemsSpace(xp, shape, dtype, device)

    def to_double(self, x: Array) -> Array:
        return x.to(torch.float64)

    def lu_factor(self, matrix: Array) -> Any:
        return torch.linalg.lu_factor_ex(matrix)[:2]

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        lu, pivots = factor
        return torch.linalg.lu_solve(lu, pivots, b, adjoint=transposed)

    def has_ldl(self, matrix: Array) -> bool:
        return True

    def ldl_factor(self, matrix: Array) -> Any:
        return torch.linalg.ldl_factor_ex(matrix)[:2]

    def ldl_solve(self, factor: Any, b: Array) -> Array:
        return torch.linalg.ldl_solve(*factor, b)

    def cho_factor(self, matrix: Array) -> Array:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor.masked_fill(info[..., None, None] != 0, float("nan"))

    def cho_solve(self, factor: Array, b: Array) -> Array:
        return torch.cholesky_solve(b, factor)


def _derivatives(*vectors: Any) -> Any:
    """Return the module that derives functions of such vectors."""
    return torch_dtensor if any(map(is_tree_vector, vectors)) else torch_autograd


def _unrecorded(x: Array) -> Array:
    """Detach what a callback recorded for itself (it may hold a tensor that requires a gradient), unless we record."""
    return x if torch.is_grad_enabled() else x.detach()
