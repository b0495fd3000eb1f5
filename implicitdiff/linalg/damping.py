"""Damping that is found: the least δ for which A + δI is positive definite.

Of a matrix at hand, δ follows from the least eigenvalue of its symmetric part; of products, from the least Ritz value
on a Krylov space of a vector without structure, less its residual. A that is positive definite already is not damped.

References
----------
C. Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential and integral
operators", J. Res. Natl. Bur. Stand. 45 (1950) 255-282. DOI 10.6028/jres.045.026
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true
from implicitdiff.linalg.operator import Operator, Product
from implicitdiff.tolerances import LOST, MARGIN

__all__ = ["AUTO", "damped", "least_damping", "shifted"]

AUTO = "auto"
STEPS = 60
"""Of the Lanczos process, at most."""


class _State(NamedTuple):
    v: Array
    before: Array
    beta: Array
    alphas: Array
    betas: Array
    j: Any
    active: Array


def shifted(prepared: Any) -> bool:
    """Whether it is another matrix than A that is solved with, or may be where values are not seen."""
    found, backend = prepared.found_damping, prepared.operator.backend
    if found is None:
        return abs(prepared.damping) > 0  # not where it is NaN, and yet to be found
    return bool(backend.traced or any_true(backend.xp, found != 0))


def damped(operator: Operator, damping: Any, *, dense: bool) -> tuple[Operator, Any]:
    """Return A + δI, and δ where it was found: a number for each item."""
    if damping != AUTO:
        return operator.damped(float(damping)), None
    if operator.rows != operator.columns:
        return operator, None
    if dense and operator.matrix is None and operator.sparse is None and operator.principal() is operator:
        operator = replace(operator, matrix=operator.dense(), _cache={"probes": operator.n})  # for the method, too
    found = least_damping(operator, dense=dense)
    made, spent = _damped(operator, found), operator.probes
    if made is not operator:
        made._cache["probes"] = made.probes + spent
    return made, found


def _damped(operator: Operator, found: Array) -> Operator:
    if not operator.backend.traced and not operator.items:
        return operator.damped(float(found))
    return operator.damped(found)


def least_damping(op: Operator, *, dense: bool) -> Array:
    """Return the least δ for which A + δI is positive definite with something to spare, per item.

    Parameters
    ----------
    op : Operator
    dense : bool
        Whether to assemble A for its eigenvalues.
    """
    backend = op.backend
    xp, part = backend.xp, op.principal()
    low, size = _of_matrix(part) if dense else _of_products(part)
    eps = float(xp.finfo(op.dtype).eps)
    finite = xp.isfinite(low) & xp.isfinite(size)
    low, size = (xp.where(finite, x, xp.zeros_like(x)) for x in (low, size))
    needed = low <= max(op.resolution, eps) / LOST * size
    below = xp.where(low < 0, -low, xp.zeros_like(low))
    found = xp.where(needed, (1 + MARGIN) * below + eps**0.5 * size, xp.zeros_like(low))
    return backend.detached(backend.astype(xp.asarray(found), op.dtype))


def _of_matrix(op: Operator) -> tuple[Array, Array]:
    """Return the least eigenvalue of the symmetric part, and the largest in size."""
    xp, matrix = op.backend.xp, op.backend.to_double(op.dense())
    finite = xp.all(xp.isfinite(matrix), axis=(-2, -1))
    matrix = xp.where(finite[..., None, None], matrix, xp.zeros_like(matrix))
    values = xp.linalg.eigvalsh(0.5 * (matrix + xp.matrix_transpose(matrix)))
    return values[..., 0], xp.max(xp.abs(values), axis=-1)


def _of_products(op: Operator) -> tuple[Array, Array]:
    """Return a lower estimate of the least eigenvalue by the Lanczos process, and the largest Ritz value in size."""
    backend = op.backend
    like = op.like
    if like is None:
        like = backend.xp.zeros((*op.items, op.n), dtype=op.dtype, device=op.device)
    space, most = backend.space(like), min(op.n, STEPS)
    forward, adjoint = op.matvec, op.matvec if op.symmetric else op.rmatvec

    def product(v: Array) -> Array:
        image = space.copy(forward(v))
        if op.symmetric:
            return image
        return space.scale(space.scalar(0.5), space.axpy(space.scalar(1.0), adjoint(v), image))

    start = space.copy(space.probe())
    start = space.scale(1 / space.norm(start), start)
    rows = space.xp.zeros((*space.items, most), dtype=space.dtype, device=space.device)
    zero = space.scalar(0.0)
    first = _State(start, space.zeros(), zero, rows, rows, 0, zero == zero)
    end = backend.while_loop(
        lambda s: space.any(s.active & (s.j < most)), lambda s: _step(s, space, product, most), first, limit=most
    )
    op._cache["probes"] = op.probes + (end.j if isinstance(end.j, int) else most) * (1 if op.symmetric else 2)
    low, size = _extremes(space, end, most)
    return backend.xp.asarray(low, dtype=op.dtype, device=op.device), backend.xp.asarray(
        size, dtype=op.dtype, device=op.device
    )


def _step(s: _State, space: Any, product: Product, most: int) -> _State:
    zero, one = space.scalar(0.0), space.scalar(1.0)
    w = product(s.v)
    alpha = space.inner(s.v, w)
    w = space.axpy(-s.beta, s.before, space.axpy(-alpha, s.v, w))
    beta = space.norm(w)
    here = space.xp.astype(space.xp.arange(most, device=space.device) == s.j, space.dtype)
    size = space.sqrt(alpha * alpha + beta * beta)
    go = s.active & (beta > space.eps**0.75 * size)

    def put(row: Array, value: Array) -> Array:
        value = space.xp.asarray(space.where(s.active, value, zero))
        return row + here * value[..., None]

    beta = space.where(go, beta, zero)
    v = space.scale(space.where(go, one / space.where(go, beta, one), zero), w)
    # what an item that has stopped leaves out, its first value stands for
    first = space.xp.asarray(s.alphas)[..., 0]
    alphas = put(s.alphas, alpha) + here * space.xp.where(space.xp.asarray(s.active), 0 * first, first)[..., None]
    return _State(v, s.v, beta, alphas, put(s.betas, beta), s.j + 1, go)


def _extremes(space: Any, s: _State, most: int) -> tuple[Array, Array]:
    """Return the least Ritz value less its residual, and the largest in size."""
    xp = space.xp
    row = xp.arange(most, device=space.device)
    done = xp.astype(row < s.j, s.alphas.dtype)
    alphas = s.alphas + (1 - done) * s.alphas[..., :1]
    eye = xp.eye(most, dtype=s.alphas.dtype, device=space.device)
    above = xp.eye(most, k=1, dtype=s.alphas.dtype, device=space.device)
    betas = s.betas * xp.astype(row < most - 1, s.alphas.dtype)
    upper = betas[..., :, None] * above
    values, vectors = xp.linalg.eigh(alphas[..., :, None] * eye + upper + xp.matrix_transpose(upper))
    left = xp.abs(s.betas[..., -1] * vectors[..., -1, 0])
    return values[..., 0] - left, xp.max(xp.abs(values), axis=-1)
