"""What a sequence of nearby systems leaves from one to the next: the last solutions, and pairs of the solver's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, any_true, item_norm, times
from implicitdiff.closures import Memory
from implicitdiff.errors import ShapeError
from implicitdiff.outcome import Status

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Past", "SequenceState", "fitted", "followed", "fresh", "looked_at", "pairs_of", "predicted", "told"]

KEPT = 4
"""Solutions that are kept: three to extrapolate from, and one more to see how well that did."""
ORDERS = ((1.0, 0.0, 0.0), (2.0, -1.0, 0.0), (3.0, -3.0, 1.0))
"""Weights of the last solutions, the newest first, in the next one: constant, linear, quadratic."""


class SequenceState(NamedTuple):
    """What one solve leaves to the next one of a sequence; arrays only, so that `jax.lax.scan` carries it.

    Made by ``state="new"``, or by `sequence_state` where the shapes have to be there from the start. It is never
    written to.

    Attributes
    ----------
    solutions : array, shape (items…, 4, n)
        The last raveled solutions, the newest first.
    count : array of int, shape (items…)
        How many of them there are.
    directions, images : array, shape (items…, k, n)
        Pairs p/√(pᵀAp) and A p/√(pᵀAp) of earlier solves, the oldest first; rows of zeros where there is none. k is the
        solver's ``recycle``.
    diagonal : array, shape (items…, n)
        What all pairs so far make of the diagonal of A, up to a factor; zeros before.
    scale : array, shape (items…, n)
        The unit of each unknown in which the systems are solved, found once; zeros before.
    pace : array, shape (items…)
        Iterations per decimal of the latest solve without pairs.
    condition : array, shape (items…)
        Its lower estimate of the condition number.
    used : array of int, shape (items…)
        Pairs that served the latest solve.
    dropped : array of bool, shape (items…)
        Whether those that there were had to be dropped in it.
    drift : array, shape (items…)
        ``|pᵀAp / pᵀM⁻¹p − 1|`` on the first direction of the latest solve: by how much A differed from the pairs.
    """

    solutions: Any = None
    count: Any = None
    directions: Any = None
    images: Any = None
    diagonal: Any = None
    scale: Any = None
    pace: Any = None
    condition: Any = None
    used: Any = None
    dropped: Any = None
    drift: Any = None

    @property
    def empty(self) -> bool:
        """Whether it is the beginning of a sequence, whose shapes are not known yet."""
        return self.solutions is None


def pairs_of(solver: Any) -> int:
    """How many pairs a solver keeps."""
    return int(getattr(solver, "recycle", 0))


def fresh(xp: Any, shape: tuple[int, ...], dtype: Any, device: Any, pairs: int) -> SequenceState:
    """Begin a sequence of vectors (*items, n)."""
    items, n = tuple(shape[:-1]), shape[-1]

    def zeros(*more: int, kind: Any = dtype) -> Array:
        return xp.zeros((*items, *more), dtype=kind, device=device)

    integer = xp.int32
    return SequenceState(
        zeros(KEPT, n), zeros(kind=integer), zeros(pairs, n), zeros(pairs, n), zeros(n), zeros(n), zeros(),
        zeros(), zeros(kind=integer), zeros(kind=xp.bool), zeros(),
    )  # fmt: skip


def fitted(state: SequenceState, backend: Backend, b: Array, pairs: int) -> SequenceState:
    """Return the state for right-hand sides like b, begun where it is empty.

    Raises
    ------
    ShapeError
        Where it is the state of another sequence.
    """
    if state.empty:
        return fresh(backend.xp, b.shape, b.dtype, backend.device(b), pairs)
    found = tuple(state.solutions.shape), tuple(state.directions.shape)
    items, n = tuple(b.shape[:-1]), b.shape[-1]
    wanted = (*items, KEPT, n), (*items, pairs, n)
    if found != wanted or state.solutions.dtype != b.dtype:
        raise ShapeError(
            f"state holds solutions {found[0]} and pairs {found[1]} of {state.solutions.dtype}; expected {wanted[0]} "
            f"and {wanted[1]} of {b.dtype}.\n"
            "Likely cause: it is the state of another problem, or of a solver with another recycle.\nNext: state='new'."
        )
    return state


def predicted(backend: Backend, state: SequenceState) -> Array:
    """Extrapolate the next solution, by the order that would have foreseen the latest one best."""
    xp, last = backend.xp, state.solutions
    device = backend.device(last)
    weights = xp.asarray(ORDERS, dtype=last.dtype, device=device)
    missed = item_norm(xp, weights @ last[..., 1:, :] - last[..., :1, :])  # (*items, orders)
    orders = xp.arange(len(ORDERS), dtype=xp.int32, device=device)
    seen = state.count[..., None] > orders + 1
    best = xp.argmin(xp.where(seen, missed, xp.full_like(missed, float("inf"))), axis=-1)
    chosen = xp.astype(orders == xp.astype(best, xp.int32)[..., None], last.dtype)
    return times(xp.matrix_transpose(last[..., :-1, :]), times(weights.T, chosen))


def followed(state: SequenceState, xp: Any, x: Array, good: Array) -> SequenceState:
    """Return the state with a solution more, in items where it is good; one that begins anew in the others."""
    mask = good[..., None, None]
    solutions = xp.concat([x[..., None, :], state.solutions[..., :-1, :]], axis=-2)
    count = xp.where(good, xp.where(state.count < KEPT, state.count + 1, state.count), xp.zeros_like(state.count))
    nothing = xp.zeros_like(state.directions)
    return state._replace(
        solutions=xp.where(mask, solutions, xp.zeros_like(solutions)), count=count,
        directions=xp.where(mask, state.directions, nothing), images=xp.where(mask, state.images, nothing),
        diagonal=xp.where(good[..., None], state.diagonal, xp.zeros_like(state.diagonal)),
        scale=xp.where(good[..., None], state.scale, xp.zeros_like(state.scale)),
    )  # fmt: skip


class Past:
    """What the derivatives of a decorated solver leave to each other, from backward pass to backward pass.

    States are values: threads that share one may lose each other's, and never mix them up.
    """

    def __init__(self, solver: Any) -> None:
        self.wanted = pairs_of(solver) > 0
        self.states = Memory()  # by the kind of the derivative

    def product(self, lin: Any, kind: str, take: Callable[[Any], Any], *, traced: bool) -> Any:
        """Take a product of a linearisation as the next one of its kind; one of another shape begins anew."""
        if traced or not self.wanted:
            return take(None)
        state = self.states.get(kind, SequenceState())
        try:
            value = take(state)
        except ShapeError:
            if state.empty:
                raise
            value = take(SequenceState())
        if lin.carried is not None:
            self.states[kind] = lin.carried
        return value


def looked_at(state: SequenceState, backend: Backend, status: Array) -> bool:
    """Whether an earlier solve of the sequence has compared A with Aᵀ, and this one did not fail."""
    if backend.traced:
        return False
    return not any_true(backend.xp, (state.count == 0) | (status > int(Status.APPROXIMATE)))


def told(state: SequenceState) -> dict[str, Any]:
    """What a report says of it."""
    return {"recycled": state.used, "dropped": state.dropped, "drift": state.drift}
