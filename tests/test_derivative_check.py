"""`check_derivatives`: the table of everything that was given, on every framework and condition."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import JAX, NUMPY, STRICT, TORCH
from test_verification import RIGHT, WRONG, kind_of, parts

import implicitdiff as idf
from implicitdiff.backends.numpy import NumpyBackend

LIBRARIES = (NUMPY, STRICT, *TORCH)
each = pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.name)


ARGUMENTS = {"hvp", "mixed_vjp", "mixed_jvp", "jvp", "vjp", "jacobian"}


def check(condition, p, **options):
    return idf.check_derivatives(condition, p.y, p.theta[kind_of(condition)], **options)


@each
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_a_row(lib, name):
    make, head, cause = WRONG[name]
    p = parts(lib)
    found = check(make(p), p)
    assert not found.ok
    wrong = [row for row in found if row.verdict == "wrong" and row.against.startswith("differences")]
    named = [word.strip("^") for word in head.split()]
    assert {row.callable for row in wrong} == ARGUMENTS.intersection(named)
    assert all(row.difference > row.allowed for row in wrong)
    assert any(re.search(cause, row.cause) for row in wrong)
    assert "wrong" in str(found)


@each
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("items", [(), (3,)], ids=["one", "batch"])
def test_right_ones_are_ok(lib, name, items):
    p = parts(lib, items=items)
    found = check(RIGHT[name](p), p, batched=bool(items))
    assert found.ok
    assert len(found) >= 3
    assert {row.verdict for row in found} == {"ok"}
    assert all(row.difference < 1e-6 for row in found)
    if lib.name == "torch":
        assert any(row.callable.startswith("autodiff of") for row in found)


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_jax(lib):
    p = parts(lib)
    assert check(RIGHT["root"](p), p).ok
    make, _, _ = WRONG["jvp and vjp swapped"]
    found = check(make(p), p)
    assert {row.callable for row in found if row.cause} == {"jvp", "vjp"}
    assert all("swapped" in row.cause for row in found if row.cause)


def test_functions_and_transposes():
    f = lambda y, t: 0.5 * y @ y - y @ t
    skew = np.array([[1.0, 0.5], [-0.5, 1.0]])
    y = theta = np.array([1.0, 2.0])
    found = idf.check_derivatives(
        idf.Stationary(f, grad=lambda y, t: 2 * (y - t), hessian=lambda y, t: skew), y, theta
    )  # fmt: skip
    named = {(row.callable, row.against): row for row in found}
    assert named["grad", "differences of fun"].cause == "a factor of 2 too much"
    assert named["hessian", "its transpose"].verdict == "wrong"
    alone = idf.check_derivatives(f, y, theta, backend=NumpyBackend("finite_differences"))
    assert alone.ok
    assert "nothing to compare" in str(alone)


def test_noise_is_no_mistake():
    rng = np.random.default_rng(0)
    noisy = idf.Root(lambda y, t: y - t + rng.normal(size=2), jvp=lambda y, t, v: v)
    found = idf.check_derivatives(noisy, np.ones(2), np.ones(2), backend=NumpyBackend("finite_differences"))
    assert found.ok
    assert found[0].verdict == "unknown"


@pytest.mark.parametrize("lib", TORCH, ids=lambda lib: lib.name)
def test_conditions_with_constraints(lib):
    import torch

    class Lying(torch.autograd.Function):
        """y'y, with a gradient that is wrong."""

        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return (y * y).sum()

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0]

    y, theta = lib.array(np.array([0.5, 0.5])), lib.array(np.array(1.0))
    f, line = (lambda y, t: (y**2).sum()), (lambda y, t: y.sum() - t)
    found = idf.check_derivatives(idf.KKT(f, eq=line), y, theta)
    assert found.ok
    assert {row.against for row in found} == {"differences of f", "differences of eq"}
    found = idf.check_derivatives(idf.KKT(lambda y, t: Lying.apply(y), eq=line), y, theta)
    assert [row.callable for row in found if row.verdict == "wrong"] == ["autodiff of f (y)"]
    inside = idf.LogBarrier(f, ineq=lambda y, t: y - t, t=10.0)
    assert idf.check_derivatives(inside, y / 2, theta).ok
    box = idf.ProjectedGradient(f, lambda x, t: idf.projections.box(x, t, 2.0), hvp=lambda y, t, v: 4 * v)
    found = idf.check_derivatives(box, y, theta)
    assert [row.cause for row in found if row.callable == "hvp" and row.cause] == ["a factor of 2 too much"]
