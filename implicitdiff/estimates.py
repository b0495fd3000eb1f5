"""What a certificate starts from, and what it comes to: records of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array

if TYPE_CHECKING:
    from implicitdiff.linalg.solve import Solution
    from implicitdiff.rules import Rules

__all__ = ["Estimate", "Product", "Resolving", "nothing"]


class Product(NamedTuple):
    """A derivative as it was made, so that it can be made again by the maps of another point."""

    transposed: bool
    right: Callable[[Rules], tuple[Array, Any]]
    """At a point, the right-hand side of the system, and what is added to the derivative beside (∂L/∂θ)."""
    b: Array
    """The right-hand side that it was."""
    solution: Solution
    value: Array
    """−Bᵀu or w, raveled: (*rhs, *items, m or n)."""
    tree: Callable[[Array], Any]
    """Turns that into what is handed out."""
    beside: Any = 0
    """What is added to it (∂L/∂θ)."""
    loss: Callable[[Rules], Array] | None = None
    """L at a point, where there is a loss."""

    @property
    def total(self) -> Array:
        """The derivative."""
        return self.beside + self.value


class Resolving(NamedTuple):
    """A correction on its way to where the derivative sees it."""

    w: Array
    usable: Array
    level: Array
    """Part of it that a derivative should see."""
    open: Array
    """Items where it does not."""
    spent: Array
    count: Any


class Estimate(NamedTuple):
    """What was found, per item: arrays only, so that it may leave a compiled program."""

    absolute: Array
    relative: Array
    inner: Array
    linear: Array
    differences: Array
    rounding: Array
    approximation: Array
    """What it costs that another matrix than A was solved with (Gauss-Newton, damping)."""
    contraction: Array
    adjoint_contraction: Array
    trusted: Array
    usable: Array
    """Whether the two systems could be solved."""
    products: Array
    correction: Any
    """Like the derivative; None where it was not computed (of a Jacobian, by probes)."""
    value: Array | None
    """L(ŷ) − ûᵀF, where there is a loss."""
    y: Any
    """y⁺, like y."""
    changed: Array | None
    """Of constraints or coordinates, which change sides between ŷ and y⁺, (*items, k)."""


def nothing(rules: Rules, product: Product) -> Estimate:
    """Return the estimate for a derivative without entries."""
    p = rules.point
    xp = p.backend.xp
    zero = xp.zeros(p.items, dtype=p.y.dtype, device=p.y.device)
    value = None if product.loss is None else product.loss(rules)
    correction = product.tree(xp.zeros_like(product.value))
    numbers: list[Array] = [zero] * 9
    rest = zero == 0, zero == 0, xp.astype(zero, xp.int32), correction, value, p.y.unravel(p.y.vector), None
    return Estimate._make((*numbers, *rest))
