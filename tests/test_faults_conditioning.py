"""FAULTS 12 to 18: ill-conditioned and badly scaled systems, the zero cotangent, the identity."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import (
    DIRECT,
    DOORS,
    ITERATIVE,
    NUMPY,
    PLAIN,
    SYMMETRIC_DOORS,
    assert_right,
    assert_told,
    condition_of,
    each_door,
    exact_solve,
    expected_through,
    outcome,
    relative_error,
    shift,
    solution_at,
    through,
    with_condition,
)

from implicitdiff import (
    AccuracyWarning,
    NotConvergedError,
    NotPositiveDefiniteError,
    SingularError,
    Stationary,
    implicit_grad,
    implicit_vjp,
    linear_solve,
)

two_libraries = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
TOLD = (NotConvergedError, SingularError, NotPositiveDefiniteError, AccuracyWarning)
CAUSE = r"residual|rcond|not positive definite|condition number"
SMALL_RESIDUAL = {"float64": 1e-10, "float32": 1e-5}  # the documented default of the iterative methods


def residual_of(lib, door, A, b, x) -> float:
    """Relative residual of what a door returned, in extended precision."""
    x = lib.numpy(x).astype(np.longdouble)
    reverse = door.startswith(("vjp", "grad"))
    x = shift(len(b)) @ x if reverse else x
    wide = (A.T if reverse else A).astype(np.longdouble)
    b = b.astype(np.longdouble)
    return float(np.linalg.norm(b - wide @ x) / np.linalg.norm(b))


def rounding_of(A, b, x) -> float:
    """eps ‖A‖ ‖x‖ / ‖b‖: the residual that rounding in one product makes."""
    eps = float(np.finfo(A.dtype).eps)
    return eps * np.linalg.norm(A.astype(float), 2) * float(np.linalg.norm(x) / np.linalg.norm(b))


# -- 12 and 13: hard, at the two precisions ------------------------------------------------------------------------
FEW_DIGITS: dict[str, tuple[type[Warning], ...]] = {"float64": (), "float32": (AccuracyWarning,)}
PRECISIONS = [("float64", 1e10, 1e-6), ("float32", 1e6, 1e-2)]


@each_door(*DOORS)
@pytest.mark.parametrize(("dtype", "condition", "rtol"), PRECISIONS, ids=["12-float64", "13-float32"])
@pytest.mark.parametrize("name", DIRECT)
def test_12_13_direct_solvers(lib, door, dtype, condition, rtol, name):
    if "fixed-point" in door:
        rtol *= 10  # y − T cancels: A = I − ∂T is known to eps of 1, not of its smallest part
        condition = min(condition, 2e5 if dtype == "float32" else condition)  # and 3 % by rounding is called singular
    for seed in range(3):
        A, b = with_condition(10, condition, seed, dtype=dtype)
        found = through(lib, door, A, b, name, dtype=dtype)
        # in single precision that is as much as rounding leaves of A, and may be said
        assert_right(lib, found.but(*FEW_DIGITS[dtype]), expected_through(door, A, b), rtol)


@each_door("solve:matrix", "vjp:hvp", "jvp:root", "vjp:adjoint")
@pytest.mark.parametrize(("dtype", "condition", "rtol"), PRECISIONS, ids=["12-float64", "13-float32"])
def test_12_13_iterative_solvers(lib, door, dtype, condition, rtol, solver):
    A, b = with_condition(10, condition, 12, dtype=dtype)
    found = through(lib, door, A, b, solver, dtype=dtype).but(*FEW_DIGITS[dtype])
    if not found.quiet:
        assert solver in ITERATIVE, found.text
        assert_told(found, TOLD, CAUSE)
        return
    residual = residual_of(lib, door, A, b, found.value)
    assert residual <= max(SMALL_RESIDUAL[dtype], 10 * rounding_of(A, b, lib.numpy(found.value)))


# -- 14: the default settings --------------------------------------------------------------------------------------
@two_libraries
@pytest.mark.parametrize("exponent", range(2, 9))
def test_14_default_settings(lib, exponent, solver):
    door = "vjp:hvp" if exponent % 2 else "vjp:root"
    for seed in range(10):
        A, b = with_condition(16, 10.0**exponent, seed)
        check_default(lib, through(lib, door, A, b, solver), expected_through(door, A, b), exponent)


@two_libraries
@pytest.mark.parametrize("exponent", range(2, 9))
@pytest.mark.parametrize(
    ("kind", "name"),
    [("indefinite", "minres"), ("indefinite", "lu"), ("indefinite", "auto"), ("general", "gmres"), ("general", "auto"),
     ("general", "lu")],
)  # fmt: skip
def test_14_default_settings_beyond_definite(lib, kind, name, exponent):
    door = "jvp:hvp" if kind == "indefinite" else "vjp:jacobian"
    for seed in range(10):
        A, b = with_condition(16, 10.0**exponent, seed, kind=kind)
        check_default(lib, through(lib, door, A, b, name), expected_through(door, A, b), exponent)


@pytest.mark.parametrize("exponent", [2, 4, 6, 8])
def test_14_auto_beyond_the_dense_limit(exponent):
    lib = NUMPY
    A, b = with_condition(300, 10.0**exponent, 14)
    check_default(lib, through(lib, "vjp:hvp", A, b, "auto"), expected_through("vjp:hvp", A, b), exponent)


@pytest.mark.parametrize("exponent", range(2, 7))
def test_14_default_settings_float32(exponent, solver):
    lib = NUMPY
    for seed in range(10):
        A, b = with_condition(16, 10.0**exponent, seed, dtype="float32")
        found = through(lib, "vjp:hvp", A, b, solver, dtype="float32")
        if not found.quiet:
            assert exponent > 2, f"false alarm: {found.text}"
            assert_told(found, TOLD, CAUSE)
            continue
        error = relative_error(lib, found.value, expected_through("vjp:hvp", A, b))
        # 1e-5 on the residual allows 1e-5 κ: 1 % is promised as far as κ = 1e3
        assert error <= max(1e-2, 1e-5 * 10.0**exponent), f"silently wrong by {error:.2g} (seed {seed})"


def check_default(lib, found, truth, exponent):
    """No silent error above 1 %, no alarm up to condition 1e4."""
    if not found.quiet:
        assert exponent > 4, f"false alarm: {found.text}"
        assert_told(found, TOLD, CAUSE)
        return
    error = relative_error(lib, found.value, truth)
    assert error <= 1e-2, f"silently wrong by {error:.2g}"


# -- 15 and 16: scale ----------------------------------------------------------------------------------------------
SCALES = [("float64", s) for s in (1e-300, 1e-30, 1e30, 1e300)]
SCALES += [("float32", s) for s in (1e-24, 1e20)]


@each_door(*SYMMETRIC_DOORS, "solve:matrix", "vjp:root", "grad:jacobian", "vjp:fixed-point")
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=[f"{d}-{s:g}" for d, s in SCALES])
def test_15_scaled_right_hand_side(lib, door, dtype, scale, solver):
    A, b = with_condition(8, 10.0, 15, dtype=dtype)
    b = (b * scale).astype(dtype)
    found = through(lib, door, A, b, solver, dtype=dtype)
    assert_right(lib, found, expected_through(door, A, b), 1e-8 if dtype == "float64" else 3e-4)


@each_door(*SYMMETRIC_DOORS, "solve:matrix", "solve:callable", "solve:sparse", "vjp:root", "jvp:sparse-jacobian")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_16_scaled_operator(lib, door, dtype, scale, solver):
    A, b = with_condition(8, 10.0, 16, dtype=dtype)
    A = (A * scale).astype(dtype)
    found = through(lib, door, A, b, solver, dtype=dtype)
    assert_right(lib, found, expected_through(door, A, b), 1e-8 if dtype == "float64" else 3e-4)


@two_libraries
def test_16_derived_derivatives_of_a_scaled_objective(lib, xp, solver):
    """The same where nothing is given but f; autodiff or differences, the scale of f drops out of dy/dθ."""
    for scale in (1e-12, 1e12):
        condition = Stationary(lambda y, t, s=scale: s * xp.sum((y - t * t) ** 2 * xp.asarray([1.0, 2.0, 5.0])))
        theta = np.array([1.0, 2.0, -0.5])
        y, v = theta**2, np.array([1.0, -1.0, 2.0])
        found = outcome(lambda c=condition: implicit_vjp(c, *(lib.array(x) for x in (y, theta, v)), solver=solver))
        assert_right(lib, found, 2 * theta * v, 1e-5)


# -- 17: nothing to solve ------------------------------------------------------------------------------------------
@each_door(*DOORS)
@pytest.mark.parametrize("kind", ["definite", "singular", "negative"])
def test_17_zero_right_hand_side(lib, door, kind, solver):
    A = with_condition(5, 10.0, 17)[0]
    A = {"definite": A, "negative": -A, "singular": np.diag([1.0, 1.0, 0.0, 1.0, 2.0])}[kind]
    found = through(lib, door, A, np.zeros(5), solver, return_report=True)
    assert found.quiet, found.text
    value, report = found.value
    assert np.array_equal(lib.numpy(value), np.zeros(5))
    assert (report.iterations, report.residual, report.converged) == (0, 0.0, True)


@two_libraries
def test_17_loss_that_ignores_y(lib, xp, solver):
    A, C, theta = with_condition(4, 10.0, 17)[0], shift(4), np.array([1.0, 2.0, 3.0, 4.0])
    y = exact_solve(A, C @ theta)
    call = (condition_of(lib, "hvp", A, C), lambda y, t: xp.sum(t**3), lib.array(y), lib.array(theta))
    assert_right(lib, outcome(lambda: implicit_grad(*call, solver=solver)), 3 * theta**2, 1e-8)


# -- 18: one iteration ---------------------------------------------------------------------------------------------
@each_door(*DOORS)
@pytest.mark.parametrize(("n", "factor"), [(1, 3.0), (2, 1.0), (5, 3.0)])
def test_18_identity(lib, door, n, factor, solver):
    A, b = factor * np.eye(n), solution_at(n)
    found = through(lib, door, A, b, solver, return_report=True)
    assert found.quiet, found.text
    value, report = found.value
    reverse = door.startswith(("vjp", "grad"))
    truth = (shift(n).T @ b if reverse else b) / factor
    assert relative_error(lib, value, truth) <= 1e-14
    assert report.iterations == (1 if solver in ITERATIVE else 0)


@two_libraries
def test_18_identity_from_the_answer(lib, solver):
    """A start that already is the solution needs no iteration and stays what it is."""
    M, b = lib.array(np.eye(4)), solution_at(4)
    options = {"solver": solver, "x0": lib.array(b), "return_report": True}
    found = outcome(lambda: linear_solve(M, lib.array(b), **options))
    assert found.quiet, found.text
    assert relative_error(lib, found.value[0], b) <= 1e-15
    assert found.value[1].iterations == 0
