"""FAULTS 77: curvature that contradicts what a stationary point is said to be is told; what is said is checked."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import JAX, NUMPY, STRICT, TORCH, outcome

import implicitdiff as idf
from implicitdiff import RegularityWarning, Stationary

POINTS = {"minimum": (1.0, 2.0, 3.0), "maximum": (-1.0, -2.0, -3.0), "saddle": (1.0, 2.0, -3.0)}
NEITHER = "neither a minimum nor a maximum: the Hessian has directions of negative and of positive"
TOLD = {
    (None, "saddle"): NEITHER,
    ("minimum", "maximum"): "no minimum: the Hessian has directions of negative",
    ("minimum", "saddle"): "no minimum: the Hessian has directions of negative",
    ("maximum", "minimum"): "no maximum: the Hessian has directions of positive",
    ("maximum", "saddle"): "no maximum: the Hessian has directions of positive",
}


def at_point(lib, point, kind, *, size=1, scale=1.0, call=idf.implicit_vjp, **options):
    """The derivative at the stationary point of ½ yᵀ D y − y'θ, with D of these signs."""
    values = np.repeat(POINTS[point], size) * scale
    d = lib.array(values)
    condition = Stationary(
        grad=lambda y, t: d * y - t, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -u,
        mixed_jvp=lambda y, t, v: -v, kind=kind,
    )  # fmt: skip
    ones = np.ones(len(values))
    v = lib.array(np.resize([1.0, 0.5, 0.3], len(values)))
    return outcome(lambda: call(condition, lib.array(ones / values), lib.array(ones), v, **options))


def assert_as_told(found, kind, point):
    expected = TOLD.get((kind, point))
    assert found.error is None, found.text
    if expected is None:
        assert found.quiet, found.text
    else:
        assert [type(w) for w in found.warnings] == [RegularityWarning], found.text
        assert re.search(expected, found.text)
        assert len(str(found.warnings[0]).splitlines()) <= 5


@pytest.mark.parametrize("lib", [NUMPY, STRICT, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("kind", [None, "minimum", "maximum", "saddle"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("size", [1, 100], ids=["dense", "iterative"])
def test_what_is_said_is_checked(lib, kind, point, size):
    for call in (idf.implicit_vjp, idf.implicit_jvp):
        for scale in (1e-9, 1e9):
            assert_as_told(at_point(lib, point, kind, size=size, scale=scale, call=call), kind, point)
    if kind is None:  # who names a method for any matrix has thought of it
        assert at_point(lib, point, kind, size=size, solver="minres").quiet
    if size == 1 and kind == "minimum":
        assert_as_told(at_point(lib, point, kind, solver="lu"), kind, point)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize(("kind", "point"), [(None, "maximum"), (None, "saddle"), ("minimum", "saddle")])
def test_under_jax(lib, kind, point):
    assert_as_told(at_point(lib, point, kind), kind, point)


def test_large_without_a_matrix():
    for point in POINTS:
        assert_as_told(at_point(NUMPY, point, None, size=2000), None, point)


def test_items_of_a_batch():
    d = np.array([[1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    condition = Stationary(grad=lambda y, t: d * y - t, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -u)
    found = outcome(lambda: idf.implicit_vjp(condition, 1 / d, np.ones((3, 2)), np.ones((3, 2)), batched=True))
    assert_as_told(found, None, "saddle")
    assert "item 1:" in found.text


def test_a_network_that_stopped_early():
    """Least squares of two tanh units, long before they have settled: some curvature is negative."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=20)

    def f(w, t):
        fit = np.tanh(np.multiply.outer(x, w[:2])) @ w[2:]
        return ((fit - np.sin(2 * x) * t) ** 2).sum() / 2

    w, theta, minimum = np.array([0.05, -0.02, 0.03, 0.04]), np.array(1.0), Stationary(f, kind="minimum")
    found = outcome(lambda: idf.implicit_vjp(f, w, theta, np.ones(4)))
    assert "neither a minimum" in found.text
    assert "no minimum" in outcome(lambda: idf.implicit_vjp(minimum, w, theta, np.ones(4))).text


def test_kind_is_validated():
    with pytest.raises(idf.InputError, match="kind = 'min': expected one of None, 'minimum'"):
        Stationary(lambda y, t: y @ y, kind="min")
