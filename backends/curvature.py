"""Second derivatives of a scalar function of which only values are known.

The curvature along a direction w is D²(w) = wᵀ H w, and between two directions, by polarisation,

    vᵀ H w = (D²(v + w) − D²(v) − D²(w)) / 2,

exact for a quadratic function at any step. One curvature costs four values: a Hessian 2 n² + 2 n, a product H v or
Bᵀ u four for each entry of the result, once those of the coordinates themselves are known.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, times
from implicitdiff.backends.base import Backend
from implicitdiff.backends.differences import Differences, Function, gradient, groups, sweep
from implicitdiff.backends.steps import FIRST, SECOND, Block, Plan, search
from implicitdiff.tolerances import NEARBY

__all__ = ["GradientDifferences", "SecondDerivatives"]

SMALL = 32
"""Up to this order the Hessian is made for the first product."""
LARGE = 2048
"""Beyond, never."""


class _Curved(NamedTuple):
    """Curvatures along directions, and how far they were moved along for them."""

    value: Array
    """D²(step)."""
    error: Array
    step: Array


class SecondDerivatives:
    """Products with H = ∂²f/∂y² and B = ∂²f/∂θ∂y, made of H v and of what ``_crossed`` makes of one vector."""

    dtype: Any
    theta_dtype: Any

    def jvp_y(self, v: Array) -> Array:
        """H v for v of shape (*rhs, *items, n)."""
        raise NotImplementedError

    def _crossed(self, v: Array, by: str, onto: str, dtype: Any) -> Array:
        """vᵀ ∂²f/∂(by)∂(onto) for every right-hand side."""
        raise NotImplementedError

    def hvp(self, v: Array) -> Array:
        """H v."""
        return self.jvp_y(v)

    def vjp_y(self, u: Array) -> Array:
        """H u."""
        return self.jvp_y(u)

    def jvp_theta(self, t: Array) -> Array:
        """B t for t of shape (*rhs, *items, m)."""
        return self._crossed(t, "theta", "y", self.dtype)

    def vjp_theta(self, u: Array) -> Array:
        """Bᵀ u for u of shape (*rhs, *items, n)."""
        return self._crossed(u, "y", "theta", self.theta_dtype)


class GradientDifferences(SecondDerivatives, Differences):
    """Derivatives of ∇_y f for a scalar f of which only values are known.

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> f``, one value per item.
    y, theta : array
        The point.
    """

    def __init__(self, backend: Backend, function: Function, y: Array, theta: Array) -> None:
        super().__init__(backend, function, y, theta)
        self.sampler = self._sampler(SECOND, scalar=True)
        self._along_axes: dict[str, _Curved] = {}

    def value(self) -> Array:
        """∇_y f."""
        if 0 in self.y.shape:
            return 0 * self.backend.astype(self.y, self.dtype)
        slopes = self._sampler(FIRST, scalar=True)
        slopes.adopt(self.sampler)
        return self.backend.astype(gradient(slopes, whole=False), self.dtype)

    # -- products --------------------------------------------------------------------------------------
    def jvp_y(self, v: Array) -> Array:
        """H v for v of shape (*rhs, *items, n)."""
        n, many = self.sampler.n, len(v.shape) > len(self.y.shape)
        if 0 in v.shape:
            return 0 * self.backend.astype(v, self.dtype)
        if not self._block("y").moves:
            return self.xp.zeros(v.shape, dtype=self.dtype, device=self.backend.device(v))
        if "matrix" in self.__dict__ or n <= SMALL or (many and 2 * v.shape[0] >= n and n <= LARGE):
            return self.backend.astype(times(self.matrix, self.backend.to_double(v)), self.dtype)
        return self._crossed(v, "y", "y", self.dtype)

    @cached_property
    def matrix(self) -> Array:
        """H, shape (*items, n, n)."""
        s, xp = self.sampler, self.xp
        axes, rows = self._axes("y"), []

        def shown(x: _Curved) -> Array:
            # what its own error hides is zero: equilibrated, a row of such entries would be a row like others
            return xp.where(xp.abs(x.value) > x.error, x.value, xp.zeros_like(x.value))

        for i in range(s.n):
            along = _Curved(*(x[..., i : i + 1] for x in axes))
            d = xp.zeros_like(s.x)
            d[..., i] = along.step[..., 0]
            row = xp.zeros_like(s.x[..., : s.n])
            row[..., i] = shown(along)[..., 0] / along.step[..., 0] ** 2
            if i + 1 < s.n:
                beside = self._pairs(d, along, "y", i + 1)
                row[..., i + 1 :] = shown(beside) / beside.step / along.step
            rows.append(row)
        upper = xp.stack(rows, axis=-2)
        strict = upper - xp.eye(s.n, dtype=upper.dtype, device=s.backend.device(upper)) * upper
        return upper + xp.matrix_transpose(strict)

    def _crossed(self, v: Array, by: str, onto: str, dtype: Any) -> Array:
        """vᵀ ∂²f/∂(by)∂(onto) for every right-hand side."""
        s, xp = self.sampler, self.xp
        count = s.n if onto == "y" else s.m
        if 0 in v.shape or not count or (by != onto and not self._coupled):
            return xp.zeros((*v.shape[:-1], count), dtype=dtype, device=self.backend.device(v))

        def one(v: Array) -> Array:
            total = xp.zeros((*s.x.shape[:-1], count), dtype=s.x.dtype, device=self.backend.device(v))
            for w, length in groups(xp, self._joint(v, by), s.size):
                along = self._curvature(w, by)
                total = total + self._cross(w * along.step, along, onto, 0) / along.step * length
            return total

        items = tuple(s.x.shape[:-1])
        return self.backend.astype(self.backend.batched(one, items)(self.backend.to_double(v)), dtype)

    def _block(self, by: str) -> Block:
        s = self.sampler
        block = s.by_y if by == "y" else s.by_theta
        if block.moves and not block.visible:
            w = 0.1 * s.whole(by)
            slope = self.xp.abs(s.at(s.x + w) - s.at(s.x - w))
            if not any_true(self.xp, slope <= 100 * s.noise):  # a linear function has no curvature to be seen
                return block._replace(moves=False)
        return super()._block(by)

    # -- curvatures ------------------------------------------------------------------------------------
    @cached_property
    def _coupled(self) -> bool:
        """Whether ∂²f/∂y∂θ is not zero, along one direction without structure in each; raises where noise hides it."""
        s, xp = self.sampler, self.xp
        if not self.theta.shape[-1]:
            return False
        beside = s.x + NEARBY * s.whole("y")
        here = s.at(beside)
        if not any_true(xp, (s.at(beside + 0.1 * s.whole("theta")) != here) | ~xp.isfinite(here)):
            return False  # f does not see θ at all
        u, t = (self._curvature(s.whole(by), by) for by in ("y", "theta"))
        d, e = s.whole("y") * u.step, s.whole("theta") * t.step
        plan = Plan(1 + 0 * u.value, 1 + 0 * u.value, xp.abs(u.value) + xp.abs(t.value), *2 * (s.by_y.tolerance,))
        found = search(xp, s.stencil, lambda a, wanted: s.at(s.x + a * (d + e)), s.middle, s.noise, plan)
        cross, error = xp.abs(found.value - u.value - t.value), found.error + u.error + t.error
        if any_true(xp, ~xp.isfinite(cross)):
            return True  # f is not finite next to the point: others tell
        known = (cross > error) | (error <= s.eps**0.5 * xp.abs(u.value))  # a zero that is known well is one
        if any_true(xp, known) or not any_true(xp, cross != 0):
            return any_true(xp, cross > 0)
        raise s.too_noisy(f"the mixed derivative by y and theta lies below the noise of {s.what}")

    def _curvature(self, w: Array, by: str) -> _Curved:
        s = self.sampler
        found = s.along(w, block=s.by_y if by == "y" else s.by_theta)
        found = self._tell_kink(found, by, None)
        return _Curved(found.value * found.step**2, found.error * found.step**2, found.step)

    def _axes(self, by: str) -> _Curved:
        """Curvatures along the coordinates of y, or of θ; the steps are absolute ones."""
        if by not in self._along_axes:
            s = self.sampler
            start, stop = (0, s.n) if by == "y" else (s.n, s.n + s.m)
            found = sweep(s, s.by_y if by == "y" else s.by_theta, range(start, stop))
            found = self._tell_kink(found, by, int(self.xp.argmax(self.xp.astype(found.kink, s.x.dtype))))
            self._along_axes[by] = _Curved(
                found.value * found.step**2, found.error * found.step**2, found.step * s.size[..., start:stop]
            )
        return self._along_axes[by]

    def _pairs(self, d: Array, along: _Curved, onto: str, first: int) -> _Curved:
        """d ᵀ H e_i for the coordinates from the first on, for steps d and those of the coordinates."""
        s, xp, axes = self.sampler, self.xp, self._axes(onto)
        offset = 0 if onto == "y" else s.n
        value, error, step = (x[..., first:] for x in axes)

        def values(a: Array, wanted: Array) -> Array:
            out = xp.zeros_like(a) + s.middle
            for k in range(a.shape[-1]):
                if any_true(xp, wanted[..., k]):
                    x = s.x + a[..., k : k + 1] * d
                    i = offset + first + k
                    x[..., i] = x[..., i] + a[..., k] * step[..., k]
                    out[..., k] = s.at(x)[..., 0]
            return out

        usual = xp.abs(value) + xp.abs(along.value)
        block = s.by_y
        plan = Plan(1 + 0 * value, 1 + 0 * value, usual, block.tolerance, block.tolerance, separate=True)
        found = search(xp, s.stencil, values, s.middle + 0 * value, s.noise + 0 * value, plan)
        found = self._tell_kink(found, onto, first + int(xp.argmax(xp.astype(found.kink, s.x.dtype))))
        return _Curved((found.value - along.value - value) / 2, (found.error + along.error + error) / 2, step)

    def _cross(self, d: Array, along: _Curved, onto: str, first: int) -> Array:
        found = self._pairs(d, along, onto, first)
        return found.value / found.step
