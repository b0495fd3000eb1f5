"""Fixed points of a gradient step followed by a projection or a proximal operator: y = P(y − s ∇f(y, θ), θ).

Let x = y − s ∇f(y, θ), D = ∂P/∂x and E = ∂P/∂θ at (x, θ), H = ∂²f/∂y² and C = ∂²f/∂θ∂y at (y, θ). Differentiating
F = y − P(x, θ) gives

    A = I − D + s D H,    B = s D C − E.

D and H are applied one after the other: no derivative is taken through a derivative. The solution does not depend on
the step, nor does its derivative; the condition of A does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from implicitdiff.arrays import Array, item_numbers, listed, named_items
from implicitdiff.conditions.base import Condition, Findings, Given, Maps, check_callables, finite_part, maps_from
from implicitdiff.conditions.fixed_point import identity_minus
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import InputError
from implicitdiff.operator import LinearMap, Operator
from implicitdiff.solvers import get_solver
from implicitdiff.solvers.support import OnSupport, ProximalOperator
from implicitdiff.vectors import is_tree_vector

__all__ = ["ProjectedGradient", "ProximalGradient"]


@dataclass(frozen=True)
class _Composite(Condition):
    """What the two conditions share: f and its derivatives, and the step."""

    fun: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None
    step: float = 1.0
    grad: Callable[..., Any] | None = None
    hvp: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    mixed_vjp: Callable[..., Any] | None = None
    mixed_jvp: Callable[..., Any] | None = None
    restrict: bool | None = None

    _name = "after"

    def _set(self, fun: Any, after: Any, step: Any, restrict: Any, **given: Any) -> None:
        if not callable(after):
            raise InputError(f"{self._name} is {type(after).__name__}; expected a callable.")
        if fun is None and given["grad"] is None:
            raise InputError("neither fun nor grad is given, and ∇f has to be evaluated: give one of them.")
        if not isinstance(step, (int, float)) or not 0 < step < float("inf"):
            raise InputError(f"step is {step!r}; expected a positive number.")
        if restrict not in (None, True, False):
            raise InputError(f"restrict is {restrict!r}; expected None, True or False.")
        check_callables(fun=fun, **given)
        for name, value in {"fun": fun, "after": after, "step": float(step), "restrict": restrict, **given}.items():
            object.__setattr__(self, name, value)

    @property
    def has_matrix(self) -> bool:
        return self.hessian is not None or self.restrict is True

    def without_bounds(self, theta: Any) -> Any:
        return finite_part(theta.backend.xp, theta.vector)

    def routed(self, solver: Any) -> Any:
        return OnSupport(get_solver(solver), self.restrict)

    def _outer(self, point: Point) -> Callable[[Array, Array], Array]:
        """P as a function of the vectors x and θ."""
        raise NotImplementedError

    def maps(self, point: Point) -> Maps:
        part, step, backend = point.part(), self.step, point.backend
        y, theta = point.y.vector, point.theta.vector
        smooth = Stationary(
            self.fun, grad=self.grad, hvp=self.hvp, hessian=self.hessian, mixed_vjp=self.mixed_vjp,
            mixed_jvp=self.mixed_jvp,
        ).maps(part)  # fmt: skip
        outer = self._outer(part)
        x = y - step * cast("Callable[[], Array]", smooth.residual)()
        gradient = cast("Callable[[Array, Array], Array]", smooth.at)  # there is fun or grad
        P = maps_from(part, Given(), outer, lambda: backend.differentiate(outer, x, theta), what=self._name)

        def at(z: Array, t: Array) -> Array:
            # F alone may not see that θ moves x: where P is constant in x. A part of x makes it seen.
            moved = z - step * gradient(z, t)
            return z - outer(moved, t) + 0.6 * moved

        backend.check_dependence(lambda t: at(y, t), theta)
        findings = None if backend.composable or is_tree_vector(x) else _kinks(point, P.A.kind, outer, x)
        A, B = _system(P.A, smooth.A, step), _mixed(P, smooth, step)
        return Maps(lambda: y - outer(x, theta), at, A, B, findings=findings)

    def tell(self, findings: Findings, batched: bool) -> tuple[Exception | None, list[str]]:
        import array_api_compat

        bent = findings.details
        xp = array_api_compat.array_namespace(bent)
        where = named_items(xp, xp.any(bent, axis=-1)) if batched else f"y, at {listed(item_numbers(xp, bent))}"
        return None, [
            f"{self._name} has a kink at x = y - step ∇f, or next to it: in {where} (in raveled order).\n"
            "Likely cause: a constraint, or a zero of y, that holds with a multiplier of zero (no strict "
            "complementarity); or finite differences that reach across a kink.\n"
            "The derivative is that of one side, or a mean. Next: move theta, or let autodiff derive it."
        ]


def _system(D: Operator, H: Operator, step: float) -> Operator:
    """A = I − D + s D H, and its transpose."""
    rest, accuracy = identity_minus(D), max(D.accuracy, H.accuracy)
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


def _mixed(P: Maps, smooth: Maps, step: float) -> LinearMap:
    """B = s D C − E, and its transpose."""
    D, E, C = P.A, P.B, smooth.B
    return LinearMap(
        E.backend, E.rows, E.columns, E.items, E.dtype, E.device,
        forward=lambda t: step * D.matvec(C.matvec(t)) - E.matvec(t),
        adjoint=lambda u: step * C.rmatvec(D.rmatvec(u)) - E.rmatvec(u),
        kind=_kinds(E, C), label="B", domain=E.domain,
    )  # fmt: skip


def _kinks(point: Point, kind: str, outer: Callable[[Array, Array], Array], x: Array) -> Findings:
    """Look whether P is bent at x: a second difference is of second order in its step only where P is smooth."""
    backend, theta = point.backend, point.theta.vector
    xp, eps = backend.xp, float(backend.xp.finfo(x.dtype).eps)
    z = backend.space(x).probe() + xp.zeros_like(x)
    z = xp.where(z < 0, z - 0.5, z + 0.5)
    size = xp.max(xp.abs(x), axis=-1, keepdims=True) if point.y.n else xp.zeros_like(x)
    reach = 2 * eps ** (1 / 3) if kind == "finite differences" else eps**0.5  # as far as the derivative looked
    h = reach * xp.where(size > 1, size, xp.ones_like(size))
    middle = outer(x, theta)
    bent = xp.abs((outer(x + h * z, theta) - middle) - (middle - outer(x - h * z, theta))) > 0.05 * h
    quiet = ~xp.any(bent, axis=-1)
    return Findings(xp.ones_like(quiet), quiet, bent)


def _kinds(*maps: LinearMap) -> str:
    return ", ".join(dict.fromkeys(m.kind for m in maps))


@dataclass(frozen=True, init=False)
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
    step : float, default 1.0
        Positive. Neither the solution nor its derivative depends on it; the linear system is conditioned best for about
        1 / ‖H‖.
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp, hessian, mixed_vjp, mixed_jvp : callable, optional
        Derivatives of ∇_y f, as for `Stationary`.
    restrict : bool, optional
        Whether the system is solved on the support, the coordinates on which D is not zero: there it is symmetric, and
        positive definite at a strict minimum, for `CG` and `Cholesky`. None: where D is found to be diagonal, or an
        orthogonal projector; under JAX nothing is found, and None means no. True also serves other D that are
        symmetric, and regular on their support (the group lasso). A solution of the whole system is checked for.

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
        self, fun: Any = None, projection: Any = None, *, step: float = 1.0, grad: Any = None, hvp: Any = None,
        hessian: Any = None, mixed_vjp: Any = None, mixed_jvp: Any = None,
        restrict: bool | None = None,
    ) -> None:  # fmt: skip
        self._set(
            fun,
            projection,
            step,
            restrict,
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

    def _outer(self, point: Point) -> Callable[[Array, Array], Array]:
        projection = self.projection
        return point.vector_function(lambda x, theta, *_: projection(x, theta), self._name)


@dataclass(frozen=True, init=False)
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
    step : float, default 1.0
        Positive. Neither the solution nor its derivative depends on it; the linear system is conditioned best for about
        1 / ‖H‖.
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp, hessian, mixed_vjp, mixed_jvp : callable, optional
        Derivatives of ∇_y f, as for `Stationary`.
    restrict : bool, optional
        Whether the system is solved on the support, the coordinates on which D is not zero: there it is symmetric, and
        positive definite at a strict minimum, for `CG` and `Cholesky`. None: where D is found to be diagonal, or an
        orthogonal projector; under JAX nothing is found, and None means no. True also serves other D that are
        symmetric, and regular on their support (the group lasso). A solution of the whole system is checked for.

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
        self, fun: Any = None, prox: Any = None, *, step: float = 1.0, grad: Any = None, hvp: Any = None,
        hessian: Any = None, mixed_vjp: Any = None, mixed_jvp: Any = None,
        restrict: bool | None = None,
    ) -> None:  # fmt: skip
        self._set(
            fun, prox, step, restrict, grad=grad, hvp=hvp, hessian=hessian, mixed_vjp=mixed_vjp, mixed_jvp=mixed_jvp
        )

    @property
    def prox(self) -> Callable[..., Any]:
        """The proximal operator."""
        return self.after  # type: ignore[return-value]

    def _outer(self, point: Point) -> Callable[[Array, Array], Array]:
        prox, step = self.prox, self.step
        return point.vector_function(lambda x, theta, *_: prox(x, theta, step), self._name)
