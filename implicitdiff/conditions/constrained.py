"""What the conditions with constraints share: the saddle system of the Lagrangian, reduced to the active set.

With 𝓛(y, z, θ) = f + zᵀc, c = (h, g) and z = (λ, μ), a solution makes 𝓛 stationary over Y = (y, z), as far as c is
active. So the system is that of a stationary point in Y: its matrix is the Hessian of 𝓛,

    K = [[H, Jᵀ], [J, 0]],   H = ∂²𝓛/∂y²,   J = ∂c/∂y,

and its right-hand side B = (∂²𝓛/∂θ∂y, ∂c/∂θ). Two things are done to it, both by a diagonal W = diag(I, w):

- w_i = 0 for a constraint that is not active, with −h on the diagonal of K in its place: it drops out, and every item
  of a batch keeps its size;
- otherwise w_i brings the row of J to the size h of H. Multipliers are then forces in the units of f, whatever the
  units of c, and the conditioning of K is that of the problem. It is a power of two: nothing is rounded.

The solution's part for y is not touched by W. A constraint with the value −inf, an infinite bound, is taken out of c.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from implicitdiff.arrays import Array, listed, named_items
from implicitdiff.conditions import active_set
from implicitdiff.conditions.active_set import ActiveSet, Limits
from implicitdiff.conditions.base import Condition, Maps, Observations, finite_part
from implicitdiff.conditions.constraint import Constraint
from implicitdiff.conditions.degenerate import selected
from implicitdiff.conditions.lagrangian import FirstOrder, Lagrangian, Objective
from implicitdiff.conditions.multipliers import as_vector
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.reduced import Choices, reduced
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.conditions.units import Units, units_at
from implicitdiff.errors import (
    DegeneracyWarning,
    InfeasibleError,
    InputError,
    NotPositiveDefiniteError,
    QualificationError,
    SingularError,
    UnknownNameError,
)
from implicitdiff.linalg.operator import Operator
from implicitdiff.mode import Mode
from implicitdiff.namespaces import item_sum, namespace
from implicitdiff.pytree import flatten
from implicitdiff.ravel import Raveler
from implicitdiff.solvers.saddle import NullSpace, Schur
from implicitdiff.tolerances import LARGEST

__all__ = ["ROUTES", "Constrained", "Degenerate", "Route"]

Route: TypeAlias = Literal["auto", "kkt", "schur", "nullspace"]
ROUTES = get_args(Route)
Degenerate: TypeAlias = Literal["raise", "select"]
DEGENERATE = get_args(Degenerate)


class Constrained(Condition):
    """Base of the conditions with constraints; subclasses are frozen dataclasses with these fields."""

    eq: Callable[..., Any] | None
    ineq: Callable[..., Any] | None
    multipliers: Any
    route: str
    active_tol: float | None
    degenerate: str = "raise"

    per_item: ClassVar[tuple[str, ...]] = ("multipliers",)

    @property
    def has_matrix(self) -> bool:
        return True

    @property
    def arrays(self) -> dict[str, Any]:
        return {} if self.multipliers is None or not self._of_one_point else {"multipliers": self.multipliers}

    @property
    def _of_one_point(self) -> bool:
        """Whether multipliers are those of one point."""
        return not (callable(self.multipliers) or isinstance(self.multipliers, str))

    def without_bounds(self, theta: Any) -> Any:
        return finite_part(theta.backend.xp, theta.vector)

    def routed(self, solver: Any) -> Any:
        """Return the solver for the saddle system: through its blocks, where the route says so."""
        return {"schur": Schur, "nullspace": NullSpace}.get(self.route, lambda inner: inner)(solver)

    def _check_options(self) -> None:
        if self.route not in ROUTES:
            raise UnknownNameError(f"route = {self.route!r}: expected one of {', '.join(ROUTES)}.")
        if isinstance(self.multipliers, str) and self.multipliers != "aux":
            raise UnknownNameError(f"multipliers = {self.multipliers!r}: expected numbers, a callable, or 'aux'.")
        if self.degenerate not in DEGENERATE:
            raise UnknownNameError(f"degenerate = {self.degenerate!r}: expected one of {', '.join(DEGENERATE)}.")
        if self.active_tol is not None and not 0 < self.active_tol < 1:
            raise InputError(f"active_tol = {self.active_tol!r}: expected a number between 0 and 1.")

    # -- the problem, for subclasses to say --------------------------------------------------------------
    @property
    def constraints(self) -> tuple[Any, ...]:
        """The constraints as they were given, of either kind."""
        return tuple(Constraint(name, name, f) for name, f in (("eq", self.eq), ("ineq", self.ineq)) if f is not None)

    def constraints_at(self, point: Point) -> list[Constraint]:
        """The constraints at a point, equalities first."""
        found = [part for c in self.constraints for part in c.at(point)]
        return sorted(found, key=lambda c: c.kind)

    def parts(self, point: Point) -> dict[str, tuple[Callable[[Array, Array], Array], bool]]:
        part = point.part()
        at = [c for c in self.constraints_at(point) if not c.linear]
        found = {c.name: (part.raveled_function(c.fun, c.name), False) for c in at}
        return (
            {"f": (part.scalar_function(self.objective(point.lead).f, "f"), True), **found} if self.constraints else {}
        )

    def objective(self, lead: int) -> Objective:
        """f as a function of trees; ``lead`` is the number of leading axes of items."""
        raise NotImplementedError

    def first_order(self, point: Point) -> FirstOrder:
        """Constraints, their gradients, and ∇f."""
        constraints = self.constraints_at(point)
        if not constraints:
            raise _unconstrained()
        sparse = self.route in {"auto", "kkt"}
        lagrangian = Lagrangian(point, self.objective(point.lead), constraints, sparse=sparse)
        size = lagrangian.slices[-1].stop
        if not size:
            raise _unconstrained()
        _check_size(point, lagrangian.dense)
        return lagrangian.first_order()

    def system(self, point: Point, first: FirstOrder, z: Array) -> Maps:
        """F, A and B of the Lagrangian's stationary point over (y, z), all constraints in it."""
        if first.lagrangian is not None:
            return first.lagrangian.system(first, z)
        constraints = self.constraints_at(point)
        every = lambda y, theta, *args: tuple(c.values(y, theta, *args) for c in constraints)  # noqa: E731
        lagrangian = _lagrangian(self.objective(point.lead).f, every, point.lead)
        raveler = Raveler(point.backend, (point.y.unravel(point.y.vector), z), "y", bool(point.items))
        both = Point(point.backend, raveler, point.theta, point.args, point.mapped)
        return Stationary(lagrangian).maps(both)._replace(checked=())  # nothing was given

    def maps(self, point: Point) -> Maps:
        if point.y.n == 0 and self.constraints:  # there is nothing to constrain
            return Stationary(self.objective(point.lead).f).maps(point)
        first = self.first_order(point)
        if not first.values.shape[-1]:
            raise _unconstrained()
        xp, backend = point.backend.xp, point.backend
        limits = Limits.of(xp, point.y.dtype, self.active_tol)
        equality = xp.broadcast_to(_equalities(point, first), first.values.shape)
        if point.choices is not None:
            return self._nearby(point, first, limits, equality)
        units = units_at(point, first, limits)
        candidate = active_set.candidates(backend, equality, first, units, limits)
        degenerate = xp.zeros_like(candidate)
        if self.degenerate == "select":
            at = functools.partial(self.system, point, first)
            candidate, degenerate = selected(point, first, units, limits, candidate, equality, at)
        given = self._given(point, first)
        if given is not None and backend.mode is not Mode.INLINE:
            candidate = candidate | (_active_by_multiplier(first, given, units, limits) & ~_items(xp, degenerate))
            z, dependent = given, xp.zeros_like(candidate)  # a dependence shows in the solve: see `diagnose`
            if self.degenerate == "select":
                z = xp.where(_items(xp, degenerate), active_set.recovered(backend, first, units, candidate)[0], z)
        else:  # also where the derivative is differentiated again: there z has to follow y and theta
            z, dependent = active_set.recovered(backend, first, units, candidate)
        whole = self.system(point, first, xp.where(candidate, z, xp.zeros_like(z)))
        told = z if given is None else xp.where(_items(xp, degenerate), z, given)
        judged = active_set.classified(xp, equality, first.values, units, limits, candidate, dependent, told)
        judged = active_set.with_piece(xp, judged, candidate, degenerate)
        if given is not None and point.y.n:
            held = xp.where(judged.active, told, xp.zeros_like(told))
            judged = judged._replace(unbalanced=active_set.unbalanced(xp, first, units, limits, held))
        return reduced(point, whole, first.rows, units, judged)

    def _nearby(self, point: Point, first: FirstOrder, limits: Limits, equality: Array) -> Maps:
        """The system with the active set and the multipliers of a point nearby."""
        there: Choices = point.choices
        xp = point.backend.xp
        no = xp.zeros_like(there.active)
        z = xp.where(there.active, there.multipliers, xp.zeros_like(there.multipliers))
        found = ActiveSet(equality, first.values, z, there.active, no, no, no, no, no, no)
        maps = reduced(point, self.system(point, first, z), first.rows, there.units, found)

        def changed() -> Array:
            pull, gap = z * there.units.distance, first.values
            lost = there.active & ~equality & (pull < -limits.active * there.units.force)
            return (lost | (~there.active & (gap > limits.active * there.units.distance)))[..., first.p :]

        return maps._replace(changed=changed)

    def moved(self, choices: Choices | None, step: Array) -> Choices | None:
        """Return the choices with the multipliers at (y, z) − step."""
        if choices is None:
            return None
        k = choices.multipliers.shape[-1]
        z = choices.multipliers - choices.scale * step[..., step.shape[-1] - k :]
        return choices._replace(multipliers=z)

    def name_changes(self, xp: Any, changed: Array) -> str:
        """Name the inequalities that become active or inactive."""
        names = active_set.names(xp, changed, xp.zeros_like(changed))
        return f"the active set changes ({listed(names)})"

    def elsewhere(self) -> Condition:
        """Return the condition without multipliers, which are those of one point."""
        return self if self.multipliers is None or not self._of_one_point else self._with("multipliers", None)

    def received(self, aux: Any) -> Condition:
        """Return the condition with the multipliers that the solver returned, where it is said that it does."""
        if not isinstance(self.multipliers, str):
            return self
        return self._with("multipliers", aux["multipliers"] if isinstance(aux, Mapping) else aux)

    def without_selection(self) -> Condition:
        return self._with("degenerate", "raise")

    def _with(self, name: str, value: Any) -> Condition:
        found = copy.copy(self)
        object.__setattr__(found, name, value)
        return found

    def _given(self, point: Point, first: FirstOrder) -> Array | None:
        """Return the user's multipliers as one vector per item."""
        given = None if isinstance(self.multipliers, str) else self.multipliers
        if callable(given):
            parts = given(point.y.unravel(point.y.vector), point.theta.unravel(point.theta.vector), *point.args)
        else:
            parts = given
        return None if parts is None else as_vector(point, parts, first.p, first.values.shape[-1])

    # -- what was found --------------------------------------------------------------------------------
    def tell(self, observations: Observations, batched: bool) -> tuple[Exception | None, list[str | Warning]]:
        found: ActiveSet = observations.details
        xp = namespace(found.active)

        def which(mask: Array) -> str:
            names = listed(active_set.names(xp, mask, found.equality))
            return f"{named_items(xp, xp.any(mask, axis=-1))}: {names}" if batched and names else names

        if violated := which(found.violated):
            return InfeasibleError(
                f"y violates {violated} by {float(xp.max(xp.abs(found.values[found.violated]))):.3g}.\n"
                "The convention is eq(y, theta) = 0 and ineq(y, theta) <= 0.\n"
                "Next: check the sign of ineq, or solve to a tighter tolerance."
            ), []
        if dependent := which(found.dependent):
            return _unqualified(dependent), []
        messages: list[str | Warning] = []
        if degenerate := which(found.degenerate):
            messages.append(_selected(degenerate))
        if weak := which(found.weak):
            messages.append(
                f"{weak} is weakly active: it holds with equality, and its multiplier is zero.\n"
                "The solution has a kink in theta here; the derivative is that of the side where the constraint is not "
                "active.\nNext: move theta, or use LogBarrier for a smooth neighbour."
            )
        if wrong := which(found.wrong):
            messages.append(
                f"the multiplier of {wrong} is negative (or is not zero, and it is not active): y is no minimum.\n"
                "Likely cause: f is to be maximised (give -f), or ineq has the other sign."
            )
        if which(found.unbalanced):
            messages.append(
                "y is not a solution with the multipliers that are given: they leave ∇f + Jᵀz.\n"
                "They are part of the Hessian of the Lagrangian, so that the derivative is off.\n"
                "Next: check their signs and order, or leave them out: they are recovered from y."
            )
        return None, messages

    def diagnose(self, observations: Observations, error: Exception, operator: Operator) -> Exception:
        found: ActiveSet = observations.details
        xp, text, blocks = operator.backend.xp, "", self.route in {"schur", "nullspace"}
        if blocks or isinstance(error, SingularError):
            rows = operator.in_units().jacobian  # type: ignore[attr-defined]
            dependent = active_set.dependent_rows(operator.backend, rows, found.active)
            if dependent is not None:
                return _unqualified(listed(active_set.names(xp, dependent, found.equality)))
        if self.route == "schur" and isinstance(error, (SingularError, NotPositiveDefiniteError)):
            text = "route='schur' needs a regular Hessian of the Lagrangian; 'nullspace' and 'kkt' do not."
        elif not blocks and isinstance(error, NotPositiveDefiniteError):
            text = "A saddle system never is: use 'lu', 'ldlt' or 'minres' here, or route='nullspace' with this solver."
        elif isinstance(error, SingularError):
            weak = listed(active_set.names(xp, found.weak, found.equality))
            text = "Here: the Hessian of the Lagrangian is singular on the null space of the active constraints"
            text = f"{text}, of which {weak} is weakly active and left out." if weak else f"{text}."
        if text:
            error.args = (f"{error}\n{text}",)
        return error


def _check_size(point: Point, k: int) -> None:
    """Refuse what would not fit: J is dense, and so are the k unit vectors that it is made of."""
    n = point.y.n
    size = k * (k + n) * math.prod(point.items) * point.backend.xp.finfo(point.y.dtype).bits / 8
    if size > LARGEST:
        raise InputError(
            f"{k} constraints on {n} unknowns: their gradients are kept as a dense matrix, and making it takes "
            f"{size / 2**30:.3g} GiB.\n"
            "Next: leave out inequalities that are not active at y, which change nothing; for bounds alone "
            "ProjectedGradient needs no matrix."
        )


def _unconstrained() -> InputError:
    return InputError("eq and ineq hold no constraint: use Stationary(f).")


def _unqualified(names: str) -> QualificationError:
    return QualificationError(
        f"LICQ fails: the gradients of {names} are linearly dependent (or zero) at y.\n"
        "Likely cause: a constraint that is there twice, or more active constraints than variables.\n"
        "Next: drop the redundant ones; check_regularity(condition, y, theta) shows the active set."
    )


def _selected(names: str) -> DegeneracyWarning:
    return DegeneracyWarning(
        f"the point is degenerate: {names} are active with dependent gradients, or with a multiplier of zero.\n"
        "The solution has a kink in theta here; the derivative is that of one side, one element of the generalised "
        "derivative.\n"
        "Next: nothing, in an outer loop that moves on. degenerate='raise' makes dependent gradients an error."
    )


# -- parts ---------------------------------------------------------------------------------------------
def _lagrangian(f: Callable[..., Any], constraints: Callable[..., Any], lead: int) -> Callable[..., Any]:
    """f + zᵀc as a function of ((y, z), θ)."""

    def value(both: Any, theta: Any, *args: Any) -> Any:
        y, z = both
        total, start = f(y, theta, *args), 0
        for c in flatten(constraints(y, theta, *args)).leaves:
            shape = tuple(getattr(c, "shape", ()))
            size = math.prod(shape[lead:])
            total = total + _paired(z[..., start : start + size], c, shape, lead)
            start += size
        return total

    return value


def _paired(z: Any, c: Any, shape: tuple[int, ...], lead: int) -> Any:
    """Σ z_i c_i over all axes but those of the items."""
    if len(shape) == lead:
        return z[..., 0] * c
    xp = namespace(z)
    return item_sum(xp, xp.reshape(z, shape) * c, lead)


def _active_by_multiplier(first: FirstOrder, given: Array, units: Units, limits: Limits) -> Array:
    """Inequalities with a multiplier that is larger than what is left of the constraint, both as distances.

    So much is known where multipliers are given: an interior-point solution stops short of its constraints.
    """
    near = first.values > -100 * limits.violated * units.distance
    return near & (given > 0) & (given * units.give * units.give > -first.values)


def _items(xp: Any, mask: Array) -> Array:
    """Items in which any of a mask holds, (*items, 1)."""
    return xp.any(mask, axis=-1, keepdims=True)


def _equalities(point: Point, first: FirstOrder) -> Array:
    """Mask of the equalities, shape (k,)."""
    return point.backend.xp.arange(first.values.shape[-1], device=point.y.device) < first.p
