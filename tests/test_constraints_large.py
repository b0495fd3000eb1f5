"""Constrained minima too large to be assembled: the methods that need products alone, and what they tell."""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest

from implicitdiff import KKT, InputError, implicit_vjp
from implicitdiff.backends.numpy import NumpyBackend

N, P = 400, 15
RNG = np.random.default_rng(7)
D = np.linspace(1.0, 20.0, N)
A = RNG.normal(size=(P, N)) / N**0.5
THETA = {"c": RNG.normal(size=N), "b": RNG.normal(size=P)}
V = RNG.normal(size=N)


def solved(top: np.ndarray, bottom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve [[diag D, Aᵀ], [A, 0]] (x, z) = (top, bottom) by elimination."""
    z = np.linalg.solve((A / D) @ A.T, A @ (top / D) - bottom)
    return (top - A.T @ z) / D, z


def objective(y: Any, theta: Any) -> Any:
    return anp.sum(D * y * y) / 2 - anp.sum(theta["c"] * y)


def equalities(y: Any, theta: Any) -> Any:
    return anp.dot(A, y) - theta["b"]


@pytest.mark.parametrize(
    ("route", "solver", "used"),
    [("auto", "auto", "minres"), ("kkt", "minres", "minres"), ("schur", "auto", "cg"), ("schur", "minres", "minres"),
     ("nullspace", "auto", "cg"), ("nullspace", "cg", "cg"), ("kkt", "gmres", "gmres")],
)  # fmt: skip
def test_against_elimination(route: str, solver: str, used: str) -> None:
    y = solved(THETA["c"], THETA["b"])[0]
    condition = KKT(objective, eq=equalities, route=route)
    g, report = implicit_vjp(condition, y, THETA, V, solver=solver, return_report=True)
    x, z = solved(V, np.zeros(P))
    assert report.solver == used
    assert report.converged
    assert np.linalg.norm(g["c"] - x) <= 1e-8 * np.linalg.norm(x)
    assert np.linalg.norm(g["b"] - z) <= 1e-8 * np.linalg.norm(z)


def test_the_schur_complement_counts_the_solves_it_is_made_of() -> None:
    y = solved(THETA["c"], THETA["b"])[0]
    reports = {
        route: implicit_vjp(KKT(objective, eq=equalities, route=route), y, THETA, V, solver="cg", return_report=True)[1]
        for route in ("schur", "nullspace")
    }
    assert reports["schur"].matvecs > P * reports["schur"].iterations / 2
    assert reports["nullspace"].matvecs < 2 * reports["nullspace"].iterations + 10


@pytest.mark.parametrize("route", ["schur", "nullspace"])
def test_what_is_assembled_is_counted(route: str) -> None:
    y = solved(THETA["c"], THETA["b"])[0]
    condition = KKT(objective, eq=equalities, route=route)
    report = implicit_vjp(condition, y, THETA, V, solver="cholesky", return_report=True)[1]
    assert N <= report.matvecs <= N + 5


@pytest.mark.parametrize("mode", ["auto", "finite_differences"])
def test_constraints_are_differenced_once(mode: str) -> None:
    """J is known, so that the coordinates of the multipliers cost nothing, however many there are."""
    n, counts, backend = 12, {}, NumpyBackend(mode)
    matrix = np.eye(n) + 0.1 * RNG.normal(size=(n, n))
    y, diagonal = np.linspace(-1, 1, n), np.arange(1.0, n + 1)
    for k in (1, n - 1):
        rows, calls = matrix[:k], [0]

        def f(y: Any, theta: Any, calls: list[int] = calls) -> Any:
            calls[0] += 1
            return np.sum(diagonal * y * y) / 2 - theta @ y

        condition = KKT(f, eq=lambda y, theta, rows=rows: rows @ (y - np.linspace(-1, 1, n)))
        theta = diagonal * y + rows.T @ np.ones(k)
        got = implicit_vjp(condition, y, theta, np.ones(n), backend=backend)
        saddle = np.block([[np.diag(diagonal), rows.T], [rows, np.zeros((k, k))]])
        expected = np.linalg.solve(saddle, np.append(np.ones(n), np.zeros(k)))[:n]
        np.testing.assert_allclose(got, expected, atol=1e-6)
        counts[k] = calls[0]
    assert counts[n - 1] <= 1.1 * counts[1]


def test_bounds_on_very_many_unknowns_are_refused_before_memory_is_gone() -> None:
    n = 25_000
    bounds = KKT(lambda y, t: anp.sum((y - t) ** 2), ineq=lambda y, t: anp.concatenate([y - 1, -1 - y]))
    with pytest.raises(InputError, match=r"50000 constraints .* GiB"):
        implicit_vjp(bounds, np.zeros(n), np.zeros(n), np.ones(n))
