"""The constraints of a condition: functions of y and θ, with what is given of their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array
from implicitdiff.errors import CallbackError
from implicitdiff.namespaces import namespace, without
from implicitdiff.pytree import flatten

if TYPE_CHECKING:
    from implicitdiff.conditions.point import Point

__all__ = ["Constraint", "Function", "paired", "weighted"]

Function = Callable[[Array, Array], Array]
"""Of two vectors, (*items, n) and (*items, m)."""


@dataclass(frozen=True, eq=False)
class Constraint:
    """Constraints of one kind, c(y, θ) = 0 or c(y, θ) <= 0.

    Parameters
    ----------
    kind : {"eq", "ineq"}
    name : str
        What the user knows c under; its derivatives are ``name_jacobian`` and ``name_hessian``.
    fun : callable
        ``c(y, theta, *args)``: a tree of arrays.
    jacobian : callable, optional
        ``∂c/∂y`` as ``jacobian(y, theta, *args)``.
    hessian : callable, optional
        ``Σ z_i ∂²c_i/∂y²`` as ``hessian(y, theta, z, *args)``.
    linear : bool
        Whether c is affine in y, and has no θ in it.
    """

    kind: str
    name: str
    fun: Callable[..., Any]
    jacobian: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    linear: bool = False

    def at(self, point: Point) -> list[Constraint]:
        """Return the constraints that it is at a point."""
        return [self]

    @property
    def given(self) -> tuple[Callable[..., Any], ...]:
        """Derivatives that are given."""
        return tuple(g for g in (self.jacobian, self.hessian) if g is not None)

    def values(self, y: Any, theta: Any, *args: Any) -> Any:
        """c of the user's trees; zero in place of −inf, an infinite bound: its multiplier is 0, and the product is."""
        tree = flatten(self.fun(y, theta, *args))
        return tree.unflatten(
            [without(namespace(x), x, -math.inf, 0.0) if hasattr(x, "dtype") else x for x in tree.leaves]
        )

    def rows(self, point: Point, k: int) -> Function | None:
        """Return the given ∂c/∂y as a function of vectors; None where it is not given.

        Its values are arrays (*items, k, n), on NumPy also SciPy sparse matrices (k, n).
        """
        if self.jacobian is None:
            return None
        given, name = point.matrix_function(self.jacobian, f"{self.name}_jacobian"), f"{self.name}_jacobian"
        return lambda y, theta: _rows(point, given(y, theta), name, k, y.dtype == point.y.dtype)


def _rows(point: Point, found: Any, name: str, k: int, native: bool) -> Array:
    """Return what a function for a Jacobian returned as a matrix of the vector of y, (*items, k, n).

    ``native`` says that y is of its own dtype, and no complex step.
    """
    backend, items, n = point.backend, point.items, point.y.n
    leaves = flatten(found).leaves
    lengths = [leaf.size for leaf in point.y.leaves] if len(leaves) > 1 else [n]
    if any(hasattr(leaf, "tocsr") for leaf in leaves):
        return _sparse_rows(point, leaves, name, k, lengths)
    parts = []
    for leaf, length in zip(leaves, lengths, strict=False):
        array = backend.as_array(leaf, point.y.device, point.y.dtype)
        shape = None if array is None else tuple(array.shape)
        own = () if shape is None else shape[len(items) :]
        turned = len(own) == 2 and own not in {(k, length), point.y.leaves[0].shape}
        if shape is None or shape[: len(items)] != items or math.prod(own) != k * length or turned:
            got = type(leaf).__name__ if shape is None else f"an array of shape {shape}"
            raise CallbackError(f"{name} returned {got}.\nExpected a matrix of shape {(*items, k, length)}.")
        parts.append(backend.reshape(array, (*items, k, length)))
    if len(leaves) != len(lengths):
        raise CallbackError(f"{name} returned {len(leaves)} arrays.\nExpected a matrix, or one for each leaf of y.")
    rows = parts[0] if len(parts) == 1 else backend.concat(parts)
    point.y.check_placed(rows, name, point.y.dtype if native else None)
    return rows


def _sparse_rows(point: Point, leaves: list[Any], name: str, k: int, lengths: list[int]) -> Any:
    """Sparse matrices of the leaves of y, side by side."""
    import scipy.sparse

    if point.backend.name != "numpy" or point.items:
        what = "a batch is given" if point.items else f"y is an array of {point.backend.name}"
        raise CallbackError(f"{name} returned a SciPy matrix, and {what}: return an array.")
    expected = [(k, length) for length in lengths]
    if [tuple(leaf.shape) for leaf in leaves] != expected:
        got = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise CallbackError(f"{name} returned shape {got}.\nExpected {', '.join(map(str, expected))}.")
    if len(leaves) == 1:
        return scipy.sparse.csr_array(leaves[0])
    return scipy.sparse.hstack([scipy.sparse.csr_array(leaf) for leaf in leaves], format="csr")


def weighted(rows: Any, z: Array) -> Array:
    """Jᵀz for rows (*items, k, n), also where they are being traced or recorded."""
    if hasattr(rows, "tocsr"):
        found: Array = rows.T @ z
        return found
    return namespace(rows, z).sum(rows * z[..., None], axis=-2)


def paired(values: Array, z: Array) -> Array:
    """zᵀc for (*items, k), likewise."""
    return namespace(values, z).sum(values * z, axis=-1)
