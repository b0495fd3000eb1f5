"""FAULTS 56: systems in mixed units are equilibrated: what is singular, converged or right does not depend on units."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, STRICT, TORCH, Library, assert_told, outcome, relative_error, with_condition
from generated import Posed, make

from implicitdiff import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    NotSymmetricError,
    PreconditionerError,
    Root,
    SingularError,
    Stationary,
    implicit_jacobian,
    implicit_vjp,
    linear_solve,
)
from implicitdiff.linalg.blocks import largest_linked
from implicitdiff.linalg.equilibration import of_matrix, of_sparse
from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.registry import get_backend

GENERAL = ("auto", "lu", "gmres")
SYMMETRIC = (*GENERAL, "cholesky", "ldlt", "cg", "minres")
libraries = pytest.mark.parametrize("lib", [NUMPY, STRICT, *TORCH], ids=lambda lib: lib.name)


def units(n: int, seed: int, span: float = 9.0) -> np.ndarray:
    """Units from 10^-span to 10^span."""
    return 10.0 ** np.random.default_rng(seed).uniform(-span, span, n)


def scaled_system(kind: str, seed: int, n: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A x = b of condition 100, and S A D⁻¹ (D x) = S b."""
    A, _ = with_condition(n, 100.0, seed, kind=kind)
    x, D = np.random.default_rng(seed).standard_normal(n), units(n, seed + 1)
    S = 1 / D if kind != "general" else units(n, seed + 2)
    M = S[:, None] * A / D
    if kind != "general":
        M = np.tril(M) + np.tril(M, -1).T  # the same to the last bit above and below
    return M, S * (A @ x), D * x


@libraries
@pytest.mark.parametrize(
    ("kind", "solver"),
    [("general", s) for s in GENERAL] + [("definite", s) for s in SYMMETRIC]
    + [("indefinite", s) for s in ("auto", "lu", "ldlt", "minres", "gmres")],
)  # fmt: skip
def test_mixed_units(lib: Library, kind: str, solver: str) -> None:
    """Each entry of the solution is right in its own unit, and nothing is singular."""
    M, b, x = scaled_system(kind, 5)
    found, report = linear_solve(lib.array(M), lib.array(b), solver=solver, return_report=True)
    assert np.max(np.abs(lib.numpy(found) - x) / np.abs(x)) <= (1e-10 if report.iterations == 0 else 1e-6)
    assert report.converged
    assert report.residual <= 1e-9


@pytest.mark.parametrize("solver", SYMMETRIC)
def test_mixed_units_sparse(solver: str) -> None:
    M, b, x = scaled_system("definite", 6)
    found = linear_solve(scipy.sparse.csc_array(M), b, solver=solver)
    assert np.max(np.abs(found - x) / np.abs(x)) <= 1e-6


@pytest.mark.parametrize("factor", [1e16, 1e30])
@pytest.mark.parametrize("solver", ["auto", "lu", "cholesky", "cg", "minres"])
def test_penalty_rows(solver: str, factor: float) -> None:
    """Boundary values imposed by a huge diagonal entry: neither singular nor blind to the other rows."""
    A, x = with_condition(20, 100.0, 7)[0], np.linspace(-1, 2, 20)
    A[3, 3] += factor
    assert np.max(np.abs(linear_solve(A, A @ x, solver=solver) - x)) <= 1e-7


@libraries
@pytest.mark.parametrize("solver", SYMMETRIC)
def test_pressure_beside_a_fraction(lib: Library, solver: str) -> None:
    """1.05e7 Pa beside 0.38: curvatures of 1e-14 and of 4."""
    y, c = np.array([1.05e7, 0.38]), np.array([1.05, 0.38])
    diagonal = lib.array([[2e-14, 0.0], [0.0, 4.0]])
    mixed = lib.array([[-2e-7, 0.0], [0.0, -4.0]])
    condition = Stationary(
        lambda y, c: (y[0] / 1e7 - c[0]) ** 2 + 2 * (y[1] - c[1]) ** 2, hessian=lambda y, c: diagonal,
        mixed_jvp=lambda y, c, t: mixed @ t, mixed_vjp=lambda y, c, u: mixed @ u,
    )  # fmt: skip
    found = lib.numpy(implicit_jacobian(condition, lib.array(y), lib.array(c), solver=solver))
    assert np.allclose(found, np.diag([1e7, 1.0]), rtol=1e-9, atol=0)


@libraries
@pytest.mark.parametrize("solver", ["auto", "gmres", "lu"])
def test_rows_in_units_of_their_own(lib: Library, solver: str) -> None:
    """Rows of 1e-5 beside rows of 1e6, from a Jacobian that is given."""
    A, C, theta = with_condition(8, 10.0, 8, kind="general")[0], np.eye(8), np.linspace(1.0, 2.0, 8)
    S = np.where(np.arange(8) % 2, 1e-5, 1e6)
    matrix, data = lib.array(S[:, None] * A), lib.array(S[:, None] * C)
    condition = Root(
        lambda y, t: matrix @ y - data @ t, jacobian=lambda y, t: matrix,
        mixed_vjp=lambda y, t, u: -(u @ data), mixed_jvp=lambda y, t, v: -(data @ v),
    )  # fmt: skip
    y, v = np.linalg.solve(A, theta), np.linspace(-1.0, 1.0, 8)
    found = implicit_vjp(condition, lib.array(y), lib.array(theta), lib.array(v), solver=solver)
    assert relative_error(lib, found, np.linalg.solve(A.T, v)) <= 1e-8


@pytest.mark.parametrize("solver", ["cg", "minres", "gmres"])
@pytest.mark.parametrize("parts", [(5, 7), (1,) * 12], ids=["two leaves", "twelve leaves"])
def test_leaves_are_scaled_against_each_other(solver: str, parts: tuple[int, ...]) -> None:
    """With products only, a leaf of y is the unit."""
    A, _ = with_condition(12, 100.0, 9)
    unit = np.repeat(10.0 ** np.linspace(-6, 6, len(parts)), parts)
    theta, v = np.linspace(1.0, 2.0, 12), np.linspace(-1.0, 1.0, 12) / unit
    cuts = np.cumsum(parts)[:-1]
    cut, join = (lambda x: tuple(np.split(x, cuts))), np.concatenate
    condition = Stationary(
        grad=lambda y, t: cut((A @ (join(y) / unit) - t) / unit), hvp=lambda y, t, w: cut(A @ (join(w) / unit) / unit),
        mixed_vjp=lambda y, t, u: -join(u) / unit,
    )  # fmt: skip
    y = cut(np.linalg.solve(A, theta) * unit)
    found = implicit_vjp(condition, y, theta, cut(v), solver=solver)
    assert relative_error(NUMPY, found, np.linalg.solve(A, v * unit)) <= 1e-7


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaling_is_by_powers_of_two_and_undoes_units(symmetric: bool) -> None:
    backend = get_backend("numpy")
    M, _, _ = scaled_system("definite" if symmetric else "general", 10)
    scaling = of_matrix(backend, M, symmetric=symmetric)
    assert scaling is not None
    for part in scaling:
        assert np.array_equal(np.frexp(part)[0], np.full(12, 0.5))
    equilibrated = scaling.rows[:, None] * M * scaling.columns
    assert np.linalg.cond(equilibrated) <= 1e4
    assert of_matrix(backend, with_condition(12, 10.0, 0)[0], symmetric=symmetric) is None


@pytest.mark.parametrize(("symmetric", "noise"), [(True, 0.0), (False, 0.0), (False, 1e-16), (False, 1e-8)])
@pytest.mark.parametrize("sparse", [True, False])
def test_units_are_undone_whatever_the_pattern_of_zeros(symmetric: bool, sparse: bool, noise: float) -> None:
    """Exact zeros, or what rounding left in their places; once in three the diagonal has some, too."""
    rng, ratios = np.random.default_rng(3), []
    for _ in range(60):
        n = int(rng.integers(2, 12))
        kept = (rng.random((n, n)) < rng.choice([0.15, 0.3, 0.6])) | (np.eye(n) * rng.random(n) < rng.choice([0.7, 2]))
        A = np.where(kept, rng.standard_normal((n, n)), noise * rng.standard_normal((n, n)))
        A = np.triu(A) + np.triu(A, 1).T if symmetric else A
        if not np.linalg.cond(A) < 1e3:
            continue
        D, S = units(n, int(rng.integers(1000))), units(n, int(rng.integers(1000)))
        M = (1 / D if symmetric else S)[:, None] * A / D
        one = of_sparse(get_backend("numpy"), scipy.sparse.csc_array(M), symmetric=symmetric) if sparse else None
        scaling = one if sparse else of_matrix(get_backend("numpy"), M, symmetric=symmetric)
        found = M if scaling is None else scaling.rows[:, None] * M * scaling.columns
        ratios.append(np.linalg.cond(found) / np.linalg.cond(A))
    assert len(ratios) > 20
    assert max(ratios) < 100


@pytest.mark.parametrize("solver", ["auto", "lu", "gmres"])
def test_a_column_in_a_tiny_unit_with_a_zero_in_it(solver: str) -> None:
    A = np.array([[2.9, 0.3, 0.1], [0.1, 2.5, -0.4], [0.2, 0.0, 1.3]])
    for unit in (1e12, 1e-12):
        M = A * np.array([1.0, unit, 1.0])
        x, report = linear_solve(M, np.ones(3), solver=solver, return_report=True)
        assert report.converged
        np.testing.assert_allclose(x * np.array([1.0, unit, 1.0]), np.linalg.solve(A, np.ones(3)), rtol=1e-8)


# -- the precision in which A was made ------------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*TORCH, *JAX], ids=lambda lib: lib.name)
@pytest.mark.parametrize("solver", ["auto", "lu", "ldlt"])
def test_singular_to_single_precision(lib: Library, solver: str) -> None:
    """Collinear features in float32: the factors are in double, A is not."""
    rng = np.random.default_rng(11)
    X = rng.standard_normal((20, 3))
    X = np.column_stack([X, X[:, 0] + X[:, 1]]).astype(np.float32)
    t = rng.standard_normal(20).astype(np.float32)
    y = np.linalg.lstsq(X.astype(float), t.astype(float), rcond=1e-6)[0].astype(np.float32)
    data = lib.array(X)
    condition = Stationary(lambda y, t: 0.5 * ((data @ y - t) ** 2).sum())
    with pytest.raises(SingularError):
        implicit_vjp(condition, lib.array(y), lib.array(t), lib.array(np.eye(4, dtype=np.float32)[0]), solver=solver)


@pytest.mark.parametrize("solver", ["auto", "lu", "cholesky"])
def test_asymmetry_by_rounding_is_no_failure(solver: str) -> None:
    """A Hessian whose halves differ by 4e-11, at condition 8e5: the symmetric part is what is meant."""
    A, b = with_condition(12, 8e5, 12)
    noise = 4e-11 * np.random.default_rng(12).standard_normal((12, 12))
    found = linear_solve(A + np.triu(noise, 1), b, solver=solver, symmetric=True)
    assert relative_error(NUMPY, found, np.linalg.solve(A + (np.triu(noise, 1) + np.triu(noise, 1).T) / 2, b)) <= 1e-9


@pytest.mark.slow
@pytest.mark.skipif(not JAX, reason="needs JAX")
def test_small_trees_in_mixed_units_are_assembled() -> None:
    """In a compiled program nothing is seen of units within a leaf; a small system is assembled for them."""
    it = make("quadratic", np.random.default_rng(0), 4, 300.0)
    p = Posed(it, it.units(np.array([1e3, 1e-3, 1e2, 1e-2])), JAX[0], "autodiff", "float32", tree=True)
    found = p.base("vjp", p.call(p.condition(), "vjp", solver="gmres")())
    assert relative_error(NUMPY, found, it.truth("vjp")) < 1e-4


@libraries
@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, BiCGSTAB], ids=lambda s: s.name)
@pytest.mark.parametrize("fits", [True, False], ids=["in-the-units", "identity"])
def test_a_preconditioner_hides_no_units(lib: Library, solver: type, fits: bool) -> None:
    """With a preconditioner in the units of A or in none, each entry is right in its own, or it is told."""
    M, b, x = scaled_system("definite", 5, n=8)
    P = lib.array(np.diag(1 / np.diag(M)) if fits else np.eye(8))
    found = outcome(lambda: linear_solve(lib.array(M), lib.array(b), solver=solver(preconditioner=P, maxiter=200)))
    assert found.quiet or not fits
    if found.error is None:
        assert np.max(np.abs(lib.numpy(found.value) - x) / np.abs(x)) <= 1e-6


@pytest.mark.parametrize("solver", [CG, MINRES], ids=lambda s: s.name)
@pytest.mark.parametrize("seed", range(4))
def test_a_preconditioner_that_is_not_symmetric_in_any_units(solver: type, seed: int) -> None:
    """It is found wherever the solve ends without the solution, and is what is blamed."""
    M, b, _ = scaled_system("definite", seed, n=8)
    P = np.eye(8) + 5 * np.eye(8, k=1)
    found = outcome(lambda: linear_solve(M, b, solver=solver(preconditioner=P, maxiter=200)))
    assert_told(found, PreconditionerError, "not symmetric positive definite")


@libraries
@pytest.mark.parametrize("solver", ["gmres", "cg", "minres"])
@pytest.mark.parametrize("seed", range(4))
def test_asymmetry_is_seen_in_any_units(lib: Library, solver: str, seed: int) -> None:
    """One column that counts half as much again, in any of the units."""
    n = 20
    A, _ = with_condition(n, 30.0, seed)
    D = units(n, seed + 1)
    A[:, seed] *= 1.5
    M, cotangent = A / D / D[:, None], np.random.default_rng(seed).standard_normal(n) / D
    product, y = lib.array(M), lib.array(np.linspace(0.5, 1.5, n) * D)
    condition = Stationary(
        grad=lambda y, t: product @ y - t, hvp=lambda y, t, v: product @ v, mixed_vjp=lambda y, t, u: -u,
        mixed_jvp=lambda y, t, d: -d, verify=False,
    )  # fmt: skip
    found = outcome(lambda: implicit_vjp(condition, y, product @ y, lib.array(cotangent), solver=solver))
    assert isinstance(found.error, NotSymmetricError), found.text


@pytest.mark.parametrize("seed", range(20))
def test_linked_coordinates(seed: int) -> None:
    """The largest entry of each block, against the graph."""
    rng = np.random.default_rng(seed)
    n, items = int(rng.integers(2, 12)), 3
    A = rng.normal(size=(items, n, n)) * 10.0 ** rng.uniform(-20, 3, size=(items, n, n))
    A = np.where(rng.random(A.shape) < rng.uniform(0, 0.9), 0.0, A)
    x = rng.uniform(0.1, 1.0, size=(items, n))
    op = matrix_map(Operator, get_backend("numpy"), A, (items,), A.dtype, "cpu")
    most = largest_linked(op, None, x)
    for i in range(items):
        links = scipy.sparse.csr_array(np.abs(A[i]) > np.finfo(float).eps * np.max(np.abs(A[i]), axis=1, keepdims=True))
        both = scipy.sparse.block_array([[None, links], [links.T, None]])
        labels = scipy.sparse.csgraph.connected_components(both, directed=False)[1][n:]
        want = [x[i, labels == label].max() for label in labels]
        assert np.array_equal(most[i], want)
