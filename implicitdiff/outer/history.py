"""What happened in a loop, step by step: a table, a plot, a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from implicitdiff.plotting import axes_of, check_matplotlib
from implicitdiff.records import html_table

__all__ = ["History", "HistoryRow"]

HEAD = (
    "step", "outer value", "‖gradient‖", "estimated error", "‖F‖", "inner gradients", "products", "seconds",
)  # fmt: skip


class HistoryRow(NamedTuple):
    """One outer step.

    Attributes
    ----------
    step : int
        Its number, from 1.
    value : float
        L at the solution for the θ of the gradient, to second order: L(y, θ) − uᵀF.
    gradient_norm : float
        2-norm of the gradient.
    error : float
        Estimated relative error of the gradient; NaN where nothing was measured (`Fixed` and the like).
    residual : float
        ‖F(y, θ)‖.
    inner_gradients, products : int
        Evaluations of F, and products with A, of this step.
    seconds : float
        Wall-clock time of this step.
    """

    step: int
    value: float
    gradient_norm: float
    error: float
    residual: float
    inner_gradients: int
    products: int
    seconds: float


class History(Sequence[HistoryRow]):
    """The rows of a loop: a sequence, with a table, a plot and a file.

    Parameters
    ----------
    rows : sequence of HistoryRow
    """

    def __init__(self, rows: Sequence[HistoryRow] = ()) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[HistoryRow]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"History({len(self)} steps, {sum(map(_cost, self))} inner gradients and products)"

    def _cells(self) -> list[list[str]]:
        return [
            [str(r.step), f"{r.value:.6g}", f"{r.gradient_norm:.3g}", f"{r.error:.1e}", f"{r.residual:.1e}",
             str(r.inner_gradients), str(r.products), f"{r.seconds:.3f}"]
            for r in self
        ]  # fmt: skip

    def table(self) -> str:
        """Return the rows as aligned lines, and the totals of what was spent.

        Returns
        -------
        str
        """
        last = ["total", "", "", "", "", str(sum(r.inner_gradients for r in self)), str(sum(r.products for r in self))]
        lines = [list(HEAD), *self._cells(), [*last, f"{sum(r.seconds for r in self):.3f}"]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return html_table(HEAD, self._cells(), "History")

    def plot(self, axes: Any = None) -> Any:
        """Draw the outer value, and the error and the size of the gradient, against what was spent.

        Parameters
        ----------
        axes : sequence of two matplotlib axes, optional
            By default a new figure's.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            Where matplotlib is not installed.
        """
        check_matplotlib()
        axes = axes_of(axes, (9.0, 3.6), columns=2)
        value, error = axes
        spent, total = [], 0
        for row in self:
            total += _cost(row)
            spent.append(total)
        value.plot(spent, [r.value for r in self], color="C0")
        value.set_ylabel("outer value")
        norms, errors = [r.gradient_norm for r in self], [r.gradient_norm * r.error for r in self]
        error.plot(spent, norms, color="C0", label="‖gradient‖")
        error.plot(spent, errors, color="C1", label="its estimated error")
        error.set_yscale("log")
        error.legend(frameon=False)
        for ax in axes:
            ax.set_xlabel("inner gradients and products")
            ax.spines[["top", "right"]].set_visible(False)
        return value.figure

    def save(self, path: Any) -> None:
        """Write the rows to a file: CSV, or JSON where its name ends so.

        Parameters
        ----------
        path : str or path
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps([row._asdict() for row in self], indent=1)
        else:
            lines = [",".join(HistoryRow._fields), *(",".join(map(repr, row)) for row in self)]
            text = "\n".join(lines) + "\n"
        path.write_text(text, encoding="utf-8")


def _cost(row: HistoryRow) -> int:
    return row.inner_gradients + row.products
