"""Patterns of sparse matrices: few colours, every entry read, and found by products alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from helpers_sparsity import N, V, Y, chain, chain_matrix, theta_of
from hypothesis import given, settings
from hypothesis import strategies as st

import implicitdiff as idf
from implicitdiff.linalg.coloring import column_colors
from implicitdiff.linalg.detection import detected
from implicitdiff.linalg.entries import read
from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.linalg.pattern import as_pattern
from implicitdiff.linalg.segments import Segments
from implicitdiff.registry import get_backend


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
