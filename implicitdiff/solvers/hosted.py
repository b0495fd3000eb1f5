"""SuperLU for every framework: the entries of A and the right-hand sides go to the host, solutions come back.

Where nothing is seen (JAX's programs) the host is called from within the program. It keeps the latest factors by what
they were made of, so that a program that solves with A, with Aᵀ and for a Newton step factors once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.linalg.entries import Entries
from implicitdiff.linalg.equilibration import Scaling
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts
from implicitdiff.registry import get_backend
from implicitdiff.solvers import sparse
from implicitdiff.solvers.sparse import SparseState

__all__ = ["HostedState", "init", "solve"]

KEPT = 2
"""Matrices whose factors are kept for programs."""
_factors: OrderedDict[Any, SparseState] = OrderedDict()
_lock = threading.Lock()


class HostedState(NamedTuple):
    """An operator of another framework, or a batch, with the entries of A; factored on the host."""

    operator: Operator
    entries: Entries
    symmetric: bool
    transposed: bool = False
    factors: tuple[SparseState, ...] | None = None
    """One per item; None where nothing is seen."""

    def transpose(self) -> HostedState:
        """Of Aᵀ."""
        return self._replace(operator=self.operator.transpose(), transposed=not self.transposed)

    @property
    def scaling(self) -> Scaling | None:
        """R and C, where they are seen and there is one item."""
        if self.factors is None or len(self.factors) != 1 or self.factors[0].scaling is None:
            return None
        xp, op = self.operator.backend.xp, self.operator
        parts = (xp.asarray(x, dtype=op.dtype, device=op.device) for x in self.factors[0].scaling)
        rows, columns = (xp.broadcast_to(x, (*op.items, op.n)) for x in parts)
        return Scaling(columns, rows) if self.transposed else Scaling(rows, columns)


def init(operator: Operator, *, symmetric: bool) -> Any:
    """Factor the operator's sparse matrix, of SciPy or as entries of the framework."""
    if operator.sparse is not None:
        return sparse.init(operator, symmetric=symmetric)
    entries, backend = operator.entries, operator.backend
    state = HostedState(operator, entries, symmetric)
    if not backend.sees(entries.values):
        return state
    values = np.asarray(backend.to_host(entries.values)).reshape(-1, entries.pattern.size)
    return state._replace(factors=tuple(_factored(state, item, keep=False) for item in values))


def solve(state: Any, b: Array) -> tuple[Array, Any, Counts]:
    """Solve for b of shape (*rhs, *items, n)."""
    if isinstance(state, SparseState):
        return sparse.solve(state, b)
    op, lead = state.operator, tuple(b.shape[:-1])
    numbers = op.dtype if not hasattr(op.backend, "to_double") else op.backend.to_double(b[..., :1]).dtype
    like = [(tuple(b.shape), b.dtype, op.device), (lead, op.backend.xp.int32, op.device)]
    like += [(lead, numbers, op.device)] * 5

    def on_host(values: Any, b: Any) -> list[Any]:
        factors = state.factors or [_factored(state, v, keep=True) for v in values.reshape(-1, values.shape[-1])]
        return _solved([f.transpose() if state.transposed else f for f in factors], b, len(op.items))

    x, status, residual, norm, rcond, tolerance, condition = op.backend.on_host(on_host, like, state.entries.values, b)
    return x, status, Counts(0, 0, residual, norm, rcond, tolerance, condition if op.offset else None)


def _solved(factors: list[SparseState], b: Any, batched: int) -> list[Any]:
    """Solve item by item, with arrays of NumPy."""
    found = []
    for k, factor in enumerate(factors):
        x, status, counts = sparse.solve(factor, b[..., k, :] if batched else b)
        numbers = (counts.residual, counts.operator_norm, counts.rcond, counts.tolerance, counts.condition)
        lead = x.shape[:-1]
        whole = [np.broadcast_to(np.nan if a is None else np.asarray(a), lead) for a in (status, *numbers)]
        found.append([x, *whole])
    if not batched:
        return found[0]
    return [np.stack(parts, axis=-2 if i == 0 else -1) for i, parts in enumerate(zip(*found, strict=True))]


def _factored(state: HostedState, values: Any, *, keep: bool) -> SparseState:
    """Factor one item; of a program's the latest are kept."""
    op, pattern = state.operator, state.entries.pattern
    said = (state.symmetric, op.symmetric, op.trusted, op.offset, op.accuracy, values.dtype.str)
    key = (pattern, *said, hashlib.blake2b(values.tobytes()).digest()) if keep else None
    with _lock:
        if key in _factors:
            _factors.move_to_end(key)
            return _factors[key]
    host = Operator(
        get_backend("numpy"), op.n, op.n, (), values.dtype, None, sparse=pattern.matrix(values).tocsc(),
        symmetric=op.symmetric, trusted=op.trusted, offset=op.offset, accuracy=op.accuracy,
    )  # fmt: skip
    made = sparse.init(host, symmetric=state.symmetric)
    if keep:
        with _lock:
            _factors[key] = made
            while len(_factors) > KEPT:
                _factors.popitem(last=False)
    return made
