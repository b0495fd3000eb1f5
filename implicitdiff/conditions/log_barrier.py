"""Inequalities by a logarithmic barrier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicitdiff.arrays import Array, any_true, item_numbers
from implicitdiff.conditions.active_set import names
from implicitdiff.conditions.base import Findings, Maps, check_callables
from implicitdiff.conditions.constrained import Constrained
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import InfeasibleError, InputError
from implicitdiff.namespaces import namespace
from implicitdiff.operator import Operator
from implicitdiff.pytree import flatten

__all__ = ["LogBarrier"]


@dataclass(frozen=True)
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

    def __init__(
        self, f: Any, ineq: Any = None, t: float = 1.0, *, eq: Any = None, multipliers: Any = None,
        route: str = "auto", active_tol: float | None = None,
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

    def routed(self, solver: Any) -> Any:
        return solver if self.eq is None else super().routed(solver)

    @property
    def constraints(self) -> dict[str, Callable[..., Any]]:
        return {} if self.eq is None else {"eq": self.eq}

    def objective(self, lead: int) -> Callable[..., Any]:
        f, ineq, t = self.f, self.ineq, self.t

        def value(y: Any, theta: Any, *args: Any) -> Any:
            total = t * f(y, theta, *args)
            for g in flatten(ineq(y, theta, *args)).leaves:
                xp = namespace(g)
                logs = xp.log(-g)
                total = total - (xp.sum(logs, axis=tuple(range(lead, logs.ndim))) if logs.ndim > lead else logs)
            return total

        return value

    def maps(self, point: Point) -> Maps:
        values = point.raveled_function(self.ineq, "ineq")(point.y.vector, point.theta.vector)
        outside = ~(values < 0)
        if self.eq is not None:
            maps = super().maps(point)
        else:
            lead = 0 if point.backend.vmap is not None else len(point.items)
            maps = Stationary(self.objective(lead)).maps(point)
        inside = ~point.backend.xp.any(outside, axis=-1)
        found = maps.findings or Findings(inside, inside, None)
        return maps._replace(findings=Findings(found.usable & inside, found.quiet & inside, (found.details, outside)))

    def tell(self, findings: Findings, batched: bool) -> tuple[Exception | None, list[str]]:
        found, outside = findings.details
        xp = namespace(outside)
        if any_true(xp, outside):
            where = f"items {item_numbers(xp, xp.any(outside, axis=-1))}: " if batched else ""
            return InfeasibleError(
                f"{where}{_inequalities(xp, outside)} is not negative: y is not inside of the barrier.\n"
                "Likely cause: y is the constrained minimum, not that of t f - sum log(-ineq); or ineq has the other "
                "sign.\nNext: minimise the barrier function for this t, or use KKT."
            ), []
        return super().tell(findings._replace(details=found), batched) if found is not None else (None, [])

    def diagnose(self, findings: Findings, error: Exception, operator: Operator) -> Exception:
        found = findings.details[0]
        return error if found is None else super().diagnose(findings._replace(details=found), error, operator)


def _inequalities(xp: Any, mask: Array) -> str:
    return names(xp, mask, xp.zeros_like(mask))
