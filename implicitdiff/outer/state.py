"""The state of a loop: everything that the next step needs, in arrays, and where its solves start."""

from __future__ import annotations

from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor

__all__ = ["BilevelState", "Found", "Past"]


class Past(NamedTuple):
    """The latest θ at which there was a gradient, and the latest differences of θ, y and u."""

    theta: Array
    by_theta: Array
    by_y: Array
    by_u: Array

    def ahead(self, xp: Any, theta: Array) -> Array:
        """Length of the step to θ, in latest steps, as far as it goes that way; between 0 and 2."""
        square = xp.vecdot(self.by_theta, self.by_theta)
        t = xp.vecdot(theta - self.theta, self.by_theta) / divisor(xp, square)
        return xp.clip(xp.where(square > 0, t, xp.zeros_like(t)), 0.0, 2.0)


class Found(NamedTuple):
    """What a schedule finds at the θ of a step: where y and u go, the gradient, and what is known of them."""

    y: Array
    u: Array
    gradient: Array
    value: Array
    error: Array
    """Of the gradient, relative; NaN where nothing was measured."""
    residual: Array
    met: Array
    gradients: Array
    products: Array
    doubt: Array
    scale: Array
    memory: Any
    damping: Array
    share: Any = None
    """Part of the optimizer's step that θ makes; None for all of it."""


class BilevelState(NamedTuple):
    """Where a bilevel loop is. It can be pickled, is a pytree of JAX, and is all that the next step depends on.

    Attributes
    ----------
    y : pytree
        The inner solution at the θ of the latest gradient; the start of the next.
    theta : pytree
        The parameters, after the latest update.
    gradient : pytree, like theta
        The latest: dL/dθ at the parameters before that update.
    inner_gradients, products : int
        Evaluations of F, and products with A, so far.
    step : int
        Outer steps so far.
    value : float
        L at the solution for the θ of the latest gradient, to second order: L(y, θ) − uᵀF.
    gradient_norm : float
        2-norm of the latest gradient.
    error : float
        Its estimated relative error; NaN where nothing was measured.
    residual : float
        ‖F(y, θ)‖ there.
    met : bool
        Whether the latest step came to its tolerance.
    adjoint : array
        The raveled u of Aᵀ u = ∂L/∂y.
    optimizer : pytree
        State of the optimizer.
    damping : float
        δ of A + δI, which the systems of a minimum are solved with where A had negative curvature; 0 where it has not.
    past, doubt, scale, memory : Past, float, float, SequenceState or None
        What the next step starts from, what estimates were wrong by, the size of F at the start of the loop, and what
        solves leave to the next ones. Of `SOBA` and `SABA`, ``scale`` is the step of y, and ``memory`` the table.
    """

    y: Any
    theta: Any
    gradient: Any
    inner_gradients: Any
    products: Any
    step: Any
    value: Any
    gradient_norm: Any
    error: Any
    residual: Any
    met: Any
    adjoint: Any
    optimizer: Any
    past: Past
    doubt: Any
    scale: Any
    memory: Any
    damping: Any
