"""The estimated error of a derivative, as users see it, and the options that ask for one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from implicitdiff.errors import InputError
from implicitdiff.records import Record, html_table

__all__ = ["CAUSES", "NOTHING", "ErrorControl", "ErrorEstimate", "Polish", "approximation"]

CAUSES = ("inner solution", "linear solve", "finite differences", "rounding")
"""What an error is made of, in the order of the parts."""
Polish: TypeAlias = int | Literal["auto"]


def approximation(condition: Any, damping: float) -> str:
    """Name what another matrix than A adds to an error, that a condition or a solver has: "" where it is A."""
    near = "Gauss-Newton" if condition.exact is not condition else ""
    return " and ".join(filter(None, (near, "damping" if damping != 0 else "")))


class ErrorControl(NamedTuple):
    """What is asked for beside a derivative.

    Attributes
    ----------
    error : bool
        Whether to estimate how far off it is.
    max_error : float or None
        Estimated relative error above which it is a failure.
    polish : int or "auto"
        Newton steps from y before it is made.
    """

    error: bool = False
    max_error: float | None = None
    polish: Polish = 0

    @property
    def estimates(self) -> bool:
        """Whether an estimate is needed."""
        return self.error or self.max_error is not None or self.polish == "auto"

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return self.estimates or self.polish != 0

    def check(self) -> ErrorControl:
        """Raise for a value that means nothing; return the options themselves.

        Raises
        ------
        InputError
        """
        error, r, k = self
        if not isinstance(error, bool):
            raise InputError(f"error = {error!r}: expected True or False.")
        if r is not None and not (isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r < float("inf")):
            raise InputError(f"max_error = {r!r}: expected a positive number, a relative error, or None.")
        if k != "auto" and not (isinstance(k, int) and not isinstance(k, bool) and k >= 0):
            raise InputError(f"polish = {k!r}: expected a number of Newton steps, or 'auto'.")
        return self

    def but(self, error: bool | None, max_error: float | None, polish: Polish | None) -> ErrorControl:
        """Return the options with those in place that are not None."""
        given = {"error": error, "max_error": max_error, "polish": polish}
        changes: Any = {name: value for name, value in given.items() if value is not None}
        return self._replace(**changes).check() if changes else self


NOTHING = ErrorControl()


@dataclass(frozen=True, eq=False, repr=False)
class ErrorEstimate(Record):
    """How far off a derivative is, to first order, and why; with ``batched=True`` in arrays over the items.

    Attributes
    ----------
    absolute : float or array
        Estimate of ‖g − g*‖₂ for the raveled derivative g and the one at the exact solution; of a Jacobian the
        Frobenius norm. Infinity where the point next to y, from which it is made, gives no finite number.
    relative : float or array
        The same over ‖g‖₂ (or, where that cancels, over what rounding leaves of its terms).
    parts : dict of str to float or array
        The norms of its parts: ``"inner solution"`` (y is not solved for exactly), ``"linear solve"``,
        ``"finite differences"`` and ``"rounding"``; of ``LeastSquares(hessian="gauss-newton")`` also
        ``"Gauss-Newton"``, what its matrix costs, and of a solver with ``damping`` also ``"damping"`` (of both
        ``"Gauss-Newton and damping"``). They add up as vectors.
    cause : str or tuple of str
        The largest part; one for each item. Under the user's jit an integer array that numbers the parts.
    contraction : float or array
        ‖F(y⁺)‖ / ‖F(y)‖ with y⁺ a (loose) Newton step from y, in the norm of the equilibrated system.
    trusted : bool or array
        Whether y is so near a solution that Newton's method contracts by four or more (or F is all rounding), and so
        does the correction of the linear solve at y⁺, and no constraint and no kink changes sides between y and y⁺. An
        indicator, not a proof.
    doubt : str
        Why it is not trusted; empty where it is.
    correction : pytree or None
        Like the derivative g: ``g − correction`` is the polished one, whose error is squared. None for a Jacobian
        that was looked at along four random directions, because A is not factored.
    value : float, array or None
        L(y, θ) − uᵀF, the outer loss at the exact solution to second order; of `implicit_grad` with a loss.
    products : int or array
        Products with A that the estimate took.

    Notes
    -----
    The estimate takes one Newton step and one correction of the linear solve, both to one digit, or by the factors
    that are there; no third derivatives. For y 30 % to 1e-6 off it was within a factor of three of the true error in
    more than 97 of 100 trusted cases (docs/accuracy.md).
    """

    absolute: Any
    relative: Any
    parts: dict[str, Any]
    cause: Any
    contraction: Any
    trusted: Any
    doubt: str = ""
    correction: Any = field(default=None, compare=False)
    value: Any = None
    products: Any = 0

    def __repr__(self) -> str:
        return f"ErrorEstimate(relative={_number(self.relative)}, cause={self.cause!r}, trusted={self.trusted})"

    def __str__(self) -> str:
        return "\n".join(["Estimated error", *(f"  {name:<20} {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        return html_table((), list(self._rows()), "Estimated error")

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "relative", _number(self.relative)
        yield "absolute", _number(self.absolute)
        for name, value in self.parts.items():
            yield f"  {name}", _number(value)
        yield "cause", str(self.cause)
        yield "contraction", _number(self.contraction)
        yield "trusted", f"{self.trusted}" + (f" ({self.doubt})" if self.doubt else "")
        if self.value is not None:
            yield "corrected value", _number(self.value)
        yield "products", str(self.products)


def _number(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)
