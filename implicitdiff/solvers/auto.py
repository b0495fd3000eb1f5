"""The automatic choice: a ladder of methods that explains itself.

- The matrix is at hand (dense or sparse), or A is so small that assembling it is cheap (n <= 256, or n <= 8 times
  the number of right-hand sides): Cholesky where A is symmetric and positive definite, else LU.
- Larger, symmetric: CG; on zero or negative curvature MINRES.
- Larger, not symmetric: GMRES.
- Where an iterative method does not get there and n <= 4 096: assemble and factor after all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from implicitdiff.arrays import Array, any_true
from implicitdiff.operator import Operator
from implicitdiff.report import Counts, Status
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.cg import CG
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.lu import LU
from implicitdiff.solvers.minres import MINRES

__all__ = ["Auto"]

SMALL = 256
DENSE_LIMIT = 4096


@dataclass
class _State:
    """The operator, the methods prepared so far (shared with the transposed state), and what happened."""

    operator: Operator
    prepared: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    used: str = "auto"
    reason: str = ""


@dataclass(frozen=True)
class Auto(Solver):
    """Choose the method from size and structure, and climb to a sturdier one where it fails.

    Parameters
    ----------
    rtol, maxiter, preconditioner
        For the iterative methods, as in `CG`.
    damping : float, default 0
        Solve (A + damping I) x = b.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> x, report = linear_solve(np.diag([1.0, -2.0]), np.array([1.0, 1.0]), return_report=True)
    >>> report.solver, report.reason
    ('lu', 'the matrix is given; A is not positive definite')
    """

    rtol: float | None = None
    maxiter: int | None = None
    preconditioner: Any = None
    damping: float = 0.0

    name: ClassVar[str] = "auto"
    verified: ClassVar[bool] = True

    def init(self, operator: Operator) -> _State:
        return _State(operator)

    def transpose(self, state: _State) -> _State:
        if state.operator.symmetric:
            return state
        return _State(state.operator, state.prepared, not state.transposed)

    def describe(self, state: _State) -> tuple[str, str]:
        return state.used, state.reason

    def solve(self, state: _State, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        op = state.operator
        rhs = b.shape[0] if len(b.shape) > len(op.items) + 1 else 1
        why = _dense_reason(op, rhs)
        if why is not None and self.preconditioner is None:
            return self._direct(state, b, why)
        return self._iterative(state, b, x0)

    def _direct(self, state: _State, b: Array, why: str) -> tuple[Array, Any, Counts]:
        op = state.operator
        xp = op.backend.xp
        if not op.symmetric:
            state.used, state.reason = "lu", f"{why}; A is not symmetric"
            return self._run(state, LU(), b, None)
        x, status, counts = self._run(state, Cholesky(), b, None)
        indefinite = status == int(Status.NOT_POSITIVE_DEFINITE)
        if not any_true(xp, indefinite):
            state.used, state.reason = "cholesky", f"{why}; A is symmetric"
            return x, status, counts
        state.used, state.reason = "lu", f"{why}; A is not positive definite"
        return _merge(xp, indefinite, self._run(state, LU(), b, None), (x, status, counts))

    def _iterative(self, state: _State, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        op = state.operator
        xp = op.backend.xp
        options = {"rtol": self.rtol, "maxiter": self.maxiter, "preconditioner": self.preconditioner}
        first: Solver = CG(**options) if op.symmetric else GMRES(**options)
        state.used = first.name
        state.reason = f"n = {op.n} > {SMALL}; A is {'' if op.symmetric else 'not '}symmetric"
        result = self._run(state, first, b, x0)
        negative = xp.asarray(result[1] == int(Status.NOT_POSITIVE_DEFINITE))
        if op.symmetric and any_true(xp, negative):
            state.used, state.reason = "minres", f"{state.reason}; CG met zero or negative curvature"
            result = _merge(xp, negative, self._run(state, MINRES(**options), b, None), result)
        failed = xp.asarray((result[1] == int(Status.MAX_ITERATIONS)) | (result[1] == int(Status.STAGNATED)))
        if op.n > DENSE_LIMIT or not any_true(xp, failed):
            return result
        why = f"{state.reason}; {state.used} did not reach the tolerance"
        return _merge(xp, failed, self._direct(state, b, why), result)

    def _run(self, state: _State, solver: Solver, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        if solver.name not in state.prepared:
            state.prepared[solver.name] = solver.init(state.operator)
        inner = state.prepared[solver.name]
        return solver.solve(solver.transpose(inner) if state.transposed else inner, b, x0)


def _dense_reason(op: Operator, rhs: int) -> str | None:
    if op.sparse is not None:
        return "the matrix is sparse"
    if op.matrix is not None:
        return "the matrix is given" if op.n <= DENSE_LIMIT else None
    if op.n <= SMALL:
        return f"n = {op.n} <= {SMALL}: assembled"
    if op.n <= min(8 * rhs, DENSE_LIMIT):
        return f"n = {op.n}, {rhs} right-hand sides: assembled"
    return None


def _merge(xp: Any, mask: Array, new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
    """Items of ``new`` where the mask holds, of ``old`` elsewhere; counts add up."""
    (x1, status1, c1), (x0, status0, c0) = new, old
    mask = xp.asarray(mask)

    def pick(a: Any, b: Any) -> Any:
        return a if b is None or a is None else xp.where(mask, xp.asarray(a), xp.asarray(b))

    counts = Counts(
        c1.iterations + c0.iterations, c1.matvecs + c0.matvecs,
        *(pick(a, b) for a, b in zip(c1[2:], c0[2:], strict=True)),
    )  # fmt: skip
    return xp.where(mask[..., None], x1, x0), pick(status1, status0), counts
