"""What kind of stationary point y is, as far as the solve tells: the signs of curvature, uᵀA u.

A solve looks at curvature on its way: Cholesky and CG fail where it is negative, and the solution u of A u = v gives
uᵀA u = uᵀv. Only where that contradicts what y is said to be, the signs are looked at closely: by Cholesky of A and of
−A, or, without a matrix, by Rayleigh quotients at both ends of the spectrum. An A that is negative definite belongs to
a maximum, and has the derivative that is asked for as much as a minimum has.

References
----------
J. Nocedal, S. Wright, "Numerical Optimization", 2nd ed., Springer, 2006, theorem 2.4 (second-order conditions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, any_true, named_items
from implicitdiff.errors import RegularityWarning
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import warn
from implicitdiff.solvers import suitable
from implicitdiff.tolerances import DENSE

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["refuted", "suspicion", "tell_kind"]


def suspicion(kind: str | None, prepared: Any, solution: Any, b: Any) -> Array | None:
    """Items in which the solve of A x = b saw curvature that contradicts the kind; None where nobody looks."""
    op = prepared.operator
    if kind == "saddle" or not op.symmetric or not op.n or 0 in b.shape:
        return None
    names, _ = zip(*prepared.methods, strict=True)
    tried = names[0] not in suitable("symmetric")
    chosen = getattr(prepared.solver, "name", "") == "auto"
    if kind is None and (not chosen or (tried and len(names) == 1)):
        return None
    fallen = _fell_back(op, solution, names) if tried else None
    if tried and (kind is None or (kind == "minimum" and _proved(prepared, names[0]))):
        return fallen
    if kind is None:  # curvature of both signs: a maximum has it of one
        return _against(op, solution.x, b, 1.0) & _against(op, solution.x, b, -1.0)
    seen = _against(op, solution.x, b, -1.0 if kind == "maximum" else 1.0)
    if kind == "maximum" and tried and fallen is not None:
        return seen | ~fallen
    return seen if fallen is None or kind == "maximum" else seen | fallen


def _proved(prepared: Any, name: str) -> bool:
    """Whether the method, where it succeeds, is a proof that A is positive definite: a factorisation of A itself."""
    return name in suitable("positive definite", direct=True) and not prepared.damping


def refuted(kind: str | None, op: Operator, x: Any, b: Any) -> Array | None:
    """Items in which the solution of A x = b shows that y is not of that kind; None where nothing was said."""
    if kind not in {"minimum", "maximum"} or not op.symmetric or not op.n or 0 in b.shape:
        return None
    return _against(op, x, b, -1.0 if kind == "maximum" else 1.0)


def _fell_back(op: Operator, solution: Any, names: Sequence[str]) -> Array:
    """Items in which a method for positive definite A failed, and one for any symmetric A was used."""
    xp, others = op.backend.xp, suitable("symmetric")
    code = xp.asarray(0 if solution.method is None else solution.method, device=op.device)
    found = xp.zeros(op.items, dtype=xp.bool, device=op.device)
    for i, name in enumerate(names):
        found = found | (code == i) if name in others else found
    return found


def _against(op: Operator, x: Any, b: Any, sign: float) -> Array:
    """Items with xᵀA x = xᵀb of the wrong sign, or an entry of the diagonal, where a matrix is at hand."""
    xp, space = op.backend.xp, op.backend.space(x)
    level = space.eps**0.5
    small = level * space.size(x) * space.size(b)
    found = xp.asarray(sign * space.inner(x, b) < -small, device=op.device)
    found = xp.any(found, axis=0) if len(found.shape) > len(op.items) else found
    matrix = op.matrix if op.matrix is not None else op.at_hand
    if matrix is None:
        return found
    diagonal, rows = xp.linalg.diagonal(matrix), xp.max(xp.abs(matrix), axis=-1)
    return found | xp.any(sign * diagonal < -level * rows, axis=-1)


def tell_kind(kind: str | None, operator: Operator, mask: Array) -> None:
    """Warn where y is not what it is said to be, in the items of the mask."""
    xp = operator.backend.xp
    wrong = mask
    for sign in {"minimum": (-1.0,), "maximum": (1.0,)}.get(str(kind), (1.0, -1.0)):
        if any_true(xp, wrong):
            wrong = wrong & _has_curvature(operator, sign)
    if not any_true(xp, wrong):
        return
    where = f"{named_items(xp, wrong)}: " if operator.items else ""
    what = f"no {kind}" if kind else "neither a minimum nor a maximum"
    signs = {"minimum": "negative", "maximum": "positive"}.get(str(kind), "negative and of positive")
    warn(
        f"{where}y is {what}: the Hessian has directions of {signs} curvature.\n"
        "Likely cause: the solver of y stopped early, or at a saddle point. The derivative is that of the stationary "
        "point,\nand may have nothing to do with that of a minimum nearby.\n"
        "Next: solve further, from a point moved a little; or say kind='saddle' if that is what y is to be.",
        RegularityWarning,
    )


def _has_curvature(operator: Operator, sign: float) -> Array:
    """Whether there is curvature of a sign."""
    backend, xp = operator.backend, operator.backend.xp
    eps = float(xp.finfo(operator.dtype).eps)
    if operator.n <= DENSE and operator.sparse is None:
        matrix = backend.to_double(operator.dense())
        matrix = -sign * (matrix + xp.matrix_transpose(matrix)) / 2
        return ~_is_definite(backend, matrix, max(1e3 * operator.n * eps, 10 * operator.accuracy))
    least, most = _ends(operator)
    return (most if sign > 0 else -least) > eps**0.5 * xp.maximum(xp.abs(least), xp.abs(most))


def _is_definite(backend: Backend, matrix: Array, shift: float) -> Array:
    """Whether a matrix is positive definite, up to rounding: Cholesky with its diagonal scaled to 1."""
    xp = backend.xp
    diagonal = xp.linalg.diagonal(matrix)
    good = diagonal > 0
    scale = 1 / xp.sqrt(xp.where(good, diagonal, xp.ones_like(diagonal)))
    unit = xp.eye(matrix.shape[-1], dtype=matrix.dtype, device=backend.device(matrix))
    scaled = scale[..., :, None] * matrix * scale[..., None, :]
    scaled = xp.where(xp.isfinite(scaled), scaled, unit) + shift * unit
    factor = backend.cho_factor(scaled)
    return xp.all(good, axis=-1) & xp.all(xp.isfinite(factor), axis=(-2, -1))


def _ends(operator: Operator) -> tuple[Array, Array]:
    """Least and largest of the Rayleigh quotients that power iterations towards both ends of the spectrum meet."""
    backend, xp = operator.backend, operator.backend.xp
    like = xp.zeros((*operator.items, operator.n), dtype=operator.dtype, device=operator.device)
    space = backend.space(like)
    x, shift = space.probe() + like, space.scalar(0.0)
    least = most = None
    for turn in range(30):
        x = x / space.size(x)[..., None]
        image = operator.matvec(x)
        quotient = xp.asarray(xp.vecdot(x, image), device=operator.device)
        least = quotient if least is None else xp.where(quotient < least, quotient, least)
        most = quotient if most is None else xp.where(quotient > most, quotient, most)
        if turn == 10:  # the end that dominates is found: now away from it
            shift = 1.05 * quotient
            x = space.probe() + like
            continue
        x = image - shift[..., None] * x
    return least, most
