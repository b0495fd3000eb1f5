"""FAULTS 67 and 71, and singular A told as such: what the iterative methods make of extreme norms and bad options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES, Library, with_condition
from problems import N, matrix, vector, with_eigenvalues

from implicitdiff import (
    CG,
    GMRES,
    LDLT,
    LU,
    MINRES,
    Auto,
    BiCGSTAB,
    Cholesky,
    InputError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    PreconditionerError,
    Root,
    SingularError,
    SolveError,
    Stationary,
    Status,
    implicit_vjp,
    linear_solve,
)

KRYLOV: dict[str, Any] = {"cg": CG, "minres": MINRES, "gmres": GMRES, "bicgstab": BiCGSTAB}
LIBS = pytest.mark.parametrize("lib", [LIBRARIES[0], *LIBRARIES[3:]], ids=lambda lib: lib.name)


def chain(v: np.ndarray) -> np.ndarray:
    """Laplacian of a chain: singular, with the constant vector in its null space."""
    edges = np.diff(v)
    return np.concatenate([[0.0], edges]) - np.concatenate([edges, [0.0]])


# -- 67: norms whose squares over- or underflow --------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", 1e20), ("float32", 1e-25), ("float32", 1e30), ("float64", 1e200), ("float64", 1e-200)],
)
def test_67_extreme_norms(lib: Library, solver: str, dtype: str, scale: float) -> None:
    """By products alone, so that nothing is equilibrated before."""
    a = matrix("gen" if solver in {"gmres", "bicgstab"} else "pos")
    m, b = lib.array(a, dtype), lib.array(vector(), dtype)

    def product(v: Any) -> Any:
        return scale * (m @ v)

    x, report = linear_solve(
        product, b, solver=solver, symmetric=solver not in {"gmres", "bicgstab"}, return_report=True
    )
    exact = np.linalg.solve(a, vector()) / scale
    assert np.abs(lib.numpy(x) / exact.max() - exact / exact.max()).max() <= (1e-8 if dtype == "float64" else 1e-3)
    assert report.converged


@pytest.mark.parametrize("solver", KRYLOV)
def test_67_in_a_batch_each_item_has_its_scale(solver: str) -> None:
    scales = np.array([1e-200, 1.0, 1e200])
    a, b = matrix("pos"), np.tile(vector(), (3, 1))
    x = linear_solve(lambda v: scales[:, None] * (v @ a), b, solver=solver, symmetric=True, batched=True)
    np.testing.assert_allclose(x * scales[:, None], np.tile(np.linalg.solve(a, vector()), (3, 1)), rtol=1e-7)


# -- regular, and nearly a breakdown of BiCGSTAB -------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [4, 20])
@LIBS
def test_a_skew_symmetric_matrix_and_a_little_of_the_identity(lib: Library, n: int, dtype: str) -> None:
    """The condition number is 3 at most, and r̃ᵀA r is δ: the step 1/δ would lose its digits."""
    for delta in 10.0 ** -np.arange(1, 17):
        for seed in range(2):
            rng = np.random.default_rng(seed)
            Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
            S = np.kron(np.diag(rng.uniform(1, 3, n // 2)), [[0.0, 1.0], [-1.0, 0.0]])
            A, b = (x.astype(dtype) for x in (Q @ (S + delta * np.eye(n)) @ Q.T, rng.standard_normal(n)))
            x = linear_solve(lib.array(A), lib.array(b), solver="bicgstab")
            exact = np.linalg.solve(A.astype(float), b)
            assert np.linalg.norm(lib.numpy(x) - exact) <= (1e-8 if dtype == "float64" else 0.03) * np.linalg.norm(
                exact
            )


# -- singular, and told so -----------------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("solver", [*KRYLOV, "auto"])
def test_inconsistent_diagonal_is_singular(lib: Library, solver: str) -> None:
    d = lib.array([1.0, 2.0, 0.0])
    with pytest.raises(SingularError, match="singular"):
        linear_solve(lambda v: d * v, lib.array(np.ones(3)), solver=solver, symmetric=True)


@pytest.mark.parametrize("solver", ["cg", "auto"])
def test_inconsistent_chain_is_singular_before_it_overflows(solver: str) -> None:
    """It ran 50 000 iterations into overflow, and `auto` went on to minres."""
    b = vector(5000)
    with pytest.raises(SingularError) as caught:
        linear_solve(chain, b, solver=solver, symmetric=True)
    assert caught.value.report.iterations <= 5010
    assert np.all(np.isfinite(caught.value.value))


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("n", [50, 200])
def test_consistent_chain_is_solved(solver: str, n: int) -> None:
    b = vector(n) - vector(n).mean()
    x = linear_solve(chain, b, solver=solver, symmetric=True)
    assert np.linalg.norm(chain(x) - b) <= 1e-9 * np.linalg.norm(b)


@pytest.mark.parametrize("solver", [*KRYLOV, "auto"])
@pytest.mark.parametrize("kind", ["diagonal", "turned"])
def test_short_chain_with_gmres_too(solver: str, kind: str) -> None:
    values = np.r_[0.0, np.linspace(1.0, 10.0, 59)]
    a = np.diag(values) if kind == "diagonal" else with_eigenvalues(values)
    with pytest.raises(SingularError):
        linear_solve(lambda v: a @ v, vector(60), solver=solver, symmetric=True)


@LIBS
@pytest.mark.parametrize("rank", [59, 50])
def test_singular_to_the_accuracy_of_single_precision(lib: Library, rank: int) -> None:
    """Eigenvalues that are rounding are no eigenvalues."""
    a = lib.array(with_eigenvalues(np.r_[np.zeros(60 - rank), np.logspace(-1, 0, rank)]), "float32")
    with pytest.raises(SingularError):
        linear_solve(lambda v: a @ v, lib.array(vector(60), "float32"), solver="cg", symmetric=True)


@LIBS
@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_minres_in_single_precision_that_diverges_is_singular(lib: Library, gap: float) -> None:
    """Steps along a null vector make the residual grow, where orthogonality is lost before the singularity is seen."""
    values = np.r_[gap, np.linspace(0.3, 1.0, 39) * np.where(np.arange(39) % 2, -1, 1)]
    a = lib.array(with_eigenvalues(values), "float32")
    options = {"solver": MINRES(maxiter=300), "symmetric": True, "on_failure": "ignore", "return_report": True}
    report = linear_solve(lambda v: a @ v, lib.array(vector(40), "float32"), **options)[1]
    assert report.status is (Status.CONVERGED if gap else Status.SINGULAR)


@pytest.mark.parametrize("solver", KRYLOV)
def test_ill_conditioned_is_not_called_singular(solver: str) -> None:
    a = with_eigenvalues(np.logspace(-6, 0, N))
    x, report = linear_solve(lambda v: a @ v, vector(), solver=solver, symmetric=True, return_report=True)
    assert report.converged
    assert np.linalg.norm(a @ x - vector()) <= 1e-9 * np.linalg.norm(vector())


def test_zero_curvature_of_a_regular_matrix_is_not_singular() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="zero or negative curvature"):
        linear_solve(lambda v: np.array([1.0, -1.0]) * v, np.ones(2), solver="cg", symmetric=True)


# -- 71: the preconditioner is asked first -------------------------------------------------------------------------
SKEW = np.triu(np.random.default_rng(3).normal(size=(N, N)))
BAD: dict[str, np.ndarray] = {"NaN": np.full((N, N), np.nan), "zero": np.zeros((N, N)), "-I": -np.eye(N),
    "indefinite": np.diag((-1.0) ** np.arange(N)), "not symmetric": SKEW}  # fmt: skip


@LIBS
@pytest.mark.parametrize("form", ["matrix", "callable"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("solver", [*KRYLOV, "auto"])
def test_71_bad_preconditioner_is_named(lib: Library, solver: str, bad: str, form: str) -> None:
    """A right answer is right; where there is none, A is not blamed."""
    m = lib.array(BAD[bad])
    given = m if form == "matrix" else lambda v: m @ v
    method = {**KRYLOV, "auto": Auto}[solver](preconditioner=given, maxiter=200)
    a, b = matrix("pos"), vector()
    product = lib.array(a)
    x, report = linear_solve(
        lambda v: product @ v, lib.array(b), solver=method, symmetric=True, on_failure="ignore", return_report=True,
    )  # fmt: skip
    if report.status == Status.CONVERGED:
        assert bad not in {"NaN", "zero"}
        assert np.linalg.norm(a @ lib.numpy(x) - b) <= 1e-9 * np.linalg.norm(b)
    elif solver in {"gmres", "bicgstab"} and bad in {"not symmetric", "indefinite"}:
        assert report.status in {Status.MAX_ITERATIONS, Status.STAGNATED}
    else:
        assert report.status == Status.BAD_PRECONDITIONER


@pytest.mark.parametrize("solver", [*KRYLOV.values(), Auto])
def test_71_the_error_names_the_preconditioner(solver: Any) -> None:
    with pytest.raises(PreconditionerError, match="the preconditioner is"):
        linear_solve(lambda v: 2 * v, vector(), solver=solver(preconditioner=lambda v: 0 * v), symmetric=True)


def test_71_a_good_preconditioner_is_not_blamed() -> None:
    """A is singular, indefinite or not symmetric: that is what is told."""
    m = np.diag(np.linspace(1.0, 2.0, N))
    for a, kind in ((-np.eye(N), NotPositiveDefiniteError), (np.eye(N) + 3 * np.triu(SKEW, 1), NotSymmetricError)):
        with pytest.raises(kind):
            linear_solve(lambda v, a=a: a @ v, vector(), solver=CG(preconditioner=m, maxiter=100), symmetric=True)
    flat = np.diag(np.r_[0.0, np.ones(N - 1)])
    for solver in KRYLOV.values():
        with pytest.raises(SingularError):
            linear_solve(lambda v: flat @ v, vector(), solver=solver(preconditioner=m), symmetric=True)


WRONG: list[tuple[Any, dict[str, Any]]] = [
    *((kind, {"damping": bad}) for kind in (LU, LDLT, Cholesky, CG, MINRES, GMRES, BiCGSTAB, Auto)
      for bad in (math.nan, math.inf, "x", None, True, [1.0])),
    *((kind, {"rtol": bad}) for kind in (CG, MINRES, GMRES, BiCGSTAB, Auto)
      for bad in (math.nan, -1.0, 0.0, 1, "1e-3", True)),
    *((kind, {"maxiter": bad}) for kind in (CG, MINRES, GMRES, BiCGSTAB, Auto)
      for bad in (-1, 0, 2.5, "9", math.nan, True)),
    *((GMRES, {"restart": bad}) for bad in (2.5, 0, -1, "x", math.nan)),
    (GMRES, {"side": "top"}), (GMRES, {"side": 1}), (Auto, {"rtol": math.nan, "maxiter": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), WRONG)
def test_71_options_are_refused_by_name(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^{next(iter(options))} = .*: {kind.__name__} expects "):
        kind(**options)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(2), 0, -0.1])
def test_71_numbers_of_numpy_are_numbers(value: Any) -> None:
    assert LU(damping=value).damping == value
    assert CG(maxiter=np.int32(5)).maxiter == 5


# -- advice --------------------------------------------------------------------------------------------------------
def text(a: np.ndarray, solver: Any, **tags: Any) -> str:
    """Return the message of a solve that fails."""
    with pytest.raises(SolveError) as caught:
        linear_solve(lambda v: a @ v, vector(len(a)), solver=solver, **tags)
    return str(caught.value)


def test_advice_goes_by_what_is_known_of_a() -> None:
    singular = np.diag(np.r_[0.0, np.ones(9)]) + np.eye(10, k=1) * np.r_[np.zeros(1), np.ones(9)]
    assert "lu'" not in text(singular, "lu", symmetric=False)
    assert "minres" not in text(singular, "lu", symmetric=False)
    assert "solver='minres'" not in text(np.diag(np.r_[0.0, np.ones(9)]), "minres", symmetric=True)
    assert "solver='minres'" in text(-np.eye(10), "cg", symmetric=True)
    assert "solver='gmres'" in text(-np.eye(10), "cg")
    assert len(text(-np.eye(10), "cg").splitlines()) <= 5


def test_a_symmetric_jacobian_is_not_called_asymmetric() -> None:
    a, b = matrix("pos"), vector()
    root = Root(lambda y, t: a @ y - t, jacobian=lambda y, t: a, mixed_vjp=lambda y, t, u: -u)
    _, report = implicit_vjp(root, np.linalg.solve(a, b), b, b, return_report=True)
    assert "A is not symmetric" not in report.reason


def test_a_singular_hessian_through_the_front_door() -> None:
    d = np.array([1.0, 2.0, 0.0])
    condition = Stationary(grad=lambda y, t: d * y - t, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -u)
    with pytest.raises(SingularError):
        implicit_vjp(condition, np.array([1.0, 1.0, 0.0]), np.array([1.0, 2.0, 0.0]), np.ones(3), solver="cg")


@pytest.mark.parametrize("solver", KRYLOV)
def test_products_that_cancel_round_more(solver: str) -> None:
    """A x as 7 x - W x in single precision, condition 200: no product is better than that, and it is no failure."""
    # bicgstab sees less of ‖A‖, and so of the rounding: of 400, four stay a little above what is allowed, and are told
    for seed in range(30):
        A, b = with_condition(4, 200.0, seed, kind="general" if solver in {"gmres", "bicgstab"} else "definite")
        W, weakest = (7 * np.eye(4) - A).astype(np.float32), np.linalg.svd(A)[0][:, -1]
        right = (b + 3 * weakest).astype(np.float32)
        symmetric = None if solver in {"gmres", "bicgstab"} else True
        x = linear_solve(lambda v, W=W: np.float32(7) * v - W @ v, right, solver=solver, symmetric=symmetric)
        assert np.linalg.norm(x - np.linalg.solve(A, right)) <= 1e-2 * np.linalg.norm(x)


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_small_matrix_that_the_space_does_not_show(solver: str) -> None:
    """In single precision b has hardly a part along the weakest direction, and that part is most of the solution."""
    values, Q = np.linalg.eigh(with_eigenvalues([1.0, 0.5, 0.1, 1e-7], 3))
    A, b = ((Q * values) @ Q.T).astype("float32"), (Q @ [1e-5, 1.0, 1.0, 1.0]).astype("float32")
    with pytest.raises(SingularError):
        linear_solve(A, b, solver=solver)
