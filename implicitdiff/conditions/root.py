"""Roots: F(y, θ) = 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicitdiff.arrays import any_true
from implicitdiff.conditions.base import (
    Function,
    Given,
    Maps,
    Observations,
    check_callables,
    check_singular,
    check_verify,
    maps_from,
)
from implicitdiff.conditions.conserved import check_conserve, conserving, explain_singular, tell_conserved
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.sparse import SparseCondition
from implicitdiff.errors import InputError, SingularError
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.sparsity import check_sparsity
from implicitdiff.namespaces import namespace

__all__ = ["Root"]


@dataclass(frozen=True, eq=False, repr=False)
class Root(SparseCondition):
    """A root of a vector function with as many components as unknowns: F(y, θ) = 0.

    A = ∂F/∂y is general. What is given is used; what is missing comes from the backend's autodiff, or from the
    complex step or finite differences, and the report says so.

    Parameters
    ----------
    fun : callable
        ``F(y, theta, *args) -> like y``.
    jvp, vjp : callable, optional
        ``(∂F/∂y) v`` and ``(∂F/∂y)ᵀ u``, as ``jvp(y, theta, v, *args) -> like y``.
    jacobian : callable, optional
        ``∂F/∂y`` as ``jacobian(y, theta, *args)``: a dense array (n, n) in raveled order, a SciPy sparse matrix or a
        LinearOperator.
    mixed_vjp, mixed_jvp : callable, optional
        ``(∂F/∂θ)ᵀ u -> like theta`` and ``(∂F/∂θ) t -> like y``.
    verify : bool, default True
        Whether what is given is held against ``fun`` at its first use (see `check_derivatives`). Say False for
        approximations that are meant.
    singular : {"raise", "gauge", "minimum-norm"}
        What is asked for where A is singular: nothing, which is an error; the gradient of a loss that does not see its
        null space (`NotInvariantError` where it does), with any solver; or A⁺ in place of A⁻¹.
    conserve : array (n, k) or (n,), or callable, optional
        What the motion of the root conserves, where A is singular for that reason: Wᵀ y with W in raveled order, or
        ``c(y, theta, *args)``, a tree of arrays whose total derivative is zero. The system is bordered by it, and an
        error where that leaves it singular, whatever the solver.
    sparsity : None, "detect", SciPy sparse matrix, array (n, n) or pair (rows, columns), optional
        Where A has entries, in raveled order: A is then assembled from as many products as its columns need colours,
        held against one more, and factored as a sparse matrix. ``"detect"`` finds the pattern.

    References
    ----------
    M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022. arXiv:2105.15183
    """

    fun: Callable[..., Any]
    jvp: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None
    jacobian: Callable[..., Any] | None = None
    mixed_vjp: Callable[..., Any] | None = None
    mixed_jvp: Callable[..., Any] | None = None
    verify: bool = True
    singular: str = "raise"
    conserve: Any = None
    sparsity: Any = None

    def __init__(
        self, fun: Callable[..., Any], *, jvp: Function = None, vjp: Function = None, jacobian: Function = None,
        mixed_vjp: Function = None, mixed_jvp: Function = None, verify: bool = True,
        singular: str = "raise", conserve: Any = None, sparsity: Any = None,
    ) -> None:  # fmt: skip
        if not callable(fun):
            raise InputError(f"fun is {type(fun).__name__}; expected a callable F(y, theta, *args) -> like y.")
        fields = {
            "fun": fun,
            "jvp": jvp,
            "vjp": vjp,
            "jacobian": jacobian,
            "mixed_vjp": mixed_vjp,
            "mixed_jvp": mixed_jvp,
        }
        check_callables(**fields)
        check_verify(verify)
        check_singular(singular)
        check_conserve(conserve)
        options = {"verify": verify, "singular": singular, "conserve": conserve, "sparsity": check_sparsity(sparsity)}
        for name, value in {**fields, **options}.items():
            object.__setattr__(self, name, value)

    @property
    def has_matrix(self) -> bool:
        return self.jacobian is not None or self.sparsity is not None or self.conserve is not None

    @property
    def arrays(self) -> dict[str, Any]:
        return {} if self.conserve is None or callable(self.conserve) else {"conserve": self.conserve}

    def tell(self, observations: Observations, batched: bool) -> tuple[Exception | None, list[str | Warning]]:
        wrong = any_true(namespace(observations.usable), ~observations.usable)
        return tell_conserved(namespace(observations.usable), observations, batched) if wrong else None, []

    def diagnose(self, observations: Observations, error: Exception, operator: Operator) -> Exception:
        if isinstance(error, SingularError) and self.conserve is not None:
            return explain_singular(operator, observations.details.W, error)
        return error

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        given = (self.jvp, self.vjp, self.jacobian, self.mixed_vjp, self.mixed_jvp)
        products = [f for f in given if f is not None]
        return (self.fun, *products) if self.verify and products else ()

    @property
    def derived_from(self) -> tuple[Any, ...]:
        return (self.fun, self.jvp, self.vjp, self.jacobian)

    def maps(self, point: Point) -> Maps:
        regular = self.singular == "raise"
        return conserving(point, self.own_maps(point), self.conserve, verify=self.verify, regular=regular)

    def own_maps(self, point: Point) -> Maps:
        """F, A and B without what is conserved beside."""
        function = point.vector_function(self.fun, "fun")
        given = Given(
            ("jvp", self.jvp), ("vjp", self.vjp), ("jacobian", self.jacobian), self.mixed_jvp, self.mixed_vjp,
            None if self.sparsity is None else self.where(),
        )  # fmt: skip
        y, theta = point.y.vector, point.theta.vector
        return maps_from(point, given, function, lambda: point.backend.differentiate(function, y, theta))
