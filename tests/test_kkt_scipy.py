"""SciPy's constraints in place of callables, on every library; what SciPy's, OSQP's and cvxpy's multipliers mean."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, relative_error
from helpers_constraints import ball, curved, scipy_before
from scipy.optimize import Bounds, LinearConstraint, NonlinearConstraint, minimize

from implicitdiff import (
    KKT,
    DerivativeError,
    InconsistentDerivativesError,
    InputError,
    ShapeError,
    check_derivatives,
    implicit_function,
    implicit_jacobian,
    implicit_vjp,
    multipliers_from_scipy,
    split_multipliers,
)

INF = np.inf
LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)

# min ½‖y − θ‖² over −1 <= y₁ <= 1, y₂ <= 2, y₃ free, y₄ = 0.5, and 1 <= y₁ + y₂ + 2 y₃ <= 4, y₂ − y₃ >= −10
BOX = Bounds([-1.0, -INF, -INF, 0.5], [1.0, 2.0, INF, 0.5])
ROWS = np.array([[1.0, 1.0, 2.0, 0.0], [0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
LINEAR = LinearConstraint(ROWS, [1.0, -10.0, -INF], [4.0, INF, 100.0])
THETA = np.array([3.0, 1.0, 2.0, 7.0])  # y₁ = 1, y₄ = 0.5 and y₂ + 2 y₃ = 3 hold
TRUTH = np.zeros((4, 4))
TRUTH[1:3, 1:3] = np.array([[4.0, -2.0], [-2.0, 1.0]]) / 5
Y = np.array([1.0, *(np.array([1.0, 2.0]) - 2 * np.array([1.0, 2.0]) / 5), 0.5])


def distance(y: Any, theta: Any) -> Any:
    return ((y - theta) * (y - theta)).sum(-1) / 2 if hasattr(y, "sum") else _sum((y - theta) * (y - theta)) / 2


def _sum(x: Any) -> Any:
    return x.__array_namespace__().sum(x, axis=-1)


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
def test_numbers_on_every_library(lib: Library) -> None:
    """Bounds and linear constraints hold numbers only."""
    linear = LinearConstraint(scipy.sparse.csr_array(ROWS), LINEAR.lb, LINEAR.ub) if lib is NUMPY else LINEAR
    for condition in (KKT(distance, [BOX, linear]), KKT(distance, ineq=[linear, BOX]), KKT(distance, linear, BOX)):
        got = implicit_jacobian(condition, lib.array(Y), lib.array(THETA))
        np.testing.assert_allclose(lib.numpy(got), TRUTH, atol=1e-6 if lib.name == "array_api_strict" else 1e-10)
        if lib in JAX:
            return


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_batch(lib: Library) -> None:
    y, theta = (lib.array(np.stack([x, x, x])) for x in (Y, THETA))
    got = implicit_vjp(KKT(distance, [BOX, LINEAR]), y, theta, lib.array(np.eye(4)[:3]), batched=True)
    np.testing.assert_allclose(lib.numpy(got), TRUTH[:3], atol=1e-9)


def test_trees() -> None:
    tree = lambda x: {"a": x[:1], "b": x[1:].reshape(3, 1)}
    condition = KKT(lambda y, t: distance(np.append(y["a"], y["b"]), t), ineq=[BOX, LINEAR])
    got = implicit_jacobian(condition, tree(Y), THETA)
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"].reshape(3, 4)]), TRUTH, atol=1e-10)


@pytest.mark.parametrize("bounds", [Bounds(0.0), Bounds(0.0, INF), Bounds(-INF, [INF, INF, 0.0])])
def test_bounds_that_broadcast(bounds: Bounds) -> None:
    y = np.array([1.0, 2.0, 0.0])
    held = 0.0 if bounds.lb.size else 1.0
    got = implicit_jacobian(
        KKT(distance, ineq=bounds), y, np.array([1.0, 2.0, -3.0 if np.all(bounds.lb == 0) else 3.0])
    )
    np.testing.assert_allclose(got, np.diag([1.0, 1.0, held]), atol=1e-12)


def nonlinear(lib: Library, program: Any, given: tuple[str, ...], *, with_theta: bool = True) -> list[Any]:
    """The constraints of `curved` as SciPy's objects: limits on both sides, c(y) and θ as it fits."""
    d, theta = program.derivatives, np.array(program.theta)

    def of(name: str, shift: float) -> Any:
        c = getattr(program, name)
        parts = {
            "fun": lambda y, t: c(y, t) + shift,
            "jac": d[f"{name}_jacobian"],
            "hess": lambda y, t, v: d[f"{name}_hessian"](y, t, v),
        }
        if not with_theta:
            parts = {key: (lambda f: lambda y, *v: f(y, theta.copy(), *v))(f) for key, f in parts.items()}
        return parts["fun"], {key: parts[key] for key in given}

    (h, of_h), (g, of_g) = of("eq", 2.0), of("ineq", 1.0)
    return [NonlinearConstraint(g, -100.0, 1.0, **of_g), NonlinearConstraint(h, 2.0, [2.0, 2.0], **of_h)]


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("given", [(), ("jac",), ("jac", "hess")])
def test_functions_of_theta(lib: Library, given: tuple[str, ...]) -> None:
    program = curved(lib)
    condition = KKT(program.f, nonlinear(lib, program, given), grad=program.derivatives["grad"])
    program.check("vjp", condition, 1e-9)


def test_functions_of_y_alone() -> None:
    """What does not depend on theta: the derivative is that with B = (K, 0)."""
    program = curved(NUMPY)
    condition = KKT(program.f, nonlinear(NUMPY, program, ("jac", "hess"), with_theta=False))
    fixed = np.array(program.theta)
    same = KKT(program.f, lambda y, t: program.eq(y, fixed.copy()), lambda y, t: program.ineq(y, fixed.copy()))
    found, expected = (program.ask("jacobian", c) for c in (condition, same))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert relative_error(NUMPY, found, program.jacobian) > 1e-2


def test_theta_that_a_constraint_sees_is_no_constant() -> None:
    theta = np.array([3.0, 4.0])
    for seen in (
        NonlinearConstraint(lambda y: y.sum() - theta[0], 0.0, 0.0),
        {"type": "eq", "fun": lambda y, t: y.sum() - t[0], "args": (theta,)},
    ):
        with pytest.raises(DerivativeError, match="uses theta"):
            implicit_jacobian(KKT(distance, seen), np.array([1.0, 2.0]), theta)


def test_dicts() -> None:
    """SLSQP's constraints, where fun >= 0, and their args."""
    disk = {"type": "ineq", "fun": lambda y, r: r - y @ y, "jac": lambda y, r: -2 * y, "args": (1.0,)}
    line = {"type": "eq", "fun": lambda y, t: y[0] - t[2] * y[1]}
    theta = np.array([3.0, 4.0, 1.0])
    f = lambda y, t: ((y - t[:2]) ** 2).sum()
    y = np.array([1.0, 1.0]) / np.sqrt(2.0)
    got = implicit_jacobian(KKT(f, line, [disk]), y, theta)
    # on the circle and on the line: y = (t, 1) / sqrt(1 + t²)
    np.testing.assert_allclose(got, [[0, 0, 8**-0.5], [0, 0, -(8**-0.5)]], atol=1e-9)


def test_only_what_was_given_is_checked() -> None:
    """The Jacobians of numbers are ours."""
    assert {row.against for row in check_derivatives(KKT(distance, [BOX, LINEAR]), Y, THETA)} <= {"differences of f"}


def test_wrong_jacobian_is_told() -> None:
    wrong = NonlinearConstraint(lambda y: y @ y, -INF, 1.0, jac=lambda y: y)
    with pytest.raises(InconsistentDerivativesError, match=r"ineq\[0\]_jacobian is not the derivative of ineq\[0\]"):
        implicit_jacobian(KKT(distance, ineq=[wrong]), np.array([0.6, 0.8]), np.array([3.0, 4.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KKT(distance, ineq=[3.0]), r"ineq\[0\] is float"),
        (lambda: KKT(distance, ineq=Bounds(0, 1), ineq_jacobian=distance), "no single function"),
        (lambda: KKT(distance, ineq={"type": "le", "fun": distance}), "is a dict; expected"),
    ],
)
def test_what_is_no_constraint(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("bounds", [Bounds([2.0, 0.0], [1.0, 1.0]), Bounds([np.nan, 0.0], 1.0), Bounds([0.0] * 3, 1.0)])
def test_wrong_limits(bounds: Bounds) -> None:
    with pytest.raises(InputError, match=r"lb <= ub|has limits of shapes"):
        implicit_jacobian(KKT(distance, ineq=bounds), np.array([0.6, 0.8]), np.array([3.0, 4.0]))


def test_only_infinite_bounds_are_none() -> None:
    with pytest.raises(InputError, match="no constraint"):
        implicit_jacobian(KKT(distance, ineq=Bounds(-INF, INF)), np.array([3.0, 4.0]), np.array([3.0, 4.0]))


def test_as_minimize_takes_them() -> None:
    """One list for both, against differences of the problem solved anew."""
    cons = [
        LINEAR,
        NonlinearConstraint(lambda y: y @ y, -INF, 3.0, jac=lambda y: 2 * y),
    ]
    f = lambda y, t: distance(y, t) + (y**4).sum() / 12

    def solve(theta: np.ndarray) -> np.ndarray:
        options = {"ftol": 1e-15, "maxiter": 300}
        return minimize(f, Y, (theta,), "SLSQP", bounds=BOX, constraints=cons, options=options).x

    got = implicit_jacobian(KKT(f, ineq=[*cons, BOX]), solve(THETA), THETA)
    differences = np.stack([(solve(THETA + e) - solve(THETA - e)) / 2e-3 for e in 1e-3 * np.eye(4)], -1)
    np.testing.assert_allclose(got, differences, atol=1e-4)


SLSQP_HAS_MULTIPLIERS = pytest.mark.skipif(scipy_before(1, 16), reason="SLSQP returns multipliers from SciPy 1.16 on")


# -- multipliers -------------------------------------------------------------------------------------------------------
MIXED = [
    LinearConstraint([[1.0, 1.0, 0.0]], -1.0, 1.0),
    NonlinearConstraint(
        lambda y: [y @ y, y[2]], [-INF, 0.5], [2.0, 0.5], jac=lambda y: np.array([2 * y, [0.0, 0.0, 1.0]])
    ),
    {"type": "ineq", "fun": lambda y: y[0] - y[1] - 1.2, "jac": lambda y: np.array([1.0, -1.0, 0.0])},
]
TARGET = np.array([3.0, 2.0, 1.0])


def solved(method: str, constraints: Any, bounds: Any, **options: Any) -> Any:
    f, grad = (lambda y, t: ((y - t) ** 2).sum()), (lambda y, t: 2 * (y - t))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equalities beside inequalities, and of quasi-Newton updates
        return minimize(
            f, [0.0, 0.0, 0.5], (TARGET,), method, grad, constraints=constraints, bounds=bounds, options=options
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore::implicitdiff.errors.NotASolutionWarning")  # trust-constr stops short
@pytest.mark.parametrize("constraints", [MIXED, MIXED[1], MIXED[::-1], MIXED[:2]])
@pytest.mark.parametrize("method", ["trust-constr", pytest.param("SLSQP", marks=SLSQP_HAS_MULTIPLIERS)])
def test_multipliers_of_scipy(method: str, constraints: Any) -> None:
    """With them in this order ∇f + Jᵀz is zero: what `check_regularity` calls stationarity, and KKT warns of."""
    bounds = Bounds(-5.0, [5.0, 0.3, 5.0]) if method == "trust-constr" else None
    tight = {"gtol": 1e-10, "xtol": 1e-12, "maxiter": 2000} if bounds else {"ftol": 1e-14}
    found = solved(method, constraints, bounds, **tight)
    lam, mu = multipliers_from_scipy(found, constraints, bounds)
    given = [*(constraints if isinstance(constraints, list) else [constraints]), *([bounds] if bounds else [])]
    f = lambda y, t: ((y - t) ** 2).sum()
    assert np.all(mu >= 0)
    assert np.any(mu > 0.1)
    condition, recovered = KKT(f, ineq=given, multipliers=(lam, mu)), KKT(f, ineq=given)
    got, report = implicit_jacobian(condition, found.x, TARGET, return_report=True)
    assert report.stationarity < 1e-3  # of 4
    np.testing.assert_allclose(got, implicit_jacobian(recovered, found.x, TARGET), atol=1e-4)


def test_multipliers_of_osqp() -> None:
    """Px + q + Aᵀy = 0 at the minimum over l <= Ax <= u."""
    lam, mu = split_multipliers([1.5, -2.0, 0.0, 4.0, -1e-9], [0.0, 1.0, -INF, -INF, 2.0], [0.0, 3.0, INF, 5.0, INF])
    np.testing.assert_array_equal(lam, [1.5])
    np.testing.assert_array_equal(mu, [2.0, 1e-9, 0.0, 4.0])
    lam, mu = split_multipliers([[1.0], [2.0]], -1.0, 1.0)
    assert lam.size == 0
    np.testing.assert_array_equal(mu, [0.0, 0.0, 1.0, 2.0])


@SLSQP_HAS_MULTIPLIERS
def test_multipliers_that_are_not_there() -> None:
    found = solved("SLSQP", MIXED[:1], None)
    with pytest.raises(InputError, match="SLSQP returns no multipliers of bounds"):
        multipliers_from_scipy(found, MIXED[:1], Bounds(0, 1))
    with pytest.raises(InputError, match="result has 2 multipliers, and the constraints have 5 rows"):
        multipliers_from_scipy(found, MIXED)
    with pytest.raises(InputError, match="result holds no multipliers"):
        multipliers_from_scipy(minimize(lambda y: y @ y, [1.0, 1.0], method="BFGS"))
    with pytest.raises(InputError, match="holds a function"):
        multipliers_from_scipy(found, distance)
    with pytest.raises(ShapeError, match="v has 2 entries"):
        split_multipliers([1.0, 2.0], [0.0] * 3, 1.0)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("form", ["array", "dict"])
def test_multipliers_from_the_wrapped_solver(lib: Library, form: str) -> None:
    """They are part of the Hessian of the Lagrangian: right ones are right, and that wrong ones are used shows."""
    program = ball(lib)
    theta, v = program.array(program.theta), program.array(program.cotangent)
    for factor in (1.0, 3.0):
        mu = factor * np.asarray(program.mu)
        aux = mu if form == "array" else {"multipliers": mu, "iterations": 7}
        layer = implicit_function(program.condition(multipliers="aux"), has_aux=True)(
            lambda _, aux=aux: (program.y, aux)
        )
        leaf = theta.clone().requires_grad_() if lib in TORCH else theta
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [layer.vjp(theta, v)]
            if lib in TORCH:
                layer(leaf)[0].backward(v)
                found.append(leaf.grad)
        right = [relative_error(lib, g, program.truth("vjp")) < 1e-9 for g in found]
        assert right == [factor == 1.0] * len(found)
        assert bool(caught) == (factor != 1.0)
    program.check("vjp", program.condition(multipliers="aux"), 1e-9)  # without a solver they are recovered
    with pytest.raises(InputError, match="multipliers = 'mine': expected numbers, a callable, or 'aux'"):
        program.condition(multipliers="mine")
