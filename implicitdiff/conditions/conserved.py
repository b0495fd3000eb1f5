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
from typing import Any, NamedTuple, cast

from implicitdiff.arrays import (
    Array,
    any_true,
    divisor,
    item_norm,
    item_numbers,
    listed,
    named_items,
    quotient,
    times,
)
from implicitdiff.conditions.base import Embedding, Maps, Observations
from implicitdiff.conditions.point import Point
from implicitdiff.errors import InputError, NonFiniteError, ShapeError, SolveError
from implicitdiff.linalg.block_operator import padded
from implicitdiff.linalg.operator import LinearMap, Operator, Product
from implicitdiff.linalg.rows import Places, SparseRows, as_sparse, saddle_entries
from implicitdiff.linalg.sparsity import assembled, with_entries
from implicitdiff.tolerances import DEPENDENT_ROWS, MISTAKE_OF_PRODUCT

__all__ = ["check_conserve", "conserving", "explain_singular", "tell_conserved"]


def check_conserve(conserve: Any) -> None:
    """Raise where ``conserve`` is neither an array nor a function."""
    if conserve is not None and not callable(conserve) and not hasattr(conserve, "shape"):
        raise InputError(f"conserve is {type(conserve).__name__}; expected an array (n, k), or a callable.")


class Conserved(NamedTuple):
    """What is seen of W: the part of Wᵀ A z that does not cancel, None where nobody looked, and W itself."""

    part: Array | None
    W: Array


def conserving(point: Point, maps: Maps, conserve: Any, *, verify: bool, regular: bool = True) -> Maps:
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
    regular : bool
        Whether the bordered system is to have one solution alone.
    """
    if conserve is None:
        return maps
    backend, n = point.backend, point.y.n
    xp, y, theta = backend.xp, point.y.vector, point.theta.vector
    c, W, moved = _quantities(point, conserve)
    k, here = W.shape[-1], c(y, theta)
    residual, at = maps.residual, maps.at
    usable, part = xp.ones(point.items, dtype=xp.bool, device=point.y.device), None
    if verify and n and k:
        g = maps.A.matvec(point.y.space.nearby(y) - y)
        turned = xp.matrix_transpose(W)
        whole = times(xp.abs(turned), xp.abs(g))
        part = quotient(xp, xp.abs(times(turned, g)), whole, whole > 0)
        part = xp.max(part, axis=-1)
        usable = ~(part > MISTAKE_OF_PRODUCT.at(xp, y.dtype) + 30 * maps.A.accuracy)
    return maps._replace(
        residual=None if residual is None else (lambda: padded(backend, residual(), n + k)),
        at=None if at is None else (lambda z, t: backend.concat([at(z, t), c(z, t) - here])),
        A=_bordered(assembled(maps.A), W, regular), B=_extended(maps.B, moved, k),
        observations=Observations(usable, usable, Conserved(part, W)),
        embedding=Embedding(lambda v: padded(backend, v, n + k), lambda x: x[..., :n]),
        checked=tuple(found._replace(solved=None) for found in maps.checked),
    )  # fmt: skip


def tell_conserved(xp: Any, observations: Observations, batched: bool) -> SolveError:
    """Build the error for what F does not conserve."""
    items = f" in {named_items(xp, ~observations.usable)}" if batched else ""
    part = float(xp.max(observations.details.part))
    return SolveError(
        f"conserve: F does not conserve it{items}: Wᵀ A z is {part:.2g} of its terms.\n"
        "Likely cause: W is transposed, or its rows are in another order than the raveled y.\n"
        "Next: check that W.T @ F(y, theta) is 0 for any y; verify=False where it is only to fix y."
    )


def explain_singular(op: Operator, W: Array, error: Exception) -> Exception:
    """Say of a bordered system that is singular what W has too much of, or too little."""
    xp, (n, k) = op.backend.xp, W.shape[-2:]
    if not k or not n:
        return error
    rows = xp.max(xp.abs(W), axis=-1, keepdims=True)  # rank does not depend on the units of y
    unit = W / divisor(xp, rows)
    size = item_norm(xp, xp.matrix_transpose(unit))
    zero = item_numbers(xp, xp.any(size == 0, axis=0) if op.items else size == 0)
    values = xp.linalg.svdvals(unit / divisor(xp, size)[..., None, :])
    limit = DEPENDENT_ROWS.at(xp, W.dtype) * values[..., :1]
    rank = int(xp.min(xp.sum(xp.astype(values > limit, xp.int32), axis=-1)))
    if zero:
        head, cause = f"conserve: {_named(zero)} of W {'is' if len(zero) == 1 else 'are'} zero", "a law left blank"
    elif rank < k:
        head, cause = f"conserve: the {k} columns of W are dependent (of rank {rank})", "a law that is there twice"
    else:
        head = "conserve: A bordered by W is still singular, so that the root does not move in one way alone"
        cause = "a law is missing in W, or y has a direction of its own that F does not see"
    hint = "leave it out" if zero or rank < k else "W has to span the null space of Aᵀ: scipy.linalg.null_space(A.T)"
    return type(error)(f"{head}.\nLikely cause: {cause}.\nNext: {hint}.")


def _named(columns: list[int]) -> str:
    return f"column{'s' if len(columns) > 1 else ''} {listed(columns)}"


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
    W = xp.asarray(_numbers(backend, conserve, y))
    if len(W.shape) == 1:
        W = W[:, None]
    if len(W.shape) != 2 or W.shape[0] != n:
        raise ShapeError(f"conserve has shape {tuple(conserve.shape)}; expected (n, k) with n = {n}, the length of y.")
    if not backend.traced and any_true(xp, ~xp.isfinite(W)):
        raise NonFiniteError("conserve holds NaN or Inf.")
    W = backend.astype(W, y.dtype)
    whole = xp.broadcast_to(W, (*items, *W.shape)) if items else W
    return lambda z, _: z @ W, whole, None


def _numbers(backend: Any, conserve: Any, y: Array) -> Array:
    """W as an array of the framework: whole numbers, of atoms say, are as good as others."""
    whole = backend.is_array(conserve) and backend.xp.isdtype(conserve.dtype, ("integral", "bool"))
    return backend.astype(conserve, y.dtype) if whole else backend.as_leaf(conserve, "conserve")


def _bordered(op: Operator, W: Array, regular: bool) -> Operator:
    """[[A, W], [Wᵀ, 0]]; sparse where A is, with all of W among its entries."""
    backend, n, k = op.backend, op.n, W.shape[-1]
    xp, turned = backend.xp, backend.xp.matrix_transpose(W)

    def wrap(product: Product) -> Product:
        def both(x: Array) -> Array:
            v = x[..., :n]
            return backend.concat([product(v) + times(W, x[..., n:]), times(turned, v)])

        return both

    matrix, sparse, entries = op.matrix, op.sparse, op.entries
    if matrix is not None:
        zeros = xp.zeros((*op.items, k, k), dtype=op.dtype, device=op.device)
        matrix = xp.concat([xp.concat([matrix, W], axis=-1), xp.concat([turned, zeros], axis=-1)], axis=-2)
    if sparse is not None and entries is None:
        import scipy.sparse

        sparse = scipy.sparse.block_array([[sparse, W], [turned, None]], format="csc")
    like = None if op.like is None else padded(backend, op.like, n + k)
    leaves = (*op.leaves, k) if op.leaves else ()
    definite = None if op.positive_definite is None else False
    both = op.rewrapped(wrap, rows=n + k, columns=n + k, matrix=matrix, sparse=sparse, like=like, leaves=leaves,
                        positive_definite=definite, regular=regular, sparsity=None)  # fmt: skip
    if entries is None:
        return cast("Operator", both)
    places = Places((n, n), entries.pattern.rows, entries.pattern.columns)
    inner = SparseRows(places, entries.values, backend, op.device, entries.products)
    zeros = xp.zeros((*op.items, n + k), dtype=op.dtype, device=op.device)
    found = saddle_entries(inner, as_sparse(backend, backend.astype(turned, op.dtype)), zeros)
    return cast("Operator", with_entries(both, found, op.probes))


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
