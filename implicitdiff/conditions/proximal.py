"""Fixed points of a gradient step followed by a projection or a proximal operator: y = P(y − s ∇f(y, θ), θ).

Let x = y − s ∇f(y, θ), D = ∂P/∂x and E = ∂P/∂θ at (x, θ), H = ∂²f/∂y² and C = ∂²f/∂θ∂y at (y, θ). Differentiating
F = y − P(x, θ) gives

    A = I − D + s D H,    B = s D C − E.

D and H are applied one after the other: no derivative is taken through a derivative. The solution does not depend on
the step, nor does its derivative; the condition of A does, and how far away a kink of P is. So s is one over the
curvature, see `metric`. Where a step for each coordinate is used, s = diag(d)², A and F are those of y = d ŷ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from implicitdiff.arrays import Array, any_true, item_numbers, listed, named_items
from implicitdiff.conditions.base import (
    Condition,
    Function,
    Given,
    Maps,
    Observations,
    check_callables,
    check_verify,
    finite_part,
    maps_from,
)
from implicitdiff.conditions.fixed_point import identity_minus
from implicitdiff.conditions.kinks import Choices, kinks
from implicitdiff.conditions.metric import Metric, metric_at
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import InputError
from implicitdiff.linalg.operator import LinearMap, Operator
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.solvers import get_solver
from implicitdiff.solvers.support import OnSupport, ProximalOperator

__all__ = ["ProjectedGradient", "ProximalGradient"]

_Found: TypeAlias = tuple[Callable[[Array, Array], Array], Array, Maps]
"""P, x and the derivatives of P, for a step."""


@dataclass(frozen=True, eq=False, repr=False)
class _Composite(Condition):
    """What the two conditions share: f and its derivatives, and the step."""

    fun: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None
    step: float | None = None
    grad: Callable[..., Any] | None = None
    hvp: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    mixed_vjp: Callable[..., Any] | None = None
    mixed_jvp: Callable[..., Any] | None = None
    restrict: bool | None = None
    verify: bool = True

    _name = "after"

    def _set(self, fun: Any, after: Any, step: Any, restrict: Any, verify: Any, **given: Any) -> None:
        if not callable(after):
            raise InputError(f"{self._name} is {type(after).__name__}; expected a callable.")
        if fun is None and given["grad"] is None:
            raise InputError("neither fun nor grad is given, and ∇f has to be evaluated: give one of them.")
        if step is not None and (not isinstance(step, (int, float)) or not 0 < step < float("inf")):
            raise InputError(f"step is {step!r}; expected a positive number.")
        step = None if step is None else float(step)
        if restrict not in (None, True, False):
            raise InputError(f"restrict is {restrict!r}; expected None, True or False.")
        check_callables(fun=fun, **given)
        check_verify(verify)
        fields = {"fun": fun, "after": after, "step": step, "restrict": restrict, "verify": verify, **given}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def has_matrix(self) -> bool:
        return self.hessian is not None or self.restrict is True

    def without_bounds(self, theta: Any) -> Any:
        return finite_part(theta.backend.xp, theta.vector)

    @property
    def _smooth(self) -> Stationary:
        """The condition of f alone, which y need not fulfil."""
        return Stationary(
            self.fun, grad=self.grad, hvp=self.hvp, hessian=self.hessian, mixed_vjp=self.mixed_vjp,
            mixed_jvp=self.mixed_jvp, verify=self.verify,
        )  # fmt: skip

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        return self._smooth.to_verify

    def routed(self, solver: Any) -> Any:
        return OnSupport(get_solver(solver), self.restrict)

    def _outer(self, point: Point, step: Any) -> Callable[[Array, Array], Array]:
        """P as a function of the vectors x and θ."""
        raise NotImplementedError

    def maps(self, point: Point) -> Maps:
        part, backend, y, theta = point.part(), point.backend, point.y.vector, point.theta.vector
        smooth = self._smooth.maps(part)
        slope = cast("Callable[[], Array]", smooth.residual)()  # there is fun or grad

        def outer_at(metric: Metric) -> _Found:
            outer, x = self._outer(point.part(piecewise=True), metric.number), y - metric.step * slope
            derive = lambda: backend.differentiate(outer, x, theta)  # noqa: E731
            return outer, x, maps_from(part, Given(), outer, derive, what=self._name)

        there: Choices | None = point.choices
        metric = self._metric(point, smooth.A, slope) if there is None else replace(there.metric, point=point)
        found = outer_at(metric)
        finer = metric.finer() if there is None else None
        if finer is not None and (tried := _tried(outer_at, finer, y, theta)) is not None:
            trial, suits = tried
            if backend.traced:
                metric = finer.only(suits, metric)
                found = outer_at(metric)
            elif not any_true(backend.xp, ~suits):
                metric, found = finer, trial
        outer, x, P = found
        gradient = cast("Callable[[Array, Array], Array]", smooth.at)
        at = _residual_seen(outer, gradient, metric)
        backend.check_dependence(lambda t: at(y, t), theta)
        blind = backend.mode is Mode.INLINE or is_tree_vector(x)
        observations = None if blind else kinks(point, P.A.kind, outer, x, metric)
        A, B = _system(P.A, metric.scaled(smooth.A), metric), _mixed(P, smooth, metric)
        checked = tuple(c._replace(solved=None) for c in smooth.checked)
        return Maps(
            lambda: metric.down(y - outer(x, theta)), at, A, B, metric.embedding(), observations, checked,
            choices=Choices(metric, P.A), changed=None if there is None else lambda: there.changed(P.A),
        )  # fmt: skip

    def name_changes(self, xp: Any, changed: Array) -> str:
        """Name the coordinates in which the support changes."""
        where = listed(item_numbers(xp, xp.any(changed, axis=0) if len(changed.shape) > 1 else changed))
        return f"a kink of {self._name} lies (in coordinate {where} of the raveled y)"

    def _metric(self, point: Point, H: Operator, slope: Array) -> Metric:
        raise NotImplementedError

    def tell(self, observations: Observations, batched: bool) -> tuple[Exception | None, list[str | Warning]]:
        import array_api_compat

        bent = observations.details
        xp = array_api_compat.array_namespace(bent)
        where = named_items(xp, xp.any(bent, axis=-1)) if batched else f"y, at {listed(item_numbers(xp, bent))}"
        return None, [
            f"{self._name} has a kink at x = y - step ∇f, or next to it: in {where} (in raveled order).\n"
            "Likely cause: a constraint, or a zero of y, that holds with a multiplier of zero (no strict "
            "complementarity); or finite differences that reach across a kink.\n"
            "The derivative is that of one side, or a mean. Next: move theta, or let autodiff derive it."
        ]


def _tried(outer_at: Callable[[Metric], _Found], metric: Metric, y: Array, theta: Array) -> tuple[_Found, Array] | None:
    """P with a step for each coordinate, and whether that suits; None where P takes one step only, and fails."""
    try:
        found = outer, x, P = outer_at(metric)
        return found, metric.suits(y, x, outer(x, theta), P.A)
    except Exception:  # of the user's function, in any way: with one step, as it is documented, it raises its own
        return None


def _residual_seen(
    outer: Callable[[Array, Array], Array], gradient: Callable[[Array, Array], Array], metric: Metric
) -> Callable[[Array, Array], Array]:
    """F as a function, with a part of x: F alone may not see that θ moves x, where P is constant in x."""

    def at(z: Array, t: Array) -> Array:
        moved = z - metric.step * gradient(z, t)
        return metric.down(z - outer(moved, t) + 0.6 * moved)

    return at


def _system(D: Operator, H: Operator, metric: Metric) -> Operator:
    """A = I − D + s D H, and its transpose."""
    rest, accuracy, step = identity_minus(D), max(D.accuracy, H.accuracy), metric.inner
    push, curve, remain = D.matvec, H.matvec, rest.matvec

    def forward(v: Array) -> Array:
        return remain(v) + step * push(curve(v))

    def adjoint(u: Array) -> Array:
        return rest.rmatvec(u) + step * curve(D.rmatvec(u))

    return ProximalOperator(
        D.backend, D.n, D.n, D.items, D.dtype, D.device, forward=forward,
        adjoint=None if D.adjoint is None else adjoint, kind=_kinds(D, H), label="A", accuracy=accuracy,
        trusted=True, outer=D, inner=H, step=step,
    )  # fmt: skip


def _mixed(P: Maps, smooth: Maps, metric: Metric) -> LinearMap:
    """B = s D C − E, and its transpose."""
    D, E, C = P.A, P.B, smooth.B
    step, up, down = metric.inner, metric.up, metric.down
    return LinearMap(
        E.backend, E.rows, E.columns, E.items, E.dtype, E.device,
        forward=lambda t: step * D.matvec(up(C.matvec(t))) - down(E.matvec(t)),
        adjoint=lambda u: step * C.rmatvec(up(D.rmatvec(u))) - E.rmatvec(down(u)),
        kind=_kinds(E, C), label="B", domain=E.domain,
    )  # fmt: skip


def _kinds(*maps: LinearMap) -> str:
    return ", ".join(dict.fromkeys(m.kind for m in maps))


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ProjectedGradient(_Composite):
    """A minimum of f over a convex set: y = P(y − step ∇_y f(y, θ), θ), with P the projection onto the set.

    The set may depend on θ; what is active is read off the point. A = I − D + step D H with D = ∂P/∂x and H = ∂²f/∂y².

    Parameters
    ----------
    fun : callable, optional
        ``f(y, theta, *args) -> scalar``.
    projection : callable
        ``P(x, theta) -> like y``: the point of the set next to x; ``args`` are for f alone. The functions of
        `implicitdiff.projections` are wrapped: ``lambda x, theta: box(x, 0.0, theta)``.
    step : float, optional
        Positive, about 1 / ‖H‖: neither the solution nor its derivative depends on it, the condition of the linear
        system does. By default, and where the one that is given is far off, it follows the curvature of f, and has one
        value for each coordinate where their units differ (under JAX for n up to 32, or with a ``hessian``).
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp, hessian, mixed_vjp, mixed_jvp : callable, optional
        Derivatives of ∇_y f, as for `Stationary`.
    restrict : bool, optional
        Whether the system is solved on the support, the coordinates on which D is not zero: there it is symmetric, and
        positive definite at a strict minimum, for `CG` and `Cholesky`. None: where D is found to be diagonal, or an
        orthogonal projector; under JAX nothing is found, and None means no. True also serves other D that are
        symmetric, and regular on their support (the group lasso). A solution of the whole system is checked for.
    verify : bool, default True
        Whether the derivatives of f that are given are held against f at their first use (see `check_derivatives`).

    Notes
    -----
    The derivative exists where P is differentiable at x = y − step ∇f: no inequality may hold with a multiplier of zero
    (strict complementarity). Whether a bound is active depends on x alone, so that a y that touches it only to within
    the tolerance of its solver does no harm.

    References
    ----------
    M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022, section 2.2. arXiv:2105.15183
    Q. Bertrand et al., "Implicit differentiation of Lasso-type models for hyperparameter optimization", ICML 2020.
    arXiv:2002.08943

    Examples
    --------
    The mean of three numbers, over the simplex: θ moved along 1 moves nothing.

    >>> import numpy as np
    >>> import implicitdiff as idf
    >>> f = lambda y, theta: ((y - theta) ** 2).sum()
    >>> onto = idf.ProjectedGradient(f, lambda x, theta: idf.projections.simplex(x))
    >>> y, theta = np.array([0.7, 0.3, 0.0]), np.array([0.9, 0.5, -0.5])
    >>> print(idf.implicit_jacobian(onto, y, theta).round(6) + 0.0)
    [[ 0.5 -0.5  0. ]
     [-0.5  0.5  0. ]
     [ 0.   0.   0. ]]
    """

    _name = "projection"

    def __init__(
        self, fun: Function = None, projection: Function = None, *, step: float | None = None,
        grad: Function = None, hvp: Function = None, hessian: Function = None, mixed_vjp: Function = None,
        mixed_jvp: Function = None, restrict: bool | None = None, verify: bool = True,
    ) -> None:  # fmt: skip
        self._set(
            fun,
            projection,
            step,
            restrict,
            verify,
            grad=grad,
            hvp=hvp,
            hessian=hessian,
            mixed_vjp=mixed_vjp,
            mixed_jvp=mixed_jvp,
        )

    @property
    def projection(self) -> Callable[..., Any]:
        """P."""
        return self.after  # type: ignore[return-value]

    def _metric(self, point: Point, H: Operator, slope: Array) -> Metric:
        return metric_at(point, H, slope).near(self.step, binding=False)

    def _outer(self, point: Point, step: Any) -> Callable[[Array, Array], Array]:
        projection = self.projection
        return point.vector_function(lambda x, theta, *_: projection(x, theta), self._name)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ProximalGradient(_Composite):
    """A minimum of f + r with a convex r: y = prox(y − step ∇_y f(y, θ)), with the proximal operator of step · r.

    r may depend on θ; what is zero is read off the point. A = I − D + step D H with D = ∂prox/∂x and H = ∂²f/∂y².

    Parameters
    ----------
    fun : callable, optional
        ``f(y, theta, *args) -> scalar``, the smooth part.
    prox : callable
        ``prox(x, theta, step) -> like y``: the minimum over y of step · r(y, θ) + ½ ‖y − x‖²; ``args`` are for f alone.
        The functions of `implicitdiff.proxes` are wrapped: ``lambda x, theta, step: lasso(x, theta["penalty"], step)``.
    step : float, optional
        Positive, about 1 / ‖H‖: neither the solution nor its derivative depends on it, the condition of the linear
        system does. By default it follows the curvature of f, and has one value for each coordinate where their units
        differ (under JAX for n up to 32, or with a ``hessian``): prox has to use the one that it is handed,
        ``step * penalty``, and one that cannot be called with an array of n is given one number for all.
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp, hessian, mixed_vjp, mixed_jvp : callable, optional
        Derivatives of ∇_y f, as for `Stationary`.
    restrict : bool, optional
        Whether the system is solved on the support, the coordinates on which D is not zero: there it is symmetric, and
        positive definite at a strict minimum, for `CG` and `Cholesky`. None: where D is found to be diagonal, or an
        orthogonal projector; under JAX nothing is found, and None means no. True also serves other D that are
        symmetric, and regular on their support (the group lasso). A solution of the whole system is checked for.
    verify : bool, default True
        Whether the derivatives of f that are given are held against f at their first use (see `check_derivatives`).

    Notes
    -----
    The derivative exists where prox is differentiable at x = y − step ∇f: for the lasso, where no ∂f/∂y_i equals ± the
    penalty while y_i = 0. The support is that of prox(x), so that a y that is zero only to within the tolerance of its
    solver does no harm.

    References
    ----------
    M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022, section 2.2. arXiv:2105.15183
    Q. Bertrand et al., "Implicit differentiation of Lasso-type models for hyperparameter optimization", ICML 2020.
    arXiv:2002.08943

    Examples
    --------
    Soft thresholding of θ at 1: the derivative is 1 where something is left, and 0 elsewhere.

    >>> import numpy as np
    >>> import implicitdiff as idf
    >>> f = lambda y, theta: 0.5 * ((y - theta) ** 2).sum()
    >>> sparse = idf.ProximalGradient(f, lambda x, theta, step: idf.proxes.lasso(x, 1.0, step))
    >>> y, theta = np.array([2.0, 0.0, -1.0]), np.array([3.0, 0.5, -2.0])
    >>> print(idf.implicit_jvp(sparse, y, theta, np.ones(3)).round(6) + 0.0)
    [1. 0. 1.]
    """

    _name = "prox"

    def __init__(
        self, fun: Function = None, prox: Function = None, *, step: float | None = None, grad: Function = None,
        hvp: Function = None, hessian: Function = None, mixed_vjp: Function = None, mixed_jvp: Function = None,
        restrict: bool | None = None, verify: bool = True,
    ) -> None:  # fmt: skip
        self._set(
            fun,
            prox,
            step,
            restrict,
            verify,
            grad=grad,
            hvp=hvp,
            hessian=hessian,
            mixed_vjp=mixed_vjp,
            mixed_jvp=mixed_jvp,
        )

    @property
    def prox(self) -> Callable[..., Any]:
        """The proximal operator."""
        return self.after  # type: ignore[return-value]

    def _metric(self, point: Point, H: Operator, slope: Array) -> Metric:
        if self.step is not None and is_tree_vector(slope):
            return Metric.of(point, self.step)  # nothing is seen that could be tried
        return metric_at(point, H, slope).near(self.step, binding=True)

    def _outer(self, point: Point, step: Any) -> Callable[[Array, Array], Array]:
        prox = self.prox
        return point.numbered_function(lambda x, theta, step, *_: prox(x, theta, step), self._name, step)
