"""FAULTS 1 to 11: singular, indefinite and asymmetric operators, and solves that did not get there.

Every solver, every door (`tests/conftest.py`), every array library. Nothing wrong is returned in silence, and nothing
right with a warning.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import (
    DOORS,
    GENERAL,
    GENERAL_DOORS,
    ITERATIVE,
    PLAIN,
    SHORT,
    SYMMETRIC_DOORS,
    SYMMETRIC_ONLY,
    assert_right,
    assert_right_or_told,
    assert_told,
    condition_of,
    each_door,
    exact_solve,
    expected_through,
    outcome,
    shift,
    solution_at,
    through,
    with_condition,
)

from implicitdiff import (
    Auto,
    FixedPoint,
    NotConvergedError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    Root,
    SingularError,
    SolveError,
    SolveWarning,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_vjp,
    linear_solve,
    linearize,
)
from implicitdiff.solvers import get_solver

LAPLACIAN = np.array([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]])
GRAPH = np.diag([2.0, 1.0, 3.0, 2.0, 2.0]) - np.array(
    [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]
)
COUNTING = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])  # rank 2, no zero pivot in floating point
two_libraries = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
MODES = ("raise", "warn", "nan", "ignore")
UNSOLVABLE = (SingularError, NotPositiveDefiniteError, NotConvergedError)
SOME_NUMBER = r"\d(\.\d+)?(e[+-]\d+)?"


def asymmetric(n: int, seed: int = 0) -> np.ndarray:
    """Well-conditioned, far from symmetric, with a positive definite symmetric part."""
    return 2 * np.eye(n) + np.random.default_rng(seed).standard_normal((n, n)) / np.sqrt(n)


# -- 1 to 4: singular ----------------------------------------------------------------------------------------------
@each_door(*DOORS)
@pytest.mark.parametrize("A", [LAPLACIAN, GRAPH], ids=["laplacian", "graph"])
def test_01_exactly_singular_inconsistent(lib, door, A, solver):
    b = np.zeros(len(A))
    b[0] = 1.0  # not orthogonal to the null vector of ones
    found = through(lib, door, A, b, solver)
    kinds = {"lu": SingularError, "auto": SingularError, "minres": SingularError}.get(solver, UNSOLVABLE)
    assert_told(found, kinds, r"\bA\b.*singular|singular.*(\bA\b|operator)|definite(.|\n)*singular")


@pytest.mark.parametrize("mode", MODES)
@each_door("solve:matrix", "vjp:hvp", "jvp:root", "vjp:sparse-hessian")
def test_01_singular_in_every_mode(lib, door, solver, mode):
    found = through(lib, door, LAPLACIAN, np.array([1.0, 0.0, 0.0]), solver, on_failure=mode, return_report=True)
    if mode == "raise":
        assert isinstance(found.error, SolveError)
        assert found.error.value is not None
        assert found.error.report.converged is False
        return
    value, report = found.value
    assert report.converged is False
    assert not report.status.ok
    if mode == "nan":
        assert np.all(np.isnan(lib.numpy(value)))
    if mode == "warn":
        assert_told(found, SolveWarning, "singular")
    else:
        assert found.quiet


@each_door(*DOORS)
def test_02_singular_up_to_rounding(lib, door, solver):
    Q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))
    A = (Q * np.array([3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.5, 0.0])) @ Q.T
    A = (A + A.T) / 2
    assert np.linalg.svd(A)[1][-1] < 1e-14
    b = np.random.default_rng(3).standard_normal(8)
    found = through(lib, door, A, b, SHORT.get(solver, solver))
    assert_told(found, UNSOLVABLE, rf"rcond = {SOME_NUMBER}|residual.*{SOME_NUMBER}|not positive definite")


@each_door(*GENERAL_DOORS)
@pytest.mark.parametrize("name", GENERAL)
def test_02_singular_up_to_rounding_asymmetric(lib, door, name):
    found = through(lib, door, COUNTING / 10, b := np.array([1.0, 0.0, 0.0]), name)
    if door.startswith("solve") and get_solver(name).least_squares:  # then that is what was asked for
        assert_right(lib, found, np.linalg.pinv(COUNTING / 10, rcond=1e-12) @ b, 1e-8)
        return
    assert_told(found, UNSOLVABLE, rf"rcond = {SOME_NUMBER}|residual.*{SOME_NUMBER}")


@each_door(*DOORS)
@pytest.mark.parametrize("A", [LAPLACIAN, GRAPH], ids=["laplacian", "graph"])
def test_03_singular_consistent(lib, door, A, solver):
    wanted = np.arange(len(A)) ** 2.0
    b = A @ wanted  # exact in floating point
    found = through(lib, door, A, b, solver)
    if not found.quiet:
        assert solver != "minres", f"MINRES is for this: {found.text}"
        assert_told(found, UNSOLVABLE, "singular")
        return
    x = lib.numpy(found.value)
    x = shift(len(A)) @ x if door.startswith(("vjp", "grad")) else x
    assert np.linalg.norm(A @ x - b) <= 1e-8 * np.linalg.norm(b)


@two_libraries
@pytest.mark.parametrize("form", ["hvp", "hessian", "root", "jacobian", "adjoint", "fixed-point"])
def test_04_given_derivative_is_zero(lib, form, solver):
    zero, C = np.zeros((4, 4)), shift(4)
    condition = condition_of(lib, form, zero, C)
    y, theta, v = (lib.array(x) for x in (solution_at(4), np.zeros(4), np.ones(4)))
    for call in (implicit_vjp, implicit_grad):
        order = (y, theta, v) if call is implicit_vjp else (v, y, theta)
        assert_told(outcome(lambda: call(condition, *order, solver=solver)), SingularError, r"\bF\b")


@two_libraries
@pytest.mark.parametrize("name", ["objective", "affine objective", "gradient", "root", "fixed point"])
def test_04_function_does_not_depend_on_y(lib, xp, name, solver):
    condition = {
        "objective": Stationary(lambda y, t: xp.sum(t * t)),
        "affine objective": Stationary(lambda y, t: xp.sum(y * t)),
        "gradient": Stationary(grad=lambda y, t: 1.0 * t),
        "root": Root(lambda y, t: 1.0 * t),
        "fixed point": FixedPoint(lambda y, t: y + t),
    }[name]
    y, theta, v = lib.array(solution_at(3)), lib.array(np.zeros(3)), lib.array([1.0, -1.0, 2.0])
    found = outcome(lambda: implicit_grad(condition, v, y, theta, solver=solver))
    assert_told(found, SolveError, r"\bF\b")


def test_04_zero_matrix(lib, solver):
    found = outcome(lambda: linear_solve(lib.array(np.zeros((3, 3))), lib.array([1.0, 2.0, 3.0]), solver=solver))
    assert_told(found, SingularError, r"\bA\b")


# -- 5 to 7: indefinite --------------------------------------------------------------------------------------------
@each_door(*DOORS)
@pytest.mark.parametrize("n", [2, 6])
def test_05_saddle_with_cholesky(lib, door, n):
    A, b = with_condition(n, 10.0, 5, kind="indefinite")
    found = through(lib, door, A, b, "cholesky")
    assert_told(found, NotPositiveDefiniteError, r"not positive definite(.|\n)*(minres|lu)")


@each_door(*DOORS)
def test_06_zero_curvature_with_cg(lib, door):
    found = through(lib, door, np.diag([1.0, -1.0]), np.array([1.0, 1.0]), "cg")
    assert_told(found, NotPositiveDefiniteError, "zero or negative curvature")


@each_door("solve:matrix", "vjp:hvp", "vjp:sparse-hessian")
def test_06_other_solvers_are_right_there(lib, door):
    A, b = np.diag([1.0, -1.0]), np.array([1.0, 1.0])
    for name in ("lu", "minres", "gmres", "auto"):
        assert_right(lib, through(lib, door, A, b, name), expected_through(door, A, b), 1e-12)


@each_door(*DOORS)
def test_07_negative_definite(lib, door, solver):
    A, b = with_condition(6, 20.0, 7)
    A = -A
    found, truth = through(lib, door, A, b, solver), expected_through(door, A, b)
    if solver in ("cg", "cholesky"):
        assert_right_or_told(lib, found, truth, 1e-8, NotPositiveDefiniteError, "not positive definite")
    else:
        assert_right(lib, found, truth, 1e-8)


# -- 8 and 9: asymmetric -------------------------------------------------------------------------------------------
@each_door(*SYMMETRIC_DOORS)
@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("skew", [1.0, 1e-2], ids=["gross", "one percent"])
def test_08_asymmetric_hessian(lib, door, n, skew, solver):
    A, b = with_condition(n, 5.0, n)
    part = skew * np.triu(np.ones((n, n)), 1)
    found = through(lib, door, A + part - part.T, b, SHORT.get(solver, solver))
    assert_told(found, NotSymmetricError, "declared symmetric, and it is not")


@two_libraries
@pytest.mark.parametrize("form", ["matrix", "callable"])
@pytest.mark.parametrize("seed", range(4))
def test_08_asymmetric_declared_symmetric(lib, form, seed, solver):
    A, b = asymmetric(5, seed), np.random.default_rng(seed).standard_normal(5)
    M = lib.array(A)
    given = M if form == "matrix" else (lambda v: M @ v)
    for claim in ({"symmetric": True}, {"positive_definite": True}):
        found = outcome(lambda: linear_solve(given, lib.array(b), solver=SHORT.get(solver, solver), **claim))
        if solver in SYMMETRIC_ONLY:
            assert_told(found, NotSymmetricError, "declared symmetric, and it is not")
        else:  # A x = b needs no transpose, so these may be right all the same
            assert_right_or_told(lib, found, exact_solve(A, b), 1e-8, NotSymmetricError, "symmetric")


@each_door(*GENERAL_DOORS)
@pytest.mark.parametrize("name", SYMMETRIC_ONLY)
def test_08_asymmetric_root_with_a_symmetric_method(lib, door, name):
    A = asymmetric(6)
    b = np.random.default_rng(1).standard_normal(6)
    found = through(lib, door, A, b, SHORT.get(name, name))
    assert_right_or_told(lib, found, expected_through(door, A, b), 1e-8, SolveError, "symmetric")


@each_door(*SYMMETRIC_DOORS)
def test_08_rounding_is_not_asymmetry(lib, door, solver):
    X = np.random.default_rng(8).standard_normal((9, 6))
    A = X.T @ (X * np.geomspace(1, 3, 9)[:, None])
    A[0, 1] *= 1 + 1e-14  # the order of summation in somebody's hvp
    assert not np.array_equal(A, A.T)
    b = np.random.default_rng(9).standard_normal(6)
    assert_right(lib, through(lib, door, A, b, solver), expected_through(door, A, b), 1e-8)


@each_door(*GENERAL_DOORS, readonly=True)
@pytest.mark.parametrize("n", [2, 7, 30])
@pytest.mark.parametrize("name", GENERAL)
def test_09_asymmetric_through_every_door(lib, door, n, name):
    A, b = asymmetric(n, n), np.random.default_rng(n).standard_normal(n)
    assert_right(lib, through(lib, door, A, b, name), expected_through(door, A, b), 1e-8)


@pytest.mark.parametrize("form", ["root", "adjoint", "jacobian", "fixed-point"])
@pytest.mark.parametrize("m", [3, 6])
@pytest.mark.parametrize("name", GENERAL)
def test_09_rectangular_parameters(lib, form, m, name):
    rng = np.random.default_rng(9)
    A, C = asymmetric(4, 9), rng.standard_normal((4, m))
    theta = rng.standard_normal(m)
    y = np.linalg.solve(A, C @ theta)
    truth = np.linalg.solve(A, C)
    lin = linearize(condition_of(lib, form, A, C), lib.array(y), lib.array(theta), solver=name)
    v, t = rng.standard_normal(4), rng.standard_normal(m)
    assert_right(lib, outcome(lambda: lin.vjp(lib.array(v))), truth.T @ v, 1e-8)
    assert_right(lib, outcome(lambda: lin.jvp(lib.array(t))), truth @ t, 1e-8)
    assert_right(lib, outcome(lin.jacobian), truth, 1e-8)
    whole = outcome(lambda: implicit_jacobian(condition_of(lib, form, A, C), lib.array(y), lib.array(theta)))
    assert_right(lib, whole, truth, 1e-8)


# -- 10 and 11: not there ------------------------------------------------------------------------------------------
TWO_STEPS = {name: replace(get_solver(name), maxiter=2) for name in ITERATIVE}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ITERATIVE)
@each_door("solve:matrix", "vjp:hvp", "jvp:root", "vjp:fixed-point")
def test_10_two_iterations_are_too_few(lib, door, name, mode):
    A, b = with_condition(20, 100.0, 10)
    found = through(lib, door, A, b, TWO_STEPS[name], on_failure=mode, return_report=True)
    if mode in ("raise", "warn"):
        assert_told(found, (NotConvergedError, SolveWarning), rf"{name} stopped after 2 iterations")
        printed = float(re.search(rf"residual of ({SOME_NUMBER})", found.text)[1])
        report = found.error.report if mode == "raise" else found.value[1]
        assert printed == pytest.approx(report.residual, rel=1e-2)
    else:
        assert found.quiet
        report = found.value[1]
    assert (report.iterations, report.converged) == (2, False)
    if mode == "nan":
        assert np.all(np.isnan(lib.numpy(found.value[0])))
    if mode == "ignore":
        x = lib.numpy(found.value[0])
        x = shift(20) @ x if door.startswith("vjp") else x
        assert report.residual == pytest.approx(np.linalg.norm(b - A @ x) / np.linalg.norm(b), rel=1e-6)


@each_door("solve:callable", "vjp:hvp", "jvp:root")
def test_10_auto_still_gets_there_or_says_so(lib, door):
    A, b = with_condition(20, 100.0, 10)
    found = through(lib, door, A, b, Auto(maxiter=2))
    assert_right_or_told(lib, found, expected_through(door, A, b), 1e-8, NotConvergedError, "2 iterations")


@two_libraries
@pytest.mark.parametrize("drift", [1e-3, 1e-1])
@pytest.mark.parametrize("name", ITERATIVE)
def test_11_product_that_drifts(lib, name, drift):
    """Recursive residuals know nothing of a product that is another one each time (a mini-batch, say)."""
    A, b = with_condition(10, 30.0, 11)
    M, calls = lib.array(A), []

    def product(v):
        calls.append(1)
        return (1 + drift * math.sin(len(calls))) * (M @ v)

    found = outcome(lambda: linear_solve(product, lib.array(b), solver=name, symmetric=True))
    kinds = (NotConvergedError, NotPositiveDefiniteError, NotSymmetricError)  # such a product is no symmetric matrix
    assert_told(found, kinds, rf"residual .*{SOME_NUMBER}|positive definite|symmetric")


@two_libraries
@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("size", [1e10, 1e18, 1e200])
def test_11_huge_start(lib, name, size):
    """From a huge x0 the recursion converges and x has lost every digit (SciPy's cg: info = 0, residual 2.38)."""
    A, b = with_condition(10, 30.0, 12)
    x0 = lib.array(size * np.ones(10))
    found = outcome(lambda: linear_solve(lib.array(A), lib.array(b), solver=name, x0=x0))
    assert_right(lib, found, exact_solve(A, b), 1e-7)


@two_libraries
@pytest.mark.parametrize("condition", [1e10, 1e13, 1e16])
@pytest.mark.parametrize("name", ITERATIVE)
def test_11_success_means_the_true_residual(lib, name, condition):
    for seed in range(3):
        A, b = with_condition(12, condition, seed)
        found = outcome(
            lambda: linear_solve(lib.array(A), lib.array(b), solver=SHORT.get(name, name), return_report=True)
        )
        if found.error is not None:
            assert_told(found, UNSOLVABLE, rf"residual .*{SOME_NUMBER}|positive definite")
            continue
        x, report = lib.numpy(found.value[0]), found.value[1]
        true = np.linalg.norm(b - A.astype(np.longdouble) @ x) / np.linalg.norm(b)
        rounding = np.finfo(float).eps * np.linalg.norm(A, 2) * np.linalg.norm(x) / np.linalg.norm(b)
        assert report.residual == pytest.approx(float(true), rel=0.1, abs=4 * rounding)
        assert true <= max(1e-10, 10 * rounding)
        assert true <= 3e-7  # where rounding is as coarse as that, it is no success any more
