"""What the iterative methods of least squares share.

What they find is of least norm only in the norm in which they iterate: that of the user, so nothing is equilibrated,
unless the matrix is so small that its null spaces are found from its singular values beside. Then b loses its part
outside of the range first, and x its part in the null space afterwards, both in the user's norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, divisor, item_norm
from implicitdiff.linalg.block_operator import padded
from implicitdiff.linalg.equilibration import Scaling, equilibrated, of_operator
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner, as_preconditioner
from implicitdiff.linalg.rectangular import regularised, squared
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Krylov, KrylovState
from implicitdiff.solvers.cycles import unit_of
from implicitdiff.solvers.gram import GramState, in_two_steps, two_steps
from implicitdiff.solvers.pinv import Pinv, PinvState, without
from implicitdiff.solvers.unit import one_step
from implicitdiff.tolerances import FACTORED, LEAST_SQUARES, LOOSE, RESIDUAL

__all__ = ["LeastSquaresKrylov"]


class FramedState(NamedTuple):
    """A system that is made square, or equilibrated, beside what it was before."""

    inner: KrylovState
    columns: int
    spaces: PinvState | None = None

    @property
    def scaling(self) -> Scaling | None:
        """By which it is equilibrated."""
        return self.inner.scaling


@dataclass(frozen=True, eq=False, repr=False)
class LeastSquaresKrylov(Krylov):
    """An iterative method whose x is that of least squares, and of least norm, whatever A and b are."""

    monotone: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    least_squares: ClassVar[bool] = True

    def init(self, operator: Operator) -> Any:
        if getattr(operator, "root", None) is not None and not self.symmetric_only and self.preconditioner is None:
            return two_steps(self, operator)
        whole = regularised(operator, self.damping)
        op = whole.settled() if whole.rows == whole.columns else squared(whole)
        forward = op.matvec  # derived here, not first inside of a loop
        op = replace(op, forward=forward, adjoint=forward if op.symmetric else op.rmatvec, _cache=op._cache)
        if self.preconditioner is not None:
            return KrylovState(op, as_preconditioner(self.preconditioner, op))
        plain = KrylovState(op, Preconditioner())
        if whole.rows != whole.columns:
            return FramedState(plain, whole.columns)
        if op.n > FACTORED or (op.like is not None and is_tree_vector(op.like)):
            return plain
        scaling = of_operator(op, symmetric=self.symmetric_only)
        if scaling is None:
            return plain
        return FramedState(KrylovState(equilibrated(op, scaling), Preconditioner(), scaling), op.n, Pinv().init(op))

    def transpose(self, state: Any) -> Any:
        if isinstance(state, GramState):
            return state
        if isinstance(state, KrylovState):
            return super().transpose(state)
        inner, spaces = super().transpose(state.inner), state.spaces
        return state._replace(inner=inner, spaces=None if spaces is None else Pinv().transpose(spaces))

    def loosely(self, state: Any, b: Array) -> tuple[Array, Any, Counts]:
        if isinstance(state, GramState):
            return in_two_steps(state._replace(solver=replace(state.solver, rtol=LOOSE)), b, None)
        inner = state if isinstance(state, KrylovState) else state.inner
        if inner.operator.backend.mode is Mode.INLINE:
            return one_step(inner, b)
        return super().loosely(inner, b)

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        if isinstance(state, GramState):
            return in_two_steps(state, b, x0)
        if isinstance(state, KrylovState):
            return super().solve(state, b, x0)
        inner, columns, spaces = state
        backend, most = inner.operator.backend, inner.operator.n
        if spaces is None:
            start = None if x0 is None else padded(backend, x0, most)
            x, status, counts = super().solve(inner, padded(backend, b, most), start)
            return x[..., :columns], status, counts
        tolerance = backend.space(b).scalar(self.rtol or RESIDUAL.at(backend.xp, b.dtype))
        solvable, right = spaces.in_range(
            backend.to_double(b), backend.xp.asarray(tolerance, device=spaces.operator.device)
        )
        return _projected(spaces, b, solvable, super().solve(inner, backend.astype(right, b.dtype), x0))

    def _solve(
        self, state: KrylovState, b: Array, x0: Array | None, memory: Any = None, most: Any = None
    ) -> tuple[Any, ...]:
        x, status, counts = super()._solve(state, b, x0)
        least = status == int(Status.LEAST_SQUARES)
        if state.preconditioner.identity:
            old = (x, status, counts.iterations, counts.matvecs, counts.residual)
            settle = partial(self._settled, state, b, least, counts)
            new = state.operator.backend.if_any(least, settle, old)
            x, status = new[:2]
            counts = counts._replace(iterations=new[2], matvecs=new[3], residual=new[4])
        return x, status, counts._replace(leak=counts.residual)

    def _settled(
        self, state: KrylovState, b: Array, least: Array, counts: Counts, found: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Make sure of what ended as least squares: x, status, iterations, products and residual.

        With r = b − A x the part Aᵀ r has to vanish. Where rounding left some of it, that is of e = (Aᵀ)⁺ Aᵀ r, of a
        system that has a solution; b − (r − e) is in the range of A, and x is found anew from it.
        """
        op, back = state.operator, Krylov.transpose(self, state)
        space = op.backend.space(b)
        unit, size = unit_of(space, space.subtract(space.copy(b), op.matvec(found[0])))
        image, level = op.rmatvec(unit()), LEAST_SQUARES.of(space.eps) * counts.operator_norm
        again = least & ~(space.norm(image) <= level)

        def anew(old: tuple[Any, ...]) -> tuple[Any, ...]:
            x, status, iterations, matvecs, residual = old
            none = space.scale(space.scalar(0.0), space.copy(image))
            e, _, first = Krylov._solve(self, back, space.select(again, image, none), None)
            outside = space.subtract(unit(), e)
            left = space.norm(op.rmatvec(outside)) <= level * space.norm(outside)
            right = space.subtract(space.copy(b), space.scale(size, outside))
            best, ended, second = Krylov._solve(self, state, space.select(again, right, none), None)
            good = again & left & (ended == int(Status.CONVERGED))
            status = space.where(again & ~good, int(Status.STAGNATED), status)
            _, rest = unit_of(space, space.subtract(space.copy(b), op.matvec(best)))
            residual = space.where(good, rest / space.where(good, unit_of(space, b)[1], space.scalar(1.0)), residual)
            spent = iterations + first.iterations + second.iterations, matvecs + first.matvecs + second.matvecs + 2
            return space.select(good, best, x), status, *spent, residual

        x, status, iterations, matvecs, residual = op.backend.if_any(again, anew, found)
        return x, status, iterations, matvecs + 2, residual


def _without(spaces: PinvState, basis: Array | None, x: Array) -> Array:
    backend = spaces.operator.backend
    return x if basis is None else backend.astype(without(backend.xp, basis, backend.to_double(x)), x.dtype)


def _projected(
    spaces: PinvState, b: Array, solvable: Array, found: tuple[Array, Any, Counts]
) -> tuple[Array, Any, Counts]:
    """Take the part in the null space out of x, and say what b has outside of the range."""
    op, (x, status, counts) = spaces.operator, found
    xp = op.backend.xp
    x = _without(spaces, spaces.null, x)
    right = _without(spaces, spaces.left, b)
    leak = item_norm(xp, b - right) / divisor(xp, item_norm(xp, b))
    residual = item_norm(xp, b - op.matvec(x)) / divisor(xp, item_norm(xp, b))
    status = xp.asarray(status, device=op.device) + xp.zeros_like(xp.astype(leak, xp.int32))
    outside = (status == int(Status.CONVERGED)) & ~solvable
    leak = xp.where(solvable, xp.asarray(counts.residual, dtype=leak.dtype, device=op.device), leak)
    status = xp.where(outside, xp.full_like(status, int(Status.LEAST_SQUARES)), status)
    rank = spaces.rank + xp.astype(0 * leak, xp.int32)
    residual = xp.where(outside, residual, xp.asarray(counts.residual, dtype=residual.dtype, device=op.device))
    return x, status, counts._replace(residual=residual, rank=rank, leak=leak)
