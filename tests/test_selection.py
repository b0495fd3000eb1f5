"""What the default run leaves out is a repetition: every pair of choices stays, on every library."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LIBRARIES, Library
from covering import cover
from selection import backends, choice, choices, is_slow, mark_what_the_cover_leaves

FULL = [tuple(enumerate(case)) for case in product("abcd", range(6), "xyz", [None, ""]) if case[:2] != ("a", 0)]


def held(cases: list[tuple[Any, ...]], strength: int) -> set[Any]:
    return {part for case in cases for part in combinations(case, strength)}


@pytest.mark.parametrize(("strength", "most"), [(1, 6), (2, 28), (3, 90), (4, len(FULL)), (9, len(FULL))])
def test_a_cover_holds_every_combination_in_few_cases(strength: int, most: int) -> None:
    chosen = cover(FULL, strength)
    assert chosen == sorted(set(chosen)) == cover(FULL, strength)
    assert held([FULL[i] for i in chosen], min(strength, 4)) == held(FULL, min(strength, 4))
    assert len(chosen) <= most


def test_a_cover_of_nothing_and_of_equal_cases() -> None:
    assert cover([]) == []
    assert cover([("a", 1)] * 3) == [0]
    assert cover([(), ()]) == [0]
    assert cover([("a",), ("b",), ("a",)]) == [0, 1]


def test_choices_are_told_apart_by_value_or_by_identity() -> None:
    assert choice("1") != choice(1) != choice(1.0)
    assert choice(float("nan")) == choice(float("nan"))
    assert choice([1]) != choice([1])
    assert len({choice(lib) for lib in LIBRARIES}) == len(LIBRARIES)


@pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.name)
def test_the_tests_of_a_library_are_found(lib: Library, request: pytest.FixtureRequest) -> None:
    assert backends(request.node) == {lib.name.removesuffix("-readonly")}


class Item:
    """As much of a collected case as the selection looks at."""

    def __init__(self, file: str, **params: Any) -> None:
        self.path, self.originalname, self.marks = Path(file), "test", []
        self.callspec = SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> None:
        return None

    def iter_markers(self, name: str) -> list[SimpleNamespace]:
        return [mark for mark in self.marks if getattr(mark, "name", "") == name]

    def add_marker(self, name: Any) -> None:
        self.marks.append(name)


@pytest.mark.parametrize(
    ("file", "library", "strength", "runs"),
    [("test_x.py", "numpy", None, 6), ("test_jax_x.py", "", None, 3), ("test_x.py", "numpy", 1, 3),
     ("test_x.py", "array_api_strict", None, 3)],
)  # fmt: skip
def test_what_is_not_marked_holds_every_pair_and_on_slow_libraries_every_choice(
    file: str, library: str, strength: int | None, runs: int
) -> None:
    items = [Item(file, a=a, b=b, c=c, d=library) for a, b, c in product(range(2), range(3), range(2))]
    mark_what_the_cover_leaves(items, strength)  # type: ignore[arg-type]
    kept = [choices(item) for item in items if item.marks != ["exhaustive"]]  # type: ignore[arg-type]
    assert len(kept) == runs
    size = strength or (2 if library == "numpy" else 1)
    assert held(kept, size) == held([choices(item) for item in items], size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mark", "slow"), [({}, {"jax", "numpy"}), ({"on": ("jax",)}, {"jax"}), (None, set())], ids=["all", "some", "none"]
)
def test_what_is_slow_may_be_so_on_some_libraries(mark: dict[str, Any] | None, slow: set[str]) -> None:
    found = set()
    for library in ("jax", "numpy"):
        item = Item("test_x.py", lib=library)
        if mark is not None:
            item.add_marker(SimpleNamespace(name="slow", kwargs=mark))
        if is_slow(item):  # type: ignore[arg-type]
            found.add(library)
    assert found == slow
