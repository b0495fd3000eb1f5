"""Which of the collected tests run: a pairwise cover by default, all with ``--exhaustive``, some with ``--backend``.

The cases of a test that the cover leaves out bear the mark ``exhaustive``, so that ``-m exhaustive`` runs just those.
What takes seconds bears the mark ``slow``, on all libraries or on some, and runs with ``--slow``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
from covering import cover

BACKENDS = ("numpy", "array_api_strict", "torch", "jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    parser.addoption("--exhaustive", action="store_true", help="every case, and some thousand generated ones")
    parser.addoption("--slow", action="store_true", help="the slow tests, in place of the others")
    parser.addoption("--cover", type=int, help="how many choices at once the cases hold, in place of what a test says")
    parser.addoption("--backend", action="append", choices=BACKENDS, help="only what tests this library (repeatable)")


def choice(value: Any) -> Hashable:
    """What tells one choice of a parameter from the others."""
    return repr(value) if isinstance(value, (str, int, float, tuple, type(None))) else id(value)


def choices(item: pytest.Item) -> tuple[Hashable, ...]:
    """Return which test it is, and the choice of each of its parameters."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return item.originalname, *((name, choice(params[name])) for name in sorted(params))


def backends(item: pytest.Item) -> set[str]:
    """Names of the libraries that a test is about: those among its parameters, or that of its file, or NumPy."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {str(getattr(value, "name", value)).removesuffix("-readonly") for value in params}
    found = names & set(BACKENDS)
    return found or {name for name in ("torch", "jax") if name in item.path.name} or {"numpy"}


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is marked as slow, on its library if the mark names some (``slow(on=("jax",))``)."""
    named = [mark.kwargs.get("on") for mark in item.iter_markers("slow")]
    return any(on is None or backends(item) & set(on) for on in named)


def mark_what_the_cover_leaves(items: list[pytest.Item], strength: int | None = None) -> None:
    """Mark the cases whose every pair of choices another case of the test has.

    On JAX, where nearly every case compiles for a second, and on array_api_strict, which takes NumPy's path ten times
    as slowly and is there to object to single calls, each choice occurs once in place of each pair, and the tests of a
    file are covered as one in which the test is a choice, too; ``cover(together=...)`` says otherwise. What is slow is
    covered by itself, since it runs in a session of its own.
    """
    groups: dict[Hashable, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("exhaustive"):
            mark, library = item.get_closest_marker("cover"), backends(item)
            together = mark.kwargs["together"] if mark else library in ({"jax"}, {"array_api_strict"})
            slow = min(library & {"jax", "array_api_strict"}, default="") if len(library) == 1 else ""
            groups[item.path, "" if together else item.originalname, slow, is_slow(item)].append(item)
    for (_, test, slow, _), cases in groups.items():
        kept = set(cover([choices(item)[bool(test) :] for item in cases], strength or (1 if slow else 2)))
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker("exhaustive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose, and bring together what compiles for one framework: workers take the tests in one piece each."""
    mark_what_the_cover_leaves(items, config.getoption("cover"))
    wanted = set(config.getoption("backend") or BACKENDS)
    named = any("[" in argument for argument in config.args) or "exhaustive" in config.getoption("markexpr")
    everything = named or config.getoption("exhaustive")
    either = everything or any("::" in argument for argument in config.args) or "slow" in config.getoption("markexpr")
    kept, dropped = [], []
    for item in items:
        short = everything or not item.get_closest_marker("exhaustive")
        timely = either or is_slow(item) == config.getoption("slow")
        (kept if short and timely and backends(item) & wanted else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: ("jax" not in backends(item)) + 2 * ("torch" in backends(item)))
