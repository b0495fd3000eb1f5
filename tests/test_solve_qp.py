"""`solve_qp` against programs whose solution and multipliers were chosen, and against differences of solved ones."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, TORCH, Library
from frameworks import EACH, framework
from helpers_qp import (
    LIBS,
    MANY,
    Data,
    N,
    P,
    R,
    V,
    batch,
    gradient,
    gradient_of_batch,
    on,
    program,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from implicitdiff import (
    QP,
    DegeneracyWarning,
    InfeasibleError,
    InputError,
    NotPositiveDefiniteError,
    QualificationError,
    RegularityWarning,
    implicit_function,
    implicit_vjp,
    solve_qp,
)
from implicitdiff.programs import solve


# -- solutions -------------------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_solution_and_its_multipliers(lib: Library, dtype: str) -> None:
    data, y, lam, mu = program()
    data = {name: lib.array(x, dtype) for name, x in data.items()}
    found, multipliers = solve_qp(**data, return_multipliers=True)
    assert lib.owns(found)
    assert found.dtype == data["Q"].dtype
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for got, expected in ((found, y), (multipliers[0], lam), (multipliers[1], mu)):
        np.testing.assert_allclose(lib.numpy(got), expected, rtol=tolerance, atol=tolerance)


@LIBS
def test_a_batch_some_of_which_is_shared(lib: Library) -> None:
    data, y, mu = batch()
    found, (_, multipliers) = solve_qp(**on(lib, data), batched=True, return_multipliers=True)
    np.testing.assert_allclose(lib.numpy(found), y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lib.numpy(multipliers), mu, rtol=1e-11, atol=1e-12)


def test_by_clarabel_and_by_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interior-point method, in threads, where the other ends without a solution: the same to rounding."""
    found = [program(seed) for seed in range(6)]
    data = {name: np.stack([d[name] for d, *_ in found]) for name in found[0][0]}
    newton, taken = solve.by_newton, list[np.ndarray]()

    def never(given: Any) -> Any:
        y, z, solved = newton(given)
        taken.append(solved)
        return np.nan * y, np.nan * z, solved & False

    monkeypatch.setattr(solve, "by_newton", never)
    for got, expected in zip(solve_qp(**data, batched=True), (y for _, y, *_ in found), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)
    assert np.all(taken)


@pytest.mark.parametrize("kept", ["A", "G"])
def test_one_kind_of_constraints(kept: str) -> None:
    """Equalities alone, or inequalities alone; the other multipliers are None."""
    data, *_ = program()
    drop = {"A": ("G", "h"), "G": ("A", "b")}[kept]
    data = {name: x for name, x in data.items() if name not in drop}
    y, multipliers = solve_qp(**data, return_multipliers=True)
    z, other = multipliers if kept == "A" else multipliers[::-1]
    assert other is None
    np.testing.assert_allclose(data["Q"] @ y + data["q"] + data[kept].T @ z, 0, atol=1e-12)
    g = implicit_vjp(QP(multipliers=multipliers), y, data, V)  # they are what QP takes
    assert np.all(np.isfinite(g["q"]))


def test_what_is_not_strictly_convex() -> None:
    """A linear program at its vertex, a bound that is infinite, and one that is far away."""
    G, h = np.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 0.0]]), np.array([1.0, 0.0, 0.0, 1e9])
    y = solve_qp(np.zeros((2, 2)), np.array([-1.0, -2.0]), G=G, h=h)
    np.testing.assert_allclose(y, [0.0, 1.0], atol=1e-14)
    y = solve_qp(np.diag([1.0, 0.0]), np.array([-1.0, 1.0]), G=G, h=np.array([np.inf, 0.0, 0.0, 5.0]))
    np.testing.assert_allclose(y, [1.0, 0.0], atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(-9, 9), st.integers(0, 8))
def test_units_do_not_matter(seed: int, f: int, spread: int) -> None:
    """y → D y, rows → E rows, f → c f: the same solution, to rounding times what it loses."""
    data, y, *_ = program(seed)
    rng = np.random.default_rng(seed)
    D, E, S = (2.0 ** rng.integers(-spread, spread + 1, size=k) for k in (N, P, R))
    c = 10.0**f
    moved = {
        "Q": c * data["Q"] * D * D[:, None], "q": c * data["q"] * D, "A": data["A"] * D * E[:, None],
        "b": data["b"] * E, "G": data["G"] * D * S[:, None], "h": data["h"] * S,
    }  # fmt: skip
    np.testing.assert_allclose(solve_qp(**moved) * D, y, rtol=1e-8, atol=1e-9)


# -- derivatives -----------------------------------------------------------------------------------------
def test_derivatives_on_numpy() -> None:
    data, *_ = batch()
    axes = {name: None if name == "A" else 0 for name in data}
    layer = implicit_function(QP(), in_axes=(0, axes, None))(lambda data: solve_qp(**data, batched=True))
    same(NUMPY, layer.vjp(data, MANY), gradient_of_batch(data, MANY))


@pytest.mark.slow(on=("jax",))
@EACH
def test_derivatives_by_the_framework(name: str) -> None:
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    data, *_ = batch()
    v, names = lib.array(MANY), list(data)
    expected = gradient_of_batch(data, MANY)
    if name == "torch":
        leaves = {k: x.requires_grad_() for k, x in on(lib, data).items()}
        (v * solve_qp(**leaves, batched=True)).sum().backward()
        same(lib, {k: x.grad for k, x in leaves.items()}, expected)
        return

    def loss(*leaves: Any) -> Any:
        return (v * solve_qp(**dict(zip(names, leaves, strict=True)), batched=True)).sum()

    by_all = fw.jax.jit(fw.jax.grad(loss, tuple(range(len(names)))))
    same(lib, dict(zip(names, by_all(*on(lib, data).values()), strict=True)), expected)


@pytest.mark.slow(on=("jax",))
@EACH
def test_transforms_and_the_second_order(name: str) -> None:
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    data, *_ = program()
    fixed = on(lib, {k: x for k, x in data.items() if k != "h"})
    h = lib.array(data["h"])
    transforms = fw.transforms()

    def solved(h: Any) -> Any:
        return solve_qp(**fixed, h=h)

    forward, reverse = (lib.numpy(transforms[way](solved)(h)) for way in ("jacfwd", "jacrev"))
    np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(V @ reverse, gradient(data, V)["h"], rtol=1e-6, atol=1e-7)
    found = transforms["vmap"](transforms["grad"](lambda h: (solved(h) ** 2).sum()))(lib.xp.stack([h, 1.01 * h]))
    for row, bound in zip(lib.numpy(found), (data["h"], 1.01 * data["h"]), strict=True):
        y = solve_qp(**{**data, "h": bound})
        np.testing.assert_allclose(row, implicit_vjp(QP(), y, {**data, "h": bound}, 2 * y)["h"], rtol=1e-7, atol=1e-9)
    J = np.asarray(reverse)
    hessian = transforms["hessian"](lambda h: (solved(h) ** 2).sum())(h)  # y is affine in h: 2 JᵀJ
    np.testing.assert_allclose(lib.numpy(hessian), 2 * J.T @ J, rtol=1e-8, atol=1e-9)


def test_multipliers_are_not_differentiated_in_silence() -> None:
    if not TORCH:
        pytest.skip("needs torch")
    data = {k: x.requires_grad_() for k, x in on(TORCH[0], program()[0]).items()}
    _, (_, mu) = solve_qp(**data, return_multipliers=True)
    with pytest.raises(NotImplementedError, match="aux"):
        mu.sum().backward()


def test_what_is_told_of_a_derivative() -> None:
    """A weakly active constraint is a warning, one that is there twice an error; and reports are handed out."""
    if not TORCH:
        pytest.skip("needs torch")
    array, seen = TORCH[0].array, list[Any]()
    G, q = array([[1.0, 0.0], [0.0, 1.0]]), array([-1.0, -2.0]).requires_grad_()
    y = solve_qp(array(np.eye(2)), q, G=G, h=array([1.0, 5.0]), on_report=seen.append)
    with pytest.warns(RegularityWarning, match=r"ineq\[0\] is weakly active"):
        y.sum().backward()
    assert seen[0].converged
    y = solve_qp(array(np.eye(2)), q, G=array([[1.0, 0.0], [2.0, 0.0]]), h=array([0.5, 1.0]))
    np.testing.assert_allclose(y.detach().numpy(), [0.5, 2.0])
    with pytest.raises(QualificationError, match=r"ineq\[0\], ineq\[1\]"):
        y.sum().backward()


@pytest.mark.slow(on=("jax",))
@EACH
def test_one_piece_at_a_kink(name: str) -> None:
    """Where a constraint is there twice, and another holds with a multiplier of zero: the derivative of one side."""
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    G = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    fixed = on(lib, {"Q": np.eye(2), "q": np.array([-1.0, -2.0]), "G": G})
    bounds = np.array([0.5, 1.0, 2.0])

    def first(h: Any) -> Any:
        return solve_qp(**fixed, h=h, degenerate="select")[0]

    told = pytest.warns(DegeneracyWarning, match=r"ineq\[0\], ineq\[1\]")
    with told if name == "torch" else contextlib.nullcontext():  # JAX's own passes do not say what was seen
        got = lib.numpy(fw.gradient(first)(lib.array(bounds)))
    assert got.tolist() in ([1.0, 0.0, 0.0], [0.0, 0.5, 0.0])  # y[0] = min(h[0], h[1] / 2)


# -- sparse matrices -------------------------------------------------------------------------------------
def chain() -> tuple[Data, np.ndarray]:
    """A banded program with bounds and one sum, whose matrices are sparse, and its solution by dense ones."""
    n = 40
    Q = sparse.diags_array([np.full(n - 1, -1.0), np.full(n, 2.2), np.full(n - 1, -1.0)], offsets=[-1, 0, 1])
    G, A = sparse.vstack([sparse.eye_array(n), -sparse.eye_array(n)]), sparse.csr_matrix(np.ones((1, n)))
    h, q = np.r_[np.full(n, 0.3), np.full(n - 1, 0.2), np.inf], np.sin(np.arange(n) / 3)
    data = {"Q": Q, "q": q, "A": A, "b": np.array([1.0]), "G": G, "h": h}
    return data, solve_qp(**{k: x.toarray() if sparse.issparse(x) else x for k, x in data.items()})


@LIBS
def test_sparse_matrices(lib: Library) -> None:
    """Constants on every framework: the same solution as with dense ones, alone and in a batch."""
    data, y = chain()
    given = {k: x if sparse.issparse(x) else lib.array(x) for k, x in data.items()}
    np.testing.assert_allclose(lib.numpy(solve_qp(**given)), y, atol=1e-12)
    q = lib.array(np.stack([data["q"], 0 * data["q"]]))
    np.testing.assert_allclose(lib.numpy(solve_qp(**{**given, "q": q}, batched=True))[0], y, atol=1e-12)


@pytest.mark.slow(on=("jax",))
@EACH
def test_derivatives_beside_sparse_matrices(name: str) -> None:
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    data, y = chain()
    dense = {k: x.toarray() if sparse.issparse(x) else x for k, x in data.items()}
    v = np.cos(np.arange(len(y)))
    expected = implicit_vjp(QP(), y, dense, v)
    fixed = {k: x if sparse.issparse(x) else lib.array(x) for k, x in data.items() if k != "q"}
    gradient = fw.gradient(lambda q: (lib.array(v) * solve_qp(**fixed, q=q)).sum())(lib.array(data["q"]))
    np.testing.assert_allclose(lib.numpy(gradient), expected["q"], atol=1e-12)


def test_sparse_matrices_that_do_not_fit() -> None:
    data, _ = chain()
    with pytest.raises(NotPositiveDefiniteError):
        solve_qp(**{**data, "Q": data["Q"] - 0.5 * sparse.eye_array(40)})
    with pytest.raises(NotPositiveDefiniteError):
        solve_qp(**{**data, "Q": -data["Q"]})
    with pytest.raises(InfeasibleError):
        solve_qp(**{**data, "b": np.array([100.0])})
    with pytest.raises(InputError, match="A differs from item to item, beside a sparse matrix"):
        solve_qp(**{**data, "A": np.ones((2, 1, 40))}, batched=True)
    semidefinite = sparse.diags_array(np.r_[np.ones(20), np.zeros(20)])
    y, (lam, mu) = solve_qp(**{**data, "Q": semidefinite}, return_multipliers=True)
    left = semidefinite @ y + data["q"] + data["A"].T @ lam + data["G"].T @ mu
    np.testing.assert_allclose(left, 0, atol=1e-11)
