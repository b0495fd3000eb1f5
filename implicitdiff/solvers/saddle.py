"""Saddle systems through their blocks: the Schur complement, and the null space of the constraints.

With K = [[H, Jᵀ], [J, −D]], K (x, z) = (v, w) is, by rows, H x + Jᵀ z = v and J x − D z = w.

- Schur complement: x = H⁻¹(v − Jᵀ z) from the first row; the second then says (J H⁻¹ Jᵀ + D) z = J H⁻¹ v − w.
- Null space: x = x_p + P u with the particular part x_p = Jᵀ(JJᵀ)⁻¹ w and the orthogonal projector P = FFᵀ on
  null(J), F an orthonormal basis of it. Within null(J), where Jᵀ z is not seen, the first row says
  P H P u = P(v − H x_p). H may be singular as long as FᵀHF is not.

References
----------
M. Benzi, G. H. Golub, J. Liesen, "Numerical solution of saddle point problems", Acta Numerica 14 (2005) 1-137, sections
5 and 6. DOI 10.1017/S0962492904000212
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, divisor, times
from implicitdiff.errors import InputError
from implicitdiff.linalg.block_operator import SaddleOperator
from implicitdiff.linalg.equilibration import Scaling
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.rows import SparseRows
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Solver, methods_of
from implicitdiff.tolerances import RESIDUAL_OF_OTHERS

__all__ = ["NullSpace", "Schur"]


@dataclass
class _Spent:
    """Products with H that were spent before the first solve, to be told with it."""

    inner: Operator
    products: Any = 0
    assembled: bool = False

    def take(self) -> Any:
        """Return what was not told yet."""
        found, self.products = self.products, 0
        if self.inner.assembled and not self.assembled:
            self.assembled, found = True, found + self.inner.n
        return found


class _State(NamedTuple):
    """The operator with its blocks, in units, H, the state for the inner operator, and what was made of J."""

    scaling: Scaling | None
    operator: SaddleOperator
    hessian: Operator
    prepared: Any
    factor: Any
    spent: _Spent
    solved: Any = None
    status: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class _Blockwise(Solver):
    """A method that solves a saddle system through a smaller one.

    Parameters
    ----------
    inner : Solver
        For the smaller system.
    """

    inner: Any

    route: ClassVar[str] = ""
    verified: ClassVar[bool] = True

    @property
    def damping(self) -> Any:  # type: ignore[override]
        """Damping of H."""
        return getattr(self.inner, "damping", 0.0)

    @property
    def rtol(self) -> float | None:
        """Tolerance, where the inner solver has one: the residual of the whole is held to a little more."""
        rtol = getattr(self.inner, "rtol", None)
        return None if rtol is None else 100 * rtol

    def roughly(self, rtol: float) -> Solver:
        known = getattr(self.inner, "roughly", None)
        return self if known is None else replace(self, inner=known(rtol))

    def transpose(self, state: _State) -> _State:
        return state  # K is symmetric

    def factored(self, state: _State) -> bool:
        known = getattr(self.inner, "factored", None)
        return bool(known and known(state.prepared))

    def describe(self, state: _State) -> list[tuple[str, str]]:
        return [(name, f"{self.route}; {why}") for name, why in methods_of(self.inner, state.prepared)]

    def _blocks(self, operator: Operator) -> tuple[Scaling | None, SaddleOperator]:
        """Return the operator in units; as it is, where a preconditioner says what H is."""
        if not isinstance(operator, SaddleOperator):
            raise InputError(f"{type(self).__name__} solves saddle systems; name it as route= of a KKT condition.")
        if isinstance(operator.jacobian, SparseRows):
            raise InputError(f"route: the {self.route} is dense, and the system is sparse.\nNext: route='kkt'.")
        if operator.units is None or getattr(self.inner, "preconditioner", None) is not None:
            return None, operator
        return Scaling(operator.units, operator.units), operator.in_units()

    def solve(self, state: _State, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        op, scaling = state.operator, state.scaling
        right = b if scaling is None else scaling.scaled(b)
        x, status, counts = self._solve(state, right)
        status, counts = self._judged(state, right, right - op.matvec(x), status, counts)
        return x if scaling is None else scaling.restored(x), status, counts

    def _solve(self, state: _State, b: Array) -> tuple[Array, Any, Counts]:
        raise NotImplementedError

    def _judged(self, state: _State, b: Array, r: Array, status: Any, counts: Counts) -> tuple[Array, Counts]:
        """Hold the true residual of the whole system, in units, against a tolerance."""
        op = state.operator
        xp, space = op.backend.xp, op.backend.space(r)
        size = space.size(b)
        residual = space.size(r) / divisor(xp, size)
        tolerance = self.rtol or max(RESIDUAL_OF_OTHERS.at(xp, b.dtype), 30 * op.accuracy)
        status = xp.broadcast_to(xp.asarray(status, device=op.device), residual.shape)
        good = residual <= tolerance
        status = xp.where((status == 0) & ~good, xp.full_like(status, int(Status.STAGNATED)), status)
        if state.scaling is not None:
            residual = state.scaling.reported_residual(op.backend, good, (residual, tolerance), r, b)
        counts = counts._replace(residual=residual, tolerance=tolerance + 0 * residual, matvecs=counts.matvecs + 1)
        return status, counts


@dataclass(frozen=True, eq=False, repr=False)
class Schur(_Blockwise):
    """H first, then the Schur complement J H⁻¹ Jᵀ + D of order k."""

    route: ClassVar[str] = "Schur complement"

    def init(self, operator: Operator) -> _State:
        scaling, op = self._blocks(operator)
        xp, hessian = op.backend.xp, op.hessian()
        prepared = self.inner.init(hessian)  # K was damped already, and H with it
        rows = xp.moveaxis(op.jacobian, -2, 0)  # k right-hand sides (k, *items, n)
        solved, status, counts = self.inner.solve(prepared, rows)
        spent = _Spent(hessian, xp.sum(xp.asarray(counts.matvecs + 0 * xp.asarray(status)), axis=0))
        solved = xp.moveaxis(solved, 0, -2)  # (*items, k, n), the rows H⁻¹ Jᵢᵀ
        eye = xp.eye(op.n - op.primal, dtype=op.dtype, device=op.device)
        complement = op.jacobian @ xp.matrix_transpose(solved) + op.corner[..., None] * eye
        factor = op.backend.lu_factor(op.backend.to_double(complement))
        return _State(scaling, op, hessian, prepared, factor, spent, solved, xp.max(xp.asarray(status), axis=0))

    def _solve(self, state: _State, b: Array) -> tuple[Array, Any, Counts]:
        op, n = state.operator, state.operator.primal
        xp = op.backend.xp
        v, w = b[..., :n], b[..., n:]
        t, status, counts = self.inner.solve(state.prepared, v)
        z = _factored(op, state.factor, times(op.jacobian, t) - w)
        x = t - times(xp.matrix_transpose(state.solved), z)
        worst = xp.maximum(xp.asarray(status), state.status)
        return op.backend.concat([x, z]), worst, _counts(counts, state.spent.take())


@dataclass(frozen=True, eq=False, repr=False)
class NullSpace(_Blockwise):
    """The reduced Hessian on null(J), by the orthogonal projector on it."""

    route: ClassVar[str] = "null space"

    def init(self, operator: Operator) -> _State:
        scaling, op = self._blocks(operator)
        xp, hessian = op.backend.xp, op.hessian()
        k = op.n - op.primal
        eye = xp.eye(k, dtype=op.dtype, device=op.device)
        # inactive rows of J are zero; D, positive there and zero elsewhere, keeps the Gram matrix regular
        gram = op.jacobian @ xp.matrix_transpose(op.jacobian) + op.corner[..., None] * eye
        factor = op.backend.lu_factor(op.backend.to_double(gram))
        size = xp.sqrt(xp.sum(op.jacobian * op.jacobian, axis=(-2, -1)) / max(k, 1))
        size = divisor(xp, size)[..., None]

        def product(x: Array) -> Array:  # P H P + h (I − P): H on null(J), the size of the rows of J beside it
            inside = _projected(op, factor, x)
            return _projected(op, factor, hessian.matvec(inside)) + size * (x - inside)

        inner = Operator(
            op.backend, op.primal, op.primal, op.items, op.dtype, op.device, forward=product, adjoint=product,
            kind=op.kind, label="the reduced Hessian", symmetric=True, trusted=op.trusted, accuracy=op.accuracy,
        )  # fmt: skip
        return _State(scaling, op, hessian, self.inner.init(inner), factor, _Spent(inner))

    def _solve(self, state: _State, b: Array) -> tuple[Array, Any, Counts]:
        op, n = state.operator, state.operator.primal
        xp, jacobian_t = op.backend.xp, op.backend.xp.matrix_transpose(op.jacobian)
        v, w = b[..., :n], b[..., n:]
        particular = times(jacobian_t, _factored(op, state.factor, w))
        rest = v - state.hessian.matvec(particular)
        u, status, counts = self.inner.solve(state.prepared, _projected(op, state.factor, rest))
        x = particular + _projected(op, state.factor, u)
        z = _factored(op, state.factor, times(op.jacobian, v - state.hessian.matvec(x)))
        inactive = xp.broadcast_to(op.corner > 0, z.shape)
        safe = xp.where(op.corner > 0, op.corner, xp.ones_like(op.corner))
        return op.backend.concat([x, xp.where(inactive, -w / safe, z)]), status, _counts(counts, 2 + state.spent.take())


def _factored(op: Operator, factor: Any, b: Array) -> Array:
    """Solve with a factored matrix (*items, k, k) for b of shape (*rhs, *items, k)."""
    backend, lead = op.backend, len(op.items)
    xp = backend.xp
    many = len(b.shape) > lead + 1
    columns = xp.moveaxis(b, 0, -1) if many else b[..., None]
    x = backend.astype(backend.lu_solve(factor, backend.to_double(columns), False), b.dtype)
    return xp.moveaxis(x, -1, 0) if many else x[..., 0]


def _projected(op: SaddleOperator, factor: Any, x: Array) -> Array:
    """P x = x − Jᵀ(JJᵀ)⁻¹ J x."""
    xp = op.backend.xp
    z = _factored(op, factor, times(op.jacobian, x))
    return x - times(xp.matrix_transpose(op.jacobian), z)


def _counts(counts: Counts, more: int) -> Counts:
    """Counts of the inner solve, as those of a solve that says nothing of its own residual."""
    counts = Counts(*counts)
    return Counts(counts.iterations, counts.matvecs + more, None, counts.operator_norm, counts.rcond)
