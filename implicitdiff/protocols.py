"""The backend protocol: what the array standard lacks, and nothing else.

All functions here see flat vectors of shape (*items, n), where ``items`` is ``()`` or ``(number of items,)``; products
take vectors with one more leading axis of right-hand sides. Arithmetic goes through ``xp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from implicitdiff.arrays import Array

__all__ = ["Backend", "Derivatives"]


class Derivatives(Protocol):
    """The derivatives of a vector function G(y, θ) at one point."""

    kind: str
    """``"autodiff"``, ``"complex step"`` or ``"finite differences"``."""

    accuracy: float
    """Relative error of a product, beyond rounding: 0 for exact derivatives."""

    def value(self) -> Array:
        """G(y, θ)."""

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v."""

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u."""

    def hvp(self, v: Array) -> Array:
        """(∂G/∂y) v for a symmetric ∂G/∂y: the cheaper of the two products."""

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""


class Backend(Protocol):
    """One framework."""

    name: str
    traced: bool
    """Whether values are never seen, only their shapes: nothing can be branched on, raised or warned about."""
    xp: Any
    """The array namespace, from array-api-compat."""

    # -- arrays at the border ------------------------------------------------------------------------
    def as_leaf(self, leaf: Any, where: str) -> Array:
        """A leaf of the user's tree as an array of the framework; raises for a wrong type or dtype."""

    def is_array(self, x: Any) -> bool:
        """Whether it is an array of this framework."""

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        """What a callback returned as an array; None where it is none."""

    def common_dtype(self, dtypes: Sequence[Any]) -> Any:
        """Dtype of the vector that holds leaves of these dtypes."""

    def common_device(self, arrays: Sequence[Array], name: str) -> Any:
        """Device of the arrays; raises where there are several."""

    def device(self, x: Array) -> Any:
        """Device of an array."""

    def number(self, x: Array) -> Any:
        """Return a 0-d array as the framework's scalar, for leaves that came as Python floats."""

    def guard(self, x: Array) -> Array:
        """Return what a callback may see of our own memory: read-only, where the framework can say so."""

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Reshape, also of a value that is being traced."""

    def concat(self, parts: Sequence[Array]) -> Array:
        """Concatenate along the last axis, also values that are being traced."""

    def astype(self, x: Array, dtype: Any) -> Array:
        """Cast, also a value that is being traced."""

    # -- the user's functions ------------------------------------------------------------------------
    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which everything of ours is computed: no warnings, no recording of derivatives."""

    def callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a user's function as it is to be called from within that context."""

    vmap: Callable[[Callable[..., Array]], Callable[..., Array]] | None
    """Turns a function of arrays into one over a leading axis of all of them; None where the framework cannot."""

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[[Array, Array], Array], y: Array, theta: Array) -> Derivatives:
        """Derivatives of a vector function."""

    def differentiate_gradient(self, function: Callable[[Array, Array], Array], y: Array, theta: Array) -> Derivatives:
        """Derivatives of ∇_y f for a scalar function f (one scalar per item)."""

    def gradients(self, function: Callable[[Array, Array], Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        """∂L/∂y, ∂L/∂θ and their kind, for a scalar function L (one scalar per item)."""

    def check_dependence(self, function: Callable[[Array], Array], theta: Array) -> None:
        """Raise for an F that does not use θ, where nothing could be told once a result is there."""

    def combined(self, maps: Any, y: Array, theta: Array) -> Any:
        """Return the maps of the whole problem, where this process holds a part of it."""

    # -- loops and linear algebra ----------------------------------------------------------------------
    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        """Let a function of (*items, n) take (k, *items, n), too."""

    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        """``while cond(state): state = body(state)``.

        ``limit`` is the most bodies that may run. Where it is given, a body that runs after the condition has become
        false does no harm, and the condition may be looked at now and then only.
        """

    def rescue(self, wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
        """``function(value)`` where any of the mask holds, else ``value``: work that is seldom needed."""

    def synchronize(self, tree: Any) -> None:
        """Wait until a result is there."""

    def peak_memory(self, function: Callable[[], Any]) -> int | None:
        """Run a function, and return the most bytes that it held at once; None where that cannot be seen."""

    def linear(self, prepared: Any, b: Any, x0: Any, transposed: bool) -> Any:
        """``prepared.solve``, differentiable where the framework is tracing."""

    def local(self, y: Any, theta: Any) -> bool:
        """Whether y and theta are here as a whole, with numbers to look at."""

    def look_at(self, x: Array) -> Array:
        """Return an array in whose library a few operations, each done once, cost little."""

    def put_back(self, x: Array) -> Array:
        """Return such an array as one of the framework."""

    def detached(self, x: Array) -> Array:
        """Return an array through which nothing is differentiated."""

    def trees(self, y: Any, theta: Any) -> bool:
        """Whether products alone may work on the leaves of the trees, so that nothing is concatenated."""

    def is_vector(self, tree: Any) -> bool:
        """Whether a tree is a bare array of one axis, and a vector as it is."""

    def space(self, x: Array) -> Any:
        """Return the space of a vector, in which the iterative solvers work."""

    def widen(self, x: Array) -> Array:
        """Return the array in double precision, where the framework has it."""

    def lu_factor(self, matrix: Array) -> Any:
        """LU factors of (*items, n, n)."""

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        """Solve with columns b, shape (*items, n, k)."""

    def has_ldl(self, matrix: Array) -> bool:
        """Whether `ldl_factor` of such a matrix is an LDLᵀ factorisation, and not LU in its place."""

    def ldl_factor(self, matrix: Array) -> Any:
        """LDLᵀ factors of symmetric (*items, n, n)."""

    def ldl_solve(self, factor: Any, b: Array) -> Array:
        """Solve with columns b, shape (*items, n, k)."""

    composable: bool
    """Whether what is computed may be differentiated again."""

    def cho_factor(self, matrix: Array) -> Array:
        """Lower Cholesky factors; NaN in the items that are not positive definite."""

    def cho_solve(self, factor: Array, b: Array) -> Array:
        """Solve with columns b, shape (*items, n, k)."""
