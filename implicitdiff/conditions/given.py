"""What was given of derivatives to a condition with constraints, to be held against its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, divisor, probe_vector
from implicitdiff.conditions.base import Checked
from implicitdiff.linalg.operator import LinearMap, Operator
from implicitdiff.linalg.rows import absolute, rows_times

if TYPE_CHECKING:
    from implicitdiff.conditions.lagrangian import FirstOrder, Lagrangian

__all__ = ["checked_parts"]

_NOTHING: tuple[str, Any] = ("", None)


def checked_parts(lagrangian: Lagrangian, first: FirstOrder, z: Array) -> tuple[Checked, ...]:
    """Return each function with what was given of its derivatives: f, the constraints, and their Lagrangian."""
    return (*_of_f(lagrangian), *_of_constraints(lagrangian, first), *_of_lagrangian(lagrangian, z))


def _of_f(of: Lagrangian) -> Iterator[Checked]:
    given, point = of.objective, of.point
    if not any(g is not None for g in (given.grad, given.hvp, given.hessian)):
        return
    second, term = of.second_of_f, of.objective_term
    matrix = None if given.hessian is None or second is None else second
    hvp = None if given.hvp is None or second is None else second.forward
    yield Checked(
        point, "f" if term.slope is None else "grad", _gradient(of, [term]), term.value(point), lambda: of.of_f,
        ("hvp", hvp), _NOTHING, ("hessian", _by_matrix(matrix)), None, None, True, of="f",
    )  # fmt: skip


def _by_matrix(op: Operator | None) -> Any:
    """The matrix alone, where products were given beside it."""
    return None if op is None else LinearMap(
        op.backend, op.n, op.n, op.items, op.dtype, op.device, forward=op.adjoint
    )  # fmt: skip


def _gradient(of: Lagrangian, terms: list[Any]) -> Callable[[Array, Array], Array]:
    """∇ of a sum of terms, as far as it is given; by autodiff, or differences, where it is not."""
    return lambda y, theta: of.slope(terms, y, theta)


def _of_constraints(of: Lagrangian, first: FirstOrder) -> Iterator[Checked]:
    point, size = of.point, _per_row(of, first)
    for c, s in zip(of.constraints, of.slices, strict=True):
        if c.jacobian is not None and not c.linear:  # or it is ours
            matrix = _lazy(of, s.stop - s.start, partial(partial, _rows_times, first.rows, s))
            yield Checked(
                point, c.name, point.raveled_function(c.values, c.name), None, None, _NOTHING, _NOTHING,
                (f"{c.name}_jacobian", matrix), None, None, False,
            )  # fmt: skip
        if c.hessian is not None:
            terms = [of.term(c, s, size)]
            name = c.name if c.jacobian is None else f"{c.name}_jacobian"
            derive = cache(partial(_first, of, terms))
            matrix = _lazy(of, point.y.n, partial(_second, terms[0]))
            yield Checked(
                point, name, _gradient(of, terms), terms[0].value(point), derive, _NOTHING, _NOTHING,
                (f"{c.name}_hessian", matrix), None, None, True, of=c.name,
            )  # fmt: skip


def _of_lagrangian(of: Lagrangian, z: Array) -> Iterator[Checked]:
    if of.objective.of_lagrangian is None:
        return
    terms = of.terms(z)
    matrix = _lazy(of, of.point.y.n, lambda: of.whole_hessian(z).matvec)
    # of several functions, what is derived of a part says nothing of the whole
    exact = all(t.slope for t in terms) or not any(t.slope for t in terms)
    derive = cache(partial(_first, of, terms)) if exact else None
    yield Checked(
        of.point, "the Lagrangian", _gradient(of, terms), of.summed(terms, "value", of.point), derive, _NOTHING,
        _NOTHING, ("lagrangian_hessian", matrix), None, None, True, of="the Lagrangian",
    )  # fmt: skip


def _first(of: Lagrangian, terms: list[Any]) -> Any:
    return of.derived(terms, of.point)[0]


def _second(term: Any) -> Callable[[Array], Array]:
    found: Callable[[Array], Array] = term.second().matvec
    return found


def _rows_times(rows: Any, s: slice, v: Array) -> Array:
    """The product with a group of rows."""
    return rows_times(rows, v)[..., s]


def _lazy(of: Lagrangian, rows: int, product: Callable[[], Callable[[Array], Array]]) -> LinearMap:
    """A map whose product is made when it is first asked for: of what was looked at before, nothing is."""
    made = cache(product)
    p = of.point
    return LinearMap(
        of.backend, rows, p.y.n, p.items, p.y.dtype, p.y.device, forward=lambda v: made()(v)
    )  # fmt: skip


def _per_row(of: Lagrangian, first: FirstOrder) -> Array:
    """Multipliers of which each gives its constraint the same weight, whatever its unit."""
    xp = of.backend.xp
    size = rows_times(absolute(xp, first.rows), xp.abs(of.y))
    return 1 / divisor(xp, size) * (1.5 + probe_vector(xp, size.shape[-1], size.dtype, of.point.y.device))
