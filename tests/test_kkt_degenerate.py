"""Degenerate points: with degenerate="select" the derivative is a one-sided one of the problem, solved anew."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, TORCH, Library
from frameworks import framework
from helpers_constraints import functions
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from implicitdiff import (
    KKT,
    QP,
    DegeneracyWarning,
    QualificationError,
    RegularityWarning,
    UnknownNameError,
    check_regularity,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_vjp,
    solve_qp,
)

STEP = 1e-5


def solution(H: np.ndarray, q: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """min yᵀHy/2 + qᵀy over Ay <= b, by trying every set of active rows; None where there is none."""
    n = len(q)
    for size in range(n + 1):
        for rows in map(list, itertools.combinations(range(len(b)), size)):
            if size and np.linalg.svd(A[rows])[1][-1] < 1e-9:
                continue
            K = np.block([[H, A[rows].T], [A[rows], np.zeros((size, size))]])
            found = np.linalg.solve(K, np.concatenate([-q, b[rows]]))
            y, mu = found[:n], found[n:]
            if np.all(A @ y <= b + 1e-12) and np.all(mu >= -1e-12):
                return y
    return None


def sides(H: np.ndarray, q: np.ndarray, dq: np.ndarray, A: np.ndarray, db: np.ndarray) -> list[np.ndarray]:
    """The one-sided derivatives of the solution, 0 at t = 0, for q + t dq and b = t db."""
    pairs = ((side, solution(H, q + side * STEP * dq, A, side * STEP * db)) for side in (1.0, -1.0))
    return [y / (side * STEP) for side, y in pairs if y is not None]


def program(lib: Library, H: Any, q: Any, dq: Any, A: Any, db: Any, scale: Any = 1.0, **options: Any) -> KKT:
    """The same as a condition, with the vertex at ``scale`` (1, 1, …)."""
    xp = functions(lib)
    H, q, dq, A, db = (lib.array(np.asarray(x, float)) for x in (H, q, dq, A, db))

    def f(y: Any, t: Any) -> Any:
        z = y / scale - 1.0
        return xp.sum(z * (H @ z)) / 2 + xp.sum((q + (t - 1.0) * dq) * z)

    return KKT(f, ineq=lambda y, t: A @ (y / scale - 1.0) - (t - 1.0) * db, degenerate="select", **options)


# three lines through the origin of the plane, −∇f inside of the cones of two pairs of normals
H, Q = np.diag([2.0, 3.0]), np.array([-2.0, -2.6])
ROWS, RATES = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([0.3, -0.4, 0.7])
ONE = np.array(1.0)


def derivative(condition: KKT, lib: Library, y: Any, **options: Any) -> np.ndarray:
    with pytest.warns(DegeneracyWarning, match="the point is degenerate"):
        found = implicit_jacobian(condition, lib.array(np.array(y, float)), lib.array(ONE), **options)
    return lib.numpy(found)


def is_one_of(found: np.ndarray, several: list[np.ndarray], scale: float = 1.0, rtol: float = 1e-5) -> bool:
    return any(
        np.allclose(found / scale, side, rtol=rtol, atol=rtol * max(1.0, np.abs(side).max())) for side in several
    )


@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)  # and on JAX below
def test_three_constraints_in_the_plane(lib: Library) -> None:
    condition = program(lib, H, Q, np.zeros(2), ROWS, RATES)
    both = sides(H, Q, np.zeros(2), ROWS, RATES)
    assert len(both) == 2
    assert not np.allclose(*both)
    assert is_one_of(derivative(condition, lib, [1, 1]), both)


def test_regularity_is_that_of_the_point() -> None:
    """Nothing is selected where one asks whether the point is regular."""
    condition = program(NUMPY, H, Q, np.zeros(2), ROWS, RATES)
    assert not check_regularity(condition, np.ones(2), ONE).licq


def test_an_error_without_it() -> None:
    condition = program(NUMPY, H, Q, np.zeros(2), ROWS, RATES)
    plain = KKT(condition.f, ineq=condition.ineq)
    with pytest.raises(QualificationError, match=r"ineq\[0\], ineq\[1\], ineq\[2\]"):
        implicit_jacobian(plain, np.ones(2), ONE)
    with pytest.raises(UnknownNameError, match="degenerate = 'choose'"):
        KKT(condition.f, ineq=condition.ineq, degenerate="choose")  # type: ignore[arg-type]


@pytest.mark.parametrize("of_y", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("of_f", [1e-6, 1e6])
@pytest.mark.parametrize("of_c", [[1.0, 1.0, 1.0], [1e6, 1.0, 1e-6]])
def test_units(of_y: float, of_f: float, of_c: list[float]) -> None:
    c = np.array(of_c)
    condition = program(NUMPY, of_f * H, of_f * Q, np.zeros(2), c[:, None] * ROWS, c * RATES, of_y)
    assert is_one_of(derivative(condition, NUMPY, [of_y, of_y]), sides(H, Q, np.zeros(2), ROWS, RATES), of_y)


@pytest.mark.parametrize("route", ["kkt", "nullspace", "schur"])
@pytest.mark.parametrize("form", ["recovered", "given"])
def test_routes_and_given_multipliers(route: str, form: str) -> None:
    """Multipliers that a solver returned need not be those of independent gradients."""
    mu = None if form == "recovered" else np.array([1.0, 1.6, 1.0])
    condition = program(NUMPY, H, Q, np.zeros(2), ROWS, RATES, route=route, multipliers=mu)
    assert is_one_of(derivative(condition, NUMPY, [1, 1]), sides(H, Q, np.zeros(2), ROWS, RATES))


@pytest.mark.parametrize("dq", [[-1.0, 0.5], [1.0, 0.5]])
def test_weakly_active(dq: list[float]) -> None:
    """One bound with a multiplier of zero, and a second one that is not at all pressed against."""
    A, none = np.array([[1.0, 0.0], [1.0, 3.0]]), np.zeros(2)
    condition = program(NUMPY, H, none, np.array(dq), A, none)
    assert is_one_of(derivative(condition, NUMPY, [1, 1]), sides(H, none, np.array(dq), A, none))


def test_equalities_that_depend_on_each_other() -> None:
    """Twice the same equality, in other units: what remains is the derivative."""
    eq = lambda y, t: np.array([[1.0, 1.0], [30.0, 30.0]]) @ y - np.array([1.0, 30.0]) * (t - 1.0)
    condition = KKT(lambda y, t: ((y - np.array([1.0, 1.0])) ** 2).sum(), eq=eq, degenerate="select")
    np.testing.assert_allclose(derivative(condition, NUMPY, [0, 0]), [0.5, 0.5], rtol=1e-6)


def test_no_solution_on_one_side() -> None:
    """y <= t and y >= −t: for t < 0 there is none."""
    A, db = np.array([[1.0], [-1.0]]), np.array([1.0, 1.0])
    both = sides(np.eye(1), np.array([-1.0]), np.zeros(1), A, db)
    assert len(both) == 1
    assert is_one_of(derivative(program(NUMPY, np.eye(1), [-1.0], [0.0], A, db), NUMPY, [1]), both)


def test_curved_constraints() -> None:
    """Three circles through one point, of which each moves with its own θ: against the problem solved anew."""
    from scipy.optimize import minimize

    centers, speeds = np.array([[-1.0, 0.2], [0.3, -1.0], [-0.8, -0.7]]), np.array([0.5, -0.4, 0.2])
    squares = (centers**2).sum(axis=1)
    f = lambda y, t: ((y - np.array([2.0, 1.9])) ** 2).sum()
    g = lambda y, t: ((y - centers) ** 2).sum(axis=1) - squares - speeds * (t - 1.0)
    found = derivative(KKT(f, ineq=g, degenerate="select"), NUMPY, [0, 0])
    several = []
    for h in (1e-4, -1e-4):
        disks = {"type": "ineq", "fun": lambda y, h=h: -g(y, 1.0 + h)}
        y = minimize(f, [0.0, 0.0], (None,), "SLSQP", constraints=disks, options={"ftol": 1e-16, "maxiter": 200}).x
        several.append(y / h)
    assert is_one_of(found, several, rtol=2e-3)


@given(data=st.data(), n=st.integers(1, 3), k=st.integers(2, 5), noise=st.sampled_from([0.0, 3e-9]))
@settings(max_examples=60, deadline=None)
def test_any_vertex(data: Any, n: int, k: int, noise: float) -> None:
    """Any half-spaces through one point, −∇f anywhere in the cone of their normals, and y as a solver leaves it."""
    numbers = lambda size: np.array(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)), float)
    A, db, dq, root = numbers(k * n).reshape(k, n), numbers(k), numbers(n), numbers(n * n).reshape(n, n)
    mu = np.array(data.draw(st.lists(st.integers(0, 2), min_size=k, max_size=k)), float)
    quadratic, q = root @ root.T + np.eye(n), -(A.T @ mu)
    assume(np.any(db != 0) or np.any(dq != 0))
    several = sides(quadratic, q, dq, A, db)
    given_ones = {
        "grad": lambda y, t: quadratic @ (y - 1.0) + q + (t - 1.0) * dq, "hessian": lambda y, t: quadratic,
        "ineq_jacobian": lambda y, t: A, "ineq_hessian": lambda y, t, z: np.zeros((n, n)),
    }  # fmt: skip
    condition = program(NUMPY, quadratic, q, dq, A, db, **given_ones, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegularityWarning)
        try:
            found = implicit_jacobian(condition, 1.0 + noise * np.cos(np.arange(1.0, n + 1)), ONE)
        except QualificationError:
            assert not several or np.any(np.all(A == 0, axis=1))  # there is no solution on either side
            return
    assert is_one_of(found, several)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
def test_batch(lib: Library) -> None:
    """One item is degenerate, one is not: that one has its own derivative."""
    xp = functions(lib)
    A, db = lib.array(ROWS), lib.array(RATES)
    f = lambda y, t: xp.sum((y - t[..., 1:]) ** 2, axis=-1)
    g = lambda y, t: (y[..., None, :] * A).sum(-1) - (t[..., :1] - 1.0) * db
    y, theta = np.array([[0.0, 0.0], [-1.0, 0.0]]), np.array([[1.0, 1.0, 1.3], [1.0, -1.0, 1.3]])
    with pytest.warns(DegeneracyWarning, match=r"item 0: ineq\[0\], ineq\[1\], ineq\[2\]"):
        found = implicit_jacobian(
            KKT(f, ineq=g, degenerate="select"), lib.array(y), lib.array(theta), batched=True
        )  # fmt: skip
    found = lib.numpy(found)
    np.testing.assert_allclose(found[1], [[0.0, 1.0, 0.0], [-0.4, 0.0, 0.0]], atol=1e-9)
    assert is_one_of(found[0][:, 0], sides(2 * np.eye(2), -2 * theta[0, 1:], np.zeros(2), ROWS, RATES))


@pytest.mark.slow
def test_within_a_compiled_program() -> None:
    fw, lib = framework("jax"), JAX[0]
    condition = program(lib, H, Q, np.zeros(2), ROWS, RATES)
    y, v = lib.array(np.ones(2)), lib.array(np.array([1.0, 2.0]))
    got = fw.compiled(lambda t: implicit_vjp(condition, y, t, v))(lib.array(ONE))
    assert is_one_of(np.asarray(got), [side @ [1.0, 2.0] for side in sides(H, Q, np.zeros(2), ROWS, RATES)])


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_native_gradient(name: str) -> None:
    """The backward pass of the framework itself."""
    fw, lib = framework(name), next(x for x in (*TORCH, *JAX) if x.name == name)
    layer = implicit_function(program(lib, H, Q, np.zeros(2), ROWS, RATES))(
        fw.black_box(lambda t: fw.xp.ones(2, dtype=fw.xp.float64))
    )
    loss = lambda t: (layer(t) * lib.array(np.array([1.0, 2.0]))).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegeneracyWarning)
        got = fw.numpy(fw.gradient(loss)(lib.array(ONE)))
    assert is_one_of(got, [side @ [1.0, 2.0] for side in sides(H, Q, np.zeros(2), ROWS, RATES)])


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_second_derivative_of_a_piece(name: str) -> None:
    """y = 1 + s + s² with s = t − 1 for the two bounds that are held: of ‖y‖² it is 6."""
    fw, lib = framework(name), next(x for x in (*TORCH, *JAX) if x.name == name)
    A, target = lib.array(ROWS), lib.array(np.array([2.0, 2.3]))
    g = lambda y, t: A @ (y - 1.0) - (t - 1.0) - (t - 1.0) ** 2
    condition = KKT(lambda y, t: ((y - target) ** 2).sum(), ineq=g, degenerate="select")
    layer = implicit_function(condition)(fw.black_box(lambda t: fw.xp.ones(2, dtype=fw.xp.float64)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegeneracyWarning)
        found = fw.numpy(fw.transforms()["hessian"](lambda t: (layer(t) ** 2).sum())(lib.array(np.ones(3))))
    np.testing.assert_allclose(found, np.diag([6.0, 6.0, 0.0]), atol=1e-8)


def test_an_outer_optimiser_goes_on() -> None:
    """Gradient descent over θ from a degenerate vertex, towards a vertex elsewhere."""
    from scipy.optimize import minimize

    A = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    f = lambda y, t: ((y - np.array([3.0, 3.5])) ** 2).sum()
    condition = KKT(f, ineq=lambda y, t: A @ y - t, degenerate="select")
    loss = lambda y, t: ((y - np.array([0.7, 0.4])) ** 2).sum()

    def inner(theta: np.ndarray) -> np.ndarray:
        rows = {"type": "ineq", "fun": lambda y: theta - A @ y, "jac": lambda y: -A}
        return minimize(f, [0.0, 0.0], (None,), "SLSQP", constraints=rows, options={"ftol": 1e-15}).x

    theta, values = np.array([1.0, 1.0, 2.0]), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegularityWarning)
        for _ in range(60):
            y = inner(theta)
            values.append(loss(y, theta))
            theta = theta - 0.2 * implicit_grad(condition, loss, y, theta)
    assert values[-1] < 1e-3 * values[0]


@pytest.mark.parametrize("seed", range(20))
def test_programs_with_a_point_alone(seed: int) -> None:
    """Six half-spaces through the origin, one of them twice: the derivative is that of some way to move them.

    Where they leave the origin alone, neither a direction nor its opposite need have a solution.
    """
    rng = np.random.default_rng(seed)
    L, q, G = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=(6, 3))
    G[5] = G[4]
    data: dict[str, Any] = {"Q": L @ L.T + np.eye(3), "q": q, "G": G, "h": np.zeros(6)}
    y = solve_qp(**data)
    y = np.where(np.abs(y) < 1e-9, 0.0, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegeneracyWarning)
        got = implicit_jacobian(QP(degenerate="select"), y, data)["h"]
    step, s = 1e-6, np.random.default_rng(1).uniform(0, 1, (300, 6))
    s[150:] = 10.0 ** (-4 * s[150:])  # some constraints move away much faster than others
    moved = solve_qp(data["Q"], q, G=G, h=step * s, batched=True) - y
    assert np.min(np.max(np.abs(moved - step * s @ got.T), axis=-1)) <= 1e-4 * step
