"""The plot of a comparison: the error of a gradient against the products that it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from implicitdiff.errors import InputError
from implicitdiff.plotting import axes_of, check_matplotlib

__all__ = ["draw"]

LEAST = 1e-8
"""Least error that is drawn where it is: smaller ones stand at the lower edge, with the solutions below it."""
MARKERS = "osD^v<>PXph*"


def draw(rows: Sequence[Any], axes: Any = None) -> Any:
    """Draw the rows of a comparison, and return the figure.

    Parameters
    ----------
    rows : sequence of SolverRow
    axes : matplotlib axes, optional
        By default a new figure's.

    Raises
    ------
    InputError
        Where matplotlib is not installed, or no row has an error.
    """
    check_matplotlib()
    lines: dict[str, list[tuple[int, float, bool]]] = {}
    for row in rows:
        error = row.error if not math.isnan(row.error) else row.estimate
        usable = row.converged or row.status == "APPROXIMATE"
        if usable and math.isfinite(error):
            lines.setdefault(row.used, []).append((max(row.products, 1), error, row.converged))
    if not lines:
        raise InputError("no row has an error to draw.\nNext: add a solver that converges, or error=True.")
    axes = axes_of(axes, (7.6, 4.4))
    loose = [error for points in lines.values() for _, error, converged in points if not converged]
    floor = max(min(loose, default=LEAST) / 5, LEAST)
    for i, (name, points) in enumerate(lines.items()):
        points.sort()
        products, _, converged = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "label": name}
        if all(converged):
            style |= {"linestyle": "none", "markerfacecolor": "none"}
        axes.plot(products, [max(error, floor) for _, error, _ in points], clip_on=False, zorder=3, **style)
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle=":")
    note = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": "small", "color": "0.4"}
    axes.annotate("no derivative at all", (0.0, 1.0), xytext=(4, 3), **note)
    axes.set(xscale="log", yscale="log", xlabel="products with A", ylabel="relative error of the gradient")
    axes.set_ylim(bottom=floor)
    if not all(converged for points in lines.values() for *_, converged in points):
        axes.annotate("solved: at this edge, or below", (1.0, floor), xytext=(0, 6), ha="right", **note)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return axes.figure
