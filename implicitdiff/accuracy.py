"""From an estimate in arrays to what users see of it: the record, the error above a limit, NaN in items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array, any_true, listed, named_items, to_python
from implicitdiff.error_estimate import CAUSES, ErrorEstimate, approximation
from implicitdiff.errors import InaccurateError
from implicitdiff.estimates import Estimate
from implicitdiff.pytree import map_leaves
from implicitdiff.tolerances import CERTIFIED

__all__ = ["inaccuracy", "inaccurate", "nan_items", "shown"]

_NEXT = {
    "inner solution": "solve the inner problem further, or polish=1 (a Newton step first)",
    "linear solve": "a tighter rtol of the solver, more iterations, or polish=1",
    "finite differences": "give the derivatives, or write the functions so that autodiff takes them",
    "Gauss-Newton": "hessian='exact'",
    "damping": "less damping, or none; a Newton step leaves what it adds",
    "Gauss-Newton and damping": "hessian='exact' without damping",
    "rounding": "double precision, or scale or regularise the problem",
}


def shown(xp: Any, estimate: Estimate, condition: Any, damping: float, *, visible: bool) -> ErrorEstimate:
    """Return the record of an estimate.

    Parameters
    ----------
    xp : module
        Array namespace of the estimate.
    estimate : Estimate
    condition : Condition
        Names what changes sides.
    damping : float
        Of the solver; NaN where it is found.
    visible : bool
        Whether the numbers can be seen.
    """
    read = to_python if visible else (lambda x: x)
    parts = [estimate.inner, estimate.linear, estimate.differences, estimate.rounding]
    names: tuple[str, ...] = CAUSES
    if another := approximation(condition, damping):
        parts, names = [*parts, estimate.approximation], (*CAUSES, another)
    which = xp.argmax(xp.stack([*parts[::-1]]), axis=0)  # the last of equals: nothing at all is rounding
    which = len(parts) - 1 - which
    cause: Any = which
    if visible:
        numbers = to_python(which)
        cause = names[numbers] if isinstance(numbers, int) else tuple(names[int(i)] for i in numbers)
    return ErrorEstimate(
        absolute=read(estimate.absolute), relative=read(estimate.relative),
        parts={name: read(part) for name, part in zip(names, parts, strict=True)}, cause=cause,
        contraction=read(estimate.contraction), trusted=read(estimate.trusted),
        doubt=_doubt(xp, estimate, condition) if visible else "", correction=estimate.correction,
        value=None if estimate.value is None else read(estimate.value), products=read(estimate.products),
    )  # fmt: skip


def _doubt(xp: Any, estimate: Estimate, condition: Any) -> str:
    """Say why an estimate is not trusted."""
    if not any_true(xp, ~estimate.trusted):
        return ""
    reasons: list[tuple[Array, Callable[[], str]]] = []
    open_ = ~estimate.trusted
    changed = estimate.changed
    if changed is not None:
        some = xp.any(changed, axis=-1) & open_
        reasons.append((some, lambda: f"{condition.name_changes(xp, changed)} between y and its Newton step"))

    def far() -> str:
        kappa = float(xp.max(estimate.contraction))
        return f"y is so far off that Newton's method hardly contracts ({kappa:.2g}): solve the inner problem further"

    reasons += [
        (open_ & ~estimate.usable, lambda: "its Newton step could not be solved for, or F or L is not finite there"),
        (open_ & ~(estimate.contraction <= CERTIFIED), far),
        (open_ & (estimate.contraction <= CERTIFIED) & ~(estimate.adjoint_contraction <= CERTIFIED),
         lambda: "A changes so much between y and its Newton step that its solve there is not corrected by one at y"),
    ]  # fmt: skip
    said = []
    for mask, reason in reasons:
        if any_true(xp, mask):
            where = f"{named_items(xp, mask)}: " if len(mask.shape) else ""
            said.append(where + reason())
    return "; ".join(said)


def inaccurate(estimate: Estimate, max_error: float) -> Array:
    """Items whose estimated relative error exceeds the limit; NaN does."""
    return ~(estimate.relative <= max_error)


def inaccuracy(backend: Any, estimate: Estimate, max_error: float, error: ErrorEstimate) -> InaccurateError | None:
    """Build the error for a derivative whose estimated error exceeds the limit; None where none does."""
    xp, mask = backend.xp, inaccurate(estimate, max_error)
    if not any_true(xp, mask):
        return None
    largest = float(xp.max(xp.where(mask, estimate.relative, xp.zeros_like(estimate.relative))))
    causes = [error.cause] if isinstance(error.cause, str) else [
        cause for cause, bad in zip(error.cause, [bool(mask[i]) for i in range(mask.shape[0])], strict=True) if bad
    ]  # fmt: skip
    causes = list(dict.fromkeys(causes))
    where = f"{named_items(xp, mask)}: " if len(mask.shape) else ""
    doubt = f" The estimate itself is not trusted: {error.doubt}." if error.doubt else ""
    return InaccurateError(
        f"{where}the derivative is off by an estimated {largest:.2g} of its size, above max_error = {max_error:g}."
        f"{doubt}\nLikely cause: {listed(causes)}.\nNext: {'; or '.join(_NEXT[cause] for cause in causes)}."
    )


def nan_items(backend: Any, tree: Any, mask: Array) -> Any:
    """Return a tree of results with NaN in the items of a mask."""
    xp = backend.xp

    def spoiled(leaf: Any) -> Any:
        array = xp.asarray(leaf)
        lead = backend.reshape(mask, (*mask.shape, *(1,) * (len(array.shape) - len(mask.shape))))
        found = xp.where(lead, xp.full_like(array, float("nan")), array)
        return backend.number(found) if isinstance(leaf, float) else found

    return map_leaves(spoiled, tree)
