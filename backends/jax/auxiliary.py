"""Tangents of what a solver returns beside its solution: numbers whose derivative nobody knows.

Zero would be a silent mistake where a loss uses them: the derivative of y + aux would lack a term. So a tangent of aux
is NaN; in reverse a cotangent of zero is passed over, since then nothing used them, and any other is told.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from implicitdiff.errors import DerivativeError

__all__ = ["unknown_tangent"]


def unknown_tangent(tangent: Any, aux: Any) -> Any:
    """Return the tangent of aux, as a linear function of that of theta, shaped like aux."""
    seed = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tangent) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    def of_leaf(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, dtype=jax.dtypes.float0)
        return jnp.broadcast_to(_unknown.bind(jnp.asarray(seed, dtype=leaf.dtype)), leaf.shape)

    return jax.tree.map(of_leaf, aux)


_unknown = Primitive("implicitdiff_unknown")


def _value(x: Any) -> Any:
    return x * jnp.nan


def _transposed(cotangent: Any, _: Any) -> list[Any]:
    if not isinstance(cotangent, (ad.Zero, jax.core.Tracer)) and bool(jnp.any(cotangent != 0)):
        raise DerivativeError(
            "a derivative of aux, which the solver returns beside y, is asked for, and is not known.\n"
            "Likely cause: the loss uses it. A term of the derivative would be missing.\n"
            "Next: has_aux=function, for an aux that is a function (y, theta, *args); or jax.lax.stop_gradient."
        )
    found = ad.instantiate_zeros(cotangent)
    return [jnp.where(found == 0, jnp.zeros_like(found), jnp.full_like(found, jnp.nan))]


_unknown.def_impl(_value)
_unknown.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_unknown] = lambda primals, tangents: (
    _unknown.bind(*primals), _unknown.bind(*map(ad.instantiate_zeros, tangents))
)  # fmt: skip
ad.primitive_transposes[_unknown] = _transposed
batching.primitive_batchers[_unknown] = lambda leaves, axes: (_unknown.bind(*leaves), axes[0])
mlir.register_lowering(_unknown, mlir.lower_fun(_value, multiple_results=False))
