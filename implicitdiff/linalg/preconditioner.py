"""Preconditioners: anything that multiplies by an approximation of A⁻¹, with its transpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError, ShapeError
from implicitdiff.linalg.operator import LinearMap, Operator, checked_product, matrix_map

if TYPE_CHECKING:
    from implicitdiff.linalg.equilibration import Scaling

__all__ = ["Preconditioner", "as_preconditioner", "is_valid"]


@dataclass(frozen=True)
class Preconditioner:
    """Products with M ≈ A⁻¹ and with Mᵀ, on vectors (*rhs, *items, n).

    Parameters
    ----------
    matvec, rmatvec : callable or None
        None for ``matvec`` is the identity; ``rmatvec`` None says that only M is known.
    unscaled : Preconditioner, optional
        What it was before it was scaled as the system is.
    """

    matvec: Callable[[Array], Array] | None = None
    rmatvec: Callable[[Array], Array] | None = None
    unscaled: Preconditioner | None = None

    @property
    def given(self) -> Preconditioner:
        """M in the units in which it was given."""
        return self.unscaled or self

    def scaled(self, scaling: Scaling | None) -> Preconditioner:
        """Return C⁻¹ M R⁻¹, which preconditions R A C as M does A: the iterates are the same, the norm is not."""
        if scaling is None or self.identity:
            return self

        def between(product: Callable[[Array], Array] | None, scaling: Scaling) -> Callable[[Array], Array] | None:
            return None if product is None else lambda x: scaling.start(product(scaling.residual(x)))

        forward, adjoint = between(self.matvec, scaling), between(self.rmatvec, scaling.transpose())
        return Preconditioner(forward, adjoint, self)

    @property
    def identity(self) -> bool:
        """Whether there is none."""
        return self.matvec is None

    def __call__(self, x: Array) -> Array:
        """M x."""
        return x if self.matvec is None else self.matvec(x)

    def transpose(self) -> Preconditioner:
        """Mᵀ, which preconditions Aᵀ."""
        if self.matvec is not None and self.rmatvec is None:
            raise InputError(
                "preconditioner: the transposed system needs Mᵀ, and only M is known.\n"
                "Give a matrix, a LinearOperator with rmatvec, or the pair (M, Mᵀ) of callables."
            )
        before = None if self.unscaled is None else self.unscaled.transpose()
        return Preconditioner(self.rmatvec, self.matvec, before)


def is_valid(preconditioner: Preconditioner, space: Any, b: Array, *, definite: bool) -> Array:
    """Whether M may serve, per item, from its products with b and with a vector z without structure.

    Both have to be finite and not zero; where M has to be symmetric positive definite, bᵀM b and zᵀM z are positive,
    and zᵀM b = bᵀM z up to rounding.
    """
    z, given = space.probe(), space.isfinite(space.largest(b))  # a b that is not finite says nothing
    mb, mz = preconditioner(b), preconditioner(z)
    top_b, top_z = space.largest(mb), space.largest(mz)
    with_b = space.isfinite(top_b) & (top_b > 0)
    with_z = space.isfinite(top_z) & (top_z > 0)
    if definite:
        gap = abs(space.inner(z, mb) - space.inner(b, mz))
        size = space.length**0.5 * (top_b * space.norm(z) + top_z * space.norm(b))
        with_b = with_b & (space.inner(b, mb) > 0) & (gap <= 10 * space.eps**0.5 * size)
        with_z = with_z & (space.inner(z, mz) > 0)
    return with_z & (with_b | ~given)


def as_preconditioner(given: Any, operator: Operator) -> Preconditioner:
    """Build a preconditioner from what the user gave.

    Parameters
    ----------
    given : None, array (n, n) or (n,), sparse matrix, LinearOperator, callable, (M, Mᵀ), or an approximate solver
        A vector of shape (n,) is a diagonal.
    operator : Operator
        Of the system: gives dimension, dtype and backend.
    """
    if given is None or isinstance(given, Preconditioner):
        return given or Preconditioner()
    if hasattr(given, "as_preconditioner"):
        found: Preconditioner = given.as_preconditioner(operator)
        return found
    if isinstance(given, tuple):
        if len(given) != 2 or not all(callable(part) for part in given):
            raise InputError("preconditioner: a tuple is the pair of callables (M, Mᵀ).")
        forward, adjoint = (checked_product(operator, part, "preconditioner") for part in given)
        return Preconditioner(forward, adjoint)
    if hasattr(given, "shape"):
        return _from_matrix(given, operator)
    if callable(given):
        product = checked_product(operator, given, "preconditioner")
        return Preconditioner(product, product if operator.symmetric else None)
    what = repr(given) if isinstance(given, str) else type(given).__name__
    raise InputError(
        f"preconditioner: expected a matrix, a callable or an approximate solver such as Nystrom(rank=50), got {what}."
    )


def _from_matrix(given: Any, operator: Operator) -> Preconditioner:
    n = operator.n
    if tuple(given.shape) in {(n,), (*operator.items, n)}:
        return Preconditioner(lambda x: given * x, lambda x: given * x)
    if tuple(given.shape[-2:]) != (n, n):
        raise ShapeError(f"preconditioner has shape {tuple(given.shape)}; expected ({n}, {n}) or ({n},).")
    items = operator.items if len(given.shape) > 2 else ()
    m = matrix_map(LinearMap, operator.backend, given, items, operator.dtype, operator.device, label="preconditioner")
    return Preconditioner(m.matvec, m.rmatvec)
