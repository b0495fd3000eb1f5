"""Constrained minima: the Karush-Kuhn-Tucker conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicitdiff.conditions.base import Function, check_callables
from implicitdiff.conditions.constrained import Constrained, Route
from implicitdiff.errors import InputError

__all__ = ["KKT"]


@dataclass(frozen=True, eq=False, repr=False)
class KKT(Constrained):
    """A solution y of min f(y, θ) subject to eq(y, θ) = 0 and ineq(y, θ) <= 0.

    With the Lagrangian 𝓛 = f + λᵀh + μᵀg, h = 0, g <= 0, μ >= 0, the derivative solves

        [[H, Jᵀ], [J, 0]] (dy, dz) = −(∂²𝓛/∂θ∂y, ∂c/∂θ) dθ,   H = ∂²𝓛/∂y²,   J = ∂c/∂y,

    where c holds the equalities and those inequalities that are active, and z their multipliers. What y violates, and
    active constraints with linearly dependent gradients (LICQ), are errors that name the constraint; a weakly active
    one (multiplier zero) and a multiplier of the wrong sign are warnings. A bound that is infinite, g = −∞, is none.

    Parameters
    ----------
    f : callable
        ``f(y, theta, *args) -> scalar``, to be minimised.
    eq, ineq : callable, optional
        ``h(y, theta, *args)`` and ``g(y, theta, *args)``: an array of constraints of any shape, or a tree of arrays;
        one of the two at least.
    multipliers : pair of arrays, array or callable, optional
        (λ, μ), one entry per constraint, as the solver returned them; the array alone where there is one kind of
        constraint; or ``(y, theta, *args) ->`` the same. By default they are recovered by least squares from
        ∇f = −Σ λ∇h − Σ μ∇g over the active set.
    route : {"auto", "kkt", "schur", "nullspace"}
        How the saddle system is solved. ``"kkt"`` (and "auto"): by ``solver=`` as a whole. ``"schur"``: by
        ``solver=`` for H, and the Schur complement J H⁻¹ Jᵀ; H has to be regular. ``"nullspace"``: by ``solver=`` for
        the reduced Hessian on null(J), the only part of H that has to be regular.
    active_tol : float, optional
        An inequality is active within this distance, ``-g_i <= active_tol R_i`` with R_i = ‖∇g_i ∘ u‖, u the size of
        the coordinates of y; and a multiplier is zero within this part of what moves y by as much. Default 1e-6 in
        double precision, 3e-4 in single.

    Raises
    ------
    InputError
        Where there is no constraint, or an argument is none of these.

    Notes
    -----
    The Jacobian J of the constraints is held as a matrix, (k, n) for all k of them, and multipliers cost k³ operations.

    References
    ----------
    A. V. Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Program. 10 (1976)
    287-311. DOI 10.1007/BF01580677
    S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
    optimization", 2016. arXiv:1607.05447

    Examples
    --------
    The point of the line y₁ + y₂ = θ that is next to the origin is (θ, θ) / 2:

    >>> import numpy as np
    >>> from implicitdiff import KKT, implicit_jacobian
    >>> line = KKT(lambda y, theta: (y**2).sum(), eq=lambda y, theta: y.sum() - theta)
    >>> np.round(implicit_jacobian(line, np.array([1.0, 1.0]), np.array(2.0)), 6)
    array([0.5, 0.5])
    """

    f: Callable[..., Any]
    eq: Callable[..., Any] | None
    ineq: Callable[..., Any] | None
    multipliers: Any
    route: str
    active_tol: float | None

    def __init__(
        self, f: Callable[..., Any], *, eq: Function = None, ineq: Function = None, multipliers: Any = None,
        route: Route = "auto", active_tol: float | None = None,
    ) -> None:  # fmt: skip
        if not callable(f):
            raise InputError(f"f is {type(f).__name__}; expected a callable f(y, theta, *args) -> scalar.")
        check_callables(eq=eq, ineq=ineq)
        if eq is None and ineq is None:
            raise InputError("KKT needs eq or ineq; without constraints use Stationary(f).")
        fields = {"f": f, "eq": eq, "ineq": ineq, "multipliers": multipliers, "route": route, "active_tol": active_tol}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_options()

    def objective(self, lead: int) -> Callable[..., Any]:
        return self.f
