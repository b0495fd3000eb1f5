"""What the default run leaves out is a repetition: every pair of choices stays, on every library."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from conftest import LIBRARIES, Library
from covering import cover
from selection import backends, choice

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
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
def test_the_tests_of_a_library_are_found(
    lib: Library, first: int, second: int, request: pytest.FixtureRequest
) -> None:
    """And of this test, each library runs with every choice of the other two."""
    assert backends(request.node) == {lib.name.removesuffix("-readonly")}
    count = sum(item.originalname == request.node.originalname for item in request.session.items)
    chosen = request.config.getoption("exhaustive") or request.config.getoption("backend")
    assert chosen or count <= 2 * len(LIBRARIES)
