"""Products with the derivatives of a function, by JAX's own transformations.

A function with a ``custom_vjp`` inside has no forward mode. Its forward product is the transpose of the reverse one,
u -> Jᵀ u, which is linear in u; where JAX cannot transpose the user's rule, the rows of J are made by it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from implicitdiff.backends.base import Backend
from implicitdiff.backends.jax.varying import varying
from implicitdiff.errors import DerivativeError
from implicitdiff.linalg.vector_space import is_tree_vector

__all__ = ["Derivatives"]

Product = Callable[[Any], Any]


class Derivatives:
    """Derivatives of a vector function at one point.

    A product is derived where it is asked for, not where it is first applied: that may be inside of a loop.
    """

    kind = "autodiff"
    accuracy = 0.0

    def __init__(
        self, backend: Backend, function: Callable[..., Any], y: Any, theta: Any, *, whole: bool = True
    ) -> None:
        self._backend, self._function, self._y, self._theta, self._whole = backend, function, y, theta, whole
        self._items = () if is_tree_vector(y) else tuple(y.shape[:-1])

    def _of_y(self, y: Any) -> Any:
        return self._function(y, self._theta)

    def _of_theta(self, theta: Any) -> Any:
        return self._function(self._y, theta)

    @cached_property
    def _by_y(self) -> tuple[Any, Product]:
        return jax.linearize(self._of_y, self._y)

    def value(self) -> Any:
        """G(y, θ)."""
        return self._by_y[0]

    @cached_property
    def _pushes_y(self) -> bool:
        return _pushes(self._by_y[1], self._y)

    @cached_property
    def jvp_y(self) -> Product:
        """(∂G/∂y) v."""
        push = self._by_y[1] if self._pushes_y else _transposed(self._of_y, self._y, self._items)
        return self._product(push, self._y)

    @property
    def hvp(self) -> Product:
        """(∂G/∂y) v for a symmetric ∂G/∂y: a Hessian is linearised once, forward over reverse where there is both."""
        return self.jvp_y if self._pushes_y else self.vjp_y

    @cached_property
    def vjp_y(self) -> Product:
        """(∂G/∂y)ᵀ u."""
        return self._pullback(self._of_y, self._y)

    @cached_property
    def jvp_theta(self) -> Product:
        """(∂G/∂θ) t."""
        self._check_dependence()
        push = jax.linearize(self._of_theta, self._theta)[1]
        if not _pushes(push, self._theta):
            push = _transposed(self._of_theta, self._theta, self._items)
        return self._product(push, self._theta)

    @cached_property
    def vjp_theta(self) -> Product:
        """(∂G/∂θ)ᵀ u."""
        self._check_dependence()
        return self._pullback(self._of_theta, self._theta)

    def _check_dependence(self) -> None:
        if self._whole:
            self._backend.check_dependence(self._of_theta, self._theta)

    def _pullback(self, function: Callable[[Any], Any], x: Any) -> Product:
        value, pull = jax.vjp(function, x)
        return self._product(lambda u: pull(u)[0], value)

    def _product(self, linear: Product, like: Any) -> Product:
        """Return a linear map of one vector as one of many, of vectors that vary over devices as ``like`` does."""
        return self._backend.batched(lambda v: linear(varying(v, like)), self._items)


def _pushes(push: Product, x: Any) -> bool:
    """Whether there is a product in forward mode: of a ``custom_vjp`` it is a placeholder, which cannot be compiled."""
    try:
        return not _has_placeholder(jax.make_jaxpr(push)(x).jaxpr)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False


def _has_placeholder(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_lin":
            return True
        if any(map(_has_placeholder, _inner(equation.params.values()))):
            return True
    return False


def _inner(values: Any) -> list[Any]:
    """Programs among the parameters of an equation."""
    flat = [part for value in values for part in (value if isinstance(value, (tuple, list)) else (value,))]
    found = [getattr(value, "jaxpr", value) for value in flat]
    return [value for value in found if hasattr(value, "eqns")]


def _transposed(function: Callable[[Any], Any], x: Any, items: tuple[int, ...]) -> Product:
    """Forward product of a function that has only the reverse one."""
    value, pull = jax.vjp(function, x)

    def reverse(u: Any) -> Any:
        return pull(u)[0]

    try:
        push = jax.linear_transpose(reverse, value)
        jax.eval_shape(push, x)
    except (TypeError, NotImplementedError, ValueError, AssertionError) as error:  # whatever the rule is made of
        if is_tree_vector(value):
            raise DerivativeError(
                "a function with a custom_vjp has no derivative in forward mode, and its rule cannot be transposed.\n"
                "Next: give the product (jvp, hvp or mixed_jvp), or use jax.custom_jvp in place of custom_vjp."
            ) from error
        return _by_rows(reverse, value, items)
    return lambda v: push(v)[0]


def _by_rows(reverse: Product, value: Any, items: tuple[int, ...]) -> Product:
    """J v with the rows of J, the reverse products of unit vectors, made at once."""
    n = value.shape[-1]
    unit = jnp.reshape(jnp.eye(n, dtype=value.dtype), (n, *(1,) * len(items), n))
    rows = jax.vmap(reverse)(varying(jnp.broadcast_to(unit, (n, *value.shape)), value))
    return lambda v: jnp.moveaxis(jnp.sum(rows * v, axis=-1), 0, -1)


@jax.custom_jvp
def without_derivative(x: Any) -> Any:
    """Return x, whose derivative is NaN: there is none that is known, and zero would be wrong."""
    return x


@without_derivative.defjvp
def _not_known(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return primals[0], tangents[0] * jnp.nan
