"""Which cases of a full product are run by default: some that hold every pair of choices (a covering array)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations


def cover(cases: Sequence[Sequence[Hashable]], strength: int = 2) -> list[int]:
    """Indices of cases that hold together every combination of `strength` choices that occurs in all of them.

    Greedy, and the same in every run: the case with most that is new comes next, among equals the first. A case is its
    choices in a fixed order, no two parameters with a choice in common; what is missing from the product stays away.
    """
    held = [{*combinations(case, min(strength, len(case)))} for case in cases]
    missing = set().union(*held) if held else set()
    queue = [(-len(new), index) for index, new in enumerate(held)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        gain, index = heapq.heappop(queue)
        new = held[index] & missing
        if len(new) == -gain:  # what a case adds only becomes less: this is the most that any adds
            chosen.append(index)
            missing -= new
        elif new:
            heapq.heappush(queue, (-len(new), index))
    return sorted(chosen)
