"""Sparse matrices of programs with constraints: like dense ones, on every framework, and where those do not fit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import JAX, NUMPY, PLAIN, TORCH, Library

import implicitdiff as idf

RNG = np.random.default_rng(11)
N, P, R = 12, 3, 8


def scattered(rng: np.random.Generator, rows: int, columns: int, density: float) -> Any:
    """A sparse matrix with numbers in [0, 1) at random places."""
    return sp.csr_array(np.where(rng.random((rows, columns)) < density, rng.random((rows, columns)), 0.0))


def program(n: int = N, p: int = P, r: int = R) -> dict[str, Any]:
    """Q, A and G sparse, q, b and h."""
    rng = np.random.default_rng(n)

    def wide(k: int) -> Any:
        return (scattered(rng, k, n, 0.2) + sp.eye_array(k, n)).tocsr()

    half = scattered(rng, n, n, 0.1)
    return {"Q": half @ half.T + sp.eye_array(n), "q": rng.normal(size=n), "A": wide(p), "b": 0.1 * rng.normal(size=p),
            "G": wide(r), "h": 0.1 * rng.random(r)}  # fmt: skip


def dense(data: dict[str, Any]) -> dict[str, Any]:
    return {name: x.toarray() if hasattr(x, "toarray") else x for name, x in data.items()}


def solved(data: dict[str, Any]) -> np.ndarray:
    """The solution, of the active set that the dense condition's own solver finds."""
    found = dense(data)
    n, p = len(found["q"]), len(found["b"])
    active = np.zeros(len(found["h"]), dtype=bool)
    for _ in range(100):  # primal active set by violation and sign: small programs of this kind end in a few turns
        J = np.vstack([found["A"], found["G"][active]])
        K = np.block([[found["Q"], J.T], [J, np.zeros((len(J), len(J)))]])
        x = np.linalg.solve(K, np.concatenate([-found["q"], found["b"], found["h"][active]]))
        wrong = active.copy()
        wrong[active] = x[n + p :] < 0
        new = (active & ~wrong) | (found["G"] @ x[:n] - found["h"] > 1e-12)
        if np.array_equal(new, active):
            return x[:n]
        active = new
    raise AssertionError("no active set")


DATA = program()
Y = solved(DATA)
V = RNG.normal(size=N)
VECTORS = ("q", "b", "h")


def arrays(lib: Library, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: lib.array(dense(DATA)[name]) for name in names}


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("solver", ["auto", "lu", "ldlt", "minres"])
@pytest.mark.parametrize("given", ["QAG", "G", "QA"])
@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_sparse_data_is_like_dense(lib: Library, given: str, solver: str) -> None:
    """What is not given sparse is in theta, dense, or a dense constant."""
    rest = {name: lib.array(dense(DATA)[name]) for name in "Q" if name not in given}
    matrices = tuple(name for name in "AG" if name not in given)
    condition = idf.QP(**{name: DATA[name] for name in given}, **rest)
    theta = arrays(lib, (*VECTORS, *matrices))
    g, report = idf.implicit_vjp(condition, lib.array(Y), theta, lib.array(V), solver=solver, return_report=True)
    fixed = {name: dense(DATA)[name] for name in "QAG" if name not in theta}
    want = idf.implicit_vjp(idf.QP(**fixed), Y, {name: dense(DATA)[name] for name in theta}, V)
    for name in theta:
        np.testing.assert_allclose(lib.numpy(g[name]), want[name], rtol=1e-5, atol=1e-8)
    assert solver in {"minres", "lu"} or "the matrix is sparse" in report.reason


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_every_direction_and_given_multipliers(lib: Library) -> None:
    exact = idf.QP(**{name: dense(DATA)[name] for name in "QAG"})
    theta = {name: DATA[name] for name in VECTORS}
    J, y = np.vstack([dense(DATA)["A"], dense(DATA)["G"]]), Y
    active = np.concatenate([np.ones(P, dtype=bool), J[P:] @ y - DATA["h"] > -1e-9])
    z = np.zeros(P + R)
    z[active] = np.linalg.lstsq(J[active].T, -dense(DATA)["Q"] @ y - DATA["q"], rcond=None)[0]
    pair = lib.array(z[:P]), lib.array(z[P:])
    condition = idf.QP(**{name: DATA[name] for name in "QAG"}, multipliers=pair)
    lin = idf.linearize(condition, lib.array(y), arrays(lib, VECTORS))
    tangent = {name: RNG.normal(size=theta[name].shape) for name in VECTORS}
    found = lin.jvp({name: lib.array(t) for name, t in tangent.items()})
    np.testing.assert_allclose(lib.numpy(found), idf.implicit_jvp(exact, y, theta, tangent), rtol=1e-7, atol=1e-10)
    found, want = lin.jacobian(), idf.implicit_jacobian(exact, y, theta)
    for name in VECTORS:
        np.testing.assert_allclose(lib.numpy(found[name]), want[name], rtol=1e-7, atol=1e-10)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_a_batch_and_infinite_bounds(lib: Library) -> None:
    items = []
    for k in range(3):
        data = {**DATA, "q": DATA["q"] * (1 + 0.5 * k), "h": np.where(np.arange(R) == k, 1e3, DATA["h"])}
        items.append((solved(data), {"q": data["q"], "b": data["b"], "h": np.where(data["h"] > 1, np.inf, data["h"])}))
    condition = idf.QP(**{name: DATA[name] for name in "QAG"})
    theta = {name: lib.array(np.stack([item[1][name] for item in items])) for name in VECTORS}
    y, v = lib.array(np.stack([item[0] for item in items])), lib.array(np.stack([V] * 3))
    g = idf.implicit_vjp(condition, y, theta, v, batched=True)
    exact = idf.QP(**{name: dense(DATA)[name] for name in "QAG"})
    for k, (own, data) in enumerate(items):
        want = idf.implicit_vjp(exact, own, data, V)
        for name in VECTORS:
            np.testing.assert_allclose(lib.numpy(g[name])[k], want[name], rtol=1e-7, atol=1e-10)


def test_dependent_gradients_are_named() -> None:
    twice = sp.vstack([DATA["A"], DATA["A"][[0]]]).tocsr()
    condition = idf.QP(Q=DATA["Q"], A=twice, G=DATA["G"])
    theta = {"q": DATA["q"], "b": np.append(DATA["b"], DATA["b"][0]), "h": DATA["h"]}
    with pytest.raises(idf.QualificationError, match=r"LICQ fails: the gradients of eq\[0\], eq\[3\] are"):
        idf.implicit_vjp(condition, Y, theta, V)


def test_what_is_violated_or_weak_is_told() -> None:
    condition = idf.QP(**{name: DATA[name] for name in "QAG"})
    theta = {name: DATA[name] for name in VECTORS}
    gap = DATA["G"] @ Y - DATA["h"]
    loose = int(np.argmin(gap))
    with pytest.raises(idf.InfeasibleError, match=rf"y violates ineq\[{loose}\]"):
        idf.implicit_vjp(
            condition, Y, {**theta, "h": np.where(np.arange(R) == loose, theta["h"] + gap - 1, theta["h"])}, V
        )
    touched = {**theta, "h": np.where(np.arange(R) == loose, theta["h"] + gap, theta["h"])}
    with pytest.warns(idf.RegularityWarning, match=rf"ineq\[{loose}\] is weakly active"):
        idf.implicit_vjp(condition, Y, touched, V)


@pytest.mark.parametrize("route", ["schur", "nullspace"])
def test_dense_routes_are_refused(route: Any) -> None:
    condition = idf.QP(**{name: DATA[name] for name in "QAG"}, route=route)
    with pytest.raises(idf.InputError, match="is dense, and the system is sparse"):
        idf.implicit_vjp(condition, Y, {name: DATA[name] for name in VECTORS}, V)


def test_what_dense_matrices_have_no_room_for() -> None:
    """Smoothing under 30 000 bounds, of which it is said which are active: their gradients would take 7 GiB."""
    n, rng = 30_000, np.random.default_rng(5)
    D = sp.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
    Q, G = (sp.eye_array(n) + 10 * D.T @ D).tocsc(), sp.eye_array(n).tocsr()
    active = rng.random(n) < 0.3
    y = np.where(active, 0.1, 0.05 * np.sin(np.arange(n)) - 0.1)
    q = -Q @ y - np.where(active, 1.0, 0.0)
    h, v = np.where(active, y, y + 1.0), rng.normal(size=n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g, report = idf.implicit_vjp(idf.QP(Q=Q, G=G), y, {"q": q, "h": h}, v, return_report=True)
    free = ~active
    w = np.zeros(n)
    w[free] = sp.linalg.spsolve(Q[free][:, free].tocsc(), v[free])
    np.testing.assert_allclose(g["q"], -w, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(g["h"][active], (v - Q @ w)[active], rtol=1e-8, atol=1e-12)
    assert report.solver == "lu"


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_inside_of_a_program(lib: Any) -> None:
    import jax

    condition, exact = (idf.QP(**{name: d[name] for name in "QAG"}) for d in (DATA, dense(DATA)))
    found = jax.jit(lambda y, theta, v: idf.implicit_vjp(condition, y, theta, v))(
        lib.array(Y), arrays(lib, VECTORS), lib.array(V)
    )
    want = idf.implicit_vjp(exact, Y, {name: DATA[name] for name in VECTORS}, V)
    for name in VECTORS:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-7, atol=1e-10)


# -- Jacobians and Hessians of constraints -----------------------------------------------------------------
def springs(n: int, sparse: bool, hessian: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A chain of nonlinear springs under linear equalities and a bound on each square, with derivatives at hand."""
    A = (sp.eye_array(n // 2, n) + 0.5 * sp.eye_array(n // 2, n, k=n // 2)).tocsr()
    T = sp.diags_array([np.full(n - 1, 0.5), np.full(n, 2.0), np.full(n - 1, 0.5)], offsets=[-1, 0, 1])

    def out(M: Any) -> Any:
        return M.tocsc() if sparse else M.toarray()

    def f(y: Any, theta: Any) -> Any:
        return np.sum(y**4) / 4 + np.sum(y * (T @ y)) / 2 - np.sum(theta["c"] * y)

    given: dict[str, Any] = {
        "grad": lambda y, theta: y**3 + T @ y - theta["c"],
        "eq_jacobian": lambda y, theta: out(A),
        "ineq_jacobian": lambda y, theta: out(sp.diags_array(2 * y)),
    }
    if hessian == "given":
        given |= {
            "hessian": lambda y, theta: out(T + sp.diags_array(3 * y**2)),
            "eq_hessian": lambda y, theta, lam: out(sp.csc_array((n, n))),
            "ineq_hessian": lambda y, theta, mu: out(sp.diags_array(2 * mu)),
        }
    if hessian == "lagrangian":
        given["lagrangian_hessian"] = lambda y, theta, lam, mu: out(T + sp.diags_array(3 * y**2 + 2 * mu))
    return f, lambda y, theta: A @ y - theta["b"], lambda y, theta: y**2 - theta["r"], given


def held(n: int) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """A solution, its theta, and which squares are at their bounds."""
    rng = np.random.default_rng(n)
    _, eq, _, given = springs(n, True, "")
    y, active = rng.normal(size=n), (rng.random(n) < 0.2) & (np.arange(n) >= n // 2)
    zero = {"c": np.zeros(n), "b": np.zeros(n // 2), "r": np.zeros(n)}
    pull = given["eq_jacobian"](y, zero).T @ rng.normal(size=n // 2) + 2 * y * active
    return y, {"c": given["grad"](y, zero) + pull, "b": eq(y, zero), "r": y**2 + ~active}, active


@pytest.mark.parametrize("hessian", ["products", "given", "lagrangian"])
def test_sparse_derivatives_of_constraints_are_like_dense(hessian: str) -> None:
    n = 30
    y, theta, _ = held(n)
    v = RNG.normal(size=n)
    found = []
    for sparse in (True, False):
        f, eq, ineq, given = springs(n, sparse, hessian)
        found.append(idf.implicit_vjp(idf.KKT(f, eq, ineq, **given), y, theta, v, return_report=True))
    (g, report), (want, _) = found
    for name in theta:
        np.testing.assert_allclose(g[name], want[name], rtol=1e-8, atol=1e-11)
    assert report.reason.startswith("the matrix is sparse")
    assert ("assembled from 3 products" in report.reason) == (hessian == "products")
    assert report.matvecs == (n + 4 if hessian == "products" else 0)
    f, eq, ineq, given = springs(n, True, hessian)
    g = idf.implicit_vjp(idf.KKT(f, eq, ineq, **given, route="nullspace"), y, theta, v, solver="lu")  # which is dense
    np.testing.assert_allclose(g["c"], want["c"], rtol=1e-8, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("hessian", ["products", "given", "lagrangian"])
def test_constraints_that_dense_matrices_have_no_room_for(hessian: str) -> None:
    n = 20_000
    y, theta, active = held(n)
    f, eq, ineq, given = springs(n, True, hessian)
    w, report = idf.implicit_jvp(idf.KKT(f, eq, ineq, **given), y, theta, {**theta, "c": 0 * y}, return_report=True)
    assert report.converged
    np.testing.assert_allclose(given["eq_jacobian"](y, theta) @ w, theta["b"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose((2 * y * w)[active], theta["r"][active], rtol=1e-8)


def test_a_sparse_linear_constraint_of_scipy_stays_sparse() -> None:
    from scipy.optimize import LinearConstraint

    n = 30
    rng = np.random.default_rng(1)
    A = (scattered(rng, 10, n, 0.2) + sp.eye_array(10, n)).tocsr()
    y = rng.normal(size=n)
    theta, v = y + A.T @ rng.uniform(0.5, 1, 10), rng.normal(size=n)
    found = []
    for M in (A, A.toarray()):
        limits = LinearConstraint(M, np.where(np.arange(10) < 5, A @ y, -np.inf), A @ y)
        condition = idf.KKT(lambda y, theta: np.sum((y - theta) ** 2) / 2, limits)
        found.append(idf.implicit_vjp(condition, y, theta, v, return_report=True))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(A @ found[0][0], 0, atol=1e-8)
    assert found[0][1].reason.startswith("the matrix is sparse")


def test_a_sparse_jacobian_of_another_shape_is_refused() -> None:
    f, eq, ineq, given = springs(30, True, "")
    given["eq_jacobian"] = lambda y, theta: sp.eye_array(3, 30)
    y, theta, _ = held(30)
    with pytest.raises(idf.CallbackError, match=r"eq_jacobian returned shape \(3, 30\)"):
        idf.implicit_vjp(idf.KKT(f, eq, ineq, **given), y, theta, y)
