"""Which solver runs: the choice of ``auto`` and its reasons, solvers of the user's, and singular systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import LIBRARIES, Library, relative_error
from problems import N, close, linear_root, matrix, vector, with_eigenvalues

import implicitdiff.solvers as table
from implicitdiff import (
    Auto,
    Counts,
    FixedPoint,
    InputError,
    NotConvergedError,
    SingularError,
    SolveError,
    Solver,
    Stationary,
    Status,
    UnknownNameError,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    register_solver,
    solver_names,
)

LARGE = 300


# -- auto ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("structure", "used", "reason"),
    [("pos", "cholesky", "A is symmetric"), ("sym", "lu", "not positive definite"), ("gen", "lu", "not symmetric")],
)
@pytest.mark.parametrize(
    ("lib", "form"), [(LIBRARIES[0], "dense"), (LIBRARIES[1], "dense"), (LIBRARIES[0], "sparse")],
    ids=["numpy", "strict", "sparse"],
)  # fmt: skip
def test_auto_on_a_matrix(lib: Library, form: str, structure: str, used: str, reason: str) -> None:
    a, b = matrix(structure), vector()
    given = lib.array(a) if form == "dense" else scipy.sparse.csr_array(a)
    x, report = linear_solve(given, lib.array(b), return_report=True)
    assert report.solver == used
    assert reason in report.reason
    assert ("sparse" if form == "sparse" else "the matrix is given") in report.reason
    assert report.iterations == 0
    assert relative_error(lib, x, np.linalg.solve(a, b)) <= 1e-11


@pytest.mark.parametrize(
    ("structure", "small", "large", "reason"),
    [
        ("pos", "cholesky", "cg", "A is symmetric"),
        ("sym", "lu", "minres", "CG met zero or negative curvature"),
        ("gen", "lu", "gmres", "A is not symmetric"),
    ],
)
@pytest.mark.parametrize("n", [20, LARGE])
def test_auto_on_products(structure: str, small: str, large: str, reason: str, n: int) -> None:
    """A small operator is assembled, a large one is not."""
    a, b = matrix(structure, n), vector(n)
    x, report = linear_solve(lambda v: a @ v, b, symmetric=structure != "gen", return_report=True)
    assert report.solver == (small if n < LARGE else large)
    assert (reason if n == LARGE else f"n = {n} <= 256: assembled") in report.reason
    assert (report.iterations > 0) == (n == LARGE)
    close(x, np.linalg.solve(a, b), 1e-8)


def test_auto_runs_cg_on_a_large_hessian_and_gmres_on_a_large_root() -> None:
    a, general, b = matrix("pos", LARGE), matrix("gen", LARGE), vector(LARGE)
    hessian = Stationary(hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -u)
    x, report = implicit_vjp(hessian, b, b, b, return_report=True)
    assert report.solver == "cg"
    close(x, np.linalg.solve(a, b), 1e-8)
    y = np.linalg.solve(general, b)
    for call, m in ((implicit_vjp, general.T), (implicit_jvp, general)):
        x, report = call(linear_root(general), y, b, b, return_report=True)
        assert report.solver == "gmres"
        close(x, np.linalg.solve(m, b), 1e-8)


def test_auto_assembles_for_many_right_hand_sides() -> None:
    a, b = matrix("gen", LARGE), vector(LARGE)
    jacobian, report = implicit_jacobian(linear_root(a), np.linalg.solve(a, b), b, return_report=True)
    assert report.solver == "lu"
    assert f"{LARGE} right-hand sides: assembled" in report.reason
    close(jacobian, np.linalg.inv(a), 1e-10)


@pytest.mark.parametrize(("structure", "end"), [("pos", "cholesky"), ("sym", "lu"), ("gen", "lu")])
def test_auto_falls_back_to_a_factorisation(structure: str, end: str) -> None:
    a, b = matrix(structure, LARGE), vector(LARGE)
    x, report = linear_solve(
        lambda v: a @ v, b, solver=Auto(maxiter=3), symmetric=structure != "gen", return_report=True
    )
    assert report.solver == end
    assert "did not reach the tolerance" in report.reason
    close(x, np.linalg.solve(a, b))


def test_auto_chooses_per_item_of_a_batch() -> None:
    """The positive definite items keep Cholesky's answer, the other one gets LU's."""
    a = np.stack([matrix("pos"), matrix("sym"), matrix("pos")])
    b = vector(3, columns=(N,))
    x, report = linear_solve(a, b, batched=True, return_report=True)
    assert report.converged.all()
    for i in range(3):
        close(x[i], np.linalg.solve(a[i], b[i]))


# -- solvers of the user's -------------------------------------------------------------------------------
class Richardson(Solver):
    """X ← x + ω (b − A x), a fixed number of times; says converged whatever happened."""

    name = "richardson"

    def __init__(self, steps: int, claim: Status = Status.CONVERGED, residual: float | None = None) -> None:
        self.steps, self.claim, self.residual = steps, claim, residual

    def init(self, operator: Any) -> Any:
        return operator

    def transpose(self, state: Any) -> Any:
        return state.transpose()

    def solve(self, state: Any, b: Any, x0: Any = None) -> tuple[Any, Any, Counts]:
        x = 0 * b
        for _ in range(self.steps):
            x = x + 0.15 * (b - state.matvec(x))
        residual = None if self.residual is None else self.residual + 0 * np.sum(b, axis=-1)
        return x, self.claim, Counts(self.steps, self.steps, residual)


@pytest.fixture
def names() -> Iterator[None]:
    """Leave the table of names as it was."""
    before = dict(table._FACTORIES)
    yield
    table._FACTORIES.clear()
    table._FACTORIES.update(before)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_registered_solver_is_used_by_name(lib: Library) -> None:
    register_solver("richardson", lambda: Richardson(600))
    assert "richardson" in solver_names()
    a, b = matrix("pos"), vector()
    x, report = linear_solve(lib.array(a), lib.array(b), solver="richardson", return_report=True)
    assert relative_error(lib, x, np.linalg.solve(a, b)) <= 1e-8
    assert (report.solver, report.converged, report.iterations) == ("richardson", True, 600)
    assert report.residual <= 1e-8


def test_own_solver_gets_the_transpose_right() -> None:
    a, b = matrix("gen"), vector()
    got = implicit_vjp(linear_root(a), np.linalg.solve(a, b), b, b, solver=Richardson(600))
    close(got, np.linalg.solve(a.T, b), 1e-7)


@pytest.mark.parametrize("residual", [None, 0.0], ids=["silent", "with a residual of its own"])
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_lie_about_convergence_is_caught(lib: Library, residual: float | None) -> None:
    a, b = lib.array(matrix("pos")), lib.array(vector())
    liar = Richardson(3, residual=residual)
    with pytest.raises(NotConvergedError, match="residual"):
        linear_solve(a, b, solver=liar)
    x, report = linear_solve(a, b, solver=liar, on_failure="ignore", return_report=True)
    true = np.linalg.norm(vector() - matrix("pos") @ lib.numpy(x)) / np.linalg.norm(vector())
    assert not report.converged
    assert abs(report.residual - true) <= 1e-12


def test_approximation_is_used_but_never_called_converged() -> None:
    a, b = matrix("pos"), vector()
    x, report = linear_solve(a, b, solver=Richardson(600, Status.APPROXIMATE), return_report=True)
    close(x, np.linalg.solve(a, b), 1e-8)
    assert report.status is Status.APPROXIMATE
    assert not report.converged


@pytest.mark.usefixtures("names")
def test_names_are_neither_taken_twice_nor_guessed() -> None:
    register_solver("mine", lambda: Richardson(1))
    for name in ("mine", "cg"):
        with pytest.raises(InputError, match="taken"):
            register_solver(name, lambda: Richardson(1))
    with pytest.raises(InputError, match="factory"):
        register_solver("other", Richardson(1))  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"'chol'.*cholesky.*mine"):
        linear_solve(matrix("pos"), vector(), solver="chol")
    with pytest.raises(InputError, match="no method init"):
        linear_solve(matrix("pos"), vector(), solver=object())


# -- singular systems ------------------------------------------------------------------------------------
def singular(signs: str) -> np.ndarray:
    """Return a symmetric matrix of rank N − 3."""
    values = np.linspace(1.0, 5.0, N) * (1.0 if signs == "semidefinite" else (-1.0) ** np.arange(N))
    return with_eigenvalues(np.where(np.arange(N) % 10 == 0, 0.0, values))


@pytest.mark.parametrize("signs", ["semidefinite", "indefinite"])
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_minres_on_a_singular_consistent_system(lib: Library, signs: str) -> None:
    """The solution of least norm, from products alone."""
    a = singular(signs)
    b = a @ vector()
    x, report = linear_solve(lib.array(a), lib.array(b), solver="minres", return_report=True)
    assert report.converged
    assert np.linalg.norm(a @ lib.numpy(x) - b) <= 1e-10 * np.linalg.norm(b)
    assert relative_error(lib, x, np.linalg.pinv(a, rcond=1e-10) @ b) <= 1e-8


@pytest.mark.parametrize("signs", ["semidefinite", "indefinite"])
@pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
def test_minres_on_a_singular_inconsistent_system(lib: Library, signs: str) -> None:
    """The least-squares solution is found, and told as what it is."""
    a, b = singular(signs), vector()
    best = np.linalg.pinv(a, rcond=1e-10) @ b
    with pytest.raises(SingularError, match=r"minres: A is singular"):
        linear_solve(lib.array(a), lib.array(b), solver="minres")
    x, report = linear_solve(lib.array(a), lib.array(b), solver="minres", on_failure="ignore", return_report=True)
    assert report.status is Status.SINGULAR
    residual = np.linalg.norm(b - a @ lib.numpy(x))
    assert residual <= (1 + 1e-8) * np.linalg.norm(b - a @ best)
    assert abs(report.residual - residual / np.linalg.norm(b)) <= 1e-10


def test_minres_in_the_presence_of_a_flat_direction() -> None:
    """A loss that ignores the flat direction of the solution has a gradient, singular Hessian or not."""
    a = singular("semidefinite")
    condition = Stationary(hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -(a @ u))
    cotangent = a @ vector()
    y = vector(seed=7)
    got = implicit_vjp(condition, y, y, cotangent, solver="minres")
    close(got, cotangent, 1e-9)


@pytest.mark.parametrize("call", [implicit_vjp, implicit_jvp])
def test_minres_stops_on_the_residual_itself(call: Callable[..., Any]) -> None:
    """At a condition number of 1e7 a test on ‖r‖ / (‖A‖ ‖x‖) would stop with hardly a digit right."""
    a = with_eigenvalues(np.resize([1e-7, -2e-7, 0.3, -0.7, 1.0], N))
    b = vector()
    condition = Stationary(hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -u, mixed_jvp=lambda y, t, v: -v)
    x, report = call(condition, b, b, b, solver="minres", return_report=True)
    assert report.converged
    assert np.linalg.norm(a @ x - b) <= 1e-8 * np.linalg.norm(b)
    close(x, np.linalg.solve(a, b), 1e-6)


def contraction(n: int, scale: float = 0.8) -> np.ndarray:
    """A matrix that is not symmetric, of 2-norm ``scale``."""
    a = np.random.default_rng(3).normal(size=(n, n))
    return scale * a / np.linalg.norm(a, 2)


@pytest.mark.parametrize("batch", [0, 3])
def test_auto_tries_products_on_a_fixed_point(batch: int) -> None:
    """I − ∂T of a contraction takes a few products; in a batch also where it is small."""
    n = 150 if batch else LARGE
    w, v = contraction(n), np.random.default_rng(4).normal(size=(batch, n) if batch else n)
    fixed = FixedPoint(lambda y, t: y @ w.T + t, jvp=lambda y, t, v: v @ w.T, vjp=lambda y, t, u: u @ w)
    y = np.linalg.solve(np.eye(n) - w, v.T).T
    truth = np.linalg.solve((np.eye(n) - w).T, v.T).T
    x, report = implicit_vjp(fixed, y, v, v, batched=bool(batch), return_report=True)
    assert report.solver == "bicgstab"
    assert "A = I − ∂T" in report.reason
    assert np.all(np.asarray(report.matvecs) < n)
    close(x, truth, 1e-8)


def test_auto_factors_a_fixed_point_that_resists() -> None:
    """A product with a shift of the unknowns has its eigenvalues on a circle around 1: no few products do."""
    n = 160
    w = 1.5 * np.roll(np.eye(n), 1, axis=0)
    v = np.zeros((2, n))
    v[:, 0], v[1, :] = 1.0, np.random.default_rng(5).normal(size=n)
    fixed = FixedPoint(lambda y, t: y @ w.T + t, jvp=lambda y, t, v: v @ w.T, vjp=lambda y, t, u: u @ w)
    y = np.linalg.solve(np.eye(n) - w, v.T).T
    x, report = implicit_vjp(fixed, y, v, v, batched=True, return_report=True)
    assert report.solver == "lu"
    assert "bicgstab did not reach the tolerance" in report.reason
    close(x, np.linalg.solve((np.eye(n) - w).T, v.T).T, 1e-10)


def test_auto_does_not_take_a_singular_fixed_point_for_regular() -> None:
    n = 150
    w = contraction(n)
    values, vectors = np.linalg.eig(w)
    k = int(np.argmax(np.abs(values.imag) < 1e-12))
    w = w + (1 - values[k].real) * np.outer(vectors[:, k].real, np.linalg.inv(vectors)[k].real)
    fixed = FixedPoint(lambda y, t: y @ w.T + t, jvp=lambda y, t, v: v @ w.T, vjp=lambda y, t, u: u @ w)
    assert abs(np.linalg.eigvals(w) - 1).min() < 1e-12
    v = np.random.default_rng(4).normal(size=(3, n))
    with pytest.raises(SolveError):
        implicit_vjp(fixed, 0 * v, 0 * v, v, batched=True)
