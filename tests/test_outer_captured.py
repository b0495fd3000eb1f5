"""FAULTS 69: an outer loss that uses y or theta of the enclosing scope, beside its arguments, loses a term of dL/dθ."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from conftest import JAX, PLAIN, TORCH, Library, assert_told, outcome

from implicitdiff import DerivativeError, Root, implicit_grad

LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
IN_PLACE = pytest.mark.parametrize("lib", [*PLAIN[:1], *TORCH], ids=lambda lib: lib.name)
CONDITION = Root(lambda y, t: 2.0 * y - t)


class Holder:
    """An object with a loss."""

    def __init__(self, y: Any) -> None:
        self.held = {"y": [y]}

    def loss(self, y: Any, t: Any) -> Any:
        return (self.held["y"][0] * t).sum()


def made(lib: Library) -> tuple[Any, Any]:
    """Return y and theta."""
    theta = lib.array([1.0, 2.0, 3.0])
    return theta / 2, theta


def dot(a: Any, b: Any) -> Any:
    return (a * b).sum() if hasattr(a, "sum") else a.__array_namespace__().sum(a * b)


def called(lib: Library, outer: Any, y: Any, theta: Any) -> Any:
    return outcome(lambda: implicit_grad(CONDITION, outer, y, theta))


@LIBS
def test_the_term_that_is_lost_is_told(lib: Library) -> None:
    """The loss sees y beside theta, y beside its own y, theta beside its y."""
    y, theta = made(lib)
    assert_told(called(lib, lambda z, t: dot(y, t), y, theta), DerivativeError, "outer uses y from the enclosing scope")
    if lib in PLAIN:
        assert_told(called(lib, lambda z, t: dot(z, z) + dot(y, t), y, theta), DerivativeError, "outer uses y")
        assert_told(called(lib, lambda z, t: dot(z, theta), y, theta), DerivativeError, "outer uses theta")


@LIBS
def test_what_has_no_derivative_is_no_term(lib: Library) -> None:
    """A copy, and what is only looked at: its shape."""
    y, theta = made(lib)
    copy = lib.array(lib.numpy(y).copy())
    found = called(lib, lambda z, t: dot(z, t) + dot(copy, t) * y.shape[0], y, theta)
    assert found.quiet, found.text
    np.testing.assert_allclose(lib.numpy(found.value), lib.numpy(theta) / 2 + 4 * lib.numpy(y), rtol=1e-12)


@IN_PLACE
def test_wherever_it_is_seen(lib: Library) -> None:
    """In an object, a default, a partial function, another function, by another name and in another shape."""
    y, theta = made(lib)
    row = y.reshape((1, 3))
    inner = lambda t: dot(y, t)
    for outer in (
        Holder(y).loss, lambda z, t, known=y: dot(known, t), functools.partial(lambda w, z, t: dot(w, t), y),
        lambda z, t: inner(t), lambda z, t: dot(row[0], t),
    ):  # fmt: skip
        assert_told(called(lib, outer, y, theta), DerivativeError, "outer uses y")
    tree = {"a": y, "b": theta}
    condition = Root(lambda z, t: {"a": z["a"] - t / 2, "b": z["b"] - t})
    found = outcome(lambda: implicit_grad(condition, lambda z, t: dot(tree["a"], z["b"]), tree, lib.array([1.0, 2, 3])))
    assert_told(found, DerivativeError, "outer uses y")


@pytest.mark.skipif(not TORCH, reason="needs torch")
def test_under_a_transform_of_torch() -> None:
    import torch

    theta = made(TORCH[0])[1]

    def one(t: Any) -> Any:
        y = t / 2
        return implicit_grad(CONDITION, lambda z, s: (y * s).sum(), y, t)

    assert_told(outcome(lambda: torch.func.vmap(one)(torch.stack([theta, 2 * theta]))), DerivativeError, "outer uses y")


@pytest.mark.skipif(not JAX, reason="needs jax")
def test_while_jax_traces() -> None:
    import jax

    def gradient(t: Any) -> Any:
        y = t / 2
        return implicit_grad(CONDITION, lambda z, s: (y * s).sum(), y, t)

    assert_told(outcome(lambda: jax.jit(gradient)(made(JAX[0])[1])), DerivativeError, "outer uses y")
