"""What is known of residuals r(y, θ) at a point: J = ∂r/∂y, the loss of them, and what of the Hessian is not J's.

With f = ℓ(r(y, θ), θ) + R(y, θ), w = ∇ℓ(r) and H = ∇²ℓ(r),

    F = ∇_y f  = Jᵀw + ∇R,
    A = ∂F/∂y  = JᵀHJ + Σ w_i ∂²r_i/∂y² + ∂²R/∂y²,
    B = ∂F/∂θ  = Jᵀ(H ∂r/∂θ + ∂²ℓ/∂θ∂r) + Σ w_i ∂²r_i/∂θ∂y + ∂²R/∂θ∂y.

The sums over i are second derivatives of wᵀr, w held. So they are put together where J is given, and a framework has
autodiff for the rest. Otherwise A and B are derivatives of F = Jᵀr, where Jᵀ was given, or second ones of f.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Checked, Given, Maps, lengths_of_leaves, maps_from
from implicitdiff.conditions.matrices import given_matrix
from implicitdiff.conditions.point import Point, VectorFunction
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import CallbackError, DerivativeError
from implicitdiff.linalg.gram_operator import gram
from implicitdiff.linalg.operator import LinearMap, Operator, Product, matrix_product
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.namespaces import item_sum, namespace
from implicitdiff.pytree import flatten
from implicitdiff.ravel import Raveler

__all__ = ["Residuals", "half_square", "with_theta"]


def half_square(r: Any, lead: int) -> Any:
    """½ Σ r² over a tree of residuals, per item."""
    total: Any = 0.0
    leaves = flatten(r).leaves
    if not leaves:
        raise CallbackError("residual returned an empty tree.\nExpected an array, or a tree of arrays.")
    for leaf in leaves:
        square = leaf * leaf / 2
        total = total + (item_sum(namespace(leaf), square, lead) if hasattr(leaf, "shape") else square)
    return total


def with_theta(function: Callable[..., Any]) -> Callable[..., Any]:
    """``f(x, theta, *args)``, also of a loss, or a regularizer, that takes x alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of something in C: then it is what was asked for
        return function
    kinds = [p.kind for p in parameters]
    places = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    required = [p for p in places if p.default is p.empty]
    if len(required or places) != 1 or inspect.Parameter.VAR_POSITIONAL in kinds:
        return function
    return lambda x, theta, *args: function(x)


class Residuals:
    """Residuals at a point, as functions of vectors.

    Parameters
    ----------
    condition : LeastSquares
    point : Point
    """

    def __init__(self, condition: Any, point: Point) -> None:
        self.condition, self.point, self.backend = condition, point, point.backend
        self._y, self._theta = point.y.vector, point.theta.vector
        self.simple = condition.loss is None and condition.regularizer is None
        self._pulls = condition.vjp is not None or condition.jacobian is not None
        """Whether Jᵀu was given, at any point."""
        self._form: Any = None
        self.function = (point if self.simple else point.part()).raveled_function(self._seen, "residual")

    def _seen(self, y: Any, theta: Any, *args: Any) -> Any:
        """The residuals; what they are structured like is kept."""
        r = self.condition.residual(y, theta, *args)
        tree = flatten(r)
        self._form = tree._replace(leaves=[tuple(getattr(x, "shape", ()))[self.point.lead :] for x in tree.leaves])
        return r

    # -- r -----------------------------------------------------------------------------------------
    @cached_property
    def derived(self) -> Any:
        """The backend's derivatives of r."""
        return self.backend.differentiate(self.function, self._y, self._theta)

    @cached_property
    def value(self) -> Array:
        """r, shape (*items, k)."""
        return self.derived.value()

    @cached_property
    def raveler(self) -> Raveler:
        """How r becomes a vector."""
        r, leaves, start = self.value, [], 0
        if self._form is None:  # a recording from elsewhere
            self.function(self._y, self._theta)
        for shape in self._form.leaves:
            stop = start + math.prod(shape)
            leaves.append(self.backend.reshape(r[..., start:stop], (*self.point.items, *shape)))
            start = stop
        return Raveler(self.backend, self._form.unflatten(leaves), "residual", bool(self.point.items))

    @cached_property
    def jacobian(self) -> LinearMap:
        """J, given or derived."""
        c, p, d, r = self.condition, self.point, self.derived, self.value
        common: dict[str, Any] = {"kind": "given", "label": "J", "domain": p.y.dtype}
        if c.jacobian is not None:
            matrix = p.call(c.jacobian, "jacobian")
            found: LinearMap = given_matrix(p, "jacobian", matrix, r.shape[-1], LinearMap, label="J")
            return found
        shape = self.backend, r.shape[-1], p.y.n, p.items, r.dtype, p.y.device
        if c.jvp is not None or c.vjp is not None:
            jvp = None if c.jvp is None else p.product(c.jvp, "jvp", p.y, self.raveler)
            vjp = None if c.vjp is None else p.product(c.vjp, "vjp", self.raveler, p.y)
            return LinearMap(*shape, forward=jvp, adjoint=vjp, derive=self._missing, **common)
        common.update(kind=d.kind, accuracy=d.accuracy)
        if d.kind == "autodiff":
            return LinearMap(*shape, forward=d.jvp_y, adjoint=d.vjp_y, **common)
        # a product with Jᵀ costs as much as all of J
        matrix = LinearMap(*shape, forward=d.jvp_y, **common).dense()
        return LinearMap(*shape, matrix=matrix, forward=self._by(matrix), adjoint=self._by(matrix, True), **common)

    def _by(self, matrix: Array, transposed: bool = False) -> Product:
        return matrix_product(self.backend.xp, matrix, transposed=transposed)

    def _missing(self, transposed: bool) -> tuple[str, Product] | None:
        """What was not given of jvp and vjp; None leaves it to assembly from the other."""
        d = self.derived
        return (d.kind, d.vjp_y if transposed else d.jvp_y) if d.kind == "autodiff" else None

    # -- the loss of r -----------------------------------------------------------------------------
    @cached_property
    def outer(self) -> Any:
        """Derivatives of ∇ℓ by r and θ; None for ½‖r‖²."""
        if self._loss is None:
            return None
        return self.backend.differentiate_gradient(self._loss, self.value, self._theta)

    @cached_property
    def _loss(self) -> VectorFunction | None:
        """ℓ as a function of the vectors of r and θ."""
        loss = self.condition.loss
        if loss is None:
            return None
        at = Point(self.backend, self.raveler, self.point.theta, self.point.args, self.point.mapped).part()
        return at.scalar_function(with_theta(loss), "loss")

    @cached_property
    def weights(self) -> Array:
        """w = ∇ℓ(r)."""
        return self.value if self.outer is None else self.outer.value()

    def _bent(self, v: Array) -> Array:
        """H v."""
        return v if self.outer is None else self.outer.hvp(v)

    # -- F -------------------------------------------------------------------------------------------
    def maps(self) -> Maps:
        """F, A and B."""
        c = self.condition
        checked = self._checked() if c.given else None  # what is no matrix is told first
        if checked is None:
            maps = self._of_values()
        elif self.derived.kind == "autodiff":
            maps = Maps(self._residual, self._at, self.operator(True), self._mixed())
        else:
            maps = self._of_slopes() if self._pulls and self.simple else self._of_values()
        if c.hessian == "gauss-newton":
            maps = maps._replace(A=self.operator(False))
        return maps if checked is None else maps._replace(checked=(checked,))

    def _of_values(self) -> Maps:
        """Those of f as one function."""
        f = self.point.scalar_function(self.objective, "residual" if self.condition.loss is None else "loss")
        backend, y, theta = self.backend, self._y, self._theta
        found = backend.differentiate_gradient(f, y, theta)
        given = self._pattern()
        return maps_from(
            self.point, given, lambda y, theta: backend.differentiate_gradient(f, y, theta).value(), lambda: found,
            symmetric=True, what="∇f", value=found.value, values=f, known_as="residual",
        )  # fmt: skip

    def _of_slopes(self) -> Maps:
        """Those of F as one function, by the J that was given."""
        F = VectorFunction(self._at, self.point, "the product with Jᵀ", _not_lent)
        derive = partial(self.backend.differentiate, F, self._y, self._theta)
        return maps_from(
            self.point, self._pattern(), F, derive, symmetric=True, value=self._residual, known_as="residual"
        )

    def _pattern(self) -> Given:
        c = self.condition
        return Given(sparsity=None if c.sparsity is None else c.where())

    def objective(self, y: Any, theta: Any, *args: Any) -> Any:
        """f."""
        c = self.condition
        r = c.residual(y, theta, *args)
        value = half_square(r, self.point.lead) if c.loss is None else with_theta(c.loss)(r, theta, *args)
        return value if c.regularizer is None else value + with_theta(c.regularizer)(y, theta, *args)

    def _residual(self) -> Array:
        F = self.jacobian.rmatvec(self.weights)
        return F if self.penalty is None else F + _known(self.penalty.residual)()

    def _at(self, y: Array, theta: Array) -> Array:
        """F at any point."""
        backend = self.backend
        there = None if self._pulls else backend.differentiate(self.function, y, theta)
        r = self.function(y, theta) if there is None else there.value()
        w = r if self._loss is None else backend.differentiate_gradient(self._loss, r, theta).value()
        F = self._pulled(w)(y, theta) if there is None else there.vjp_y(w)
        return F if self.penalty is None else F + _known(self.penalty.at)(y, theta)

    def _pulled(self, w: Array) -> Callable[[Array, Array], Array]:
        """Jᵀw as a function of vectors, of what was given."""
        c, part, unravel, like_y = self.condition, self.point.part(), self.raveler.unravel, self.point.y.unravel
        if c.vjp is not None:
            return part.numbered_function(lambda y, t, u, *args: c.vjp(y, t, unravel(u), *args), "vjp", w)
        return part.numbered_function(
            lambda y, t, u, *args: like_y(_pulled_by(c.jacobian(y, t, *args), u)), "jacobian", w
        )

    # -- what J does not know ------------------------------------------------------------------------
    @cached_property
    def curvature(self) -> Any:
        """Derivatives of Jᵀw, w held, by autodiff."""
        return self.backend.differentiate_gradient(self._weighted(self.point.part()), self._y, self._theta)

    def _weighted(self, part: Point) -> VectorFunction:
        """wᵀr as a function of vectors."""
        r, w = part.raveled_function(self.condition.residual, "residual"), self.weights

        def value(y: Array, theta: Array) -> Array:
            terms = w * r(y, theta)
            return namespace(terms).sum(terms, axis=-1)

        return VectorFunction(value, part, "residual", _not_lent)

    @cached_property
    def penalty(self) -> Maps | None:
        """F, A and B of the regularizer alone."""
        c = self.condition
        return None if c.regularizer is None else Stationary(with_theta(c.regularizer)).maps(self.point.part())

    # -- A -------------------------------------------------------------------------------------------
    def operator(self, exact: bool) -> Operator:
        """A, or without the curvature of r."""
        p, J, S = self.point, self.jacobian, self.curvature if exact else None
        R = None if self.penalty is None else self.penalty.A

        def product(v: Array) -> Array:
            out = J.rmatvec(self._bent(J.matvec(v)))
            out = out if S is None else out + S.hvp(v)
            return out if R is None else out + R.matvec(v)

        parts = [x for x in (J, self.outer, S, R) if x is not None]
        A = Operator(
            self.backend, p.y.n, p.y.n, p.items, p.y.dtype, p.y.device, forward=product, adjoint=product,
            kind=_kinds(parts), label="A", symmetric=True, trusted=not self.condition.given,
            accuracy=max(x.accuracy for x in parts), leaves=lengths_of_leaves(p), like=p.y.vector,
            sparsity=self._pattern().sparsity,
        )  # fmt: skip
        whole = self.simple and not exact and J.dtype == A.dtype and not is_tree_vector(p.y.vector)
        whole = whole and self.condition.sparsity is None  # a sparse A is factored as it is
        return gram(A, J) if whole else A

    # -- B -------------------------------------------------------------------------------------------
    def _mixed(self) -> LinearMap:
        p, d, J, loss, S = self.point, self.derived, self.jacobian, self.outer, self.curvature
        R = None if self.penalty is None else self.penalty.B

        def forward(t: Array) -> Array:
            change = self._bent(d.jvp_theta(t))
            out = J.rmatvec(change if loss is None else change + loss.jvp_theta(t))
            out = out if S is None else out + S.jvp_theta(t)
            return out if R is None else out + R.matvec(t)

        def adjoint(u: Array) -> Array:
            v = J.matvec(u)
            out = d.vjp_theta(self._bent(v))
            out = out if loss is None else out + loss.vjp_theta(v)
            out = out if S is None else out + S.vjp_theta(u)
            return out if R is None else out + R.rmatvec(u)

        parts = [x for x in (d, J, loss, S, R) if x is not None]
        return LinearMap(
            self.backend, p.y.n, p.theta.n, p.items, p.y.dtype, p.y.device, forward=forward, adjoint=adjoint,
            kind=_kinds(parts), label="B", domain=p.theta.dtype,
            accuracy=max(x.accuracy for x in parts),
        )  # fmt: skip

    def _checked(self) -> Checked:
        """What was given of J, beside r."""
        J, c = self.jacobian, self.condition
        products = (None if c.jvp is None else J.forward), (None if c.vjp is None else J.adjoint)
        return Checked(
            self.point, "residual", self.function, None, lambda: self.derived, ("jvp", products[0]),
            ("vjp", products[1]), ("jacobian", None if c.jacobian is None else J), None, None, False,
        )  # fmt: skip


def _pulled_by(J: Any, w: Any) -> Any:
    """Jᵀw of a matrix as users write it."""
    if hasattr(J, "rmatvec"):
        return J.rmatvec(w)
    if hasattr(J, "tocsc"):
        return J.T @ w
    xp = namespace(J, w)
    return xp.sum(J * w[..., :, None], axis=-2)


def _kinds(parts: list[Any]) -> str:
    return ", ".join(dict.fromkeys(x.kind for x in parts))


def _not_lent(point: Point) -> Any:
    raise DerivativeError("the products that are given are those of one framework, and no autodiff can be lent them.")


def _known(function: Any) -> Any:
    if function is None:
        raise TypeError("a regularizer has values")
    return function
