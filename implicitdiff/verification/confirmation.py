"""A second opinion where derivatives by differences are noisy: everything once more at other steps, and compared.

How well a difference is known can be estimated; what its error makes of the result (through A⁻¹, through B, over many
entries) hardly. Two results from steps of different length share the truth and not the noise, so they differ by about
the error of each. The work is done twice only where the function is noisy beyond rounding, or A so ill-conditioned that
the accuracy of its products may not do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from implicitdiff.arrays import Array, any_true, divisor, item_norm, named_items
from implicitdiff.errors import AccuracyWarning, ImplicitDiffError, NoiseError
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.outcome import warn
from implicitdiff.tolerances import ANOTHER_STEP, DOUBTFUL, NOISY_DIFFERENCES, SHORTER, TELLING, UNCERTAIN, USELESS

__all__ = ["Confirmation"]


class Confirmation:
    """Runs modes of the rules again with differences at other steps.

    Parameters
    ----------
    problem : Problem
    build : callable
        Makes `Rules` of a problem.
    """

    def __init__(self, problem: Any, build: Any) -> None:
        self._problem, self._build = problem, build
        self._others: dict[float, Any] = {}

    def check(self, rules: Any, solution: Any, mode: str, direction: Any, x0: Any) -> None:
        """Warn, or raise, where the other result of products by differences is another one.

        Raises
        ------
        NoiseError
        """
        if rules.product is None or is_tree_vector(rules.product.value) or not self._doubtful(rules, solution):
            return
        gap, xp = self._gap(rules, SHORTER, mode, direction, x0), rules.point.backend.xp
        unsure = self._estimated(rules, solution) > UNCERTAIN
        if any_true(xp, unsure & (gap <= TELLING)):  # two may agree by accident: where more was to be expected, a third
            third = self._gap(rules, ANOTHER_STEP, mode, direction, x0)
            gap = xp.where(unsure, xp.maximum(gap, third), gap)
        if any_true(xp, gap > USELESS):
            raise _unknown(rules, f"it differs by {float(xp.max(gap)):.0%}{_where(xp, gap > USELESS)}")
        if any_true(xp, gap > TELLING):
            warn(_message(rules, solution, gap), AccuracyWarning)

    def _gap(self, rules: Any, stretch: float, mode: str, direction: Any, x0: Any) -> Array:
        """How far the result with steps so many times as long is from the one at hand."""
        try:
            if stretch not in self._others:
                settings = replace(self._problem.settings, on_failure="ignore")
                varied = replace(self._problem, backend=self._problem.backend.varied(stretch), settings=settings)
                self._others[stretch] = self._build(varied)
            other = self._others[stretch]
            getattr(other, mode)(direction, x0)
        except ImplicitDiffError as error:
            raise _unknown(rules, "there is none") from error
        xp = rules.point.backend.xp
        gap = _relative(rules, rules.product.value, other.product.value)
        # a solve that stopped just above its tolerance differs by little, and one that failed by much
        return xp.where(xp.isfinite(gap), gap, xp.ones_like(gap))

    def _estimated(self, rules: Any, solution: Any) -> Array:
        """Relative error that the accuracies of A and B are good for, per item; 0 at an unknown condition number."""
        xp, A = rules.point.backend.xp, rules.prepared.operator
        error = solution.uncertainty(xp, A.accuracy + rules.maps.B.accuracy)
        return xp.zeros(rules.point.items, dtype=A.dtype, device=A.device) if error is None else error

    def _doubtful(self, rules: Any, solution: Any) -> bool:
        A = rules.prepared.operator
        if max(A.accuracy, rules.maps.B.accuracy) > NOISY_DIFFERENCES:
            return True
        return any_true(rules.point.backend.xp, self._estimated(rules, solution) > DOUBTFUL)


def _where(xp: Any, mask: Array) -> str:
    return f" in {named_items(xp, mask)}" if len(mask.shape) else ""


def _sizes(xp: Any, x: Array) -> Array:
    """|x|, and where that is 0 the largest of them."""
    size = xp.abs(x)
    largest = xp.max(size, axis=-1, keepdims=True)
    return xp.where(size > 0, size, divisor(xp, largest))


def _relative(rules: Any, one: Array, other: Array) -> Array:
    """‖other − one‖ / ‖one‖ per item, over all right-hand sides.

    Every entry counts in the unit of its coordinate, or all alike, whichever shows more: a coordinate may be of a small
    unit, or small by accident.
    """
    p = rules.point
    xp = p.backend.xp
    own = {"y": 1 / _sizes(xp, p.y.vector), "theta": _sizes(xp, p.theta.vector)}
    alike = {name: xp.ones_like(units) for name, units in own.items()}
    return xp.maximum(*(_in_units(rules, units, one, other) for units in (own, alike)))


def _in_units(rules: Any, units: dict[str, Array], one: Array, other: Array) -> Array:
    p = rules.point
    xp = p.backend.xp
    inner, across = ("theta", "y") if rules.product.transposed else ("y", "theta")
    one, other = one * units[inner], other * units[inner]
    if len(one.shape) > len(p.items) + 1:
        lead = xp.moveaxis(units[across], -1, 0)[..., None]
        if lead.shape[0] == one.shape[0]:  # a Jacobian: each of them belongs to a coordinate
            one, other = one * lead, other * lead
        one, other = (xp.reshape(xp.moveaxis(x, 0, -2), (*p.items, -1)) for x in (one, other))
    size, gap = item_norm(xp, one), item_norm(xp, other - one)
    return xp.where(gap == 0, xp.zeros_like(gap), gap / xp.where(size > 0, size, gap))  # NaN stays what it is


def _unknown(rules: Any, how: str) -> NoiseError:
    return NoiseError(
        f"the derivative lies below the noise of the function: at other steps of its differences {how}.\n"
        f"Likely cause: noise of F or f (random numbers, an inner tolerance), A known to {_accuracy(rules)}.\n"
        f"Next: {_NEXT}"
    )


def _message(rules: Any, solution: Any, gap: Array) -> str:
    xp = rules.point.backend.xp
    number = solution.uncertainty(xp, 1.0)
    condition = "" if number is None else f", at a condition number of about {float(xp.max(number)):.1g}"
    return (
        f"the derivative is known to {float(xp.max(gap)):.1%} only{_where(xp, gap > TELLING)}: "
        "at other steps of its differences it is another one by that much.\n"
        f"Likely cause: noise of F or f; A is known to {_accuracy(rules)}{condition}.\n"
        f"Next: {_NEXT}"
    )


_NEXT = "give the derivatives (grad, hvp, jvp, vjp), or write the function so that autodiff takes it."


def _accuracy(rules: Any) -> str:
    return f"{max(rules.prepared.operator.accuracy, rules.maps.B.accuracy):.1g}"
