"""`linear_solve`: the door to a linear solve by itself: validate, choose, run, classify."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

from implicitdiff.arrays import Array, any_true, nan_where
from implicitdiff.compilers import public
from implicitdiff.errors import BackendError, NonFiniteError, ShapeError, SolveError
from implicitdiff.failures import explain
from implicitdiff.linalg.operator import Operator, checked_product, matrix_map
from implicitdiff.linalg.reports import make_report
from implicitdiff.linalg.solve import Prepared, Solution, method_of, prepare
from implicitdiff.mode import Mode
from implicitdiff.outcome import Report, settle
from implicitdiff.problem import Settings
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.solvers import get_solver
from implicitdiff.typing import DEFAULTS, SystemOptions, Y, completed

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["System", "SystemRun", "linear_solve", "solve_system"]


class SystemRun(NamedTuple):
    """How a system was solved, and in which mode: inline, values cannot be seen."""

    solution: Solution
    facts: dict[str, Any]
    mode: Mode = Mode.EAGER


@dataclass(frozen=True)
class System:
    """A linear system as the user gave it.

    Parameters
    ----------
    backend : Backend
    A, b, x0, symmetric, positive_definite, transpose, batched
        Of `linear_solve`.
    settings : Settings
    """

    backend: Backend
    A: Any
    b: Any
    x0: Any
    symmetric: bool | None
    positive_definite: bool | None
    transpose: Any
    batched: bool
    settings: Settings

    def prepared(self, vector: Array) -> Prepared:
        """Return the operator with its solver."""
        nan_on_failure = self.backend.mode is Mode.INLINE and self.settings.on_failure != "ignore"
        prepared = prepare(_as_operator(self, vector), self.settings.solver, nan_on_failure=nan_on_failure)
        prepared.least_squares, prepared.differentiated = self.least_squares, True
        return prepared

    def vectors(self) -> tuple[Array, Array | None]:
        """Return b and the start as vectors (*rhs, *items, n)."""
        backend, batched = self.backend, self.batched
        vector = _incoming(backend, backend.as_leaf(self.b, "b"), "b", batched)
        if not backend.traced:
            self.refuse_non_finite(vector)
        start = None if self.x0 is None else _incoming(backend, backend.as_leaf(self.x0, "x0"), "x0", batched)
        if start is not None and start.shape != vector.shape:
            raise ShapeError(f"x0 has shape {tuple(self.x0.shape)}; expected that of b, {tuple(self.b.shape)}.")
        return vector, start

    def refuse_non_finite(self, vector: Array) -> None:
        """Raise where the right-hand side holds NaN or Inf."""
        finite = self.backend.space(vector).finite(vector)
        if (not self.batched or self.settings.on_failure == "raise") and any_true(self.backend.xp, ~finite):
            raise NonFiniteError("b holds NaN or Inf.")

    @property
    def least_squares(self) -> bool:
        """Whether the method is one of least squares: then that is what was asked for."""
        return bool(getattr(get_solver(self.settings.solver), "least_squares", False))

    def solved(self) -> SystemRun:
        """Solve where the arrays are."""
        vector, start = self.vectors()
        prepared = self.prepared(vector)
        solve: Any = self.backend.linear or Prepared.solve
        solution = solve(prepared, vector, start, False)
        facts = {"damping": prepared.damping, "methods": prepared.methods, "seconds": prepared.seconds,
                 "derivatives": {"A": prepared.operator.sources}}  # fmt: skip
        return SystemRun(solution, facts, self.backend.mode)


@overload
def linear_solve(
    A: Any, b: Y, *, return_report: Literal[False] = False, **options: Unpack[SystemOptions]
) -> Y: ...  # fmt: skip


@overload
def linear_solve(
    A: Any, b: Y, *, return_report: Literal[True], **options: Unpack[SystemOptions]
) -> tuple[Y, Report]: ...  # fmt: skip


@public(SystemOptions, DEFAULTS)
def linear_solve(A: Any, b: Any, *, return_report: bool = False, **options: Unpack[SystemOptions]) -> Any:
    """Solve A x = b with a solver named at the call.

    Parameters
    ----------
    A : array (n, n), sparse matrix, LinearOperator or callable
        With ``batched=True`` an array (items, n, n), or a callable on (items, n). A callable is the product
        ``v -> A v`` on vectors of shape (n,).
    b : array, shape (n,) or (n, k)
        Right-hand side, or k of them as columns (as in `numpy.linalg.solve`); (items, n) with ``batched=True``.
    solver : str or Solver
        Name or instance.
    symmetric, positive_definite : bool, optional
        What is known of A. A matrix is compared with its transpose; a claim about products is checked.
    transpose : callable, optional
        The product with Aᵀ, where A is a callable.
    x0 : array, like b, optional
        Where an iterative solver starts.
    batched : bool
        Whether A and b carry a leading axis of independent systems.
    on_failure : {"raise", "warn", "nan", "ignore"}
    backend : str or Backend, optional
        Default: read off ``b``.
    return_report : bool
        Return ``(x, Report)``.

    Returns
    -------
    array, like b
        With ``return_report=True`` the pair (x, Report).

    Raises
    ------
    SolveError
        Where the solve failed, under ``on_failure="raise"``.
    ShapeError, NonFiniteError, DTypeError
        For a bad argument.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[2.0, 1.0], [1.0, 3.0]])
    >>> linear_solve(A, np.array([3.0, 4.0]), solver="cholesky")
    array([1., 1.])
    """
    given = completed(SystemOptions, options)
    settings, named = Settings(given.pop("solver"), given.pop("on_failure")), given.pop("backend")
    engine = backend_for({"b": [b]}, A) if named is None else get_backend(named)
    x, report = _solved(System(engine, A, b, settings=settings, **given))
    return (x, report) if return_report else x


def _solved(system: System) -> tuple[Array, Report]:
    get_solver(system.settings.solver)
    found: tuple[Array, Report] = (system.backend.solve_system or solve_system)(system)
    return found


def solve_system(system: System) -> tuple[Array, Report]:
    """Solve in numbers, and settle what went wrong."""
    engine, on_failure = system.backend, system.settings.on_failure
    with engine.computing():
        solution, facts, mode = engine.solved(system)
        x, error = solution.x, None
        if mode is not Mode.INLINE and any_true(engine.xp, solution.failed):
            error = _explained(system, solution, facts)
            x = nan_where(engine, solution.failed, x) if on_failure == "nan" else x
        x = engine.xp.matrix_transpose(x) if len(x.shape) == 2 and not system.batched else x
        report = make_report(solution, stationarity=float("nan"), mode=mode, **facts)
    if error is not None:
        error.value, error.report = x, report
    settle(error, on_failure)
    return x, report


def _explained(system: System, solution: Solution, facts: dict[str, Any]) -> SolveError:
    """Build the error for a system that was not solved."""
    vector, _ = system.vectors()
    system.refuse_non_finite(vector)
    return explain(_as_operator(system, vector), solution, method_of(solution, facts["methods"])[0])


def _incoming(backend: Backend, b: Array, name: str, batched: bool) -> Array:
    """Turn b (n,) or (n, k) into (n,) or (k, n); leave (items, n) as it is."""
    if len(b.shape) not in ((2,) if batched else (1, 2)):
        expected = "(items, n)" if batched else "(n,) or (n, k)"
        raise ShapeError(f"{name} has shape {tuple(b.shape)}; expected {expected}.")
    return b if batched or len(b.shape) == 1 else backend.xp.matrix_transpose(b)


def _as_operator(system: System, vector: Array) -> Operator:
    backend, A, symmetric, definite = system.backend, system.A, system.symmetric, system.positive_definite
    n, items = vector.shape[-1], tuple(vector.shape[:-1]) if system.batched else ()
    device = backend.device(vector)
    tags: dict[str, Any] = {"symmetric": True if definite else symmetric, "positive_definite": definite}
    if hasattr(A, "shape"):
        if not hasattr(A, "matvec") and not hasattr(A, "tocsc"):
            A = backend.as_leaf(A, "A")
            if backend.device(A) != device:
                raise BackendError(f"A lies on {backend.device(A)}, b on {device}.\nNothing is copied across devices.")
        same = None if symmetric is not None else _is_symmetric(backend, A)
        if same is not None:
            tags.update(symmetric=same, trusted=same)
        op: Operator = matrix_map(Operator, backend, A, items, vector.dtype, device, **tags)
        solver = get_solver(system.settings.solver)
        if op.rows != n or (op.columns != n and getattr(solver, "square", True)):
            any_columns = "" if getattr(solver, "square", True) else " or (rows of b, any number)"
            raise ShapeError(
                f"A has shape {tuple(A.shape)}, b {tuple(system.b.shape)}; expected A of shape ({n}, {n}){any_columns}."
            )
        return op
    if not callable(A):
        raise ShapeError(f"A is {type(A).__name__}; expected a matrix, a LinearOperator or a callable v -> A v.")
    bare = Operator(backend, n, n, items, vector.dtype, device, **tags)
    adjoint = None if system.transpose is None else checked_product(bare, system.transpose, "transpose")
    return replace(bare, forward=checked_product(bare, A, "A"), adjoint=adjoint)


def _is_symmetric(backend: Backend, A: Any) -> bool | None:
    """Compare a matrix with its transpose; None where that cannot be seen."""
    shape: tuple[int, ...] = getattr(A, "shape", ())
    if hasattr(A, "tocsc"):
        return shape[0] == shape[1] and (abs(A - A.T).nnz == 0 or not abs(A - A.T).max())
    if backend.traced or hasattr(A, "matvec") or len(shape) < 2 or shape[-1] != shape[-2]:
        return None
    return not any_true(backend.xp, backend.xp.matrix_transpose(A) != A)
