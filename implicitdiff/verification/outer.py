"""Whether an outer loss uses, beside its arguments, the very y or θ that it is asked about.

Of L(y, θ) the derivatives are those by its arguments: what comes in by a closure is a constant to it, and a term of
dL/dθ is lost. To see y tells nothing yet (its shape may be what is used). So y is put in its place as a variable c: L
with y and θ fixed has to have no derivative by c.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from implicitdiff.arrays import any_true
from implicitdiff.closures import sees, swapped
from implicitdiff.errors import DerivativeError
from implicitdiff.pytree import flatten

__all__ = ["check_outer"]

LIMIT = 300
"""Values that are looked at, from the nearest on: it is done at every call."""


def check_outer(outer: Any, backend: Any, y: Any, theta: Any, point: Callable[[], Any] | None) -> None:
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

    def is_array(x: Any) -> bool:
        return backend.is_array(x) or isinstance(x, np.ndarray)

    for name, tree in (("y", y), ("theta", theta)):
        leaves = [leaf if is_array(leaf) else None for leaf in flatten(tree).leaves]
        find = functools.partial(_index, backend, is_array, leaves)
        if not sees((outer,), is_array, functools.partial(_is_known, find), LIMIT):
            continue
        if point is None or _counts(outer, name, find, point()):
            raise DerivativeError(
                f"outer uses {name} from the enclosing scope, beside its argument: a term of dL/dtheta is lost.\n"
                "Likely cause: a name that stands for the solution or the parameters outside of outer, too.\n"
                "Next: write it as outer(y, theta) and use those. What is to be a constant: give outer a copy of it."
            )


def _is_known(find: Callable[[Any], int | None], x: Any) -> bool:
    return find(x) is not None


def _index(backend: Any, is_array: Callable[[Any], bool], leaves: list[Any], x: Any) -> int | None:
    """Which of the leaves a value is, be it by another name or in another shape."""
    if not is_array(x):
        return None
    for i, leaf in enumerate(leaves):
        if x is leaf:
            return i
    where = backend.address(x)
    if where is None:
        return None
    return next((i for i, leaf in enumerate(leaves) if leaf is not None and backend.address(leaf) == where), None)


def _counts(outer: Any, name: str, find: Callable[[Any], int | None], point: Any) -> bool:
    """Whether the loss changes with what it sees; ``find`` returns the number of the leaf that a value is."""
    backend, border = point.backend, getattr(point, name)
    xp = backend.xp

    def loss(c: Any, _: Any) -> Any:
        parts = flatten(border.unravel(c)).leaves

        def swap(x: Any) -> Any:
            i = find(x)
            return x if i is None else backend.reshape(parts[i], tuple(x.shape))

        return point.scalar_function(swapped(outer, swap), "outer", args=())(point.y.vector, point.theta.vector)

    here = border.vector
    there = border.space.nearby(here)
    try:
        middle, again, up, down = (
            xp.asarray(loss(c, None), copy=True) for c in (here, here, there, here + here - there)
        )
    except Exception:  # what is wrong with a function is told where its derivative is asked for
        return False
    # at a minimum (a perfect fit to what it sees) both sides are alike, and nothing is lost
    alike = xp.abs(up - down) <= 0.1 * (xp.abs(up - middle) + xp.abs(down - middle))
    if any_true(xp, middle != again) or not any_true(xp, ~alike):
        return False
    if backend.vmap is not None:  # autodiff knows what is held back on purpose
        with contextlib.suppress(DerivativeError):
            return any_true(xp, backend.gradients(loss, here, point.theta.vector)[0] != 0)
    return True
