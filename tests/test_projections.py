"""Projections and proximal operators: values against their definitions, properties, derivatives on every framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from conftest import LIBRARIES, Library
from frameworks import EACH, framework
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdiff import InputError
from implicitdiff.projections import affine, ball, box, l1_ball, simplex
from implicitdiff.proxes import elastic_net, group_lasso, lasso, ridge

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
N, GROUPS = 6, (0, 0, 1, 1, 1, 2)
ROWS = np.array([[1.0, 2.0, 0.0, -1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0, -2.0, 0.3]])
CENTER = np.array([0.1, -0.2, 0.3, 0.0, 0.2, -0.1])
STEP = 0.7

# (x, t) -> P(x) with a number t of the set or the penalty; arrays that go in are made by the first argument
PROJECTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "box": lambda array, x, t: box(x, -t, 2 * t),
    "half open": lambda array, x, t: box(x, t),
    "ball": lambda array, x, t: ball(x, radius=t, center=array(CENTER)),
    "simplex": lambda array, x, t: simplex(x, total=t),
    "l1 ball": lambda array, x, t: l1_ball(x, radius=t),
    "affine": lambda array, x, t: affine(x, array(ROWS), t * array(ROWS[:, 0])),
}
PROXES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "lasso": lambda array, x, t: lasso(x, t, STEP),
    "ridge": lambda array, x, t: ridge(x, t, STEP),
    "elastic net": lambda array, x, t: elastic_net(x, t, 2 * t, STEP),
    "group lasso": lambda array, x, t: group_lasso(x, t, STEP, groups=GROUPS),
    "one group": lambda array, x, t: group_lasso(x, t, STEP),
}
ALL = {**PROJECTIONS, **PROXES}
PENALTIES: dict[str, Callable[[np.ndarray, float], float]] = {
    "lasso": lambda y, t: t * np.abs(y).sum(),
    "ridge": lambda y, t: 0.5 * t * (y @ y),
    "elastic net": lambda y, t: t * np.abs(y).sum() + t * (y @ y),
    "group lasso": lambda y, t: t * sum(np.linalg.norm(y[np.array(GROUPS) == g]) for g in range(3)),
    "one group": lambda y, t: t * np.linalg.norm(y),
}


def point(seed: int) -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=N) * rng.choice([0.3, 1.5]), float(rng.uniform(0.3, 2.0))


def numpy(name: str, x: np.ndarray, t: Any) -> np.ndarray:
    return ALL[name](np.asarray, x, t)


def feasible(name: str, y: np.ndarray, t: float) -> float:
    """By how much y misses the set."""
    return {
        "box": lambda: max((-t - y).max(), (y - 2 * t).max()),
        "half open": lambda: (t - y).max(),
        "ball": lambda: np.linalg.norm(y - CENTER) - t,
        "simplex": lambda: max((-y).max(), abs(y.sum() - t)),
        "l1 ball": lambda: np.abs(y).sum() - t,
        "affine": lambda: np.abs(ROWS @ y - t * ROWS[:, 0]).max(),
    }[name]()


# -- values ------------------------------------------------------------------------------------------
def member(name: str, t: float, rng: np.random.Generator) -> np.ndarray:
    """Return a point of the set, at random."""
    w = rng.dirichlet(np.ones(N)) * t
    inner = rng.normal(size=N)
    null = inner - np.linalg.pinv(ROWS) @ (ROWS @ inner)
    return {
        "box": lambda: rng.uniform(-t, 2 * t, N),
        "half open": lambda: t + rng.exponential(size=N),
        "ball": lambda: CENTER + inner / np.linalg.norm(inner) * t * rng.uniform(),
        "simplex": lambda: w,
        "l1 ball": lambda: w * rng.choice([-1.0, 1.0], N) * rng.uniform(),
        "affine": lambda: np.linalg.pinv(ROWS) @ (t * ROWS[:, 0]) + null,
    }[name]()


@pytest.mark.parametrize("name", list(PROJECTIONS))
@PROPERTY
@given(seed=SEEDS)
def test_projection_is_the_nearest_point(name: str, seed: int) -> None:
    """y is in the set, and ⟨x − y, z − y⟩ <= 0 for every z of it: that characterises the projection."""
    x, t = point(seed)
    y = numpy(name, x, t)
    assert feasible(name, y, t) <= 1e-12
    rng = np.random.default_rng(seed + 1)
    assert max((x - y) @ (member(name, t, rng) - y) for _ in range(50)) <= 1e-10


@pytest.mark.parametrize("name", list(PROJECTIONS))
@PROPERTY
@given(seed=SEEDS)
def test_projections_are_idempotent(name: str, seed: int) -> None:
    x, t = point(seed)
    y = numpy(name, x, t)
    np.testing.assert_allclose(numpy(name, y, t), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", list(ALL))
@PROPERTY
@given(seed=SEEDS)
def test_firmly_nonexpansive(name: str, seed: int) -> None:
    """‖P a − P b‖² <= ⟨P a − P b, a − b⟩: so are all proximal operators of convex functions."""
    a, t = point(seed)
    b = point(seed + 1)[0]
    d = numpy(name, a, t) - numpy(name, b, t)
    assert d @ d <= d @ (a - b) + 1e-12


@pytest.mark.parametrize("name", list(PROXES))
@PROPERTY
@given(seed=SEEDS)
def test_prox_minimises(name: str, seed: int) -> None:
    """No point nearby is better, in steps of all sizes: of a convex function that is the minimum."""
    x, t = point(seed)
    y, rng = numpy(name, x, t), np.random.default_rng(seed)

    def value(z: np.ndarray) -> float:
        return STEP * PENALTIES[name](z, t) + 0.5 * ((z - x) ** 2).sum()

    moves = [size * rng.normal(size=N) * rng.choice([0, 1], N) for size in (1e-4, 1e-2, 1.0) for _ in range(20)]
    assert all(value(y) <= value(y + d) + 1e-13 for d in moves)


@PROPERTY
@given(seed=SEEDS)
def test_moreau_identity(seed: int) -> None:
    """x = prox_r(x) + prox_r*(x), where r* of a norm is the indicator of the unit ball of the dual norm."""
    x, t = point(seed)
    np.testing.assert_allclose(lasso(x, t) + box(x, -t, t), x, rtol=0, atol=1e-15)
    np.testing.assert_allclose(group_lasso(x, t) + ball(x, radius=t), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_simplex_against_a_solver(seed: int) -> None:
    x, t = point(seed)
    found = scipy.optimize.minimize(
        lambda y: ((y - x) ** 2).sum(), np.full(N, t / N), jac=lambda y: 2 * (y - x), bounds=[(0, None)] * N,
        constraints={"type": "eq", "fun": lambda y: y.sum() - t}, method="SLSQP", options={"ftol": 1e-15},
    )  # fmt: skip
    np.testing.assert_allclose(simplex(x, total=t), found.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8, 1e17])
def test_simplex_far_from_the_origin(offset: float) -> None:
    """The sum is right wherever x lies."""
    y = simplex(offset + np.array([2.0, 1.0, 4.0, -3.0]))
    assert abs(y.sum() - 1) <= 1e-15
    assert np.all(y >= 0)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_norms_neither_overflow_nor_vanish(size: float) -> None:
    x = size * np.array([3.0, 4.0])
    np.testing.assert_allclose(ball(x, radius=size), size * np.array([0.6, 0.8]), rtol=1e-15)
    np.testing.assert_allclose(group_lasso(x, size), size * np.array([2.4, 3.2]), rtol=1e-15)


def test_penalties_of_each_coordinate_and_group() -> None:
    x = np.array([3.0, -3.0, 1.0])
    np.testing.assert_array_equal(lasso(x, np.array([1.0, 0.0, 2.0])), [2.0, -3.0, 0.0])
    np.testing.assert_array_equal(ridge(x, np.array([1.0, 0.0, 3.0])), [1.5, -3.0, 0.25])
    np.testing.assert_array_equal(group_lasso(x, np.array([1.0, 2.0]), groups=[0, 1, 1])[:1], [2.0])
    shrunk = 1 - 2.0 / np.sqrt(10)
    np.testing.assert_allclose(group_lasso(x, np.array([1.0, 2.0]), groups=[0, 1, 1])[1:], shrunk * x[1:])
    rows = np.array([[3.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(group_lasso(rows, np.array([1.0, 9.0])), [[2.4, 3.2], [0.0, 0.0]])
    np.testing.assert_allclose(simplex(rows, total=np.array([1.0, 2.0])).sum(-1), [1.0, 2.0])
    np.testing.assert_allclose(np.linalg.norm(ball(rows, radius=np.array([1.0, 2.0])), axis=-1), [1.0, 2.0])


@pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.name)
@pytest.mark.parametrize("name", list(ALL))
def test_every_library(name: str, lib: Library) -> None:
    """The same numbers, type and dtype on every library; leading axes are independent vectors."""
    x = np.random.default_rng(5).normal(size=(2, 3, N))
    for values in (x[0, 0], x[0], x):
        found = ALL[name](lib.array, lib.array(values), 0.8)
        assert lib.owns(found)
        each = np.stack([numpy(name, row, 0.8) for row in values.reshape(-1, N)]).reshape(values.shape)
        np.testing.assert_allclose(lib.numpy(found), each, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ball", "affine"}))
def test_single_precision_stays(name: str, lib: Library) -> None:
    x = lib.array(point(1)[0], dtype="float32")
    assert ALL[name](lib.array, x, 0.8).dtype == x.dtype


def test_negative_numbers_are_refused() -> None:
    x = np.ones(3)
    for call in (
        lambda: simplex(x, total=-1.0), lambda: ball(x, radius=-1.0), lambda: l1_ball(x, radius=-1.0),
        lambda: lasso(x, -1.0), lambda: ridge(x, -1.0), lambda: elastic_net(x, 1.0, -1.0), lambda: group_lasso(x, -1.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"is -1\.0; expected a number >= 0"):
            call()


@pytest.mark.parametrize("groups", [[0, 1], [0, 1, -1], [0.0, 1.0, 1.0]])
def test_groups_are_checked(groups: list[Any]) -> None:
    with pytest.raises(InputError, match="expected 3 integers"):
        group_lasso(np.ones(3), 1.0, groups=groups)


def test_numbers_are_no_second_argument() -> None:
    """``projection=simplex`` would be called with theta as its second argument: told, not taken for the total."""
    for function in (simplex, ball, l1_ball):
        with pytest.raises(TypeError):
            function(np.ones(3), np.ones(3))  # type: ignore[misc]


# -- derivatives -------------------------------------------------------------------------------------
def differences(name: str, x: np.ndarray, t: float, h: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    by_x = [(numpy(name, x + h * e, t) - numpy(name, x - h * e, t)) / (2 * h) for e in np.eye(N)]
    return np.stack(by_x, -1), (numpy(name, x, t + h) - numpy(name, x, t - h)) / (2 * h)


@EACH
@pytest.mark.parametrize("function", list(ALL))
@pytest.mark.parametrize("seed", [0, 3])
def test_derivatives_of_frameworks(name: str, function: str, seed: int) -> None:
    """Forward and reverse, in x and in the number, compiled and under vmap."""
    fw = framework(name)
    x, t = point(seed)

    def array(values: Any) -> Any:
        return fw.xp.asarray(np.asarray(values))

    def f(x: Any, t: Any) -> Any:
        return ALL[function](array, x, t)

    truth = differences(function, x, t)
    transforms = fw.transforms()
    whole = fw.compiled if name == "jax" else lambda g: g  # operation by operation it compiles for seconds
    for jacobian in (transforms["jacfwd"], transforms["jacrev"]):
        found = whole(jacobian(f, argnums=(0, 1)))(array(x), array(t))
        for a, b in zip(found, truth, strict=True):
            np.testing.assert_allclose(fw.numpy(a), b, rtol=0, atol=2e-9)
    rows = np.random.default_rng(1).normal(size=(3, N))
    mapped = whole(transforms["vmap"](lambda x: f(x, array(t))))(array(rows))
    np.testing.assert_allclose(fw.numpy(mapped), numpy(function, rows, t), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(fw.numpy(fw.compiled(f)(array(x), array(t))), numpy(function, x, t), atol=1e-14)


@pytest.mark.parametrize("function", list(ALL))
def test_derivatives_of_autograd(function: str) -> None:
    autograd = pytest.importorskip("autograd")
    x, t = point(3)
    by_x, by_t = differences(function, x, t)
    found = autograd.jacobian(lambda x: numpy(function, x, t) + 0 * x)(x)
    np.testing.assert_allclose(found, by_x, rtol=0, atol=2e-9)
    found = autograd.jacobian(lambda t: numpy(function, x, t) + 0 * t)(t)
    np.testing.assert_allclose(found, by_t, rtol=0, atol=2e-9)


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize("function", list(ALL))
def test_no_nan_at_the_origin(name: str, function: str) -> None:
    """Where a norm has no derivative, at x = 0 and at the centre, the function has one, or a one-sided one."""
    fw = framework(name)
    array, jacrev = fw.xp.asarray, fw.transforms()["jacrev"]
    for x in (np.zeros(N), CENTER):
        first = jacrev(lambda x: ALL[function](array, x, 0.5))
        assert np.all(np.isfinite(fw.numpy(first(array(x)))))
        second = jacrev(first)(array(x)) + array(np.zeros((N, N, N)))  # Torch may hand out zeros without memory
        assert np.all(np.isfinite(fw.numpy(second)))


def test_import_needs_no_framework() -> None:
    """The modules import NumPy alone, and find the library of an array when they see one."""
    for name in ("implicitdiff.projections", "implicitdiff.proxes"):
        assert set(importlib.import_module(name).__all__) <= set(dir(importlib.import_module(name)))
