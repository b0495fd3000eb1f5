"""Where A has entries: said by the user, or found; and A assembled from few products, checked, as a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from implicitdiff.arrays import any_true
from implicitdiff.errors import InputError, PatternError
from implicitdiff.identities import identity, remember
from implicitdiff.linalg.detection import detected
from implicitdiff.linalg.entries import Entries, mismatch, missed, poisoned, read
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.pattern import Pattern, as_pattern
from implicitdiff.linalg.vector_space import is_tree_vector

__all__ = ["Sparsity", "assembled", "check_sparsity", "sparsity_of", "with_entries"]

TRIES = 3
"""A pattern that is found is that of one point: others may bring entries, twice at one of them by bad luck."""


@dataclass(eq=False)
class Sparsity:
    """Where an operator has entries.

    Parameters
    ----------
    given : Pattern, optional
        None: to be found.
    found : dict
        Patterns that were found, by order.
    flipped : bool
        Whether it is that of Aᵀ.
    mixed : dict
        Patterns of B that were found.
    """

    given: Pattern | None = None
    found: dict[int, Pattern] = field(default_factory=dict)
    flipped: bool = False
    mixed: dict[Any, Any] = field(default_factory=dict)

    @property
    def transposed(self) -> Sparsity:
        """Of Aᵀ."""
        return replace(self, flipped=not self.flipped)

    def known(self, op: Operator) -> Pattern | None:
        """Return the pattern of an operator, None where it has yet to be found."""
        found = self.found.get(op.n) if self.given is None else self.given.of_order(op.n)
        if found is None:
            return None
        found = found.transposed if self.flipped else found
        return found.symmetric if op.symmetric else found

    def find(self, op: Operator) -> tuple[Pattern, int]:
        """Find the pattern, beside what is known of it, and count the products that it took."""
        found, spent = detected(op)
        found = found.transposed if self.flipped else found
        if op.n in self.found:
            found = found.union(self.found[op.n])
        self.found[op.n] = found
        known = self.known(op)
        assert known is not None
        return known, spent


_found: dict[Any, Any] = {}


def sparsity_of(given: Any, functions: tuple[Any, ...]) -> Sparsity:
    """Return what is known of the entries of A; what was found for the same functions is remembered.

    Parameters
    ----------
    given : "detect" or Pattern
    functions : tuple of callable
        What A is derived from.
    """
    if isinstance(given, Pattern):
        return Sparsity(given)
    held: list[Any] = []
    key = tuple(identity(f, held) for f in functions if f is not None)
    if key not in _found:
        remember(_found, key, Sparsity(), held)
    found: Sparsity = _found[key][0]
    return found


def assembled(op: Operator) -> Operator:
    """Return the operator with its matrix, if it is to be assembled by a pattern.

    Raises
    ------
    PatternError
        Where a given pattern leaves out entries; where nothing is seen, the matrix is NaN.
    """
    sparsity = op.sparsity
    if sparsity is None or op.entries is not None or op.matrix is not None or op.sparse is not None:
        return op
    if not op.n or 0 in op.items or is_tree_vector(op.like):
        return op
    found, spent = _read(op, sparsity)
    made: Operator = with_entries(op, found, spent)
    return made


def with_entries(op: Any, found: Entries, spent: int = 0) -> Any:
    """Return an operator that multiplies by its entries, on NumPy as a SciPy matrix; ``spent`` products on them."""
    xp, cache = op.backend.xp, {"probes": op.probes + spent}
    if op.backend.name == "numpy" and not op.items:
        matrix = found.pattern.matrix(found.values)
        turned = matrix if op.symmetric else matrix.T.tocsr()
        return replace(
            op, entries=found, sparse=matrix.tocsc(), forward=lambda x: (matrix @ x.T).T,
            adjoint=lambda x: (turned @ x.T).T, _cache=cache,
        )  # fmt: skip
    turned = found if op.symmetric else found.transposed(xp, op.device)
    return replace(
        op, entries=found, forward=lambda x: found.matvec(xp, x, op.device),
        adjoint=lambda x: turned.matvec(xp, x, op.device), _cache=cache,
    )  # fmt: skip


def _read(op: Operator, sparsity: Sparsity) -> tuple[Entries, int]:
    """Assemble, and check; the products that it took, one for each vector."""
    pattern, spent, wrong = sparsity.known(op), 0, False
    if pattern is None:
        zeros = op.backend.xp.zeros((*op.items, op.n), dtype=op.dtype, device=op.device)
        if not op.backend.sees(op.matvec(zeros)):
            raise _unknown()
        pattern, spent = sparsity.find(op)
    for _ in range(TRIES):
        found = read(op, pattern)
        seen = op.backend.sees(found.values)
        spent += found.products + 1
        difference = mismatch(op, found)
        wrong = seen and any_true(op.backend.xp, difference.rows & difference.finite[..., None])
        if not wrong or sparsity.given is not None:
            break
        before, (pattern, more) = pattern, sparsity.find(op)
        spent += more
        if pattern is before:
            break
    if wrong:
        error = missed(op, found, difference)
        if error is not None:
            raise error
        difference = difference._replace(rows=difference.rows & False)
    return poisoned(op.backend, found, difference), spent


def _unknown() -> PatternError:
    return PatternError(
        'sparsity="detect" has to look at numbers, and here there are none (under jit, vmap or grad).\n'
        "Next: take one derivative outside first, which is remembered for these functions; or give a pattern."
    )


def check_sparsity(sparsity: Any) -> Any:
    """Return what a user gave as sparsity: None, "detect" or a `Pattern`."""
    if sparsity is None or (isinstance(sparsity, str) and sparsity == "detect"):
        return sparsity
    if isinstance(sparsity, str):
        raise InputError(f"sparsity = {sparsity!r}: expected None, 'detect', or a pattern.")
    return as_pattern(sparsity)
