"""Restarted GMRES for general A.

Arnoldi's process builds an orthonormal basis V of the Krylov space of A M (right preconditioner) or M A
(left), with A V_j = V_{j+1} H_j; x minimises the residual over the basis. H is kept as its QR factorisation
by one Givens rotation a step, whose product Q gives the norm of the residual for free: β |Q_{j+1,0}|.

References
----------
Y. Saad, M. H. Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
systems", SIAM J. Sci. Stat. Comput. 7 (1986) 856-869. DOI 10.1137/0907058
L. Giraud, J. Langou, M. Rozložník, "The loss of orthogonality in the Gram-Schmidt orthogonalization
process", Comput. Math. Appl. 50 (2005) 1069-1075. DOI 10.1016/j.camwa.2005.08.009 (twice is enough)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError, UnknownNameError
from implicitdiff.report import Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start

__all__ = ["GMRES"]


class _State(NamedTuple):
    basis: Array  # (..., m + 1, n)
    upper: Array  # (..., m, m): Rᵀ, the triangular factor of H; identity where a column is still missing
    rotation: Array  # (..., m + 1, m + 1): product of the Givens rotations
    phi: Array  # norm of the residual over that of the start
    active: Array
    status: Array
    iterations: Array
    j: Any
    operator_norm: Array


@dataclass(frozen=True)
class GMRES(Krylov):
    """Generalised minimum residuals, restarted: any A, products only.

    Beside the options of every iterative method (``rtol``, default 1e-10 in double precision and 1e-5 in
    single; ``maxiter``, default 10 n, within 1 000 to 100 000; ``preconditioner`` ≈ A⁻¹; ``damping``):

    Parameters
    ----------
    restart : int, optional
        Vectors kept before a restart. Default: as many as fit into 128 MiB, between 30 and 300, at most n.
    side : {"right", "left"}, default "right"
        Where the preconditioner goes. On the right the method minimises the true residual.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import linear_solve
    >>> A = np.array([[0.0, 1.0], [2.0, 1.0]])
    >>> np.round(linear_solve(A, np.array([1.0, 1.0]), solver="gmres"), 6) + 0.0
    array([0., 1.])
    """

    restart: int | None = None
    side: str = "right"

    name: ClassVar[str] = "gmres"
    stall: ClassVar[float] = 0.999  # a short restart may gain little and still get there

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in {"right", "left"}:
            raise UnknownNameError(f"side = {self.side!r}: expected 'right' or 'left'.")
        if self.restart is not None and self.restart < 1:
            raise InputError(f"restart = {self.restart!r}: expected a positive integer.")

    def _size(self, items: tuple[int, ...], n: int) -> int:
        total = n * math.prod(items)
        fitting = min(max(2**24 // max(total, 1), 30), 300)
        return min(self.restart or fitting, n)

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run one restart cycle from x with residual r."""
        product, precondition = state.operator.matvec, state.preconditioner
        m = self._size(space.items, space.length)
        left = self.side == "left" and not precondition.identity
        r = precondition(start.r) if left else start.r
        beta = space.norm(r)
        # On the left the preconditioned residual is what falls: ask for the same reduction of it.
        target = start.target / (space.norm(start.r) if left else beta)

        def apply(v: Array) -> Array:
            return precondition(product(v)) if left else product(precondition(v))

        def step(s: _State) -> _State:
            return _step(s, space, apply, m, target, start.budget)

        first = _first(space, r, beta, start.active, m)
        end = state.operator.backend.while_loop(lambda s: space.any(s.active), step, first, limit=m)
        k = end.j if isinstance(end.j, int) else m  # in a compiled program it is not known
        y = _triangular_solve(space, end, beta, k)
        d = space.combine(end.basis, k - 1, y)
        x = space.axpy(space.scalar(1.0), d if left else precondition(d), start.x)
        return Cycle(x, end.iterations, end.j, end.status, end.operator_norm)


def _first(space: Any, r: Array, beta: Array, active: Array, m: int) -> _State:
    xp, zero = space.xp, space.scalar(0.0)
    eye = xp.eye(m + 1, dtype=space.dtype, device=space.device)
    eye = xp.broadcast_to(eye, (*space.items, m + 1, m + 1))
    safe = space.where(beta > 0, beta, space.scalar(1.0))
    basis = space.put(space.basis(m + 1), 0, space.scale(1 / safe, space.copy(r)))
    upper = space.copy(eye[..., :m, :m])
    return _State(basis, upper, space.copy(eye), zero + 1, active, space.counter(), space.counter(), 0, zero)


def _step(s: _State, space: Any, apply: Any, m: int, target: Array, budget: Array) -> _State:
    xp, zero, one = space.xp, space.scalar(0.0), space.scalar(1.0)
    w = space.copy(apply(space.take(s.basis, s.j)))
    h = space.project(s.basis, s.j, w)
    w = space.subtract(w, space.combine(s.basis, s.j, h))
    again = space.project(s.basis, s.j, w)  # once more: classical Gram-Schmidt twice is as good as modified
    w = space.subtract(w, space.combine(s.basis, s.j, again))
    h = h + again
    size = space.norm(w)
    norm = xp.sqrt(xp.sum(h * h, axis=-1) + size * size)
    finite = space.isfinite(norm)
    broke = size <= space.eps * norm  # the space is invariant: the solution lies in it
    size = space.where(broke, zero, size)
    basis = space.put(s.basis, s.j + 1, space.scale(space.where(broke, zero, one / space.where(broke, one, size)), w))
    go = s.active & finite
    column, rotation, diagonal = _rotate(space, s, h, size, m, go)
    upper = _set_column(space, s, column, diagonal, go, m)
    phi = space.where(go, xp.abs(rotation[..., 0] @ _one_hot(space, s.j + 1, m + 1)), s.phi)
    status = space.where(s.active & ~finite, int(Status.NON_FINITE), s.status)
    singular = go & broke & (diagonal <= space.eps * norm)
    status = space.where(singular, int(Status.SINGULAR), status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & ~broke & (phi > target) & (s.j + 1 < m) & (iterations < budget)
    return _State(
        basis, upper, rotation, phi, active, status, iterations, s.j + 1,
        space.maximum(s.operator_norm, space.where(s.active & finite, norm, zero)),
    )  # fmt: skip


def _rotate(space: Any, s: _State, h: Array, size: Array, m: int, go: Array) -> tuple[Array, Array, Array]:
    """Apply the rotations so far to the new column, and one more that annihilates its last entry."""
    xp = space.xp
    e0, e1 = _one_hot(space, s.j, m + 1), _one_hot(space, s.j + 1, m + 1)
    column = (s.rotation @ (h + e1 * size[..., None])[..., None])[..., 0]
    a, b = column @ e0, column @ e1
    d = xp.sqrt(a * a + b * b)
    safe = xp.where(d > 0, d, xp.ones_like(d))
    c, sn = xp.where(d > 0, a / safe, xp.ones_like(d))[..., None], (b / safe)[..., None]
    row0, row1 = space.copy_row(s.rotation, s.j), space.copy_row(s.rotation, s.j + 1)
    mask = xp.asarray(go)[..., None]
    rotation = space.put_row(s.rotation, s.j, xp.where(mask, c * row0 + sn * row1, row0))
    rotation = space.put_row(rotation, s.j + 1, xp.where(mask, c * row1 - sn * row0, row1))
    return column + e0 * (d - a)[..., None], rotation, d


def _set_column(space: Any, s: _State, column: Array, diagonal: Array, go: Array, m: int) -> Array:
    """Store the rotated column as row j of Rᵀ, for the items for which it is good."""
    xp = space.xp
    rows = xp.arange(m, device=space.device)
    column = xp.where(rows <= s.j, column[..., :m], xp.zeros_like(column[..., :m]))
    usable = xp.asarray(go & (diagonal > 0))[..., None]
    return space.put_row(s.upper, s.j, xp.where(usable, column, space.copy_row(s.upper, s.j)))


def _one_hot(space: Any, j: Any, m: int) -> Array:
    xp = space.xp
    return xp.astype(xp.arange(m, device=space.device) == j, space.dtype)


def _triangular_solve(space: Any, end: _State, beta: Array, k: int) -> Array:
    """Solve R y = β Q e₀ for the columns that each item has of the first k; 0 beyond."""
    xp = space.xp
    columns = space.where(end.status == 0, end.iterations, end.iterations - 1)  # the last one may be bad
    known = xp.arange(k, device=space.device) < xp.asarray(columns)[..., None]
    g = xp.asarray(beta)[..., None] * end.rotation[..., :k, 0]
    g = xp.where(known, g, xp.zeros_like(g))
    return xp.linalg.solve(xp.matrix_transpose(end.upper[..., :k, :k]), g[..., None])[..., 0]
