"""What is made of the diagnostics of a derivative: errors, warnings, or nothing."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array, any_true, around, item_numbers, named_items, to_python
from implicitdiff.curvature import tell_kind
from implicitdiff.errors import (
    AccuracyWarning,
    DerivativeError,
    NonFiniteError,
    NonFiniteProductError,
    NotASolutionWarning,
    RegularityWarning,
    SolveError,
    SolveWarning,
)
from implicitdiff.failures import explain
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.outcome import warn
from implicitdiff.ravel import Raveler
from implicitdiff.tolerances import is_double

__all__ = [
    "check_loss",
    "error_from",
    "independent",
    "loss_independent",
    "reject_non_finite",
    "warn_not_solution",
]


def reject_non_finite(problem: Any, raveler: Raveler, vector: Any, name: str) -> None:
    """Raise for an input that holds NaN or Inf; in a batch that need not raise, warn or stay quiet."""
    where = name + raveler.bad_leaf(vector).removeprefix(raveler.name)
    error = NonFiniteError(f"{where} holds NaN or Inf.\nNext: check what produced it; a diverged solver often has.")
    if problem.settings.on_failure == "raise" or not raveler.items:
        raise error
    if problem.settings.on_failure == "warn":
        warn(str(error), SolveWarning)


def error_from(diagnostics: Any, rules: Any, solver: str, mode: str = "") -> SolveError | None:
    """Turn the diagnostics into the error that has to be settled, if any; warn where y is not a solution.

    Parameters
    ----------
    diagnostics : Diagnostics
        With values.
    rules : Rules
        At the same point; asked for more only where something is wrong.
    solver : str
        Name of the method that was used.
    mode : str
        Of the rules: whether the system was that of a cotangent.
    """
    xp = rules.point.backend.xp
    error = _observations_error(diagnostics, rules)
    if error is not None:
        return error
    if any_true(xp, diagnostics.zero_product) and not any_true(
        xp, diagnostics.solution.failed
    ):  # else A is what is to be told
        _check_dependence(rules)
    good = diagnostics.inputs  # the others have been told already
    if not rules.solution_warned and any_true(xp, diagnostics.step.unsolved & good):
        rules.solution_warned = True  # once for a point
        warn_not_solution(xp, diagnostics.step, rules.point.y)
    right = _product_error(rules.point, diagnostics.right | ~good, _right_name(rules))
    if right is not None:
        return right
    residual = _product_error(rules.point, diagnostics.step.finite | ~good, "F(y, theta)")
    if residual is not None:
        return residual
    failed = diagnostics.solution.failed & good
    if any_true(xp, failed):
        gauge = rules.condition.singular == "gauge" and _is_reverse(rules, mode)
        error = explain(rules.prepared.operator, diagnostics.solution, solver, gauge=gauge)
        if diagnostics.observations is not None:
            return rules.condition.diagnose(diagnostics.observations, error, rules.prepared.operator)
        return error
    _look_at_curvature(diagnostics, rules)
    _tell_accuracy(diagnostics, rules)
    return _product_error(rules.point, diagnostics.image | ~good, "mixed_vjp (Bᵀ u)")


def _is_reverse(rules: Any, mode: str) -> bool:
    """Whether a mode of the rules solves for a cotangent."""
    if mode == "jacobian":
        return bool(rules.point.theta.n > rules.point.y.n)
    return mode in {"vjp", "gradient", "pullback", "solve_adjoint"}


def _look_at_curvature(diagnostics: Any, rules: Any) -> None:
    """Warn, once for a point, where y is not the kind of stationary point that it is said to be."""
    suspect = diagnostics.suspect
    if suspect is not None and not rules.curved and any_true(rules.point.backend.xp, suspect & diagnostics.inputs):
        rules.curved = True
        tell_kind(rules.condition.point_kind, rules.prepared.operator, diagnostics.inputs)


def _tell_accuracy(diagnostics: Any, rules: Any) -> None:
    """Warn, once for a point, where the condition number leaves few digits of what rounding left of A."""
    xp, unsure = rules.point.backend.xp, diagnostics.uncertain
    if unsure is None or rules.unsure or not any_true(xp, unsure & diagnostics.inputs):
        return
    rules.unsure, op = True, rules.prepared.operator
    error = float(xp.max(diagnostics.solution.uncertainty(xp, op.rounding)))
    which = f" in {named_items(xp, unsure)}" if rules.point.items else ""
    single = "" if is_double(float(xp.finfo(op.dtype).eps)) else "in double precision (float64), "
    warn(
        f"the derivative may be off by up to about {3 * error:.1%}{which}: {op.label} has a condition number of about "
        f"{error / op.rounding:.1g}, and is known to {op.rounding:.1g} by rounding.\n"
        f"Next: compute {single}scale or regularise the problem, or add damping.",
        AccuracyWarning,
    )


def _observations_error(diagnostics: Any, rules: Any) -> SolveError | None:
    """Warn about what the condition saw at the point, once; return the error where no derivative exists."""
    observations = diagnostics.observations
    if observations is None or not any_true(rules.point.backend.xp, diagnostics.inputs & ~observations.quiet):
        return None
    error, warnings = rules.condition.tell(observations, bool(rules.point.items))
    if not rules.warned:
        rules.warned = True
        for message in warnings:
            warn(str(message), type(message) if isinstance(message, Warning) else RegularityWarning)
    return error


def _right_name(rules: Any) -> str:
    return "the gradient of outer" if "outer" in rules.kinds else "mixed_jvp (B t)"


def _product_error(point: Any, finite: Array, what: str) -> SolveError | None:
    """Return the error for a product that holds NaN or Inf, None where it is finite."""
    xp = point.backend.xp
    if not any_true(xp, ~finite):
        return None
    items = f"{named_items(xp, ~finite)}: " if point.items else ""
    return NonFiniteProductError(
        f"{items}{what} holds NaN or Inf, although y and theta are finite.\n"
        "Likely cause: a derivative that does not exist at this point (a square root or a log at 0).\n"
        "Next: evaluate that product at (y, theta), and smooth the function there."
    )


def _check_dependence(rules: Any) -> None:
    """Raise where the product with B vanishes because F does not see θ at all.

    A derivative that happens to be zero is fine, so F itself is asked: at another θ, is it the same to the bit,
    here and at another y? (y = 0 may be a solution for every θ, and then F(0, θ) tells nothing.)
    """
    p, at = rules.point, rules.maps.at
    if 0 in (p.theta.n, p.y.n, *p.items):
        return
    if at is not None and not _sees_theta(p, at):
        raise independent("it is the same to the last bit at another theta")
    # by differences ∇f is not the same to the last bit, since their steps look at θ, too; but f is
    f = next((c.values for c in rules.maps.checked if c.solved == 0), None)
    if f is not None and not _sees_theta(p, f):
        raise independent("f is the same to the last bit at another theta")


def _sees_theta(point: Any, function: Any) -> bool:
    """Whether a function changes with θ in an entry that is finite, at y or near it."""
    xp, y, theta = point.backend.xp, point.y.vector, point.theta.vector
    for near in (y, *around(point.y.space, y)):
        here = _numbers(xp, function(near, theta))
        for aside in around(point.theta.space, theta):
            there = _numbers(xp, function(near, aside))
            if any(any_true(xp, xp.isfinite(a) & (a != b)) for a, b in zip(here, there, strict=True)):
                return True
    return False


def _numbers(xp: Any, found: Any) -> list[Array]:
    """Arrays of a result; what a function returns may be a buffer that its next call fills again."""
    leaves = found.leaves if is_tree_vector(found) else [found]
    return [xp.asarray(leaf, copy=True) for leaf in leaves]


def check_loss(point: Any, loss: Any) -> None:
    """Raise for a loss whose gradient vanishes because it uses neither y nor θ of its arguments.

    A loss at its own stationary point (a perfect fit) is fine: it is another number at another y.
    """
    if 0 in (point.y.n, *point.items):
        return
    y, theta, xp = point.y.vector, point.theta.vector, point.backend.xp
    nears = around(point.y.space, y)
    asides = around(point.theta.space, theta) if point.theta.n else [theta]
    here, near = xp.asarray(loss(y, theta), copy=True), nears[0]
    places = [(z, asides[0]) for z in (near, near + near - y, -near, 3 * near, *nears[1:])]
    for there in (*places, *((near, aside) for aside in asides[1:])):
        if any_true(xp, loss(*there) != here):
            return
    raise loss_independent("it is the same to the last bit at other y and theta")


def loss_independent(how: str) -> DerivativeError:
    """Build the error for a loss that does not see its arguments."""
    return DerivativeError(
        f"outer does not depend on y or theta: {how}.\n"
        "Likely cause: it uses a y from the enclosing scope (a closure) instead of its arguments.\n"
        "Next: write it as outer(y, theta) and use those."
    )


def independent(how: str) -> DerivativeError:
    """Build the error for an F that does not see theta."""
    return DerivativeError(
        f"F does not depend on theta: {how}.\n"
        "Likely cause: the function uses a theta from the enclosing scope (a closure) instead of its argument.\n"
        "Next: write it as f(y, theta, *args) and use that theta."
    )


def warn_not_solution(xp: Any, step: Any, raveler: Raveler) -> None:
    """Warn that y is not a solution, with ‖F(y, theta)‖ and the Newton step in the worst coordinate.

    Parameters
    ----------
    xp : module
        Array namespace of the step's fields.
    step : Step
        With values.
    raveler : Raveler
        Of y, for the names of coordinates.
    """
    which, size = "", step.size
    index, delta, value = step.index, step.step, step.value
    if raveler.items:
        bad = item_numbers(xp, step.unsolved)[0]
        which = f" in {named_items(xp, step.unsolved)}"
        size = xp.max(xp.where(step.unsolved, size, xp.zeros_like(size)))
        index, delta, value = (x[bad] for x in (index, delta, value))
    upto = "up to" if raveler.items else "="
    name = raveler.coordinate(int(index), bad if raveler.items else None)
    warn(
        f"y is not a solution{which}: ‖F(y, theta)‖ {upto} {to_python(size):.3g}.\n"
        f"Newton's step from {name} = {to_python(value):.6g} is {-to_python(delta):.3g}: "
        "so far, to first order, is y off there.\n"
        "The derivative is the one at this y; it is off by an amount of first order in that step.\n"
        "Next: solve to a tighter tolerance, or check that the condition matches the solver.",
        NotASolutionWarning,
    )
