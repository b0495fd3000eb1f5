"""The covariance of a least-squares estimate, from the residuals' Jacobian and never from its square."""

from __future__ import annotations

from typing import Any

from implicitdiff.arrays import Array, any_true, divisor, item_norm, named_items
from implicitdiff.conditions.least_squares import LeastSquares
from implicitdiff.conditions.residuals import Residuals
from implicitdiff.errors import InputError, SingularError
from implicitdiff.outcome import settle
from implicitdiff.problem import Problem
from implicitdiff.rules import Rules

__all__ = ["covariance_of", "standard_errors_of"]


def covariance_of(problem: Problem, scale: bool) -> Array:
    """s²(JᵀJ)⁻¹, or without the s²."""
    with problem.backend.computing():
        value, error = _covariance(Rules(problem, flat=True, later=True), scale)
    if error is not None:
        error.value = value
        settle(error, problem.settings.on_failure)
    return value


def standard_errors_of(problem: Problem, scale: bool) -> Any:
    """Square roots of the diagonal of that, like y."""
    value, backend = covariance_of(problem, scale), problem.backend
    with backend.computing():
        point = Rules(problem, flat=True, later=True).point
        return point.y.unravel(backend.xp.sqrt(backend.xp.linalg.diagonal(value)))


def _covariance(rules: Rules, scale: bool) -> tuple[Array, SingularError | None]:
    """s²(JᵀJ)⁻¹, or without the s², and the error where J has not full rank; NaN in those items.

    J is scaled to columns of length one, so that the units of y do not matter, and J = UΣVᵀ gives VΣ⁻²Vᵀ.

    Raises
    ------
    InputError
        Where the condition has no covariance.
    """
    p, condition = rules.point, rules.condition
    backend = p.backend
    xp = backend.xp
    found = Residuals(_plain(condition), p)
    J, r = backend.to_double(found.jacobian.dense()), backend.to_double(found.value)
    k, n = int(J.shape[-2]), int(J.shape[-1])
    if scale and k <= n:
        raise InputError(
            f"there are {k} residuals and {n} unknowns: s² = ‖r‖² / ({k} - {n}) is not known.\n"
            "Next: scale=False, and the variance of the data by other means."
        )
    if 0 in J.shape:
        return xp.zeros((*p.items, n, n), dtype=p.y.dtype, device=p.y.device), None
    lengths = divisor(xp, xp.moveaxis(item_norm(xp, xp.moveaxis(J, -1, 0)), 0, -1))
    safe = xp.where(xp.isfinite(J), J, xp.zeros_like(J)) / lengths[..., None, :]
    _, s, Vt = xp.linalg.svd(safe, full_matrices=False)
    eps = max(float(xp.finfo(p.y.dtype).eps), found.jacobian.accuracy) * max(k, n)
    known = (s[..., -1] > eps * s[..., 0]) & xp.all(xp.isfinite(J), axis=(-2, -1)) & (k >= n)
    root = xp.matrix_transpose(Vt) / divisor(xp, s)[..., None, :] / lengths[..., :, None]
    value = root @ xp.matrix_transpose(root)
    if scale:
        value = value * (xp.vecdot(r, r) / (k - n))[..., None, None]
    value = xp.where(known[..., None, None], value, xp.full_like(value, float("nan")))
    return backend.astype(value, p.y.dtype), None if backend.traced else _error(xp, known, p.items)


def _plain(condition: Any) -> LeastSquares:
    if not isinstance(condition, LeastSquares):
        raise InputError(
            f"covariance is that of least squares, and the condition is {type(condition).__name__}.\n"
            "Next: LeastSquares(residual), with the same residuals."
        )
    if condition.loss is not None or condition.regularizer is not None:
        raise InputError("covariance is that of ½‖r‖²: of another loss, or with a regularizer, s²(JᵀJ)⁻¹ is none.")
    return condition


def _error(xp: Any, known: Array, items: tuple[int, ...]) -> SingularError | None:
    if not any_true(xp, ~known):
        return None
    where = f"{named_items(xp, ~known)}: " if items else ""
    return SingularError(
        f"{where}the residuals' Jacobian has not full rank: some combination of the unknowns is not determined.\n"
        "Likely cause: two parameters of the model do the same, or there are fewer data than parameters.\n"
        "Next: fix one of them, or reparametrise the model."
    )
