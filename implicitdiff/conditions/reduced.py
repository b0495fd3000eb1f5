"""The saddle system of a Lagrangian, scaled and reduced to the constraints that are active (see `constrained`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.conditions.active_set import ActiveSet
from implicitdiff.conditions.base import Embedding, Maps, Observations
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.units import Units, center
from implicitdiff.linalg.block_operator import SaddleOperator, padded, saddle
from implicitdiff.linalg.operator import LinearMap, Product, matrix_product
from implicitdiff.linalg.rows import SparseRows, saddle_entries, scaled_rows
from implicitdiff.linalg.sparsity import with_entries

__all__ = ["Choices", "reduced"]


class Choices(NamedTuple):
    """What the form of the saddle system depends on; arrays (*items, k)."""

    units: Units
    active: Array
    multipliers: Array
    scale: Array


def reduced(
    point: Point, whole: Maps, rows: Any, units: Units, found: ActiveSet
) -> Maps:  # fmt: skip
    """Scale the system and reduce it to the active set."""
    backend, n = point.backend, point.y.n
    xp = backend.xp
    held = backend.astype(found.active, rows.dtype)
    one = center(xp, units)  # the unit of y as a whole: H is of the size 1 / one²
    give = xp.where(units.give > 0, units.give, xp.ones_like(units.give))
    w = held * 2.0 ** xp.round(xp.log2(1 / (one * give)))
    corner = (1 - held) / (one * one)
    ones, zeros = xp.ones_like(units.bend), xp.zeros_like(units.bend)
    scale, diagonal = backend.concat([ones, w]), backend.concat([zeros, corner])

    def wrap(product: Product) -> Product:
        return lambda x: scale * product(scale * x) - diagonal * x

    both = backend.concat([units.bend, one + xp.zeros_like(w)])
    blocks = {"primal": n, "jacobian": scaled_rows(rows, w, None), "corner": corner, "positive_definite": False,
              "units": both}  # fmt: skip
    A = _with_matrix(saddle(whole.A.rewrapped(wrap), **blocks), whole.hessian, diagonal)
    usable = ~xp.any(found.violated | found.dependent, axis=-1)
    quiet = usable & ~xp.any(found.weak | found.wrong | found.unbalanced | found.degenerate, axis=-1)
    residual, at = whole.residual, whole.at
    z = xp.where(found.active, found.multipliers, xp.zeros_like(w))
    return Maps(
        None if residual is None else (lambda: scale * residual()),
        None if at is None else (lambda y, theta: at(backend.concat([y, z]), theta)),
        A,
        _scaled(whole.B, scale),
        Embedding(lambda v: padded(backend, v, A.n), lambda x: x[..., :n]),
        Observations(usable, quiet, found),
        checked=whole.checked,
        scale=scale,
        choices=Choices(units, found.active, z, w),
    )


def _with_matrix(A: SaddleOperator, hessian: Any, diagonal: Array) -> Any:
    """The operator with its matrix, dense or sparse, where that of H is known."""
    if hessian is None:
        return A
    if isinstance(hessian, SparseRows):
        return with_entries(A, saddle_entries(hessian, A.jacobian, -diagonal), hessian.spent)
    xp = A.backend.xp
    matrix = A.matrix_of(xp.concat([hessian, A.jacobian], axis=-2))
    product = matrix_product(xp, matrix)
    return replace(A, matrix=matrix, forward=product, adjoint=product)


def _scaled(B: LinearMap, scale: Array) -> LinearMap:
    """W B."""
    forward, adjoint, matrix = B.forward, B.adjoint, B.matrix
    return replace(
        B,
        forward=None if forward is None else (lambda t: scale * forward(t)),
        adjoint=None if adjoint is None else (lambda u: adjoint(scale * u)),
        matrix=None if matrix is None else scale[..., None] * matrix,
        _cache={},
    )
