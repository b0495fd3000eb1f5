"""Least squares: residuals whose sum of squares, or another loss of them, is least."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from implicitdiff.conditions.base import Function, Maps, check_callables, check_singular, check_verify
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.residuals import Residuals
from implicitdiff.conditions.sparse import SparseCondition
from implicitdiff.errors import InputError, UnknownNameError
from implicitdiff.linalg.sparsity import check_sparsity

__all__ = ["LeastSquares"]

HessianOf: TypeAlias = Literal["exact", "gauss-newton"]


@dataclass(frozen=True, eq=False, repr=False)
class LeastSquares(SparseCondition):
    """A minimum (or another stationary point) of ½‖r(y, θ)‖², or of another loss of the residuals r.

    With f = ℓ(r(y, θ), θ) + R(y, θ), J = ∂r/∂y, w = ∇ℓ(r) and H = ∇²ℓ(r) the condition is F = Jᵀw + ∇R = 0, and

        A = JᵀHJ + Σ w_i ∂²r_i/∂y² + ∂²R/∂y².

    The Gauss-Newton matrix leaves the sum out. It needs first derivatives of r only, it is positive semidefinite for a
    convex loss, as the Hessian of a network is not, and where the residuals are small or r is nearly linear it is near
    to A. B = ∂F/∂θ is exact either way. What is given of J is used; what is missing comes from the backend's autodiff,
    or from the complex step or finite differences, and the report says so.

    Parameters
    ----------
    residual : callable
        ``r(y, theta, *args)``: an array of any shape, or a tree of arrays. With a loss, whatever that takes: the output
        of a network.
    jvp, vjp : callable, optional
        ``J v`` as ``jvp(y, theta, v, *args) -> like residual``, and ``Jᵀu`` as ``vjp(y, theta, u, *args) -> like y``.
    jacobian : callable, optional
        J as ``jacobian(y, theta, *args)``: a dense array (k, n) in raveled order, a SciPy sparse matrix or a
        LinearOperator.
    loss : callable, optional
        ℓ as ``loss(r, theta, *args) -> scalar``, or ``loss(r) -> scalar``; ½‖r‖² where it is not given.
    regularizer : callable, optional
        R as ``regularizer(y, theta, *args) -> scalar``, or ``regularizer(y)``, added to the loss.
    hessian : {"exact", "gauss-newton"}, default "exact"
        What is solved with: A, or A without the curvature of r. With ``error=True`` the report tells what that costs.
    verify : bool, default True
        Whether what is given is held against ``residual`` at its first use (see `check_derivatives`).
    singular : {"raise", "gauge", "minimum-norm"}
        What is asked for where A is singular: nothing, which is an error; the gradient of a loss that does not see its
        null space (`NotInvariantError` where it does), with any solver; or A⁺ in place of A⁻¹. Where r is linear in y,
        and y the solution of least norm, the latter is the derivative of that solution: its null space turns with θ.
    sparsity : None, "detect", SciPy sparse matrix, array (n, n) or pair (rows, columns), optional
        Where A (not J) has entries, as for `Stationary`.

    Raises
    ------
    InputError, UnknownNameError
        Where an argument is none of these.

    Notes
    -----
    Where the Gauss-Newton matrix is JᵀJ (no loss, no regularizer), its condition number is not squared: ``cholesky``
    factors J by QR, ``lsmr`` and ``pinv`` solve with Jᵀ and then with J, ``auto`` chooses between them, and what the
    report tells of the condition number is that of J. ``lu``, ``cg`` and others take JᵀJ as it is.

    With ``batched=True`` on frameworks without vmap every callable takes and returns a leading axis of items.

    References
    ----------
    Å. Björck, "Numerical Methods for Least Squares Problems", SIAM, 1996. DOI 10.1137/1.9781611971484
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14
    (2002) 1723-1738. DOI 10.1162/08997660260028683 (the generalised Gauss-Newton matrix)

    Examples
    --------
    The mean of the data moves with each of them by 1/4:

    >>> import numpy as np
    >>> from implicitdiff import LeastSquares, implicit_jacobian, linearize
    >>> data = np.array([1.0, 2.0, 3.0, 6.0])
    >>> mean = LeastSquares(lambda y, theta: y - theta)
    >>> np.round(implicit_jacobian(mean, np.array([3.0]), data), 6)
    array([[0.25, 0.25, 0.25, 0.25]])

    and its standard error is that of four measurements:

    >>> np.round(linearize(mean, np.array([3.0]), data).standard_errors(), 6)
    array([1.080123])
    """

    residual: Callable[..., Any]
    jvp: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None
    jacobian: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    regularizer: Callable[..., Any] | None = None
    hessian: str = "exact"
    verify: bool = True
    singular: str = "raise"
    sparsity: Any = None
    follows: ClassVar[bool] = True

    def __init__(
        self, residual: Callable[..., Any], *, jvp: Function = None, vjp: Function = None, jacobian: Function = None,
        loss: Function = None, regularizer: Function = None, hessian: HessianOf = "exact", verify: bool = True,
        singular: str = "raise", sparsity: Any = None,
    ) -> None:  # fmt: skip
        if not callable(residual):
            raise InputError(f"residual is {type(residual).__name__}; expected a callable r(y, theta, *args).")
        fields = {"jvp": jvp, "vjp": vjp, "jacobian": jacobian, "loss": loss, "regularizer": regularizer}
        check_callables(**fields)
        check_verify(verify)
        if hessian not in get_args(HessianOf):
            raise UnknownNameError(f"hessian = {hessian!r}: expected one of {', '.join(get_args(HessianOf))}.")
        check_singular(singular)
        options = {"hessian": hessian, "verify": verify, "singular": singular, "sparsity": check_sparsity(sparsity)}
        for name, value in {"residual": residual, **fields, **options}.items():
            object.__setattr__(self, name, value)

    @property
    def has_matrix(self) -> bool:
        return self.given or self.sparsity is not None

    @property
    def derived_from(self) -> tuple[Any, ...]:
        return (self.residual, self.jvp, self.vjp, self.jacobian, self.loss, self.regularizer)

    @property
    def given(self) -> bool:
        """Whether anything was given of J."""
        return any(f is not None for f in (self.jvp, self.vjp, self.jacobian))

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        products = [f for f in (self.jvp, self.vjp, self.jacobian) if f is not None]
        return (self.residual, *products) if self.verify and products else ()

    @property
    def point_kind(self) -> str | None:
        return None

    @property
    def exact(self) -> LeastSquares:
        if self.hessian == "exact":
            return self
        found = copy.copy(self)
        object.__setattr__(found, "hessian", "exact")
        return found

    def maps(self, point: Point) -> Maps:
        return Residuals(self, point).maps()
