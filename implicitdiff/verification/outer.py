"""Whether an outer loss uses, beside its arguments, the very y or θ that it is asked about.

Of L(y, θ) the derivatives are those by its arguments: what comes in by a closure is a constant to it, and a term of
dL/dθ is lost. To see y tells nothing yet (its shape may be what is used). So y is put in its place as a variable c: L
with y and θ fixed has to have no derivative by c.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.arrays import any_true, around
from implicitdiff.closures import sees, swapped
from implicitdiff.errors import DerivativeError
from implicitdiff.pytree import flatten

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["check_outer", "uses"]

LIMIT = 100
"""Values that are looked at, from the nearest on: it is done at every call."""


def check_outer(outer: Any, backend: Backend, y: Any, theta: Any, point: Callable[[], Any] | None) -> None:
    """Raise where a loss uses y or θ of the enclosing scope.

    Parameters
    ----------
    outer : callable or pytree
    backend : Backend
    y, theta : pytree
        As the user gave them.
    point : callable, optional
        Makes the `Point`; None where no numbers can be looked at: there to be seen is enough.
    """
    if not callable(outer):
        return
    known = _Known(backend, {"y": y, "theta": theta})
    sees((outer,), known.is_array, known.look, LIMIT)
    for name in sorted(known.seen, reverse=True):
        if point is None or _counts(outer, name, known, point()):
            raise DerivativeError(
                f"outer uses {name} from the enclosing scope, beside its argument: a term of dL/dtheta is lost.\n"
                "Likely cause: a name that stands for the solution or the parameters outside of outer, too.\n"
                "Next: write it as outer(y, theta) and use those. What is to be a constant: give outer a copy of it."
            )


def uses(function: Any, backend: Backend, **trees: Any) -> set[str]:
    """Return the names of the trees of which a function sees a leaf beside its arguments."""
    known = _Known(backend, trees)
    sees((function,), known.is_array, known.look, LIMIT)
    return known.seen


class _Known:
    """The leaves of y and theta, to be known again by another name and in another shape.

    Parameters
    ----------
    backend : Backend
    trees : dict

    Attributes
    ----------
    seen : set of str
        Names of the trees of which a leaf was met.
    """

    def __init__(self, backend: Backend, trees: dict[str, Any]) -> None:
        self.backend, self.seen = backend, set[str]()
        leaves = [(leaf, (name, i)) for name, tree in trees.items() for i, leaf in enumerate(flatten(tree).leaves)]
        self._leaves = [(leaf, place) for leaf, place in reversed(leaves) if self.is_array(leaf)]

    def is_array(self, x: Any) -> bool:
        return self.backend.is_array(x) or isinstance(x, np.ndarray)

    @functools.cached_property
    def _places(self) -> dict[Any, tuple[str, int]]:
        """By identity, and by address: of one memory in both trees, the place in the first."""
        places = {self.backend.address(leaf): place for leaf, place in self._leaves}
        return {**places, **{id(leaf): place for leaf, place in self._leaves}}

    def find(self, x: Any) -> tuple[str, int] | None:
        """Which leaf an array is: the name of its tree, and its number there."""
        found = self._places.get(id(x))
        if found is None and (where := self.backend.address(x)) is not None:
            found = self._places.get(where)
        return found

    def look(self, x: Any) -> bool:
        """Take note of an array that is met."""
        found = self.find(x)
        if found is not None:
            self.seen.add(found[0])
        return False


def _lopsided(xp: Any, loss: Any, here: Any, there: Any, middle: Any) -> bool:
    """Whether a loss has a slope: at a minimum (a perfect fit to what it sees) both sides are alike."""
    up, down = (xp.asarray(loss(c, None), copy=True) for c in (there, here + here - there))
    alike = xp.abs(up - down) <= 0.1 * (xp.abs(up - middle) + xp.abs(down - middle))
    return any_true(xp, (xp.isfinite(up) | xp.isfinite(down)) & ~alike)


def _counts(outer: Any, name: str, known: _Known, point: Any) -> bool:
    """Whether the loss changes with what it sees of that tree."""
    backend, raveler = point.backend, getattr(point, name)
    xp = backend.xp

    def loss(c: Any, _: Any) -> Any:
        parts = flatten(raveler.unravel(c)).leaves

        def swap(x: Any) -> Any:
            found = known.find(x) if known.is_array(x) else None
            return x if found is None or found[0] != name else backend.reshape(parts[found[1]], tuple(x.shape))

        return point.scalar_function(swapped(outer, swap), "outer", args=())(point.y.vector, point.theta.vector)

    here = raveler.vector
    try:
        middle, again = (xp.asarray(loss(here, None), copy=True) for _ in range(2))
        if any_true(xp, middle != again) or not any(
            _lopsided(xp, loss, here, there, middle) for there in around(raveler.space, here)
        ):
            return False
    except Exception:  # what is wrong with a function is told where its derivative is asked for
        return False
    if backend.vmap is not None:  # autodiff knows what is held back on purpose
        with contextlib.suppress(DerivativeError):
            return any_true(xp, backend.gradients(loss, here, point.theta.vector)[0] != 0)
    return True
