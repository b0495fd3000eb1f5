"""What the approximations share: the true residual, divergence that is told, the largest eigenvalue.

An approximation is what its formula says, of A as it is: nothing is equilibrated. It ends as `Status.APPROXIMATE`
however small its residual is, and the residual is the true one, for one product more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.preconditioner import Preconditioner
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.cycles import unit_of
from implicitdiff.tolerances import POWER, POWER_CHANGE

__all__ = ["Applied", "ApproximateState", "Approximation", "dominant", "number"]


class ApproximateState(NamedTuple):
    """An operator, and what a method prepared for it: a step, a sketch, a diagonal."""

    operator: Operator
    prepared: Any = None


class Applied(NamedTuple):
    """What a method made of a right-hand side of norm one.

    ``status`` is 0 where there is nothing to say; ``before`` the norm of the residual one term earlier, for a series.
    """

    x: Array
    iterations: Any = 0
    matvecs: Any = 0
    status: Any = 0
    before: Any = None


class Approximation(Solver):
    """Base of the approximations by name: ``prepare`` sees the operator once, ``apply`` each right-hand side."""

    approximate: ClassVar[bool] = True
    verified: ClassVar[bool] = True
    cost: ClassVar[str] = ""
    """The option that says how many products it takes, if there is one."""
    products_only: ClassVar[bool] = True
    """Whether it needs products with A and the operations of a vector space, and nothing else."""

    def prepare(self, operator: Operator) -> Any:
        """Return what is needed of A beside its products, the same for A and Aᵀ."""
        return None

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        """Approximate A⁻¹ r for r of moderate size, which may not be overwritten."""
        raise NotImplementedError

    def init(self, operator: Operator) -> ApproximateState:
        return ApproximateState(operator, self.prepare(operator))

    def transpose(self, state: ApproximateState) -> ApproximateState:
        return state._replace(operator=state.operator.transpose())

    def matrix_free(self, n: int) -> bool:
        return self.products_only

    @classmethod
    def at_costs(cls, products: Sequence[int], n: int) -> list[Any]:
        """Return it at about these numbers of products, for n unknowns; once where it has no such choice."""
        kind: Any = cls
        if not cls.cost:
            return [kind()]
        return [kind(**{cls.cost: k}) for k in sorted({min(k, n) for k in products})]

    def as_preconditioner(self, operator: Operator) -> Preconditioner:
        """Return it as a preconditioner for A, if it takes no products with A once it is prepared."""
        raise InputError(
            f"preconditioner = {self!r}: it would take products with A at each step, which none counts.\n"
            "Next: Nystrom(rank) or Diagonal()."
        )

    def solve(self, state: ApproximateState, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        op = state.operator
        space = op.backend.space(b)
        unit, scale = unit_of(space, b)  # neither 1e-30 nor 1e30 under- or overflows
        start, r, spent = None, unit(), 0
        if x0 is not None:
            start, r, spent = _start(space, op, unit, x0, scale)
        found = self.apply(state, space, r)
        x = space.copy(found.x) if start is None else space.axpy(space.scalar(1.0), start, space.copy(found.x))
        residual = space.norm(space.subtract(unit(), op.matvec(x)))
        status = space.where(space.isfinite(residual), int(Status.APPROXIMATE), int(Status.NON_FINITE))
        if found.before is not None:
            size = space.norm(r)
            grown = (residual > found.before) & (residual > (1 + space.eps**0.5) * size)
            status = space.where(grown, int(Status.DIVERGED), status)
        status = space.where(space.isfinite(residual) & (found.status != 0), found.status, status)
        counts = Counts(found.iterations, found.matvecs + spent + 1, residual)
        return space.scale(scale, x), status, counts


def _start(space: Any, op: Operator, unit: Any, x0: Array, scale: Array) -> tuple[Array, Array, int]:
    """Return a start, its residual, and the products spent: a start worse than zero (or NaN) is dropped."""
    usable, r = scale > 0, unit()
    start = space.scale(1 / space.where(usable, scale, space.scalar(1.0)), space.copy(x0))
    r0 = space.subtract(unit(), op.matvec(start))
    better = usable & (space.norm(r0) < space.norm(r))
    return space.select(better, start, space.zeros()), space.select(better, r0, r), 1


def number(space: Any, op: Operator, value: Any) -> Array:
    """One number per item of the operator as a scalar of a space, which may have right-hand sides beside."""
    if not getattr(value, "shape", ()) and not op.backend.traced:
        return space.scalar(float(value))
    return space.scalar(1.0) * value


class _Power(NamedTuple):
    z: Array
    size: Array
    quotient: Array
    active: Array
    turn: Any


def dominant(op: Operator) -> Array:
    """Estimate the eigenvalue of A of largest size, with its sign, per item: by power iteration.

    Its size is taken from below where A is symmetric. The products are counted with those that A has cost.
    """
    if "dominant" in op._cache:
        return op._cache["dominant"]
    backend, xp = op.backend, op.backend.xp
    like = op.like
    if like is None:
        like = xp.zeros((*op.items, op.n), dtype=op.dtype, device=op.device)
    space = backend.space(like)
    z = space.copy(space.probe())
    z = space.scale(1 / space.norm(z), z)
    zero = space.scalar(0.0)
    seen = zero == 0

    def step(s: _Power) -> _Power:
        image = space.copy(op.matvec(s.z))
        quotient, size = space.inner(s.z, image), space.norm(image)
        usable = (size > 0) & space.isfinite(size)
        # an item that is done keeps its number whatever the others do
        size, quotient = space.where(s.active, size, s.size), space.where(s.active, quotient, s.quotient)
        changed = abs(size - s.size) > POWER_CHANGE * size
        image = space.scale(space.where(usable, 1 / space.where(usable, size, 1 + zero), zero), image)
        return _Power(image, size, quotient, s.active & changed & usable, s.turn + 1)

    # where values are not seen, all turns are made, so that the number of products is known
    def goes_on(s: _Power) -> Any:
        return (s.turn < POWER) if backend.traced else space.any(s.active) & (s.turn < POWER)

    first = step(_Power(z, zero, zero, seen, 0))  # not in the loop: what it starts from varies over devices as A does
    end = backend.while_loop(goes_on, step, first, limit=POWER - 1)
    op._cache["probes"] = op.probes + (POWER if backend.traced else int(end.turn))
    found = space.where(end.quotient < 0, -end.size, end.size)
    op._cache["dominant"] = found = xp.asarray(found, dtype=op.dtype, device=op.device)
    return found
