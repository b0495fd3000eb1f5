"""How accurately each step of a bilevel loop is solved, and what finds its gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, divisor
from implicitdiff.errors import InputError
from implicitdiff.outcome import Status
from implicitdiff.outer.inner import newton_cg
from implicitdiff.outer.state import BilevelState, Found
from implicitdiff.outer.sweeps import Corrected, adjoint_solved, begin, swept
from implicitdiff.records import Record
from implicitdiff.tolerances import CONSISTENT

if TYPE_CHECKING:
    from implicitdiff.outer.equations import Equations, Spot
    from implicitdiff.outer.inner import Inner

__all__ = ["Fixed", "Geometric", "Schedule", "Summable", "Sweep", "as_schedule"]


def _check(name: str, value: Any, low: float = 0.0, high: float = float("inf")) -> None:
    """Raise where a number is not strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise InputError(f"{name} = {value!r}: expected a number between {low:g} and {high:g}.")


class Schedule(Record):
    """A relative tolerance for each outer step, ``at(step)``, to which y and the adjoint are solved.

    Subclasses that find the gradient otherwise have a ``find`` of their own.
    """

    solves = True
    """Whether y is an inner solution, to a tolerance."""
    ends = Status.CONVERGED
    """What a loop is whose gradients all came to their tolerance."""

    def at(self, step: Any) -> Any:
        """Return the relative tolerance of that step (0, 1, …); ``step`` may be a 0-d array of floats."""
        raise NotImplementedError

    def refuse(self, condition: Any, inner: Any, solver: Any) -> None:
        """Raise for arguments of a loop that have no place in this one."""

    def comparable(self) -> Schedule:
        """Return one whose values and gradients fit together as well as a line search needs them to."""
        return self

    def on_samples(self, equations: Equations, step: Any) -> Equations:
        """Return the equations on the samples of a step; there are none, and they are as they are."""
        return equations

    def first(self, spot: Spot) -> tuple[Array, Any, Any, Any]:
        """Return the scale of F at the start, the gradients and products that it took, and the first memory."""
        y, space = spot.rules.embedded(spot.y), spot.equations.backend.space
        sizes = [space(x).size(x) for x in (spot.residual(), spot.product(y))]
        return spot.equations.backend.xp.maximum(*sizes), 1, 1, spot.memory()

    def limit(self, equations: Equations, state: BilevelState, size: Array) -> Any:
        """Return the ‖F‖ that y is solved to at the end, where it is ``size`` yet."""
        return self._rtol(equations, state) * equations.backend.xp.maximum(state.scale, size)

    def find(
        self, equations: Equations, start: tuple[Array, Array], theta: Array, state: BilevelState, inner: Inner
    ) -> Found:
        """Find the gradient at θ, from a start of y and u."""
        rtol = self._rtol(equations, state)
        s = begin(equations, start, theta, (state.doubt, state.memory, state.damping), gradient=False)
        # F may have been zero, or rounding, at the start of the loop
        scale = equations.backend.xp.maximum(state.scale, s.size)
        s = adjoint_solved(equations, inner(equations, s, theta, rtol * scale), theta, rtol)
        return found(equations, s, theta, equations.number(float("nan")), scale)

    def _rtol(self, equations: Equations, state: BilevelState) -> Any:
        step = equations.backend.xp.asarray(state.step, dtype=equations.y.dtype, device=equations.y.device)
        return self.at(step)

    def _shown(self) -> dict[str, Any]:
        """All of its numbers: in a table of runs they are what is compared."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def as_schedule(tolerance: Any) -> Schedule:
    """Return it.

    Raises
    ------
    InputError
        Where it is none.
    """
    if not isinstance(tolerance, Schedule):
        raise InputError(
            f"tolerance = {tolerance!r}: expected Sweep(), Fixed(rtol), Geometric(), Summable(), SOBA(samples) or "
            "SABA(samples)."
        )
    return tolerance


def found(equations: Equations, s: Corrected, theta: Array, error: Array, scale: Array) -> Found:
    """Return y, u and the gradient that were solved for, with the value to second order."""
    value = equations.at(s.y, theta).value() - equations.backend.xp.vecdot(s.u, s.F)
    return Found(
        s.y, s.u, s.gradient, value, error, s.size, s.usable & ~s.going, s.gradients, s.products, s.doubt, scale,
        s.memory, s.damping,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Schedule):
    """Correct y and the adjoint in turn until the estimated error of the gradient is below a target.

    One sweep is a Newton correction A δ = F(y), y ← y − δ, and an adjoint correction Aᵀ w = ∂L/∂y − Aᵀ u, u ← u + w,
    each solved to ``eta``. The change e of the gradient is the certificate of the one before; what it leaves is
    about max(eta, κ) e with κ the contraction of ‖F‖, and never less than sweeps before have left.

    Parameters
    ----------
    eta : float, default 0.1
        Relative residual of the two corrections.
    target : float, default 0.1
        Relative error of the gradient at which no further sweep is made.
    most : int, default 20
        Sweeps in one outer step, at most.
    check : int, default 8
        Every so many steps there are two sweeps at least, so that it is seen what the first one left.

    Raises
    ------
    InputError
        Where a number is not positive, or ``eta`` or ``target`` not below 1.

    Examples
    --------
    >>> from implicitdiff import Sweep
    >>> Sweep(0.1, target=0.01)
    Sweep(eta=0.1, target=0.01, most=20, check=8)
    """

    eta: float = 0.1
    target: float = 0.1
    most: int = 20
    check: int = 8

    def __post_init__(self) -> None:
        _check("eta", self.eta, 0, 1)
        _check("target", self.target, 0, 1)
        for name in ("most", "check"):
            _check(name, getattr(self, name))

    def at(self, step: Any) -> Any:
        return self.eta

    def comparable(self) -> Schedule:
        return replace(self, target=min(self.target, CONSISTENT))

    def first(self, spot: Spot) -> tuple[Array, Any, Any, Any]:
        return spot.equations.number(float("nan")), 0, 0, spot.memory()

    def limit(self, equations: Equations, state: BilevelState, size: Array) -> Any:
        return self.eta * size

    def find(
        self, equations: Equations, start: tuple[Array, Array], theta: Array, state: BilevelState, inner: Inner
    ) -> Found:
        xp = equations.backend.xp
        s = begin(equations, start, theta, (state.doubt, state.memory, state.damping), gradient=True)
        least = xp.where(state.step % self.check == 0, equations.count(2), equations.count(1))
        s = swept(equations, s, theta, self, least, inner=None if inner is newton_cg else inner)
        error = s.error / divisor(xp, equations.backend.space(theta).size(s.gradient))
        return found(equations, s, theta, error, state.scale)


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Schedule):
    """The same tolerance at every step, for the inner problem and the adjoint.

    Parameters
    ----------
    rtol : float
        Of ‖F‖ against its size at the start, and of the adjoint's residual against ‖∂L/∂y‖.

    Raises
    ------
    InputError
        Where it is not between 0 and 1.

    Examples
    --------
    >>> from implicitdiff import Fixed
    >>> Fixed(1e-8).at(3)
    1e-08
    """

    rtol: float

    def __post_init__(self) -> None:
        _check("rtol", self.rtol, 0, 1)

    def at(self, step: Any) -> Any:
        return self.rtol


@dataclass(frozen=True, eq=False, repr=False)
class Geometric(Schedule):
    """Tolerances start · ratio^k, as HOAG has them.

    Parameters
    ----------
    start : float, default 0.1
        Of the first step.
    ratio : float, default 0.9
        Of each to the one before.

    Raises
    ------
    InputError
        Where a number is not between 0 and 1.

    References
    ----------
    F. Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016. arXiv:1602.02355

    Examples
    --------
    >>> from implicitdiff import Geometric
    >>> round(Geometric(0.1, 0.9).at(2), 3)
    0.081
    """

    start: float = 0.1
    ratio: float = 0.9

    def __post_init__(self) -> None:
        _check("start", self.start, 0, 1)
        _check("ratio", self.ratio, 0, 1)

    def at(self, step: Any) -> Any:
        return self.start * self.ratio**step


@dataclass(frozen=True, eq=False, repr=False)
class Summable(Schedule):
    """Tolerances start / (k + 1)^power, whose sum is finite, so that HOAG converges.

    Parameters
    ----------
    start : float, default 0.1
        Of the first step.
    power : float, default 2
        How fast they fall; above 1.

    Raises
    ------
    InputError
        Where ``start`` is not between 0 and 1, or ``power`` not above 1: the sum would be infinite.

    References
    ----------
    F. Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016. arXiv:1602.02355

    Examples
    --------
    >>> from implicitdiff import Summable
    >>> Summable(0.1, 2).at(1)
    0.025
    """

    start: float = 0.1
    power: float = 2.0

    def __post_init__(self) -> None:
        _check("start", self.start, 0, 1)
        _check("power", self.power, 1)

    def at(self, step: Any) -> Any:
        return self.start * (step + 1) ** -self.power
