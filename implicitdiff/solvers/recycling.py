"""What a sequence of nearby systems shares: starts from the last solutions, and pairs (p, A p) as a preconditioner.

CG (and MINRES, by one more recurrence) makes products A p along conjugate directions, and throws them away. Kept, with
s = p/√(pᵀAp) and y = A s, k of them make the limited-memory BFGS matrix M ≈ A⁻¹ of the next system. With S, Y their
rows, oldest first, R the upper triangle of S Yᵀ (its diagonal is one), and M₀ the preconditioner that there is, or
γ D⁻¹,

    a = R⁻¹ S r,   z = M₀ (r − Yᵀ a),   M r = z + Sᵀ R⁻ᵀ (a − Y z),

the two-loop recursion written with matrices. M is positive definite whatever the pairs are pairs of, and on an A that
has not changed M A is the identity on their span. On the first direction p = M r of the next system pᵀM⁻¹p = rᵀM r is
known, so that pᵀA p / rᵀM r shows, without a product, how far A has moved from the pairs: in sequences it stayed
between 0.03 and 6, and where A was another it was mostly above 10. Then the pairs are dropped, and the solve goes on
without them from where it is; so does one that takes more than twice the iterations of the latest without pairs.

Every pair that there ever was has also moved the diagonal D, by the diagonal of the BFGS formula for A,

    D ← D + y² − (D s)² / sᵀD s,

so that the scales of the unknowns stay known when the pairs themselves have made room for later ones.

A row of zeros stands for a pair that is not there.

References
----------
J. L. Morales, J. Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", SIAM J. Optim. 10
(2000) 1079-1096. DOI 10.1137/S1052623497327854
R. H. Byrd, J. Nocedal, R. B. Schnabel, "Representations of quasi-Newton matrices and their use in limited memory
methods", Math. Program. 63 (1994) 129-156. DOI 10.1007/BF01582063
J. C. Gilbert, C. Lemaréchal, "Some numerical experiments with variable-storage quasi-Newton algorithms", Math. Program.
45 (1989) 407-435. DOI 10.1007/BF01589113
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, any_true, divisor, times
from implicitdiff.linalg.equilibration import Scaling
from implicitdiff.linalg.preconditioner import Preconditioner
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.refinement import refinable, refined
from implicitdiff.solvers.sequences import SequenceState, fitted, pairs_of, predicted
from implicitdiff.tolerances import ROUNDED

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend
    from implicitdiff.linalg.operator import Operator
    from implicitdiff.solvers.cycles import KrylovState

__all__ = ["Memory", "carried_on", "limited_memory", "remember_scale"]

PATIENCE, GRACE = 2.0, 5
"""Times the iterations of a solve without pairs, and some more, after which pairs are given up."""
FITTING = 0.01, 10.0
"""pᵀA p over what the pairs make of it, on the first direction, within which they are those of a nearby A."""
ANY = float("-inf"), float("inf")


class Memory(NamedTuple):
    """Pairs in a ring, which a method writes to as it goes; the vectors are those of the equilibrated system."""

    directions: Array
    images: Array
    diagonal: Array
    """D."""
    young: Any
    """Whether that is I, whose unit the first pair tells."""
    written: Any
    ratio: Any
    """pᵀAp over what the preconditioner makes of it, on the first direction; 0 before."""
    first: Any
    """The residual that the solve started with."""
    least: Any
    most: Any
    """Where the ratio has to be."""
    pivot: Any
    """√(pᵀAp) of the pair before, for a method that makes no conjugate directions itself; 0 before the first, and -1
    where there are none (negative curvature): then nothing is kept."""
    norm: Any
    """The largest ‖A p‖ / ‖p‖ of the new pairs."""

    def noted(self, space: Any, p: Array, ap: Array, curvature: Array, model: Array, go: Array) -> Memory:
        """Store a pair in place of the oldest one, in items that go on."""
        one, j = space.scalar(1.0), self.written % self.directions.shape[-2]
        root = 1 / space.sqrt(space.where(go, curvature, one))
        rows = []
        for basis, x in (self.directions, p), (self.images, ap):
            row = space.select(go, space.scale(root, space.copy(x)), space.take(basis, j))
            rows.append(space.put(basis, j, row))
        seen = space.where(go, curvature / space.where(go, model, one), space.scalar(0.0))
        ratio, size = space.where(self.ratio == 0, seen, self.ratio), space.norm(p)
        norm = space.maximum(self.norm, space.norm(ap) / space.where(size > 0, size, one))
        return self._replace(
            directions=rows[0], images=rows[1], diagonal=self._diagonal(space, p, ap, curvature, go),
            written=self.written + 1, ratio=ratio, norm=norm,
        )  # fmt: skip

    def _diagonal(self, space: Any, p: Array, ap: Array, curvature: Array, go: Array) -> Array:
        """D with a pair more: the diagonal of the BFGS update of a diagonal matrix, where it goes on."""
        one = space.scalar(1.0)
        inverse = one / space.where(go, curvature, one)
        unit = space.where(self.ratio == 0, space.where(self.young, inverse * space.inner(ap, ap), one), one)
        D = space.scale(unit, space.copy(self.diagonal))
        Dp = D * p
        model = space.inner(p, Dp)
        wider = space.scale(one + ROUNDED * space.eps, D)  # so that rounding does not make it negative
        found = space.axpy(-one / space.where(model > 0, model, one), Dp * Dp, space.axpy(inverse, ap * ap, wider))
        return space.select(go, found, self.diagonal)

    @property
    def strange(self) -> Array:
        """Whether the pairs that the method is preconditioned by are those of another A."""
        return (self.ratio > self.most) | ((self.ratio < self.least) & (self.ratio != 0))

    def begun(self, space: Any) -> Memory:
        """Return it for a Lanczos process that begins."""
        return self._replace(pivot=space.where(self.pivot < 0, self.pivot, space.scalar(0.0)))

    def conjugated(self, space: Any, v: Array, av: Array, beta: Array, go: Array) -> Memory:
        """Store the pair of the next conjugate direction, v − (β/δ) p with δ = pᵀAp of the one before."""
        one, zero = space.scalar(1.0), space.scalar(0.0)
        last, known = (self.written - 1) % self.directions.shape[-2], go & (self.pivot > 0)
        coupling = space.where(known, beta / space.where(known, self.pivot, one), zero)
        p, ap = (
            space.axpy(-coupling, space.copy(space.take(basis, last)), space.copy(x))
            for basis, x in ((self.directions, v), (self.images, av))
        )
        delta = space.inner(v, av) - coupling * coupling
        good = go & (self.pivot >= 0) & (delta > 0)
        root = space.where(good, space.sqrt(delta), space.where(go, -one, self.pivot))
        return self.noted(space, p, ap, delta, one, good)._replace(pivot=root)

    def forgotten(self, space: Any, mask: Array) -> Memory:
        """Let nothing be kept in some items: the pairs are those of A in another unit."""
        return self._replace(pivot=space.where(mask, -space.scalar(1.0), self.pivot))


def limited_memory(
    backend: Backend, directions: Array, images: Array, diagonal: Array, base: Preconditioner
) -> Preconditioner:
    """Return M of pairs (*items, k, n) with sᵀy = 1, the oldest first, over a preconditioner or a multiple of D⁻¹."""
    xp, S, Y = backend.xp, directions, images
    ST, YT = map(xp.matrix_transpose, (S, Y))
    unit = xp.eye(S.shape[-2], dtype=S.dtype, device=backend.device(S))
    inverse = backend.triangular_inverse(xp.triu(S @ YT, k=1) + unit)
    adjoint = xp.matrix_transpose(inverse)
    present = xp.astype(_present(xp, S, Y), S.dtype)
    weight = xp.where(diagonal > 0, 1 / divisor(xp, diagonal), xp.ones_like(diagonal))
    square = xp.sum(xp.sum(Y * Y, axis=-2) * weight, axis=-1)
    count = xp.sum(present, axis=-1)
    gamma = xp.where(square > 0, count / divisor(xp, square), xp.ones_like(square))[..., None] * weight

    def product(r: Array) -> Array:
        a = times(inverse, times(S, r))
        q = r - times(YT, a)
        z = gamma * q if base.identity else base(q)
        return z + times(ST, times(adjoint, a - times(Y, z)))

    return Preconditioner(product, product)


def _present(xp: Any, S: Array, Y: Array) -> Array:
    """Whether a row is a pair, (*items, k)."""
    return xp.vecdot(S, Y, axis=-1) > 0


class _Found(NamedTuple):
    """How a solve with a memory ended, in arrays over the items."""

    x: Array
    status: Array
    iterations: Array
    matvecs: Array
    residual: Array
    norm: Array
    tolerance: Array
    condition: Array
    directions: Array
    images: Array
    diagonal: Array
    ratio: Array
    pace: Array


class _Resumed:
    """One system of a sequence.

    Parameters
    ----------
    solver : Krylov
        With ``recycle``.
    state : KrylovState
    b : array, shape (*items, n)
    past : SequenceState
    extrapolated : bool
        Whether to start from the last solutions.
    """

    def __init__(self, solver: Any, state: KrylovState, b: Array, past: SequenceState, extrapolated: bool) -> None:
        self.solver, self.state, self.past = solver, state, past
        self.op, self.backend = state.operator, state.operator.backend
        self.xp, self.scaling = self.backend.xp, state.scaling
        self.right = b if self.scaling is None else self.scaling.scaled(b)
        self.space = self.backend.space(self.right)
        self.S, self.Y, self.D = past.directions, past.images, past.diagonal
        self.start = predicted(self.backend, past) if extrapolated else None
        if self.scaling is not None:
            rows, columns = (part[..., None, :] for part in self.scaling)
            self.S, self.Y = self.S / columns, self.Y * rows
            self._squares = self.scaling.rows * self.scaling.columns
            self.D = self.D * self._squares
            self.start = None if self.start is None else self.scaling.start(self.start)

    def _number(self, value: Any, kind: Any = None) -> Array:
        """Scalars of a space may be the host's own numbers."""
        xp, like = self.xp, self.right
        found = xp.asarray(value, dtype=kind or like.dtype, device=self.op.device)
        return xp.broadcast_to(found, like.shape[:-1])

    def _run(
        self, state: KrylovState, target: Array, start: Array | None, pairs: tuple[Array, Array, Array],
        most: Any = None, fitting: tuple[float, float] = ANY,
    ) -> _Found:  # fmt: skip
        xp, number, integer = self.xp, self._number, self.xp.int32
        zero, one = self.space.scalar(0.0), self.space.scalar(1.0)
        S, Y, D = pairs
        S, Y = (xp.asarray(part, copy=True) for part in (S, Y))
        unknown = xp.all(D == 0, axis=-1)
        young, D = self.space.largest(D) == 0, xp.where(unknown[..., None], xp.ones_like(D), D)
        memory = Memory(S, Y, D, young, 0, zero, one, *fitting, zero, zero)
        x, status, counts, memory = self.solver._solve(state, target, start, memory, most)
        iterations, residual = number(counts.iterations, integer), number(counts.residual)
        gained = xp.log10(number(memory.first) / divisor(xp, residual))
        pace = xp.astype(iterations, residual.dtype) / xp.where(gained > 1, gained, xp.ones_like(gained))
        S, Y = (xp.roll(part, -(memory.written % S.shape[-2]), axis=-2) for part in memory[:2])
        none = number(memory.pivot) < 0
        S, Y = (xp.where(none[..., None, None], xp.zeros_like(part), part) for part in (S, Y))
        none = none | (unknown & (number(memory.ratio) == 0))
        D = xp.where(none[..., None], xp.zeros_like(D), memory.diagonal)
        condition = number(0.0 if counts.condition is None else counts.condition)
        return _Found(
            x, number(status, integer), iterations, number(counts.matvecs, integer), residual,
            number(counts.operator_norm), number(counts.tolerance), condition, S, Y, D, number(memory.ratio), pace,
        )  # fmt: skip

    def solved(self) -> tuple[Array, Any, Counts, SequenceState]:
        """Solve with the pairs, and without them where there are none, or they do not serve."""
        xp, past = self.xp, self.past
        present = _present(xp, self.S, self.Y)
        known = xp.any(present, axis=-1)
        nobody = ~known
        if self.backend.traced or any_true(xp, known):
            found = self._assisted(known)
            failed = known & (found.status > int(Status.APPROXIMATE))
            found = self.backend.if_any(failed | nobody, lambda old: self._plain(failed | nobody, old), found)
        else:
            failed = known
            found = self._plain(nobody, None)
        zero = xp.zeros_like(found.ratio)
        count = xp.sum(xp.astype(present, xp.int32), axis=-1, dtype=xp.int32)
        one = xp.ones_like(past.scale)
        after = past._replace(
            scale=one if self.scaling is None else one * self.scaling.columns,
            directions=self._unscaled(found.directions, 1), images=self._unscaled(found.images, 0),
            diagonal=found.diagonal if self.scaling is None else found.diagonal / self._squares, pace=found.pace,
            condition=found.condition, dropped=failed,
            used=xp.where(known & ~failed, count, xp.zeros_like(count)),
            drift=xp.where(known & (found.ratio != 0), xp.abs(found.ratio - 1), zero),
        )  # fmt: skip
        counts = Counts(
            found.iterations, found.matvecs, found.residual, found.norm, None, found.tolerance,
            found.condition,
        )  # fmt: skip
        ended = found.x, found.status, counts
        if refinable(self.state):
            ended = refined(self.op, lambda r: self.solver._solve(self.state, r, None), self.right, ended)
        x = ended[0] if self.scaling is None else self.scaling.restored(ended[0])
        return x, *ended[1:], after

    def _unscaled(self, rows: Array, which: int) -> Array:
        if self.scaling is None:
            return rows
        scale = self.scaling[which][..., None, :]
        return rows * scale if which else rows / scale

    def _masked(self, mask: Array) -> Array:
        """The right-hand side, zero in items that are not to be solved."""
        return self.space.select(mask, self.right, 0 * self.right)

    def _assisted(self, known: Array) -> _Found:
        """Solve with the pairs, where there are some."""
        state, xp, past = self.state, self.xp, self.past
        helper = limited_memory(self.backend, self.S, self.Y, self.D, state.preconditioner)
        decimals = -xp.log10(self._number(self.solver.tolerance(self.op, self.space)))
        most = xp.astype(GRACE + PATIENCE * decimals * past.pace, xp.int32)
        budget = most if self.right.shape[:-1] or self.backend.traced else int(most)
        found = self._run(
            state._replace(preconditioner=helper), self._masked(known), self.start, (self.S, self.Y, self.D), budget,
            FITTING,
        )  # fmt: skip
        return found._replace(pace=past.pace, condition=past.condition)

    def _plain(self, wanted: Array, old: _Found | None) -> _Found:
        """Solve without, in the items that are wanted; the others stay as they are."""
        xp, start = self.xp, self.start
        if old is not None:
            usable = self.space.finite(old.x) & (old.status > int(Status.APPROXIMATE))
            start = self.space.select(usable, old.x, 0 * old.x if start is None else start)
        begin = start if self.backend.traced or old is not None or any_true(xp, self.past.count > 0) else None
        gone = wanted[..., None, None]
        S, Y = (xp.where(gone, xp.zeros_like(part), part) for part in (self.S, self.Y))
        D = xp.where(wanted[..., None], xp.zeros_like(self.D), self.D)
        new = self._run(self.state, self._masked(wanted), begin, (S, Y, D))
        if old is None:
            return new
        kept = [self._merged(wanted, a, b) for a, b in zip(new, old, strict=True)]
        return _Found._make(kept)._replace(
            iterations=old.iterations + xp.where(wanted, new.iterations, xp.zeros_like(new.iterations)),
            matvecs=old.matvecs + new.matvecs, ratio=old.ratio,
        )  # fmt: skip

    def _merged(self, mask: Array, new: Array, old: Array) -> Array:
        for _ in range(len(new.shape) - len(mask.shape)):
            mask = mask[..., None]
        return self.xp.where(mask, new, old)


def remember_scale(op: Operator, past: SequenceState) -> None:
    """Let an operator, known by products alone, have the scale of the systems before: to find one takes some."""
    xp, known = op.backend.xp, past.scale
    if op.backend.traced or known is None or tuple(known.shape) != (*op.items, op.n):
        return
    if op.matrix is not None or op.sparse is not None or any_true(xp, known == 0):
        return
    op._cache["scalingTrue"] = Scaling(known, known) if any_true(xp, known != 1) else None


def carried_on(
    solver: Any, state: Any, b: Array, sequence: SequenceState, backend: Backend, *, extrapolated: bool = True
) -> Any:
    """Solve the next system of a sequence; where it is not ``extrapolated``, from zero.

    Returns
    -------
    tuple
        x, status and counts as of ``solver.solve``, and the state but for the solution.
    """
    past = fitted(sequence, backend, b, pairs_of(solver))
    if pairs_of(solver):
        return _Resumed(solver, state, b, past, extrapolated).solved()
    known = backend.traced or any_true(backend.xp, past.count > 0)
    start = predicted(backend, past) if known else None
    return (*solver.solve(state, b, start), past)
