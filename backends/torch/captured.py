"""Tensors that the user's functions use beside their arguments, and of which Torch records derivatives.

A solution is differentiated with respect to its arguments alone. A function tells what else it uses by the graph of
what it returns: whatever way a tensor came in (a closure, a default, an attribute, a module's parameter), the graph
ends in it. What a result owes to such a tensor is no zero: whoever asks for it gets an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from implicitdiff.arrays import Array
from implicitdiff.errors import DerivativeError
from implicitdiff.pytree import flatten

__all__ = ["Captures", "Graph", "RefusedCaptures", "by_arguments", "captured"]


def captured() -> DerivativeError:
    """Build the error for a tensor that requires a gradient and is no argument: its gradient would be None or zero."""
    return DerivativeError(
        "a function uses a tensor from the enclosing scope that requires a gradient, and the gradient is asked for.\n"
        "Likely cause: a theta in a closure, or a module's parameters. Derivatives are those of y, theta and vectors.\n"
        "Next: pass it in theta (a tuple, a dict). Or, where it is fixed: detach() it, requires_grad_(False), no_grad."
    )


class Graph:
    """What Torch recorded of some values, in one walk.

    Parameters
    ----------
    *values : tensor

    Attributes
    ----------
    leaves : dict
        The tensors in which it ends, by their id.
    """

    def __init__(self, *values: Array) -> None:
        self.leaves: dict[int, Array] = {id(x): x for x in values if x.requires_grad and x.grad_fn is None}
        self._casts: list[Any] = []
        seen, stack = set(), [x.grad_fn for x in values]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                self.leaves[id(leaf)] = leaf
            if type(node).__name__ == "ToCopyBackward0":
                self._casts.append(node)
            stack.extend(next_node for next_node, _ in node.next_functions)

    def ends_in(self, *leaves: Array) -> bool:
        """Whether it ends in each of the leaves."""
        return all(id(leaf) in self.leaves for leaf in leaves)

    def accuracy(self, dtype: torch.dtype) -> float:
        """Relative rounding of what was computed in a lower precision than this on the way; 0 where nothing was."""
        found = {meta.dtype for node in self._casts for meta in node._input_metadata if meta.dtype.is_floating_point}
        coarsest = max((float(torch.finfo(d).eps) for d in found), default=0.0)
        return coarsest if coarsest > float(torch.finfo(dtype).eps) else 0.0


def _innermost(x: Any) -> Any:
    """Take a tensor out of the transforms that it is under, which hide its graph."""
    while isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


class Captures:
    """Collects them."""

    def __init__(self) -> None:
        self._found: dict[int, Array] = {}

    @property
    def tensors(self) -> list[Array]:
        """Those that were seen."""
        return list(self._found.values())

    def see(self, tree: Any, *known: Array) -> None:
        """Look at what a function returned, given the leaves that it was to depend on."""
        values = [x for x in map(_innermost, flatten(tree).leaves) if isinstance(x, torch.Tensor) and x.requires_grad]
        if values:
            self.look(Graph(*values), *known)

    def look(self, graph: Graph, *known: Array) -> None:
        """Look at a graph, given the leaves that it is to end in."""
        expected = set(map(id, known))
        for key, leaf in graph.leaves.items():
            if key not in expected:
                self.meet(leaf)

    def meet(self, leaf: Array) -> None:
        """Take note of one."""
        self._found[id(leaf)] = leaf


class RefusedCaptures(Captures):
    """Raises at the first one, unless all that is asked for are derivatives by the arguments.

    Parameters
    ----------
    known : list of tensor
        Those that results have been made to refuse, to be filled later.
    """

    def __init__(self, known: list[Array]) -> None:
        super().__init__()
        self._known = known

    def meet(self, leaf: Array) -> None:
        if not _by_arguments.get() and not any(leaf is x for x in self._known):
            raise captured()


_by_arguments: ContextVar[bool] = ContextVar("derivatives by the arguments alone", default=False)


@contextlib.contextmanager
def by_arguments(alone: bool) -> Iterator[None]:
    """Say whether all that is asked for are derivatives by the arguments, which captured tensors do not touch."""
    token = _by_arguments.set(alone)
    try:
        yield
    finally:
        _by_arguments.reset(token)
