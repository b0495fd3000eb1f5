"""Degenerate points: one element of the generalised derivative, where active constraints are dependent or weak.

There y is a kink in θ: it is made of several smooth pieces, one for each set I of constraints that are held on a side.
Along a direction d of θ the right one is that of the quadratic program of the directional derivative. It is found as a
dual active-set method finds it:

1. Multipliers λ of ∇f = −Σ λ_i ∇c_i that are not negative, and of which those that are positive belong to independent
   gradients: non-negative least squares (Lawson and Hanson). I are those.
2. The rates w of y and ν of λ along d, from the saddle system of I. A constraint that is violated at that rate joins I;
   where its gradient depends on those of I, the one of them leaves whose multiplier comes to zero first as that of the
   new one grows. A constraint with λ_i = 0 leaves where ν_i < 0.

In the end y_I is the solution for θ + t d, t > 0 small, so that its derivative is an element of the generalised
derivative of y, and along d the one-sided derivative. d is a direction without structure, so that it is so in an open
set of directions; −d is tried where there is no solution along d, and where there is none along either, since the
inequalities leave y alone, a direction in which θ moves them away. All of it is arithmetic under masks, over a batch
and in compiled programs; what it finds, a set, is not differentiated.

References
----------
C. L. Lawson, R. J. Hanson, "Solving Least Squares Problems", SIAM, 1995, chapter 23. DOI 10.1137/1.9781611971217
D. Goldfarb, A. Idnani, "A numerically stable dual method for solving strictly convex quadratic programs", Math.
Program. 27 (1983) 1-33. DOI 10.1007/BF02591962
D. Ralph, S. Dempe, "Directional derivatives of the solution of a parametric nonlinear program", Math. Program. 70
(1995) 159-172. DOI 10.1007/BF01585934
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, divisor, item_norm, probe_vector, times
from implicitdiff.conditions.active_set import classified, recovered
from implicitdiff.conditions.units import Units
from implicitdiff.linalg.rows import SparseRows

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend
    from implicitdiff.conditions.active_set import Limits
    from implicitdiff.conditions.base import Maps
    from implicitdiff.conditions.lagrangian import FirstOrder
    from implicitdiff.conditions.point import Point

__all__ = ["selected"]

AHEAD = 1e-6
"""How far ahead along the rates of multipliers ties between them are decided."""


def selected(
    point: Point, first: FirstOrder, units: Units, limits: Limits, candidate: Array, equality: Array,
    system: Callable[[Array], Maps],
) -> tuple[Array, Array]:  # fmt: skip
    """Put one smooth piece in place of the constraints that hold with equality, in items where these are degenerate.

    Parameters
    ----------
    point : Point
    first : FirstOrder
    units : Units
    limits : Limits
    candidate, equality : array, shape (*items, k)
        Constraints that hold with equality, and equalities.
    system : callable
        The Lagrangian's system with multipliers z.

    Returns
    -------
    held : array, shape (*items, k)
        The piece; the candidates in all other items.
    degenerate : array, shape (*items, k)
        What is dependent or weak in items where a piece was found.
    """
    backend = point.backend
    xp = backend.xp
    rows = first.rows.dense() if isinstance(first.rows, SparseRows) else first.rows
    first = first._replace(rows=backend.detached(rows), gradient=backend.detached(first.gradient))
    units = Units(*map(backend.detached, units))
    z, dependent = recovered(backend, first, units, candidate)
    found = classified(xp, equality, first.values, units, limits, candidate, dependent, z)
    doubt = dependent | found.weak
    wanted = xp.any(doubt, axis=-1)

    def choose(_: Any) -> tuple[Array, Array]:
        return _chosen(point, first, units, limits, candidate, equality, system)

    held, good = backend.if_any(wanted, choose, (candidate, wanted & ~wanted))
    here = (wanted & good)[..., None]
    return xp.where(here, held, candidate), doubt & here


class _Local(NamedTuple):
    """The problem to second order, coordinates in their units, rows of norm one; k constraints."""

    backend: Backend
    H: Array
    J: Array
    gradient: Array
    equality: Array
    near: Array
    """Constraints that hold with equality."""
    tolerance: float
    rank: float
    """Square of the part of a row of norm one, from which on it is independent of others."""

    force: Array
    """What multipliers are held against, (*items, 1): the size of ∇f, or, if that is more, what moves y by its own."""

    def combination(self, held: Array, right: Array) -> Array:
        """Least squares of J_Iᵀ a = right over the rows that are held, (*items, k)."""
        xp, backend = self.backend.xp, self.backend
        mask = backend.astype(held, self.J.dtype)
        rows = self.J * mask[..., None]
        eye = xp.eye(rows.shape[-2], dtype=rows.dtype, device=backend.device(rows))
        gram = rows @ xp.matrix_transpose(rows) + (1 - mask)[..., None] * eye
        return backend.cho_solve(backend.cho_factor(gram), times(rows, right)[..., None])[..., 0]


class _Set(NamedTuple):
    """A set of constraints with their multipliers, per item."""

    held: Array
    multipliers: Array
    going: Array
    good: Array
    count: Array


def _chosen(
    point: Point, first: FirstOrder, units: Units, limits: Limits, near: Array, equality: Array,
    system: Callable[[Array], Maps],
) -> tuple[Array, Array]:  # fmt: skip
    """The constraints of one smooth piece, (*items, k), and whether it is one, as far as that is seen."""
    backend, bend = point.backend, units.bend
    xp, J = backend.xp, first.rows * bend[..., None, :]
    size = item_norm(xp, J)
    safe = divisor(xp, size)
    n, k = bend.shape[-1], size.shape[-1]
    rank = 1e4 * float(xp.finfo(J.dtype).eps) * k
    zero = xp.zeros((*J.shape[:-2], n, n), dtype=J.dtype, device=point.y.device)
    gradient = first.gradient * bend
    force = xp.maximum(item_norm(xp, gradient), item_norm(xp, units.reach / bend))[..., None]
    local = _Local(backend, zero, J / safe[..., None], gradient, equality, near, limits.active, rank, force)
    start = _positive(local)
    balanced = item_norm(xp, _left(local, start.multipliers)) <= limits.violated * local.force[..., 0]

    def tried(way: str) -> _Set:
        trial = start
        for _ in range(2):  # the Hessian is that of the multipliers
            maps = system(trial.multipliers / safe)
            H = backend.detached(_hessian(point, maps)) * bend[..., :, None] * bend[..., None, :]
            along = _away(point, maps, near & ~equality, safe) if way == "away" else _direction(point)
            moved = (-1.0 if way == "back" else 1.0) * backend.detached(maps.B.matvec(along))
            trial = _along(local._replace(H=H), moved[..., :n] * bend, moved[..., n:] / safe, trial)
        return trial

    held, good = (found := tried("there")).held, found.good
    for way in ("back", "away"):

        def other(found: tuple[Array, Array], way: str = way) -> tuple[Array, Array]:
            trial = tried(way)
            return xp.where(found[1][..., None], found[0], trial.held), found[1] | trial.good

        held, good = backend.if_any(~good, other, (held, good))
    return held, good & balanced


def _hessian(point: Point, maps: Maps) -> Array:
    """H, (*items, n, n)."""
    xp, n, items = point.backend.xp, point.y.n, point.items
    if maps.hessian is not None:
        return maps.hessian.dense() if isinstance(maps.hessian, SparseRows) else maps.hessian
    unit = xp.eye(n, maps.A.n, dtype=point.y.dtype, device=point.y.device)
    unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(items), maps.A.n)), (n, *items, maps.A.n))
    return xp.moveaxis(maps.A.matvec(unit)[..., :n], 0, -1)


def _away(point: Point, maps: Maps, inequality: Array, safe: Array) -> Array:
    """The direction of θ, in its units, in which inequalities go down fastest, in a mean without structure."""
    backend = point.backend
    xp, k = backend.xp, safe.shape[-1]
    weight = xp.abs(probe_vector(xp, k, safe.dtype, point.y.device)) + 0.5
    rows = xp.where(inequality, weight / safe, xp.zeros_like(safe))
    zeros = xp.zeros((*rows.shape[:-1], maps.B.rows - k), dtype=rows.dtype, device=point.y.device)
    size = _sizes(point)
    return -size * size * backend.detached(maps.B.rmatvec(backend.concat([zeros, rows])))


def _direction(point: Point) -> Array:
    """A direction of θ without structure, each coordinate in its unit; those that are infinite do not move."""
    size = _sizes(point)
    z = probe_vector(point.backend.xp, size.shape[-1], size.dtype, point.theta.device)
    return size * point.backend.xp.where(z < 0, z - 0.5, z + 0.5)


def _sizes(point: Point) -> Array:
    """Units of the coordinates of θ."""
    theta = point.theta
    xp, parts = point.backend.xp, []
    finite = xp.where(xp.isfinite(theta.vector), xp.abs(theta.vector), xp.zeros_like(theta.vector))
    for part in theta.parts(point.backend.detached(finite)):
        if part.shape[-1]:
            largest = xp.max(part, axis=-1, keepdims=True)
            parts.append(xp.where(part > 0, part, divisor(xp, largest)))
    return parts[0] if len(parts) == 1 else point.backend.concat(parts)


def _left(local: _Local, multipliers: Array) -> Array:
    """∇f + Jᵀλ."""
    return local.gradient + times(local.backend.xp.matrix_transpose(local.J), multipliers)


def _first(xp: Any, score: Array) -> tuple[Array, Array]:
    """The mask of the largest score, and that score, (*items, 1)."""
    k = score.shape[-1]
    best = xp.max(score, axis=-1, keepdims=True)
    number = xp.arange(k, device=getattr(score, "device", None)) if hasattr(score, "device") else xp.arange(k)
    place = xp.argmax(score, axis=-1)[..., None]
    return number == place, best


# -- non-negative least squares --------------------------------------------------------------------------
def _positive(local: _Local) -> _Set:
    """Multipliers that are not negative, those that are positive of independent gradients."""
    backend = local.backend
    xp, most = backend.xp, 4 * local.J.shape[-2] + 8
    no, zero = xp.zeros_like(local.near), xp.zeros_like(local.J[..., 0])
    yes = xp.any(local.near, axis=-1)
    start = _Set(no, zero, yes, yes | ~yes, xp.asarray(0))
    end = backend.while_loop(
        lambda s: xp.any(s.going) & (s.count < most), lambda s: _fitted(local, s), start, limit=most
    )
    return end._replace(going=yes | ~yes, good=~end.going)


def _fitted(local: _Local, s: _Set) -> _Set:
    """One step: to least squares over the set, or up to where a multiplier becomes zero, which leaves."""
    xp, J = local.backend.xp, local.J
    fit = local.combination(s.held, -local.gradient)
    fit = xp.where(s.held, fit, xp.zeros_like(fit))
    low = s.held & ~local.equality & (fit <= 0)
    gap = xp.where(low, s.multipliers - fit, xp.ones_like(fit))
    ratio = xp.where(low, s.multipliers / divisor(xp, gap), xp.full_like(fit, float("inf")))
    out, _ = _first(xp, -ratio)
    blocked = xp.any(low, axis=-1, keepdims=True)
    step = xp.where(blocked, xp.min(ratio, axis=-1, keepdims=True), xp.ones_like(fit[..., :1]))
    multipliers = s.multipliers + step * (fit - s.multipliers)
    pull = -times(J, _left(local, fit))
    score = xp.where(local.equality, xp.abs(pull), pull)
    score = xp.where(local.near & ~s.held, score, -xp.ones_like(score))
    joins, best = _first(xp, score)
    more = ~blocked & (best > local.tolerance * local.force)
    held = xp.where(blocked, s.held & ~out, s.held | (joins & more))
    multipliers = xp.where(held, multipliers, xp.zeros_like(multipliers))
    going = s.going[..., None]
    return _Set(
        xp.where(going, held, s.held), xp.where(going, multipliers, s.multipliers),
        s.going & (blocked | more)[..., 0], s.good, s.count + 1,
    )  # fmt: skip


# -- along a direction -----------------------------------------------------------------------------------
def _along(local: _Local, b: Array, r: Array, start: _Set) -> _Set:
    """The set whose piece is the solution along a direction, from a set with non-negative multipliers."""
    backend = local.backend
    xp, most = backend.xp, 4 * local.J.shape[-2] + 8
    start = start._replace(going=start.good, count=xp.asarray(0))
    end = backend.while_loop(
        lambda s: xp.any(s.going) & (s.count < most), lambda s: _pivoted(local, b, r, s), start, limit=most
    )  # fmt: skip
    return end._replace(good=end.good & ~end.going)


def _rates(local: _Local, b: Array, r: Array, held: Array) -> tuple[Array, Array]:
    """w and ν of H w + Jᵀν = −b, J_I w = −r_I."""
    backend = local.backend
    xp, n, J = backend.xp, local.H.shape[-1], local.J
    mask = backend.astype(held, J.dtype)
    rows = J * mask[..., None]
    eye = xp.eye(J.shape[-2], dtype=J.dtype, device=backend.device(J))
    top = xp.concat([local.H, xp.matrix_transpose(rows)], axis=-1)
    matrix = xp.concat([top, xp.concat([rows, (1 - mask)[..., None] * eye], axis=-1)], axis=-2)
    right = -backend.concat([b, r * mask])
    found = backend.lu_solve(backend.lu_factor(matrix), right[..., None], False)[..., 0]
    found = backend.astype(found, J.dtype)
    return found[..., :n], found[..., n:]


def _pivoted(local: _Local, b: Array, r: Array, s: _Set) -> _Set:
    """One change of the set: a weak constraint leaves, or a violated one joins, in place of one that it depends on."""
    xp, J = local.backend.xp, local.J
    w, nu = _rates(local, b, r, s.held)
    length = (item_norm(xp, w) + item_norm(xp, b))[..., None]  # what w is where nothing holds it is of the size of b
    weak = s.held & ~local.equality & (s.multipliers <= local.tolerance * local.force)
    back = xp.where(weak, -nu, xp.zeros_like(nu))
    leaves, most = _first(xp, back)
    leaving = most > local.tolerance * length
    rate = times(J, w) + r
    side = xp.where(local.equality & (rate < 0), -xp.ones_like(rate), xp.ones_like(rate))
    share = side * rate / divisor(xp, length + xp.abs(r))
    joins, over = _first(xp, xp.where(local.near & ~s.held, share, -xp.ones_like(share)))
    joining = ~leaving & (over > local.tolerance)
    sign = xp.sum(xp.where(joins, side, xp.zeros_like(side)), axis=-1, keepdims=True)
    row = sign * xp.sum(xp.where(joins[..., None], J, xp.zeros_like(J)), axis=-2)
    a = xp.where(s.held, local.combination(s.held, row), xp.zeros_like(rate))
    rest = row - times(xp.matrix_transpose(J), a)
    dependent = xp.sum(rest * rest, axis=-1, keepdims=True) <= local.rank
    movable = s.held & ~local.equality & (a > local.tolerance)
    ahead = s.multipliers + AHEAD * xp.where(s.held, nu, xp.zeros_like(nu))
    ratio = xp.where(movable, ahead / divisor(xp, xp.where(movable, a, xp.ones_like(a))), xp.full_like(a, float("inf")))
    out, _ = _first(xp, -ratio)
    stuck = joining & dependent & ~xp.any(movable, axis=-1, keepdims=True)
    amount = xp.sum(xp.where(out & movable, s.multipliers / divisor(xp, a), xp.zeros_like(a)), axis=-1, keepdims=True)
    swap = joining & dependent & ~stuck
    multipliers = s.multipliers + xp.where(
        swap, amount * (xp.where(joins, sign, xp.zeros_like(a)) - a), xp.zeros_like(a)
    )
    held = xp.where(leaving, s.held & ~leaves, s.held)
    held = xp.where(joining & ~stuck, held | joins, held) & ~(swap & out)
    multipliers = xp.where(held, multipliers, xp.zeros_like(multipliers))
    finite = xp.all(xp.isfinite(w), axis=-1) & xp.all(xp.isfinite(nu), axis=-1)
    good = s.good & ~stuck[..., 0] & finite
    going = s.going[..., None]
    return _Set(
        xp.where(going, held, s.held), xp.where(going, multipliers, s.multipliers),
        s.going & good & (leaving | joining)[..., 0], xp.where(s.going, good, s.good), s.count + 1,
    )  # fmt: skip
