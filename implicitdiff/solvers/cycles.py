"""What the runs of an iterative method start from, return, and are driven by: residuals, scales, estimates of norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, needed
from implicitdiff.linalg.equilibration import Scaling
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner
from implicitdiff.outcome import Status

__all__ = [
    "Cycle",
    "KrylovState",
    "Outer",
    "Start",
    "accuracy",
    "rescaled_cycle",
    "resolution",
    "started",
    "true_residual",
    "unit_of",
    "without_preconditioner",
]  # fmt: skip


class Start(NamedTuple):
    """Where one run of an iterative method starts: A (x + d) = b with ‖b‖ = 1 and residual r = b - A x.

    ``target`` is the norm of the residual to reach, ``active`` the items to work on, ``budget`` the
    iterations left. x and r may be overwritten. ``memory`` takes pairs (p, A p), where they are kept.
    """

    x: Array
    r: Array
    target: Array
    active: Array
    budget: Array
    memory: Any = None


class Cycle(NamedTuple):
    """What one run of an iterative method returns to the driver below.

    ``operator_norm`` and ``gain`` are lower estimates of ‖A‖ and ‖A⁻¹‖; ``flat`` tells where ‖A v‖ <= 4 √ε ‖A‖ for a
    unit vector v was met. ``r`` is the residual that a method followed with its steps, where it may do for the
    true one.
    """

    x: Array
    iterations: Array
    matvecs: Array
    status: Array
    operator_norm: Array
    flat: Any = False
    gain: Any = 0.0
    memory: Any = None
    r: Any = None


class KrylovState(NamedTuple):
    """An operator, equilibrated where there is no preconditioner, and the preconditioner for it."""

    operator: Operator
    preconditioner: Preconditioner
    scaling: Scaling | None = None


class Outer(NamedTuple):
    """Where the driver of the cycles stands."""

    x: Array
    r: Array
    residual: Array
    active: Array
    status: Array
    iterations: Array
    matvecs: Array
    operator_norm: Array
    tolerance: Array
    unit: Array  # σ: the method runs on A/σ
    condition: Array
    memory: Any = None


def accuracy(state: KrylovState, space: Any) -> float:
    """Relative error of a product with A: rounding, or what else its source is good for."""
    return max(space.eps, state.operator.accuracy)


def without_preconditioner(space: Any, norm: Array, square: Array, image: Array) -> Array:
    """Estimate ‖A‖ from ‖M A‖: over the size of M as rᵀM r shows it beside rᵀr."""
    known = (image > 0) & (square > 0)
    return norm * space.where(known, square / space.where(known, image, space.scalar(1.0)), space.scalar(0.0))


def resolution(state: KrylovState, space: Any, norm: Array) -> Any:
    """Relative accuracy of A; of I − ∂T what is left is known to that of 1."""
    found, offset = state.operator.resolution, state.operator.offset
    if not offset or state.scaling is not None:
        return found
    one = space.scalar(1.0)
    return found * space.maximum(one, offset / space.where(norm > 0, norm, one))


def rescaled_cycle(
    cycle: Callable[[KrylovState, Any, Start], Cycle], state: KrylovState, space: Any, s: Outer, start: Start
) -> Cycle:
    """Run a cycle on (A/σ) (σ x) = b."""
    op = state.operator
    if not needed(op.backend, s.unit != 1):
        return cycle(state, space, start)

    def product(v: Array) -> Array:
        return space.scale(1 / s.unit, space.copy(op.matvec(v)))

    scaled = state._replace(operator=replace(op, forward=product, _cache={}))
    c = cycle(scaled, space, start._replace(x=space.scale(s.unit, start.x)))
    memory = c.memory and c.memory.forgotten(space, s.unit != 1)
    norm, gain = c.operator_norm * s.unit, c.gain / s.unit
    return c._replace(x=space.scale(1 / s.unit, c.x), operator_norm=norm, gain=gain, memory=memory)


def true_residual(
    state: KrylovState, space: Any, s: Outer, c: Cycle, unit: Callable[[], Array], rtol: Array
) -> tuple[Array, Any]:
    """b − A x after a cycle, and the products that it took.

    A residual that was followed with every step is that but for rounding, which is below (steps + 1) ε ‖A‖ ‖x‖ or
    nearly so: where a tenth of the tolerance is far above, and half of the digits are enough, none is needed.
    """
    op = state.operator

    def anew(_: Any) -> Array:
        return space.subtract(unit(), op.matvec(c.x))

    rounding = 16 * accuracy(state, space) * (c.memory.written + 1) * c.memory.norm * space.norm(c.x)
    sure = (c.status == 0) & (space.norm(c.r) <= rtol) & (rounding <= 0.1 * rtol) & (rtol >= space.eps**0.5)
    open_ = s.active & ~sure
    return op.backend.if_any(open_, anew, c.r), space.where(open_, 1, 0)


def started(space: Any, op: Operator, unit: Callable[[], Array], x0: Array | None, scale: Array, rtol: Array) -> Outer:
    """Start from x0 where that is better than zero."""
    r, x, matvecs = unit(), space.zeros(), 0
    residual = space.norm(r)
    if x0 is not None:
        usable = scale > 0
        start = space.scale(1 / space.where(usable, scale, space.scalar(1.0)), space.copy(x0))
        r0 = space.subtract(unit(), op.matvec(start))
        better = usable & (space.norm(r0) < residual)  # a start worse than zero (or NaN) is dropped
        x, r = space.select(better, start, x), space.select(better, r0, r)
        residual, matvecs = space.norm(r), 1
    done = residual <= rtol
    active = ~done  # a NaN stays active and is told
    status = space.where(done, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
    zero, one = space.scalar(0.0), space.scalar(1.0)
    return Outer(x, r, residual, active, status, space.counter(), matvecs, zero, rtol, one, zero)


def unit_of(space: Any, b: Array) -> tuple[Callable[[], Array], Array]:
    """Return a function that makes b / ‖b‖ anew (it is not kept: one vector less), and ‖b‖."""
    one = space.scalar(1.0)
    largest = space.largest(b)
    largest = space.where((largest > 0) & space.isfinite(largest), largest, one)
    root = 1 / space.sqrt(largest)  # twice its root, since 1 / 1e-308 may overflow

    def scaled() -> Array:
        return space.scale(root, space.scale(root, space.copy(b)))

    norm = space.norm(scaled())
    safe = space.where(norm > 0, norm, one)

    def unit() -> Array:
        return space.scale(1 / safe, scaled())

    return unit, norm * largest
