"""Which cases of a full product are run by default: some that hold every pair of choices (a covering array)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations


def cover(cases: Sequence[Sequence[Hashable]], strength: int = 2) -> list[int]:
    """Indices of cases that hold together every combination of `strength` choices that occurs in all of them.

    Greedy, and the same in every run: the case with most that is new comes next, among equals the one with most new
    pairs, then the first. A case is its choices in a fixed order, no two parameters with a choice in common; what is
    missing from the product stays away.
    """
    held = [({*combinations(case, min(strength, len(case)))}, {*combinations(case, 2)}) for case in cases]
    missing = [set().union(*(parts[i] for parts in held)) for i in (0, 1)]
    queue = [(-len(new), -len(pairs), index) for index, (new, pairs) in enumerate(held)]
    heapq.heapify(queue)
    chosen = []
    while missing[0]:
        *gain, index = heapq.heappop(queue)
        parts = [part & left for part, left in zip(held[index], missing, strict=True)]
        if [-len(part) for part in parts] == gain:  # what a case adds only becomes less: this is the most that any adds
            chosen.append(index)
            missing = [left - part for part, left in zip(parts, missing, strict=True)]
        elif parts[0]:
            heapq.heappush(queue, (-len(parts[0]), -len(parts[1]), index))
    return sorted(chosen)
