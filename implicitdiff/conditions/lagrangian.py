"""The Lagrangian 𝓛 = f + zᵀc at a point, from what is given of derivatives, and from what is missing.

𝓛 is a sum of terms: f, and zᵀc for each group of constraints. The gradient ∇_y of a term is given (∇f, Jᵀz) or derived,
and so is its Hessian. Terms of one kind are derived together: differences of a sum cost as much as those of one term.

- Of given gradients G: H and ∂²𝓛/∂θ∂y are first derivatives of G.
- Of values S alone: they are second derivatives of S, as for a stationary point.
- ∂c/∂θ, and J where it is missing, are first derivatives of c.

K and B are then put together from blocks. J is known, so that no difference is taken along a multiplier, which would
cost the coordinates of z as well, and find J again, with an error.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Maps
from implicitdiff.conditions.constraint import Constraint, Function, paired, weighted
from implicitdiff.conditions.given import checked_parts
from implicitdiff.conditions.matrices import matrix_operator
from implicitdiff.conditions.point import Point, VectorFunction
from implicitdiff.linalg.operator import LinearMap, Operator, Product, matrix_map, matrix_product
from implicitdiff.linalg.rows import SparseMatrix, SparseRows, as_sparse, rows_times, stacked, turned_times
from implicitdiff.linalg.sparsity import assembled, sparsity_of
from implicitdiff.namespaces import without

__all__ = ["FirstOrder", "Lagrangian", "Objective"]


class Objective(NamedTuple):
    """f and what is given of its derivatives, as functions of the user's trees; and the Hessian of 𝓛."""

    f: Callable[..., Any]
    grad: Callable[..., Any] | None = None
    hvp: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    of_lagrangian: Callable[..., Any] | None = None

    @property
    def given(self) -> tuple[Callable[..., Any], ...]:
        """Derivatives that are given."""
        return tuple(g for g in self[1:] if g is not None)


class FirstOrder(NamedTuple):
    """The problem at a point, to first order; k constraints, of which the first p are equalities."""

    p: int
    values: Array
    """c, shape (*items, k)."""
    rows: Any
    """J, an array or `SparseRows`, shape (*items, k, n)."""
    gradient: Array
    """∇f, shape (*items, n)."""
    curve: Callable[[Array], Array]
    """The product with the Hessian of f, for vectors (*rhs, *items, n)."""
    hessian: Array | None = None
    """That as a matrix, (*items, n, n), where it is at hand."""
    lagrangian: Lagrangian | None = None
    """Where the system is put together from blocks."""


class _Term(NamedTuple):
    """A part of the Lagrangian; its value, and its gradient where that is given, are functions of vectors."""

    name: str
    value: Callable[[Point], Function]
    slope: Callable[[Point], Function] | None
    second: Callable[[], Operator | None]
    """Its Hessian, where that is given."""
    linear: bool = False
    """Whether it is affine in y, and has no θ in it."""


class Lagrangian:
    """The Lagrangian at a point.

    Parameters
    ----------
    point : Point
    objective : Objective
    constraints : sequence of Constraint
        Equalities first.
    sparse : bool
        Whether J may be sparse.
    """

    def __init__(
        self, point: Point, objective: Objective, constraints: Sequence[Constraint], *, sparse: bool = True
    ) -> None:  # fmt: skip
        self._sparse = sparse
        self.point, self.objective, self.constraints = point, objective, constraints
        self.backend, self.y, self.theta = point.backend, point.y.vector, point.theta.vector
        self.name = " and ".join(dict.fromkeys(c.name for c in constraints))
        self.values = point.part().raveled_function(self._all, self.name)

    def _all(self, y: Any, theta: Any, *args: Any) -> tuple[Any, ...]:
        return tuple(c.values(y, theta, *args) for c in self.constraints)

    # -- to first order ------------------------------------------------------------------------------
    @cached_property
    def parts(self) -> list[Array]:
        """The values of each group of constraints, infinite bounds among them."""
        named = ((c.fun, c.name) for c in self.constraints)
        return [self.point.raveled_function(f, name)(self.y, self.theta) for f, name in named]

    @cached_property
    def slices(self) -> list[slice]:
        """Where the groups lie in c."""
        ends = list(itertools.accumulate(int(part.shape[-1]) for part in self.parts))
        return [slice(end - int(part.shape[-1]), end) for end, part in zip(ends, self.parts, strict=True)]

    @cached_property
    def of_values(self) -> Any:
        """Derivatives of c."""
        return self.backend.differentiate(self.values, self.y, self.theta)

    @cached_property
    def of_f(self) -> Any:
        """Derivatives of ∇f."""
        return self.derived([self.objective_term], self.point)[0]

    @property
    def recorded(self) -> bool:
        """Whether nothing is given, and autodiff takes all of it."""
        given = (*self.objective.given, *(g for c in self.constraints for g in c.given))
        return not given and (self.backend.vmap is not None or self.of_f.kind == self.of_values.kind == "autodiff")

    def first_order(self) -> FirstOrder:
        """Constraints, their gradients, and ∇f."""
        backend, dtype = self.backend, self.point.y.dtype
        p = sum(int(c.shape[-1]) for c, of in zip(self.parts, self.constraints, strict=True) if of.kind == "eq")
        values = self.parts[0] if len(self.parts) == 1 else backend.concat(self.parts)
        slope = self.objective_term.slope
        gradient = self.of_f.value() if slope is None else slope(self.point)(self.y, self.theta)
        rows = self._rows()
        rows = rows if isinstance(rows, SparseRows) else backend.astype(rows, dtype)
        values, gradient = (backend.astype(x, dtype) for x in (values, gradient))  # widened
        curve = self.of_f.hvp if (second := self.second_of_f) is None else second.matvec
        product = lambda v: backend.astype(curve(v), dtype)  # noqa: E731
        lagrangian = None if self.recorded else self
        return FirstOrder(p, values, rows, gradient, product, None if second is None else second.matrix, lagrangian)

    @cached_property
    def _given_rows(self) -> list[Any]:
        """∂c/∂y of each group at the point, as far as it is given."""
        rows = (c.rows(self.point, s.stop - s.start) for c, s in zip(self.constraints, self.slices, strict=True))
        found: list[Any] = [None if of is None else of(self.y, self.theta) for of in rows]
        return found if self._sparse else [r.toarray() if hasattr(r, "toarray") else r for r in found]

    @property
    def dense(self) -> int:
        """Number of constraints of which no sparse gradients are given."""
        parts = zip(self._given_rows, self.slices, strict=True)
        return sum(s.stop - s.start for rows, s in parts if not hasattr(rows, "tocsr"))

    def _rows(self) -> Any:
        """J at the point."""
        backend, missing = self.backend, any(rows is None for rows in self._given_rows)
        derived: Any = self._derived_rows() if missing else None
        parts = zip(self._given_rows, self.slices, strict=True)
        found = [derived[..., s, :] if rows is None else rows for rows, s in parts]
        if any(hasattr(rows, "tocsr") for rows in found):
            y = self.point.y
            wrapped = [SparseMatrix(r).on(backend, (), y.dtype, y.device) if hasattr(r, "tocsr") else r for r in found]
            return stacked([as_sparse(backend, rows) for rows in wrapped])
        return found[0] if len(found) == 1 else backend.xp.concat(found, axis=-2)

    def _derived_rows(self) -> Any:
        backend, items, k = self.backend, self.point.items, self.slices[-1].stop
        unit = backend.xp.eye(k, dtype=self.point.y.dtype, device=self.point.y.device)
        unit = backend.xp.broadcast_to(backend.reshape(unit, (k, *(1,) * len(items), k)), (k, *items, k))
        return backend.xp.moveaxis(self.of_values.vjp_y(unit), 0, -2)

    # -- terms -----------------------------------------------------------------------------------------
    @cached_property
    def objective_term(self) -> _Term:
        f, grad = self.objective.f, self.objective.grad
        slope = None if grad is None else lambda point: point.vector_function(grad, "grad")
        return _Term("f", lambda point: point.scalar_function(f, "f"), slope, lambda: self.second_of_f)

    @cached_property
    def second_of_f(self) -> Operator | None:
        """The Hessian of f, where it is given."""
        point, hvp, hessian = self.point, self.objective.hvp, self.objective.hessian
        found = None if hessian is None else matrix_operator(point, "hessian", point.call(hessian, "hessian"), True)
        if hvp is None:
            return found
        product = point.product(hvp, "hvp", point.y, point.y)
        return self._operator(product, "given", 0.0) if found is None else replace(found, forward=product)

    def term(self, c: Constraint, s: slice, z: Array) -> _Term:
        """zᵀc of a group; z of the whole."""
        size, of_group = s.stop - s.start, c.hessian

        def at(point: Point) -> Array:
            own = z[..., s]
            return own if point.backend.is_array(own) else point.backend.xp.asarray(np.asarray(own))  # on lent arrays

        def value(point: Point) -> Function:
            values, own = point.raveled_function(c.values, c.name), at(point)
            return lambda y, theta: paired(values(y, theta), own)

        def slope(point: Point) -> Function:
            rows, own = c.rows(point, size), at(point)
            return lambda y, theta: weighted(cast("Function", rows)(y, theta), own)

        def second() -> Operator | None:
            if of_group is None:
                return None
            name = f"{c.name}_hessian"
            return matrix_operator(self.point, name, self.point.call(of_group, name, z[..., s]), True)

        return _Term(c.name, value, None if c.jacobian is None else slope, second, c.linear)

    def terms(self, z: Array) -> list[_Term]:
        groups = zip(self.constraints, self.slices, strict=True)
        return [self.objective_term, *(self.term(c, s, z) for c, s in groups)]

    def summed(self, terms: Sequence[_Term], of: str, point: Point) -> VectorFunction:
        """The sum of the values, or of the gradients, of terms."""
        name = " and ".join(dict.fromkeys(t.name for t in terms))

        def on(point: Point) -> VectorFunction:
            first, *rest = (getattr(t, of)(point) for t in terms)
            total = lambda y, theta: functools.reduce(lambda a, g: a + g(y, theta), rest, first(y, theta))  # noqa: E731
            return VectorFunction(total, point, name, on)

        return on(point)

    def derived(self, terms: Sequence[_Term], point: Point) -> list[Any]:
        """Derivatives of ∇ of a sum of terms, in up to two parts: of gradients that are given, and of values."""
        with_slope, without = [t for t in terms if t.slope], [t for t in terms if not t.slope]
        backend, found = self.backend, []
        if with_slope:
            first = backend.differentiate(self.summed(with_slope, "slope", point), self.y, self.theta)
            if first.kind != "autodiff":  # the functions themselves may be for it
                other = backend.differentiate_gradient(self.summed(with_slope, "value", point), self.y, self.theta)
                first = other if other.kind == "autodiff" else first
            found.append(first)
        if without:
            summed = self.summed(without, "value", point)
            found.append(backend.differentiate_gradient(summed, self.y, self.theta))
        return found

    def _operator(self, product: Product, kind: str, accuracy: float, matrix: Array | None = None) -> Operator:
        p = self.point
        return Operator(
            self.backend, p.y.n, p.y.n, p.items, p.y.dtype, p.y.device, forward=product, adjoint=product, matrix=matrix,
            kind=kind, label="A", symmetric=True, trusted="given" not in kind, accuracy=accuracy,
        )  # fmt: skip

    # -- the system --------------------------------------------------------------------------------------
    def _hessian(self, terms: Sequence[_Term], z: Array, all_derived: Sequence[Any]) -> Operator:
        """H = ∂²𝓛/∂y²: the sum of what is given, and of what is derived."""
        if self.objective.of_lagrangian is not None:
            return self.whole_hessian(z)
        pairs = [(t, t.second()) for t in terms]
        given, missing = [op for _, op in pairs if op is not None], [t for t, op in pairs if op is None]
        part = self.point.part()
        derived = [] if not missing else self.derived(missing, part) if given else all_derived
        if not derived and all(op.sparse is not None for op in given):
            matrix = functools.reduce(lambda a, op: a + op.sparse, given[1:], given[0].sparse)
            found: Operator = matrix_map(Operator, self.backend, matrix, (), self.point.y.dtype, None, label="A")
            return replace(found, symmetric=True, adjoint=found.forward)
        if not derived and all(op.sparse is None and op.matrix is not None for op in given):
            matrix = functools.reduce(lambda a, op: a + op.matrix, given[1:], given[0].matrix)
            return self._operator(matrix_product(self.backend.xp, matrix), "given", 0.0, matrix)
        products = [op.matvec for op in given] + [d.hvp for d in derived]
        kinds = dict.fromkeys([*(op.kind for op in given), *(d.kind for d in derived)])
        accuracy = max((d.accuracy for d in derived), default=0.0)
        total = lambda v: functools.reduce(lambda a, g: a + g(v), products[1:], products[0](v))  # noqa: E731
        return self._operator(total, ", ".join(kinds), accuracy)

    def whole_hessian(self, z: Array) -> Operator:
        """The Hessian of 𝓛 that is given."""
        name, given = "lagrangian_hessian", self.objective.of_lagrangian
        found = self.point.call(cast("Function", given), name, *self.as_given(z))
        return matrix_operator(self.point, name, found, True)

    def as_given(self, z: Array) -> tuple[Array, Array]:
        """Multipliers of equalities and of inequalities."""
        p = sum(s.stop - s.start for c, s in zip(self.constraints, self.slices, strict=True) if c.kind == "eq")
        return z[..., :p], z[..., p:]

    def system(self, first: FirstOrder, z: Array) -> Maps:
        """F, A and B of the Lagrangian's stationary point over (y, z), for z of shape (*items, k)."""
        backend, point, n = self.backend, self.point, self.point.y.n
        terms = [t for t in self.terms(z) if not t.linear]
        derived = self.derived(terms, point.part())
        backend.check_dependence(lambda t: self._at(backend.concat([self.y, z]), t), self.theta)
        H, order = self._hessian(terms, z, derived), n + first.rows.shape[-2]
        turned = functools.partial(turned_times, backend.xp, first.rows)

        def product(x: Array) -> Array:
            v, w = x[..., :n], x[..., n:]
            return backend.concat([H.matvec(v) + turned(w), rows_times(first.rows, v)])

        A = Operator(
            backend, order, order, point.items, point.y.dtype, point.y.device, forward=product, adjoint=product,
            kind=H.kind, label="A", symmetric=True, trusted=H.trusted, accuracy=H.accuracy,
        )  # fmt: skip

        def residual() -> Array:
            values = without(backend.xp, first.values, -math.inf, 0.0)
            return backend.concat([first.gradient + turned(z), values])

        checked, matrix = checked_parts(self, first, z), self._matrix_of(H, first.rows)
        return Maps(residual, self._at, A, self._mixed(terms, derived, order), checked=checked, hessian=matrix)

    def _matrix_of(self, H: Operator, rows: Any) -> Any:
        """The matrix of H, where it is at hand; sparse beside sparse gradients, and then found where it is not."""
        if not isinstance(rows, SparseRows):
            return None if H.matrix is None and H.sparse is None else H.dense()
        if H.matrix is None and H.sparse is None:
            functions = (
                self.objective.f,
                *self.objective.given,
                *(f for c in self.constraints for f in (c.fun, *c.given)),
            )
            H = assembled(replace(H, sparsity=sparsity_of("detect", functions)))
        if H.sparse is not None:
            found = SparseMatrix(H.sparse).on(self.backend, (), H.dtype, H.device)
            made = 0 if H.entries is None else H.entries.products
            return replace(found, products=made, spent=H.probes)
        return as_sparse(self.backend, H.matrix)

    def _at(self, both: Array, theta: Array) -> Array:
        """F at any point."""
        n = self.point.y.n
        y, z = both[..., :n], both[..., n:]
        return self.backend.concat([self.slope(self.terms(z), y, theta), self.values(y, theta)])

    def slope(self, terms: Sequence[_Term], y: Array, theta: Array) -> Array:
        """∇ of a sum of terms, at any point."""
        with_slope, rest = [t for t in terms if t.slope], [t for t in terms if not t.slope]
        part, found = self.point.part(), []
        if with_slope:
            found.append(self.summed(with_slope, "slope", part)(y, theta))
        if rest:
            values = self.summed(rest, "value", part)
            found.append(self.backend.differentiate_gradient(values, y, theta).value())
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _mixed(self, terms: Sequence[_Term], derived: Sequence[Any], order: int) -> LinearMap:
        """B = (∂²𝓛/∂θ∂y, ∂c/∂θ)."""
        backend, n = self.backend, self.point.y.n
        if all(t.slope for t in terms) and derived[0].kind != "autodiff":  # one sweep of differences for both
            joint = backend.differentiate(self._joint(terms, self.point), self.y, self.theta)
            return self._map(order, (joint.kind,), joint.jvp_theta, joint.vjp_theta)
        of_values = self.of_values

        def forward(t: Array) -> Array:
            slope = functools.reduce(lambda a, d: a + d.jvp_theta(t), derived[1:], derived[0].jvp_theta(t))
            return backend.concat([slope, of_values.jvp_theta(t)])

        def adjoint(u: Array) -> Array:
            of_slope = u[..., :n]
            return functools.reduce(lambda a, d: a + d.vjp_theta(of_slope), derived, of_values.vjp_theta(u[..., n:]))

        return self._map(order, [*(d.kind for d in derived), of_values.kind], forward, adjoint)

    def _joint(self, terms: Sequence[_Term], point: Point) -> VectorFunction:
        """∇_y𝓛 of given gradients, and c."""
        slope, values = self.summed(terms, "slope", point), point.raveled_function(self._all, self.name)
        both = lambda y, theta: point.backend.concat([slope(y, theta), values(y, theta)])  # noqa: E731
        return VectorFunction(both, point, f"{slope.name} and {self.name}", lambda p: self._joint(terms, p))

    def _map(self, rows: int, kinds: Sequence[str], forward: Product, adjoint: Product) -> LinearMap:
        p = self.point
        return LinearMap(
            self.backend, rows, p.theta.n, p.items, p.y.dtype, p.y.device, kind=", ".join(dict.fromkeys(kinds)),
            label="B", forward=forward, adjoint=adjoint, domain=p.theta.dtype,
        )  # fmt: skip
