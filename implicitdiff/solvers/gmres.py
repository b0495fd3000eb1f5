"""Restarted GMRES for general A.

Arnoldi's process builds an orthonormal basis V of the Krylov space of A M (right preconditioner) or M A
(left), with A V_j = V_{j+1} H_j; x minimises the residual over the basis. H is kept as its QR factorisation
by one Givens rotation a step, whose product Q gives the norm of the residual for free: β |Q_{j+1,0}|.

What was seen before a restart is lost. Where some restarts have not been enough and A turns out to be symmetric, MINRES
goes on: with three vectors it minimises over all of the Krylov space, and tells a singular A from a slow one.

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
from functools import partial
from typing import Any, ClassVar, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, item_norm, probe_vector
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Cycle, Krylov, KrylovState, Start, accuracy, without_preconditioner
from implicitdiff.solvers.minres import MINRES
from implicitdiff.tolerances import SKEW_SEEN

__all__ = ["GMRES"]

RESTARTS, LEAST = 4, 1000
"""Restarts, and iterations, after which A is asked whether it is symmetric."""
PROBES = 2
"""Vectors on which the inverse of the triangular factor is seen."""


class _State(NamedTuple):
    basis: Array  # (..., m + 1, n)
    upper: Array  # (..., m, m): Rᵀ, the triangular factor of H; zero where a column is still missing
    rotation: Array  # (..., m + 1, m + 1): product of the Givens rotations; row j is made at step j
    phi: Array  # norm of the residual over that of the start
    active: Array
    status: Array
    iterations: Array
    j: Any
    operator_norm: Array
    least: Array  # smallest ‖A v‖ over the basis: an upper bound of the least singular value


@dataclass(frozen=True, eq=False, repr=False)
class GMRES(Krylov):
    """Generalised minimum residuals, restarted: any A, products only.

    Beside the options of every iterative method (``rtol``, default 1e-10 in double precision and 1e-5 in
    single; ``maxiter``, default 10 n, within 1 000 to 100 000; ``preconditioner`` ≈ A⁻¹; ``damping``):

    Parameters
    ----------
    restart : int, optional
        Vectors kept before a restart. Default: as many as fit into 128 MiB, between 30 and 300, at most n; each item
        of a batch keeps as many as it would alone.
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

    def kept(self, n: int) -> int:
        """Return the number of vectors before a restart, the same for an item alone and in a batch."""
        return min(self.restart or min(max(2**24 // max(n, 1), 30), 300), n)

    def describe(self, state: KrylovState) -> list[tuple[str, str]]:
        (first,) = super().describe(state)
        return [first, (MINRES.name, f"{first[1]}; gmres stood still, and A is symmetric")]

    def _solve(
        self, state: KrylovState, b: Array, x0: Array | None, memory: Any = None, most: Any = None
    ) -> tuple[Any, ...]:
        op, backend = state.operator, state.operator.backend
        n, most = backend.space(b).length, self.most(op.n) if most is None else most
        first = max(RESTARTS * self.kept(n), LEAST)
        if backend.traced or memory is not None or not state.preconditioner.identity or most <= first:
            return super()._solve(state, b, x0, memory, most)
        found = super()._solve(state, b, x0, None, first)
        xp, space = backend.xp, backend.space(b)
        slow = found[1] == int(Status.MAX_ITERATIONS)
        open_ = slow | (found[1] == int(Status.STAGNATED))
        symmetric = any_true(xp, xp.asarray(open_)) and _is_symmetric(op, b)
        mask = xp.asarray(open_ if symmetric else slow)
        if not any_true(xp, mask):
            return found
        goes_on: Any = MINRES(rtol=self.rtol, maxiter=self.maxiter) if symmetric else super()
        right, start = (space.select(mask, x, 0 * x) for x in (b, found[0]))
        more = goes_on._solve(state, right, start, None, most - first)
        return _joined(space, mask, found, more, int(symmetric))

    def cycle(self, state: KrylovState, space: Any, start: Start) -> Cycle:
        """Run one restart cycle from x with residual r."""
        product, precondition = state.operator.matvec, state.preconditioner
        m = self.kept(space.length)
        left = self.side == "left" and not precondition.identity
        r = precondition(start.r) if left else start.r
        beta = space.norm(r)
        # On the left the preconditioned residual is what falls: ask for the same reduction of it.
        target = start.target / (space.norm(start.r) if left else beta)

        def apply(v: Array) -> Array:
            return precondition(product(v)) if left else product(precondition(v))

        end, done = _first(space, r, beta, start.active, m), 0
        for room in space.stages(m + 1):
            end = state.operator.backend.while_loop(
                partial(_goes_on, space=space, room=room),
                partial(_step, space=space, apply=apply, m=m, target=target, budget=start.budget, room=room),
                end,
                limit=room - 1 - done,
            )
            done = room - 1
        k = end.j if isinstance(end.j, int) else m  # in a compiled program it is not known
        y, gain = _triangular_solve(space, end, beta, k)
        d = space.combine(end.basis, end.j - 1, y, m)
        step = d if left else precondition(d)
        norm = end.operator_norm
        noise = accuracy(state, space)
        long = space.xp.sqrt(space.xp.sum(y * y, axis=-1))  # ‖A V y‖ / ‖y‖ is another bound; ‖A V y‖ <= 2 β
        flat = (end.least <= 4 * noise**0.5 * norm) | (100 * noise * norm * long > 2 * beta)
        if not precondition.identity:
            sizes = (space.norm(start.r), beta) if left else (space.norm(d), space.norm(step))
            norm = without_preconditioner(space, norm, *sizes)
        x = space.axpy(space.scalar(1.0), step, start.x)
        return Cycle(x, end.iterations, end.j, end.status, norm, flat, gain)


def _is_symmetric(op: Operator, b: Array) -> bool:
    """Whether A is symmetric on two vectors, as far as rounding lets see."""
    if op.symmetric is not None:
        return op.symmetric
    space = op.backend.space(b)
    z = space.probe()
    az, ab = space.copy(op.matvec(z)), op.matvec(b)
    gap = abs(space.inner(az, b) - space.inner(z, ab))
    size = space.norm(az) * space.norm(b) + space.norm(z) * space.norm(ab)
    return not any_true(op.backend.xp, op.backend.xp.asarray(gap > SKEW_SEEN.of(space.eps) * size))


def _joined(space: Any, mask: Array, first: tuple[Any, ...], more: tuple[Any, ...], method: int) -> tuple[Any, ...]:
    """The later result in the items of the mask; work adds up."""
    (x, status, old), (y, ended, new) = first, more

    def pick(a: Any, b: Any) -> Any:
        return b if a is None else space.where(mask, a, b)

    counts = Counts(
        old.iterations + space.where(mask, new.iterations, 0), old.matvecs + new.matvecs + 2,
        *(pick(a, b) for a, b in zip(new[2:-1], old[2:-1], strict=True)),
    )._replace(method=space.where(mask, method, 0))  # fmt: skip
    return space.select(mask, y, x), space.where(mask, ended, status), counts


def _first(space: Any, r: Array, beta: Array, active: Array, m: int) -> _State:
    xp, zero, one = space.xp, space.scalar(0.0), space.scalar(1.0)
    usable = active & (beta > 0)
    inverse = space.where(usable, one / space.where(usable, beta, one), zero)
    basis = space.put(space.basis(m + 1), 0, space.scale(inverse, space.copy(r)))
    upper = xp.zeros((*space.items, m, m), dtype=space.dtype, device=space.device)
    rotation = xp.zeros((*space.items, m + 1, m + 1), dtype=space.dtype, device=space.device)
    rotation = space.put_row(rotation, 0, _one_hot(space, 0, m + 1))
    return _State(
        basis, upper, rotation, one, active, space.counter(), space.counter(), 0, zero, space.scalar(math.inf)
    )


def _goes_on(s: _State, space: Any, room: int) -> Any:
    return space.any(s.active & (s.j + 1 < room))


def _step(s: _State, space: Any, apply: Any, m: int, target: Array, budget: Array, room: int) -> _State:
    xp, zero, one = space.xp, space.scalar(0.0), space.scalar(1.0)
    w = space.copy(apply(space.take(s.basis, s.j)))
    h = space.project(s.basis, s.j, w, room)
    w = space.subtract(w, space.combine(s.basis, s.j, h, room))
    again = space.project(s.basis, s.j, w, room)  # once more: classical Gram-Schmidt twice is as good as modified
    w = space.subtract(w, space.combine(s.basis, s.j, again, room))
    h = h + again
    size = space.norm(w)
    norm = xp.sqrt(xp.sum(h * h, axis=-1) + size * size)
    finite = space.isfinite(norm)
    broke = size <= space.eps * norm  # the space is invariant: the solution lies in it
    size = space.where(broke, zero, size)
    go = s.active & finite
    column, rotation, diagonal = _rotate(space, s, h, size, m, go)
    upper = _set_column(space, s, column, diagonal, go, m)
    phi = space.where(go, xp.abs(rotation[..., 0] @ _one_hot(space, s.j + 1, m + 1)), s.phi)
    status = space.where(s.active & ~finite, int(Status.NON_FINITE), s.status)
    singular = go & (diagonal <= space.eps * space.maximum(s.operator_norm, norm))
    status = space.where(singular, int(Status.SINGULAR), status)
    iterations = space.where(s.active, s.iterations + 1, s.iterations)
    active = go & ~broke & (phi > target) & (s.j + 1 < m) & (iterations < budget)
    # an item that has stopped does nothing any more: v = 0
    inverse = space.where(active, one / space.where(active, size, one), zero)
    basis = space.put(s.basis, s.j + 1, space.scale(inverse, w))
    return _State(
        basis, upper, rotation, phi, active, status, iterations, s.j + 1,
        space.maximum(s.operator_norm, space.where(s.active, norm, zero)),
        space.where(go & (norm < s.least), norm, s.least),
    )  # fmt: skip


def _rotate(space: Any, s: _State, h: Array, size: Array, m: int, go: Array) -> tuple[Array, Array, Array]:
    """Apply the rotations so far to the new column, and one more that annihilates its last entry."""
    xp = space.xp
    e0, e1 = _one_hot(space, s.j, m + 1), _one_hot(space, s.j + 1, m + 1)
    column = (s.rotation @ h[..., None])[..., 0] + e1 * size[..., None]
    a, b = column @ e0, column @ e1
    d = xp.sqrt(a * a + b * b)
    safe = divisor(xp, d)
    c, sn = xp.where(d > 0, a / safe, xp.ones_like(d))[..., None], (b / safe)[..., None]
    row = space.copy_row(s.rotation, s.j)
    mask = xp.asarray(go)[..., None]
    rotation = space.put_row(s.rotation, s.j, xp.where(mask, c * row + sn * e1, row))
    rotation = space.put_row(rotation, s.j + 1, xp.where(mask, c * e1 - sn * row, 0 * row))
    return column + e0 * (d - a)[..., None], rotation, d


def _set_column(space: Any, s: _State, column: Array, diagonal: Array, go: Array, m: int) -> Array:
    """Store the rotated column as row j of Rᵀ, for the items for which it is good."""
    xp = space.xp
    rows = xp.arange(m, device=space.device)
    column = xp.where(rows <= s.j, column[..., :m], xp.zeros_like(column[..., :m]))
    usable = xp.asarray(go & (diagonal > 0))[..., None]
    return space.put_row(s.upper, s.j, xp.where(usable, column, xp.zeros_like(column)))


def _one_hot(space: Any, j: Any, m: int) -> Array:
    xp = space.xp
    return xp.astype(xp.arange(m, device=space.device) == j, space.dtype)


def _triangular_solve(space: Any, end: _State, beta: Array, k: int) -> tuple[Array, Array]:
    """Solve R y = β Q e₀ for the columns that each item has of the first k, 0 beyond; and estimate ‖R⁻¹‖."""
    xp = space.xp
    columns = space.where(end.status == 0, end.iterations, end.iterations - 1)  # the last one may be bad
    known = xp.arange(k, device=space.device) < xp.asarray(columns)[..., None]
    g = xp.asarray(beta)[..., None] * end.rotation[..., :k, 0]
    g = xp.where(known, g, xp.zeros_like(g))
    eye = xp.eye(k, dtype=space.dtype, device=space.device)
    upper = xp.matrix_transpose(xp.where(known[..., None], end.upper[..., :k, :k], eye))
    y, gain = space.solve_triangular(upper, g), space.scalar(0.0)
    for number in range(PROBES):
        z = xp.where(known, probe_vector(xp, k, space.dtype, space.device, number * k), xp.zeros_like(g))
        size = xp.sqrt(xp.sum(z * z, axis=-1))
        image = item_norm(xp, space.solve_triangular(upper, z))
        gain = space.maximum(gain, space.where(size > 0, image / divisor(xp, size), gain))
    return y, gain
