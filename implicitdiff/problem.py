"""What a user asks for: a condition at a point, and how to solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from implicitdiff.axes import NO_AXES, Axes, axes_of
from implicitdiff.error_estimate import NOTHING, ErrorControl, Polish
from implicitdiff.errors import UnknownNameError
from implicitdiff.outcome import MODES, Report
from implicitdiff.pytree import copied, map_leaves
from implicitdiff.registry import backend_for, get_backend, portable

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Problem", "Settings", "problem_of"]


@dataclass(frozen=True)
class Settings:
    """How to solve, and what a failure does.

    Parameters
    ----------
    solver : str or Solver
    on_failure : str
    on_report : callable, optional
        Receives the report of each product.
    control : ErrorControl
        What is asked for beside a derivative: an estimate of its error, a limit, Newton steps.
    """

    solver: Any = "auto"
    on_failure: str = "raise"
    on_report: Callable[[Report], object] | None = None
    control: ErrorControl = NOTHING

    def __post_init__(self) -> None:
        if self.on_failure not in MODES:
            raise UnknownNameError(f"on_failure = {self.on_failure!r}: expected one of {', '.join(MODES)}.")


@dataclass(frozen=True)
class Problem:
    """A condition at a point.

    Parameters
    ----------
    backend : Backend
    condition : Condition or callable
    y, theta : pytree
    args : tuple
    settings : Settings
    batched : bool
    copy : bool
        Whether y and theta are copied, since they are used again later.
    axes : Axes
        Which leaves of theta all items share, and which of args differ from item to item.
    """

    backend: Backend
    condition: Any
    y: Any
    theta: Any
    args: tuple[Any, ...] = ()
    settings: Settings = Settings()
    batched: bool = False
    copy: bool = False
    axes: Axes = NO_AXES

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "backend": portable(self.backend)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, backend=_backend(state["backend"], state["y"], state["theta"]))


def problem_of(
    condition: Any, y: Any, theta: Any, *, args: tuple[Any, ...] = (), backend: Any = None, batched: bool = False,
    in_axes: Any = None, copy: bool = False, vector: Any = None, error: bool = False, max_error: float | None = None,
    polish: Polish = 0, **settings: Any,
) -> Problem:  # fmt: skip
    """Return the problem of what was given by name; without a backend, with that of the arrays.

    ``vector`` is a cotangent or tangent that follows; like ``args`` it may be an array of JAX beside NumPy's.
    """
    chosen = Settings(**settings, control=ErrorControl(error, max_error, polish).check())
    engine = _backend(backend, y, theta, (args, vector))
    args = tuple(map_leaves(copied, tuple(args))) if copy else tuple(args)  # they may be filled anew afterwards
    axes = NO_AXES if in_axes is None else axes_of(in_axes, y, theta, args)
    return Problem(engine, condition, y, theta, args, chosen, batched or in_axes is not None, copy, axes)


def _backend(backend: Any, y: Any, theta: Any, beside: Any = ()) -> Backend:
    return backend_for({"y": y, "theta": theta}, beside) if backend is None else get_backend(backend)
