"""Methods of least squares: against the pseudo-inverse, singular, rectangular and in unlike units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from conftest import LIBRARIES, TORCH, Library, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdiff import GMRES, LSMR, MINRESQLP, Pinv, SingularError, Stationary, Status, implicit_vjp, linear_solve
from implicitdiff.solvers import get_solver, suitable

LIBS = pytest.mark.parametrize("lib", [*LIBRARIES[:2], *TORCH], ids=lambda lib: lib.name)
METHODS = tuple(name for name in suitable("symmetric") if get_solver(name).least_squares)
RECTANGULAR = tuple(name for name in METHODS if not get_solver(name).square)
N = 20


def symmetric(values: Any, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix of order N with these eigenvalues, and zeros."""
    values = np.concatenate([np.asarray(values, dtype=float), np.zeros(N - len(values))])
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
    a = (q * values) @ q.T
    return (a + a.T) / 2


SIGNS = (-1.0) ** np.arange(N)
SPECTRA = {
    "regular": np.linspace(1, 5, N) * SIGNS, "nullity 1": np.linspace(1, 5, N - 1), "nullity 5": SIGNS[5:],
    "ill-conditioned": np.geomspace(1e-5, 1, N - 3) * SIGNS[3:], "zero but one": [2.0],
}  # fmt: skip


def vector(n: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def pseudo(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.pinv(a, rcond=1e-11) @ b


def test_the_attributes_say_what_they_are() -> None:
    assert METHODS == ("lsmr", "minres_qlp", "pinv")
    assert RECTANGULAR == ("lsmr", "pinv")
    assert "minres_qlp" not in suitable()


@LIBS
@pytest.mark.parametrize("form", ["matrix", "product"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("solver", METHODS)
def test_against_the_pseudo_inverse(lib: Library, solver: str, spectrum: str, form: str) -> None:
    """With a solution and without one; the report says which, and of pinv the rank."""
    a, b = symmetric(SPECTRA[spectrum]), vector()
    given_a = lib.array(a)
    A = given_a if form == "matrix" else (lambda v: given_a @ v)
    for right, end in ((a @ b, Status.CONVERGED), (b, Status.LEAST_SQUARES)):
        end = Status.CONVERGED if spectrum == "regular" else end
        x, report = linear_solve(A, lib.array(right), solver=solver, symmetric=True, return_report=True)
        assert report.status is end
        assert relative_error(lib, x, pseudo(a, right)) <= (1e-6 if spectrum == "ill-conditioned" else 1e-9)
        left = np.linalg.norm(right - a @ lib.numpy(x)) / np.linalg.norm(right)
        assert abs(report.residual - left) <= 1e-10
        if end is Status.LEAST_SQUARES:
            assert not report.converged
            assert abs(report.leak - left) <= 1e-10
        if solver == "pinv":
            assert (report.rank, report.nullity) == (len(SPECTRA[spectrum]), N - len(SPECTRA[spectrum]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), nullity=st.integers(0, 3), solver=st.sampled_from(METHODS))
def test_rank_and_least_norm_do_not_depend_on_units(seed: int, nullity: int, solver: str) -> None:
    """Rows and columns times powers of ten: the rank stays, and the norm that is least is the user's all the same."""
    rng = np.random.default_rng(seed)
    a = symmetric(np.linspace(1, 3, N - nullity) * SIGNS[nullity:], seed)
    d = 10.0 ** rng.integers(-3, 4, N)
    scaled, b = d[:, None] * a * d, d * (a @ rng.normal(size=N))
    x, report = linear_solve(scaled, b, solver=solver, return_report=True)
    # null vectors of D A D are those of A over d: projected out by QR
    values, vectors = np.linalg.eigh(a)
    null = np.linalg.qr(vectors[:, np.abs(values) < 1e-10] / d[:, None])[0]
    truth = pseudo(a, b / d) / d
    truth = truth - null @ (null.T @ truth)
    assert report.converged
    assert report.rank == N - nullity
    np.testing.assert_allclose(x, truth, rtol=1e-6, atol=1e-6 * np.max(np.abs(truth)))


@LIBS
@pytest.mark.parametrize("shape", [(15, 6), (6, 15)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [6, 3])
@pytest.mark.parametrize("solver", RECTANGULAR)
def test_rectangular(lib: Library, solver: str, rank: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    for b in (rng.normal(size=shape[0]), rng.normal(size=(shape[0], 3))):
        x, report = linear_solve(lib.array(a), lib.array(b), solver=solver, return_report=True)
        assert relative_error(lib, x, pseudo(a, b)) <= 1e-9
        solvable = rank == shape[0]
        assert report.status is (Status.CONVERGED if solvable else Status.LEAST_SQUARES)


@pytest.mark.parametrize("solver", RECTANGULAR)
def test_rectangular_batches_operators_and_sparse(solver: str) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(3, 12, 5)), rng.normal(size=(3, 12))
    truth = np.stack([pseudo(*item) for item in zip(a, b, strict=True)])
    np.testing.assert_allclose(linear_solve(a, b, solver=solver, batched=True), truth, rtol=1e-9)
    for form in (scipy.sparse.csr_array, scipy.sparse.linalg.aslinearoperator):
        np.testing.assert_allclose(linear_solve(form(a[0]), b[0], solver=solver), truth[0], rtol=1e-9)


@pytest.mark.parametrize("method", [LSMR, Pinv])
def test_damping_of_a_rectangular_system_is_tikhonovs(method: Any) -> None:
    """As SciPy's lsmr has it; of a square one it is that of A + δI, as everywhere."""
    rng = np.random.default_rng(5)
    for shape in ((15, 6), (6, 15)):
        a, b = rng.normal(size=shape), rng.normal(size=shape[0])
        reference = scipy.sparse.linalg.lsmr(a, b, damp=0.3, atol=1e-14, btol=1e-14, conlim=0)[0]
        np.testing.assert_allclose(linear_solve(a, b, solver=method(damping=0.3)), reference, rtol=1e-9)
    a = symmetric(SPECTRA["nullity 1"])
    x = linear_solve(a, b := vector(), solver=method(damping=0.3))
    np.testing.assert_allclose(x, np.linalg.solve(a + 0.3 * np.eye(N), b), rtol=1e-8)


def test_lsmr_takes_the_iterations_of_scipys() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(200, 60)) * np.geomspace(1, 30, 60), rng.normal(size=200)
    x, report = linear_solve(a, b, solver="lsmr", return_report=True)
    reference, _, iterations, *_ = scipy.sparse.linalg.lsmr(a, b, atol=1e-14, btol=1e-14, conlim=0, maxiter=1000)
    np.testing.assert_allclose(x, reference, rtol=1e-8, atol=1e-10)
    assert report.iterations <= 1.3 * iterations + 5


@pytest.mark.parametrize("method", [LSMR, MINRESQLP])
def test_a_preconditioner_changes_the_iterations_not_the_solution(method: Any) -> None:
    d = np.geomspace(1, 1e4, N)
    a = np.diag(d) + 0.1 * symmetric(SPECTRA["regular"])
    a, b = (a + a.T) / 2, vector()
    plain, first = linear_solve(lambda v: a @ v, b, solver=method(), symmetric=True, return_report=True)
    x, second = linear_solve(
        lambda v: a @ v, b, solver=method(preconditioner=1 / d), symmetric=True, return_report=True
    )
    np.testing.assert_allclose(x, plain, rtol=1e-6, atol=1e-9)
    assert second.iterations < first.iterations


@pytest.mark.parametrize("solver", METHODS)
def test_a_derivative_without_a_solution_is_an_error(solver: str) -> None:
    """... and one that has a solution is right: the loss does not see the null space."""
    a = symmetric(SPECTRA["nullity 1"])
    condition = Stationary(hvp=lambda y, t, v: a @ v, mixed_vjp=lambda y, t, u: -(a @ u), kind="minimum")
    y = vector(seed=7)
    with pytest.raises(SingularError, match="no solution"):
        implicit_vjp(condition, y, y, vector(), solver=solver)
    found = implicit_vjp(condition, y, y, a @ vector(), solver=solver)
    np.testing.assert_allclose(found, a @ vector(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", METHODS)
def test_a_regular_matrix_is_not_taken_for_a_singular_one(solver: str) -> None:
    """At condition numbers that are no reason to give up a residual is no least-squares residual."""
    for condition in (1e4, 1e6, 1e9):
        a, b = symmetric(np.geomspace(1 / condition, 1, N)), vector()
        x, report = linear_solve(a, b, solver=solver, on_failure="ignore", return_report=True)
        assert report.status is not Status.LEAST_SQUARES
        if report.converged:
            rounding = np.finfo(float).eps * np.linalg.norm(a, 2) * np.linalg.norm(x)
            assert np.linalg.norm(a @ x - b) <= 1e-9 * np.linalg.norm(b) + 16 * rounding


@pytest.mark.skipif(not TORCH, reason="needs Torch")
@pytest.mark.parametrize("solver", RECTANGULAR)
def test_torch_differentiates_least_squares(solver: str) -> None:
    """With the terms of the motion of range and null space: forward and reverse, against differences."""
    import torch

    torch.manual_seed(0)
    tall, wide = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (3, 5)))
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def solve(a: Any, b: Any) -> Any:
        return linear_solve(a, b, solver=solver)

    def through_factors(a: Any, c: Any, b: Any) -> Any:  # of rank 3, wherever the factors move to
        return linear_solve(a @ c, b, solver=solver)

    check = torch.autograd.gradcheck
    assert check(solve, (tall.requires_grad_(), b), atol=1e-6, check_forward_ad=True)
    assert check(through_factors, (tall, wide.requires_grad_(), b), atol=1e-6, check_forward_ad=True)


def path_graph(n: int) -> Any:
    """The Laplacian of a path: singular, and its least other eigenvalue is about (π / n)²."""
    return scipy.sparse.diags_array(
        [np.r_[1.0, 2 * np.ones(n - 2), 1.0], -np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1, -1]
    ).tocsr()


@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize("solver", ["gmres", "auto", "cg", "minres"])
def test_a_long_chain_without_a_solution_is_singular(solver: str, symmetric: bool | None) -> None:
    """GMRES forgets at each restart, and would take 10 n iterations to nothing."""
    n = 5000
    L, b = path_graph(n), np.random.default_rng(0).standard_normal(n)
    if solver == "auto" and symmetric is None:
        n = 4500  # above what is factored
        L, b = path_graph(n), b[:n]
    options: dict[str, Any] = {"symmetric": symmetric, "return_report": True, "on_failure": "ignore"}
    _, report = linear_solve(lambda v: L @ v, b, solver=GMRES(restart=30) if solver == "gmres" else solver, **options)
    assert report.status == Status.SINGULAR
    assert report.iterations <= 2 * n


@pytest.mark.parametrize("restart", [10, None])
def test_gmres_that_stands_still_on_a_symmetric_matrix_gets_there(restart: int | None) -> None:
    """The path with one end held is regular, at a condition number of 4e5; what is not symmetric stays with GMRES."""
    n = 1500
    L = (path_graph(n) + scipy.sparse.coo_array(([1.0], ([0], [0])), shape=(n, n))).tocsr()
    x = np.random.default_rng(1).standard_normal(n)
    found, report = linear_solve(lambda v: L @ v, L @ x, solver=GMRES(restart=restart), return_report=True)
    assert (report.solver, bool(report.converged)) == ("minres", True)
    assert np.linalg.norm(found - x) <= 1e-4 * np.linalg.norm(x)
    turned = scipy.sparse.csr_array(L + scipy.sparse.diags_array([0.5 * np.ones(n - 1)], offsets=[1]))
    options: dict[str, Any] = {"return_report": True, "on_failure": "ignore", "solver": GMRES(restart=10, maxiter=2000)}
    assert linear_solve(lambda v: turned @ v, turned @ x, **options)[1].solver == "gmres"


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
def test_items_of_a_batch_are_handed_on_one_by_one(lib: Library) -> None:
    """What GMRES solves stays as it is, beside a chain that it does not."""
    n, x = 200, np.random.default_rng(2).standard_normal((2, 200))
    held = path_graph(n).toarray()
    held[0, 0] += 1
    A = np.stack([np.eye(n) + 0.1 * held, held])
    b, solver = (A @ x[..., None])[..., 0], GMRES(restart=5)
    found, report = linear_solve(lib.array(A), lib.array(b), solver=solver, batched=True, return_report=True)
    assert lib.numpy(report.converged).all()
    assert np.linalg.norm(lib.numpy(found) - x) <= 1e-4 * np.linalg.norm(x)
    alone = linear_solve(lib.array(A[:1]), lib.array(b[:1]), solver=solver, batched=True)
    np.testing.assert_allclose(lib.numpy(found)[0], lib.numpy(alone)[0], rtol=1e-12)
