"""Sparse systems: patterns given or found, colours, assembly from few products, SuperLU on every framework."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import JAX, NUMPY, PLAIN, TORCH, Library
from helpers_sparsity import RNG, TRIDIAGONAL, UPPER, I, N, V, Y, chain, chain_matrix, energy, theta_of

import implicitdiff as idf
from implicitdiff.linalg.pattern import Pattern, as_pattern

# -- derivatives -------------------------------------------------------------------------------------------
CASES = [("root", s) for s in ("auto", "lu", "gmres")]
CASES += [("minimum", s) for s in ("auto", "cholesky", "ldlt", "cg")]


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("how", ["pattern", "detect"])
@pytest.mark.parametrize(("kind", "solver"), CASES)
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_the_gradient_is_that_of_the_dense_system(lib: Library, kind: str, solver: str, how: str) -> None:
    symmetric = kind == "minimum"
    sparsity = TRIDIAGONAL if how == "pattern" else "detect"
    if symmetric and lib.name == "array_api_strict":  # of values alone, second differences take seconds
        condition: Any = idf.Stationary(grad=chain(lib.xp, 1.0), sparsity=sparsity)
    else:
        make = idf.Stationary if symmetric else idf.Root
        condition = make((energy if symmetric else chain)(lib.xp), sparsity=sparsity)
    y, theta, v = map(lib.array, (Y, theta_of(Y, symmetric), V))
    g, report = idf.implicit_vjp(condition, y, theta, v, solver=solver, return_report=True)
    assert lib.owns(g)
    assert "assembled from 3 products" in report.reason
    np.testing.assert_allclose(lib.numpy(g), np.linalg.solve(chain_matrix(Y, symmetric).T, V), rtol=1e-6, atol=1e-8)
    direct = report.solver in {"lu", "cholesky"}
    assert direct == (solver not in {"cg", "gmres"})
    assert report.matvecs in (4, 4 + N * (how == "detect")) if direct else report.matvecs > 4  # once a function


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_a_pattern_that_grew_is_found_again(lib: Library) -> None:
    xp = lib.xp
    F = lambda y, t: y + xp.concat([y[1:] ** 2, 0 * y[:1]]) - t
    condition, zero, v = idf.Root(F, sparsity="detect"), lib.array(np.zeros(N)), lib.array(V)
    np.testing.assert_allclose(lib.numpy(idf.implicit_vjp(condition, zero, zero, v)), V)
    y = np.linspace(0.1, 1, N)
    theta = y + np.append(y[1:] ** 2, 0.0)
    g = idf.implicit_vjp(condition, lib.array(y), lib.array(theta), v)
    want = np.linalg.solve((np.eye(N) + UPPER * 2 * np.roll(y, -1)[:, None]).T, V)
    np.testing.assert_allclose(lib.numpy(g), want, rtol=1e-9)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_one_factorisation_serves_every_direction(lib: Library) -> None:
    lin = idf.linearize(idf.Root(chain(lib.xp), sparsity=TRIDIAGONAL), lib.array(Y), lib.array(theta_of(Y)))
    A = chain_matrix(Y)
    np.testing.assert_allclose(lib.numpy(lin.vjp(lib.array(V))), np.linalg.solve(A.T, V), rtol=1e-9)
    np.testing.assert_allclose(lib.numpy(lin.jvp(lib.array(V))), np.linalg.solve(A, V), rtol=1e-9)
    np.testing.assert_allclose(lib.numpy(lin.jacobian()), np.linalg.inv(A), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_a_batch_has_one_pattern(lib: Library) -> None:
    many = np.stack([Y, 0.3 * Y, -2 * Y])
    theta = np.stack([theta_of(y) for y in many])
    condition = idf.Root(chain(lib.xp), sparsity=TRIDIAGONAL)
    g, report = idf.implicit_vjp(condition, lib.array(many), lib.array(theta), lib.array(np.stack([V] * 3)),
                                 batched=True, return_report=True)  # fmt: skip
    want = [np.linalg.solve(chain_matrix(y).T, V) for y in many]
    np.testing.assert_allclose(lib.numpy(g), want, rtol=1e-9)
    assert report.converged.shape == (3,)


def test_a_fixed_point_has_the_pattern_of_its_map() -> None:
    T = lambda y, t: y - chain(np)(y, t) / 5
    g = idf.implicit_vjp(idf.FixedPoint(T, sparsity=UPPER + UPPER.T), Y, theta_of(Y), V)
    np.testing.assert_allclose(g, np.linalg.solve(chain_matrix(Y).T, V), rtol=1e-9)


def test_products_are_counted_as_they_are_made() -> None:
    made = list[int]()

    def jvp(y: np.ndarray, theta: np.ndarray, v: np.ndarray) -> np.ndarray:
        made.append(1)
        return chain_matrix(y) @ v

    condition = idf.Root(chain(np), jvp=jvp, verify=False, sparsity=sp.csr_array(chain_matrix(Y)))
    _, report = idf.implicit_vjp(condition, Y, theta_of(Y), V, return_report=True)
    assert report.matvecs == len(made) == 4


def test_damping_is_that_of_the_dense_system() -> None:
    g = idf.implicit_vjp(idf.Root(chain(np), sparsity=TRIDIAGONAL), Y, theta_of(Y), V, solver=idf.LU(damping=0.3))
    np.testing.assert_allclose(g, np.linalg.solve(chain_matrix(Y).T + 0.3 * np.eye(N), V), rtol=1e-9)


@pytest.mark.parametrize("how", ["pattern", "detect"])
def test_units_change_nothing(how: str) -> None:
    d, s = 10.0 ** RNG.integers(-9, 9, N), 10.0 ** RNG.integers(-9, 9, N)
    F = lambda y, t: s * chain(np)(y / d, t)
    sparsity = TRIDIAGONAL if how == "pattern" else "detect"
    g, report = idf.implicit_vjp(idf.Root(F, sparsity=sparsity), Y * d, theta_of(Y), V / d, return_report=True)
    np.testing.assert_allclose(g, np.linalg.solve(chain_matrix(Y).T, V), rtol=1e-8)
    assert "assembled from 3 products" in report.reason


# -- what is wrong -----------------------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_a_pattern_that_misses_an_entry_is_an_error(lib: Library) -> None:
    condition = idf.Root(chain(lib.xp), sparsity=(np.append(I, 5), np.append(I + 1, 4)))
    with pytest.raises(idf.PatternError, match="sparsity leaves out entry") as caught:
        idf.implicit_vjp(condition, lib.array(Y), lib.array(theta_of(Y)), lib.array(V))
    found = re.search(r"\((\d+), (\d+)\) of A", str(caught.value))
    assert found
    assert int(found[1]) == int(found[2]) + 1 != 5  # below the diagonal, where only (5, 4) is said to be something


def test_a_missing_entry_is_told_in_any_unit() -> None:
    d = np.where(np.arange(N) == 8, 1e9, 1.0)
    F = lambda y, t: chain(np)(y / d, t)
    rows, columns = TRIDIAGONAL
    keep = ~((rows == 7) & (columns == 8))
    with pytest.raises(idf.PatternError, match=r"\(7, 8\)"):
        idf.implicit_vjp(idf.Root(F, sparsity=(rows[keep], columns[keep])), Y * d, theta_of(Y), V)


def test_a_matrix_that_is_not_symmetric_is_told() -> None:
    hvp = lambda y, theta, v: chain_matrix(y) @ v
    condition = idf.Stationary(energy(np), hvp=hvp, verify=False, sparsity=TRIDIAGONAL)
    with pytest.raises(idf.NotSymmetricError, match="not symmetric"):
        idf.implicit_vjp(condition, Y, theta_of(Y, True), V)


class Unreadable:
    """An array that NumPy cannot read, as the sparse ones of Torch are."""

    shape = (2, 2)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("can't convert Sparse layout tensor to numpy")


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        ("dense", idf.InputError, "sparsity = 'dense'"),
        (3, idf.InputError, "sparsity is int"),
        (Unreadable(), idf.InputError, "sparsity is Unreadable"),
        (np.ones((2, 3)), idf.ShapeError, r"shape \(2, 3\)"),
        (([0, 1], [0]), idf.ShapeError, "2 rows and 1 columns"),
        (([0, -1], [0, 1]), idf.InputError, "negative"),
    ],
)
def test_what_is_no_pattern_is_refused(sparsity: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        idf.Root(chain(np), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [np.eye(N + 1), ([0, N], [0, 0])])
def test_a_pattern_of_another_order_is_refused(sparsity: Any) -> None:
    with pytest.raises(idf.ShapeError, match=f"order {N + 1}, and A is one of order {N}"):
        idf.implicit_vjp(idf.Root(chain(np), sparsity=sparsity), Y, theta_of(Y), V)


def test_a_singular_sparse_system_is_told() -> None:
    F = lambda y, t: np.concatenate([y[1:], [0.0]]) - t
    with pytest.raises(idf.SingularError):
        idf.implicit_vjp(idf.Root(F, sparsity=UPPER), np.append(0.0, Y[1:]), np.append(Y[1:], 0.0), V)


def test_equal_patterns_are_one() -> None:
    one, other = as_pattern(chain_matrix(Y)), as_pattern(sp.coo_array(chain_matrix(Y)))
    assert one is other is copy.deepcopy(one) is pickle.loads(pickle.dumps(one))
    assert one.of_order(N) is one
    assert as_pattern(TRIDIAGONAL).of_order(N) is one
    assert Pattern(N, [0, 0], [1, 1]).size == 1
    assert as_pattern([[1, 0], [0, 1]]) is as_pattern(np.eye(2))
    assert as_pattern(list(TRIDIAGONAL)) is as_pattern(TRIDIAGONAL)


# -- frameworks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_inside_of_a_program_what_is_wrong_is_nan(lib: Any) -> None:
    import jax

    y, theta, v = map(lib.array, (Y, theta_of(Y), V))
    own, want = chain(lib.xp), np.linalg.solve(chain_matrix(Y).T, V)
    F = lambda y, theta: own(y, theta)  # a function that nothing is known of

    def gradient(sparsity: Any) -> Any:
        condition = idf.Root(F, sparsity=sparsity)
        return jax.jit(lambda y, theta, v: idf.implicit_vjp(condition, y, theta, v))(y, theta, v)

    np.testing.assert_allclose(gradient(TRIDIAGONAL), want, rtol=1e-9)
    assert np.all(np.isnan(gradient((I, I + 1))))
    with pytest.raises(idf.PatternError, match="has to look at numbers"):
        gradient("detect")
    idf.implicit_vjp(idf.Root(F, sparsity="detect"), y, theta, v)  # which is remembered
    np.testing.assert_allclose(gradient("detect"), want, rtol=1e-9)


def solution(theta: Any) -> np.ndarray:
    """Newton's method."""
    y = np.zeros(N)
    for _ in range(30):
        y = y - np.linalg.solve(chain_matrix(y), chain(np)(y, np.asarray(theta)))
    return y


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [*TORCH, *JAX], ids=lambda lib: lib.name)
def test_a_solution_is_differentiated_twice(lib: Any) -> None:
    found = []
    for sparsity in (None, TRIDIAGONAL):
        condition = idf.Root(chain(lib.xp), sparsity=sparsity)
        if lib.name == "torch":
            import torch

            solve = idf.implicit_function(condition)(lambda theta: torch.as_tensor(solution(theta.detach())))
            theta = lib.array(theta_of(Y)).requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                (g,) = torch.autograd.grad((solve(theta) ** 3).sum(), theta, create_graph=True)
            found.append(torch.autograd.grad((g**2).sum(), theta)[0].numpy())
        else:
            import jax

            solve = idf.implicit_function(condition)(solution)
            first = jax.grad(lambda theta, solve=solve: (solve(theta) ** 3).sum())
            found.append(np.asarray(jax.grad(lambda theta, g=first: (g(theta) ** 2).sum())(lib.array(theta_of(Y)))))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
@pytest.mark.parametrize("how", ["pattern", "detect"])
def test_rounding_is_no_missing_entry(lib: Library, how: str) -> None:
    """Of terms that cancel each product keeps eight digits, and each another rounding."""
    F = lambda y, t: (1 + 3e7) * y + y**3 - 3e7 * y - t
    y = lib.array(np.linspace(1, 2, N))
    sparsity = np.eye(N) if how == "pattern" else "detect"
    g, report = idf.implicit_vjp(idf.Root(F, sparsity=sparsity), y, y + y**3, y, return_report=True)
    want = np.linspace(1, 2, N) / (1 + 3 * np.linspace(1, 2, N) ** 2)
    np.testing.assert_allclose(lib.numpy(g), want, rtol=1e-4 if lib.name == "array_api_strict" else 1e-7)
    assert "assembled from 1 product" in report.reason


@pytest.mark.parametrize("dense", [False, True])
def test_many_parameters_take_few_evaluations_where_b_is_sparse(dense: bool) -> None:
    """B = −2 M diag(θ): the second θ has entries where the first is zero."""
    n, made, rng = 400, list[int](), np.random.default_rng(2)
    band = np.eye(n) + np.diag(np.ones(n - 1), 1)
    M, A = rng.normal(size=(n, n)) if dense else band, 2 * np.eye(n) + band

    def F(y: np.ndarray, t: np.ndarray) -> np.ndarray:
        made.append(1)
        return 3 * y + np.append(y[1:], 0 * y[:1]) - M @ (t * t)

    v = rng.normal(size=n)
    for theta in np.arange(n) % 2.0, rng.uniform(1, 2, n):
        made.clear()
        y = np.linalg.solve(A, M @ (theta * theta))
        g = idf.implicit_vjp(idf.Root(F, sparsity=A), y, theta, v)
        np.testing.assert_allclose(g, 2 * theta * (M.T @ np.linalg.solve(A.T, v)), rtol=1e-9, atol=1e-11)
        assert (len(made) < n / 2) == (not dense)
