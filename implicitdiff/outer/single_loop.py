"""Single loops on batches of samples: y, the adjoint and θ move at once, each along an estimate of its direction.

With f a mean over n samples and L one over m, batches i and j are drawn at each step, and at (y, u, θ)

    D_y = F_i(y, θ),    D_u = A_iᵀ u − ∂L_j/∂y,    D_θ = ∂L_j/∂θ − B_iᵀ u,
    y ← y − ρ D_y,      u ← u − ρ D_u,             θ ← θ − γ D_θ.

Each direction is linear in what is a mean over samples, and so the estimates have no bias, though u is not the solution
of its system. SABA reduces their variance as SAGA does: the latest value for each block of samples is kept, and an
estimate is corrected by the mean of all of them.

References
----------
M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, "A framework for bilevel optimization that enables stochastic and global
variance reduction algorithms", NeurIPS 2022. arXiv:2201.13409
A. Defazio, F. Bach, S. Lacoste-Julien, "SAGA: a fast incremental gradient method with support for non-strongly convex
composite objectives", NeurIPS 2014. arXiv:1407.0202
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor
from implicitdiff.errors import InputError
from implicitdiff.outcome import Status
from implicitdiff.outer.equations import Equations, Spot
from implicitdiff.outer.sampling import drawn
from implicitdiff.outer.schedules import Schedule
from implicitdiff.outer.state import BilevelState, Found
from implicitdiff.solvers.approximation import dominant

__all__ = ["SABA", "SOBA", "Directions"]

SHARE = 1 / 3
"""Of one over the largest eigenvalue of A: the step that SAGA is proved to converge with."""
MOST = 2**31 - 1
"""Of the integers that batches are drawn by."""


class Directions(NamedTuple):
    """Estimates of the three directions, and what is kept for the next ones."""

    by_y: Array
    by_u: Array
    by_theta: Array
    memory: Any


class Table(NamedTuple):
    """The latest value for each block, (blocks, k), and the mean of all, (k,)."""

    rows: Array
    mean: Array


@dataclass(frozen=True, eq=False, repr=False)
class SOBA(Schedule):
    """Stochastic single loop: y, the adjoint and θ each make one step on a batch of samples, at once.

    Nothing is solved, and nothing is measured: an outer step costs one gradient of the inner problem and one product
    with A, both on a batch (that is what the counts of the history are then). For sums over many samples.

    The functions take batches of indices: those of the condition one array of int more after ``args``,
    ``f(y, theta, *args, i)``, and L one after theta, ``outer(y, theta, j)``. Both return means over their samples, not
    sums. Which indices step t draws follows from ``seed`` and t, on every framework alike.

    Parameters
    ----------
    samples : int or (int or None, int or None)
        How many samples there are: of the inner problem, and of the outer loss; one number for both. None: it is no
        mean over samples, and takes no batch.
    batch : int or (int, int), default 64
        How many of them are drawn for a step, evenly, with replacement.
    step : float or "auto", default "auto"
        ρ, of y and of the adjoint. By default a third of one over the largest eigenvalue of A, found by power iteration
        on one batch at the start (up to 30 products): too large where the curvature grows much along the loop.
    decay : float, default 0.5
        In step t all steps are multiplied by (t + 1)^-decay. 0 keeps them, and the noise of the batches with them.
    seed : int, default 0
        Of the batches.

    Raises
    ------
    InputError
        Where a number is not what it has to be.

    Notes
    -----
    γ is the ``learning_rate`` of the optimizer; the theory is that of ``optimizer="sgd"``, with a γ that is small
    beside ρ. The result is `Status.APPROXIMATE`. How good its gradient is, is not known: `implicit_grad` on all samples
    with ``error=True`` tells.

    References
    ----------
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022. arXiv:2201.13409

    Examples
    --------
    The mean of many numbers, shrunk so that it is near that of others:

    >>> import numpy as np
    >>> from implicitdiff import SOBA, Stationary, bilevel
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(2, 1, size=1000), rng.normal(1, 1, size=1000)
    >>> inner = Stationary(
    ...     grad=lambda y, t, i: y - a[i].mean() + t * y, hvp=lambda y, t, v, i: v + t * v,
    ...     mixed_vjp=lambda y, t, u, i: u * y,
    ... )
    >>> outer = lambda y, t, j: ((y - b[j]) ** 2).mean() / 2, lambda y, t, j: (y - b[j].mean(), None)
    >>> found = bilevel(inner, outer, np.zeros(1), np.zeros(1), tolerance=SOBA(1000, 32), optimizer="sgd", steps=600)
    >>> found.status.name, bool(abs(found.theta[0] - (a.mean() / b.mean() - 1)) < 0.1)
    ('APPROXIMATE', True)
    """

    samples: Any
    batch: Any = 64
    step: Any = "auto"
    decay: float = 0.5
    seed: int = 0
    solves = False
    ends = Status.APPROXIMATE

    def __post_init__(self) -> None:
        for size, batch, what in zip(_pair("samples", self.samples), _pair("batch", self.batch), WHAT, strict=True):
            if size is None:
                continue
            if not _whole(size, 1):
                raise InputError(f"samples = {self.samples!r}: expected a number of {what} samples, or None.")
            if not _whole(batch, 1, size):
                raise InputError(f"batch = {self.batch!r}: expected between 1 and {size} of the {what} samples.")
            self.check_blocks(size, batch, what)
        if all(size is None for size in _pair("samples", self.samples)):
            raise InputError("samples: neither problem is a mean over samples.\nNext: Sweep(), which measures errors.")
        if self.step != "auto" and not _positive(self.step):
            raise InputError(f"step = {self.step!r}: expected a positive number, or 'auto'.")
        if self.decay != 0 and not _positive(self.decay):
            raise InputError(f"decay = {self.decay!r}: expected a number, 0 or more.")
        if not _whole(self.seed, 0):
            raise InputError(f"seed = {self.seed!r}: expected a whole number between 0 and {MOST}.")

    def check_blocks(self, size: int, batch: int, what: str) -> None:
        """Raise where the samples cannot be drawn as they are to be."""

    def refuse(self, condition: Any, inner: Any, solver: Any) -> None:
        name = type(self).__name__
        for what, value, default in (("inner", inner, "newton-cg"), ("solver", solver, "auto")):
            if not (isinstance(value, str) and value == default):
                raise InputError(f"{what}: {name} solves nothing, and has no use for it.\nNext: leave it out.")
        if not hasattr(condition, "kind"):
            raise InputError(
                f"{name} descends along −F, and F of {type(condition).__name__} is no gradient.\n"
                "Next: Stationary, or Sweep()."
            )

    def at(self, step: Any) -> Any:
        return (step + 1.0) ** -self.decay

    # -- batches ---------------------------------------------------------------------------------------
    def indices(self, xp: Any, device: Any, step: Any, which: int) -> tuple[Array, Any]:
        """Return the samples of a step of the inner (0) or the outer (1) problem, and their block, if there are any."""
        size, batch = _pair("samples", self.samples)[which], _pair("batch", self.batch)[which]
        return drawn(xp, device, self.seed, which, step, batch, size), None

    def sampled(self, equations: Equations, step: Any) -> tuple[Equations, list[Any]]:
        """Return the equations on the batches of a step, and the blocks that these are."""
        xp, device = equations.backend.xp, equations.y.device
        problem, outer, blocks = equations.problem, equations.outer, list[Any]()
        for which, size in enumerate(_pair("samples", self.samples)):
            i, block = (None, 0) if size is None else self.indices(xp, device, step, which)
            blocks.append(block)
            if i is None:
                continue
            i = xp.astype(i, xp.arange(1).dtype)  # what the framework indexes by
            if which == 0:
                problem = replace(problem, args=(*problem.args, i))
            else:
                outer = tuple(_on(f, i) for f in outer) if isinstance(outer, tuple) else _on(outer, i)
        return replace(equations, problem=problem, outer=outer), blocks

    def on_samples(self, equations: Equations, step: Any) -> Equations:
        return self.sampled(equations, step)[0]

    # -- a step ----------------------------------------------------------------------------------------
    def first(self, spot: Spot) -> tuple[Array, Any, Any, Any]:
        """Return ρ at the start, the gradients and products that it took, and the memory."""
        number = spot.equations.number
        if self.step != "auto":
            return number(float(self.step)), 0, 0, self.memory(spot)
        xp = spot.equations.backend.xp
        largest = xp.abs(dominant(spot.operator))
        step = SHARE / divisor(xp, largest)
        return step * number(1.0), 0, spot.operator.probes, self.memory(spot)

    def memory(self, spot: Spot) -> Any:
        """Return what is kept from step to step, before the first."""
        return None

    def find(
        self, equations: Equations, start: tuple[Array, Array], theta: Array, state: BilevelState, inner: Any
    ) -> Found:
        """Move y and the adjoint by a step each from where they are, on the batches of the step."""
        equations, blocks = self.sampled(equations, state.step)
        y, backend, number = equations.y.vector, equations.backend, equations.number
        spot, none = equations.at(y, theta), equations.count(0)
        d, F = self.directions(spot, state.adjoint, blocks, state.memory)
        shrink = self.at(backend.xp.astype(backend.xp.asarray(state.step), y.dtype))
        rho = state.scale * shrink
        y, u = backend.detached(y - rho * d.by_y), backend.detached(state.adjoint - rho * d.by_u)
        return Found(
            y, u, d.by_theta, spot.value(), number(float("nan")), backend.space(F).size(F), state.met, none + 1,
            none + 1, state.doubt, state.scale, d.memory, state.damping, shrink,
        )  # fmt: skip

    def directions(self, spot: Spot, u: Array, blocks: list[Any], memory: Any) -> tuple[Directions, Array]:
        """Return the estimates of the directions, and F on the batch."""
        F, (by_y, by_theta) = spot.residual(), spot.slopes()
        parts = F, spot.product(u, transposed=True), spot.pullback(u, 0 * by_theta)
        (F_, product, pulled), (slope, direct), memory = self.reduced(spot, parts, (by_y, by_theta), blocks, memory)
        return Directions(F_, product - slope, direct + pulled, memory), F

    def reduced(self, spot: Spot, inner: Any, outer: Any, blocks: list[Any], memory: Any) -> tuple[Any, Any, Any]:
        """Return the parts of the directions as they are used: here as they were sampled."""
        return inner, outer, memory


@dataclass(frozen=True, eq=False, repr=False)
class SABA(SOBA):
    """Single loop with the variance of its batches reduced: it converges with constant steps, which `SOBA` does not.

    As `SOBA`, but the samples are split into blocks of ``batch`` once for all, and of each block the latest values are
    kept: n/batch rows of 2 dim(y) + dim(θ) numbers for the inner samples, m/batch of dim(y) + dim(θ) for the outer
    ones. A step costs as much as one of `SOBA`, and on NumPy and Torch a copy of that table.

    Parameters
    ----------
    samples, batch, step, seed
        See `SOBA`; ``batch`` divides the number of samples.
    decay : float, default 0
        See `SOBA`; here the steps are constant.

    Raises
    ------
    InputError
        Where a number is not what it has to be.

    References
    ----------
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022. arXiv:2201.13409

    Examples
    --------
    >>> from implicitdiff import SABA
    >>> SABA((1000, 500), batch=(50, 25))
    SABA(samples=(1000, 500), batch=(50, 25), step='auto', decay=0, seed=0)
    """

    decay: float = 0.0

    def check_blocks(self, size: int, batch: int, what: str) -> None:
        if size % batch:
            low = [k for k in range(1, isqrt(size) + 1) if size % k == 0]
            near = sorted({*low, *(size // k for k in low)}, key=lambda k: (abs(k - batch), -k))[:2]
            raise InputError(
                f"batch = {batch} does not divide the {size} {what} samples; blocks of two sizes are no even mean.\n"
                f"Next: batch = {' or '.join(map(str, near))}, or leave some samples out."
            )

    def _blocks(self) -> tuple[int, int]:
        sizes, batches = _pair("samples", self.samples), _pair("batch", self.batch)
        n, m = (1 if size is None else size // batch for size, batch in zip(sizes, batches, strict=True))
        return n, m

    def indices(self, xp: Any, device: Any, step: Any, which: int) -> tuple[Array, Any]:
        count, batch = self._blocks()[which], _pair("batch", self.batch)[which]
        block = drawn(xp, device, self.seed, which, step, 1, count)
        # every count-th sample: in data that are sorted, blocks of neighbours would differ most
        return block + count * xp.arange(batch, dtype=xp.int32, device=device), block[0]

    def memory(self, spot: Spot) -> tuple[Table, Table]:
        xp, like, n = spot.equations.backend.xp, spot.y, spot.operator.n
        p = spot.equations.theta.n

        def table(blocks: int, width: int) -> Table:
            rows = xp.zeros((blocks, width), dtype=like.dtype, device=spot.equations.y.device)
            return Table(rows, xp.zeros_like(rows[0, :]))

        blocks = self._blocks()
        return table(blocks[0], like.shape[-1] + n + p), table(blocks[1], n + p)

    def reduced(self, spot: Spot, inner: Any, outer: Any, blocks: list[Any], memory: Any) -> tuple[Any, Any, Any]:
        backend, found, tables = spot.equations.backend, list[Any](), list[Table]()
        for parts, block, table in zip((inner, outer), blocks, memory, strict=True):
            row = backend.concat(list(parts))
            estimate, new = _replaced(backend, table, block, row)
            found.append(_split(estimate, [part.shape[-1] for part in parts]))
            tables.append(new)
        return found[0], found[1], tuple(tables)


WHAT = ("inner", "outer")


def _replaced(backend: Any, table: Table, block: Any, row: Array) -> tuple[Array, Table]:
    """Return the estimate of the mean by a new row, and the table with it."""
    space = backend.space(row)
    block = block if backend.traced else int(block)
    change = row - space.copy_row(table.rows, block)
    rows = space.put_row(backend.xp.asarray(table.rows, copy=True), block, row)
    return table.mean + change, Table(rows, table.mean + change / table.rows.shape[0])


def _split(x: Array, sizes: list[int]) -> list[Array]:
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _on(function: Callable[..., Any], batch: Array) -> Callable[..., Any]:
    """Let a function of (y, theta, batch) be one of y and theta."""
    return lambda y, theta: function(y, theta, batch)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return what there is for the inner and the outer problem."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise InputError(f"{name} = {value!r}: expected one number, or two: of the inner and of the outer problem.")
    return value[0], value[1]


def _whole(value: Any, low: int, high: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
