"""BiCGSTAB for general A: two products an iteration, and seven vectors however long it takes.

With a shadow residual r̃, M ≈ A⁻¹ on the right, and starting from p = r::

    v = A M p       α = r̃ᵀr / r̃ᵀv       s = r − α v
    t = A M s       ω = tᵀs / tᵀt        x += α M p + ω M s      r = s − ω t
    β = (r̃ᵀr₊ / r̃ᵀr) (α / ω)             p = r₊ + β (p − ω v)

r̃ᵀr or r̃ᵀv may vanish although the system is regular (as r̃ᵀv does at once where A is skew-symmetric and r̃ = r): the
recurrence then starts again from where it is, with another r̃; and so where either is nearly zero, and the step α so
long that it would cost half of the digits (A = S + δI with S skew-symmetric is of condition 1, and α is 1/δ). Where t
is nearly orthogonal to s, ω would be next to nothing, and what is divided by it lost: it is kept as large as if the
angle were 45 degrees.

References
----------
H. A. van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of nonsymmetric
linear systems", SIAM J. Sci. Stat. Comput. 13 (1992) 631-644. DOI 10.1137/0913035
G. L. G. Sleijpen, H. A. van der Vorst, "Maintaining convergence properties of BiCGstab methods in finite precision
arithmetic", Numer. Algorithms 10 (1995) 203-223. DOI 10.1007/BF02140769 (the lower bound on ω)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, needed
from implicitdiff.outcome import Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start, accuracy
from implicitdiff.tolerances import GROWTH, ROUNDED

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["BiCGSTAB"]

COSINE = 0.7
"""Least cosine of the angle between t and s for which ω is made."""
BREAKDOWNS = 3
"""One after the other, each with another shadow residual, after which it is given up."""


class _State(NamedTuple):
    x: Array
    r: Array
    shadow: Array
    p: Array
    v: Array
    rho: Array  # 0 where the recurrence starts
    step: Array  # α/ω of the iteration before
    omega: Array
    broken: Array  # breakdowns, one after the other
    active: Array
    status: Array
    iterations: Array
    matvecs: Any
    operator_norm: Array
    least: Array  # smallest ‖A v‖ / ‖v‖ that was met
    size: Array  # ‖r‖
    shadow_size: Array


class _Half(NamedTuple):
    x: Array
    s: Array
    p: Array
    v: Array
    rho: Array
    alpha: Array
    go: Array
    broke: Array
    finite: Array
    seen: Array  # ‖v‖ / ‖M p‖


@dataclass(frozen=True, eq=False, repr=False)
class BiCGSTAB(Krylov):
    """Stabilised bi-conjugate gradients: any A, products with A only (not with Aᵀ), little memory.

    The options are those of every iterative method: ``rtol`` (default 1e-10 in double precision, 1e-5 in
    single; relative to ‖b‖, checked on the true residual), ``maxiter`` (of two products each; default 10 n, within
    1 000 to 100 000), ``preconditioner`` (≈ A⁻¹, on the right), ``damping`` (δ of A + δI).

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.array([[0.0, 1.0], [2.0, 1.0]])
    >>> np.round(linear_solve(A, np.array([1.0, 1.0]), solver="bicgstab"), 6) + 0.0
    array([0., 1.])
    """

    name: ClassVar[str] = "bicgstab"
    stall: ClassVar[float] = 0.9  # ‖r‖ does not fall steadily: another start may gain little, and the next one much

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run BiCGSTAB from x with residual r until the recursive residual reaches the target."""
        backend, zero, count = state.operator.backend, space.scalar(0.0), space.counter()
        size = space.norm(start.r)
        first = _State(
            start.x, start.r, space.copy(start.r), space.zeros(), space.zeros(), zero, zero, zero, count, start.active,
            count, count, 0, zero, space.scalar(math.inf), size, size,
        )  # fmt: skip
        growth = GROWTH.of(space.eps)
        lost = growth * growth * size

        def step(s: _State) -> _State:
            half = _first_half(s, state, space, growth)
            end = _second_half(s, half, state, space, start.target)
            size = space.norm(end.r)
            going = (size > start.target) & (size < lost) & (end.iterations < start.budget) & (end.broken < BREAKDOWNS)
            return end._replace(active=end.active & going, size=size)

        end = backend.while_loop(lambda s: space.any(s.active), step, first, limit=self.most(space.length))
        known = space.isfinite(end.least) & (end.least > 0)
        gain = space.where(known, 1 / space.where(known, end.least, space.scalar(1.0)), zero)
        flat = end.least <= 4 * accuracy(state, space) ** 0.5 * end.operator_norm
        return Cycle(end.x, end.iterations, end.matvecs, end.status, end.operator_norm, flat, gain)


def _first_half(s: _State, state: KrylovState, space: Any, growth: float) -> _Half:
    """Make the BiCG step: x + α M p, with residual s, where that is not ``growth`` times as large as r."""
    zero, one = space.scalar(0.0), space.scalar(1.0)
    rho, started = space.inner(s.shadow, s.r), s.active & (s.rho != 0)
    beta = space.where(started, rho / space.where(started, s.rho, one) * s.step, zero)
    # an item that has stopped keeps what it has, whatever the others do
    p = space.scale(space.where(s.active, beta, one), s.p)
    p = space.axpy(-beta * s.omega, s.v, p)
    p = space.axpy(space.where(s.active, one, zero), s.r, p)
    image = state.preconditioner(p)
    v = space.copy(state.operator.matvec(image))
    denominator, size = space.inner(s.shadow, v), space.norm(v)
    level = ROUNDED * space.eps * s.shadow_size
    finite = space.isfinite(size) & space.isfinite(denominator)
    small = (abs(rho) <= level * s.size) | (abs(denominator) <= level * size)
    broke = s.active & finite & (small | (abs(rho) * size > growth * s.size * abs(denominator)))
    go = s.active & finite & ~broke
    alpha = space.where(go, rho / space.where(go, denominator, one), zero)
    seen = _ratio(space, size, space.norm(image))
    return _Half(
        space.axpy(alpha, image, s.x), space.axpy(-alpha, v, s.r), p, v, rho, alpha, go, broke, finite, seen
    )  # fmt: skip


def _second_half(s: _State, half: _Half, state: KrylovState, space: Any, target: Array) -> _State:
    """Make the step of minimal residual along M s, and see how it ended."""
    zero, one, backend = space.scalar(0.0), space.scalar(1.0), state.operator.backend
    square = space.inner(half.s, half.s)
    moving, x, r, matvecs = half.go & (square > target * target), half.x, half.s, s.matvecs + 1
    omega, seen, finite = zero, half.seen, half.finite
    if needed(backend, moving):
        image = state.preconditioner(half.s)
        t = state.operator.matvec(image)
        omega, norm = _omega(space, t, half.s, square)
        omega, matvecs = space.where(moving, omega, zero), matvecs + 1
        finite = finite & (space.isfinite(norm) | ~moving)
        length = space.sqrt(square) if state.preconditioner.identity else space.norm(image)
        seen = space.where(moving, _ratio(space, norm, length), seen)
        x, r = space.axpy(omega, image, x), space.axpy(-omega, t, r)
    usable = omega != 0
    largest = space.where(s.active, space.maximum(half.seen, seen), zero)
    least = space.where(half.seen < seen, half.seen, seen)
    broken = space.where(half.broke, s.broken + 1, 0 * s.broken)
    shadow, shadow_size = _shadow((s.shadow, s.shadow_size), r, half.broke, broken, space, backend)
    return _State(
        x, r, shadow, half.p, half.v,
        space.where(usable, half.rho, zero), space.where(usable, half.alpha / space.where(usable, omega, one), zero),
        omega, broken, (half.go | half.broke) & finite,
        space.where(s.active & ~finite, int(Status.NON_FINITE), s.status),
        space.where(s.active, s.iterations + 1, s.iterations), matvecs, space.maximum(s.operator_norm, largest),
        space.where(s.active & (least < s.least), least, s.least), s.size, shadow_size,
    )  # fmt: skip


def _ratio(space: Any, a: Array, b: Array) -> Array:
    """‖A v‖ / ‖v‖; infinity where v is zero."""
    return space.where(b > 0, a / space.where(b > 0, b, space.scalar(1.0)), space.scalar(math.inf))


def _omega(space: Any, t: Array, s: Array, square: Array) -> tuple[Array, Array]:
    """ω, not less than at an angle of 45 degrees, and ‖t‖."""
    one, both, tt = space.scalar(1.0), space.inner(t, s), space.inner(t, t)
    safe = space.where(tt > 0, tt, one)
    least = COSINE * space.sqrt(square / safe)
    omega = both / safe
    bounded = space.where(both < 0, -least, least)
    omega = space.where(abs(omega) < least, bounded, omega)
    return space.where(tt > 0, omega, space.scalar(0.0)), space.sqrt(tt)


def _shadow(
    shadow: tuple[Array, Array], r: Array, broke: Array, broken: Array, space: Any, backend: Backend
) -> tuple[Array, Array]:
    """Return another shadow residual where the recurrence broke down: r, and a vector without structure beside.

    With its norm.
    """

    def another(old: tuple[Array, Array]) -> tuple[Array, Array]:
        z = space.probe()
        part = space.norm(r) / space.norm(z)
        part = space.where(broken > 1, -2 * part, part)
        new = space.select(broke, space.axpy(part, z, space.copy(r)), old[0])
        return new, space.where(broke, space.norm(new), old[1])

    found: tuple[Array, Array] = backend.if_any(broke, another, shadow)
    return found
