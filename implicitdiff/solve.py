"""The one door to a linear solve: validate, choose, run, classify."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, item_norm, probe_vector, to_python
from implicitdiff.errors import BackendError, NonFiniteError, ShapeError, SolveError
from implicitdiff.failure import check_mode, explain, settle
from implicitdiff.operator import Operator, checked_product, matrix_map
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.report import Counts, Report, Status
from implicitdiff.solvers import get_solver

__all__ = ["Prepared", "Solution", "linear_solve", "prepare"]


class Solution(NamedTuple):
    """A solved system; the fields after ``x`` have the shape of the items, the worst over right-hand sides."""

    x: Array
    status: Array
    iterations: Array
    matvecs: Array
    residual: Array
    tolerance: Any
    rcond: Any
    operator_norm: Any
    solver: str
    reason: str
    seconds: float

    @property
    def failed(self) -> Array:
        """Items that did not succeed."""
        return self.status > int(Status.APPROXIMATE)


@dataclass
class Prepared:
    """An operator with its solver, factored at the first solve and only then.

    Parameters
    ----------
    operator : Operator
    solver : Solver
    """

    operator: Operator
    solver: Any
    _states: dict[bool, tuple[Operator, Any]] = field(default_factory=dict)

    def _state(self, transposed: bool) -> tuple[Operator, Any]:
        """Return A or Aᵀ, damping included, and the solver's state for it."""
        if False not in self._states:
            op = self.operator.damped(getattr(self.solver, "damping", 0.0))
            self._states[False] = (op, self.solver.init(op))
        if transposed and True not in self._states:
            op, state = self._states[False]
            self._states[True] = (op.transpose(), self.solver.transpose(state))
        return self._states[transposed]

    def solve(self, b: Array, x0: Array | None = None, *, transposed: bool = False) -> Solution:
        """Solve A x = b, or Aᵀ x = b, for b of shape (*rhs, *items, n)."""
        start = time.perf_counter()
        op, xp = self.operator, self.operator.backend.xp
        if op.n == 0 or 0 in b.shape:
            return _empty(op, b, self.solver, start)
        before = self._assembled()
        used, state = self._state(transposed)
        x, status, counts = self.solver.solve(state, b, x0)
        status, counts, probes = _verify(used, b, x, xp.asarray(status, device=op.device), counts, self.solver)
        broken = status == int(Status.NON_FINITE)
        if any_true(xp, broken):  # NaN in, NaN out: no number that looks like an answer
            x = xp.where(xp.broadcast_to(broken, x.shape[:-1])[..., None], xp.full_like(x, float("nan")), x)
        describe = getattr(self.solver, "describe", None)
        name, reason = describe(state) if describe else (_name(self.solver), "chosen by name")
        return _summary(op, x, status, counts, self._assembled() - before + probes, name, reason, start)

    def _assembled(self) -> int:
        """Count the products that went into assembling matrices so far."""
        return sum(op.n for op, _ in self._states.values() if op.assembled)


def prepare(operator: Operator, solver: Any) -> Prepared:
    """Pair an operator with the solver of that name, or with the instance."""
    return Prepared(operator, get_solver(solver))


def _name(solver: Any) -> str:
    return str(getattr(solver, "name", type(solver).__name__))


def _empty(op: Operator, b: Array, solver: Any, start: float) -> Solution:
    xp = op.backend.xp
    zero = xp.zeros(op.items, dtype=op.dtype, device=op.device)
    code = xp.zeros(op.items, dtype=xp.int32, device=op.device)
    seconds = time.perf_counter() - start
    return Solution(xp.zeros_like(b), code, code, code, zero, zero, None, zero, _name(solver), "n = 0", seconds)


def _verify(op: Operator, b: Array, x: Array, status: Array, counts: Counts, solver: Any) -> tuple[Array, Counts, int]:
    """Recompute what the solver did not tell, and check a symmetry that was only declared."""
    xp = op.backend.xp
    if not getattr(solver, "verified", False):
        size = item_norm(xp, b)
        safe = xp.where(size > 0, size, xp.ones_like(size))
        counts = Counts(*counts)._replace(residual=item_norm(xp, b - op.matvec(x)) / safe)
        rtol = getattr(solver, "rtol", None) or (1e-8 if xp.finfo(b.dtype).eps < 1e-10 else 1e-4)
        counts = counts._replace(tolerance=rtol + 0 * counts.residual, matvecs=counts.matvecs + 1)
        claimed = xp.broadcast_to(status, counts.residual.shape)
        wrong = (claimed == 0) & ~(counts.residual <= rtol)
        status = xp.where(wrong, xp.full_like(claimed, int(Status.STAGNATED)), claimed)
    if counts.rcond is None and not op.trusted:
        status, probes = _check_symmetry(op, b, x, status, counts, solver)
        return status, counts, probes
    return status, counts, 0


def _check_symmetry(op: Operator, b: Array, x: Array, status: Array, counts: Counts, solver: Any) -> tuple[Array, int]:
    # Where A is only said to be symmetric, the solve of Aᵀ u = v was replaced by one of A u = v. For a vector z
    # without structure, <A z, u> - <z, v> is the residual of the *transposed* system along z: one product
    # tells whether u solves that one, too. After a failure it tells whether asymmetry is the cause.
    xp = op.backend.xp
    failed = any_true(xp, status > int(Status.APPROXIMATE))
    if not (op.symmetric or (failed and getattr(solver, "symmetric_only", False))):
        return status, 0
    z = probe_vector(xp, op.n, op.dtype, op.device)
    z = z if not op.items else xp.broadcast_to(z, (*op.items, op.n))
    az = op.matvec(z)
    size = item_norm(xp, b)
    image = op.matvec(x) if failed else b  # after a success A x = b up to the residual
    gap = xp.abs(_inner(xp, az, x) - _inner(xp, z, image))
    eps = float(xp.finfo(op.dtype).eps)
    relative = (1e-6 if eps < 1e-10 else 1e-3) + (0.0 if failed else counts.residual)
    allowed = item_norm(xp, z) * item_norm(xp, image) * relative + 1e3 * eps * item_norm(xp, az) * item_norm(xp, x)
    asymmetric = xp.isfinite(gap) & (gap > allowed) & (size > 0)
    if any_true(xp, asymmetric):
        status = xp.where(
            asymmetric, xp.full_like(xp.broadcast_to(status, gap.shape), int(Status.NOT_SYMMETRIC)), status
        )
    rhs = x.shape[0] if len(x.shape) > len(op.items) + 1 else 1
    return status, 1 + (rhs if failed else 0)


def _inner(xp: Any, z: Array, x: Array) -> Array:
    return xp.vecdot(z if z.shape == x.shape else xp.broadcast_to(z, x.shape), x)


def _summary(
    op: Operator, x: Array, status: Array, counts: Counts, assembled: int, name: str, reason: str, start: float
) -> Solution:
    """Reduce over right-hand sides: the worst residual, the largest count, all products."""
    xp, device = op.backend.xp, op.device
    rhs = x.shape[0] if len(x.shape) > len(op.items) + 1 else 0

    def worst(field: Any) -> Any:
        if field is None or not (rhs or op.items):
            return field
        field = xp.asarray(field, device=device)
        if field.shape != x.shape[:-1]:  # a copy: what a report holds is the user's to write to
            field = xp.asarray(xp.broadcast_to(field, x.shape[:-1]), copy=True)
        return xp.max(field, axis=0) if rhs else field

    matvecs = counts.matvecs * max(rhs, 1) + assembled
    if op.items:
        matvecs = xp.asarray(xp.broadcast_to(xp.asarray(matvecs, device=device), op.items), copy=True)
    least = None if counts.rcond is None else -worst(-xp.asarray(counts.rcond, device=device))
    return Solution(
        x, worst(status), worst(counts.iterations), matvecs, worst(counts.residual),
        worst(counts.tolerance), least, worst(counts.operator_norm), name, reason, time.perf_counter() - start,
    )  # fmt: skip


def make_report(solution: Solution, solver: Any, stationarity: Any, derivatives: dict[str, str]) -> Report:
    """Turn a solution into the public report: Python numbers for one problem, arrays for a batch."""
    status = to_python(solution.status)
    single = isinstance(status, int)
    return Report(
        status=Status(status) if single else status,
        converged=status == Status.CONVERGED if single else status == int(Status.CONVERGED),
        solver=solution.solver,
        reason=solution.reason,
        iterations=to_python(solution.iterations),
        matvecs=to_python(solution.matvecs),
        residual=to_python(solution.residual),
        stationarity=to_python(stationarity),
        derivatives=derivatives,
        seconds=solution.seconds,
        rcond=to_python(solution.rcond),
        damping=float(getattr(solver, "damping", 0.0)),
        solution=solution.x,
    )


def poison(xp: Any, solution: Solution, x: Array) -> Array:
    """NaN in the failed items."""
    return xp.where(solution.failed[..., None], xp.full_like(x, float("nan")), x)


def linear_solve(
    A: Any, b: Array, *, solver: Any = "auto", symmetric: bool | None = None, positive_definite: bool | None = None,
    transpose: Any = None, x0: Array | None = None, batched: bool = False, on_failure: str = "raise",
    backend: Any = None, return_report: bool = False,
) -> Any:  # fmt: skip
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
    check_mode(on_failure)
    engine = get_backend(backend) if backend is not None else backend_for({"b": [b]})
    with engine.computing():
        b = engine.as_leaf(b, "b")
        vector, start = _right_hand_side(engine, b, x0, batched, on_failure)
        prepared = prepare(_as_operator(engine, A, b, vector, batched, symmetric, positive_definite, transpose), solver)
        solution = prepared.solve(vector, start)
        error: SolveError | None = None
        x = solution.x
        if any_true(engine.xp, solution.failed):
            error = explain(prepared.operator, solution)
            x = poison(engine.xp, solution, x) if on_failure == "nan" else x
        x = engine.xp.matrix_transpose(x) if len(b.shape) == 2 and not batched else x
        report = make_report(solution, prepared.solver, float("nan"), {"A": prepared.operator.sources})
    if error is not None:
        error.value, error.report = x, report
    settle(error, on_failure)
    return (x, report) if return_report else x


def _right_hand_side(backend: Any, b: Array, x0: Any, batched: bool, on_failure: str) -> tuple[Array, Array | None]:
    """Return b and the start as vectors (*rhs, *items, n)."""
    vector = _incoming(backend, b, "b", batched)
    if any_true(backend.xp, ~backend.xp.isfinite(vector)) and (not batched or on_failure == "raise"):
        raise NonFiniteError("b holds NaN or Inf.")
    start = None if x0 is None else _incoming(backend, backend.as_leaf(x0, "x0"), "x0", batched)
    if start is not None and start.shape != vector.shape:
        raise ShapeError(f"x0 has shape {tuple(x0.shape)}; expected that of b, {tuple(b.shape)}.")
    return vector, start


def _incoming(backend: Any, b: Array, name: str, batched: bool) -> Array:
    """Turn b (n,) or (n, k) into (n,) or (k, n); leave (items, n) as it is."""
    if len(b.shape) not in ((2,) if batched else (1, 2)):
        expected = "(items, n)" if batched else "(n,) or (n, k)"
        raise ShapeError(f"{name} has shape {tuple(b.shape)}; expected {expected}.")
    return b if batched or len(b.shape) == 1 else backend.xp.matrix_transpose(b)


def _as_operator(
    backend: Any, A: Any, b: Array, vector: Array, batched: bool, symmetric: bool | None,
    definite: bool | None, transpose: Any,
) -> Operator:  # fmt: skip
    n, items = vector.shape[-1], tuple(vector.shape[:-1]) if batched else ()
    device = backend.device(b)
    tags: dict[str, Any] = {"symmetric": True if definite else symmetric, "positive_definite": definite}
    if hasattr(A, "shape"):
        if not hasattr(A, "matvec") and not hasattr(A, "tocsc"):
            A = backend.as_leaf(A, "A")
            if backend.device(A) != device:
                raise BackendError(f"A lies on {backend.device(A)}, b on {device}.\nNothing is copied across devices.")
        op: Operator = matrix_map(Operator, backend, A, items, b.dtype, device, **tags)
        if (op.rows, op.columns) != (n, n):
            raise ShapeError(f"A has shape {tuple(A.shape)}, b {tuple(b.shape)}; expected A of shape ({n}, {n}).")
        return _tag_matrix(backend.xp, op, symmetric)
    if not callable(A):
        raise ShapeError(f"A is {type(A).__name__}; expected a matrix, a LinearOperator or a callable v -> A v.")
    bare = Operator(backend, n, n, items, b.dtype, device, **tags)
    adjoint = None if transpose is None else checked_product(bare, transpose, "transpose")
    return replace(bare, forward=checked_product(bare, A, "A"), adjoint=adjoint)


def _tag_matrix(xp: Any, op: Operator, symmetric: bool | None) -> Operator:
    """Compare a matrix with its transpose, unless the user said that it is not symmetric."""
    if symmetric is not None or (op.matrix is None and op.sparse is None):
        return op
    if op.sparse is not None:
        same = abs(op.sparse - op.sparse.T).nnz == 0 or not abs(op.sparse - op.sparse.T).max()
    else:
        same = not any_true(xp, op.matrix != xp.matrix_transpose(op.matrix))
    return replace(op, symmetric=bool(same), trusted=bool(same))
