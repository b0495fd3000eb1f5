"""`check_regularity`: whether a solution has a derivative, and what that rests on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, item_norm
from implicitdiff.compilers import untraced
from implicitdiff.conditions import as_condition
from implicitdiff.conditions.active_set import names
from implicitdiff.errors import InputError
from implicitdiff.linalg.block_operator import SaddleOperator
from implicitdiff.linalg.equilibration import of_matrix
from implicitdiff.problem import problem_of
from implicitdiff.rules import Rules
from implicitdiff.tolerances import DENSE
from implicitdiff.typing import ConditionLike

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Regularity", "check_regularity"]


@dataclass(frozen=True)
class Regularity:
    """What was found of a condition at a point.

    Attributes
    ----------
    regular : bool
        Whether nothing was found that a derivative could fail on: ``problems`` is empty.
    problems : tuple of str
        What was found, in words.
    unknowns : int
        n, the number of entries of y.
    active : tuple of str
        Active constraints, ``"eq[i]"`` and ``"ineq[i]"``.
    rank : int
        Rank of the gradients of the constraints in the system, which weakly active ones are not; of A where there are
        no constraints.
    licq : bool
        Whether these gradients are linearly independent.
    dependent : tuple of str
        Active constraints that take part in a linear dependence.
    strict_complementarity : bool
        Whether every active inequality has a positive multiplier.
    weakly_active, wrong_sign, violated : tuple of str
        Active inequalities with a multiplier of zero, or of the wrong sign; constraints that y does not satisfy.
    multipliers : array or None, shape (k,)
        Of all constraints, the equalities first.
    smallest_eigenvalue : float or None
        Of the Hessian on the null space of the active constraints (NaN where that is empty); None where A is not
        symmetric.
    smallest_singular_value : float
        Of A, that of the saddle system where there are constraints, in relation to the largest; equilibrated, so that
        units have no part in it.
    inertia : (int, int, int) or None
        Positive, negative and zero eigenvalues of A; at a strict minimum (n, number of active constraints, 0).
    second_order : {"minimum", "not a minimum", "degenerate", "unknown"}
        What the reduced Hessian says: positive definite, not so but regular, singular, or that A is not symmetric.
    stationarity : float
        ‖F(y, theta)‖; of the Lagrangian's gradient and the active constraints, scaled to its units.
    feasibility : float
        The largest violation of a constraint.
    """

    unknowns: int
    rank: int
    smallest_eigenvalue: float | None
    smallest_singular_value: float
    inertia: tuple[int, int, int] | None
    second_order: str
    stationarity: float
    feasibility: float = 0.0
    active: tuple[str, ...] = ()
    licq: bool = True
    dependent: tuple[str, ...] = ()
    strict_complementarity: bool = True
    weakly_active: tuple[str, ...] = ()
    wrong_sign: tuple[str, ...] = ()
    violated: tuple[str, ...] = ()
    multipliers: Any = field(default=None, compare=False)
    problems: tuple[str, ...] = ()

    @property
    def regular(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"Regularity: {'regular' if self.regular else '; '.join(self.problems)}"]
        for name, value in self.__dict__.items():
            if name == "multipliers" and value is not None:
                value = ", ".join(f"{float(value[i]) + 0.0:.6g}" for i in range(value.shape[0]))
            if name != "problems" and value is not None and value != ():
                lines.append(f"  {name:<24}{', '.join(map(str, value)) if isinstance(value, tuple) else value}")
        return "\n".join(lines)


def check_regularity(
    condition: ConditionLike, y: Any, theta: Any, *, args: tuple[Any, ...] = (), backend: Any = None
) -> Regularity:  # fmt: skip
    """Check what the derivative of a solution rests on, by dense matrices, for one problem.

    For a constrained solution: feasibility, the active set, linear independence of its gradients (LICQ), signs of the
    multipliers and strict complementarity, the second-order condition on the null space of the active constraints and
    the inertia of the saddle system. Without constraints: the Hessian, or the singular values of A.

    Parameters
    ----------
    condition, y, theta, args, backend
        As for `linearize`.

    Returns
    -------
    Regularity
        ``.regular`` and ``.problems`` sum it up; printed it shows everything.

    Raises
    ------
    InputError
        Where the system has more than 4 096 unknowns, multipliers included.

    References
    ----------
    J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd ed., Springer, 2006, sections 12.4 and 16.1.
    DOI 10.1007/978-0-387-40065-5

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import KKT, check_regularity
    >>> f, bound = lambda y, theta: ((y - theta) ** 2).sum(), lambda y, theta: y - 1.0
    >>> found = check_regularity(KKT(f, ineq=bound), np.array([1.0, 0.5]), np.array([3.0, 0.5]))
    >>> found.regular, found.active, found.inertia, found.second_order
    (True, ('ineq[0]',), (2, 1, 0), 'minimum')
    """
    return _checked(condition, y, theta, tuple(args), backend)


@untraced
def _checked(condition: Any, y: Any, theta: Any, args: tuple[Any, ...], backend: Backend) -> Regularity:
    problem = problem_of(as_condition(condition).without_selection(), y, theta, args=args, backend=backend)
    with problem.backend.computing():
        rules = Rules(problem, flat=True)
        op = rules.prepared.operator
        if op.n > DENSE:
            raise InputError(f"the system has {op.n} unknowns; check_regularity looks at dense ones up to {DENSE}.")
        size = rules.check.size()
        return _found(rules, op, float(size))


def _found(rules: Rules, op: Any, stationarity: float) -> Regularity:
    """Look at the matrix in units, where entries of another size are no defect; the eigenvalue is that of A itself."""
    if rules.point.y.n == 0:
        return Regularity(0, 0, None, 1.0, None, "unknown", stationarity)
    if isinstance(op, SaddleOperator):
        return _of_saddle(rules, op, stationarity)
    xp, given = op.backend.xp, op.backend.to_double(op.dense())
    scaling = of_matrix(op.backend, given, symmetric=bool(op.symmetric))
    matrix = given if scaling is None else scaling.rows[:, None] * given * scaling.columns[None, :]
    ratio, largest = _extremes(xp, matrix)
    noise = _noise(op)
    if not op.symmetric:
        rank = int(xp.sum(xp.astype(xp.linalg.svdvals(matrix) > noise * largest, xp.int32)))
        problems = ("A is singular",) if rank < op.n else ()
        return Regularity(op.n, rank, None, ratio, None, "unknown", stationarity, problems=problems)
    eigenvalues, own = _eigenvalues(xp, matrix), _eigenvalues(xp, given)
    inertia, order = _signs(xp, eigenvalues, noise * largest), _order(xp, eigenvalues, noise * largest)
    problems = ("the Hessian is singular",) if order == "degenerate" else ()
    if rules.maps.observations is not None and not bool(rules.maps.observations.usable):
        problems = ("y is not inside of the barrier", *problems)
    facts = (op.n - inertia[2], float(own[0]), ratio, inertia, order, stationarity)
    return Regularity(op.n, *facts, problems=problems)


def _noise(op: Any) -> float:
    return max(100 * op.n * float(op.backend.xp.finfo(op.dtype).eps), 30 * op.accuracy)


def _eigenvalues(xp: Any, matrix: Array) -> Array:
    return xp.linalg.eigvalsh((matrix + xp.matrix_transpose(matrix)) / 2)


def _extremes(xp: Any, matrix: Array) -> tuple[float, float]:
    """Return the smallest singular value relative to the largest, and the largest."""
    values = xp.linalg.svdvals(matrix)
    largest = float(values[0])
    return float(values[-1]) / largest if largest > 0 else 0.0, largest


def _null_space(xp: Any, rows: Array, noise: float) -> tuple[Array, int]:
    """Return an orthonormal basis of the null space of a matrix, as rows, and the rank."""
    _, s, vt = xp.linalg.svd(rows, full_matrices=True)
    rank = int(xp.sum(xp.astype(s > noise * s[0], xp.int32))) if s.shape[0] and float(s[0]) > 0 else 0
    return vt[rank:, :], rank


def _of_saddle(rules: Rules, op: SaddleOperator, stationarity: float) -> Regularity:
    xp, n, found, noise = op.backend.xp, op.primal, _active_set(rules), _noise(op)
    given = op.backend.to_double(op.dense())
    units = xp.ones_like(given[0, :]) if op.units is None else op.backend.to_double(op.units)
    matrix = units[:, None] * given * units[None, :]
    ratio, _ = _extremes(xp, matrix)
    basis, rank = _null_space(xp, matrix[n:, :n], noise)
    hessian = matrix[:n, :n]
    scale = noise * float(item_norm(xp, xp.reshape(hessian, (-1,))))
    eigenvalues = own = units[:0]
    if rank < n:
        eigenvalues = _eigenvalues(xp, basis @ hessian @ xp.matrix_transpose(basis))
        basis = xp.matrix_transpose(xp.linalg.qr(xp.matrix_transpose(basis * units[:n])).Q)  # the same space, in y
        own = _eigenvalues(xp, basis @ given[:n, :n] @ xp.matrix_transpose(basis))
    order = _order(xp, eigenvalues, scale)
    whole = _eigenvalues(xp, matrix)
    positive, negative, zero = _signs(xp, whole, noise * float(xp.max(xp.abs(whole))))
    inactive = int(xp.sum(xp.astype(~found.active, xp.int32)))  # each of them stands as one negative eigenvalue
    inertia = (positive, negative - inactive, zero)

    def which(mask: Array) -> tuple[str, ...]:
        return tuple(names(xp, mask, found.equality))

    facts = {"active": found.active | found.weak, "dependent": found.dependent, "weakly_active": found.weak,
             "wrong_sign": found.wrong, "violated": found.violated}  # fmt: skip
    named = {name: which(mask) for name, mask in facts.items()}
    over = xp.where(found.equality, xp.abs(found.values), found.values)
    largest = float(xp.max(over))
    return Regularity(
        n, rank, float(own[0]) if rank < n else float("nan"), ratio, inertia, order, stationarity,
        feasibility=max(largest, 0.0), licq=not named["dependent"],
        strict_complementarity=not (named["weakly_active"] or named["wrong_sign"]), multipliers=found.multipliers,
        problems=_problems(named, order), **named,
    )  # fmt: skip


def _active_set(rules: Rules) -> Any:
    observations: Any = rules.maps.observations
    details = observations.details
    return details if hasattr(details, "active") else details[0]


def _problems(named: dict[str, tuple[str, ...]], order: str) -> tuple[str, ...]:
    texts = {
        "violated": "infeasible in {}", "dependent": "LICQ fails in {}", "weakly_active": "{} weakly active",
        "wrong_sign": "multiplier of the wrong sign in {}",
    }  # fmt: skip
    found = [text.format(", ".join(named[name])) for name, text in texts.items() if named[name]]
    if order == "degenerate":
        found.append("the Hessian is singular on the null space of the active constraints")
    if order == "not a minimum":
        found.append("the second-order condition fails: the reduced Hessian is not positive definite")
    return tuple(found)


def _signs(xp: Any, eigenvalues: Array, zero: float) -> tuple[int, int, int]:
    def count(mask: Array) -> int:
        return int(xp.sum(xp.astype(mask, xp.int32)))

    positive, negative = count(eigenvalues > zero), count(eigenvalues < -zero)
    return positive, negative, eigenvalues.shape[0] - positive - negative


def _order(xp: Any, eigenvalues: Array, zero: float) -> str:
    _, negative, null = _signs(xp, eigenvalues, zero)
    if null:
        return "degenerate"
    return "not a minimum" if negative else "minimum"
