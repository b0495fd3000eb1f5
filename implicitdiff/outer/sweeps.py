"""Sweeps: corrections of y and of the adjoint in turn, whose changes of the gradient are its certificate.

At (ŷ, û), with g = ∂L/∂θ(ŷ) − B(ŷ)ᵀ û, one sweep solves loosely, to η,

    A(ŷ) δ = F(ŷ),                    y = ŷ − t δ   (t = 1, halved while ‖F‖ grows),
    A(y)ᵀ w = ∂L/∂y(y) − A(y)ᵀ û,     u = û + w,

and g₊ = ∂L/∂θ(y) − B(y)ᵀ u. The change e = ‖g₊ − g‖ is the error of g to first order (see `implicitdiff.certificate`),
so that no product is made for the estimate alone. Of g₊ it is known that a sweep leaves a part max(η, κ) of an error,
κ = ‖F(y)‖/‖F(ŷ)‖; where there were sweeps one after another, the part that was left is seen, e₊/e, and the largest
ratio of what was seen to what was predicted is kept, and forgotten slowly.

Where A of a minimum has negative curvature, as it has along the path of a network's weights, both corrections are made
with A + δI, as in Levenberg and Marquardt's method. δ is found by what fails (`Spot.solve`), and eased as long as
nothing does. The correction of y is a descent direction then: it may raise ‖F‖, so long as it does not go past the
minimum along its line. That of the adjoint leaves δ w of its residual, which later ones take up; the part c of the
residual that is left is held for that of the error, which is c / (1 − c) of its change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, divisor
from implicitdiff.outer.equations import Equations
from implicitdiff.tolerances import DAMPED, EASED, FORGOTTEN, OVERSHOT, RAISED, ROUNDED, SMALLEST_STEP, UNDAMPED

if TYPE_CHECKING:
    from implicitdiff.outer.schedules import Sweep

__all__ = ["Corrected", "adjoint_solved", "begin", "corrected", "newton", "swept"]


DIGIT, MOST_CORRECTIONS = 0.1, 40
"""Relative residual of one correction of the adjoint where more are to follow, and how many there may be."""


class Corrected(NamedTuple):
    """y with F there, u, the gradient that they make, and what it took."""

    y: Array
    u: Array
    F: Array
    size: Array
    """‖F‖."""
    gradient: Array
    change: Array
    """e, of the latest sweep."""
    expected: Array
    """max(η, κ) e: what is left of the error by theory."""
    doubt: Array
    """Largest ratio of an error that was seen to what had been expected of it; 1 or more, infinite before any."""
    gradients: Array
    products: Array
    sweeps: Array
    memory: Any
    """Of the solves."""
    damping: Array
    """δ."""
    going: Array
    """Whether another sweep is wanted."""
    usable: Array
    """Whether the latest solves made steps that lowered ‖F‖, and the error is what it may be."""

    @property
    def error(self) -> Array:
        """Estimated ‖g − g*‖."""
        return self.doubt * self.expected


def begin(
    equations: Equations, start: tuple[Array, Array], theta: Array, past: tuple[Array, Any, Array], *, gradient: bool
) -> Corrected:
    """Look at where a step starts: F, and the gradient by what is there, which takes no product with A.

    ``start`` are y and u, ``past`` the doubt, the memory and the damping.
    """
    (y, u), (doubt, memory, damping) = start, past
    spot, zero, none = equations.at(y, theta), equations.number(0.0), equations.count(0)
    F = spot.residual()
    size = equations.backend.space(F).size(F)
    g = spot.pullback(u, spot.slopes()[1]) if gradient else equations.backend.xp.zeros_like(theta)
    far, yes = zero + float("inf"), ~(size < 0)
    return Corrected(y, u, F, size, g, far, far, doubt, none + 1, none, none, memory, damping, yes, yes)


def newton(equations: Equations, s: Corrected, theta: Array, rtol: Any) -> Corrected:
    """One loose Newton correction of y."""
    backend, xp = equations.backend, equations.backend.xp
    here = equations.at(s.y, theta)
    delta = here.solve(s.F, rtol, s.memory, s.damping, transposed=False)
    step, size = here.rules.restricted(delta.x), backend.space(s.F).size
    damped = (delta.damping > 0) & here.minimum

    def short(F: Array) -> Array:
        """Whether a descent direction was not followed past the minimum along it."""
        if not here.minimum:
            return damped
        slope, end = xp.vecdot(s.F, step), xp.vecdot(F, step)
        return damped & (slope > 0) & (end >= -OVERSHOT * slope)

    def there(t: Array) -> tuple[Array, Array, Array]:
        y = backend.detached(s.y - t * step)
        F = equations.at(y, theta).residual()
        return y, F, size(F)

    def grows(found: Any) -> Any:
        t, (_, F, after), _ = found
        return ~(after <= s.size) & ~short(F) & (t > SMALLEST_STEP)

    one = equations.number(1.0)
    first = one, there(one), equations.count(1)
    _, (y, F, after), count = backend.while_loop(grows, lambda f: (f[0] / 2, there(f[0] / 2), f[2] + 1), first)
    kept = (after <= s.size) | short(F)
    space = backend.space(s.y)
    exact = space.size(step) <= ROUNDED * space.eps * space.size(s.y)  # at a solution, F is rounding
    y, F = backend.space(s.y).select(kept, y, s.y), backend.space(F).select(kept, F, s.F)
    damping = delta.damping
    if here.minimum:  # where no step was short enough, a larger δ makes it shorter and turns it to F
        larger = xp.maximum(RAISED * damping, DAMPED * s.size / divisor(xp, size(delta.x)))
        damping = xp.where(delta.usable & ~(kept | exact) & xp.isfinite(larger), larger, damping)
    return s._replace(
        y=y, F=F, size=xp.where(kept, after, s.size), gradients=s.gradients + count, damping=damping,
        products=s.products + delta.products, memory=delta.memory, usable=s.usable & delta.usable & (kept | exact),
    )  # fmt: skip


def corrected(equations: Equations, s: Corrected, theta: Array, rtol: Any) -> tuple[Corrected, Array, Array, Array]:
    """One loose correction of the adjoint, the gradient, what is rounding in it, what is left, and if δ was small."""
    spot = equations.at(s.y, theta)
    by_y, by_theta = spot.slopes()
    rho = by_y - spot.product(s.u, transposed=True)
    w = spot.solve(rho, rtol, s.memory, s.damping, transposed=True)
    u = equations.backend.detached(s.u + w.x)
    g = spot.pullback(u, by_theta)
    usable = s.usable & w.usable & spot.regular
    space = equations.backend.space(g)
    level = ROUNDED * space.eps * (2 * space.size(by_theta) + space.size(g))
    products = s.products + w.products + 1
    found = s._replace(u=u, gradient=g, products=products, memory=w.memory, damping=w.damping, usable=usable)
    clear = s.damping * space.size(w.x) <= UNDAMPED * space.size(rho)
    return found, level, w.left, clear


def adjoint_solved(equations: Equations, s: Corrected, theta: Array, rtol: Any) -> Corrected:
    """Correct the adjoint until its residual is at a tolerance, and take the gradient."""
    backend, xp = equations.backend, equations.backend.xp
    spot = equations.at(s.y, theta)
    by_y, by_theta = spot.slopes()
    norm, most = backend.space(by_y).size, equations.count(MOST_CORRECTIONS)
    wanted = rtol * norm(by_y)

    def left(u: Array) -> Array:
        return by_y - spot.product(u, transposed=True)

    def body(found: Any) -> Any:
        u, rho, products, memory, damping, usable, count = found
        # a tolerance that is an array, under jit, cannot be an option of a solver: then digit by digit
        ask = DIGIT if backend.traced else min(max(float(wanted) / float(norm(rho)) / 2, spot.least), DIGIT)
        w = spot.solve(rho, ask, memory, damping, transposed=True)
        u, more = backend.detached(u + w.x), w.damping > damping
        damping = xp.where(more, w.damping, EASED * w.damping)
        return u, left(u), products + w.products + 1, w.memory, damping, usable & (w.usable | more), count + 1

    def going(found: Any) -> Array:
        return ~(norm(found[1]) <= wanted) & found[5] & (found[6] < most)

    first = s.u, left(s.u), s.products + 1, s.memory, s.damping, s.usable, equations.count(0)
    u, rho, products, memory, damping, usable, _ = backend.while_loop(going, body, first)
    usable = usable & (norm(rho) <= wanted) & spot.regular
    g, no = spot.pullback(u, by_theta), xp.zeros_like(s.going)
    return s._replace(u=u, gradient=g, products=products, memory=memory, damping=damping, usable=usable, going=no)


def swept(
    equations: Equations, start: Corrected, theta: Array, schedule: Sweep, least: Array, *, inner: Any
) -> Corrected:
    """Sweep until the estimated error of the gradient is below the target, relative to its size.

    ``inner`` takes the place of Newton's correction of y: it lowers ‖F‖ by η. ``least``: sweeps, at least.
    """
    xp, norm = equations.backend.xp, equations.backend.space(theta).size

    def sweep(before: Corrected) -> Corrected:
        start = before._replace(usable=before.usable | True)
        eta = _eta(equations, before, schedule, norm)
        s = newton(equations, start, theta, eta) if inner is None else inner(equations, start, theta, eta * start.size)
        kappa = s.size / divisor(xp, before.size)
        s, level, left, clear = corrected(equations, s, theta, eta)
        change = norm(s.gradient - before.gradient)
        # the error of the gradient before is seen now: was more expected of it, or less?
        seen, ratio = before.sweeps > 0, change / divisor(xp, before.expected)
        # what was seen long ago counts less, but only against what is seen anew
        older = xp.where(before.sweeps == 1, FORGOTTEN * before.doubt, before.doubt)
        known = xp.where(xp.isfinite(older) & (older > 1), older, equations.number(1.0))
        unknown = xp.where(s.usable & (left < 1), change, equations.number(float("inf")))
        left = left / divisor(xp, 1 - left)  # of the change, which is the error less what is left of it
        s = s._replace(
            change=change, expected=xp.maximum(xp.maximum(equations.number(eta), kappa), left) * unknown,
            doubt=xp.where(seen, xp.maximum(known, ratio), before.doubt), sweeps=before.sweeps + 1,
        )  # fmt: skip
        wrong = ~(s.error <= schedule.target * norm(s.gradient)) & ~(change <= level)
        wrong = wrong | ~s.usable | (s.sweeps < least)
        # what curvature far below δ contributes is not seen, so that δ is to be no larger than need be
        damping = xp.where(s.usable, EASED * s.damping, s.damping)
        going = wrong & (s.sweeps < schedule.most)
        infinite = equations.number(float("inf"))
        expected = xp.where(going | clear, s.expected, infinite)
        return s._replace(going=going, usable=~wrong & clear, expected=expected, damping=damping)

    return equations.backend.while_loop(lambda s: s.going, sweep, start)


def _eta(equations: Equations, s: Corrected, schedule: Sweep, norm: Any) -> float:
    """η; or what the target needs, where sweeps follow one another and numbers are seen.

    No less than η²: a Newton step that gained a digit will gain two.
    """
    if equations.backend.traced or not bool((s.sweeps > 0) & equations.backend.xp.isfinite(s.expected)):
        return schedule.eta
    needed = schedule.target * float(norm(s.gradient)) / max(float(s.error), 1e-300)
    return min(schedule.eta, max(needed / 2, schedule.eta**2))
