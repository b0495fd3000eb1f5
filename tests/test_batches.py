"""FAULTS 76: the result of an item is that of the item alone, whatever is beside it; and how batches are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import JAX, LIBRARIES, Library
from problems import PROBLEMS, SOLVERS_FOR, STRUCTURES, N, matrix, with_eigenvalues

from implicitdiff import (
    CG,
    GMRES,
    MINRES,
    NotPositiveDefiniteError,
    SolveError,
    Status,
    implicit_vjp,
    linear_solve,
)
from implicitdiff.arrays import listed, named_items

LIBS = pytest.mark.parametrize("lib", [*LIBRARIES[:2], *LIBRARIES[3:], *JAX], ids=lambda lib: lib.name)
METHODS = {"cg": CG(maxiter=300), "minres": MINRES(maxiter=300), "gmres": GMRES(maxiter=300), "auto": "auto"}


def neighbours(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return items that end at different times and in different ways: matrices and right-hand sides."""
    signs = (-1.0) ** np.arange(N) if kind == "sym" else 1.0
    hard, medium = (with_eigenvalues(np.logspace(0, k, N) * signs, seed) for k, seed in ((3, 1), (1, 2)))
    flat = with_eigenvalues(np.linspace(1.0, 2.0, N))
    singular = np.diag(np.r_[0.0, np.linspace(1.0, 2.0, N - 1)])
    broken = np.where(np.eye(N) > 0, np.nan, 0.0)
    a = np.stack([hard, np.eye(N), broken, medium, singular, flat])
    if kind == "gen":
        a = a + np.triu(a, 1) * np.array([0.1, 0, 0, 0.1, 0, 0.1])[:, None, None]
    b = np.random.default_rng(5).normal(size=(6, N))
    b[5] = 0.0
    return a, b


def solved(lib: Library, a: np.ndarray, b: np.ndarray, kind: str, solver: Any) -> tuple[np.ndarray, np.ndarray]:
    """Solve a batch by its products; the solutions and how each ended."""
    m = lib.array(a)
    x, report = linear_solve(
        lambda v: (m @ v[..., None])[..., 0], lib.array(b), solver=solver, batched=True, on_failure="ignore",
        symmetric=kind != "gen", return_report=True,
    )  # fmt: skip
    return lib.numpy(x), lib.numpy(report.status)


@pytest.mark.slow(on=("jax",))
@LIBS
@pytest.mark.parametrize(("kind", "solver"), [*(("pos", s) for s in METHODS), ("sym", "minres"), ("gen", "gmres")])
def test_an_item_is_solved_as_if_it_were_alone(lib: Library, kind: str, solver: str) -> None:
    """Beside items that end at once, fail, hold NaN, or are zero: the same status, and the same solution."""
    if lib.name == "jax" and (kind, solver) not in {("sym", "minres"), ("gen", "gmres")}:
        pytest.skip("one of each kind of loop is enough to compile")
    a, b = neighbours(kind)
    x, status = solved(lib, a, b, kind, METHODS[solver])
    for i in (0,) if lib.name == "jax" else range(len(b)):  # each takes a compilation
        alone, (code,) = solved(lib, a[i : i + 1], b[i : i + 1], kind, METHODS[solver])
        assert status[i] == code, (
            f"item {i}: {Status(int(status[i])).name} in the batch, {Status(int(code)).name} alone"
        )
        if code == 0:
            np.testing.assert_allclose(x[i], alone[0], rtol=0, atol=1e-7 * np.abs(alone).max())
    assert [int(s) for s in status[[0, 1, 3, 5]]] == [0, 0, 0, 0]
    assert status[2] == Status.NON_FINITE
    assert status[4] == Status.SINGULAR
    assert not np.any(x[5])


@pytest.mark.parametrize("seed", range(5))
def test_minres_with_items_that_finish_early(seed: int) -> None:
    """NaN in 19 of 20 seeds once: the Lanczos vectors of a finished item grew without bound."""
    n = 100
    signs = np.where(np.arange(n) % 2, 1.0, -1.0)
    a = np.stack([with_eigenvalues(np.logspace(0, k, n) * signs, seed) for k in (1, 2, 3)])
    b = np.random.default_rng(seed).normal(size=(3, n))
    x = linear_solve(a, b, solver="minres", batched=True)
    for i in range(3):
        exact = np.linalg.solve(a[i], b[i])
        assert np.linalg.norm(x[i] - exact) <= 1e-6 * np.linalg.norm(exact)


ITEMWISE = [(n, s) for n in PROBLEMS for s in ("cg", "minres", "gmres", "auto") if s in SOLVERS_FOR[STRUCTURES[n]]]


@pytest.mark.parametrize(("name", "solver"), ITEMWISE)
@pytest.mark.parametrize("lib", LIBRARIES[:1] + LIBRARIES[3:], ids=lambda lib: lib.name)
def test_conditions_item_by_item(lib: Library, name: str, solver: str) -> None:
    """Every condition: the cotangents have sizes of their own, and one is zero."""
    problem = PROBLEMS[name](lib.xp, lib.xp.float64, (4,))
    products = {"hvp"} if "hvp" in problem.functions else {"jvp", "vjp"}
    condition = problem.condition(*({"grad", "fun", "mixed_vjp", *products} & set(problem.functions)))
    v = problem.cotangent * lib.array([[1e-9], [1.0], [0.0], [1e9]])
    together = implicit_vjp(condition, problem.y, problem.theta, v, solver=solver, batched=True)
    for i in range(4):
        y, theta, one = (x[i : i + 1, ...] for x in (problem.y, problem.theta, v))
        alone = lib.numpy(implicit_vjp(condition, y, theta, one, solver=solver, batched=True))
        np.testing.assert_allclose(lib.numpy(together)[i], alone[0], rtol=0, atol=1e-8 * np.abs(alone).max())


# -- what is told ----------------------------------------------------------------------------------------
def of_sixteen() -> tuple[np.ndarray, np.ndarray]:
    a = np.broadcast_to(matrix("pos"), (16, N, N)).copy()
    a[[5, 12]] *= -1
    return a, np.ones((16, N))


def test_a_report_counts_and_names_the_items() -> None:
    a, b = of_sixteen()
    report = linear_solve(a, b, solver="cg", batched=True, on_failure="ignore", return_report=True)[1]
    assert "14 of 16 converged; items 5, 12: NOT_POSITIVE_DEFINITE\n" in f"{report}\n"


def test_an_error_counts_and_names_the_items() -> None:
    a, b = of_sixteen()
    a[3] = 0.0
    with pytest.raises(
        SolveError, match=r"^13 of 16 converged; items 5, 12: NOT_POSITIVE_DEFINITE; item 3: SINGULAR\."
    ):
        linear_solve(a, b, solver="cg", batched=True)


def test_no_list_stops_in_silence() -> None:
    mask = np.arange(40) % 2 == 1
    assert named_items(np, mask) == "items 1, 3, 5, 7, 9, 11, 13, 15 and 12 more"
    assert named_items(np, np.arange(4) == 2) == "item 2"
    assert listed(["a", "b"]) == "a, b"
    with pytest.raises(NotPositiveDefiniteError, match=r"0 of 12 converged; items 0, .*, 7 and 4 more: NOT_POSITIVE"):
        linear_solve(-np.broadcast_to(np.eye(3), (12, 3, 3)), np.ones((12, 3)), solver="cg", batched=True)
