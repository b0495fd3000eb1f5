"""The linear solvers against LAPACK and 60-digit arithmetic, and what they promise beside the solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from conftest import ITERATIVE, LIBRARIES, NUMPY, TORCH, Library, relative_error
from problems import RIGHT_FOR, TIGHT, Counted, N, close, linear_root, matrix, solve_both, vector, with_eigenvalues

from implicitdiff import CG, Status, implicit_vjp, linear_solve
from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.registry import get_backend
from implicitdiff.solvers import LU, get_solver

CASES = [(structure, solver) for structure, solvers in RIGHT_FOR.items() for solver in solvers]
LIBS = pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)


# -- the right numbers -----------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("columns", [(), (4,)], ids=["vector", "columns"])
@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_matrix_against_lapack(lib: Library, structure: str, solver: str, columns: tuple[int, ...]) -> None:
    a, b = matrix(structure), vector(columns=columns)
    x = linear_solve(lib.array(a), lib.array(b), solver=TIGHT[solver])
    assert relative_error(lib, x, scipy.linalg.solve(a, b, assume_a=structure)) <= 1e-11


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "product": lambda a: lambda v: a @ v,
    "sparse": scipy.sparse.csr_array,
    "LinearOperator": scipy.sparse.linalg.aslinearoperator,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_forms_of_a(structure: str, solver: str, form: str) -> None:
    a, b = matrix(structure), vector(columns=(3,))
    x = linear_solve(FORMS[form](a), b, solver=TIGHT[solver], symmetric=structure != "gen")
    close(x, scipy.linalg.solve(a, b, assume_a=structure))


@pytest.mark.parametrize("solver", RIGHT_FOR["gen"])
def test_transposed_system(solver: str) -> None:
    a, b = matrix("gen"), vector()
    (forward, _), (reverse, _) = solve_both(a, b, TIGHT[solver])
    close(forward, scipy.linalg.solve(a, b))
    close(reverse, scipy.linalg.solve(a, b, transposed=True))


@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_against_sixty_digits(structure: str, solver: str) -> None:
    """Error within a few eps κ of the solution in 60-digit arithmetic."""
    a, b = matrix(structure, 12), vector(12)
    with mpmath.workdps(60):
        exact = mpmath.lu_solve(mpmath.matrix(a.tolist()), mpmath.matrix(b.tolist()))
        x = linear_solve(a, b, solver=TIGHT[solver])
        error = mpmath.norm(mpmath.matrix(x.tolist()) - exact) / mpmath.norm(exact)
    bound = 4 * np.finfo(float).eps if solver in {"auto", "lu", "ldlt", "cholesky"} else 1e-13
    assert error <= bound * np.linalg.cond(a)


@pytest.mark.parametrize("solver", ["lu", "ldlt", "cholesky", "auto", "cg", "minres", "gmres", "bicgstab"])
def test_hilbert_matrix(solver: str) -> None:
    """At a condition number of 1.5e10 the residual stays true, and a factorisation keeps six digits."""
    a, b = scipy.linalg.hilbert(8), np.ones(8)
    x, report = linear_solve(a, b, solver=solver, on_failure="ignore", return_report=True)
    with mpmath.workdps(60):
        exact = mpmath.lu_solve(mpmath.matrix(a.tolist()), mpmath.matrix(b.tolist()))
        found = mpmath.matrix(x.tolist())
        error = mpmath.norm(found - exact) / mpmath.norm(exact)
        residual = mpmath.norm(mpmath.matrix(a.tolist()) * found - mpmath.matrix(b.tolist())) / mpmath.norm(b.tolist())
    if solver in {"lu", "ldlt", "cholesky", "auto"}:
        assert error <= 1e-6
    rounding = np.finfo(float).eps * np.linalg.norm(a) * np.linalg.norm(x) / np.linalg.norm(b)
    if report.converged or solver != "minres":  # which may call it singular, as rounding falls
        assert report.converged
        assert residual <= max(1e-10, 20 * rounding)
    assert abs(residual - report.residual) <= 8 * rounding


class _Broken(LU):
    """LU that solves one of many right-hand sides to a few digits, a tenth of the way there each time."""

    name = "broken"

    def apply(self, backend: Any, factor: Any, b: Any, transposed: bool) -> Any:
        x, column = super().apply(backend, factor, b, transposed), backend.xp.arange(b.shape[-1]) == b.shape[-1] - 1
        return backend.xp.where(column & (b.shape[-1] > 10), 0.9 * x, x)


@LIBS
@pytest.mark.parametrize("columns", [3, 64, 200])
def test_residuals_of_many_columns_are_bounded(lib: Library, columns: int) -> None:
    """What is reported of many columns, seen together, is no less than the residual of any, and not much more."""
    a, b = matrix("gen"), vector(columns=(columns,)) * np.geomspace(1e-9, 1e9, columns)
    x, report = linear_solve(lib.array(a), lib.array(b), solver="lu", return_report=True)
    true = np.linalg.norm(b - a @ lib.numpy(x), axis=0) / np.linalg.norm(b, axis=0)
    assert np.max(true) <= 2 * np.max(np.asarray(report.residual)) + 1e-15
    assert np.max(np.asarray(report.residual)) <= 1e-12


@LIBS
@pytest.mark.parametrize("columns", [32, 64, 200])
def test_one_wrong_column_of_many_is_seen(lib: Library, columns: int) -> None:
    """Where it is no accident that the others are right: b of one column is 1e12 times as small."""
    a, b = matrix("gen"), vector(columns=(columns,))
    b[:, -1] *= 1e-12
    _, report = linear_solve(lib.array(a), lib.array(b), solver=_Broken(), on_failure="ignore", return_report=True)
    status, residual = np.asarray(report.status), np.asarray(report.residual)
    assert status.max() == int(Status.STAGNATED)
    assert residual.max() == pytest.approx(0.01, rel=0.5)  # after a step of refinement


# -- cases that are exact --------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("c", [1.0, 4.0, 0.125])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_multiple_of_identity_takes_one_iteration(solver: str, c: float, n: int) -> None:
    b = vector(n)
    x, report = linear_solve(lambda v: c * v, b, solver=solver, symmetric=True, return_report=True)
    assert report.iterations == 1
    np.testing.assert_allclose(x, b / c, rtol=4e-16 * max(n, 4))


@pytest.mark.parametrize("solver", ["lu", "ldlt", "cholesky", "auto"])
def test_powers_of_two_are_exact(solver: str) -> None:
    d = 2.0 ** np.arange(-3, 4)
    x = linear_solve(np.diag(d), 3 * d, solver=solver)
    np.testing.assert_allclose(x, 3.0, rtol=2e-16)


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_distinct_eigenvalues_bound_the_iterations(solver: str, k: int) -> None:
    """K distinct eigenvalues take k iterations; every product is counted, and no other one."""
    product = Counted(with_eigenvalues(np.resize(np.linspace(1.0, 3.0, k), 60)))
    x, report = linear_solve(product, b := vector(60), solver=solver, symmetric=True, return_report=True)
    assert report.iterations <= k
    assert report.matvecs == product.calls
    close(x, np.linalg.solve(product.a, b), 1e-9)


@pytest.mark.parametrize("solver", ["auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres", "bicgstab"])
@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_products_are_counted(solver: str, columns: tuple[int, ...], warm: bool) -> None:
    product = Counted(matrix("pos"))
    b = vector(columns=columns)
    x0 = np.linalg.solve(product.a, b) + 0.01 if warm else None
    _, report = linear_solve(product, b, solver=solver, symmetric=True, x0=x0, return_report=True)
    assert report.matvecs == product.calls


# -- starts, many right-hand sides, batches --------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("solver", ITERATIVE)
def test_warm_start_from_the_answer(lib: Library, solver: str) -> None:
    a, b = matrix("pos"), vector()
    answer = np.linalg.solve(a, b)
    x, report = linear_solve(lib.array(a), lib.array(b), solver=solver, x0=lib.array(answer), return_report=True)
    assert report.iterations == 0
    assert report.converged
    assert relative_error(lib, x, answer) <= 1e-14


@pytest.mark.parametrize("solver", ITERATIVE)
def test_warm_start_nearby_and_far(solver: str) -> None:
    """A near start saves iterations, a start worse than zero costs none, and neither changes the answer."""
    a, b = matrix("pos"), vector()
    answer = np.linalg.solve(a, b)
    counts = {}
    for name, x0 in {"none": None, "near": answer + 1e-6 * vector(seed=9), "far": 1e8 * vector(seed=9)}.items():
        x, report = linear_solve(a, b, solver=solver, x0=x0, return_report=True)
        counts[name] = report.iterations
        close(x, answer, 1e-9)
    assert counts["near"] < counts["none"] == counts["far"]


def test_report_solution_is_the_next_start() -> None:
    a, b = matrix("gen"), vector()
    theta = vector(seed=5)
    y = np.linalg.solve(a, theta)
    first, report = implicit_vjp(linear_root(a), y, theta, b, solver="gmres", return_report=True)
    again, after = implicit_vjp(linear_root(a), y, theta, b, solver="gmres", x0=report.solution, return_report=True)
    assert report.iterations > 0
    assert after.iterations == 0
    close(again, first, 1e-14)


@LIBS
@pytest.mark.parametrize("solver", ["auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres", "bicgstab"])
def test_many_right_hand_sides_are_the_single_ones(lib: Library, solver: str) -> None:
    """Norms and stops are per column: a tiny column keeps its digits, a zero one is exactly zero."""
    a, b = matrix("pos"), vector(columns=(4,)) * np.array([1.0, 1e-20, 0.0, 1e20])
    x, report = linear_solve(lib.array(a), lib.array(b), solver=solver, return_report=True)
    iterations = []
    for j in range(4):
        single, alone = linear_solve(lib.array(a), lib.array(b[:, j].copy()), solver=solver, return_report=True)
        iterations.append(alone.iterations)
        assert relative_error(lib, x[:, j], lib.numpy(single)) <= 1e-9
    assert np.all(lib.numpy(x)[:, 2] == 0)
    assert abs(report.iterations - max(iterations)) <= 1


@LIBS
@pytest.mark.parametrize("form", ["matrix", "product"])
@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_batch_is_its_items(lib: Library, structure: str, solver: str, form: str) -> None:
    """Each item stops by itself, and the report has a row for each."""
    a = np.stack([np.eye(N), matrix(structure), matrix(structure) + 0.5 * np.eye(N)])
    b = vector(3, columns=(N,))
    given = lib.array(a)
    products = given if form == "matrix" else (lambda v: (given @ v[..., None])[..., 0])
    tags = {"symmetric": structure != "gen"} if form == "product" else {}
    x, report = linear_solve(products, lib.array(b), solver=solver, batched=True, return_report=True, **tags)
    for i in range(3):
        reference = scipy.linalg.solve(a[i], b[i])
        assert relative_error(lib, x[i, ...], reference) <= 1e-8
    assert lib.numpy(report.converged).tolist() == [True] * 3
    assert lib.numpy(report.residual).shape == lib.numpy(report.matvecs).shape == (3,)
    if solver in ITERATIVE:
        counts = lib.numpy(report.iterations)
        assert counts[0] == 1 < min(counts[1], counts[2])


# -- what iterative methods tell of A --------------------------------------------------------------------
LAPLACIAN = 6 * np.eye(6) - np.ones((6, 6))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("name", ITERATIVE)
def test_the_norm_and_the_condition_number_are_estimated_from_below(name: str, scale: float) -> None:
    """Whatever the units, and not far below; a singular A is told from one that is indefinite."""
    systems = (matrix("pos"), vector()), (LAPLACIAN, np.eye(6)[0]), (np.diag([1.0, -1.0]), np.ones(2))
    singular = Status.LEAST_SQUARES if get_solver(name).least_squares else Status.SINGULAR
    ends = Status.CONVERGED, singular, Status.NOT_POSITIVE_DEFINITE if name == "cg" else Status.CONVERGED
    for (a, b), end in zip(systems, ends, strict=True):
        operator = matrix_map(Operator, get_backend("numpy"), scale * a, (), a.dtype, "cpu", symmetric=True)
        solver = get_solver(name)
        _, status, counts = solver.solve(solver.init(operator), b / scale)
        assert status == end
        assert 0.7 <= counts.operator_norm / (scale * np.linalg.norm(a, 2)) <= 1 + 1e-9
        if end is Status.CONVERGED:
            assert 0.15 <= counts.condition / np.linalg.cond(a) <= 1 + 1e-9


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
def test_masks_are_negated_by_a_tilde(lib: Library) -> None:
    """Of Python's own truth values ~ makes −1 and −2, with a warning from 3.12 on."""
    x = lib.array(np.ones(3))
    space = get_backend(lib.name).space(x)
    for good in (space.isfinite(np.float64(1.0)), space.finite(x), space.any(np.bool_(True))):
        assert bool(~good) is False


# -- one vector, and many ----------------------------------------------------------------------------------
STEPS: dict[str, np.ndarray] = {
    "definite": matrix("pos"),
    "indefinite": with_eigenvalues(np.array([3.0, 2.0, 1.0, -0.5, 5.0])),
    "singular": np.diag([1.0, 2.0, 0.0, 4.0]),
    "overflow": np.full((3, 3), np.inf),
}


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_cg_of_one_vector_takes_the_steps_of_a_batch_of_one(lib: Library, name: str, preconditioned: bool) -> None:
    """Where scalars are the host's own, nothing is masked: the same x, status and counts come out."""
    a = STEPS[name]
    b, weights = vector(a.shape[0]), 1 / (1 + np.arange(float(a.shape[0])))
    found = []
    for lead in ((), (1,)):
        A, right, w = (lib.array(x.reshape(*lead, *x.shape)) for x in (a, b, weights))

        def product(x: Any, A: Any = A) -> Any:
            return (A @ x[..., None])[..., 0]

        def precondition(x: Any, w: Any = w) -> Any:
            return w * x

        solver = CG(preconditioner=precondition if preconditioned else None, maxiter=9)
        x, report = linear_solve(
            product, right, solver=solver, symmetric=True, batched=bool(lead), on_failure="ignore", return_report=True
        )
        counts = (np.max(np.asarray(getattr(report, name))) for name in ("status", "iterations", "residual"))
        found.append((np.asarray(lib.numpy(x)).reshape(-1), *counts))
    (x, status, iterations, residual), (other, *of_batch) = found
    assert (status, iterations) == tuple(of_batch[:2])
    np.testing.assert_allclose(residual, of_batch[2], atol=1e-12)
    np.testing.assert_allclose(x, other, rtol=1e-8)
