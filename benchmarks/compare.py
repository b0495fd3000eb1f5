"""Two runs side by side: what became slower, what faster, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import Result, columns, read_json

__all__ = ["compare"]

HEAD = ("what", "old", "new", "new / old", "")


def compare(old: Path, new: Path, fail_above: float | None = None) -> int:
    """Print the times of two files of runs that have a row in common.

    Parameters
    ----------
    old, new : Path
        Files that ``run --json`` wrote.
    fail_above : float, optional
        Ratio above which the status is 1.

    Returns
    -------
    int
        The exit status.
    """
    before, after = read_json(old), read_json(new)
    first, second = _times(before), _times(after)
    both = [key for key in first if key in second]
    if before.machine.get("cpu") != after.machine.get("cpu"):
        print(f"other machines: {before.machine.get('cpu')} and {after.machine.get('cpu')}")
    lines = [HEAD]
    worst = 0.0
    for key in both:
        (a, low, high), (b, _, _) = first[key], second[key]
        ratio = b / a
        worst = max(worst, ratio)
        # within the range of the old run nothing can be told
        note = "" if low <= b <= high else "slower" if ratio > 1 else "faster"
        lines.append((key, f"{a * 1e3:.3g} ms", f"{b * 1e3:.3g} ms", f"{ratio:.2f}", note))
    print("\n".join(columns(lines)) if both else "the files have no row in common")
    for name, rest in (("only in the old file", first.keys() - second.keys()),
                       ("only in the new file", second.keys() - first.keys())):  # fmt: skip
        for key in sorted(rest):
            print(f"{name}: {key}")
    return 1 if fail_above is not None and worst > fail_above else 0


def _times(result: Result) -> Mapping[str, tuple[float, float, float]]:
    """Seconds by a name for each row: median, least and largest."""
    found: dict[str, Any] = {}
    for row in result.rows:
        if row.unit == "s":
            found[f"{row.backend} {row.device}: {row.case}, {row.size}"] = (row.ours, row.ours * 0.9, row.ours * 1.1)
    for s in result.samples:
        key = f"{s.backend} {s.device} {s.library}: {s.problem}, {s.axis} = {s.size}, {s.solver}"
        found[key] = tuple(s.seconds)
    return found
