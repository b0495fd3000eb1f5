"""Fixed points: y = T(y, θ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from implicitdiff.conditions.base import Maps
from implicitdiff.conditions.point import Point
from implicitdiff.conditions.root import Root
from implicitdiff.linalg.operator import LinearMap, Product

__all__ = ["FixedPoint", "identity_minus"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class FixedPoint(Root):
    """A fixed point of a map: F(y, θ) = y − T(y, θ) = 0, hence A = I − ∂T/∂y and B = −∂T/∂θ.

    The map need not be a contraction: the linear system is solved, no series is summed. All callables are those of
    T itself, not of y − T.

    Parameters
    ----------
    fun : callable
        ``T(y, theta, *args) -> like y``.
    jvp, vjp : callable, optional
        ``(∂T/∂y) v`` and ``(∂T/∂y)ᵀ u``, as ``jvp(y, theta, v, *args) -> like y``.
    jacobian : callable, optional
        ``∂T/∂y`` as ``jacobian(y, theta, *args)``: dense (n, n) in raveled order, SciPy sparse or LinearOperator.
    mixed_vjp, mixed_jvp : callable, optional
        ``(∂T/∂θ)ᵀ u -> like theta`` and ``(∂T/∂θ) t -> like y``.
    verify : bool, default True
        Whether what is given is held against ``fun`` at its first use (see `check_derivatives`).
    singular : {"raise", "gauge", "minimum-norm"}
        What is asked for where A is singular: nothing, which is an error; the gradient of a loss that does not see its
        null space (`NotInvariantError` where it does), with any solver; or A⁺ in place of A⁻¹.
    conserve : array (n, k) or (n,), or callable, optional
        What y − T conserves (see `Root`): T(y) has as much of it as y, whatever y is.
    sparsity : None, "detect", SciPy sparse matrix, array (n, n) or pair (rows, columns), optional
        Where ∂T/∂y has entries, in raveled order: A is then assembled from as many products as its columns need
        colours, held against one more, and factored as a sparse matrix. ``"detect"`` finds the pattern.

    References
    ----------
    S. Bai, J. Z. Kolter, V. Koltun, "Deep equilibrium models", NeurIPS 2019. arXiv:1909.01377
    """

    def own_maps(self, point: Point) -> Maps:
        t = super().own_maps(point)
        y = point.y.vector
        value, at = t.residual, t.at
        return Maps(
            None if value is None else (lambda: y - value()),
            None if at is None else (lambda z, theta: z - at(z, theta)),
            identity_minus(t.A),
            _negated(t.B),
            checked=tuple(c._replace(solved=1) for c in t.checked),
        )


def identity_minus(a: Any) -> Any:
    """I − A of products, matrix and sparse matrix."""
    matrix, sparse = a.matrix, a.sparse
    if matrix is not None:
        matrix = a.backend.xp.eye(a.n, dtype=a.dtype, device=a.device) - matrix
    if sparse is not None:
        import scipy.sparse

        sparse = (scipy.sparse.eye_array(a.n, dtype=sparse.dtype) - sparse).tocsc()

    def wrap(product: Product) -> Product:
        return lambda x: x - product(x)

    return a.rewrapped(wrap, matrix=matrix, sparse=sparse, offset=1.0)


def _negated(b: LinearMap) -> LinearMap:
    return b.rewrapped(lambda product: lambda x: -product(x))
