"""The plot of the demo: the losses over the outer steps, and the penalties that were learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from implicitdiff import InputError
from implicitdiff.tools.demo import BOUNDS, Outcome

__all__ = ["check", "plot"]

PADDING = 0.1
"""Around each panel, in inches."""


def check(path: Path) -> None:
    """Raise InputError where a plot could not be written there, before any work is done."""
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise InputError(f"--plot {path}: unknown kind of file; expected one of .{', .'.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}")


def plot(outcome: Outcome, path: Path) -> None:
    """Draw the outcome and save the figure."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    digits = outcome.data.name == "digits"
    layout = ConstrainedLayoutEngine(w_pad=PADDING, h_pad=PADDING)
    figure = Figure(figsize=(13, 4.4) if digits else (11.5, 5.6), layout=layout)
    axes = figure.subplots(1, 3 if digits else 2, width_ratios=[1.3, 1, 1] if digits else [1, 1.15])
    _draw_losses(axes[0], outcome)
    if digits:
        _draw_images(figure, axes[1], axes[2], outcome)
    else:
        _draw_penalties(axes[1], outcome)
    name = outcome.data.name.replace("_", " ")
    figure.suptitle(f"One L2 penalty per feature, tuned by hypergradients ({name})", fontweight="bold")
    figure.savefig(path, dpi=150)


def _draw_losses(ax: Any, outcome: Outcome) -> None:
    for column, (label, color) in enumerate((("validation", "tab:blue"), ("test", "tab:orange"))):
        ax.plot(outcome.history[:, column], color=color, marker="o", markersize=3.5, label=f"{label}, per feature")
        ax.axhline(outcome.history[0, column], color=color, linestyle="--", linewidth=1, label=f"{label}, shared")
    ax.set(xlabel="outer step", ylabel="mean cross-entropy", title="Loss while the penalties are tuned")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.25)
    ax.legend(ncols=2, fontsize="small", loc="lower center")


def _draw_images(figure: Any, left: Any, right: Any, outcome: Outcome) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    theta, shared = outcome.tuned.theta, float(np.exp(outcome.shared.theta[0]))
    norm = LogNorm(*np.exp(BOUNDS))
    bars = []
    for ax, image, title, label, options in (
        (left, np.exp(theta), "Learnt penalty of each pixel", "penalty", {"norm": norm, "cmap": "viridis"}),
        (right, outcome.data.mean, "Mean training image", "intensity", {"cmap": "gray_r"}),
    ):
        picture = ax.imshow(image.reshape(8, 8), **options)
        ax.set(title=title, xticks=[], yticks=[])
        bars.append(figure.colorbar(picture, ax=ax, shrink=0.8, pad=0.03, label=label))
    bars[0].ax.axhline(shared, color="white", linewidth=2)
    bars[0].ax.annotate("shared ", (0, shared), ha="right", va="center", fontsize="small", color="black")
    blank = np.flatnonzero((outcome.data.train.X[:, :-1] == 0).all(axis=0))
    for i in blank:
        corner = (i % 8 - 0.5, i // 8 - 0.5)
        left.add_patch(Rectangle(corner, 1, 1, facecolor="white", hatch="////", edgecolor="0.75", linewidth=0))
    if len(blank):
        left.set_xlabel("hatched: always blank in the training set", fontsize="small")


def _draw_penalties(ax: Any, outcome: Outcome) -> None:
    order = np.argsort(outcome.tuned.theta)
    rows = np.arange(len(order))
    shared, penalties = float(np.exp(outcome.shared.theta[0])), np.exp(outcome.tuned.theta[order])
    colors = np.where(penalties > shared, "tab:red", "tab:blue")
    ax.hlines(rows, shared, penalties, colors=colors, linewidth=2)
    ax.scatter(penalties, rows, c=colors, s=28, zorder=3)
    ax.axvline(shared, color="black", linestyle="--", linewidth=1, label=f"shared penalty, {shared:.2g}")
    ax.set(xscale="log", xlabel="penalty", title="Learnt penalty of each feature", ylim=(-0.7, len(order) - 0.3))
    ax.set_yticks(rows, [outcome.data.features[i].replace("_", " ") for i in order], fontsize="small")
    ax.grid(alpha=0.25, axis="x")
    ax.legend(fontsize="small", loc="lower right")
