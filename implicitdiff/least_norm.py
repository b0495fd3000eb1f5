"""The derivative of *the* solution of least norm, where A is singular and the null space moves with θ.

Let A(θ) be symmetric, of constant rank, and the same for all y (F is linear in y), and y = A⁺c the solution of least
norm. −A⁺Bθ̇ has no part in the null space N of A, and dy has one, since y stays orthogonal to a null space that turns:

    dy = −A⁺Bθ̇ + P_N Cθ̇,    Cθ̇ = Ȧ z,    z = A⁺y,

with the projector P_N = I − A⁺A on N. F(y, θ) = A y − c gives C as the change of B between y and y + z. So one system
does,

    dy = −A⁺(B + AC)θ̇ + Cθ̇,        and in reverse    −Bᵀu + Cᵀ(v − Au),   u = A⁺v.

Where y is not of least norm, or A is another one at y + z, there is no such solution, and −A⁺Bθ̇ is what is left.

References
----------
G. H. Golub, V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 10 (1973) 413-432. DOI 10.1137/0710036
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, item_norm
from implicitdiff.certificate import at_another
from implicitdiff.tolerances import LEAST_NORM

if TYPE_CHECKING:
    from implicitdiff.rules import Rules

__all__ = ["LeastNorm", "returned", "turned"]


class LeastNorm:
    """C at a point.

    Parameters
    ----------
    rules : Rules
        At y, on flat vectors.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self.backend = rules, rules.point.backend
        self.xp = self.backend.xp
        self.z = self.backend.detached(rules.prepared.solve(rules.point.y.vector).x)

    @cached_property
    def there(self) -> Rules:
        """The rules at y + z."""
        return at_another(self.rules, -self.z)

    @cached_property
    def applies(self) -> Array:
        """Items in which y is of least norm, and A does not depend on it."""
        A, y, xp = self.rules.maps.A, self.rules.point.y.vector, self.xp
        level = max(LEAST_NORM.at(xp, y.dtype), 1e3 * A.accuracy)
        x = self.backend.space(y).probe()
        image = A.matvec(x)
        least = item_norm(xp, y - A.matvec(self.z)) <= level * item_norm(xp, y)
        return least & (item_norm(xp, self.there.maps.A.matvec(x) - image) <= level * item_norm(xp, image))

    def changed(self, of: Callable[[Rules], Array]) -> Array:
        """What a product with B, or Bᵀ, changes by."""
        there, here = of(self.there), of(self.rules)
        return self.xp.where(self.applies[..., None], there - here, self.xp.zeros_like(here))

    def after(self, b: Array) -> Array:
        """Return b, so that what is solved with it is solved after z: calls of LAPACK must not run side by side."""
        return b + self.xp.where(self.xp.isfinite(self.z), 0 * self.z, self.xp.zeros_like(self.z))


def turned(rules: Rules, image: Callable[[Rules], Any]) -> tuple[Any, Any]:
    """What B makes of a vector, with A C of it; and C of it: 0 where there is no such thing."""
    b = image(rules)
    if not rules.follows:
        return b, 0
    change = rules.least_norm.changed(image)
    return b + rules.prepared.operator.matvec(change), change


def returned(rules: Rules, v: Any, u: Any) -> Any:
    """Cᵀ(v − A u)."""
    rest = v - rules.prepared.operator.rmatvec(u)
    return rules.least_norm.changed(lambda at: at.maps.B.rmatvec(rest))
