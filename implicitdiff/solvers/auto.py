"""The automatic choice: a ladder of methods that explains itself.

- The matrix is at hand (dense or sparse), or A is so small that assembling it is cheap (n <= 256, or n <= 8 times
  the number of right-hand sides): Cholesky where A is symmetric and positive definite, LDLᵀ where it is known to be
  indefinite (a saddle system), else LU.
- Larger, symmetric: CG; on zero or negative curvature, or where A is known to be indefinite, MINRES.
- Larger, not symmetric: GMRES. JᵀJ of a Gauss-Newton system: LSMR, with J in place of A.
- I − ∂T of a fixed point, by products: BiCGSTAB first, for as many products as assembling A takes. Where y was found by
  iterating T the eigenvalues of ∂T are within the unit circle, and some ten to forty products do. This holds for a
  small A, too, where there are many of them: in a batch, and where the values are not seen, as inside `vmap`.
- Where an iterative method does not get there and n <= 4 096: assemble and factor after all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from implicitdiff.arrays import Array, any_true
from implicitdiff.linalg.operator import Operator
from implicitdiff.mode import Mode
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.bicgstab import BiCGSTAB
from implicitdiff.solvers.cg import CG
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.ldlt import LDLT
from implicitdiff.solvers.lsmr import LSMR
from implicitdiff.solvers.lu import LU
from implicitdiff.solvers.minres import MINRES
from implicitdiff.tolerances import DENSE, EXACT_ASSEMBLY, FACTORED, PATIENCE, SMALL, TINY

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Auto", "assembles"]

_LU, _LDLT, _CHOLESKY = LU(), LDLT(), Cholesky()


@dataclass
class _State:
    """The operator, the methods prepared so far (shared with the transposed state), and what may have been used."""

    operator: Operator
    prepared: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    methods: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, eq=False, repr=False)
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
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "auto"
    verified: ClassVar[bool] = True

    def init(self, operator: Operator) -> _State:
        state = _State(operator)
        self.plan(state, 1)
        return state

    def plan(self, state: _State, rhs: int) -> None:
        """Factor where so many right-hand sides will need it: what is made inside of a traced solve cannot be kept."""
        op = state.operator
        first = _first_direct(op)
        if self._contracting(op, rhs):
            return
        if self.preconditioner is None and first.name not in state.prepared and _dense_reason(op, rhs) is not None:
            state.prepared[first.name] = first.init(op)

    def transpose(self, state: _State) -> _State:
        if state.operator.symmetric:
            return state
        return _State(state.operator, state.prepared, not state.transposed)

    def describe(self, state: _State) -> list[tuple[str, str]]:
        return state.methods

    def matrix_free(self, n: int) -> bool:
        return n > DENSE

    def factored(self, state: _State) -> bool:
        if self._contracting(state.operator, 1):
            return False
        return self.preconditioner is None and _dense_reason(state.operator, 1) is not None

    def _contracting(self, op: Operator, rhs: int) -> bool:
        return self.preconditioner is None and _contracting(op, rhs)

    def loosely(self, state: _State, b: Array) -> tuple[Array, Any, Counts]:
        if self.factored(state):
            if state.operator.backend.traced:  # one method, and no need to see once more how well it does
                first = _first_direct(state.operator)
                return first.loosely(self._prepared(state, first), b)
            return self.solve(replace(state, methods=[]), b)
        options = {"preconditioner": self.preconditioner}
        solver = MINRES(**options) if state.operator.symmetric else GMRES(**options)
        return solver.loosely(solver.init(state.operator), b)

    def solve(self, state: _State, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        op = state.operator
        rhs = b.shape[0] if len(b.shape) > len(op.items) + 1 else 1
        if self._contracting(op, rhs):
            return self._as_fixed_point(state, b, x0)
        why = _dense_reason(op, rhs)
        if why is not None and self.preconditioner is None:
            return self._direct(state, b, why)
        return self._iterative(state, b, x0)

    def _direct(self, state: _State, b: Array, why: str) -> tuple[Array, Any, Counts]:
        op = state.operator
        if not op.symmetric:
            state.methods = [("lu", f"{why}; {_symmetry(op)}")]
            return self._run(state, _LU, b, None)
        if op.positive_definite is False:
            result = self._run(state, _LDLT, b, None)
            name = _LDLT.describe(state.prepared["ldlt"])[0][0]
            state.methods = [(name, f"{why}; A is symmetric and indefinite")]
            return result
        if _has_root(op):
            state.methods = [("cholesky", f"{why}; A = JᵀJ, and its factor comes of a QR factorisation of J")]
            return self._run(state, _CHOLESKY, b, None)
        if op.backend.traced:  # one factorisation, and no loop with LAPACK calls in it
            state.methods = [("lu", f"{why}; compiled, where nothing is tried first")]
            return self._run(state, _LU, b, None)
        first = self._run(state, _CHOLESKY, b, None)
        why_not = "A is not positive definite" if _indefinite(state) else "cholesky did not reach the tolerance"
        state.methods = [("cholesky", f"{why}; A is symmetric"), ("lu", f"{why}; {why_not}")]
        return self._retried(state, _fallible(op.backend.xp, first[1]), _LU, b, first, 1)

    def _iterative(self, state: _State, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        op = state.operator
        xp = op.backend.xp
        options = {"rtol": self.rtol, "maxiter": self.maxiter, "preconditioner": self.preconditioner}
        first: Solver = CG(**options) if op.symmetric else GMRES(**options)
        why = f"n = {op.n} > {SMALL}; {_symmetry(op)}"
        if _has_root(op) and self.preconditioner is None:
            first, why = LSMR(**options), f"n = {op.n} > {SMALL}; A = JᵀJ, by products with J and Jᵀ"
        if op.symmetric and op.positive_definite is False:
            first, why = MINRES(**options), f"{why} and indefinite"
        state.methods = methods = [(first.name, why)]
        if first.name == "gmres":
            methods.append(("minres", f"{why}; gmres stood still, and A is symmetric"))
        result = self._run(state, first, b, x0)
        if first.name == "cg":
            negative = xp.asarray(result[1] == int(Status.NOT_POSITIVE_DEFINITE))
            methods.append(("minres", f"{why}; CG met zero or negative curvature"))
            result = self._retried(state, negative, MINRES(**options), b, result, 1)
        if op.n > DENSE:
            return result
        for solver in _after_iterations(op):
            methods.append((solver.name, f"{why}; {first.name} did not reach the tolerance"))
            result = self._retried(state, _fallible(xp, result[1]), solver, b, result, len(methods) - 1)
        return result

    def _as_fixed_point(self, state: _State, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        """Try as many products as A has columns, before it is assembled."""
        op = state.operator
        xp, why = op.backend.xp, f"n = {op.n}; A = I − ∂T of a fixed point"
        budget = min(op.n // 2, self.maxiter or PATIENCE)
        state.methods = methods = [("bicgstab", why)]
        result = self._run(state, BiCGSTAB(rtol=self.rtol, maxiter=budget), b, x0)
        most = (
            EXACT_ASSEMBLY if op.backend.traced else DENSE
        )  # a program holds room for it, whether it is needed or not
        second: Solver = _LU if op.n <= most else GMRES(rtol=self.rtol, maxiter=self.maxiter)
        methods.append((second.name, f"{why}; bicgstab did not reach the tolerance"))
        return self._retried(state, _fallible(xp, result[1]), second, b, result, 1)

    def _retried(
        self, state: _State, mask: Array, solver: Solver, b: Array, result: tuple[Any, ...], method: int
    ) -> tuple[Array, Any, Counts]:
        """Solve again, with a sturdier method, where the mask holds."""
        backend = state.operator.backend

        def again(old: tuple[Any, ...]) -> tuple[Any, ...]:
            inner = state if not backend.traced else _State(_within(state.operator, old[1]), {}, state.transposed)
            target = backend.space(b).select(mask, b, 0 * b) if isinstance(solver, MINRES) else b
            x, status, counts = self._run(inner, solver, target, None)
            return _merge(backend, mask, (x, status, counts._replace(method=method)), old)

        if backend.traced and isinstance(solver, MINRES):  # zeros cost it nothing
            return again(_filled(backend, result))
        return backend.if_any(mask, again, _filled(backend, result) if backend.traced else result)

    def _run(self, state: _State, solver: Solver, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        return solver.solve(self._prepared(state, solver), b, x0)

    def _prepared(self, state: _State, solver: Solver) -> Any:
        """The state of a method, made at its first use, for A or for its transpose."""
        if solver.name not in state.prepared:
            state.prepared[solver.name] = solver.init(state.operator)
        inner = state.prepared[solver.name]
        return solver.transpose(inner) if state.transposed else inner


def _within(op: Operator, status: Array) -> Operator:
    """The operator inside of a traced branch that is seldom taken, with products that depend on what goes into it.

    What does not is loop-invariant to a compiler, which would assemble A before the branch, each time.
    """
    if len(status.shape) != len(op.items):
        return replace(op, _cache={})
    xp = op.backend.xp
    one = xp.where(status < 0, xp.zeros(status.shape, dtype=op.dtype), 1)
    return op.rewrapped(lambda product: lambda v: product(op.backend.space(v).scale(one, v)))


def _has_root(op: Operator) -> bool:
    """Whether A = JᵀJ with a J that can be solved with in its place."""
    return getattr(op, "root", None) is not None


def _symmetry(op: Operator) -> str:
    """Say what is known of the symmetry of A."""
    if op.symmetric:
        return "A is symmetric"
    return "A is not symmetric" if op.symmetric is False else "A is not known to be symmetric"


def _fallible(xp: Any, status: Any) -> Array:
    """Items that another method may solve: what is not finite, or not what it was said to be, none can."""
    status = xp.asarray(status)
    hopeless = (status >= int(Status.BAD_PRECONDITIONER)) | (status == int(Status.NOT_SYMMETRIC))
    return xp.asarray((status > int(Status.APPROXIMATE)) & ~hopeless)


def _indefinite(state: _State) -> bool:
    """Whether the Cholesky factorisation of any item met a pivot that is not positive."""
    found = getattr(state.prepared["cholesky"], "failed", 0)
    return any_true(
        state.operator.backend.xp, state.operator.backend.xp.asarray(found) == int(Status.NOT_POSITIVE_DEFINITE)
    )


def _first_direct(op: Operator) -> Solver:
    """Return the direct method that is tried first."""
    if not op.symmetric:
        return _LU
    if op.positive_definite is False:
        return _LDLT
    return _LU if op.backend.traced and not _has_root(op) else _CHOLESKY


def _after_iterations(op: Operator) -> tuple[Solver, ...]:
    """Return the direct methods for what no iterative one solved."""
    if not op.symmetric:
        return (_LU,)
    if _has_root(op):
        return (_CHOLESKY,)
    return (_LDLT,) if op.positive_definite is False else (_CHOLESKY, _LU)


def _contracting(op: Operator, rhs: int) -> bool:
    """Whether A is I − ∂T, known by products, and they are cheaper than factors."""
    if not op.offset or op.symmetric or rhs > 1 or _has_root(op):
        return False
    if op.matrix is not None or op.sparse is not None or op.entries is not None:
        return False
    compiled = op.backend.traced and op.backend.runner is not None  # a loop costs its products and no more
    many = bool(op.items) or (compiled and op.backend.mode is Mode.INLINE)
    return op.n > SMALL or (many and op.n > (TINY if compiled else FACTORED))


def assembles(op: Operator) -> bool:
    """Whether `Auto` factors A for one right-hand side."""
    return _dense_reason(op, 1) is not None


def _dense_reason(op: Operator, rhs: int) -> str | None:
    if op.sparse is not None or op.entries is not None:
        return "the matrix is sparse"
    if op.matrix is not None:
        return "the matrix is given" if op.n <= DENSE else None
    if op.n <= SMALL:
        return f"n = {op.n} <= {SMALL}: assembled"
    if op.n <= min(8 * rhs, DENSE):
        return f"n = {op.n}, {rhs} right-hand sides: assembled"
    return None


def _filled(backend: Backend, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays in place of what a method does not tell, so that every method's result has the same form."""
    x, status, counts = result
    xp = backend.xp
    nan, zero = xp.full_like(counts.residual, math.nan), xp.zeros_like(status)
    fields = [nan if value is None else xp.broadcast_to(value, nan.shape) for value in counts[2:-1]]
    filled = Counts(zero + counts.iterations, zero + counts.matvecs, *fields)
    return x, status, filled._replace(method=_code(xp, status, counts.method))


def _code(xp: Any, status: Array, method: Any) -> Array:
    """Return a method's number as an array like the status, on its device."""
    return method if hasattr(method, "shape") else xp.full_like(xp.asarray(status), method or 0)


def _merge(backend: Backend, mask: Array, new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
    """Items of ``new`` where the mask holds, of ``old`` elsewhere; counts add up."""
    (x1, status1, c1), (x0, status0, c0) = new, old
    xp = backend.xp
    mask = xp.asarray(mask)

    def pick(a: Any, b: Any) -> Any:
        if a is None and backend.traced:
            return b
        return a if b is None or a is None else xp.where(mask, xp.asarray(a), xp.asarray(b))

    counts = Counts(
        c1.iterations + c0.iterations, c1.matvecs + c0.matvecs,
        *(pick(a, b) for a, b in zip(c1[2:-1], c0[2:-1], strict=True)),
    )  # fmt: skip
    counts = counts._replace(method=xp.where(mask, _code(xp, status1, c1.method), _code(xp, status1, c0.method)))
    return backend.space(x0).select(mask, x1, x0), pick(status1, status0), counts
