"""FAULTS 1 to 18 on JAX, called eagerly and under the user's own jit: never a wrong number in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import (
    ITERATIVE,
    SOLVERS,
    SYMMETRIC_ONLY,
    assert_right,
    assert_right_or_told,
    assert_told,
    outcome,
    with_condition,
)
from helpers_jax import (
    GENERAL_DOORS,
    LIB,
    OTHER_DOORS,
    SYMMETRIC_DOORS,
    TWO_DOORS,
    assert_compiled_nan,
    assert_compiled_right,
    assert_compiled_right_or_nan,
    compiled,
    jax,
    jnp,
    quickly,
    solved,
    through,
    truth_at,
)

from implicitdiff import (
    CG,
    GMRES,
    MINRES,
    AccuracyWarning,
    NotConvergedError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    SingularError,
    SolveError,
    implicit_vjp,
    linear_solve,
)

pytestmark = pytest.mark.cover(together=False)  # they share their programs
N = 6  # one shape throughout: each program is compiled once
LAPLACIAN = 6 * np.eye(N) - np.ones((N, N))
UNSOLVABLE = (SingularError, NotPositiveDefiniteError, NotConvergedError)
CAUSE = r"residual|rcond|not positive definite|singular"
doors = pytest.mark.parametrize("door", SYMMETRIC_DOORS + GENERAL_DOORS)
two_doors = pytest.mark.parametrize("door", TWO_DOORS)


@pytest.fixture(params=quickly(SOLVERS))
def solver(request: pytest.FixtureRequest) -> str:
    """Each solver by name."""
    return request.param


def known(kind: str = "definite", condition: float = 10.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return with_condition(N, condition, seed, kind=kind)


def right_hand_side() -> np.ndarray:
    return np.random.default_rng(3).standard_normal(N)


@doors
def test_07_09_right(door: str, solver: str) -> None:
    """A positive definite A everywhere, and an asymmetric one where it may be."""
    A, b = known()
    assert_right(LIB, through(door, A, b, solver), truth_at(door, A, b), 1e-8)
    if door in GENERAL_DOORS and solver not in SYMMETRIC_ONLY:
        A, b = known("general")
        assert_right(LIB, through(door, A, b, solver), truth_at(door, A, b), 1e-8)


@pytest.mark.parametrize("door", OTHER_DOORS)
@pytest.mark.parametrize("name", ["lu", "gmres"])
def test_09_through_the_other_doors(door: str, name: str) -> None:
    A, b = known("general")
    assert_right(LIB, through(door, A, b, name), truth_at(door, A, b), 1e-8)


@two_doors
def test_07_09_right_under_jit(door: str, solver: str) -> None:
    A, b = known()
    assert_compiled_right(door, A, b, solver, truth_at(door, A, b), 1e-8)
    if door in GENERAL_DOORS and solver not in SYMMETRIC_ONLY:
        A, b = known("general")
        assert_compiled_right(door, A, b, solver, truth_at(door, A, b), 1e-8)


@doors
def test_01_exactly_singular(door: str, solver: str) -> None:
    b = np.zeros(N)
    b[0] = 1.0
    assert_told(through(door, LAPLACIAN, b, solver), UNSOLVABLE, "singular")
    if door in TWO_DOORS:
        assert_compiled_nan(door, LAPLACIAN, b, solver)


@two_doors
def test_02_singular_up_to_rounding(door: str, solver: str) -> None:
    Q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((N, N)))
    A = (Q * np.array([3.0, 2.5, 2.0, 1.5, 1.0, 0.0])) @ Q.T
    A = (A + A.T) / 2
    assert_told(through(door, A, right_hand_side(), solver), UNSOLVABLE, CAUSE)
    assert_compiled_nan(door, A, right_hand_side(), solver)


@two_doors
def test_03_singular_consistent(door: str, solver: str) -> None:
    b = LAPLACIAN @ np.arange(N) ** 2.0
    found = through(door, LAPLACIAN, b, solver)
    value, converged = compiled(door, LAPLACIAN, b, solver)
    if found.quiet:
        assert solved(LAPLACIAN, b, door, found.value) <= 1e-8
        assert solved(LAPLACIAN, b, door, value) <= 1e-8
    else:
        assert solver != "minres", f"MINRES is for this: {found.text}"
        assert_told(found, UNSOLVABLE, "singular")
        assert np.all(np.isnan(value))
        assert not converged


@two_doors
def test_04_zero_operator(door: str, solver: str) -> None:
    zero = np.zeros((N, N))
    assert_told(through(door, zero, right_hand_side(), solver), SingularError, r"\bF\b")
    assert_compiled_nan(door, zero, right_hand_side(), solver)


@two_doors
def test_05_06_07_indefinite(door: str, solver: str) -> None:
    for kind in ("indefinite", "negative"):
        A, b = known("definite" if kind == "negative" else kind)
        A = -A if kind == "negative" else A
        truth, found = truth_at(door, A, b), through(door, A, b, solver)
        if solver == "cholesky" or (solver == "cg" and kind == "negative"):
            assert_told(found, NotPositiveDefiniteError, r"not positive definite(.|\n)*(minres|lu)")
            assert_compiled_nan(door, A, b, solver)
        elif solver == "cg":
            assert_right_or_told(LIB, found, truth, 1e-8, NotPositiveDefiniteError, "curvature")
            assert_compiled_right_or_nan(door, A, b, solver, truth, 1e-8)
        else:
            assert_right(LIB, found, truth, 1e-8)
            assert_compiled_right(door, A, b, solver, truth, 1e-8)


@pytest.mark.parametrize("door", SYMMETRIC_DOORS[:2])
@pytest.mark.parametrize("skew", [1.0, 1e-2])
def test_08_asymmetric_hessian(door: str, solver: str, skew: float) -> None:
    A, b = known()
    part = skew * np.triu(np.ones((N, N)), 1)
    A = A + part - part.T
    assert_told(through(door, A, b, solver), NotSymmetricError, "declared symmetric, and it is not")
    assert_compiled_nan(door, A, b, solver)


@pytest.mark.parametrize("name", quickly(SYMMETRIC_ONLY))
@pytest.mark.parametrize("door", ["jvp:root", "vjp:root", "solve:matrix"])
def test_08_asymmetric_root_with_a_symmetric_method(door: str, name: str) -> None:
    A, b = known("general")
    truth = truth_at(door, A, b)
    assert_right_or_told(LIB, through(door, A, b, name), truth, 1e-8, SolveError, "symmetric")
    assert_compiled_right_or_nan(door, A, b, name, truth, 1e-8)


@pytest.mark.parametrize("kind", [CG, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (MINRES, GMRES))])
@two_doors
def test_10_two_iterations(door: str, kind: type) -> None:
    A, b = known(condition=100.0)
    solver = kind(maxiter=2)
    found = through(door, A, b, solver, return_report=True)
    assert_told(found, NotConvergedError, r"stopped after 2 iterations at a residual of \d")
    assert found.error.report.iterations == 2
    assert_compiled_nan(door, A, b, solver)


@pytest.mark.parametrize("on_failure", ["warn", "nan", "ignore"])
@two_doors
def test_10_modes_of_failure(door: str, on_failure: str) -> None:
    A, b = known(condition=100.0)
    found = through(door, A, b, CG(maxiter=2), on_failure=on_failure, return_report=True)
    assert found.error is None
    value, report = found.value
    assert (report.iterations, report.converged) == (2, False)
    assert bool(found.warnings) is (on_failure == "warn")
    assert np.all(np.isnan(LIB.numpy(value))) is np.bool_(on_failure == "nan")
    if on_failure != "nan":
        assert report.residual == pytest.approx(solved(A, b, door, value), rel=1e-6)


def _places(x: Any) -> Any:
    """0, 1, 2, … in the shape of an array."""
    return jnp.reshape(jnp.arange(x.size, dtype=x.dtype), x.shape)


def _flat_at_first(y: Any, theta: Any) -> Any:
    """Σ i y_i²/2 − y·θ over each leaf: A = diag(0, 1, …)."""
    pairs = zip(*map(jax.tree.leaves, (y, theta)), strict=True)
    return sum(jnp.sum(_places(a) * a**2 / 2 - a * b) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "y", "on_failure"),
    [
        ("cg", {"a": np.ones(40), "b": np.ones(())}, "raise"),
        ("gmres", np.ones(()), "warn"),
        ("minres", np.ones((2, 3)), "nan"),
        ("cg", np.ones(()), "ignore"),
    ],
)
def test_10_modes_of_failure_of_any_shape(name: str, y: Any, on_failure: str) -> None:
    """The diagnosis is that of the vectors that were solved for, be they a tree's leaves."""
    y = jax.tree.map(jnp.asarray, y)
    found = outcome(
        lambda: implicit_vjp(_flat_at_first, y, jax.tree.map(_places, y), y, solver=name, on_failure=on_failure)
    )
    assert isinstance(found.error, SingularError) is (on_failure == "raise")
    assert bool(found.warnings) is (on_failure == "warn")
    if on_failure != "raise":
        assert all(bool(jnp.isnan(x).all()) is (on_failure == "nan") for x in jax.tree.leaves(found.value))


@two_doors
@pytest.mark.parametrize("condition", [1e10, 1e13, 1e16])
@pytest.mark.parametrize("name", quickly(ITERATIVE))
def test_11_success_means_the_true_residual(door: str, name: str, condition: float) -> None:
    for seed in range(3):
        A, b = known(condition=condition, seed=seed)
        found = through(door, A, b, name, return_report=True)
        value, converged = compiled(door, A, b, name)
        assert converged or np.all(np.isnan(value))
        results = [value] if converged else []
        if found.error is not None:
            assert_told(found, UNSOLVABLE, CAUSE)
        else:
            results.append(found.value[0])
        for x in results:
            size = np.linalg.norm(np.asarray(x)) / np.linalg.norm(b)
            assert solved(A, b, door, x) <= max(1e-10, 10 * np.finfo(float).eps * np.linalg.norm(A, 2) * size)


@pytest.mark.parametrize(("dtype", "condition", "rtol"), [(np.float64, 1e10, 1e-6), (np.float32, 1e6, 1e-2)])
@two_doors
def test_12_13_hard_at_the_two_precisions(
    door: str, solver: str, dtype: type, condition: float, rtol: float
) -> None:  # fmt: skip
    A, b = with_condition(N, condition, 12, dtype=np.dtype(dtype).name)
    few = (AccuracyWarning,) if dtype is np.float32 else ()  # as much as rounding leaves of A, and may be said
    found = through(door, A, b, solver, dtype=dtype).but(*few)
    if solver in ("lu", "cholesky"):
        assert_right(LIB, found, truth_at(door, A, b), rtol)
    elif not found.quiet:
        assert_told(found, UNSOLVABLE, CAUSE)
    else:
        x = np.asarray(found.value)
        floor = 10 * np.finfo(dtype).eps * np.linalg.norm(A, 2) * np.linalg.norm(x) / np.linalg.norm(b)
        assert solved(A, b, door, x) <= max(1e-10 if dtype is np.float64 else 1e-5, floor)


@pytest.mark.parametrize("exponent", range(2, 9))
@two_doors
def test_14_default_settings(door: str, solver: str, exponent: int) -> None:
    for seed in range(5):
        A, b = known(condition=10.0**exponent, seed=seed)
        truth, found = truth_at(door, A, b), through(door, A, b, solver)
        if found.quiet:
            assert_right(LIB, found, truth, 1e-2)
        else:
            assert exponent > 4, f"false alarm: {found.text}"
            assert_told(found, UNSOLVABLE, CAUSE)
        assert_compiled_right_or_nan(door, A, b, solver, truth, 1e-2)


@two_doors
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_15_scaled_right_hand_side(door: str, solver: str, scale: float) -> None:
    A, b = known()
    assert_right(LIB, through(door, A, b * scale, solver), truth_at(door, A, b * scale), 1e-8)
    value, converged = compiled(door, A, b * scale, solver)
    assert converged
    np.testing.assert_allclose(value / scale, truth_at(door, A, b), atol=1e-7)


@two_doors
@pytest.mark.parametrize("scale", [1e-24, 1e20])
@pytest.mark.parametrize("solver", ["lu", "cg"])  # of a precision of their own, programs of their own
def test_15_scaled_right_hand_side_float32(door: str, solver: str, scale: float) -> None:
    A, b = with_condition(N, 10.0, 15, dtype="float32")
    b = (b * scale).astype(np.float32)
    assert_right(LIB, through(door, A, b, solver, dtype=np.float32), truth_at(door, A, b), 3e-4)


@two_doors
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_16_scaled_operator(door: str, solver: str, scale: float) -> None:
    A, b = known()
    A = A * scale
    assert_right(LIB, through(door, A, b, solver), truth_at(door, A, b), 1e-8)
    assert_compiled_right(door, A, b, solver, truth_at(door, A, b), 1e-8)


@two_doors
def test_17_zero_right_hand_side(door: str, solver: str) -> None:
    for A in (known()[0], -known()[0], LAPLACIAN):
        found = through(door, A, np.zeros(N), solver, return_report=True)
        assert found.quiet, found.text
        value, report = found.value
        assert np.array_equal(LIB.numpy(value), np.zeros(N))
        assert (report.iterations, report.residual, report.converged) == (0, 0.0, True)
        value, converged = compiled(door, A, np.zeros(N), solver)
        assert converged
        assert np.array_equal(value, np.zeros(N))


@two_doors
def test_18_identity(door: str, solver: str) -> None:
    A, b = 3 * np.eye(N), right_hand_side()
    found = through(door, A, b, solver, return_report=True)
    assert found.quiet, found.text
    np.testing.assert_allclose(LIB.numpy(found.value[0]), truth_at(door, A, b), rtol=1e-14)
    assert found.value[1].iterations == (1 if solver in ITERATIVE else 0)
    assert_compiled_right(door, A, b, solver, truth_at(door, A, b), 1e-13)


@pytest.mark.slow
def test_13_a_condition_that_single_precision_bears() -> None:
    """n = 250 at condition 9000 was refused."""
    A, b = with_condition(250, 9000.0, 0)
    M, y = jnp.asarray(A, dtype=jnp.float32), jnp.ones(250, dtype=jnp.float32)
    g = implicit_vjp(lambda y, t: y @ M @ y / 2 - t @ y, y, M @ y, jnp.asarray(b, dtype=jnp.float32))
    exact = np.linalg.solve(A, b)
    assert np.linalg.norm(np.asarray(g) - exact) <= 1e-3 * np.linalg.norm(exact)


def test_large_indefinite_hessian_under_jit() -> None:
    """What CG cannot solve goes to MINRES, also where y is a matrix that is never raveled: n > 4 096."""
    d = np.where(np.arange(4200) % 2, 1.0, -2.0).reshape(60, 70)

    def objective(y: Any, theta: Any) -> Any:
        return jnp.sum(theta * d * y * y) / 2 - jnp.sum(y)

    theta = 1.5
    got = jax.jit(lambda y, t: implicit_vjp(objective, y, t, jnp.ones_like(y)))(jnp.asarray(1 / (theta * d)), theta)
    assert got == pytest.approx(-np.sum(1 / d) / theta**2, rel=1e-8)


def test_function_without_a_transpose_under_jit() -> None:
    """The report of a solve whose transposed product nobody gave, and nobody asked for."""
    A, b = np.eye(N) + np.triu(np.ones((N, N))) / N, right_hand_side()

    @jax.jit
    def solve(A: Any, b: Any) -> Any:
        return linear_solve(lambda x: A @ x, b, solver=GMRES(), return_report=True)

    x, report = solve(A, b)
    assert np.allclose(x, np.linalg.solve(A, b), rtol=1e-9)
    assert bool(report.converged)
    assert report.residual <= 1e-9
