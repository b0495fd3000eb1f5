"""Inequalities by a logarithmic barrier."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from implicitdiff.arrays import Array, any_true, listed, named_items
from implicitdiff.conditions.active_set import names
from implicitdiff.conditions.base import Function, Maps, Observations, check_callables
from implicitdiff.conditions.constrained import Constrained, Route
from implicitdiff.conditions.constraint import Constraint
from implicitdiff.conditions.lagrangian import Objective
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import InfeasibleError, InputError
from implicitdiff.linalg.operator import Operator
from implicitdiff.namespaces import constant, item_sum, namespace, without
from implicitdiff.pytree import flatten

__all__ = ["LogBarrier"]


@dataclass(frozen=True, eq=False, repr=False)
class LogBarrier(Constrained):
    """A minimum of t f(y, θ) − Σ log(−g_i(y, θ)), subject to eq(y, θ) = 0 where there are equalities.

    With φ = Σ log(−g_i) the derivative is dy/dθ = −(t f_YY − φ_YY)⁻¹ (t f_XY − φ_XY), Y for y and X for θ. It is smooth
    in θ also where a constraint becomes active. As t grows, y and dy/dθ tend to those of the constrained minimum, in
    the first order in 1/t, where that is regular (see `KKT`).

    Parameters
    ----------
    f : callable
        ``f(y, theta, *args) -> scalar``, to be minimised.
    ineq : callable
        ``g(y, theta, *args)``: an array of constraints of any shape, or a tree of arrays; g < 0 at y.
    t : float
        Weight of f, positive. The distance from the constrained minimum is about 1/t times the multipliers' inverse.
    eq : callable, optional
        ``h(y, theta, *args)``.
    multipliers, route, active_tol
        Of the equalities, as for `KKT`.

    Raises
    ------
    InputError
        Where t is not positive, or an argument is no function.

    References
    ----------
    S. Boyd, L. Vandenberghe, "Convex Optimization", Cambridge University Press, 2004, section 11.2.
    S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
    optimization", 2016. arXiv:1607.05447

    Examples
    --------
    min over y >= 0 of θ y, hence y = 0, from t θ y − log(y), hence y = 1 / (t θ):

    >>> import numpy as np
    >>> from implicitdiff import LogBarrier, implicit_jacobian
    >>> barrier = LogBarrier(lambda y, theta: theta * y, ineq=lambda y, theta: -y, t=10.0)
    >>> theta = np.array(2.0)
    >>> round(float(implicit_jacobian(barrier, 1 / (10 * theta), theta)), 6)  # −1 / (t theta²)
    -0.025
    """

    f: Callable[..., Any]
    ineq: Callable[..., Any]
    t: float
    eq: Callable[..., Any] | None
    multipliers: Any
    route: str
    active_tol: float | None

    _values: ClassVar[Any] = None

    def __init__(
        self, f: Callable[..., Any], ineq: Function = None, t: float = 1.0, *, eq: Function = None,
        multipliers: Any = None, route: Route = "auto", active_tol: float | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("f", f), ("ineq", ineq)):
            if not callable(value):
                raise InputError(f"{name} is {type(value).__name__}; expected a callable {name}(y, theta, *args).")
        check_callables(eq=eq)
        if not t > 0:
            raise InputError(f"t = {t!r}: expected a positive number.")
        fields = {"f": f, "ineq": ineq, "t": float(t), "eq": eq, "multipliers": multipliers, "route": route,
                  "active_tol": active_tol}  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_options()

    @property
    def has_matrix(self) -> bool:
        return self.eq is not None

    @property
    def point_kind(self) -> str | None:
        return None if self.eq is None else "saddle"

    def routed(self, solver: Any) -> Any:
        return solver if self.eq is None else super().routed(solver)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return () if self.eq is None else (Constraint("eq", "eq", self.eq),)

    def objective(self, lead: int) -> Objective:
        f, ineq, t, known = self.f, self.ineq, self.t, self._values

        def value(y: Any, theta: Any, *args: Any) -> Any:
            total, start = t * f(y, theta, *args), 0
            for g in flatten(ineq(y, theta, *args)).leaves:
                xp, shape = namespace(g), tuple(getattr(g, "shape", ()))
                if known is None:
                    parts = -xp.log(-without(xp, g, -math.inf, -1.0))  # an infinite bound is none
                else:
                    size = math.prod(shape[lead:])
                    parts = _like_log(xp, g, known[..., start : start + size].reshape(shape))
                    start += size
                total = total + (item_sum(xp, parts, lead) if len(shape) > lead else parts)
            return total

        return Objective(value)

    def _with_values(self, point: Point, values: Array) -> LogBarrier:
        """Return the condition for one point, without the logarithm, where finite differences may be taken of it."""
        backend = point.backend
        if backend.vmap is not None or any_true(backend.xp, ~(values < 0)):  # the others have autodiff
            return self
        known = copy.copy(self)
        object.__setattr__(known, "_values", values.get() if hasattr(values, "get") else np.asarray(values))
        return known

    def maps(self, point: Point) -> Maps:
        values = point.raveled_function(self.ineq, "ineq")(point.y.vector, point.theta.vector)
        outside = ~(values < 0)
        known = self._with_values(point, values)
        if self.eq is not None:
            maps = super(LogBarrier, known).maps(point)
        else:
            maps = Stationary(known.objective(point.lead).f).maps(point)
        inside = ~point.backend.xp.any(outside, axis=-1)
        found = maps.observations or Observations(inside, inside, None)
        return maps._replace(
            observations=Observations(found.usable & inside, found.quiet & inside, (found.details, outside))
        )

    def tell(self, observations: Observations, batched: bool) -> tuple[Exception | None, list[str | Warning]]:
        found, outside = observations.details
        xp = namespace(outside)
        if any_true(xp, outside):
            where = f"{named_items(xp, xp.any(outside, axis=-1))}: " if batched else ""
            return InfeasibleError(
                f"{where}{_inequalities(xp, outside)} is not negative: y is not inside of the barrier.\n"
                "Likely cause: y is the constrained minimum, not that of t f - sum log(-ineq); or ineq has the other "
                "sign.\nNext: minimise the barrier function for this t, or use KKT."
            ), []
        return super().tell(observations._replace(details=found), batched) if found is not None else (None, [])

    def diagnose(self, observations: Observations, error: Exception, operator: Operator) -> Exception:
        found = observations.details[0]
        return error if found is None else super().diagnose(observations._replace(details=found), error, operator)


def _like_log(xp: Any, g: Any, known: np.ndarray) -> Any:
    """Return what has the value 0, and the first and second derivatives of −log(−g), where g has the known value.

    Near a bound the logarithm is far from a parabola within the step of a finite difference, and g is not. With c the
    known value, −log(−g) has the derivatives −1/c and 1/c² by g, as −(g − c)/c + (g − c)²/(2c²) has.
    """
    infinite = known == -math.inf  # no bound at all
    finite = np.where(infinite, -1.0, known)
    if not hasattr(g, "dtype"):
        g = -1.0 if infinite else g
        c: Any = float(finite)
    else:
        c, g = constant(xp, g, finite), without(xp, g, -math.inf, -1.0)
    u = (g - c) / c
    return u * u / 2 - u


def _inequalities(xp: Any, mask: Array) -> str:
    return listed(names(xp, mask, xp.zeros_like(mask)))
