"""Derivatives by central finite differences, for functions of which nothing else is known.

Steps follow the usual balance of truncation against rounding: eps^(1/3) for a first difference, eps^(1/4) where a
second difference is taken of function values. Everything is evaluated in double precision.

References
----------
P. E. Gill, W. Murray, M. H. Wright, "Practical Optimization", Academic Press, 1981, section 4.6.
J. Domke, "Generic methods for optimization-based modeling", AISTATS 2012 (Hessian-vector products by differences).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array

__all__ = ["Differences", "GradientDifferences", "directional", "gradient_function", "scalar_gradients"]

Function = Callable[[Array, Array], Array]
Along = Callable[[Any, Callable[[Array], Array], Array, Array, float], Array]


def step_exponent(order: int) -> float:
    """Exponent of eps in the step: 1/3 for first differences, 1/4 for second differences of values."""
    return 1 / 3 if order == 1 else 1 / 4


def directional(xp: Any, function: Callable[[Array], Array], x: Array, v: Array, power: float) -> Array:
    """Central difference of a function at x along v, per item over the last axis."""
    if x.shape[-1] == 0:
        return 0 * function(x)
    eps = float(xp.finfo(x.dtype).eps)
    size = xp.max(xp.abs(v), axis=-1, keepdims=True)
    one = xp.ones_like(size)
    scale = xp.max(xp.abs(x), axis=-1, keepdims=True)
    h = eps**power * xp.where(scale > 1, scale, one) / xp.where(size > 0, size, one)
    above = xp.asarray(function(x + h * v), copy=True)  # a function may return the same buffer each time
    below = function(x - h * v)
    h = h if above.ndim == x.ndim else h[..., 0]
    change = above - below
    # A change within rounding is no change: a derivative that is zero has to come out as zero, or a singular
    # system would be solved as a tiny, regular one.
    largest = xp.where(xp.abs(above) > xp.abs(below), xp.abs(above), xp.abs(below))
    return xp.where(xp.abs(change) <= 4 * eps * largest, xp.zeros_like(change), change) / (2 * h)


class Differences:
    """Derivatives of a vector function G(y, θ) by differences along a direction.

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> G``, on vectors (*items, n) and (*items, m).
    y, theta : array
        The point.
    along : callable
        ``(xp, f, x, v, power) -> derivative of f at x along v``; central differences, or the complex step.
    kind : str
        For the report.
    power : float
        Of eps in the step.
    """

    def __init__(
        self, backend: Any, function: Function, y: Array, theta: Array, *, along: Along = directional,
        kind: str = "finite differences", power: float = 1 / 3,
    ) -> None:  # fmt: skip
        self.backend, self.xp, self.function = backend, backend.xp, function
        self.dtype = y.dtype
        self.theta_dtype = theta.dtype
        self.y, self.theta = backend.widen(y), backend.widen(theta)
        self.along, self.kind, self.power = along, kind, power
        eps = float(backend.xp.finfo(self.y.dtype).eps)
        # truncation h² balances rounding eps/h (or eps/h² for second differences of values)
        self.accuracy = eps if along is not directional else eps ** (2 * power)

    def value(self) -> Array:
        """G(y, θ)."""
        return self.backend.astype(self.function(self.y, self.theta), self.dtype)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v for v of shape (*rhs, *items, n)."""
        return self._forward(lambda y: self.function(y, self.theta), self.y, v)

    hvp = jvp_y

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t for t of shape (*rhs, *items, m)."""
        return self._forward(lambda theta: self.function(self.y, theta), self.theta, t)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u, one pass over the coordinates of y for all right-hand sides."""
        return self._backward(lambda y: self.function(y, self.theta), self.y, u, self.dtype)

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u, one pass over the coordinates of θ for all right-hand sides."""
        return self._backward(lambda theta: self.function(self.y, theta), self.theta, u, self.theta_dtype)

    def _forward(self, function: Callable[[Array], Array], x: Array, v: Array) -> Array:
        def one(w: Array) -> Array:
            return self.along(self.xp, function, x, w, self.power)

        items = tuple(x.shape[:-1])
        return self.backend.astype(self.backend.batched(one, items)(self.backend.widen(v)), self.dtype)

    def _backward(self, function: Callable[[Array], Array], x: Array, u: Array, dtype: Any) -> Array:
        u = self.backend.widen(u)
        parts = []
        for unit in unit_vectors(self.xp, x):
            column = self.along(self.xp, function, x, unit, self.power)
            parts.append(self.xp.vecdot(self.xp.broadcast_to(column, u.shape), u))
        if not parts:
            return self.xp.zeros((*u.shape[:-1], 0), dtype=dtype, device=self.backend.device(u))
        return self.backend.astype(self.xp.stack(parts, axis=-1), dtype)


def unit_vectors(xp: Any, x: Array) -> Any:
    """Unit vectors e_1 … e_n, each broadcast over the items of x."""
    for i in range(x.shape[-1]):
        unit = xp.zeros_like(x)
        unit[..., i] = 1.0
        yield unit


def gradient_function(xp: Any, function: Function, along: Along, power: float) -> Function:
    """∇_y of a scalar function, coordinate by coordinate."""

    def gradient(y: Array, theta: Array) -> Array:
        parts = [along(xp, lambda z: function(z, theta), y, unit, power) for unit in unit_vectors(xp, y)]
        return xp.stack(parts, axis=-1) if parts else xp.zeros_like(y)

    return gradient


class GradientDifferences(Differences):
    """Derivatives of ∇_y f for a scalar f of which only values are known."""

    def __init__(self, backend: Any, function: Function, y: Array, theta: Array, *,
                 inner: Along = directional, kind: str = "finite differences") -> None:  # fmt: skip
        power = step_exponent(2 if inner is directional else 1)
        super().__init__(
            backend, gradient_function(backend.xp, function, inner, power), y, theta, kind=kind, power=power
        )
        # the gradient itself deserves the better step of a first difference
        self._gradient = gradient_function(backend.xp, function, inner, step_exponent(1))

        self._values, self._noisy = function, inner is directional

    def _forward(self, function: Callable[[Array], Array], x: Array, v: Array) -> Array:
        product = super()._forward(function, x, v)
        if not self._noisy or x.shape[-1] == 0:
            return product
        # Second differences of values f carry rounding of eps |f| / h²; what lies below is no curvature.
        xp = self.xp
        eps = float(xp.finfo(self.y.dtype).eps)
        size = xp.abs(self._values(self.y, self.theta))[..., None]
        scale = xp.max(xp.abs(x), axis=-1, keepdims=True)
        h = eps**self.power * xp.where(scale > 1, scale, xp.ones_like(scale))
        noise = 8 * eps * size / (h * eps**self.power) * xp.max(xp.abs(v), axis=-1, keepdims=True)
        return xp.where(xp.abs(product) <= noise, xp.zeros_like(product), product)

    def value(self) -> Array:
        """∇_y f."""
        return self.backend.astype(self._gradient(self.y, self.theta), self.dtype)


def scalar_gradients(
    backend: Any, function: Function, y: Array, theta: Array, *, along: Along = directional,
    kind: str = "finite differences",
) -> tuple[Array, Array, str]:  # fmt: skip
    """∂L/∂y and ∂L/∂θ of a scalar function."""
    xp, wide_y, wide_theta = backend.xp, backend.widen(y), backend.widen(theta)
    by_y = gradient_function(xp, function, along, 1 / 3)(wide_y, wide_theta)
    by_theta = gradient_function(xp, lambda t, z: function(z, t), along, 1 / 3)(wide_theta, wide_y)
    return backend.astype(by_y, y.dtype), backend.astype(by_theta, theta.dtype), kind
