"""What the tests of the gallery share: a page is run once, and its names are looked at."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"


def run_page(name: str) -> dict[str, Any]:
    """Run ``docs/gallery/plot_<name>.py`` as its reader would, without a display, and return what it defined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = runpy.run_path(str(GALLERY / f"plot_{name}.py"))
    assert plt.get_fignums(), f"plot_{name}.py drew no figure"
    plt.close("all")
    return found


def central(function: Callable[[Any], Any], x: Any, step: float) -> np.ndarray:
    """Central differences of a function of an array, the axes of x last."""
    x = np.asarray(x, dtype=float)
    columns = []
    for i in range(x.size):
        e = np.zeros(x.size)
        e[i] = step
        e = e.reshape(x.shape)
        columns.append((np.asarray(function(x + e)) - np.asarray(function(x - e))) / (2 * step))
    stacked = np.stack(columns, axis=-1)
    return stacked.reshape((*stacked.shape[:-1], *x.shape))
