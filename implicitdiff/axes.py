"""Batches of unlike things: which leaves of theta and of args carry the leading axis of items, and which are shared.

A shared leaf of theta is spread over the items, so that the rules see a batch like any other; a cotangent of it is
summed over them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.errors import CallbackError, ImplicitDiffError, InputError, ShapeError, SolveError
from implicitdiff.pytree import flatten, is_leaf

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend
    from implicitdiff.outcome import Report

__all__ = [
    "NO_AXES",
    "Axes",
    "Shared",
    "axes_of",
    "check_each",
    "check_mapped",
    "filled",
    "first",
    "items_of",
    "mapped_of",
    "spread",
]

REVERSE = ("vjp", "gradient")
"""Modes whose value is like theta: summed over the items where theta is shared."""


class Axes(NamedTuple):
    """What ``in_axes`` says of each leaf; empty where it is as by default."""

    shared: tuple[bool, ...] = ()
    """Of theta's leaves, which are shared by all items."""
    mapped: tuple[bool, ...] = ()
    """Of the leaves of args, which carry the axis of items."""


NO_AXES = Axes()


def axes_of(in_axes: Any, y: Any, theta: Any, args: tuple[Any, ...]) -> Axes:
    """Read ``in_axes = (y, theta, args)``.

    Parameters
    ----------
    in_axes : tuple or None
        Three entries of 0 and None, or of trees of these that are prefixes of y, theta and args.
    y, theta : pytree
    args : tuple

    Raises
    ------
    InputError
        Where it is none of that.
    """
    if in_axes is None:
        return NO_AXES
    if not isinstance(in_axes, (tuple, list)) or len(in_axes) != 3:
        raise InputError(
            f"in_axes = {in_axes!r}: expected a tuple of three, for y, theta and args.\n"
            "Next: in_axes=(0, None, None) for a theta and args that all items share."
        )
    of_y, of_theta, of_args = in_axes
    if of_y is None or not all(_flags(of_y, y, "in_axes[0]")):
        raise InputError("in_axes[0] = None: y has to carry the axis of items, 0.")
    if isinstance(of_args, (tuple, list)) and len(of_args) != len(args):
        raise InputError(f"in_axes[2] has {len(of_args)} entries for {len(args)} args: expected one for each.")
    shared = tuple(not flag for flag in _flags(of_theta, theta, "in_axes[1]"))
    mapped = _flags(None if of_args is None else of_args if of_args == 0 else tuple(of_args), args, "in_axes[2]")
    return Axes(shared if any(shared) else (), mapped if any(mapped) else ())


def _flags(prefix: Any, tree: Any, name: str) -> tuple[bool, ...]:
    """Whether the axis is 0, for each leaf of a tree."""
    leaves = flatten(tree).leaves
    if prefix is None or is_leaf(prefix):
        return (_is_zero(prefix, name),) * len(leaves)
    import optree

    try:
        axes = optree.broadcast_prefix(prefix, tree, none_is_leaf=True)
    except ValueError:
        axes = None
    whole = optree.tree_leaves(tree, none_is_leaf=True)
    if axes is None or sum(leaf is not None for leaf in whole) != len(leaves):
        raise InputError(
            f"{name} = {prefix!r} does not fit what it speaks of.\n"
            "Next: 0 or None, or the containers of the argument with 0 or None in place of leaves or of whole branches."
        ) from None
    found = zip(axes, whole, strict=True)
    return tuple(_is_zero(axis, name) for axis, leaf in found if leaf is not None)


def _is_zero(axis: Any, name: str) -> bool:
    if axis is None:
        return False
    if type(axis) is int and axis == 0:
        return True
    raise InputError(
        f"{name} holds {axis!r}: expected 0 (one entry for each item, along the first axis) or None (shared).\n"
        "Next: move another axis to the front, as np.moveaxis(x, axis, 0) does."
    )


# -- args that differ ------------------------------------------------------------------------------------
def mapped_of(args: tuple[Any, ...], mapped: tuple[bool, ...]) -> list[Any]:
    """Leaves of args that carry the axis of items."""
    return [leaf for leaf, flag in zip(flatten(args).leaves, mapped, strict=True) if flag] if mapped else []


def filled(args: tuple[Any, ...], mapped: tuple[bool, ...], own: Sequence[Any]) -> tuple[Any, ...]:
    """Args with other leaves in place of those: of one item."""
    if not mapped:
        return args
    flat, rest = flatten(args), iter(own)
    leaves = [next(rest) if flag else leaf for leaf, flag in zip(flat.leaves, mapped, strict=True)]
    found: tuple[Any, ...] = flat.unflatten(leaves)
    return found


def check_mapped(backend: Backend, args: tuple[Any, ...], mapped: tuple[bool, ...], items: tuple[int, ...]) -> None:
    """Raise where args that are said to carry the axis of items do not, or cannot be taken apart."""
    flat = flatten(args)
    for i, flag in enumerate(mapped):
        leaf = flat.leaves[i]
        if flag and tuple(getattr(leaf, "shape", ())[:1]) != items:
            got = f"has shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else f"is {type(leaf).__name__}"
            raise ShapeError(
                f"{flat.path(i, 'args')} {got}; by in_axes it carries the axis of items, of {items[0]}, in front."
            )
        if flag and backend.vmap is not None and backend.as_array(leaf, None, getattr(leaf, "dtype", None)) is None:
            raise InputError(
                f"{flat.path(i, 'args')} is {type(leaf).__module__.partition('.')[0]}'s, and y an array of "
                f"{backend.name}: in_axes maps over arrays of the latter alone.\nNext: convert it."
            )


def check_each(each: Mapping[str, Any], count: int) -> None:
    """Raise where what a condition was given for each item of a batch does not carry the axis of items."""
    for name, value in each.items():
        flat = flatten(value)
        for i, leaf in enumerate(flat.leaves):
            if leaf is not None and tuple(getattr(leaf, "shape", ())[:1]) != (count,):
                got = f"has shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else f"is {type(leaf).__name__}"
                raise ShapeError(
                    f"{flat.path(i, name)} {got}; with batched=True it carries the axis of items, of {count}, in front."
                )


# -- theta that is shared --------------------------------------------------------------------------------
def items_of(theta: Any, shared: tuple[bool, ...], own: Sequence[Any]) -> int:
    """Number of items, where the solution is not there yet: from what carries the axis."""
    leaves = [leaf for leaf, flag in zip(flatten(theta).leaves, shared, strict=True) if not flag]
    for leaf in (*leaves, *own):
        if getattr(leaf, "shape", ()):
            return int(leaf.shape[0])
    raise InputError(
        "in_axes: neither theta nor args carries the axis of items, so that nothing says how many there are.\n"
        "Next: args that differ from item to item (in_axes=(0, None, 0)), or implicit_vjp at the solutions."
    )


def spread(backend: Backend, tree: Any, shared: tuple[bool, ...], items: int) -> Any:
    """Spread shared leaves over the items."""
    flat = flatten(tree)

    def over(leaf: Any) -> Any:
        if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
            leaf = backend.as_leaf(leaf, "theta")
        return backend.xp.broadcast_to(leaf, (items, *leaf.shape)) if hasattr(leaf, "shape") else leaf

    leaves = zip(flat.leaves, shared, strict=True)
    return flat.unflatten([over(leaf) if flag else leaf for leaf, flag in leaves])


def first(tree: Any, shared: tuple[bool, ...]) -> Any:
    """Undo `spread`."""
    flat = flatten(tree)
    return flat.unflatten([leaf[0, ...] if flag else leaf for leaf, flag in zip(flat.leaves, shared, strict=True)])


class Shared:
    """What is done with directions and derivatives where theta is shared.

    Parameters
    ----------
    backend : Backend
    theta : pytree
        As the user has it.
    shared : tuple of bool
        For each leaf.
    items : int
    """

    mode = ""

    def __init__(self, backend: Backend, theta: Any, shared: tuple[bool, ...], items: int) -> None:
        self._backend, self._theta, self._shared, self._items = backend, flatten(theta), shared, items

    def product(self, run: Callable[..., Any], mode: str, direction: Any, *rest: Any) -> Any:
        """Run a mode on what is spread, and sum what comes back over the items."""
        self.mode = mode
        direction = self._tangent(direction) if mode == "jvp" else direction
        try:
            with self.explaining():
                return self.summed(run(mode, direction, *rest))
        except SolveError as error:
            error.value = self.summed(error.value)
            raise

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Say beside an error of a user's function how theta comes, where that is not as it was given."""
        try:
            yield
        except Exception as error:
            if self._backend.vmap is None and (
                isinstance(error, CallbackError) or not isinstance(error, ImplicitDiffError)
            ):
                error.add_note(
                    f"By in_axes theta is shared, and comes repeated for each of the {self._items} items: "
                    f"{self._backend.name} has no vmap, and the functions of the condition take all items at once."
                )
            raise

    def _tangent(self, tangent: Any) -> Any:
        flat = flatten(tangent)
        if len(flat.leaves) != len(self._shared):
            return tangent  # what is wrong with it is told where it is raveled
        for i, flag in enumerate(self._shared):
            got, expected = (getattr(x.leaves[i], "shape", ()) for x in (flat, self._theta))
            if flag and tuple(got) != tuple(expected):
                where = self._theta.path(i, "theta")
                raise ShapeError(
                    f"{flat.path(i, 'tangent')} has shape {tuple(got)}.\n"
                    f"Expected shape {tuple(expected)}, like {where}, which all items share by in_axes."
                )
        return spread(self._backend, tangent, self._shared, self._items)

    def summed(self, tree: Any) -> Any:
        """Sum a derivative like theta over the items, in the leaves that are shared."""
        if self.mode not in REVERSE or tree is None:
            return tree
        flat, xp = flatten(tree), self._backend.xp

        def total(leaf: Any, like: Any) -> Any:
            found = xp.sum(leaf, axis=0)
            return self._backend.number(found) if isinstance(like, float) and not hasattr(like, "dtype") else found

        leaves = zip(flat.leaves, self._theta.leaves, self._shared, strict=True)
        return flat.unflatten([total(leaf, like) if flag else leaf for leaf, like, flag in leaves])

    def report(self, report: Report) -> Report:
        """Return a report with a correction that is like the derivative."""
        error = report.error
        if error is None or error.correction is None:
            return report
        return replace(report, error=replace(error, correction=self.summed(error.correction)))
