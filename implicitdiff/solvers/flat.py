"""Singular systems as a condition asks for them: ``singular="gauge"`` or ``"minimum-norm"``, with any solver.

A direct method cannot factor a singular matrix: the pseudo-inverse takes its place, which decides on the rank. An
iterative one runs as it is, since a system that has a solution is as good as a regular one to it; where it fails, a
method of least squares says whether there is a solution at all, and what part of the right-hand side is in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, needed
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.auto import Auto, assembles
from implicitdiff.solvers.base import Solver, methods_of
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.lsmr import LSMR
from implicitdiff.solvers.minres import MINRES
from implicitdiff.solvers.minres_qlp import MINRESQLP
from implicitdiff.solvers.pinv import Pinv, PinvState
from implicitdiff.tolerances import DENSE

__all__ = ["OnRange"]


class _State(NamedTuple):
    """The methods with their states: the first, and the one that is sturdier, where there is one."""

    operator: Operator
    first: tuple[Solver, Any]
    second: tuple[Solver, Any] | None

    @property
    def scaling(self) -> Any:
        """By which the system is equilibrated."""
        return getattr(self.first[1], "scaling", None)


@dataclass(frozen=True, eq=False, repr=False)
class OnRange(Solver):
    """A x = b for a singular A: any solution, or the one of least squares and least norm.

    Parameters
    ----------
    inner : Solver
        The method that was asked for.
    singular : {"gauge", "minimum-norm"}
        Whether any solution will do; `Status.LEAST_SQUARES` says that there is none.
    """

    inner: Any
    singular: str

    verified: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    least_squares: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the method that was asked for."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    @property
    def damping(self) -> Any:  # type: ignore[override]
        """Damping of A."""
        return getattr(self.inner, "damping", 0.0)

    @property
    def accepting(self) -> bool:
        """Whether a solution of least squares is what was asked for."""
        return self.singular == "minimum-norm"

    def roughly(self, rtol: float) -> Solver:
        known = getattr(self.inner, "roughly", None)
        return self if known is None else replace(self, inner=known(rtol))

    def matrix_free(self, n: int) -> bool:
        known = getattr(self.inner, "matrix_free", None)
        return bool(known and known(n))

    def init(self, operator: Operator) -> _State:
        first, second = self._methods(operator)
        if second is not None:  # its products are derived here, not first inside of a loop
            operator = replace(operator, forward=operator.matvec, _cache=operator._cache)
        started = first.init(operator)
        if self.singular == "gauge" and isinstance(started, PinvState):
            started = started._replace(least_norm=False)  # any will do: no norm mixes the units
        made = None if second is None or not operator.backend.traced else second.init(operator)
        return _State(operator, (first, started), None if second is None else (second, made))

    def _methods(self, operator: Operator) -> tuple[Any, Solver | None]:
        """Return the method that is used first, and a sturdier one for what it does not solve."""
        inner, symmetric = self.inner, bool(operator.symmetric)
        if getattr(inner, "least_squares", False):
            return inner, None
        auto = isinstance(inner, Auto)
        direct = getattr(inner, "direct", False) or (auto and inner.preconditioner is None and assembles(operator))
        if direct and (operator.sparse is None or operator.n <= DENSE):
            return Pinv(), None
        names = ("rtol", "maxiter", "preconditioner")
        options = {name: getattr(inner, name) for name in names if getattr(inner, name, None) is not None}
        sturdy: Solver = MINRESQLP(**options) if symmetric else LSMR(**options)
        if direct or self.singular == "minimum-norm":
            return sturdy, None
        if auto:
            return MINRES(**options) if symmetric else GMRES(**options), sturdy
        return inner, sturdy

    def transpose(self, state: _State) -> _State:
        operator = state.operator.transpose()
        if operator is state.operator:
            return state
        (first, made), second = state.first, state.second
        if second is not None:
            second = second[0], None if second[1] is None else second[0].transpose(second[1])
        return _State(operator, (first, first.transpose(made)), second)

    def factored(self, state: _State) -> bool:
        known = getattr(state.first[0], "factored", None)
        return bool(known and known(state.first[1]))

    def loosely(self, state: _State, b: Array) -> tuple[Array, Any, Counts]:
        method, made = state.first
        return getattr(method, "loosely", method.solve)(made, b)

    def describe(self, state: _State) -> list[tuple[str, str]]:
        method, made = state.first
        why = f"singular={self.singular!r}"
        names = [(name, f"{reason}; {why}") for name, reason in methods_of(method, made)[:1]]
        if method is not self.inner:
            names = [(method.name, f"for {self.name}; {why}")]
        if state.second is not None:
            names.append((state.second[0].name, f"{why}; {names[0][0]} found no solution"))
        return names

    def solve(self, state: _State, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        (method, made), second = state.first, state.second
        x, status, counts = method.solve(made, b, x0)
        backend = state.operator.backend
        xp = backend.xp
        if second is None:
            return x, status, counts
        status = xp.asarray(status, device=state.operator.device)
        mask = (status > int(Status.APPROXIMATE)) & (status < int(Status.BAD_PRECONDITIONER))
        mask = mask & (status != int(Status.NOT_SYMMETRIC))
        residual = xp.asarray(counts.residual, device=state.operator.device)
        counts = counts._replace(residual=residual, leak=residual, rank=None, method=xp.zeros_like(status))
        if not needed(backend, mask):
            return x, status, counts
        return self._again(state, b, mask, (x, status, counts))

    def _again(
        self, state: _State, b: Array, mask: Array, found: tuple[Array, Any, Counts]
    ) -> tuple[Array, Any, Counts]:
        """Solve by the sturdier method where the mask holds: it tells the part of b that nothing reaches."""
        x, status, counts = found
        method, made = state.second  # type: ignore[misc]
        backend = state.operator.backend
        xp, space = backend.xp, backend.space(b)
        made = method.init(state.operator) if made is None else made
        mask = xp.broadcast_to(mask, space.items)
        best, ended, more = method.solve(made, space.select(mask, b, 0 * b), None)

        def pick(new: Any, old: Any) -> Array:
            new, old = (xp.asarray(value, device=state.operator.device) for value in (new, old))
            return xp.where(mask, new, old)

        numbers = {name: pick(getattr(more, name), getattr(counts, name)) for name in ("residual", "tolerance")}
        none = xp.zeros_like(xp.astype(mask, xp.int32))
        return space.select(mask, best, x), pick(ended, status), counts._replace(
            iterations=none + counts.iterations + more.iterations, matvecs=counts.matvecs + more.matvecs,
            leak=numbers["residual"], method=xp.where(mask, none + 1, none), condition=None, **numbers,
        )  # fmt: skip
