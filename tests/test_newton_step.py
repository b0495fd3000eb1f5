"""FAULTS 19, 20, 59 and 78: whether y is a solution, by the Newton step, in any units and at any condition number."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, Library, assert_told, outcome, with_condition

from implicitdiff import (
    KKT,
    NotASolutionWarning,
    Root,
    SingularError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jvp,
)
from implicitdiff import implicit_vjp as vjp

three = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
jax_only = pytest.mark.skipif(not JAX, reason="needs jax")
STEP = r"Newton's step from (.+) = (\S+) is (\S+):"


def linear(lib: Library, A: np.ndarray, **options: Any) -> Any:
    """F(y, θ) = A y − θ."""
    M, Mt = lib.array(A), lib.array(A.T.copy())
    products = {"mixed_vjp": lambda y, t, u: -u, "mixed_jvp": lambda y, t, d: -d}
    if np.allclose(A, A.T, rtol=1e-12, atol=0):
        return Stationary(grad=lambda y, t: M @ y - t, hvp=lambda y, t, v: M @ v, **products)
    return Root(lambda y, t: M @ y - t, jvp=lambda y, t, v: M @ v, vjp=lambda y, t, u: Mt @ u, **products)


def told(lib: Library, A: np.ndarray, solution: np.ndarray, y: np.ndarray, **options: Any) -> Any:
    """What a vjp at y comes to, where A y = θ has that solution."""
    arrays = [lib.array(x.astype(A.dtype)) for x in (y, A @ solution, np.ones(len(y)))]
    return outcome(lambda: vjp(linear(lib, A), *arrays, **options))


# -- told ----------------------------------------------------------------------------------------------------------
@three
def test_59_one_coordinate_beside_another_of_any_size(lib, solver):
    found = told(lib, np.eye(2), np.array([1e5, 1.0]), np.array([1e5, 0.6]), solver=solver)
    assert_told(found, NotASolutionWarning, STEP)
    name, value, step = re.search(STEP, found.text).groups()
    assert (name, float(value), float(step)) == ("y[1]", 0.6, pytest.approx(0.4))
    assert "as much as" not in found.text


@three
def test_59_ten_percent_at_condition_1e4(lib, solver):
    A, _ = with_condition(6, 1e4, 3)
    values, vectors = np.linalg.eigh(A)
    solution = np.cos(np.arange(6.0)) + 0.5
    weak = vectors[:, np.argmin(abs(values))]
    y = solution + 0.1 * np.linalg.norm(solution) * weak
    assert_told(told(lib, A, solution, y, solver=solver), NotASolutionWarning, "y is not a solution")


@three
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e9])
def test_59_fifty_percent_whatever_the_size_of_y(lib, size, solver):
    A, solution = np.diag([1.0, 3.0, 2.0]), size * np.array([1.0, -2.0, 0.5])
    assert_told(told(lib, A, solution, 1.5 * solution, solver=solver), NotASolutionWarning, STEP)
    assert told(lib, A, solution, solution, solver=solver).quiet


def test_59_the_leaf_and_the_index_are_named():
    A, theta = np.diag([2.0, 3.0]), {"q": np.array([4.0, 9.0]), "p": np.array(2.0)}
    y = {"pressure": np.array([[2.0, 3.3]]), "flow": np.array(2.0)}
    fun = lambda y, t: {"pressure": y["pressure"] @ A - t["q"], "flow": y["flow"] - t["p"]}
    found = outcome(lambda: vjp(Root(fun), y, theta, y))
    assert_told(found, NotASolutionWarning, r"step from y\['pressure'\]\[0, 1\] = 3\.3 is -0\.3:")
    y["pressure"][0, 1], y["flow"] = 3.0, np.array(2.5)
    assert_told(outcome(lambda: vjp(Root(fun), y, theta, y)), NotASolutionWarning, r"from y\['flow'\] = 2\.5 is -0\.5:")


@three
def test_59_items_of_a_batch(lib, solver):
    condition = Stationary(
        grad=lambda y, t: 2.0 * (y - t), hvp=lambda y, t, v: 2.0 * v, mixed_vjp=lambda y, t, u: -2.0 * u
    )
    theta = np.array([[1e5, 1.0], [2e5, 3.0], [1e-5, 2.0]])
    y = theta + np.array([[0.0, 0.0], [0.0, 0.9], [4e-6, 0.0]])
    arrays = [lib.array(x) for x in (y, theta, np.ones((3, 2)))]
    found = outcome(lambda: vjp(condition, *arrays, solver=solver, batched=True, return_report=True))
    assert_told(found, NotASolutionWarning, r"items 1, 2[\s\S]*y\[1, 1\] = 3\.9 is -0\.9:")
    assert [bool(x) for x in found.value[1].solved] == [True, False, False]


def test_59_a_constrained_solution():
    """y off by 1 % along the constraint, where the gradient of f alone says nothing."""
    f = lambda y, t: 0.5 * np.sum((y - t) ** 2)
    condition = KKT(f, eq=lambda y, t: np.sum(y) - 1.0)
    theta = np.array([0.2, 0.5, 0.9])
    solution = theta - (np.sum(theta) - 1) / 3
    assert outcome(lambda: vjp(condition, solution, theta, np.ones(3))).quiet
    bad = solution + 0.01 * np.array([1.0, -1.0, 0.0])
    assert_told(outcome(lambda: vjp(condition, bad, theta, np.arange(3.0))), NotASolutionWarning, STEP)


# -- units ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("kind", ["all", "mixed", "F"])
def test_59_units_make_no_difference(error, kind, solver):
    """y → D y, θ → E θ, F → S F, the matrix at hand: the same warning at the same coordinate, or none."""
    rng = np.random.default_rng(1)
    A = with_condition(5, 50.0, 2, kind="definite" if solver in {"cholesky", "cg", "minres"} else "general")[0]
    solution = 0.5 + rng.random(5)
    y = solution * (1 + error * np.eye(5)[2])
    for scale in (1e-9, 1e9):
        D = np.full(5, scale) if kind == "all" else np.where(np.arange(5) % 2, scale, 1.0)
        D = np.ones(5) if kind == "F" else D
        S = scale / D if kind == "F" else 1 / D
        if kind == "mixed" and solver in {"cg", "minres", "gmres"}:
            continue  # within a leaf, without a matrix: the user's own scales
        M = S[:, None] * A / D
        found = told(NUMPY, M, D * solution, D * y, solver=solver)
        assert bool(found.warnings) == (error > 1e-5), found.text
        if found.warnings:
            assert re.search(STEP, found.text)[1] == "y[2]"


@three
def test_59_a_coordinate_is_held_against_those_that_it_is_linked_with(lib):
    """A falls into blocks, {0, 2} and {1}: the unit of one says nothing of the other's."""
    A = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    for unit in (1e-9, 1.0, 1e9):
        solution = np.array([1.0, unit, 1e-9])
        off = lambda i, d, y=solution: y + d * np.eye(3)[i]
        assert told(lib, A, solution, off(2, 1e-9), solver="lu").quiet
        assert_told(told(lib, A, solution, off(1, 0.2 * unit), solver="lu"), NotASolutionWarning, r"from y\[1\]")
    # a block of which θ says nothing has no unit of its own
    assert told(lib, A, np.array([1.0, 0.0, 2.0]), np.array([1.0, 1e-9, 2.0]), solver="lu").quiet


def test_59_blocks_of_a_sparse_matrix():
    A = scipy.sparse.block_diag([np.array([[2.0, 1.0], [1.0, 3.0]]), np.eye(1)], format="csr")
    condition = Stationary(grad=lambda y, t: A @ y - t, hessian=lambda y, t: A)
    y = np.array([1.0, 1e-9, 1e-9])
    assert outcome(lambda: vjp(condition, y * (1 + 1e-9), A @ y, np.ones(3))).quiet
    found = outcome(lambda: vjp(condition, y * [1.0, 1.2, 1.2], A @ y, np.ones(3)))
    assert_told(found, NotASolutionWarning, r"from y\[2\]")


# -- not told ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("solver", ["auto", "cg", "gmres"])
def test_20_no_false_alarm_in_random_problems(dtype, solver):
    """Up to condition 1e4, y to 1e-9 of the vector (or to single rounding), entries that are tiny by accident."""
    eps = float(np.finfo(dtype).eps)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        n, condition = int(rng.integers(1, 9)), 10 ** rng.uniform(0, 4)
        A, _ = with_condition(n, condition, seed, dtype=dtype)
        solution = (rng.standard_normal(n) * 10 ** rng.uniform(-8, 0, n)).astype(dtype)
        solution = solution * np.asarray(10 ** rng.uniform(-12, 12), dtype)
        y = solution + max(1e-9, eps) * np.max(abs(solution)) * rng.uniform(-1, 1, n)
        theta = (A.astype(float) @ solution.astype(float)).astype(dtype)
        arrays = [x.astype(dtype) for x in (y, theta, rng.standard_normal(n))]
        found = outcome(lambda arrays=arrays, A=A: vjp(linear(NUMPY, A), *arrays, solver=solver))
        assert not [w for w in found.warnings if isinstance(w, NotASolutionWarning)], (seed, condition, found.text)


@pytest.mark.parametrize("given", [True, False], ids=["grad", "fun alone"])
def test_20_least_squares_solved_in_single_precision(given):
    """The terms of F are far larger than F and A y: rounding in F is seen by evaluating it once more."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((30, 4)) * np.geomspace(1, 30, 4)
        t, lam = 1e3 * rng.standard_normal(30), np.array([0.1, 0.2, 0.3, 0.4])
        w = np.linalg.solve(X.T @ X + np.diag(lam), X.T @ t)
        X, t, lam, w = (x.astype(np.float32) for x in (X, t, lam, w))
        grad = lambda w, lam, X=X, t=t: X.T @ (X @ w - t) + lam * w
        fun = lambda w, lam, X=X, t=t: 0.5 * np.sum((X @ w - t) ** 2) + 0.5 * np.sum(lam * w * w)
        condition = Stationary(grad=grad) if given else Stationary(fun)
        found = outcome(lambda c=condition, w=w, lam=lam: vjp(c, w, lam, np.ones(4, np.float32)))
        assert not found.warnings, found.text


@three
def test_20_a_solution_at_zero(lib, solver):
    """y = 1e-12 where the solution is 0: small against what θ makes of y, and nothing else to hold it against."""
    A = np.array([[2.0, 1.0], [1.0, 3.0]])
    M = lib.array(A)
    condition = Stationary(
        grad=lambda y, t: M @ y - (t[:2] - t[2:]), hvp=lambda y, t, v: M @ v,
        mixed_vjp=lambda y, t, u: lib.xp.concat([-u, u]), mixed_jvp=lambda y, t, d: d[2:] - d[:2],
    )  # fmt: skip
    arrays = [lib.array(x) for x in ([1e-12, -2e-12], [1.0, 2.0, 1.0, 2.0], [1.0, 1.0])]
    assert outcome(lambda: vjp(condition, *arrays, solver=solver)).quiet
    arrays[0] = lib.array([1e-2, 0.0])
    assert_told(outcome(lambda: vjp(condition, *arrays, solver=solver)), NotASolutionWarning, STEP)


@pytest.mark.parametrize("solver", ["cg", "minres", "gmres"])
def test_no_product_is_spent_at_a_converged_point(solver):
    """The check costs products only where there is doubt, and tells them then."""
    n, calls = 400, []
    d = np.linspace(1.0, 50.0, n)
    condition = Stationary(
        grad=lambda y, t: d * y - t,
        hvp=lambda y, t, v: calls.append(0) or d * v,
        mixed_vjp=lambda y, t, u: -u,
        verify=False,
    )
    y = np.cos(np.arange(n)) + 2
    _, report = vjp(condition, y, d * y, np.ones(n), solver=solver, return_report=True)
    spent = len(calls)
    assert report.solved
    assert spent == report.matvecs
    plain = Stationary(hvp=condition.hvp, mixed_vjp=condition.mixed_vjp, verify=False)
    calls.clear()
    vjp(plain, y, d * y, np.ones(n), solver=solver)
    assert spent == len(calls)


def test_a_jvp_and_a_gradient_tell_too(solver):
    A, solution = np.diag([1.0, 2.0]), np.array([1.0, 2.0])
    for call in (
        lambda: implicit_jvp(linear(NUMPY, A), 1.1 * solution, A @ solution, np.ones(2), solver=solver),
        lambda: implicit_grad(linear(NUMPY, A), lambda y, t: y.sum(), 1.1 * solution, A @ solution, solver=solver),
    ):
        assert_told(outcome(call), NotASolutionWarning, STEP)


# -- JAX -----------------------------------------------------------------------------------------------------------
@jax_only
@pytest.mark.parametrize("solver", ["auto", pytest.param("cg", marks=pytest.mark.slow)])
def test_78_under_jit_far_is_nan_and_the_report_says_so(solver):
    import jax
    import jax.numpy as jnp

    condition = Root(lambda y, t: y**3 - t)
    y = jnp.asarray([1.0, 2.0, 3.0])
    call = jax.jit(lambda y, t: vjp(condition, y, t, jnp.ones(3), solver=solver, return_report=True))
    for at, solved, finite in ((y, True, True), (y * 1.01, False, True), (y.at[2].set(5.0), False, False)):
        value, report = call(at, y**3)
        assert bool(report.solved) == solved
        assert bool(jnp.all(jnp.isfinite(value))) == finite
    for factor, finite in ((1.0, True), (2.0, False)):
        f = implicit_function(condition, solver=solver)(lambda t, k=factor: k * t ** (1 / 3))
        slope = jax.jit(jax.grad(lambda t, f=f: jnp.sum(f(t))))(y**3)
        assert bool(jnp.all(jnp.isfinite(slope))) == finite


@pytest.mark.slow
@jax_only
def test_59_on_jax_the_coordinate_is_named():
    import jax.numpy as jnp

    lib = JAX[0]
    found = told(lib, np.eye(2), np.array([1e5, 1.0]), np.array([1e5, 0.6]), solver="gmres", return_report=True)
    assert_told(found, NotASolutionWarning, r"from y\[1\] = 0\.6 is 0\.4:")
    assert found.value[1].solved is False
    assert told(lib, np.eye(2), np.array([1e5, 1.0]), np.array([1e5, 1 + 1e-9]), solver="gmres").quiet
    import jax

    f = implicit_function(Root(lambda y, t: y - t))(lambda t: t * jnp.asarray([1.0, 0.6]))
    found = outcome(lambda: jax.grad(lambda t: f(t)[1])(jnp.asarray([1e5, 1.0])))
    assert_told(found, NotASolutionWarning, r"from y\[1\] = 0\.6 is 0\.4:")
    assert np.allclose(found.value, [0.0, 1.0])  # told, and the number is there


def test_the_message_is_five_lines_and_no_more():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vjp(Root(lambda y, t: y - t), np.array([1.0]), np.array([2.0]), np.ones(1))
    (found,) = caught
    assert len(str(found.message).splitlines()) <= 5
    assert "first order in that step" in str(found.message)


# -- y is 0, and nothing says in what unit ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", range(8))
@three
def test_20_all_of_y_is_zero_and_F_is_the_rounding_of_its_terms(lib, seed, dtype, solver):
    """Xᵀ s is 0 but for rounding, s and X are data, and B is 0 where y is: no size to hold F against but its terms'."""
    rng = np.random.default_rng(seed)
    X = np.linalg.qr(rng.standard_normal((9, 4)))[0] * 3
    s = rng.standard_normal(9)
    s -= X @ (X.T @ s) / 9
    X, Xt, s, zero, v, one = (
        lib.array(x.astype(dtype)) for x in (X, X.T.copy(), s, np.zeros(4), rng.standard_normal(4), np.full(1, 0.01))
    )
    condition = Stationary(
        grad=lambda y, t, s: Xt @ (X @ y - s) + t[0] * y, hvp=lambda y, t, v, s: Xt @ (X @ v) + t[0] * v,
        mixed_vjp=lambda y, t, u, s: lib.xp.sum(u * y)[None], mixed_jvp=lambda y, t, d, s: d[0] * y,
    )  # fmt: skip
    F = lib.numpy(Xt @ s)
    assert 0 < np.linalg.norm(F) < 100 * np.finfo(dtype).eps
    found = outcome(lambda: vjp(condition, zero, one, v, args=(s,), solver=solver))
    assert not any(isinstance(w, NotASolutionWarning) for w in found.warnings), found.text
    # and where it is more than rounding it is told, in whatever unit
    moved = s + X @ lib.array(np.full(4, 1e-2, dtype=dtype))
    found = outcome(lambda: vjp(condition, zero, one, v, args=(moved,), solver=solver))
    assert_told(found, NotASolutionWarning, "y is not a solution")


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("curved", [False, True])
def test_59_zero_is_no_solution_in_any_unit(unit, curved, solver):
    """y = 0 is a guess: F is of the size of its terms, linear or not, and its step may be far too long."""
    goal = unit * np.array([1.0, 2.0, -1.5])
    bend = (lambda z: np.exp(3 * z) - 1) if curved else (lambda z: z)
    slope = (lambda z: 3 * np.exp(3 * z)) if curved else np.ones_like
    condition = Root(
        lambda y, t, goal: bend(y / unit) - bend(goal / unit) + t[0] * y / unit,
        jvp=lambda y, t, v, goal: (slope(y / unit) + t[0]) * v / unit,
        vjp=lambda y, t, v, goal: (slope(y / unit) + t[0]) * v / unit,
        mixed_vjp=lambda y, t, u, goal: np.sum(u * y)[None] / unit, mixed_jvp=lambda y, t, d, goal: d[0] * y / unit,
    )  # fmt: skip
    found = outcome(lambda: vjp(condition, np.zeros(3), np.full(1, 1e-3), np.ones(3) / unit, args=(goal,),
                                solver=solver))  # fmt: skip
    assert_told(found, NotASolutionWarning, "y is not a solution")


@pytest.mark.parametrize("seed", range(8))
def test_20_a_constrained_solution_at_zero(seed):
    """The cone G y <= 0, left by none: q is a combination of its rows, and θ weighs what is 0 where y is."""
    rng = np.random.default_rng(seed)
    n, k = 5, 3
    M, G, lam = rng.standard_normal((n, n)), rng.standard_normal((k, n)), rng.uniform(0.1, 1.0, k)
    Q, q = M @ M.T + np.eye(n), -G.T @ lam
    condition = KKT(
        lambda y, t: t[0] * (y @ Q @ y) / 2 + q @ y, ineq=lambda y, t: G @ y, grad=lambda y, t: t[0] * (Q @ y) + q,
        hessian=lambda y, t: t[0] * Q, ineq_jacobian=lambda y, t: G, degenerate="select",
    )  # fmt: skip
    assert outcome(lambda: vjp(condition, np.zeros(n), np.ones(1), rng.standard_normal(n))).quiet


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["auto", "cg", "minres", "gmres", "lu", "lsmr", "pinv"])
@pytest.mark.parametrize("singular", ["raise", "gauge", "minimum-norm"])
def test_20_a_unit_that_never_fires(singular, name, dtype):
    """A row and a column of zeros, F exactly 0 there, and y, too: a flat direction, and no word of a solution."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        alive = np.array([0, 1, 3, 4, 6, 7])
        M, A, y, v, noise = rng.standard_normal((6, 6)), np.zeros((8, 8)), np.zeros(8), np.zeros(8), np.zeros(8)
        A[np.ix_(alive, alive)] = M @ M.T + np.eye(6)
        y[alive], noise[alive], v[alive] = rng.standard_normal((3, 6))
        v[2] = singular == "raise"  # the cotangent sees it
        A, y, v, noise = (x.astype(dtype) for x in (A, y, v, noise))
        theta = ((A @ y) * (1 + 1e-7 * noise)).astype(dtype)
        condition = Stationary(
            grad=lambda y, t, A: A @ y - t, hvp=lambda y, t, v, A: A @ v, mixed_vjp=lambda y, t, u, A: -u,
            mixed_jvp=lambda y, t, d, A: -d, singular=singular,
        )  # fmt: skip
        found = outcome(lambda: vjp(condition, y, theta, v, args=(A,), solver=name))
        assert not any(isinstance(w, NotASolutionWarning) for w in found.warnings), found.text
        if singular == "raise":
            assert isinstance(found.error, SingularError), found.text
        y[0] *= 1.1  # off elsewhere, that is told, with its coordinate
        found = outcome(lambda: vjp(condition, y, theta, v, args=(A,), solver=name))
        if singular == "gauge":
            assert_told(found, NotASolutionWarning, r"Newton's step from y\[0\]")
