"""The Lagrangian's saddle system from differences, where there is no autodiff: J is known, and differenced once.

A difference of ∇𝓛 over (y, z) would cost the coordinates of z as well, and find J again, with an error. So H and
∂²𝓛/∂θ∂y are differences of 𝓛 as a function of y and θ alone, z held, and K and B are put together from blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array, times
from implicitdiff.conditions.base import Maps
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.linalg.operator import LinearMap, Operator

__all__ = ["system_by_blocks"]


def system_by_blocks(
    point: Any, first: Any, z: Array, lagrangian: Callable[..., Any], constraints: Callable[..., Any]
) -> Maps:  # fmt: skip
    """F, A and B of the Lagrangian's stationary point over (y, z).

    Parameters
    ----------
    point : Point
    first : FirstOrder
        At the point.
    z : array, shape (*items, k)
    lagrangian : callable
        𝓛 as a function of ((y, z), θ).
    constraints : callable
        c as a function of (y, θ).
    """
    backend, n = point.backend, point.y.n

    def held(multipliers: Array) -> Any:
        part = point.part()
        value = lambda y, theta, *args: lagrangian((y, multipliers), theta, *args)  # noqa: E731
        return Stationary(value).maps(part)

    by_y, rows = held(z), first.rows
    columns = backend.xp.matrix_transpose(rows)

    def product(x: Array) -> Array:
        v, w = x[..., :n], x[..., n:]
        return backend.concat([by_y.A.matvec(v) + times(columns, w), times(rows, v)])

    H, order = by_y.A, n + rows.shape[-2]
    A = Operator(
        backend, order, order, point.items, H.dtype, H.device, forward=product, adjoint=product, kind=H.kind,
        label=H.label, symmetric=True, trusted=H.trusted, accuracy=H.accuracy,
    )  # fmt: skip

    def at(both: Array, theta: Array) -> Array:
        slope = held(both[..., n:]).at
        values = point.raveled_function(constraints, "the constraints")(both[..., :n], theta)
        return backend.concat([slope(both[..., :n], theta), values])

    def residual() -> Array:
        return backend.concat([first.gradient + times(columns, z), _finite(backend.xp, first.values)])

    return Maps(residual, at, A, _mixed(point, first, by_y.B, order))


def _finite(xp: Any, values: Array) -> Array:
    """Return c without infinite bounds."""
    return xp.where(values == -float("inf"), xp.zeros_like(values), values)


def _mixed(point: Any, first: Any, of_slope: LinearMap, order: int) -> LinearMap:
    """B = (∂²𝓛/∂θ∂y, ∂c/∂θ)."""
    backend, n, of_values = point.backend, point.y.n, first.derivatives
    return LinearMap(
        backend, order, point.theta.n, point.items, point.y.dtype, point.y.device, kind=of_slope.kind, label="B",
        forward=lambda t: backend.concat([of_slope.matvec(t), of_values.jvp_theta(t)]),
        adjoint=lambda u: of_slope.rmatvec(u[..., :n]) + of_values.vjp_theta(u[..., n:]),
        domain=point.theta.dtype,
    )  # fmt: skip
