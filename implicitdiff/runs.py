"""What a run of the rules came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from implicitdiff.estimates import Estimate
from implicitdiff.mode import Mode

if TYPE_CHECKING:
    from implicitdiff.rules import Diagnostics, Rules

__all__ = ["Run"]


class Run(NamedTuple):
    """What a run of a mode came to, and whether its values can be seen."""

    value: Any
    diagnostics: Diagnostics
    methods: Sequence[tuple[str, str]]
    derivatives: dict[str, str]
    damping: float
    seconds: float
    rules: Rules | None = None
    """None where they were inside a compiled program."""
    mode: Mode = Mode.EAGER
    """How it ran: inline, values cannot be seen."""
    clean: Any = None
    """From a compiled program, whether there is nothing to tell."""
    certain: Any = None
    """Makes sure of what the program left in doubt of y as a solution."""
    estimate: Estimate | None = None
    """Of the error, where it was asked for."""
