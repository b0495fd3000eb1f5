"""FAULTS 19 to 22: a point that is no solution, false alarms about one that is, expansive fixed points."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.optimize
from conftest import (
    PLAIN,
    SHORT,
    SYMMETRIC_ONLY,
    assert_right,
    assert_right_or_told,
    assert_told,
    condition_of,
    each_door,
    exact_solve,
    outcome,
    relative_error,
    shift,
    solution_at,
    with_condition,
)

from implicitdiff import (
    FixedPoint,
    NotASolutionWarning,
    Root,
    SolveError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jvp,
    implicit_vjp,
    linearize,
)

two_libraries = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
FORMS = ("hvp", "hessian", "root", "adjoint", "jacobian", "fixed-point")
PRINTED = r"F\(y, theta\)‖ = (\d\.?\d*(e[+-]\d+)?)"


def displaced(n: int, size: float, *, scale: float = 1.0, seed: int = 0):
    """A, C, θ, and a y at which ‖A y − C θ‖ = size · scale."""
    A, b = with_condition(n, 10.0, seed)
    C = shift(n)
    theta = C.T @ (A @ solution_at(n))
    y = solution_at(n) + exact_solve(A, size * b / np.linalg.norm(b))
    return scale * A, scale * C, theta, y


# -- 19: not a solution --------------------------------------------------------------------------------------------
@two_libraries
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_19_not_a_solution(lib, form, size, solver):
    A, C, theta, y = displaced(5, size)
    condition, arrays = condition_of(lib, form, A, C), [lib.array(x) for x in (y, theta)]
    v = np.array([1.0, -1.0, 2.0, 0.5, 0.0])
    for call, truth in ((implicit_vjp, C.T @ exact_solve(A.T, v)), (implicit_jvp, exact_solve(A, C @ v))):
        found = outcome(lambda call=call: call(condition, *arrays, lib.array(v), solver=solver, return_report=True))
        assert_told(found, NotASolutionWarning, PRINTED)
        assert len(found.warnings) == 1
        assert float(re.search(PRINTED, found.text)[1]) == pytest.approx(size, rel=1e-2)
        value, report = found.value  # F is affine, so the derivative is right all the same
        assert relative_error(lib, value, truth) <= 1e-8
        assert report.stationarity == pytest.approx(size, rel=1e-6)


@two_libraries
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_19_whatever_the_scale_of_f(lib, scale, solver):
    for size in (0.1, 1.0):
        A, C, theta, y = displaced(5, size, scale=scale)
        arrays = [lib.array(x) for x in (y, theta, np.ones(5))]
        found = outcome(lambda a=arrays: implicit_vjp(condition_of(lib, "hvp", A, C), *a, solver=solver))
        assert_told(found, NotASolutionWarning, "y is not a solution")


@two_libraries
def test_19_only_the_objective_known(lib, xp, solver):
    condition = Stationary(lambda y, t: xp.sum((y - t) ** 4 / 4 + (y - t) ** 2 / 2))
    y, theta, v = lib.array([1.1, 2.0]), lib.array([1.0, 2.0]), lib.array([1.0, 1.0])
    found = outcome(lambda: implicit_vjp(condition, y, theta, v, solver=solver))
    assert_told(found, NotASolutionWarning, PRINTED)
    assert float(re.search(PRINTED, found.text)[1]) == pytest.approx(0.101, rel=1e-2)


@two_libraries
def test_19_item_of_a_batch(lib, solver):
    condition = Stationary(
        grad=lambda y, t: 2.0 * (y - t), hvp=lambda y, t, v: 2.0 * v, mixed_vjp=lambda y, t, u: -2.0 * u
    )
    theta = np.arange(6.0).reshape(3, 2)
    y = theta + np.array([[0.0, 0.0], [0.0, 0.05], [0.0, 0.0]])
    arrays = [lib.array(x) for x in (y, theta, np.ones((3, 2)))]
    found = outcome(lambda: implicit_vjp(condition, *arrays, solver=solver, batched=True))
    assert_told(found, NotASolutionWarning, r"item 1.*0\.1")
    assert relative_error(lib, found.value, np.ones((3, 2))) <= 1e-10


@two_libraries
def test_19_once_for_many_solves(lib, solver):
    A, C, theta, y = displaced(4, 0.5)
    lin = linearize(condition_of(lib, "hvp", A, C), lib.array(y), lib.array(theta), solver=solver)
    first, second = (outcome(lambda: lin.vjp(lib.array(np.ones(4)))) for _ in range(2))
    assert_told(first, NotASolutionWarning, "y is not a solution")
    assert second.quiet


# -- 20: no false alarms -------------------------------------------------------------------------------------------
@each_door("vjp:sparse-hessian", "vjp:sparse-jacobian", *(f"vjp:{form}" for form in FORMS), readonly=True)
@pytest.mark.parametrize("error", [1e-9, 6e-8], ids=["1e-9", "float32 rounding"])
def test_20_accurate_enough(lib, door, error, solver):
    for scale in (1e-6, 1.0, 1e6):
        if scale < 1 and "fixed-point" in door:
            continue  # I − (I − A) would lose the digits of so small an A
        A, C, theta, y = displaced(6, 0.0, scale=scale)
        y = y * (1 + error * np.cos(np.arange(6)))
        condition = condition_of(lib, door.split(":")[1], A, C)
        arrays = [lib.array(x) for x in (y, theta, np.ones(6))]
        found = outcome(lambda c=condition, a=arrays: implicit_vjp(c, *a, solver=solver))
        assert_right(lib, found, C.T @ exact_solve(A.T, np.ones(6)), 1e-7)


@two_libraries
@pytest.mark.parametrize("form", FORMS)
def test_20_float32_throughout(lib, form, solver):
    A, C, theta, y = (x.astype(np.float32) for x in displaced(6, 0.0))
    y, theta = 100 * y, 100 * theta
    arrays = [lib.array(x) for x in (y, theta, np.ones(6, dtype=np.float32))]
    found = outcome(lambda: implicit_vjp(condition_of(lib, form, A, C), *arrays, solver=solver))
    assert_right(lib, found, C.T @ exact_solve(A.T, np.ones(6)), 3e-4)


@two_libraries
@pytest.mark.parametrize("form", ["hvp", "hessian", "root"])
def test_20_error_along_the_stiff_direction(lib, form, solver):
    """‖A‖ = 1e6, y off by 1e-9 along it, and a cotangent that never sees that direction."""
    A, C = np.diag([1e6, 1.0, 2.0]), shift(3)
    theta = C.T @ (A @ np.array([1.0, 1.0, 1.0]))
    y = np.array([1.0 + 1e-9, 1.0, 1.0])
    arrays = [lib.array(x) for x in (y, theta, np.array([0.0, 1.0, 0.0]))]
    found = outcome(lambda: implicit_vjp(condition_of(lib, form, A, C), *arrays, solver=solver))
    assert_right(lib, found, C.T @ np.array([0.0, 1.0, 0.0]), 1e-8)


@two_libraries
def test_20_solutions_by_an_optimizer(lib, xp, solver):
    """y as an optimizer leaves it at its usual tolerance; only the objective is known here."""

    def f(y, t):
        return xp.sum(t * xp.exp(-y) + y * y)

    theta = np.array([0.5, 1.0, 4.0])
    y = np.full(3, 1.0)
    for _ in range(60):
        y = y - (2 * y - theta * np.exp(-y)) / (2 + theta * np.exp(-y))
    y = y + 1e-9 * np.array([1.0, -1.0, 1.0])
    truth = np.exp(-y) / (2 + theta * np.exp(-y))
    arrays = [lib.array(x) for x in (y, theta, np.ones(3))]
    assert_right(lib, outcome(lambda: implicit_vjp(f, *arrays, solver=solver)), truth, 1e-5)


@two_libraries
def test_20_no_way_to_evaluate_f(lib, solver):
    """With products alone there is nothing to hold y against: no warning, and a NaN in the report."""
    condition = Stationary(hvp=lambda y, t, v: 2.0 * v, mixed_vjp=lambda y, t, u: -2.0 * u)
    arrays = [lib.array(x) for x in (np.array([5.0, 6.0]), np.array([1.0, 2.0]), np.ones(2))]
    found = outcome(lambda: implicit_vjp(condition, *arrays, solver=solver, return_report=True))
    assert found.quiet, found.text
    assert np.isnan(found.value[1].stationarity)
    assert relative_error(lib, found.value[0], np.ones(2)) <= 1e-10


# -- 21: no root found ---------------------------------------------------------------------------------------------
ROOTLESS = {
    "parabola": (lambda y, t: y * y + 1.0 + t * t, lambda y, t: 2.0 * y),
    "quartic": (lambda y, t: (y * y + 1.0) ** 2 + t * t, lambda y, t: 4.0 * y * (y * y + 1.0)),
}


@two_libraries
@pytest.mark.parametrize("name", ROOTLESS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "derived"])
def test_21_no_root(lib, name, given, solver):
    fun, slope = ROOTLESS[name]
    theta = np.array([0.5])
    with np.errstate(all="ignore"):
        end = scipy.optimize.root(lambda y: fun(y, theta), np.array([0.7]))
    assert not end.success
    products = {"jvp": lambda y, t, v: slope(y, t) * v, "vjp": lambda y, t, u: slope(y, t) * u} if given else {}
    arrays = [lib.array(x) for x in (end.x, theta, np.ones(1))]
    found = outcome(lambda: implicit_vjp(Root(fun, **products), *arrays, solver=solver))
    assert_told(found, (NotASolutionWarning, SolveError), r"not a solution|singular|definite")


@two_libraries
def test_21_wrapped_solver_that_gave_up(lib, solver):
    @implicit_function(Root(ROOTLESS["parabola"][0]), solver=solver)
    def newton(theta):
        y = 0.0 * theta + 0.7
        for _ in range(20):
            y = y - (y * y + 1.0 + theta * theta) / (2.0 * y)
        return y

    found = outcome(lambda: newton.jacobian(lib.array([0.5])))
    assert_told(found, (NotASolutionWarning, SolveError), r"not a solution|singular|definite")


# -- 22: expansive maps --------------------------------------------------------------------------------------------
def expansive(n: int) -> np.ndarray:
    """∂T of spectral radius 3, not symmetric, far from having the eigenvalue 1."""
    M = np.random.default_rng(22).standard_normal((n, n))
    M = -3.0 * M @ M.T / np.linalg.norm(M @ M.T, 2) + 0.3 * np.triu(np.ones((n, n)), 1)
    assert np.max(np.abs(np.linalg.eigvals(M))) > 1.5
    return M


@pytest.mark.parametrize("given", ["products", "jacobian", "nothing"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_22_expansive_fixed_point(lib, given, n, solver):
    method = SHORT.get(solver, solver)
    M, C = expansive(n), shift(n)
    A = np.eye(n) - M
    P, Pt, N = lib.array(M), lib.array(M.T), lib.array(C)
    options = {
        "products": {"jvp": lambda y, t, v: P @ v, "vjp": lambda y, t, u: Pt @ u},
        "jacobian": {"jacobian": lambda y, t: P},
        "nothing": {},
    }[given]
    condition = FixedPoint(lambda y, t: P @ y + N @ t, **options)
    theta = C.T @ (A @ solution_at(n))
    arrays = [lib.array(x) for x in (solution_at(n), theta, np.ones(n))]
    calls = {
        "vjp": (lambda: implicit_vjp(condition, *arrays, solver=method), C.T @ exact_solve(A.T, np.ones(n))),
        "jvp": (lambda: implicit_jvp(condition, *arrays, solver=method), exact_solve(A, C @ np.ones(n))),
        "grad": (
            lambda: implicit_grad(condition, arrays[2], *arrays[:2], solver=method),
            C.T @ exact_solve(A.T, np.ones(n)),
        ),
    }
    for call, truth in calls.values():
        found = outcome(call)
        if solver in SYMMETRIC_ONLY:
            assert_right_or_told(lib, found, truth, 1e-7, SolveError, "symmetric|residual|definite")
        else:
            assert_right(lib, found, truth, 1e-7)
