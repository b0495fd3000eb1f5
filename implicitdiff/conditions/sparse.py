"""Conditions whose A has a pattern, given or to be found."""

from __future__ import annotations

from typing import Any

from implicitdiff.conditions.base import Condition
from implicitdiff.linalg.sparsity import Sparsity, sparsity_of

__all__ = ["SparseCondition"]


class SparseCondition(Condition):
    """A condition with a field ``sparsity``: None, "detect" or a `Pattern`."""

    sparsity: Any

    @property
    def derived_from(self) -> tuple[Any, ...]:
        """The user's functions that A is made of, for which a pattern is remembered."""
        raise NotImplementedError

    @property
    def structure(self) -> Any:
        if not isinstance(self.sparsity, str):
            return None
        return tuple(self.where().found.items())

    def where(self) -> Sparsity:
        """Return where A has entries, as far as that is said or known."""
        return sparsity_of(self.sparsity, self.derived_from)
