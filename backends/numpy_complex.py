"""The complex step: derivatives of analytic functions of plain NumPy, exact to rounding.

References
----------
W. Squire, G. Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Rev. 40 (1998)
110-112. DOI 10.1137/S003614459631241X
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from implicitdiff.arrays import Array, probe_vector, times
from implicitdiff.arrays import numpy_namespace as xp
from implicitdiff.backends.base import Backend
from implicitdiff.backends.curvature import SecondDerivatives
from implicitdiff.backends.differences import name_of, not_differentiable, sweep, unit_vectors
from implicitdiff.backends.sampling import Sampler, leaf_sizes, sizes_of
from implicitdiff.tolerances import AGREES, COMPLEX_STEP, NEARBY

__all__ = ["ComplexGradientDifferences", "ComplexStep", "complex_gradients", "is_analytic"]

Function = Callable[[Array, Array], Array]


def complex_step(function: Callable[[Array], Array], x: Array, v: Array, size: Array) -> Array:
    """Im f(x + i h v) / h, per item over the last axis: no cancellation, so h may be tiny."""
    largest = np.max(np.abs(v) / size, axis=-1, keepdims=True, initial=0.0)
    h = COMPLEX_STEP / np.where(largest > 0, largest, 1.0)
    out = np.imag(function(x + 1j * h * v))
    return out / (h if out.ndim == x.ndim else h[..., 0])


class ComplexStep:
    """Derivatives of a vector function G(y, θ).

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> G``.
    y, theta : array
    """

    kind = "complex step"

    def __init__(self, backend: Backend, function: Function, y: Array, theta: Array) -> None:
        self.backend, self.function = backend, function
        self.y, self.theta = backend.to_double(y), backend.to_double(theta)
        self.dtype, self.theta_dtype = y.dtype, theta.dtype
        self.accuracy = float(np.finfo(np.float64).eps)

    def value(self) -> Array:
        """G(y, θ)."""
        return self.backend.astype(np.asarray(self.function(self.y, self.theta)), self.dtype)

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v."""
        return self._forward(lambda y: self.function(y, self.theta), self.y, v)

    hvp = jvp_y

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        return self._forward(lambda theta: self.function(self.y, theta), self.theta, t)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u, one pass over the coordinates for all right-hand sides."""
        return self._backward(lambda y: self.function(y, self.theta), self.y, u, self.dtype)

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u, likewise."""
        return self._backward(lambda theta: self.function(self.y, theta), self.theta, u, self.theta_dtype)

    def _forward(self, function: Callable[[Array], Array], x: Array, v: Array) -> Array:
        size = sizes_of(np, x, (x.shape[-1],))[0]
        many = self.backend.batched(lambda w: complex_step(function, x, w, size), tuple(x.shape[:-1]))
        return self.backend.astype(many(self.backend.to_double(v)), self.dtype)

    def _backward(self, function: Callable[[Array], Array], x: Array, u: Array, dtype: Any) -> Array:
        u, size = self.backend.to_double(u), sizes_of(np, x, (x.shape[-1],))[0]
        columns = (complex_step(function, x, unit, size) for unit in unit_vectors(np, x))
        parts = [np.vecdot(np.broadcast_to(column, u.shape), u) for column in columns]
        return self.backend.astype(np.stack(parts, axis=-1) if parts else np.zeros((*u.shape[:-1], 0)), dtype)


class ComplexGradientDifferences(SecondDerivatives):
    """Derivatives of ∇_y f for an analytic scalar f: differences of its slopes, which are exact.

    The slope along w, φ = ∂f·w, costs one value of f, and wᵀ ∂²f e_i four: two differences of φ along e_i.

    Parameters
    ----------
    backend : Backend
    function : callable
        ``(y, theta) -> f``, one value per item.
    y, theta : array
        The point.
    """

    kind = "finite differences"

    def __init__(self, backend: Backend, function: Function, y: Array, theta: Array) -> None:
        self.backend, self.function = backend, function
        self.y, self.theta = backend.to_double(y), backend.to_double(theta)
        self.dtype, self.theta_dtype = y.dtype, theta.dtype
        self.leaves = leaf_sizes(function, "y", y.shape[-1]), leaf_sizes(function, "theta", theta.shape[-1])
        self.sizes = [sizes_of(np, x, n)[0] for x, n in zip((self.y, self.theta), self.leaves, strict=True)]

    @cached_property
    def accuracy(self) -> float:
        """Relative error of a product with the Hessian."""
        if 0 in self.y.shape:
            return 0.0
        slope = self._slope(self.sizes[0] * probe_vector(xp, self.y.shape[-1], self.y.dtype, None), "y")
        return max(slope.accuracy(slope.by_y), slope.eps**slope.stencil.accuracy)

    def value(self) -> Array:
        """∇_y f."""
        units = unit_vectors(np, self.y)
        parts = [complex_step(lambda z: self.function(z, self.theta), self.y, e, self.sizes[0]) for e in units]
        return self.backend.astype(np.stack(parts, axis=-1) if parts else 0 * self.y, self.dtype)

    def jvp_y(self, v: Array) -> Array:
        """H v for v of shape (*rhs, *items, n)."""
        n, many = self.y.shape[-1], v.ndim > self.y.ndim
        if "matrix" in self.__dict__ or (many and 2 * v.shape[0] >= n and 0 not in v.shape):
            return self.backend.astype(times(self.matrix, self.backend.to_double(v)), self.dtype)
        return self._crossed(v, "y", "y", self.dtype)

    @cached_property
    def matrix(self) -> Array:
        """H, shape (*items, n, n)."""
        upper = np.zeros((*self.y.shape, self.y.shape[-1]))
        for i, unit in enumerate(unit_vectors(np, self.y)):
            upper[..., i, i:] = self._cross(unit, "y", "y", i)
        return upper + np.matrix_transpose(np.triu(upper, 1))

    def _slope(self, w: Array, by: str) -> Sampler:
        """∂f·w, by y or by θ, as a function."""

        def slope(y: Array, theta: Array) -> Array:
            if by == "y":
                return complex_step(lambda z: self.function(z, theta), y, w, self.sizes[0])
            return complex_step(lambda z: self.function(y, z), theta, w, self.sizes[1])

        what = f"the gradient of {name_of(self.function)}"
        return Sampler(self.backend, slope, self.y, self.theta, leaves=self.leaves, scalar=True, what=what)

    def _cross(self, w: Array, by: str, onto: str, first: int) -> Array:
        """wᵀ ∂²f/∂(by)∂(onto), for the entries from the first on."""
        slope = self._slope(w, by)
        block = slope.by_y if onto == "y" else slope.by_theta
        count, start = (slope.n, 0) if onto == "y" else (slope.m, slope.n)
        here = range(start + first, start + count)
        if not block.moves:
            return np.zeros((*self.y.shape[:-1], count - first))
        found = sweep(slope, block, here)
        value = found.value
        if np.any(found.kink):
            if value.ndim == 1:
                raise not_differentiable(slope, onto, first + int(np.argmax(found.kink)))
            value = np.where(found.kink, np.nan, value)
        return value / slope.size[..., here.start : here.stop]

    def _crossed(self, v: Array, by: str, onto: str, dtype: Any) -> Array:
        count = self.y.shape[-1] if onto == "y" else self.theta.shape[-1]
        if 0 in v.shape or not count:
            return np.zeros((*v.shape[:-1], count), dtype=dtype)

        def one(w: Array) -> Array:
            largest = np.max(np.abs(w), axis=-1, keepdims=True)
            safe = np.where(largest > 0, largest, 1.0)
            return self._cross(w / safe, by, onto, 0) * largest

        many = self.backend.batched(one, tuple(self.y.shape[:-1]))
        return self.backend.astype(many(self.backend.to_double(v)), dtype)


def complex_gradients(backend: Backend, function: Function, y: Array, theta: Array) -> tuple[Array, Array, str]:
    """∂L/∂y and ∂L/∂θ of an analytic scalar function."""
    by_y = ComplexGradientDifferences(backend, function, y, theta).value()
    by_theta = ComplexGradientDifferences(backend, lambda t, z: function(z, t), theta, y).value()
    return by_y, by_theta, "complex step"


_casting = threading.RLock()


@contextlib.contextmanager
def quiet_casts() -> Iterator[None]:
    """Silence NumPy's warning about a discarded imaginary part: such a function fails the test, and that is all."""
    with _casting, warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        yield


def is_analytic(backend: Backend, function: Function, y: Array, theta: Array, *, scalar: bool = False) -> bool:
    """Whether the complex step gives what a central difference gives, in one direction of y and one of θ.

    They are compared component by component, each within the error of its difference. Anything but agreement (an
    exception, a discarded imaginary part, another number) says no, and so does a kink. A scalar function is looked at
    a little beside the point, where its gradient does not vanish.
    """
    leaves = leaf_sizes(function, "y", y.shape[-1]), leaf_sizes(function, "theta", theta.shape[-1])
    y, theta = backend.to_double(y), backend.to_double(theta)
    if scalar:
        y, theta = (_beside(x, of) for x, of in zip((y, theta), leaves, strict=True))
    sampler = Sampler(backend, function, y, theta, leaves=leaves, scalar=scalar)
    if 0 in y.shape or sampler.noise is None or sampler.random:
        return 0 in y.shape
    return all(_agrees(sampler, function, by) for by, x in (("y", y), ("theta", theta)) if 0 not in x.shape)


def _beside(x: Array, leaves: tuple[int, ...]) -> Array:
    size, _, unknown = sizes_of(np, x, leaves)
    return x + np.where(unknown, 0.0, NEARBY * size * probe_vector(xp, x.shape[-1], x.dtype, None))


def _agrees(sampler: Sampler, function: Function, by: str) -> bool:
    """Whether both derivatives along one direction are the same."""
    w, n = sampler.whole(by), sampler.n
    try:
        with quiet_casts():
            found = complex_step(
                lambda z: function(z[..., :n] if by == "y" else sampler.x[..., :n], z[..., n:] if by != "y" else
                sampler.x[..., n:]), sampler.x, w, sampler.size)  # fmt: skip
    except Exception:
        return False
    found = found if found.ndim == sampler.middle.ndim else found[..., None]
    known = sampler.along(w)
    gap = np.abs(found - known.value)
    rows = np.where(np.isfinite(known.value), np.abs(known.value), 0.0)
    return not np.any(known.kink) and bool(np.all(gap <= 10 * known.error + AGREES * rows))
