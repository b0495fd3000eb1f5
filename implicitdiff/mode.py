"""How a calculation runs, which decides what it may look at and whom it can tell."""

from __future__ import annotations

from enum import Enum

__all__ = ["Mode"]


class Mode(Enum):
    """How a calculation runs."""

    EAGER = "eager"
    """Values are seen: work may depend on them, and what is wrong is told at once."""
    COMPILED = "compiled"
    """A program of ours is being traced: no values; what is wrong is returned by it, and told afterwards."""
    INLINE = "inline"
    """Inside of what a framework traces or transforms for the user, who may differentiate the result again: no values,
    and nobody to tell, so that what fails has to come out as NaN."""
