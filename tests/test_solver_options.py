"""The options of the solvers: preconditioners, restarts, damping, memory, and who checks that they told the truth."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from conftest import LIBRARIES, Library, relative_error
from problems import RIGHT_FOR, TIGHT, N, close, linear_root, matrix, solve_both, vector, with_eigenvalues

from implicitdiff import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    MINRESQLP,
    BiCGSTAB,
    InputError,
    NotConvergedError,
    ShapeError,
    Stationary,
    implicit_vjp,
    linear_solve,
)

CASES = [(structure, solver) for structure, solvers in RIGHT_FOR.items() for solver in solvers]
KRYLOV: dict[str, type] = {
    "cg": CG,
    "minres": MINRES,
    "gmres": GMRES,
    "bicgstab": BiCGSTAB,
    "lsmr": LSMR,
    "minres_qlp": MINRESQLP,
}

# -- preconditioners -------------------------------------------------------------------------------------
KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda m: m,
    "csr_array": scipy.sparse.csr_array,
    "LinearOperator": scipy.sparse.linalg.aslinearoperator,
    "pair of callables": lambda m: (lambda x: m @ x, lambda x: m.T @ x),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_inverse_takes_one_iteration_both_ways(kind: str, side: str) -> None:
    """With M = A⁻¹ one iteration solves A, and Mᵀ one iteration Aᵀ; a transpose in the wrong place would not."""
    a, b = matrix("gen"), vector()
    solver = GMRES(rtol=1e-12, preconditioner=KINDS[kind](np.linalg.inv(a)), side=side)
    (forward, there), (reverse, back) = solve_both(a, b, solver)
    assert there.iterations == back.iterations == 1
    close(forward, np.linalg.solve(a, b))
    close(reverse, np.linalg.solve(a.T, b))


@pytest.mark.parametrize("side", ["right", "left"])
def test_asymmetric_preconditioner_does_not_change_the_answer(side: str) -> None:
    a, b = matrix("gen"), vector()
    m = np.linalg.inv(a + 0.3 * np.random.default_rng(8).normal(size=(N, N)) / np.sqrt(N))
    plain, helped = GMRES(rtol=1e-12), GMRES(rtol=1e-12, preconditioner=m, side=side)
    for (x, report), (_, without), reference in zip(
        solve_both(a, b, helped), solve_both(a, b, plain), (np.linalg.solve(a, b), np.linalg.solve(a.T, b)), strict=True
    ):
        close(x, reference, 1e-10)
        assert report.iterations < without.iterations


@pytest.mark.parametrize("kind", [*KINDS, "callable"])
@pytest.mark.parametrize("solver", KRYLOV)
def test_symmetric_preconditioner(solver: str, kind: str) -> None:
    """A symmetric A needs no Mᵀ, so that one callable will do."""
    a, b = matrix("pos"), vector()
    inverse = np.linalg.inv(a)
    m = (lambda x: inverse @ x) if kind == "callable" else KINDS[kind](inverse)
    condition = Stationary(hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -u)
    options = {"solver": KRYLOV[solver](rtol=1e-12, preconditioner=m), "return_report": True}
    x, report = implicit_vjp(condition, np.linalg.solve(a, b), b, b, **options)
    close(x, np.linalg.solve(a, b))
    assert report.iterations <= 2


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_diagonal_preconditioner(lib: Library, solver: str) -> None:
    """A vector is a diagonal: it undoes a bad scaling, which is not undone by itself where there are products only."""
    scale = np.logspace(-2, 2, N)
    a, b = scale[:, None] * matrix("pos") * scale, vector()
    m = lib.array(1 / np.diagonal(a))
    answer = np.linalg.solve(a, b)
    options = {"solver": KRYLOV[solver](rtol=1e-12, preconditioner=m), "return_report": True}
    x, report = linear_solve(lib.array(a), lib.array(b), **options)
    products, known = lib.array(a), {"symmetric": None if solver in {"gmres", "bicgstab"} else True}
    plain = linear_solve(
        lambda v: products @ v, lib.array(b), solver=solver, on_failure="ignore", return_report=True, **known
    )[1]
    assert relative_error(lib, x, answer) <= 1e-6
    assert report.iterations < plain.iterations


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("form", ["array", "diagonal", "callable"])
def test_preconditioner_of_a_batch(solver: str, form: str) -> None:
    a = np.stack([matrix("pos"), matrix("pos") + np.diag(np.arange(1.0, N + 1))])
    b = vector(2, columns=(N,))
    inverse = np.linalg.inv(a)
    given: dict[str, Any] = {
        "array": inverse,
        "diagonal": 1 / np.diagonal(a, axis1=1, axis2=2),
        "callable": lambda x: (inverse @ x[..., None])[..., 0],
    }
    method = KRYLOV[solver](rtol=1e-12, preconditioner=given[form])
    x, report = linear_solve(a, b, solver=method, batched=True, return_report=True)
    for i in range(2):
        close(x[i], np.linalg.solve(a[i], b[i]), 1e-10)
    assert form == "diagonal" or max(report.iterations) <= 2


def test_minres_with_the_absolute_value_takes_two_iterations() -> None:
    """|A|⁻¹ A has the eigenvalues 1 and −1 only."""
    values = np.linspace(1.0, 10.0, N) * (-1.0) ** np.arange(N)
    a, m, b = with_eigenvalues(values), with_eigenvalues(1 / np.abs(values)), vector()
    x, report = linear_solve(a, b, solver=MINRES(rtol=1e-12, preconditioner=m), return_report=True)
    assert report.iterations <= 2
    close(x, np.linalg.solve(a, b))


def test_missing_transpose_of_the_preconditioner_is_named() -> None:
    a, b = matrix("gen"), vector()
    solver = GMRES(preconditioner=lambda x: x)
    with pytest.raises(InputError, match=r"preconditioner.*\n.*Mᵀ"):
        implicit_vjp(linear_root(a), np.linalg.solve(a, b), b, b, solver=solver)


@pytest.mark.parametrize("bad", [np.ones((2, 2)), np.ones(N + 1), (lambda x: x, 3), "ilu"])
def test_wrong_preconditioner_is_named(bad: Any) -> None:
    with pytest.raises((ShapeError, InputError), match="preconditioner"):
        linear_solve(matrix("pos"), vector(), solver=CG(preconditioner=bad))


# -- restart and damping ---------------------------------------------------------------------------------
@pytest.mark.parametrize("restart", [1, 3, 10, N, 10 * N])
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_restart_changes_the_work_and_not_the_answer(lib: Library, restart: int) -> None:
    a, b = matrix("gen") + 2 * np.eye(N), vector()
    solver = GMRES(rtol=1e-12, restart=restart)
    x, report = linear_solve(lib.array(a), lib.array(b), solver=solver, return_report=True)
    assert relative_error(lib, x, np.linalg.solve(a, b)) <= 1e-11
    full = linear_solve(lib.array(a), lib.array(b), solver=GMRES(rtol=1e-12), return_report=True)[1].iterations
    assert full <= N
    assert report.iterations > full if restart < full else report.iterations == full


def test_cyclic_shift_needs_the_whole_space() -> None:
    """The classic: the residual of GMRES does not fall before step n, so any restart stands still."""
    shift = np.roll(np.eye(12), 1, axis=0)
    b = np.eye(12)[0]
    x, report = linear_solve(shift, b, solver="gmres", return_report=True)
    assert report.iterations == 12
    np.testing.assert_allclose(x, np.roll(b, -1), atol=1e-15)
    with pytest.raises(NotConvergedError, match="residual"):
        linear_solve(shift, b, solver=GMRES(restart=11))


def test_restart_bounds_the_memory() -> None:
    n, kept = 100_000, 4
    d = np.linspace(1.0, 2.0, n)
    peak = peak_vectors(lambda: linear_solve(lambda v: d * v, d, solver=GMRES(restart=kept)), n)
    assert peak <= kept + 1 + 6


@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
@pytest.mark.parametrize("form", ["matrix", "product"])
@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_damping(lib: Library, structure: str, solver: str, form: str) -> None:
    """(A + δI) x = b, and the report has the δ."""
    a, b = matrix(structure), vector()
    given = lib.array(a)
    method = type(TIGHT[solver])(damping=0.25)
    tags = {} if form == "matrix" else {"symmetric": structure != "gen"}
    products = given if form == "matrix" else (lambda v: given @ v)
    x, report = linear_solve(products, lib.array(b), solver=method, return_report=True, **tags)
    assert relative_error(lib, x, np.linalg.solve(a + 0.25 * np.eye(N), b)) <= 1e-8
    assert report.damping == 0.25
    assert report.residual <= 1e-10


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, scipy.sparse.linalg.aslinearoperator])
@pytest.mark.parametrize("solver", RIGHT_FOR["gen"])
def test_damping_of_scipy_matrices_both_ways(solver: str, form: Callable[[np.ndarray], Any]) -> None:
    a, b = matrix("gen"), vector()
    root = linear_root(a)
    root = type(root)(root.fun, jacobian=lambda y, t: form(a), mixed_vjp=root.mixed_vjp, mixed_jvp=root.mixed_jvp)
    got = implicit_vjp(root, np.linalg.solve(a, b), b, b, solver=type(TIGHT[solver])(damping=0.25))
    close(got, np.linalg.solve(a.T + 0.25 * np.eye(N), b), 1e-8)


# -- memory and truth ------------------------------------------------------------------------------------
def peak_vectors(call: Callable[[], Any], n: int) -> float:
    """Peak of the memory that a call allocates, in vectors of n doubles."""
    call()  # imports and caches
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / (8 * n)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_cg_holds_four_vectors(start: str) -> None:
    """X, r, p and one to work in; the product writes into memory of its own."""
    n = 200_000
    d, product, b = np.linspace(1.0, 10.0, n), np.empty(n), np.ones(n)
    x0 = np.full(n, 0.3) if start == "warm" else None
    condition = Stationary(hvp=lambda y, t, v: np.multiply(d, v, out=product), mixed_vjp=lambda y, t, u: u[:1])
    theta = np.ones(1)
    peak = peak_vectors(lambda: implicit_vjp(condition, b, theta, b, solver="cg", x0=x0), n)
    assert peak <= 4.1


@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
@pytest.mark.parametrize(("structure", "solver"), CASES)
def test_reported_residual_is_the_true_one(lib: Library, structure: str, solver: str) -> None:
    """Stopped early, the residual is large enough to be compared digit by digit."""
    a, b = matrix(structure), 1e5 * vector()
    method = KRYLOV[solver](rtol=1e-4) if solver in KRYLOV else solver
    x, report = linear_solve(lib.array(a), lib.array(b), solver=method, return_report=True)
    true = np.linalg.norm(b - a @ lib.numpy(x)) / np.linalg.norm(b)
    assert report.converged
    assert report.residual <= (1e-4 if solver in KRYLOV else 1e-12)
    assert abs(report.residual - true) <= 1e-9 * true + 1e-14


@pytest.mark.parametrize("solver", KRYLOV)
def test_drift_of_the_recursive_residual_is_not_success(solver: str) -> None:
    """A product with noise lets the recursion believe in a residual that b − A x does not have."""
    a, b = matrix("pos"), vector()

    def noisy(v: np.ndarray) -> np.ndarray:
        return a @ v + 1e-5 * np.linalg.norm(v) * np.cos(1e6 * v)

    x, report = linear_solve(
        noisy, b, solver=KRYLOV[solver](rtol=1e-9), symmetric=True, on_failure="ignore", return_report=True
    )
    assert not report.converged
    assert 1e-9 < report.residual < 1e-2
    assert np.linalg.norm(b - a @ x) > 1e-9 * np.linalg.norm(b)
