"""FAULTS 70: a compiled program is never stale, whatever its functions see and wherever a value is changed."""

from __future__ import annotations

import collections
import functools
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import pytest
from frameworks import framework

from implicitdiff import CG, RecompilationWarning, Stationary, implicit_vjp, linearize
from implicitdiff.problem import Problem, problem_of
from implicitdiff.registry import get_backend

if find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)

fw = framework("jax")
jax, jnp = fw.jax, fw.xp
Contents = importlib.import_module("implicitdiff.backends.jax.contents").Contents
programs = importlib.import_module("implicitdiff.backends.jax.programs")

ELSEWHERE = types.ModuleType("elsewhere")
exec("scale = 2.0\ninner = 1.0\ndef twice(x):\n    return scale * x", ELSEWHERE.__dict__)
SCALE = 2.0


@pytest.fixture(autouse=True)
def importable() -> Iterator[None]:
    sys.modules["elsewhere"] = ELSEWHERE
    yield
    del sys.modules["elsewhere"]


class Inner:
    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Shared:
    scale: Any = 2.0
    nested: ClassVar[dict[str, Any]] = {"deep": [2.0]}

    @staticmethod
    def factor() -> Any:
        return Shared.scale

    @property
    def by_property(self) -> Any:
        return SCALE

    def objective(self, y: Any, theta: Any) -> Any:
        return (y - self.scale * theta) ** 2


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: Any) -> None:
        self.scale = scale


@dataclass
class Settings:
    scale: Any = 2.0
    parts: dict[str, Any] = field(default_factory=lambda: {"deep": Inner(Inner(2.0))})


Case = tuple[Callable[..., Any], Callable[[Any], Any]]


def scaled(scale: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    return lambda y, theta: (y - scale() * theta) ** 2


def of_attribute() -> Case:
    thing = Inner(Inner(Inner(Inner(2.0))))
    deep = thing.scale.scale.scale
    return scaled(lambda: thing.scale.scale.scale.scale), lambda new: setattr(deep, "scale", new)


def of_class() -> Case:
    thing = Shared()
    return scaled(lambda: thing.scale), lambda new: setattr(Shared, "scale", new)


def of_method() -> Case:
    return Shared().objective, lambda new: setattr(Shared, "scale", new)


def of_static_method() -> Case:
    return scaled(lambda: Shared.factor()), lambda new: setattr(Shared, "scale", new)


def of_entry_of_class() -> Case:
    return scaled(lambda: Shared.nested["deep"][0]), lambda new: Shared.nested["deep"].__setitem__(0, new)


def of_property() -> Case:
    thing = Shared()
    return scaled(lambda: thing.by_property), lambda new: globals().__setitem__("SCALE", new)


def of_module() -> Case:
    return scaled(lambda: ELSEWHERE.scale), lambda new: setattr(ELSEWHERE, "scale", new)


def of_module_imported_inside() -> Case:
    def objective(y: Any, theta: Any) -> Any:
        from elsewhere import scale  # type: ignore[import-not-found]

        return (y - scale * theta) ** 2

    return objective, lambda new: setattr(ELSEWHERE, "scale", new)


def of_function_of_module() -> Case:
    return lambda y, theta: (y - ELSEWHERE.twice(theta)) ** 2, lambda new: setattr(ELSEWHERE, "scale", new)


def of_slot() -> Case:
    thing = Slotted(2.0)
    return scaled(lambda: thing.scale), lambda new: setattr(thing, "scale", new)


def of_deque() -> Case:
    held = collections.deque([2.0])
    return scaled(lambda: held[0]), lambda new: held.__setitem__(0, new)


def of_set() -> Case:
    held = {2.0}
    return scaled(lambda: max(held)), lambda new: (held.clear(), held.add(new))


def of_mapping() -> Case:
    held = collections.UserDict(scale=2.0)
    seen = types.MappingProxyType({"outer": held})
    return scaled(lambda: seen["outer"]["scale"]), lambda new: held.__setitem__("scale", new)


def of_partial() -> Case:
    held = [2.0]
    function = functools.partial(lambda held, y, theta: (y - held[0] * theta) ** 2, held)
    return function, lambda new: held.__setitem__(0, new)


def of_closure_of_closures() -> Case:
    scale = 2.0

    def change(new: Any) -> None:
        nonlocal scale
        scale = new

    def wrapped(function: Any, depth: int) -> Any:
        return (lambda: wrapped(function, depth - 1)()) if depth else function

    return scaled(wrapped(lambda: scale, 6)), change


def of_dataclass() -> Case:
    settings = Settings()
    deep = settings.parts["deep"].scale
    return scaled(lambda: settings.parts["deep"].scale.scale), lambda new: setattr(deep, "scale", new)


def of_transformed() -> Case:
    thing = Inner(Inner(2.0))
    inner = jax.vmap(jax.jit(lambda theta: thing.scale.scale * theta))
    return lambda y, theta: (y - inner(theta)) ** 2, lambda new: setattr(thing.scale, "scale", new)


def of_attribute_of_function() -> Case:
    def objective(y: Any, theta: Any) -> Any:
        return (y - objective.scale * theta) ** 2  # type: ignore[attr-defined]

    objective.scale = 2.0  # type: ignore[attr-defined]
    return objective, lambda new: setattr(objective, "scale", new)


CASES = {name[3:]: value for name, value in list(globals().items()) if name.startswith("of_")}


@pytest.mark.parametrize("where", CASES)
def test_changed_value_makes_other_contents(where: str) -> None:
    """What decides whether a program is still good: the same as long as nothing changes, another when it does."""
    objective, change = CASES[where]()
    try:
        before = Contents([objective])
        assert before.unknown is None
        assert before == Contents([objective])
        change(3.0)
        assert before != Contents([objective])
    finally:
        change(2.0)


@pytest.mark.parametrize("where", ["attribute", "method", "module", "slot"])
def test_changed_value_is_seen(where: str) -> None:
    """The derivative of the minimum of (y − s θ)² is s, also where s was changed after the first call."""
    objective, change = CASES[where]()
    theta = jnp.asarray(1.5)
    try:
        for scale in (2.0, 3.0):
            change(scale)
            assert float(implicit_vjp(objective, scale * theta, theta, 1.0)) == pytest.approx(scale)
    finally:
        change(2.0)


class Opaque:
    """What it holds is in an iterator: nobody can compare it."""

    def __init__(self) -> None:
        self.values = iter(range(2, 10))


def test_what_cannot_be_compared_counts_as_changed() -> None:
    """It is compiled anew, which is told once, with the cure."""
    thing, theta = Opaque(), jnp.asarray(1.5)

    def objective(y: Any, theta: Any) -> Any:
        return (y - thing.scale * theta) ** 2  # type: ignore[attr-defined]

    def call(scale: float) -> float:
        thing.scale = scale  # type: ignore[attr-defined]
        return float(implicit_vjp(objective, scale * theta, theta, 1.0))

    assert call(2.0) == pytest.approx(2.0)
    with pytest.warns(RecompilationWarning, match=r"range_iterator.*\n.*args or theta"):
        assert call(3.0) == pytest.approx(3.0)
    assert call(4.0) == pytest.approx(4.0)  # and quietly


def test_linearization_stays_at_its_point() -> None:
    """Factors belong to the values that were there at the first product."""
    scale = [2.0]
    lin = linearize(lambda y, theta: (y - scale[0] * theta) ** 2, jnp.asarray(3.0), jnp.asarray(1.5))
    assert float(lin.vjp(1.0)) == pytest.approx(2.0)
    scale[0] = 5.0
    assert float(lin.vjp(2.0)) == pytest.approx(4.0)


def test_unchanged_values_are_equal() -> None:
    """Equal values in containers that are made anew, caches, locks and random sources at rest are no change."""
    source, lock = np.random.default_rng(0), threading.Lock()

    def objective(y: Any, theta: Any) -> Any:
        return (y - held["scale"] * theta * (source is not None) * lock.locked()) ** 2

    found = []
    for _ in range(2):
        held = collections.OrderedDict(scale=2.0, names={"a"}, span=range(3), at=slice(1, None), shape=(1, [2]))
        found.append(Contents([objective]))
    assert found[0] == found[1]
    source.normal()
    assert found[0] != Contents([objective])


def fresh_condition(theta: Any) -> Any:
    return lambda y, t: (y - 2 * t) ** 2, {}


def fresh_outer(theta: Any) -> Any:
    return CONDITION, {"outer": lambda y, t: 3 * y}


def fresh_value(theta: Any) -> Any:
    SEEN["scale"] += 1
    return lookup, {}


def fresh_solver(theta: Any) -> Any:
    return CONDITION, {"solver": CG(preconditioner=lambda v: v)}


def fresh_number(theta: Any) -> Any:
    SEEN["number"] += 1
    return with_number, {"args": (SEEN["number"],)}


SEEN = {"scale": 1, "number": 0}
CONDITION = Stationary(lambda y, t: (y - 2 * t) ** 2)


def lookup(y: Any, t: Any) -> Any:
    return (y - SEEN["scale"] * t) ** 2


def with_number(y: Any, t: Any, n: int) -> Any:
    return (y - 2 * t) ** 2 * (n > 0)


@pytest.mark.parametrize(
    ("fresh", "told"),
    [
        (
            fresh_condition,
            r"condition \(<lambda>, test_\w+\.py:\d+\) is another function at each call.*\n.*make it once",
        ),
        (fresh_outer, r"outer \(<lambda>, test_\w+\.py:\d+\) is another function.*\n.*args or theta"),
        (fresh_value, r"see another value, beside their arguments, at each call.*\n.*args or theta"),
        (fresh_solver, r"solver is another object at each call.*\n.*make it"),
        (fresh_number, r"args holds 3, which is part of the program"),
    ],
)
def test_programs_that_never_run_twice_are_told(
    fresh: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Compiled anew at every call for a reason that can be mended: told once, with what to do."""
    monkeypatch.setattr("implicitdiff.backends.jax.repeats.MANY", 2)
    theta = jnp.asarray(1.5)

    def call() -> None:
        condition, options = fresh(theta)
        outer = options.pop("outer", None)
        problem = problem_of(condition, theta, theta, **{"solver": "lu", **options})
        programs.program_for(programs.call_for(problem, "vjp", (theta, theta), outer=outer), fresh)

    call()
    call()
    with pytest.warns(RecompilationWarning, match=told):
        call()
    call()  # and quietly


def test_programs_that_run_again_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions from one factory, each used twice."""
    monkeypatch.setattr("implicitdiff.backends.jax.repeats.MANY", 2)
    theta = jnp.asarray(1.5)
    for scale in range(6):
        problem = Problem(get_backend("jax"), lambda y, t, scale=scale: (y - scale * t) ** 2, theta, theta)
        first, second = (programs.program_for(programs.call_for(problem, "vjp", (theta, theta)), 0) for _ in range(2))
        assert first is second
