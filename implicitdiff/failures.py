"""What a failed solve says: what is wrong, the likely cause, and what to try next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, any_true, to_python
from implicitdiff.errors import (
    NonFiniteProductError,
    NotConvergedError,
    NotInvariantError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    PreconditionerError,
    SingularError,
    SolveError,
)
from implicitdiff.outcome import Status, tally
from implicitdiff.tolerances import SAFETY

if TYPE_CHECKING:
    from implicitdiff.linalg.operator import Operator

__all__ = ["explain"]


def explain(operator: Operator, solution: Any, solver: str, *, gauge: bool = False) -> SolveError:
    """Build the error for a solve of which at least one item failed, with the method of that name.

    ``gauge``: it was that of a cotangent, which is not to see the null space of A.
    """
    xp = operator.backend.xp
    codes = xp.asarray(solution.status)
    worst = Status(int(xp.max(codes)))
    kind, says = _TABLE[worst]
    if worst is Status.SINGULAR and _leaks(xp, solution, codes):
        kind, says = (NotInvariantError, _not_invariant) if gauge else (SingularError, _inconsistent)
    if worst not in _NOT_ZERO and _is_zero(operator):
        kind, head, hint = SingularError, *_ZERO
    else:
        head, cause, following = says(operator, solver)
        hint = f"Likely cause: {cause}\nNext: {following}"
    head = head.format(solver=solver, A=operator.label, **_facts(xp, solution, codes, worst))
    items = f"{tally(codes)}.\n" if operator.items else ""
    return kind(f"{items}{head}\n{hint}")


def _facts(xp: Any, solution: Any, codes: Array, worst: Status) -> dict[str, str]:
    here = codes == int(worst)

    def pick(field: Any) -> str:
        if field is None:
            return "unknown"
        values = xp.broadcast_to(xp.asarray(field), codes.shape)
        value = to_python(values if not codes.shape else values[here][0])
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    numbers = {} if solution.rcond is None else {"rcond": pick(solution.rcond)}
    numbers["residual"] = pick(solution.residual)
    return {
        "residual": numbers["residual"], "tolerance": pick(solution.tolerance),
        "leak": pick(getattr(solution, "leak", None)), "iterations": pick(solution.iterations),
        "products": _products(solution),
        "how": ", ".join(f"{name} = {number}" for name, number in numbers.items() if number != "nan")
        or "residual = nan",
    }  # fmt: skip


def _products(solution: Any) -> str:
    return getattr(solution, "products", "") or "the product"


def _is_zero(operator: Operator) -> bool:
    """Whether A maps a vector without structure to zero (costs one product, after a failure only)."""
    like, xp = operator.like, operator.backend.xp
    if like is None:  # x may come of a program whose vectors are of another kind or order
        like = xp.zeros((*operator.items, operator.columns), dtype=operator.dtype, device=operator.device)
    z = operator.backend.space(like).probe()
    level = SAFETY * operator.offset * max(operator.accuracy, float(xp.finfo(operator.dtype).eps))

    def left(image: Array, z: Array) -> Array:  # I − ∂T is zero to the rounding of 1
        return xp.where(xp.abs(image) <= level * xp.abs(z), xp.zeros_like(image), image)

    image = operator.matvec(z)
    image = image.map(left, z) if hasattr(image, "map") else left(image, z)
    return bool(operator.backend.space(like).is_zero(image))


_NOT_ZERO = {Status.NON_FINITE, Status.NOT_SYMMETRIC, Status.BAD_PRECONDITIONER}
_ZERO = (
    "{A} v = 0 for a probe vector v: F does not depend on y, or its Hessian is zero.",
    "Likely cause: the condition was given the wrong function, or y and theta are swapped.\n"
    "Next: check that F(y, theta) changes with y.",
)
_DIRECT = {"lu", "ldlt", "cholesky"}

# What to say for a status: head, likely cause, what to try next. The advice goes by what is known of A, and never names
# the method that has just failed.
Text = tuple[str, str, str]


def _or(*choices: str) -> str:
    return ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0]


def _others(operator: Operator, solver: str) -> str:
    """Methods that may do better on an A that need not be positive definite."""
    names = ("minres", "lu") if operator.symmetric else ("gmres", "lu")
    return _or(*(f"solver={name!r}" for name in names if name != solver))


def _exhausted(operator: Operator, solver: str) -> Text:
    return (
        "{solver} stopped after {iterations} iterations at a residual of {residual}, above {tolerance}.",
        f"{operator.label} is ill-conditioned, or maxiter is too small.",
        _or("raise maxiter", "give a preconditioner", "add damping", "loosen rtol", "try solver='lu'") + ".",
    )


def _stagnated(operator: Operator, solver: str) -> Text:
    advice = ["add damping"] if solver in _DIRECT else ["add damping", "loosen rtol"]
    if solver != "lu":
        advice.insert(0, "try solver='lu' (it reports the condition number)")
    return (
        "{solver} stagnated after {iterations} iterations: the true residual stays at {residual}, above {tolerance}.",
        "a singular or very ill-conditioned operator, or noisy products (finite differences).",
        _or(*advice) + ".",
    )


def _indefinite(operator: Operator, solver: str) -> Text:
    cause = "y is a saddle point or a maximum, or the Hessian is singular."
    if not operator.symmetric:
        cause = f"{operator.label} is not symmetric, or singular, or y is no minimum."
    return (
        "{solver}: {A} is not positive definite (zero or negative curvature was met).",
        cause,
        _or(_others(operator, solver), "damping in the solver") + ".",
    )


def _asymmetric(operator: Operator, solver: str) -> Text:
    said = (
        "was declared symmetric, and it is not"
        if operator.symmetric
        else f"was declared symmetric, and it is not: {solver} takes it to be"
    )
    return (
        f"{{solver}}: {{A}} {said}.",
        "hvp or hessian has an error, or a Root was given to a method for symmetric matrices.",
        "compare vᵀ(A w) with wᵀ(A v); for a truly asymmetric operator use solver='gmres' or 'lu'.",
    )


def _singular(operator: Operator, solver: str) -> Text:
    advice = ["regularise the problem", "add damping"]
    if solver != "minres":
        advice.append("say singular='gauge' where the loss ignores the flat directions")
    return (
        "{solver}: {A} is singular, or so to working precision ({how}).",
        "the solution is not unique (a redundant parameter, a flat direction), or F ignores part of y.",
        _or(*advice) + ".",
    )


def _inconsistent(operator: Operator, solver: str) -> Text:
    return (
        "{solver}: {A} is singular, and the system has no solution; least squares leave ({how}).",
        "the solution is not unique (a redundant parameter, a flat direction), and what is asked for depends on it.",
        "regularise the problem, add damping, or say what is meant by singular='gauge' or 'minimum-norm'.",
    )


def _not_invariant(operator: Operator, solver: str) -> Text:
    return (
        "{A} is singular, and the loss sees its null space: {leak} of its gradient in y, in norm, lies there.",
        "the solution is one of many, and the loss depends on which: with singular='gauge' it must not.",
        "a loss that is the same for all of them; conserve= of Root; singular='minimum-norm'; a regularised problem.",
    )


def _leaks(xp: Any, solution: Any, codes: Array) -> bool:
    """Whether an item is singular for its right-hand side leaves the range."""
    if getattr(solution, "leak", None) is None:
        return False
    leak = xp.asarray(solution.leak)
    return any_true(xp, (codes == int(Status.SINGULAR)) & (leak > xp.zeros_like(leak)))


def _preconditioner(operator: Operator, solver: str) -> Text:
    fault = "is singular" if solver == "gmres" else "is not symmetric positive definite"
    return (
        f"{{solver}}: the preconditioner {fault}, or its products hold NaN or Inf.",
        "a wrong sign, a factorisation that failed, or the product with another matrix.",
        "evaluate M b, compare vᵀ(M w) with wᵀ(M v), or leave the preconditioner out.",
    )


def _non_finite(operator: Operator, solver: str) -> Text:
    return (
        "{products} with {A} holds NaN or Inf, although y, theta and the vector are finite.",
        "a derivative that does not exist at y (a square root or a norm at 0, a log of 0).",
        "evaluate that callback at y, and smooth the function there.",
    )


def _contradicted(operator: Operator, solver: str) -> Text:
    return (
        "{solver}: what was said of {A} is not so: a given product, or the kind of the point.",
        "hvp, jvp, mixed_vjp or another product is not the derivative of its function; or y is no minimum.",
        "run check_derivatives(condition, y, theta), which names the callable.",
    )


def _diverged(operator: Operator, solver: str) -> Text:
    return (
        "{solver} diverged: after {iterations} terms the residual of its series is {residual}, and grows.",
        f"a step larger than 2 / λmax, bounds that do not hold, or {operator.label} is not definite.",
        "leave the step (or the bounds) to be found; solver='truncated' at a minimum, else an exact method.",
    )


_TABLE: dict[Status, tuple[type[SolveError], Callable[[Operator, str], Text]]] = {
    Status.MAX_ITERATIONS: (NotConvergedError, _exhausted),
    Status.STAGNATED: (NotConvergedError, _stagnated),
    Status.NOT_POSITIVE_DEFINITE: (NotPositiveDefiniteError, _indefinite),
    Status.NOT_SYMMETRIC: (NotSymmetricError, _asymmetric),
    Status.SINGULAR: (SingularError, _singular),
    Status.BAD_PRECONDITIONER: (PreconditionerError, _preconditioner),
    Status.NON_FINITE: (NonFiniteProductError, _non_finite),
    Status.CONTRADICTED: (SolveError, _contradicted),
    Status.DIVERGED: (NotConvergedError, _diverged),
}
"""Of each status that is a failure, the class of the error and what it says."""
