"""Processes that hold a part of the data each: what is summed over them, and what they have to agree on.

F is the sum over the processes of each one's F, and so are its derivatives and products. y, θ and every vector of a
solve are the same everywhere. Solutions are never averaged: a mean of solutions is not the solution of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Maps
from implicitdiff.errors import BackendError, DerivativeError, InputError
from implicitdiff.linalg.operator import Product

__all__ = ["Group"]


class Group:
    """A process group.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or True
        True is the default group.
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise BackendError(
                f"group = {group!r}, and there is no process group.\n"
                "Next: call torch.distributed.init_process_group in every process first."
            )
        self._group = None if group is True else group
        if dist.get_rank(self._group) < 0:
            raise BackendError("this process is no member of the group.")

    def sum(self, x: Array) -> Array:
        """Sum over the processes, in memory of its own."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def any(self, held: Any) -> Array:
        """Whether a flag holds in any process: all of them go on, or none does."""
        flag = held if isinstance(held, torch.Tensor) else torch.tensor(bool(held))
        return self._reduced(flag.to(torch.int32), dist.ReduceOp.MAX) > 0

    def _reduced(self, x: Array, how: Any) -> Array:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        if out.numel():
            dist.all_reduce(out, op=how, group=self._group)
        return out

    def check_same(self, name: str, x: Array) -> None:
        """Raise, in all processes, where a vector is not the same in all of them."""
        both = self._reduced(torch.stack([x, -x]), dist.ReduceOp.MAX)
        if bool((both[0] != -both[1]).any()):  # NaN is for others to tell
            raise InputError(
                f"{name} is not the same in all processes of the group.\n"
                "Likely cause: each solved for its own data, or started from other random numbers.\n"
                "Next: solve for the sum over all data, or send one process's to the others (broadcast)."
            )

    def summed(self, maps: Maps) -> Maps:
        """F, A and B of the sum from those of this process's data."""
        if maps.embedding is not None:
            raise DerivativeError(
                "constraints are no sum over the processes of a group.\n"
                "Next: give KKT a Lagrangian that is reduced over the group by yourself, on a backend without group=."
            )

        def wrap(product: Product) -> Product:
            return lambda x: self.sum(product(x))

        residual, at, matrix = maps.residual, maps.at, maps.A.matrix
        return Maps(
            None if residual is None else (lambda: self.sum(residual())),
            None if at is None else (lambda y, theta: self.sum(at(y, theta))),
            maps.A.rewrapped(wrap, matrix=None if matrix is None else self.sum(matrix)),
            maps.B.rewrapped(wrap),
        )
