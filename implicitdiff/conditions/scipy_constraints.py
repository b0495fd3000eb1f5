"""SciPy's constraints as they are: Bounds, LinearConstraint, NonlinearConstraint, and the dicts of SLSQP.

All of them say lb <= c(y) <= ub, row by row. Rows with lb = ub are equalities, c − ub = 0. Of the others, those with a
finite lb come first, as lb − c <= 0, then those with a finite ub, as c − ub <= 0: the order of SciPy's own conversion.
An infinite side is none.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from implicitdiff.conditions.constraint import Constraint
from implicitdiff.errors import CallbackError, DerivativeError, InputError
from implicitdiff.namespaces import constant, namespace
from implicitdiff.pytree import flatten
from implicitdiff.records import Record
from implicitdiff.verification.outer import uses

if TYPE_CHECKING:
    from implicitdiff.conditions.point import Point

__all__ = ["Limited", "collected", "limited_from", "sides_of"]


class Sides(NamedTuple):
    """Which of m rows are limited, and how."""

    equal: np.ndarray
    """Numbers of the rows that are equalities."""
    lower: np.ndarray
    upper: np.ndarray

    def selection(self, kind: str, lb: np.ndarray, ub: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return S and b of the constraints S c − b of a kind, shapes (k, m) and (k,)."""
        return self._rows_of(np.eye(lb.size), kind, lb, ub, np.concatenate)

    def sparse_selection(self, kind: str, lb: np.ndarray, ub: np.ndarray) -> tuple[Any, np.ndarray]:
        """The same with a SciPy sparse S."""
        import scipy.sparse

        return self._rows_of(scipy.sparse.eye_array(lb.size, format="csr"), kind, lb, ub, scipy.sparse.vstack)

    def _rows_of(
        self, eye: Any, kind: str, lb: np.ndarray, ub: np.ndarray, stack: Callable[..., Any]
    ) -> tuple[Any, np.ndarray]:  # fmt: skip
        if kind == "eq":
            return eye[self.equal], ub[self.equal]
        S = stack([-eye[self.lower], eye[self.upper]])
        return S, np.concatenate([-lb[self.lower], ub[self.upper]])


def sides_of(lb: np.ndarray, ub: np.ndarray) -> Sides:
    """Return the rows that are equalities, and those with a lower and with an upper limit."""
    if np.any(np.isnan(lb) | np.isnan(ub)) or np.any(lb > ub):
        raise InputError("a constraint has a limit that is NaN, or lb > ub: expected lb <= ub.")
    equal = lb == ub
    number = np.arange(lb.size)
    return Sides(number[equal], number[~equal & (lb > -math.inf)], number[~equal & (ub < math.inf)])


@dataclass(frozen=True, eq=False, repr=False)
class Limited(Record):
    """lb <= c(y) <= ub for SciPy's constraint, or for its rows of one kind.

    Parameters
    ----------
    name : str
        What the user knows it under.
    lb, ub : float or array, shape (m,)
    matrix : array, shape (m, n), SciPy sparse matrix, optional
        c(y) = matrix @ y, or y itself where there is no function either.
    fun, jac, hess : callable, optional
        c, ∂c/∂y and Σ v_i ∂²c_i/∂y², of y, or of (y, theta, *args).
    with_theta : bool
        Whether they take theta and the data.
    args : tuple
        What they take instead.
    """

    name: str
    lb: Any
    ub: Any
    matrix: Any = None
    fun: Callable[..., Any] | None = None
    jac: Callable[..., Any] | None = None
    hess: Callable[..., Any] | None = None
    with_theta: bool = False
    args: tuple[Any, ...] = ()

    def at(self, point: Point) -> list[Constraint]:
        """Return the constraints of each kind that there are."""
        if self.fun is not None and not self.with_theta:
            self._check_constant(point)
        lb, ub = np.atleast_1d(self.lb).astype(float), np.atleast_1d(self.ub).astype(float)
        sides = sides_of(*np.broadcast_arrays(lb, ub))
        kinds = {"eq": sides.equal.size, "ineq": sides.lower.size + sides.upper.size}
        return [_Rows(self, kind, point.y.n, point.lead).constraint() for kind, some in kinds.items() if some]

    def _check_constant(self, point: Point) -> None:
        """Raise where a function of y alone sees theta: its derivative would miss what the constraint does with it."""
        if uses((self.fun, self.args), point.backend, theta=point.theta.tree.unflatten(point.theta.tree.leaves)):
            raise DerivativeError(
                f"{self.name} uses theta from the enclosing scope (or from its args), where it is a constant: a term "
                "of the derivative is lost.\n"
                "Next: write its functions as fun(y, theta, *args), jac(y, theta, *args) and hess(y, theta, v, *args). "
                "What is to be a constant: give them a copy of it."
            )

    def limits(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Return lb and ub of m rows."""
        try:
            lb, ub = (np.broadcast_to(np.asarray(x, dtype=float).reshape(-1), (m,)) for x in (self.lb, self.ub))
        except ValueError as error:
            raise InputError(
                f"{self.name} has limits of shapes {np.shape(self.lb)} and {np.shape(self.ub)}, and {m} rows."
            ) from error
        return lb, ub

    def rows_at(self, x: np.ndarray) -> int:
        """Return m, at a solution."""
        if self.fun is None:
            return int(x.size if self.matrix is None else self.matrix.shape[0])
        if self.with_theta:
            raise InputError(f"{self.name} takes theta: minimize was given something else.")
        return int(np.size(self.fun(x, *self.args)))

    @property
    def given(self) -> tuple[Callable[..., Any], ...]:
        """Derivatives that are given."""
        return tuple(f for f in (self.jac, self.hess) if f is not None)


class _Rows:
    """The rows of one kind, as functions of the user's trees; n coordinates, and so many leading axes of items."""

    def __init__(self, of: Limited, kind: str, n: int, lead: int) -> None:
        self.of, self.kind, self.n, self.lead = of, kind, n, lead

    def constraint(self) -> Constraint:
        """Return them as a constraint."""
        of = self.of
        if of.fun is None:
            return Constraint(self.kind, of.name, self.affine, self.affine_rows, None, linear=True)
        return Constraint(
            self.kind, of.name, self.values, None if of.jac is None else self.rows,
            None if of.hess is None else self.curvature,
        )  # fmt: skip

    def _selection(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        lb, ub = self.of.limits(m)
        return sides_of(lb, ub).selection(self.kind, lb, ub)

    # -- of a matrix, or of y itself -----------------------------------------------------------------
    def _matrix(self, y: Any) -> tuple[Any, np.ndarray]:
        """S M and b; sparse where M is, and y is one vector of NumPy."""
        M = self.of.matrix
        if hasattr(M, "tocsr") and not self.lead and type(y) is np.ndarray and M.shape[1] == self.n:
            lb, ub = self.of.limits(M.shape[0])
            S, b = sides_of(lb, ub).sparse_selection(self.kind, lb, ub)
            return (S @ M).tocsr(), b
        S, b = self._selection(self.n if M is None else M.shape[0])
        if M is None:
            return S, b
        if M.shape[1] != self.n:
            raise InputError(f"{self.of.name} has a matrix of shape {M.shape}, and y has {self.n} coordinates.")
        return S @ (M.toarray() if hasattr(M, "toarray") else np.asarray(M, dtype=float)), b

    def affine(self, y: Any, theta: Any, *args: Any) -> Any:
        """S M y − b."""
        x = self._raveled(y)
        M, b = self._matrix(x)
        if hasattr(M, "tocsr"):
            return M @ x - b
        xp = namespace(x)
        return x @ constant(xp, x, M.T) - constant(xp, x, b)

    def affine_rows(self, y: Any, theta: Any, *args: Any) -> Any:
        """S M."""
        x = self._raveled(y)
        M, _ = self._matrix(x)
        if hasattr(M, "tocsr"):
            return M
        xp = namespace(x)
        found = constant(xp, x, M)
        return xp.broadcast_to(found, (*x.shape[: self.lead], *M.shape)) if self.lead else found

    def _raveled(self, y: Any) -> Any:
        leaves = flatten(y).leaves
        xp = namespace(*leaves)
        parts = [xp.reshape(leaf, (*leaf.shape[: self.lead], -1)) for leaf in leaves]
        return parts[0] if len(parts) == 1 else getattr(xp, "concat", xp.concatenate)(parts, axis=-1)

    # -- of a function -------------------------------------------------------------------------------
    def _called(self, function: Any, y: Any, theta: Any, args: tuple[Any, ...], *vectors: Any) -> Any:
        of = self.of
        return function(y, theta, *vectors, *args) if of.with_theta else function(y, *vectors, *of.args)

    def _flat(self, c: Any) -> Any:
        """c as vectors (*items, m)."""
        if not hasattr(c, "shape"):
            return np.atleast_1d(np.asarray(c))
        length = math.prod(c.shape[self.lead :])
        return namespace(c).reshape(c, (*c.shape[: self.lead], length))

    def values(self, y: Any, theta: Any, *args: Any) -> Any:
        """S c − b."""
        c = self._flat(self._called(self.of.fun, y, theta, args))
        xp, (S, b) = namespace(c), self._selection(c.shape[-1])
        return c @ constant(xp, c, S.T) - constant(xp, c, b)

    def rows(self, y: Any, theta: Any, *args: Any) -> Any:
        """S ∂c/∂y."""
        J = self._called(self.of.jac, y, theta, args)
        if hasattr(J, "toarray"):
            return self._selection(J.shape[0])[0] @ J
        J = J if hasattr(J, "shape") else np.asarray(J)
        xp = namespace(J)
        if len(J.shape) == self.lead + 1:  # of one constraint
            J = J[..., None, :]
        if len(J.shape) != self.lead + 2 or J.shape[-1] != self.n:
            raise CallbackError(f"jac of {self.of.name} returned shape {tuple(J.shape)}.\nExpected (m, {self.n}).")
        return constant(xp, J, self._selection(J.shape[-2])[0]) @ J

    def curvature(self, y: Any, theta: Any, z: Any, *args: Any) -> Any:
        """Σ (Sᵀz)_i ∂²c_i/∂y²."""
        m = self._flat(self._called(self.of.fun, y, theta, args)).shape[-1]
        xp = namespace(z)
        return self._called(self.of.hess, y, theta, args, z @ constant(xp, z, self._selection(m)[0]))


# -- what SciPy has ------------------------------------------------------------------------------------
def _kind(x: Any) -> str | None:
    """Name of SciPy's class of a constraint, or "dict"; None for anything else."""
    if isinstance(x, dict):
        return "dict"
    scipy = sys.modules.get("scipy.optimize")  # what was made with it has it loaded
    names = ("Bounds", "LinearConstraint", "NonlinearConstraint")
    return next((n for n in names if scipy is not None and isinstance(x, getattr(scipy, n))), None)


def collected(given: Any, name: str) -> Any:
    """Return what was given for constraints: None, a function, or a tuple of what has an ``at``.

    Raises
    ------
    InputError
        Where it is anything else.
    """
    if given is None or (callable(given) and _kind(given) is None):
        return given
    found = []
    several = isinstance(given, (list, tuple))
    for i, x in enumerate(given if several else [given]):
        label = f"{name}[{i}]" if several else name
        if _kind(x) is None and not callable(x):
            raise InputError(
                f"{label} is {type(x).__name__}; expected a callable {name}(y, theta, *args), or SciPy's Bounds, "
                "LinearConstraint, NonlinearConstraint or dict."
            )
        found.append(Constraint(name, label, x) if _kind(x) is None else limited_from(x, label))
    return tuple(found)


def limited_from(x: Any, name: str) -> Limited:
    """Return one of SciPy's constraints as rows with limits."""
    kind = _kind(x)
    if kind == "dict":
        return _from_dict(x, name)
    if kind == "NonlinearConstraint":
        jac, hess = (f if callable(f) else None for f in (x.jac, x.hess))
        return Limited(name, x.lb, x.ub, None, x.fun, jac, hess, _takes_theta(x.fun))
    return Limited(name, x.lb, x.ub, getattr(x, "A", None))


def _from_dict(x: dict[str, Any], name: str) -> Limited:
    if x.get("type") not in {"eq", "ineq"} or not callable(x.get("fun")):
        raise InputError(f'{name} is a dict; expected SciPy\'s {{"type": "eq" or "ineq", "fun": callable, …}}.')
    args = tuple(x.get("args", ()))
    jac = x.get("jac")
    ub = 0.0 if x["type"] == "eq" else math.inf
    with_theta = not args and _takes_theta(x["fun"])
    return Limited(name, 0.0, ub, None, x["fun"], jac if callable(jac) else None, None, with_theta, args)


def _takes_theta(function: Callable[..., Any]) -> bool:
    """Whether a function has to be called with more than y."""
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code need not tell
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_position and p.default is inspect.Parameter.empty for p in parameters) > 1
