"""Lent autodiff: exact derivatives for arrays whose library has none, by that of another framework.

A function that calls nothing but operators, methods that all libraries share, and what ``array_namespace(y)`` offers,
runs on the arrays of any framework. So the point is handed over by DLPack, in the same memory where that can be, the
function is made anew on it and derived there, and the products come back as arrays of the library.

Not every function takes another framework's arrays, and one that does may mean something else by the same name
(``y.std()`` divides by n in NumPy and by n − 1 in Torch). So it is tried out first: both have to give the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.conditions.point import Point, VectorFunction
from implicitdiff.errors import BackendError, DerivativeError, DTypeError
from implicitdiff.pytree import map_leaves
from implicitdiff.ravel import Raveler
from implicitdiff.registry import get_backend

__all__ = ["AUTODIFF_SOURCES", "BorrowedAutodiff", "BorrowedDerivatives"]

Function = Callable[[Array, Array], Array]

AUTODIFF_SOURCES = ("torch", "jax")
"""Backends whose autodiff can be lent."""


class BorrowedAutodiff:
    """The autodiff of another framework, for functions made at a point of a borrowing backend.

    Parameters
    ----------
    borrower : Backend
    name : str
        Of the framework that lends.
    """

    def __init__(self, borrower: Any, name: str) -> None:
        self.borrower, self.name = borrower, name
        try:
            self.engine = copy.copy(get_backend(name))
        except ModuleNotFoundError as error:
            raise BackendError(f"autodiff = {name!r}, and there is no {error.name}: install it.") from error
        self.engine.vmap = None  # the functions are the borrower's, and take the leading axis of items themselves

    def differentiate(self, function: Function, y: Array, theta: Array) -> BorrowedDerivatives:
        """Derivatives of a vector function."""
        return self._lent(self.engine.differentiate, function, y, theta)

    def differentiate_gradient(self, function: Function, y: Array, theta: Array) -> BorrowedDerivatives:
        """Derivatives of ∇_y f for a scalar function f."""
        return self._lent(self.engine.differentiate_gradient, function, y, theta)

    def gradients(self, function: Function, y: Array, theta: Array) -> tuple[Array, Array, str]:
        """∂L/∂y, ∂L/∂θ and their kind, for a scalar function L."""
        function = _remade(function)
        with self.working(function, y, theta):
            there = self._handed_over(function, y, theta)
            by_y, by_theta, kind = self.engine.gradients(*there)
            self._check_kind(function, kind)
            return self.back(by_y), self.back(by_theta), kind

    def _lent(self, derive: Callable[..., Any], function: Function, y: Array, theta: Array) -> BorrowedDerivatives:
        function = _remade(function)
        with self.working(function, y, theta):
            found = derive(*self._handed_over(function, y, theta))
            self._check_kind(function, found.kind)
        return BorrowedDerivatives(self, found, function, y, theta)

    def _check_kind(self, function: VectorFunction, kind: str) -> None:
        if kind != "autodiff":
            raise _UnfitError(f"{self.name} could not record it, since it leaves {self.name} on the way")

    # -- the function, there ---------------------------------------------------------------------------
    def _handed_over(self, function: VectorFunction, y: Array, theta: Array) -> tuple[Any, Array, Array]:
        """Return the function made anew on the arrays of the other framework, and the vectors there."""
        point = self._point(function.point, y, theta)
        there = function.on(point)
        self._compare(function, there, y, theta)
        return there, point.y.vector, point.theta.vector

    def _point(self, here: Point, y: Array, theta: Array) -> Point:
        y_raveler, theta_raveler = (
            Raveler(self.engine, map_leaves(self.over, raveler.unravel(vector)), raveler.name, bool(here.items))
            for raveler, vector in ((here.y, y), (here.theta, theta))
        )
        return Point(self.engine, y_raveler, theta_raveler, map_leaves(self.over, here.args), here.mapped)

    def _compare(self, here: VectorFunction, there: Any, y: Array, theta: Array) -> None:
        """Raise where the function gives other numbers there."""
        xp = self.borrower.xp
        # not at y itself, where F is zero and only rounding could be compared
        y = self.borrower.space(y).nearby(y)
        mine, lent = here(y, theta), self.back(there(self.over(y), self.over(theta)))
        gap, size = xp.abs(mine - lent), xp.max(xp.abs(mine)) if 0 not in mine.shape else 0.0
        same = (
            (gap <= float(xp.finfo(mine.dtype).eps) ** 0.5 * size) | (xp.isnan(mine) & xp.isnan(lent)) | (mine == lent)
        )
        if not bool(xp.all(same)):
            raise _UnfitError(f"on the arrays of {self.name} it gives other numbers")

    # -- arrays ----------------------------------------------------------------------------------------
    def over(self, leaf: Any) -> Any:
        """Hand an array over, in the same memory where it can be; anything else as it is."""
        if not self.borrower.is_array(leaf):
            return leaf
        if type(leaf).__module__ == "numpy" and not hasattr(leaf, "__dlpack__"):
            return leaf.item()  # a NumPy scalar
        return self._same_dtype(leaf, self._shared(_plain(leaf)))

    def _shared(self, array: Array) -> Array:
        try:
            return self.engine.xp.from_dlpack(array)
        except Exception:  # a layout that the other does not take: each has its own type for that
            return self.engine.xp.from_dlpack(array.copy())

    def _same_dtype(self, array: Array, found: Array) -> Array:
        kept, given = str(found.dtype).rpartition(".")[2], str(array.dtype)
        if kept != given:
            advice = "\nNext: jax.config.update('jax_enable_x64', True) at the start of your program, or float32 data."
            raise DTypeError(
                f"autodiff = {self.name!r}: an array of {given} would become {kept}."
                f"{advice if self.name == 'jax' else ''}"
            )
        return found

    def back(self, x: Array) -> Array:
        """Take an array back."""
        return self.borrower.xp.from_dlpack(x)

    # -- errors ----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def working(self, function: VectorFunction, y: Array, theta: Array) -> Iterator[None]:
        """Compute as the other framework does; tell a function that does not take its arrays from one that is wrong."""
        try:
            with self.engine.computing():
                yield
        except DTypeError:
            raise
        except Exception as error:
            function(y, theta)  # an error that has nothing to do with lending comes back here
            why = (
                str(error) if isinstance(error, _UnfitError) else f"{type(error).__name__}: {error}".partition("\n")[0]
            )
            raise DerivativeError(
                f"{function.name} cannot be derived by {self.name}: {why[:300]}.\n"
                "Likely cause: it calls one library by name, or uses data that is not handed to it.\n"
                "Next: write it over array_api_compat.array_namespace(y), with data in args; or choose another mode."
            ) from error


def _remade(function: Function) -> VectorFunction:
    """Return a function that can be made anew in another framework."""
    if not isinstance(function, VectorFunction):
        raise DerivativeError("this condition is not one function of the user's, and its autodiff cannot be lent.")
    return function


class _UnfitError(Exception):
    """The function ran on the arrays of the other framework, and not as it should."""


class BorrowedDerivatives:
    """Derivatives of a vector function that another framework made.

    Parameters
    ----------
    source : BorrowedAutodiff
    found : Derivatives
        The other framework's.
    function : Flat
        Of the borrower.
    y, theta : array
        The point, in the borrower's arrays.
    """

    kind = "autodiff"

    def __init__(self, source: BorrowedAutodiff, found: Any, function: VectorFunction, y: Array, theta: Array) -> None:
        self._source, self._found, self._at = source, found, (function, y, theta)
        self.accuracy = found.accuracy

    def _product(self, name: str, *vectors: Array) -> Array:
        source = self._source
        with source.working(*self._at):
            return source.back(getattr(self._found, name)(*map(source.over, vectors)))

    def value(self) -> Array:
        """G(y, θ)."""
        return self._product("value")

    def jvp_y(self, v: Array) -> Array:
        """(∂G/∂y) v."""
        return self._product("jvp_y", v)

    def vjp_y(self, u: Array) -> Array:
        """(∂G/∂y)ᵀ u."""
        return self._product("vjp_y", u)

    def hvp(self, v: Array) -> Array:
        """(∂G/∂y) v for a symmetric ∂G/∂y."""
        return self._product("hvp", v)

    def jvp_theta(self, t: Array) -> Array:
        """(∂G/∂θ) t."""
        return self._product("jvp_theta", t)

    def vjp_theta(self, u: Array) -> Array:
        """(∂G/∂θ)ᵀ u."""
        return self._product("vjp_theta", u)


def _plain(array: Array) -> Array:
    """Return an array that can be handed over: read-only memory and negative strides cannot."""
    flags = getattr(array, "flags", None)
    if getattr(flags, "writeable", True) and all(step >= 0 for step in array.strides):
        return array
    return array.copy()
