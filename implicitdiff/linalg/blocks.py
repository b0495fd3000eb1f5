"""The blocks of A: coordinates of y that equations link, directly or through others.

Equilibration shows the unit of a coordinate beside that of another that is linked with it. Where A falls into blocks
(a diagonal A: one for each coordinate) nothing ties the units of one block to those of another, and no coordinate may
be called small beside one of another block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator

__all__ = ["largest_linked"]

ROUNDS = 64
"""From neighbour to neighbour; what is linked over longer chains is looked at as one block with all others."""


class _Spread(NamedTuple):
    x: Array
    grows: Array
    round: Array


def largest_linked(op: Operator, scaling: Any, x: Array) -> Array | None:
    """Largest entry of x >= 0, shape (*items, n), among the coordinates of the block of each.

    Parameters
    ----------
    op : Operator
    scaling : Scaling or None
        R and C of its equilibration.
    x : array, shape (*items, n)

    Returns
    -------
    array, shape (*items, n), or None
        None where no matrix is at hand.
    """
    if op.sparse is not None:
        return _of_sparse(op, scaling, x)
    matrix = op.matrix if op.matrix is not None else op.at_hand
    if matrix is None:
        return None
    backend, xp = op.backend, op.backend.xp
    if backend.traced:  # of x, too, or a compiler looks for links where nobody asks for them
        one = xp.where(x[..., :1, None] < 0, xp.zeros_like(x[..., :1, None]), xp.ones_like(x[..., :1, None]))
        matrix = matrix * xp.astype(one, matrix.dtype)
    size = xp.abs(matrix)
    if scaling is not None:
        size = scaling.rows[..., :, None] * xp.astype(size, scaling.rows.dtype) * scaling.columns[..., None, :]
    links = size > float(xp.finfo(op.dtype).eps) * xp.max(size, axis=-1, keepdims=True)
    none = xp.zeros_like(x)

    def body(s: _Spread) -> _Spread:
        rows = xp.max(xp.where(links, s.x[..., None, :], none[..., None, :]), axis=-1)
        wider = xp.max(xp.where(links, rows[..., :, None], none[..., :, None]), axis=-2)
        wider = xp.where(wider > s.x, wider, s.x)
        return _Spread(wider, xp.any(wider > s.x, axis=-1), s.round + 1)

    start = _Spread(x, xp.any(x == x, axis=-1), xp.zeros((), dtype=xp.int32, device=op.device))
    end = backend.while_loop(lambda s: xp.any(s.grows) & (s.round < ROUNDS), body, start, limit=ROUNDS)
    return xp.where(end.grows[..., None], xp.max(x, axis=-1, keepdims=True), end.x)


def _of_sparse(op: Operator, scaling: Any, x: Array) -> Array:
    from scipy.sparse import block_array
    from scipy.sparse.csgraph import connected_components

    size = abs(op.sparse).tocsr()
    if scaling is not None:
        size = size.multiply(scaling.rows[:, None]).multiply(scaling.columns[None, :]).tocsr()
    size.data[size.data <= float(np.finfo(op.dtype).eps) * size.max()] = 0
    size.eliminate_zeros()
    _, labels = connected_components(block_array([[None, size], [size.T, None]]), directed=False)
    of_columns, top = labels[op.n :], np.zeros(labels.max() + 1, x.dtype)
    np.maximum.at(top, of_columns, x)
    return top[of_columns]
