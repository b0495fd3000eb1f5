"""Which constraints are active at a point, with which multipliers, and whether that is regular.

All of it is arithmetic on arrays without a branch on a value, so that it runs over a batch and inside a compiled
program. Constraint i is c_i(y, θ), its gradient J_i. What is near, small or strong is so in the units of `units`: a
distance is |c_i| / R_i, a force μ_i R_i / Φ_i.

References
----------
J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd ed., Springer, 2006, chapter 12 (LICQ, strict complementarity)
and equation (18.22) (least-squares multipliers). DOI 10.1007/978-0-387-40065-5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.arrays import Array, divisor, item_norm, item_numbers, needed, times
from implicitdiff.conditions.sparse_multipliers import least_squares, multipliers, unit_rows
from implicitdiff.conditions.units import Units
from implicitdiff.linalg.rows import SparseRows, rows_times, turned_times
from implicitdiff.tolerances import ACTIVE, DEPENDENT, VIOLATED

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["ActiveSet", "Limits", "candidates", "classified", "dependent_rows", "names", "recovered", "with_piece"]


class Limits(NamedTuple):
    """Distances and multipliers that count as zero, and distances that count as a violation, in their units."""

    active: float
    violated: float

    @classmethod
    def of(cls, xp: Any, dtype: Any, active: float | None) -> Limits:
        """Return the limits for a dtype, with the user's own for active constraints."""
        default = cls(ACTIVE.at(xp, dtype), VIOLATED.at(xp, dtype))
        return default if active is None else cls(active, max(100 * active, default.violated))


class ActiveSet(NamedTuple):
    """What was found of the constraints, arrays of shape (*items, k): the p equalities first, then the inequalities."""

    equality: Array
    """Whether it is an equality."""
    values: Array
    multipliers: Array
    active: Array
    """Whether it is part of the system: an equality, or an inequality that is held with a multiplier."""
    weak: Array
    """Whether it is active with a multiplier of zero."""
    wrong: Array
    """Whether it is active with a multiplier of the wrong sign, or has one and is not active."""
    violated: Array
    dependent: Array
    """Whether its gradient is a combination of those of others that are active."""
    unbalanced: Array
    """Whether the multipliers that were given leave ∇f + Jᵀz, in the units of f."""
    degenerate: Array
    """Whether it is dependent, or weak, and one element of the generalised derivative was selected."""


def candidates(backend: Backend, equality: Array, first: Any, units: Units, limits: Limits) -> Array:
    """Equalities, and inequalities that hold with equality up to a tolerance, or are pressed against nearby.

    A solver that stops early leaves a distance; that a constraint is active all the same is seen from its multiplier,
    by least squares over all that are near, each damped by its distance.
    """
    xp, gap = backend.xp, -first.values
    tight = equality | (gap <= limits.active * units.distance)
    near = ~tight & (gap <= limits.violated * units.distance)

    def by_multiplier(tight: Array) -> Array:
        safe = _safe(xp, units.distance)
        slack = xp.where(near, gap / safe, xp.zeros_like(gap))
        if isinstance(first.rows, SparseRows):
            held, right = tight | near, -first.gradient * units.reach
            unit = unit_rows(first.rows, units.reach, safe, held)
            z = least_squares(unit, held, slack * slack)(rows_times(unit, right))[0]
            return tight | (near & (z / safe * units.give * units.give > gap))
        unit, gram = _gram(backend, first.rows * units.reach[..., None, :], safe, tight | near)
        gram = gram + (slack * slack)[..., None] * xp.eye(gap.shape[-1], dtype=gap.dtype, device=backend.device(gap))
        z = backend.cho_solve(backend.cho_factor(gram), -times(unit, first.gradient * units.reach)[..., None])[..., 0]
        return tight | (near & (z / safe * units.give * units.give > gap))

    return backend.if_any(near, by_multiplier, tight)


def _safe(xp: Any, x: Array) -> Array:
    return divisor(xp, x)


def recovered(backend: Backend, first: Any, units: Units, candidate: Array) -> tuple[Array, Array]:
    """Least-squares multipliers of ∇f = −Jᵀ z over the candidates, and which of those are linearly dependent.

    Coordinates are in their units, rows of J are scaled to norm one. With G = JJᵀ, and the identity in place of the
    other constraints, G z = −J∇f; one step of refinement on the residual of the least-squares problem itself makes up
    for the squared condition number.
    """
    xp, gradient, safe = backend.xp, first.gradient * units.reach, _safe(backend.xp, units.distance)
    if isinstance(first.rows, SparseRows):
        unit = unit_rows(first.rows, units.reach, safe, candidate)
        z, dependent = multipliers(unit, candidate, gradient)
        return backend.astype(z / safe, first.rows.dtype), dependent
    rows = first.rows * units.reach[..., None, :]
    unit, gram = _gram(backend, rows, safe, candidate)
    dependent, factor = _dependent(backend, gram, candidate)

    def solve(b: Array) -> Array:
        z = backend.cho_solve(factor, b[..., None])[..., 0]
        bad = ~xp.all(xp.isfinite(z), axis=-1)
        if backend.traced or not needed(backend, bad):
            return z
        return xp.where(bad[..., None], times(xp.linalg.pinv(gram), b), z)

    z = solve(-times(unit, gradient))
    left = gradient + times(xp.matrix_transpose(unit), z)
    return backend.astype((z + solve(-times(unit, left))) / safe, rows.dtype), dependent


def _gram(backend: Backend, rows: Array, norms: Array, held: Array) -> tuple[Array, Array]:
    """Return the held rows at norm one, zeros for the others, and JJᵀ of them with ones in the others' places."""
    xp, held = backend.xp, backend.astype(held, rows.dtype)
    unit = rows * (held / norms)[..., None]
    eye = xp.eye(rows.shape[-2], dtype=rows.dtype, device=backend.device(rows))
    return unit, unit @ xp.matrix_transpose(unit) + (1 - held)[..., None] * eye


def _singular_below(xp: Any, gram: Array) -> float:
    """Eigenvalue, or pivot, of a Gram matrix up to which its rows are dependent."""
    return 1e4 * float(xp.finfo(gram.dtype).eps) * gram.shape[-1]


def _dependent(backend: Backend, gram: Array, candidate: Array) -> tuple[Array, Any]:
    """Mark the candidates that take part in a linear dependence: all of an item's, where its Gram matrix is singular.

    Which of them, is found out where values are seen, from the null vectors.
    """
    xp = backend.xp
    factor = backend.cho_factor(gram)
    pivots = xp.linalg.diagonal(factor)
    singular = ~(xp.min(pivots * pivots, axis=-1) > _singular_below(xp, gram))  # NaN: not positive definite
    if not backend.traced and needed(backend, singular):
        return candidate & singular[..., None] & _in_null_space(xp, gram), factor
    return candidate & singular[..., None], factor


def _in_null_space(xp: Any, gram: Array) -> Array:
    """Mark the rows that the null vectors of a Gram matrix are made of."""
    values, vectors = xp.linalg.eigh(gram)
    null = xp.where((values < _singular_below(xp, gram))[..., None, :], xp.abs(vectors), xp.zeros_like(vectors))
    return xp.max(null, axis=-1) > DEPENDENT


def dependent_rows(backend: Backend, rows: Array, active: Array) -> Array | None:
    """Mark the active rows of J that are linearly dependent, or None. For eager use, after a failure."""
    xp = backend.xp
    rows = rows.dense() if isinstance(rows, SparseRows) else rows
    gram = _gram(backend, rows, _safe(xp, item_norm(xp, rows)), active)[1]
    found = active & _in_null_space(xp, gram)
    return found if bool(xp.any(found)) else None


def classified(
    xp: Any, equality: Array, values: Array, units: Units, limits: Limits, candidate: Array, dependent: Array,
    multipliers: Array,
) -> ActiveSet:  # fmt: skip
    """Tell active constraints from weakly active, wrong and violated ones."""
    pull = multipliers * units.distance
    held = candidate & ~equality
    small = xp.abs(pull) <= limits.active * units.force
    # an interior-point method leaves some of the multipliers of what is not active
    left = ~candidate & (xp.abs(pull) > limits.violated * units.force)
    wrong = ~equality & (left | (candidate & ~small & (pull < 0)))
    size = xp.where(equality, xp.abs(values), values)
    violated = size > limits.violated * units.distance
    return ActiveSet(
        equality, values, xp.where(candidate, multipliers, xp.zeros_like(multipliers)), candidate & ~(held & small),
        held & small, wrong, violated, dependent, xp.zeros_like(candidate), xp.zeros_like(candidate),
    )  # fmt: skip


def with_piece(xp: Any, found: ActiveSet, held: Array, degenerate: Array) -> ActiveSet:
    """Hold a piece that was selected as a whole, in the items that are degenerate."""
    here = xp.any(degenerate, axis=-1, keepdims=True)
    return found._replace(
        active=xp.where(here, held, found.active), weak=found.weak & ~here, wrong=found.wrong & ~here,
        degenerate=degenerate,
    )  # fmt: skip


def unbalanced(xp: Any, first: Any, units: Units, limits: Limits, z: Array) -> Array:
    """Tell whether ∇f + Jᵀz is far from zero, for all constraints of an item alike."""
    pull = turned_times(xp, first.rows, z)
    size = units.reach * xp.maximum(xp.abs(first.gradient), xp.abs(pull))
    scale = xp.max(xp.maximum(size, (units.reach / units.bend) ** 2), axis=-1, keepdims=True)
    left = xp.max(xp.abs(first.gradient + pull) * units.reach, axis=-1, keepdims=True)
    return (left > limits.violated * scale) & xp.ones_like(z, dtype=xp.bool)


def names(xp: Any, mask: Array, equality: Array) -> list[str]:
    """Names of the constraints of a mask (*items, k), eq[i] or ineq[i], each that it holds for in any item."""
    if len(mask.shape) > 1:
        mask, equality = xp.any(mask, axis=0), equality[0, ...]
    p = int(xp.sum(xp.astype(equality, xp.int32)))
    return [f"eq[{i}]" if i < p else f"ineq[{i - p}]" for i in item_numbers(xp, mask)]
