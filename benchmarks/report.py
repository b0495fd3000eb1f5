"""Rows of results, the table on screen and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread

__all__ = ["Row", "table", "write_json"]

COLUMNS = ("case", "size", "ours", "reference", "ratio (median, min..max)", "bar", "met?", "correct?")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Parameters
    ----------
    case, size : str
        What was compared, at which size.
    ours, reference : float
        Medians, in ``unit``.
    ratio : Spread
        Ours over the reference, formed within rounds.
    bar : float or None
        What the ratio may be; None where no bar is set.
    error, allowed : float
        Relative error of our result against the reference, and what it may be.
    unit : str
        ``"s"``, or ``"n-vectors"``.
    facts : dict
        What else there is to know: iterations, products, the solver really used.
    """

    case: str
    size: str
    ours: float
    reference: float
    ratio: Spread
    bar: float | None
    error: float
    allowed: float
    unit: str = "s"
    facts: dict[str, Any] = field(default_factory=dict)
    backend: str = "numpy"
    device: str = "cpu"

    @property
    def met(self) -> bool | None:
        """Whether the median ratio keeps to the bar."""
        return None if self.bar is None else self.ratio.median <= self.bar

    @property
    def correct(self) -> bool:
        """Whether the result agrees with the reference; NaN does not."""
        return self.error <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {**asdict(self), "ratio": self.ratio._asdict(), "met": self.met, "correct": self.correct}


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out in columns."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    met = {None: "-", True: "yes", False: "NO"}[row.met]
    bar = "-" if row.bar is None else f"{row.bar:.3g}"
    spread = f"{row.ratio.median:.3g} ({row.ratio.low:.3g}..{row.ratio.high:.3g})"
    correct = "yes" if row.correct else f"NO: error {row.error:.1e}"
    amounts = (_amount(row.ours, row.unit), _amount(row.reference, row.unit))
    return (row.case, row.size, *amounts, spread, bar, met, correct)


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.3g} {unit}"
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.3g} s"


def write_json(path: Path, machine: dict[str, Any], setting: Any, rows: Sequence[Row]) -> None:
    """Write machine, setting and rows."""
    content = {"machine": machine, "setting": asdict(setting), "rows": [row.as_dict() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
