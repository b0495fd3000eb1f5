"""Quantities that the motion of a root conserves: reaction networks, Markov chains, transport.

Where Wᵀ F(y, θ) = 0 for all y, A = ∂F/∂y is singular, and F alone does not say where y goes: it moves such that Wᵀ y
stays what it is. The system is bordered,

    ⎡ A   W ⎤ ⎡ dy ⎤   ⎡ −B dθ ⎤
    ⎣ Wᵀ  0 ⎦ ⎣ μ  ⎦ = ⎣   0   ⎦,

regular as soon as W spans the null space of Aᵀ and none of its directions is lost on that of A; then μ = 0. Of a
function c(y, θ) that is conserved W is (∂c/∂y)ᵀ, and −∂c/∂θ dθ stands in the place of 0. The pseudo-inverse would take
the least dy instead of the one that keeps Wᵀ y.

References
----------
W. J. F. Govaerts, "Numerical Methods for Bifurcations of Dynamical Equilibria", SIAM, 2000, section 3.2.
DOI 10.1137/1.9780898719543 (bordered systems)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from implicitdiff.arrays import Array, any_true, named_items, quotient, times
from implicitdiff.conditions.base import Embedding, Maps, Observations
from implicitdiff.conditions.point import Point
from implicitdiff.errors import InputError, NonFiniteError, ShapeError, SolveError
from implicitdiff.linalg.block_operator import padded
from implicitdiff.linalg.operator import LinearMap, Operator, Product
from implicitdiff.tolerances import MISTAKE_OF_PRODUCT

__all__ = ["check_conserve", "conserving", "tell_conserved"]


def check_conserve(conserve: Any, sparsity: Any) -> None:
    """Raise where ``conserve`` is neither an array nor a function, or a pattern is given beside it."""
    if conserve is None:
        return
    if not callable(conserve) and not hasattr(conserve, "shape"):
        raise InputError(f"conserve is {type(conserve).__name__}; expected an array (n, k), or a callable.")
    if sparsity is not None:
        raise InputError("conserve and sparsity: the bordered system has rows that are not sparse.\nGive one of them.")


def conserving(point: Point, maps: Maps, conserve: Any, *, verify: bool) -> Maps:
    """Border the system with what is conserved.

    Parameters
    ----------
    point : Point
    maps : Maps
        Of F alone.
    conserve : array (n, k) or (n,), or callable
        W, or ``c(y, theta, *args)``, a tree of arrays.
    verify : bool
        Whether to look, by one product, whether F conserves it.
    """
    if conserve is None:
        return maps
    backend, n = point.backend, point.y.n
    xp, y, theta = backend.xp, point.y.vector, point.theta.vector
    c, W, moved = _quantities(point, conserve)
    k, here = W.shape[-1], c(y, theta)
    residual, at = maps.residual, maps.at
    observations = None
    if verify and n and k:
        g = maps.A.matvec(point.y.space.nearby(y) - y)
        turned = xp.matrix_transpose(W)
        whole = times(xp.abs(turned), xp.abs(g))
        part = quotient(xp, xp.abs(times(turned, g)), whole, whole > 0)
        part = xp.max(part, axis=-1)
        usable = ~(part > MISTAKE_OF_PRODUCT.at(xp, y.dtype) + 30 * maps.A.accuracy)
        observations = Observations(usable, usable, part)
    return maps._replace(
        residual=None if residual is None else (lambda: padded(backend, residual(), n + k)),
        at=None if at is None else (lambda z, t: backend.concat([at(z, t), c(z, t) - here])),
        A=_bordered(maps.A, W), B=_extended(maps.B, moved, k), observations=observations,
        embedding=Embedding(lambda v: padded(backend, v, n + k), lambda x: x[..., :n]),
        checked=tuple(found._replace(solved=None) for found in maps.checked),
    )  # fmt: skip


def tell_conserved(xp: Any, observations: Observations, batched: bool) -> SolveError:
    """Build the error for what F does not conserve."""
    items = f" in {named_items(xp, ~observations.usable)}" if batched else ""
    return SolveError(
        f"conserve: F does not conserve it{items}: Wᵀ A z is {float(xp.max(observations.details)):.2g} of its terms.\n"
        "Likely cause: W is transposed, or its rows are in another order than the raveled y.\n"
        "Next: check that W.T @ F(y, theta) is 0 for any y; verify=False where it is only to fix y."
    )


def _quantities(point: Point, conserve: Any) -> tuple[Any, Array, LinearMap | None]:
    """Return c(y, θ), W = (∂c/∂y)ᵀ with shape (*items, n, k), and ∂c/∂θ where it is not zero."""
    backend, n, items = point.backend, point.y.n, point.items
    xp, y, theta = backend.xp, point.y.vector, point.theta.vector
    if callable(conserve):
        c = point.part().raveled_function(conserve, "conserve")
        k, d = c(y, theta).shape[-1], backend.differentiate(c, y, theta)
        exact = d.kind == "autodiff"
        shared = (backend, k), (items, y.dtype, point.y.device)
        by_y = LinearMap(*shared[0], n, *shared[1], d.jvp_y, d.vjp_y if exact else None, label="conserve")
        by_theta = LinearMap(*shared[0], point.theta.n, *shared[1], d.jvp_theta, d.vjp_theta, label="conserve",
                             domain=point.theta.dtype)  # fmt: skip
        return c, xp.matrix_transpose(by_y.dense()), by_theta
    W = xp.asarray(backend.as_leaf(conserve, "conserve"))
    if len(W.shape) == 1:
        W = W[:, None]
    if len(W.shape) != 2 or W.shape[0] != n:
        raise ShapeError(f"conserve has shape {tuple(conserve.shape)}; expected (n, k) with n = {n}, the length of y.")
    if not backend.traced and any_true(xp, ~xp.isfinite(W)):
        raise NonFiniteError("conserve holds NaN or Inf.")
    W = backend.astype(W, y.dtype)
    whole = xp.broadcast_to(W, (*items, *W.shape)) if items else W
    return lambda z, _: z @ W, whole, None


def _bordered(op: Operator, W: Array) -> Operator:
    """[[A, W], [Wᵀ, 0]]."""
    backend, n, k = op.backend, op.n, W.shape[-1]
    xp, turned = backend.xp, backend.xp.matrix_transpose(W)

    def wrap(product: Product) -> Product:
        def both(x: Array) -> Array:
            v = x[..., :n]
            return backend.concat([product(v) + times(W, x[..., n:]), times(turned, v)])

        return both

    matrix, sparse = op.matrix, op.sparse
    if matrix is not None:
        zeros = xp.zeros((*op.items, k, k), dtype=op.dtype, device=op.device)
        matrix = xp.concat([xp.concat([matrix, W], axis=-1), xp.concat([turned, zeros], axis=-1)], axis=-2)
    if sparse is not None:
        import scipy.sparse

        sparse = scipy.sparse.block_array([[sparse, W], [turned, None]], format="csc")
    like = None if op.like is None else padded(backend, op.like, n + k)
    leaves = (*op.leaves, k) if op.leaves else ()
    definite = None if op.positive_definite is None else False
    return op.rewrapped(wrap, rows=n + k, columns=n + k, matrix=matrix, sparse=sparse, like=like, leaves=leaves,
                        positive_definite=definite)  # fmt: skip


def _extended(B: LinearMap, moved: LinearMap | None, k: int) -> LinearMap:
    """B over ∂c/∂θ, or over zeros."""
    backend, n = B.backend, B.rows

    def forward(product: Product) -> Product:
        if moved is None:
            return lambda t: padded(backend, product(t), n + k)
        return lambda t: backend.concat([product(t), moved.matvec(t)])

    def adjoint(product: Product) -> Product:
        if moved is None:
            return lambda u: product(u[..., :n])
        return lambda u: product(u[..., :n]) + moved.rmatvec(u[..., n:])

    forwards = None if B.forward is None else forward(B.forward)
    adjoints = None if B.adjoint is None else adjoint(B.adjoint)
    return replace(B, rows=n + k, forward=forwards, adjoint=adjoints, matrix=None, derive=None, _cache={})
