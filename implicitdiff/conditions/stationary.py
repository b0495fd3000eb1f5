"""Stationary points: ∇_y f(y, θ) = 0 (minima, maxima and saddle points alike)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from implicitdiff.conditions.base import Function, Given, Maps, check_callables, check_singular, check_verify, maps_from
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.sparse import SparseCondition
from implicitdiff.errors import InputError
from implicitdiff.linalg.sparsity import check_sparsity

__all__ = ["Stationary"]

Kind: TypeAlias = Literal["minimum", "maximum", "saddle"]
KINDS = (None, *get_args(Kind))


@dataclass(frozen=True, eq=False, repr=False)
class Stationary(SparseCondition):
    """A stationary point of a scalar function: F(y, θ) = ∇_y f(y, θ) = 0.

    A = ∂²f/∂y² is symmetric, and positive definite at a strict minimum. What is given is used; what is missing
    comes from the backend's autodiff, or from the complex step or finite differences, and the report says so.

    Parameters
    ----------
    fun : callable, optional
        ``f(y, theta, *args) -> scalar``.
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp : callable, optional
        ``(∂²f/∂y²) v`` as ``hvp(y, theta, v, *args) -> like y``.
    hessian : callable, optional
        ``hessian(y, theta, *args)``: a dense array (n, n) in raveled order, a SciPy sparse matrix or a
        LinearOperator.
    mixed_vjp : callable, optional
        ``Bᵀu`` with B = ∂²f/∂θ∂y as ``mixed_vjp(y, theta, u, *args) -> like theta``.
    mixed_jvp : callable, optional
        ``B t`` as ``mixed_jvp(y, theta, t, *args) -> like y``.
    kind : {None, "minimum", "maximum", "saddle"}, optional
        What y is, and is checked to be: a `RegularityWarning` says where the curvature that the solve met contradicts
        it. None: a minimum or a maximum; negative curvature is told where ``solver="auto"`` meets it, unless all of it
        is negative. ``"saddle"``: any stationary point, and nothing is told.
    verify : bool, default True
        Whether what is given is held against the other functions at its first use (see `check_derivatives`). Say False
        for approximations that are meant, such as a Gauss-Newton matrix.
    singular : {"raise", "gauge", "minimum-norm"}
        What is asked for where A is singular: nothing, which is an error; the gradient of a loss that does not see its
        null space (`NotInvariantError` where it does), with any solver; or A⁺ in place of A⁻¹. Where f is quadratic in
        y, and y of least norm, the latter is the derivative of that solution: its null space turns with θ.
    sparsity : None, "detect", SciPy sparse matrix, array (n, n) or pair (rows, columns), optional
        Where A has entries, in raveled order: A is then assembled from as many products as its columns need colours,
        held against one more, and factored as a sparse matrix. ``"detect"`` finds the pattern.

    Raises
    ------
    InputError
        Where an argument is none of these.

    Notes
    -----
    With ``batched=True`` on frameworks without vmap every callable takes and returns a leading axis of items; ``fun``
    returns one scalar per item.

    References
    ----------
    S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
    optimization", 2016. arXiv:1607.05447
    """

    fun: Callable[..., Any] | None = None
    grad: Callable[..., Any] | None = None
    hvp: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    mixed_vjp: Callable[..., Any] | None = None
    mixed_jvp: Callable[..., Any] | None = None
    kind: str | None = None
    verify: bool = True
    singular: str = "raise"
    sparsity: Any = None
    follows: ClassVar[bool] = True

    def __init__(
        self, fun: Function = None, *, grad: Function = None, hvp: Function = None, hessian: Function = None,
        mixed_vjp: Function = None, mixed_jvp: Function = None, kind: Kind | None = None, verify: bool = True,
        singular: str = "raise", sparsity: Any = None,
    ) -> None:  # fmt: skip
        fields: dict[str, Any] = {
            "fun": fun,
            "grad": grad,
            "hvp": hvp,
            "hessian": hessian,
            "mixed_vjp": mixed_vjp,
            "mixed_jvp": mixed_jvp,
        }
        check_callables(**fields)
        check_verify(verify)
        check_singular(singular)
        if kind not in KINDS:
            raise InputError(f"kind = {kind!r}: expected one of {', '.join(map(repr, KINDS))}.")
        fields = {**fields, "kind": kind, "verify": verify, "singular": singular, "sparsity": check_sparsity(sparsity)}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def has_matrix(self) -> bool:
        return self.hessian is not None or self.sparsity is not None

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        given = (self.grad, self.fun, self.hvp, self.hessian, self.mixed_vjp, self.mixed_jvp)
        if not self.verify or (self.grad is None and self.fun is None):
            return ()
        found = [f for f in given if f is not None]
        return tuple(found) if len(found) > 1 else ()

    @property
    def point_kind(self) -> str | None:
        return self.kind

    @property
    def derived_from(self) -> tuple[Any, ...]:
        return (self.fun, self.grad, self.hvp, self.hessian)

    def maps(self, point: Point) -> Maps:
        given = Given(
            ("hvp", self.hvp), ("hvp", None), ("hessian", self.hessian), self.mixed_jvp, self.mixed_vjp,
            None if self.sparsity is None else self.where(),
        )  # fmt: skip
        backend, y, theta = point.backend, point.y.vector, point.theta.vector
        gradient = None if self.grad is None else point.vector_function(self.grad, "grad")
        scalar = None if self.fun is None else point.scalar_function(self.fun, "fun")

        def derive() -> Any:
            found = None
            if gradient is not None:
                found = backend.differentiate(gradient, y, theta)
                if found.kind == "autodiff" or scalar is None:
                    return found
            if scalar is not None:
                from_values = backend.differentiate_gradient(scalar, y, theta)
                if found is None or from_values.kind == "autodiff":
                    return from_values
            return found

        cache: list[Any] = []

        def once() -> Any:
            if not cache:
                cache.append(derive())
            return cache[0]

        value = None if scalar is None else (lambda: once().value())
        function: Callable[..., Any] | None = gradient
        if gradient is not None:
            value = lambda: gradient(y, theta)  # noqa: E731
        elif scalar is not None:
            function = lambda a, t: backend.differentiate_gradient(scalar, a, t).value()  # noqa: E731
        known = gradient is not None or scalar is not None
        return maps_from(
            point, given, function, once if known else None, symmetric=True, what="∇f", value=value, values=scalar,
            known_as="fun" if gradient is None else "grad",
        )  # fmt: skip
