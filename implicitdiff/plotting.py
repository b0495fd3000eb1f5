"""Axes to draw on: those that were given, or a new figure's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from implicitdiff.errors import InputError

__all__ = ["axes_of", "check_matplotlib"]


def check_matplotlib() -> None:
    """Raise where there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise InputError('plot needs matplotlib: python -m pip install "implicitdiff[plot]".')


def axes_of(axes: Any, size: tuple[float, float], columns: int = 1) -> Any:
    """Return the axes that were given, or as many side by side in a new figure of that size in inches."""
    if axes is not None:
        return axes
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots(1, columns)
