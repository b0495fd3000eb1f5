"""The logarithmic barrier: closed forms, and convergence to the derivative at the active set as t grows."""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad, jacobian
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, assert_right, assert_told, outcome
from helpers_constraints import Program, changed, curved, functions
from scipy.optimize import brentq

from implicitdiff import (
    InfeasibleError,
    InputError,
    LogBarrier,
    SolveWarning,
    implicit_function,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
)
from implicitdiff.backends.numpy import NumpyBackend

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
SOLVERS = ("auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres")


# -- one bound: min over y <= 1 of t (y − θ)² − log(1 − y) -------------------------------------------------------------
def place(t: float, theta: float) -> float:
    """The root below 1 of 2 t (y − θ)(1 − y) + 1 = 0."""
    b = 1 + theta
    return (b - np.sqrt(b * b - 4 * (theta - 1 / (2 * t)))) / 2


def slope(t: float, theta: float) -> float:
    """dy/dθ of `place`: with s = 2 t, s / (s + 1 / (1 − y)²)."""
    y = place(t, theta)
    return 2 * t / (2 * t + (1 - y) ** -2)


def bounded(lib: Library, t: float) -> LogBarrier:
    xp = functions(lib)
    return LogBarrier(lambda y, th: xp.sum((y - th) ** 2), ineq=lambda y, th: y - 1.0, t=t)


@LIBS
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("theta", [0.3, 1.0, 2.0])
def test_one_bound(lib: Library, solver: str, theta: float) -> None:
    """Inside, at the switch of the constrained minimum, and past it: smooth everywhere."""
    ys = np.array([place(50.0, theta), place(50.0, 0.5 * theta)])
    a = [lib.array(x) for x in (ys, np.array([theta, 0.5 * theta]))]
    found = outcome(lambda: implicit_jacobian(bounded(lib, 50.0), *a, solver=solver))
    expected = np.diag([slope(50.0, theta), slope(50.0, 0.5 * theta)])
    assert_right(lib, found, expected, 1e-5 if lib.name == "array_api_strict" else 1e-9)


def test_the_slope_is_that_of_the_place() -> None:
    for theta in (0.3, 1.0, 2.0):
        difference = (place(50.0, theta + 1e-6) - place(50.0, theta - 1e-6)) / 2e-6
        assert slope(50.0, theta) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_batch(lib: Library) -> None:
    thetas = np.array([0.3, 1.0, 2.0])
    f = (lambda y, th: (y[0] - th[0]) ** 2) if lib.per_item else (lambda y, th: (y[:, 0] - th[:, 0]) ** 2)
    condition = LogBarrier(f, ineq=lambda y, th: y - 1.0, t=50.0)
    ys = np.array([[place(50.0, theta)] for theta in thetas])
    got = implicit_vjp(condition, *(lib.array(x) for x in (ys, thetas[:, None], np.ones((3, 1)))), batched=True)
    np.testing.assert_allclose(lib.numpy(got)[:, 0], [slope(50.0, theta) for theta in thetas], rtol=1e-9)


@LIBS
def test_single_precision(lib: Library) -> None:
    a = [lib.array(np.array([x], np.float32)) for x in (place(20.0, 2.0), 2.0, 1.0)]
    got = implicit_jvp(bounded(lib, 20.0), *a)
    assert got.dtype == lib.xp.float32
    assert float(got[0]) == pytest.approx(slope(20.0, 2.0), rel=2e-3)


# -- several constraints, and equalities -------------------------------------------------------------------------------
def centred(program: Program, t: float) -> np.ndarray:
    """The minimum of t f − Σ log(−g) subject to h = 0, as the root of ∇f + Jᵀz = 0, h = 0, μ g = −1 / t."""
    n, p, theta = program.y.size, program.lam.size, program.theta

    def residual(x: Any) -> Any:
        y, lam, mu = x[:n], x[n : n + p], x[n + p :]
        lagrangian = lambda y: program.f(y, theta) + lam @ program.eq(y, theta) + mu @ program.ineq(y, theta)
        return anp.concatenate([grad(lagrangian)(y), program.eq(y, theta), mu * program.ineq(y, theta) + 1 / t])

    x = np.concatenate([program.y, program.lam, program.mu])  # next to the constrained minimum
    for _ in range(30):
        x = x - np.linalg.solve(jacobian(residual)(x), residual(x))
    assert np.linalg.norm(residual(x)) < 1e-12
    assert np.all(program.ineq(x[:n], theta) < 0)
    assert np.all(x[n + p :] > 0)
    return x[:n]


@pytest.fixture(scope="module")
def path() -> dict[float, np.ndarray]:
    """The central path of `curved`, which has two equalities and three inequalities."""
    program = curved(NUMPY)
    return {t: centred(program, t) for t in (1e3, 1e4, 1e5, 1e6)}


@pytest.mark.slow
def test_converges_to_the_active_set_in_the_first_order(path: dict[float, np.ndarray]) -> None:
    program = curved(NUMPY)
    exact = implicit_jacobian(program.condition(), program.y, program.theta)
    errors_y, errors = [], []
    for t, y in path.items():
        barrier = LogBarrier(program.f, ineq=program.ineq, t=t, eq=program.eq)
        errors_y.append(np.linalg.norm(y - program.y))
        errors.append(np.linalg.norm(implicit_jacobian(barrier, y, program.theta) - exact))
    for measured in (errors_y, errors):
        order = -np.polyfit(np.log(list(path)), np.log(measured), 1)[0]
        assert 0.9 < order < 1.1
        assert measured[-1] < 1e-4


@pytest.mark.parametrize("route", ["kkt", "schur", "nullspace"])
@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
def test_equalities_against_differences(lib: Library, route: str, path: dict[float, np.ndarray]) -> None:
    program, y = curved(lib), path[1e3]
    barrier = LogBarrier(program.f, ineq=program.ineq, t=1e3, eq=program.eq, route=route)
    a = [lib.array(x) for x in (y, program.theta, program.tangent)]
    ends = []
    for step in (1e-5, -1e-5):
        ends.append(centred(changed(curved(NUMPY), theta=program.theta + step * program.tangent), 1e3))
    got = lib.numpy(implicit_jvp(barrier, *a))
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


# -- the framework's own differentiation -------------------------------------------------------------------------------
@pytest.mark.parametrize("lib", TORCH, ids=lambda lib: lib.name)
def test_second_order(lib: Library) -> None:
    """The radius of the barrier's projection onto a ball solves t (r − s)(1 − r²) + 2 r = 0 with s = ‖θ‖."""
    import torch

    def radius(s: float, t: float = 10.0) -> float:
        return brentq(lambda r: t * (r - s) * (1 - r * r) + 2 * r, 0, 1, xtol=1e-15)

    condition = LogBarrier(lambda y, th: ((y - th) ** 2).sum() / 2, ineq=lambda y, th: ((y**2).sum() - 1) / 2, t=10.0)
    layer = implicit_function(condition)(lambda th: (th / th.norm() * radius(float(th.norm()))).numpy())
    theta = torch.tensor([1.2, 0.9], dtype=torch.float64, requires_grad=True)
    length = lambda th: layer(th).norm()
    first, second = torch.func.grad(length)(theta.detach()), torch.func.hessian(length)(theta.detach())
    u = np.array([0.8, 0.6])
    slope = (radius(1.5 + 1e-5) - radius(1.5 - 1e-5)) / 2e-5
    bend = (radius(1.5 + 1e-4) - 2 * radius(1.5) + radius(1.5 - 1e-4)) / 1e-8
    np.testing.assert_allclose(first, slope * u, rtol=1e-7)
    across = np.eye(2) - np.outer(u, u)
    np.testing.assert_allclose(second, bend * np.outer(u, u) + slope / 1.5 * across, atol=1e-5)
    assert torch.autograd.gradcheck(layer, theta)


# -- faults ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow(on=("array_api_strict",))
@LIBS
@pytest.mark.parametrize("y", [1.0, 1.5])
def test_not_inside(lib: Library, y: float) -> None:
    """On the bound, or past it, where the logarithm is not finite."""
    a = [lib.array(np.array(x)) for x in ([0.5, y], [0.5, 2.0], [1.0, 1.0])]
    with np.errstate(all="ignore"):
        found = outcome(lambda: implicit_vjp(bounded(lib, 10.0), *a))
    assert_told(found, InfeasibleError, r"^ineq\[1\] is not negative")


@pytest.mark.parametrize("mode", ["warn", "nan"])
def test_not_inside_in_other_modes(mode: str) -> None:
    with np.errstate(all="ignore"):
        found = outcome(
            lambda: implicit_vjp(bounded(NUMPY, 10.0), np.ones(1), 2 * np.ones(1), np.ones(1), on_failure=mode)
        )
    assert found.error is None
    if mode == "warn":
        assert_told(found, SolveWarning, "InfeasibleError: ineq")
    else:
        assert np.isnan(found.value).all()


@pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
def test_an_infinite_bound_is_none(lib: Library) -> None:
    bounds = lib.array(np.array([1.0, np.inf]))
    barrier = LogBarrier(lambda y, th: ((y - th) ** 2).sum(), ineq=lambda y, th: y - bounds, t=20.0)
    if lib.name == "array_api_strict":
        barrier = LogBarrier(lambda y, th: lib.xp.sum((y - th) ** 2), ineq=lambda y, th: y - bounds, t=20.0)
    a = [lib.array(np.array(x)) for x in ([place(20.0, 2.0), 3.0], [2.0, 3.0], [1.0, 1.0])]
    np.testing.assert_allclose(lib.numpy(implicit_vjp(barrier, *a)), [slope(20.0, 2.0), 1.0], rtol=1e-6)


def test_infeasible_equality() -> None:
    condition = LogBarrier(
        lambda y, th: ((y - th) ** 2).sum(), ineq=lambda y, th: -y, t=1.0, eq=lambda y, th: y.sum() - 3
    )
    found = outcome(lambda: implicit_vjp(condition, np.ones(2), np.ones(2), np.ones(2)))
    assert_told(found, InfeasibleError, r"y violates eq\[0\] by 1\.")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: LogBarrier(lambda y, th: 0.0), "ineq is NoneType"),
        (lambda: LogBarrier(1.0, ineq=lambda y, th: y), "f is float"),
        (lambda: LogBarrier(lambda y, th: 0.0, ineq=lambda y, th: y, t=0.0), r"t = 0\.0: expected a positive"),
        (lambda: LogBarrier(lambda y, th: 0.0, ineq=lambda y, th: y, t=float("nan")), "t = nan"),
        (lambda: LogBarrier(lambda y, th: 0.0, ineq=lambda y, th: y, eq=3), "eq is int"),
    ],
)
def test_wrong_arguments(make: Any, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        make()


def test_unlike_the_active_set_there_is_no_kink() -> None:
    """At the switch of the constrained minimum the barrier's derivative lies between those of the two sides."""
    at_switch = [implicit_jacobian(bounded(NUMPY, t), np.array([place(t, 1.0)]), np.ones(1))[0, 0] for t in (1e2, 1e6)]
    np.testing.assert_allclose(at_switch, 0.5, rtol=1e-6)  # from y = 1 − 1 / √(2 t)


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("t", [1e1, 1e3, 1e5, 1e7])
def test_differences_next_to_the_barrier(backend: str, t: float) -> None:
    """Differences of g, whose steps are longer than the distance to the barrier, and not of its logarithm."""
    if backend == "numpy":
        xp, engine = np, NumpyBackend("finite_differences")
    else:
        xp, engine = pytest.importorskip("array_api_strict"), None
    y, theta = xp.asarray([place(t, 2.0)]), xp.asarray([2.0])
    bound = LogBarrier(lambda y, theta: xp.sum((y - theta) ** 2), ineq=lambda y, theta: y - 1.0, t=t)
    found, report = implicit_jacobian(bound, y, theta, backend=engine, return_report=True)
    assert report.derivatives["A"] == "finite differences"
    assert abs(float(found[0, 0]) - slope(t, 2.0)) <= 1e-7 * slope(t, 2.0)
