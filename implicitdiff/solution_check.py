"""Whether y is a solution: the Newton step from y, coordinate by coordinate.

‖F(y, θ)‖ says little by itself: it is small in small units, and at a large condition number. What it means for y is the
step of Newton's method, δ = A⁻¹ F(y, θ): to first order, y − δ is the solution. So y is told to be none where

    |δ_i| > max(tolerance |y_i|, floor u_i max_j |y_j| / u_j)

for some i. The first term is a relative error of the coordinate itself; the second lets pass what is small against the
vector, so that entries that happen to be tiny raise no alarm. u is the unit of a coordinate as the scales of A show it,
and j runs over the coordinates that A links with i, since it shows no more of units: hence nothing depends on them.
Where that would be an alarm, the level is raised by what nobody can know: F at a y that is rounded (evaluated again,
one rounding away), and y against the size of A⁻¹ B θ, where y itself is near 0. Where all of y is 0, and θ says
nothing, there is no size at all, and F may be the rounding of its own terms: then it does not change as it has to along
a part of the step.

What F costs is looked at first: where ‖F‖ is so small against the scale of A that no step can be an alarm, there is
none.

References
----------
N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 7.2 and 25.2.
DOI 10.1137/1.9780898718027 (componentwise forward errors; what Newton's method can attain)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, ends, needed, quotient
from implicitdiff.linalg.blocks import largest_linked
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.tolerances import ALIKE_ALONG, FAR, SAFETY, SLACK, STEP_OF_COORDINATE, STEP_OF_VECTOR

__all__ = ["SolutionCheck", "Step", "levels"]

PARTS = (2.0**-2, 2.0**-6, 2.0**-10, 2.0**-14)
"""Of a step: of one that is far too long, too, F sees the last as its derivative does."""


def levels(xp: Any, dtype: Any) -> tuple[float, float]:
    """Return the relative tolerance of a coordinate, and the floor relative to the vector."""
    return STEP_OF_COORDINATE.at(xp, dtype), STEP_OF_VECTOR.at(xp, dtype)


class Step(NamedTuple):
    """What was seen of y as a solution, per item: arrays only, so that it may leave a compiled program."""

    size: Array
    """‖F(y, θ)‖."""
    finite: Array
    """Whether F(y, θ) is finite."""
    unsolved: Array
    """Whether the Newton step from y is too large for a solution."""
    doubtful: Array
    """Whether it may be, and was not looked at."""
    far: Array
    """Whether the step is larger than a tenth of y."""
    index: Array
    """The worst coordinate of the raveled y; -1 where it is not known."""
    step: Array
    """The Newton step in that coordinate."""
    value: Array
    """y in that coordinate."""


class SolutionCheck:
    """Looks at a point as a solution.

    Parameters
    ----------
    point : Point
    maps : Maps
        F, A, B there.
    prepared : Prepared
        A with its solver.
    """

    def __init__(self, point: Any, maps: Any, prepared: Any) -> None:
        self.point, self.maps, self.prepared = point, maps, prepared
        self.keeps, self.kept = False, None  # F, for an estimate of the error
        self.backend, self.xp = point.backend, point.backend.xp
        self.tolerance, self.floor = levels(self.xp, point.y.dtype)
        self.eps = float(self.xp.finfo(point.y.dtype).eps)

    def look(self, solution: Any = None, b: Any = None, *, transposed: bool = False, sure: bool = False) -> Step:
        """Judge the point.

        Parameters
        ----------
        solution : Solution, optional
            Of a system with A or Aᵀ, for what it tells of the scale of A.
        b : array, optional
            Its right-hand side.
        transposed : bool
            Whether it was a system with Aᵀ.
        sure : bool
            Whether to make the step even if that is work.
        """
        backend, residual = self.backend, self.maps.residual
        if residual is None or self.point.y.n == 0 or 0 in self.point.items:
            return self._unseen()
        F, rcond = residual(), None if solution is None else solution.rcond
        if self.keeps and not backend.traced:
            self.kept = self.xp.asarray(F, copy=True)  # it may be a buffer that the next call fills again
        space = backend.space(F)
        size = space.size(F)
        seen = self._quiet(size, space.finite(F))
        doubt = seen.finite & (size > 0)
        if backend.mode is Mode.INLINE and not sure and self.prepared.factored:
            if solution is not None:  # calls of LAPACK must not run side by side (see `DenseSolver`)
                F = space.scale(1 + 0 * solution.residual, F)
            sure = True
        if not sure:
            known = solution is not None and 0 not in b.shape
            inverse = self._inverse(solution, b, transposed) if known else None
            doubt = doubt & ~self._harmless(F, size, inverse)
        if not backend.traced:
            return self._measured(F, seen, doubt) if any_true(self.xp, doubt) else seen
        if sure:
            return self._measured(F, seen, doubt, rcond)
        if backend.mode is Mode.COMPILED:  # a program of its own makes sure, where there is doubt
            return seen._replace(doubtful=doubt)
        self._scale_of_data()  # derived here, not inside of the loop

        def measured(old: Step) -> Step:  # what depends on nothing that comes in, a compiler makes in any case
            if is_tree_vector(F):  # which leaf is where would depend on it, too
                return self._measured(F, old, doubt, rcond)
            one = self.xp.where(old.index < -1, self.xp.zeros_like(size), self.xp.ones_like(size))
            return self._measured(space.scale(one, F), old, doubt, rcond)

        return backend.if_any(doubt, measured, seen)

    def size(self) -> Array:
        """‖F(y, θ)‖."""
        return self._unseen().size if self.maps.residual is None else self._norm(self.maps.residual())

    def _norm(self, F: Any) -> Array:
        return self.backend.space(F).size(F)

    def _unseen(self) -> Step:
        p, xp = self.point, self.xp
        empty = p.y.n == 0
        size = xp.full(p.items, 0.0 if empty else float("nan"), dtype=p.y.dtype, device=p.y.device)
        return self._quiet(size, ~xp.zeros(p.items, dtype=xp.bool, device=p.y.device))

    def _quiet(self, size: Array, finite: Array) -> Step:
        xp = self.xp
        no, zero = size < size, xp.zeros_like(size)
        return Step(size, finite, no, no, no, xp.astype(zero, xp.int32) - 1, zero, zero)

    # -- without a product ---------------------------------------------------------------------------
    def _inverse(self, solution: Any, b: Any, transposed: bool) -> Array:
        """Estimate ‖A⁻¹‖ in the units in which A is equilibrated: from below where it is not factored."""
        xp = self.xp
        scaling = self.prepared.scaling
        rows, columns = (None, None) if scaling is None else (scaling.rows, scaling.columns)
        if transposed:
            rows, columns = columns, rows
        top, bottom = self._norm(_divided(solution.x, columns)), self._norm(_multiplied(b, rows))
        ratio = xp.asarray(top / divisor(xp, bottom))
        if len(ratio.shape) > len(self.point.items):
            ratio = xp.max(ratio, axis=0)
        seen = ratio / SLACK
        if solution.rcond is None or (scaling is None and solution.operator_norm is None):
            return seen
        norm = 0.5 if scaling is not None else xp.asarray(solution.operator_norm)
        rcond = xp.asarray(solution.rcond)
        known = xp.asarray(1 / (divisor(xp, rcond) * norm), dtype=ratio.dtype)
        return xp.where(xp.isfinite(rcond) & (rcond > 0), known, seen)

    def _harmless(self, F: Any, size: Array, inverse: Array | None) -> Array:
        """Whether no step can be an alarm; where no system was solved, whether F is all rounding."""
        xp, y = self.xp, self.point.y.vector
        scaling = self.prepared.scaling
        if inverse is None:
            space = self.backend.space(F)
            unit = space.scale(1 / divisor(xp, size), space.copy(F))
            return size <= 10 * self.eps * self._norm(self.prepared.operator.matvec(unit)) * self._largest(y)
        bound = self._norm(_multiplied(F, None if scaling is None else scaling.rows)) * inverse
        parts = self._parts(y)
        if is_tree_vector(y):
            return (inverse > 0) & (bound <= self.floor * self._largest(parts))
        small = ~(bound <= self.floor * ends(xp, parts)[0])
        if not needed(self.backend, small):  # nobody need know what A links
            return (inverse > 0) & ~small
        linked = self.backend.if_any(small, lambda _: self._linked(parts), parts)
        return (inverse > 0) & (bound <= self.floor * xp.min(linked, axis=-1))

    def _units(self) -> Any:
        """Return the unit of each coordinate of y as a vector, None where all are alike."""
        scaling = self.prepared.scaling
        return None if scaling is None else self._of_y(scaling.columns)

    def _of_y(self, x: Any) -> Any:
        return x if self.maps.embedding is None else self.maps.embedding.restrict(x)

    def _largest(self, x: Any) -> Array:
        """max |x_i| per item, as an array."""
        p = self.point
        return self.xp.asarray(self.backend.space(x).largest(x), dtype=p.y.dtype, device=p.y.device)

    # -- the step ------------------------------------------------------------------------------------
    def _measured(self, F: Any, seen: Step, doubt: Array, known: Any = None) -> Step:
        """Make the step, and judge it; where it is an alarm, look at what cannot be known.

        ``known`` is the reciprocal condition number of the solve before, for a correction that tells none.
        """
        if self.backend.traced and not is_tree_vector(F):  # one solve: a loop is dear to compile
            others = self._others()
            rows = self.xp.stack([F, *(b for _, b in others)])
            delta, usable, found = self.prepared.correction(rows)
            rcond = known if found is None else found
            solved = [(f, delta[i + 1, ...], usable[i + 1, ...]) for i, (f, _) in enumerate(others)]
            found = self._judged(seen, self._of_y(delta[0, ...]), usable[0, ...] & doubt, rcond, solved)
            return self._confirmed(found, F, delta[0, ...])
        F = self.backend.space(F).copy(F)  # which may be a buffer
        step, usable, rcond = self.prepared.correction(F)
        delta = self._of_y(step)
        found = self._judged(seen, delta, usable & doubt, rcond)
        if not self.backend.traced and not any_true(self.xp, found.unsolved):
            return found
        solved = [(f, *self.prepared.correction(b)[:2]) for f, b in self._others()]
        return self._confirmed(self._judged(seen, delta, usable & doubt, rcond, solved), F, step)

    def _confirmed(self, found: Step, F: Any, step: Any) -> Step:
        """Take back what is said of items in which all of y is 0, and F does not see the step: it is rounding."""
        if self.maps.at is None or self.backend.mode is Mode.INLINE:
            return found
        blank = found.unsolved & (self._largest(self.point.y.vector) == 0)
        real = self.backend.if_any(blank, lambda x: x & (~blank | self._sees(F, step)), found.unsolved)
        return found._replace(unsolved=real, far=found.far & real)

    def _sees(self, F: Any, step: Any) -> Array:
        """Whether F(y − t A⁻¹F) is F − t F, multipliers held, for a t at which F may be linear."""
        y, theta, n, scaling = self.point.y.vector, self.point.theta.vector, self.point.y.n, self.prepared.scaling
        op, own, at = self.prepared.operator, self._of_y(step), self.maps.at
        rows, W = None if scaling is None else scaling.rows, self.maps.scale
        if op.n > n:
            step = self.xp.where(self.xp.arange(op.n, device=op.device) < n, step, self.xp.zeros_like(step))
        moved = _multiplied(op.matvec(step), rows)

        def value(t: float) -> Any:
            there = at(_each(lambda a, d: a - t * d, y, own), theta)
            return _multiplied(self.backend.space(F).copy(there) if W is None else W * there, rows)

        here, size = value(0.0), self._norm(moved)
        seen = self._norm(_each(lambda a, b: a - b, here, _multiplied(F, rows))) > SAFETY * self._norm(
            _multiplied(F, rows)
        )  # another function than F
        for t in PARTS:
            gap = self._norm(_each(lambda a, b, m, t=t: (a - b) + t * m, value(t), here, moved))
            seen = seen | (gap <= ALIKE_ALONG * t * size)
        return seen

    def _judged(self, seen: Step, delta: Any, usable: Array, rcond: Any, others: list[Any] | None = None) -> Step:
        """Compare a step with y, and with what is not known of y, from the solutions for `_others`, once they exist."""
        y, units, xp = self.point.y.vector, self._units(), self.xp
        space, step = self.backend.space(y), _each(xp.abs, delta)
        reach, slack = self._scales(_each(lambda d, y: d > self.tolerance * xp.abs(y), step, y), rcond, others)
        # what is solved together is known to the rounding of the largest, also where A links it with nothing
        slack = xp.maximum(slack, SAFETY * self.eps * self._beside(self._largest(self._parts(delta))))
        least, away = xp.maximum(self.floor * reach, slack), xp.maximum(FAR * reach, slack)

        def over(d: Array, y: Array, unit: Array) -> Array:
            level = xp.maximum(self.tolerance * xp.abs(y), least * unit)
            if self.prepared.operator.accuracy:  # at y = 0 a difference has no scale, and F by differences is not 0
                return xp.where(level > 0, d / divisor(xp, level), xp.zeros_like(d))
            return d / (level + float(xp.finfo(y.dtype).smallest_normal))

        units = units if units is not None else _each(xp.ones_like, y)
        ratio = _each(over, step, y, units)
        unsolved = usable & (self._largest(ratio) > 1)
        beyond = _each(lambda d, unit: xp.astype(d > away * unit, d.dtype), step, units)
        index = space.worst(ratio)
        return seen._replace(
            unsolved=unsolved, far=unsolved & (self._largest(beyond) > 0), index=xp.astype(index, xp.int32),
            step=space.entry(delta, index), value=space.entry(y, index),
        )  # fmt: skip

    def _scales(self, wanted: Any, rcond: Any, others: list[Any] | None) -> tuple[Array, Array]:
        """Size of y where A links its entries, and what is not known of y, both in the units of `_units`."""
        xp, parts = self.xp, self._parts(self.point.y.vector)
        whole, rounding = self._whole(parts), SAFETY * self.eps * self._beside(self._kappa(rcond))

        def scales(old: Any) -> tuple[Array, Array]:
            # what depends on nothing that comes in, a compiler makes before the loop, in any case
            def within(x: Any) -> Any:
                return xp.where(old[0] < 0, old[0], x) if traced else x

            reach, unknown = self._linked(within(parts)), 0 * whole
            known = reach > reach
            for factor, x, usable in others or ():
                size = self._linked(within(self._parts(self._of_y(x))))
                good = self._beside(usable) & xp.isfinite(size)
                unknown = xp.where(good, xp.maximum(unknown, factor * size), unknown)
                known = known | (good & (size > 0)) if factor == self.floor else known
            if others is not None:  # a block without θ has no scale but that of the others
                reach = xp.where(known, reach, whole)
            return reach, xp.maximum(rounding * reach, unknown)

        traced = self.backend.traced and not is_tree_vector(wanted)
        if is_tree_vector(wanted):
            return scales(None)
        return self.backend.if_any(wanted, scales, (whole, rounding * whole))

    def _parts(self, x: Any) -> Any:
        """|x_i| in the units of `_units`."""
        return _each(self.xp.abs, _divided(x, self._units()))

    def _whole(self, parts: Any) -> Array:
        """The largest part, beside every entry of a vector."""
        top = self._largest(parts)
        return top if is_tree_vector(parts) else self.xp.broadcast_to(top[..., None], parts.shape)

    def _beside(self, x: Array) -> Array:
        """Numbers per item in a form that goes with vectors."""
        return x if is_tree_vector(self.point.y.vector) else x[..., None]

    def _linked(self, parts: Any) -> Any:
        """The largest part among the coordinates that A links with each; of all, where no matrix tells."""
        found = None
        if not is_tree_vector(parts) and self.maps.embedding is None:
            found = largest_linked(self.prepared.state(False)[0], self.prepared.scaling, parts)
        return self._whole(parts) if found is None else found

    def _kappa(self, rcond: Array | None) -> Array:
        """The condition number, 0 where it is not known."""
        zero = 0 * self._largest(self.point.y.vector)
        if rcond is None:
            return zero
        rcond = self.xp.asarray(rcond, dtype=zero.dtype)
        rcond = rcond[0, ...] if len(rcond.shape) > len(self.point.items) else rcond
        usable = self.xp.isfinite(rcond) & (rcond > 0)
        return quotient(self.xp, 1.0, rcond, usable) + zero

    def _others(self) -> list[tuple[float, Any]]:
        """What tells how far nobody can know y, as factors and right-hand sides: θ's size, and rounding in F."""
        data = self._scale_of_data()
        others = [] if data is None else [(self.floor, data())]
        return others + [(SAFETY, noise) for noise in self._noise()]

    def _scale_of_data(self) -> Callable[[], Any] | None:
        """Return what makes B (z ∘ θ), z without structure: F's change with θ at the size that θ has."""
        B, theta = self.maps.B, self.point.theta
        if theta.n == 0 or (B.forward is None and (self.backend.traced or self.point.y.n > 256)):
            return None
        product = B.matvec
        probe = theta.space.probe()
        return lambda: product(_each(lambda a, b: a * b, probe, theta.vector))

    def _noise(self) -> list[Any]:
        """Return the change of F by a change of y that is no more than rounding, seen twice."""
        at, y = self.maps.at, self.point.y.vector
        if at is None or self.maps.embedding is not None or self.backend.mode is Mode.INLINE:
            return []
        probe, theta, space = self.point.y.space.probe(), self.point.theta.vector, self.backend.space
        here, found = None, []
        for sign in (2.0, -2.0):
            moved = _each(lambda y, z, s=sign: y + s * self.eps * z * xp_abs(y), y, probe)
            here = space(y).copy(at(y, theta)) if here is None else here
            found.append(at(moved, theta) - here)
        return found


def xp_abs(x: Array) -> Array:
    """|x|, of any array."""
    return abs(x)


def _each(function: Callable[..., Any], *vectors: Any) -> Any:
    """Apply a function to vectors, leaf by leaf where they are tuples of leaves."""
    return vectors[0].map(function, *vectors[1:]) if is_tree_vector(vectors[0]) else function(*vectors)


def _divided(x: Any, scale: Any) -> Any:
    return x if scale is None else _each(lambda a, s: a / s, x, scale)


def _multiplied(x: Any, scale: Any) -> Any:
    return x if scale is None else _each(lambda a, s: a * s, x, scale)
