"""Records: objects made of named fields that print briefly and compare by value, arrays and NaN included."""

from __future__ import annotations

import html
import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["Record", "brief", "duration", "equal", "html_table", "memory_size"]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same: arrays by shape and entries, NaN equal to itself; it never raises.

    Examples
    --------
    >>> import numpy as np
    >>> equal({"x": np.array([1.0, np.nan])}, {"x": np.array([1.0, np.nan])}), equal(np.ones(2), np.ones(3))
    (True, False)
    """
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(equal, a, b))
    try:
        if getattr(a, "shape", ()) != getattr(b, "shape", ()):
            return False
        same = (a == b) | ((a != a) & (b != b))
        if not getattr(same, "shape", ()):
            return bool(same)
        return bool(same.all() if hasattr(same, "all") else same.__array_namespace__().all(same))
    except Exception:  # of values that are being traced, or on several devices, there is nothing to say
        return False


def brief(value: Any) -> str:
    """Show a value in a few characters: a function by its name, an array by dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> brief(np.ones((2, 3))), brief(len), brief(1e-10), brief({"x": np.ones(2)})
    ('float64[2, 3]', 'len', '1e-10', "{'x': float64[2]}")
    """
    shape = getattr(value, "shape", ())
    if shape and hasattr(value, "dtype"):
        return f"{str(value.dtype).rpartition('.')[2]}[{', '.join(map(str, shape))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {brief(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return ("({})" if isinstance(value, tuple) else "[{}]").format(", ".join(map(brief, value)))
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    if isinstance(value, Record):
        return repr(value)
    return f"{value:.3g}" if isinstance(value, float) else reprlib.repr(value)


class Record:
    """Base of dataclasses, for ``@dataclass(eq=False, repr=False)``: what is not as by default is shown."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={brief(value)}" for name, value in self._shown().items())
        return f"{type(self).__name__}({shown})"

    def _shown(self) -> dict[str, Any]:
        """Arguments by name that are not as by default."""
        known = inspect.signature(type(self)).parameters.values()
        found = {p.name: (getattr(self, p.name), p.default) for p in known if hasattr(self, p.name)}
        return {name: value for name, (value, default) in found.items() if not equal(value, default)}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or not self._compared():
            return NotImplemented
        return all(equal(getattr(self, name), getattr(other, name)) for name in self._compared())

    def __hash__(self) -> int:
        names = self._compared()
        return hash((type(self), *(getattr(self, name) for name in names))) if names else object.__hash__(self)

    @classmethod
    def _compared(cls) -> Sequence[str]:
        """Names of the fields; without any, an object is equal to itself alone."""
        return tuple(f.name for f in fields(cls) if f.compare) if is_dataclass(cls) else ()


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table for a notebook."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{top}<tbody>{''.join(line(cells, 'td') for cells in rows)}</tbody></table>"


def duration(seconds: float) -> str:
    """Show a time in its unit.

    Examples
    --------
    >>> duration(1.2345), duration(0.0123)
    ('1.23 s', '12.3 ms')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def memory_size(count: int) -> str:
    """Show a number of bytes in its unit.

    Examples
    --------
    >>> memory_size(3 * 2**20)
    '3 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
