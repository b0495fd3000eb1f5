"""Rows of results and what was skipped, the table on screen and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread
from benchmarks.sample import Sample

__all__ = ["Result", "Row", "Skipped", "columns", "read_json", "table", "write_json"]

SAMPLE_COLUMNS = (
    "backend", "problem", "size", "solver", "status", "time (median, min..max)", "/ floor", "products", "error",
    "memory",
)  # fmt: skip
COLUMNS = ("backend", "case", "size", "ours", "reference", "ratio (median, min..max)", "bar", "met?", "correct?")


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
        ``"s"``, or what was counted.
    facts : dict
        What else there is to know: iterations, products, the solver really used.
    backend, device : str
        The framework, and where the arrays were.
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


@dataclass(frozen=True)
class Skipped:
    """A comparison that was not made.

    Parameters
    ----------
    case, size : str
        What was to be compared, at which size.
    reason : str
        Why it was not.
    """

    case: str
    size: str
    reason: str
    backend: str = "numpy"


@dataclass
class Result:
    """What a run came to: its rows, what it skipped, and the machine."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)
    """Rows of the sweep."""
    skipped: list[Skipped] = field(default_factory=list)
    broken: bool = False
    """Whether a process ended without a result."""

    def add(self, found: Sequence[Row | Skipped]) -> None:
        """Sort out what a case returned."""
        self.rows += [row for row in found if isinstance(row, Row)]
        self.skipped += [row for row in found if isinstance(row, Skipped)]
        self.samples += [row for row in found if not isinstance(row, (Row, Skipped))]

    @property
    def correct(self) -> bool:
        """Whether everything came to an end, and every value is right."""
        return not self.broken and all(row.correct for row in (*self.rows, *self.samples))


def table(result: Result) -> str:
    """Lay the rows out in columns; what was skipped follows, with the reasons."""
    lines = columns([COLUMNS, *map(_cells, result.rows)]) if result.rows else []
    if result.samples:
        lines += [*([""] if lines else []), *columns([SAMPLE_COLUMNS, *map(_sample_cells, result.samples)])]
    lines += [f"skipped: {s.backend}: {s.case}{', ' if s.size else ''}{s.size}: {s.reason}" for s in result.skipped]
    return "\n".join(lines)


def columns(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of cells, the first of which is the head."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    met = {None: "-", True: "yes", False: "NO"}[row.met]
    bar = "-" if row.bar is None else f"{row.bar:.3g}"
    spread = f"{row.ratio.median:.3g} ({row.ratio.low:.3g}..{row.ratio.high:.3g})"
    correct = "yes" if row.correct else f"NO: error {row.error:.1e}"
    amounts = (_amount(row.ours, row.unit), _amount(row.reference, row.unit))
    return (row.backend, row.case, row.size, *amounts, spread, bar, met, correct)


def _sample_cells(s: Any) -> tuple[str, ...]:
    where = s.backend if s.device == "cpu" else f"{s.backend} {s.device}"
    used = s.solver if s.used == s.solver else f"{s.solver} ({s.used})"
    time = f"{_amount(s.seconds.median, 's')} ({_amount(s.seconds.low, 's')}..{_amount(s.seconds.high, 's')})"
    floor = "-" if s.floor is None else f"{s.seconds.median / s.floor:.3g}"
    memory = "-" if s.memory is None else f"{s.memory / 2**20:.3g} MiB"
    status = s.status.lower().replace("_", " ") + ("" if s.correct else " and WRONG")
    name = where if s.library == "implicitdiff" else f"{where}: {s.library}"
    return (
        name,
        s.problem,
        f"{s.axis} = {s.size}",
        used,
        status,
        time,
        floor,
        str(s.products),
        f"{s.error:.1e}",
        memory,
    )


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.3g} {unit}"
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.3g} s"


def write_json(path: Path, setting: Any, result: Result) -> None:
    """Write machine, setting, rows, and what was skipped."""
    content = {
        "machine": result.machine, "setting": asdict(setting), "rows": [row.as_dict() for row in result.rows],
        "samples": [sample.as_dict() for sample in result.samples],
        "skipped": [asdict(row) for row in result.skipped],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Result:
    """Read what `write_json` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Sample)}
    found = [{name: value for name, value in s.items() if name in known} for s in content.get("samples", [])]
    samples = [Sample(**{**s, "seconds": Spread(**s["seconds"])}) for s in found]
    names = {f.name for f in fields(Row)}
    rows = [{name: value for name, value in row.items() if name in names} for row in content["rows"]]
    return Result(
        content["machine"], [Row(**{**row, "ratio": Spread(**row["ratio"])}) for row in rows], samples,
        [Skipped(**row) for row in content["skipped"]],
    )  # fmt: skip
