"""Sparse systems: patterns given or found, colours, assembly from few products, SuperLU on every framework."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import JAX, NUMPY, PLAIN, TORCH, Library
from hypothesis import given, settings
from hypothesis import strategies as st

import implicitdiff as idf
from implicitdiff.linalg.coloring import column_colors
from implicitdiff.linalg.detection import detected
from implicitdiff.linalg.entries import read
from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.linalg.pattern import Pattern, as_pattern
from implicitdiff.linalg.segments import Segments
from implicitdiff.registry import get_backend

N = 40
RNG = np.random.default_rng(7)
Y, V = RNG.normal(size=N), RNG.normal(size=N)
I = np.arange(N - 1)
TRIDIAGONAL = (np.concatenate([I, I + 1]), np.concatenate([I + 1, I]))
UPPER = np.diag(np.ones(N - 1), 1)


def chain(xp: Any, back: float = -0.5) -> Callable[[Any, Any], Any]:
    """F with a tridiagonal Jacobian; it is symmetric for ``back=1``."""

    def F(y: Any, theta: Any) -> Any:
        zero = 0 * y[..., :1]
        after, before = xp.concat([y[..., 1:], zero], axis=-1), xp.concat([zero, y[..., :-1]], axis=-1)
        return 3 * y + y**3 + after + back * before - theta

    return F


def energy(xp: Any) -> Callable[[Any, Any], Any]:
    """f with a tridiagonal Hessian."""

    def f(y: Any, theta: Any) -> Any:
        own = y**4 / 4 + 1.5 * y**2 - theta * y
        return xp.sum(own, axis=-1) + xp.sum(y[..., 1:] * y[..., :-1], axis=-1)

    return f


def chain_matrix(y: np.ndarray, symmetric: bool = False) -> np.ndarray:
    return np.diag(3 + 3 * y**2) + UPPER + (1.0 if symmetric else -0.5) * UPPER.T


def theta_of(y: np.ndarray, symmetric: bool = False) -> np.ndarray:
    return 3 * y + y**3 + (chain_matrix(y, symmetric) - np.diag(3 + 3 * y**2)) @ y


# -- colours ---------------------------------------------------------------------------------------------
def five_point(side: int) -> Any:
    T = sp.diags_array([np.ones(side - 1), np.ones(side), np.ones(side - 1)], offsets=[-1, 0, 1])
    return sp.kron(T, sp.eye_array(side)) + sp.kron(sp.eye_array(side), T)


def arrow(n: int) -> np.ndarray:
    found = np.eye(n, dtype=bool)
    found[0], found[:, 0] = True, True
    return found


@pytest.mark.parametrize(
    ("given", "symmetric", "most"),
    [
        (np.abs(chain_matrix(Y)) > 0, False, 3),
        (np.abs(chain_matrix(Y)) > 0, True, 3),
        (five_point(30), False, 7),
        (five_point(30), True, 7),
        (arrow(200), True, 2),
        (np.eye(50), True, 1),
        (np.ones((6, 6)), False, 6),
        (np.triu(np.eye(50) + np.eye(1, 50)), False, 2),  # a full row: the rows are coloured
    ],
    ids=["tridiagonal", "tridiagonal, star", "five points", "five points, star", "arrow", "diagonal", "full", "row"],
)
def test_known_patterns_take_few_colours(given: Any, symmetric: bool, most: int) -> None:
    found = as_pattern(given).coloring(symmetric=symmetric, transposable=True)
    assert found.number == found.colors.max() + 1 <= most


@st.composite
def patterns(draw: Any) -> tuple[np.ndarray, np.random.Generator]:
    n, seed, density = draw(st.integers(1, 24)), draw(st.integers(0, 10**6)), draw(st.floats(0, 0.6))
    rng = np.random.default_rng(seed)
    return rng.random((n, n)) < density, rng


def operator_of(M: np.ndarray, symmetric: bool, transposable: bool = True) -> Operator:
    made = matrix_map(Operator, get_backend("numpy"), M, (), M.dtype, None, symmetric=symmetric or None)
    fields = {"forward": made.forward, "adjoint": made.adjoint if transposable else None}
    return Operator(made.backend, len(M), len(M), (), M.dtype, None, symmetric=symmetric or None, **fields)


@settings(max_examples=60, deadline=None)
@given(patterns(), st.booleans(), st.booleans())
def test_a_matrix_of_any_pattern_is_read_exactly(drawn: Any, symmetric: bool, transposable: bool) -> None:
    mask, rng = drawn
    M = np.where(mask, rng.normal(size=mask.shape), 0.0) + np.diag(rng.normal(size=len(mask)))
    pattern = as_pattern(mask).of_order(len(mask))
    if symmetric:
        M, pattern = M + M.T, pattern.symmetric
    found = read(operator_of(M, symmetric, transposable), pattern)
    np.testing.assert_array_equal(pattern.matrix(found.values).toarray(), M)
    assert found.products <= len(M)
    x = rng.normal(size=(3, len(M)))
    np.testing.assert_allclose(found.matvec(np, x, None), x @ M.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.transposed(np, None).matvec(np, x, None), x @ M, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(patterns(), st.booleans())
def test_columns_of_one_colour_share_no_row(drawn: Any, wide: bool) -> None:
    mask = drawn[0][: max(1, len(drawn[0]) // 2)] if wide else drawn[0]
    rows, columns = np.nonzero(mask)
    colors, count = column_colors(mask.shape[1], rows, columns, mask.shape[0])
    for c in range(count):
        assert mask[:, colors == c].sum(axis=1).max() <= 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 300)), min_size=1, max_size=30))
def test_segments_are_summed(lengths: list[int]) -> None:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    x = np.random.default_rng(0).normal(size=(2, ends[-1]))
    want = np.stack([x[:, a:b].sum(axis=1) for a, b in itertools.pairwise(ends)], axis=1)
    np.testing.assert_allclose(Segments(ends).over(np, x, None), want, rtol=1e-12, atol=1e-12)


# -- what is found -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["random", "dense row", "one leaf"])
def test_a_pattern_is_found_by_halving(kind: str, symmetric: bool) -> None:
    rng, n = np.random.default_rng(3), 700
    M = np.diag(rng.uniform(1, 2, n))
    if kind == "random":
        M[rng.integers(0, n, 1500), rng.integers(0, n, 1500)] = 1.5
    if kind == "dense row":
        M[17] = rng.uniform(1, 2, n)
    M = M + M.T if symmetric else M
    counted = list[int]()
    op = operator_of(M, symmetric)

    def product(x: np.ndarray) -> np.ndarray:
        counted.append(len(x))
        return x @ M.T

    pattern, spent = detected(Operator(op.backend, n, n, (), M.dtype, None, forward=product, adjoint=op.adjoint,
                                symmetric=op.symmetric))  # fmt: skip
    np.testing.assert_array_equal(pattern.matrix(np.ones(pattern.size)).toarray() > 0, M != 0)
    assert sum(counted) <= spent < n / 2


def test_a_pattern_is_remembered_for_the_same_functions() -> None:
    def F(y: np.ndarray, t: np.ndarray) -> np.ndarray:
        return chain(np)(y, t)

    reports = [
        idf.implicit_vjp(idf.Root(F, sparsity="detect"), y, theta_of(y), V, return_report=True)[1] for y in (Y, 2 * Y)
    ]
    assert [report.matvecs for report in reports] == [N + 4, 4]


def test_coordinates_are_counted_in_raveled_order() -> None:
    F = lambda y, t: {"a": y["a"] + y["b"][0] - t, "b": np.array([[y["b"][0, 0] * 2, y["b"][0, 1] - y["a"][1]]])}
    y, theta = {"a": np.array([1.0, 2.0]), "b": np.zeros((1, 2))}, np.array([1.0, 2.0])
    y["b"][0, 1] = 2.0
    theta = y["a"] + y["b"][0]
    A = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 2, 0], [0, -1, 0, 1]])
    v = {"a": np.array([1.0, 3.0]), "b": np.array([[2.0, 5.0]])}
    want = np.linalg.solve(A.T, np.array([1.0, 3.0, 2.0, 5.0]))[:2]
    for sparsity in (A, "detect"):
        np.testing.assert_allclose(idf.implicit_vjp(idf.Root(F, sparsity=sparsity), y, theta, v), want, rtol=1e-12)
    A[0, 2] = 0
    with pytest.raises(idf.PatternError, match=r"\(0, 2\)"):
        idf.implicit_vjp(idf.Root(F, sparsity=A), y, theta, v)


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
