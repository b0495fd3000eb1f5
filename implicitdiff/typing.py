"""Types of what users hand over, and the options that many functions take by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

from implicitdiff.arrays import Array
from implicitdiff.conditions import Condition
from implicitdiff.error_estimate import Polish
from implicitdiff.outcome import Report
from implicitdiff.solvers.sequences import SequenceState

__all__ = [
    "DEFAULTS",
    "ConditionLike",
    "FunctionOptions",
    "OnFailure",
    "Options",
    "SolveOptions",
    "SolverLike",
    "SolverName",
    "StartedOptions",
    "SystemOptions",
    "T",
    "Y",
    "completed",
]

Y = TypeVar("Y")
"""A solution: what comes back like y."""
T = TypeVar("T")
"""Parameters: what comes back like theta."""

SolverName: TypeAlias = Literal[
    "auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres", "bicgstab", "lsmr", "minres_qlp", "pinv",
    "truncated", "chebyshev", "neumann", "one_step", "phantom", "diagonal", "nystrom",
]  # fmt: skip
OnFailure: TypeAlias = Literal["raise", "warn", "nan", "ignore"]
ConditionLike: TypeAlias = Condition | Callable[..., Any]
"""A bare callable is the inner objective."""


class SolverLike(Protocol):
    """Any object with the three methods of `implicitdiff.Solver`."""

    def init(self, operator: Any) -> Any:
        """Prepare for an operator."""

    def solve(self, state: Any, b: Array, x0: Array | None = None) -> tuple[Array, Any, Any]:
        """Solve A x = b."""

    def transpose(self, state: Any) -> Any:
        """Return the state for Aᵀ."""


class SolveOptions(TypedDict, total=False):
    """Options of every linear solve."""

    solver: SolverName | str | SolverLike
    on_failure: OnFailure
    backend: Any
    batched: bool


class FunctionOptions(SolveOptions, total=False):
    """... of a wrapped solver."""

    in_axes: Any
    on_report: Callable[[Report], object] | None
    max_error: float | None
    polish: Polish


class Options(SolveOptions, total=False):
    """... of a condition at a point."""

    args: tuple[Any, ...]
    in_axes: Any
    error: bool
    max_error: float | None
    polish: Polish


class StartedOptions(Options, total=False):
    """... of one product there, which may be given a start, or be one of a sequence."""

    x0: Array | None
    state: SequenceState | Literal["new"] | None


class SystemOptions(SolveOptions, total=False):
    """... of a linear system."""

    symmetric: bool | None
    positive_definite: bool | None
    transpose: Callable[[Array], Array] | None
    x0: Array | None


DEFAULTS: dict[str, Any] = {
    "solver": "auto", "on_failure": "raise", "backend": None, "batched": False, "in_axes": None, "args": (), "x0": None,
    "symmetric": None, "positive_definite": None, "transpose": None, "on_report": None, "error": False,
    "max_error": None, "polish": 0, "state": None,
}  # fmt: skip
"""What an option is where it is not given."""


def completed(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a kind, with the defaults of those that are not given."""
    return {name: options.get(name, DEFAULTS[name]) for name in kind.__annotations__}
