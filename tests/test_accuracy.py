"""What the accuracy of A leaves of a derivative: few digits are told, none is an error."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import NUMPY, PLAIN, Library, assert_right, assert_told, outcome, with_condition

from implicitdiff import (
    AccuracyWarning,
    FixedPoint,
    NoiseError,
    Root,
    SingularError,
    Stationary,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
)
from implicitdiff.arrays import probe_vector
from implicitdiff.backends.noise import noise_along
from implicitdiff.backends.numpy import NumpyBackend

TOLD = (AccuracyWarning, NoiseError, SingularError)
NUMERIC = NumpyBackend("finite_differences")


# -- rounding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_null_vector_beside_the_first_probe_is_seen(sparse: bool) -> None:
    """A = I − u uᵀ (1 − 1e-9), u orthogonal to the vector on which A⁻¹ is seen first."""
    n = 12
    z = probe_vector(np, n, np.float64, None)
    u = np.linalg.qr(np.stack([z, np.ones(n)], axis=1))[0][:, 1]
    a = (np.eye(n) - (1 - 1e-9) * np.outer(u, u)).astype(np.float32)
    a = scipy.sparse.csc_array(a) if sparse else a
    found = outcome(lambda: linear_solve(a, z.astype(np.float32), solver="lu", symmetric=True))
    assert_told(found, SingularError, "rcond")


@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
@pytest.mark.parametrize("solver", ["lu", "cholesky", "cg", "minres", "gmres"])
def test_few_digits_in_single_precision_are_told(lib: Library, solver: str) -> None:
    for condition, told in ((1e4, False), (2e6, True)):
        A, b = with_condition(5, condition, 1, dtype="float32")
        H, v = lib.array(A), lib.array(b)
        y = lib.array(np.linalg.solve(A.astype(float), b).astype("float32"))
        problem = Stationary(grad=lambda y, t, H=H: H @ y - t, hvp=lambda y, t, w, H=H: H @ w, verify=False)
        found = outcome(lambda p=problem, y=y, v=v: implicit_vjp(p, y, v, v, solver=solver))
        if told:
            assert_told(found, TOLD, "condition number|singular")
        else:
            assert found.quiet, found.text


def test_what_is_left_of_a_difference_from_one_is_known_to_the_rounding_of_one() -> None:
    """I − ∂T with an entry of 1e-5 on the diagonal, scaled up: of that 6e-8 is 0.6 %, whatever the condition number."""
    J = np.diag([0.5, 1 - 1e-5]).astype(np.float32)
    T = FixedPoint(lambda y, t: J @ (y - t) + t, jacobian=lambda y, t: J, verify=False)
    one = np.ones(2, dtype=np.float32)
    found = outcome(lambda: implicit_jvp(T, one, one, one, solver="lu"))
    assert_told(found, AccuracyWarning, "may be off by")


# -- noise ---------------------------------------------------------------------------------------------------------
def noisy(level: float) -> Any:
    """Return what makes a function noisy, the same at the same point."""

    def distort(x: Any) -> Any:
        x = np.asarray(x, dtype=float)
        source = np.random.default_rng(zlib.crc32(x.tobytes()))
        return x + level * source.uniform(-1, 1, x.shape)

    return distort


@pytest.mark.parametrize("solver", ["gmres", "lu"])
@pytest.mark.parametrize("level", [1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("values", [False, True], ids=["F", "f"])
def test_60_noise_times_the_condition_number(solver: str, level: float, values: bool) -> None:
    """Never zeros, never a number with an error that is not told."""
    A, b = with_condition(5, 3e3, 3)
    y, noise = np.linalg.solve(A, b), noisy(level)
    problem: Any = Root(lambda y, t: noise(A @ y + 0.01 * np.sin(y) - t))
    if values:
        problem = Stationary(lambda y, t: noise(y @ A @ y / 2 - 0.01 * np.sum(np.cos(y)) - y @ t)[()])
    theta, v = A @ y + 0.01 * np.sin(y), np.ones(5)
    found = outcome(lambda: implicit_vjp(problem, y, theta, v, solver=solver, backend=NUMERIC))
    truth = np.linalg.solve(A + np.diag(0.01 * np.cos(y)), v)
    if found.quiet:
        assert_right(NUMPY, found, truth, 0.01)
    else:
        assert_told(found, (*TOLD,), "noise|singular|steps")


def test_60_steps_do_not_reach_beyond_what_noise_hides() -> None:
    """The slope over a step of many times y is another one than at y, however well it stands above the noise."""
    noise = noisy(1e-2)
    problem = Root(lambda y, t: noise(0.05 * (y - 0.9 * np.sin(y)) - t))
    y = np.array([0.7, -0.8, 0.9])
    found = outcome(lambda: implicit_jvp(problem, y, 0.05 * (y - 0.9 * np.sin(y)), np.ones(3), backend=NUMERIC))
    assert_told(found, TOLD, "noise|singular")


def test_noise_that_leaves_two_digits_is_told_with_the_value() -> None:
    A, b = with_condition(4, 1e3, 5)
    y, noise = np.linalg.solve(A, b), noisy(1e-5)
    problem = Root(lambda y, t: noise(A @ y - t))
    for solver in ("lu", "gmres"):
        found = outcome(lambda s=solver: implicit_vjp(problem, y, A @ y, np.ones(4), solver=s, backend=NUMERIC))
        assert found.quiet or found.error is None


def test_60_rounding_in_step_with_the_values() -> None:
    """Values that are apart by whole multiples of what they are rounded to look exact; equal ones nearer by do not."""
    least = np.array([1e-16])
    found = noise_along(np, lambda t: np.round(np.array([0.3 + 16e4 * t])) * 2e-3, np.array([0.0]), least)
    assert 1e-4 < found[0] < 2e-3
