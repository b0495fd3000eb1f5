"""Systems that are not square, made square, and Tikhonov's: for the methods of least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.linalg.block_operator import padded
from implicitdiff.linalg.operator import Operator

__all__ = ["regularised", "squared"]


def regularised(op: Operator, damping: Any) -> Operator:
    """Return A over δI, where A is not square: least squares with a right-hand side (b, 0) are those of Tikhonov."""
    if not damping or damping == "auto" or op.rows == op.columns:
        return op
    backend, m, n = op.backend, op.rows, op.columns
    xp, back = backend.xp, op.rmatvec

    def forward(x: Array) -> Array:
        return backend.concat([op.matvec(x), damping * x])

    def adjoint(u: Array) -> Array:
        return back(u[..., :m]) + damping * u[..., m:]

    matrix = op.matrix
    if matrix is not None:
        eye = xp.broadcast_to(xp.eye(n, dtype=op.dtype, device=op.device), (*op.items, n, n))
        matrix = xp.concat([matrix, damping * eye], axis=-2)
    return replace(op, rows=m + n, forward=forward, adjoint=adjoint, matrix=matrix, sparse=None, damping=damping,
                   derive=None, _cache={})  # fmt: skip


def squared(op: Operator) -> Operator:
    """Return A with rows or columns of zeros, where it is not square: vectors are of one length then."""
    backend, m, n = op.backend, op.rows, op.columns
    if m == n:
        return op
    most, product, back = max(m, n), op.matvec, op.rmatvec

    def forward(x: Array) -> Array:
        return padded(backend, product(x[..., :n]), most)

    def adjoint(u: Array) -> Array:
        return padded(backend, back(u[..., :m]), most)

    return replace(op, rows=most, columns=most, forward=forward, adjoint=adjoint, matrix=None, sparse=None,
                   symmetric=False, derive=None, _cache={})  # fmt: skip
