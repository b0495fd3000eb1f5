"""What can be wrong with a constrained minimum, on every library, route and solver: named, or the answer is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, assert_right, assert_told, outcome
from helpers_constraints import EACH_SOLVER, ROUTES, ball, changed, functions, rtol_for, with_choices
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdiff import (
    KKT,
    QP,
    CallbackError,
    InfeasibleError,
    InputError,
    NotASolutionWarning,
    NotPositiveDefiniteError,
    QualificationError,
    RegularityWarning,
    ShapeError,
    SingularError,
    SolveWarning,
    UnknownNameError,
    implicit_function,
    implicit_jacobian,
    implicit_vjp,
    linearize,
)

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)
DIRECTLY = [(route, "lu") for route in ROUTES]
WAYS = pytest.mark.parametrize(("lib", "by"), with_choices(EACH_SOLVER, [], DIRECTLY))
AND_JAX = pytest.mark.parametrize(("lib", "by"), with_choices(EACH_SOLVER, [("kkt", "auto")], DIRECTLY))
ONE = np.array([1.0, 0.5])


def nearest(lib: Library, rows: Any, bounds: Any, kind: str = "ineq", weight: float = 1.0, **options: Any) -> KKT:
    """The point next to θ with rows y <= bounds, or = bounds."""
    xp, A, b = functions(lib), lib.array(np.array(rows, float)), lib.array(np.array(bounds, float))
    f = lambda y, t: weight * xp.sum((y - t) ** 2)
    return KKT(f, **{kind: lambda y, t: A @ y - b}, **options)


def pulled(lib: Library, condition: Any, y: Any, theta: Any, **options: Any) -> Any:
    """The cotangent ONE pulled back, as an outcome."""
    a = [lib.array(np.array(x, float)) for x in (y, theta, ONE)]
    return outcome(lambda: implicit_vjp(condition, *a, **options))


# -- 41, 43, 44: the edge of the active set --------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@AND_JAX
def test_weakly_active(lib: Library, by: tuple[str, str]) -> None:
    """θ itself lies on the first bound: the derivative of the free side, and the second bound is not named."""
    route, solver = by
    condition = nearest(lib, [[1, 0], [0, 1]], [1, 7], route=route)
    found = pulled(lib, condition, [1, 2], [1, 2], solver=solver)
    assert_told(found, RegularityWarning, r"^ineq\[0\] is weakly active")
    assert found.error is None
    np.testing.assert_allclose(lib.numpy(found.value), ONE, rtol=1e-5)


@WAYS
@pytest.mark.parametrize("distance", [1e-9, -1e-9])
def test_active_up_to_the_solver_s_tolerance(lib: Library, by: tuple[str, str], distance: float) -> None:
    """From either side: neither missed, nor called weakly active or violated."""
    route, solver = by
    condition = nearest(lib, [[1, 0], [0, 1]], [1, 7], route=route)
    found = pulled(lib, condition, [1 + distance, 2], [3, 2], solver=solver)
    assert_right(lib, found, [0.0, 0.5], 1e-5)


@LIBS
@pytest.mark.parametrize("distance", [1e-7, -1e-7])
def test_weakly_active_is_told_nearby(lib: Library, distance: float) -> None:
    condition = nearest(lib, [[1, 0]], [1])
    found = pulled(lib, condition, [1, 2], [1 + distance, 2])
    assert_told(found, RegularityWarning, r"ineq\[0\] is weakly active")


@LIBS
def test_active_tol(lib: Library) -> None:
    """A bound that a rough solver stops 1e-3 short of is active where the user says so, and only there."""
    for options, expected in (({"active_tol": 1e-2}, [0.0, 0.5]), ({}, [1.0, 0.5])):
        found = pulled(lib, nearest(lib, [[1, 0]], [1], **options), [1 - 1e-3, 2], [3, 2])
        assert_told(found, NotASolutionWarning, "y is not a solution")  # rough it is, either way
        np.testing.assert_allclose(lib.numpy(found.value), expected, atol=1e-5)


@LIBS
def test_multipliers_tell_what_is_active(lib: Library) -> None:
    """An interior-point solution 1e-5 short of its bound: the multiplier that it comes with says that it is held."""
    condition = nearest(lib, [[1, 0]], [1], multipliers=lib.array(np.array([4.0])))
    assert_right(lib, pulled(lib, condition, [1 - 1e-5, 2], [3, 2]), [0.0, 0.5], 1e-5)


@pytest.mark.slow(on=("jax",))
@AND_JAX
def test_multiplier_of_the_wrong_sign(lib: Library, by: tuple[str, str]) -> None:
    """The bound lies on the side to which the objective falls."""
    route, solver = by
    condition = nearest(lib, [[0, 1], [-1, 0]], [7, -1], route=route)
    found = pulled(lib, condition, [1, 2], [3, 2], solver=solver)
    assert_told(found, RegularityWarning, r"multiplier of ineq\[1\] is negative")


@LIBS
def test_given_multiplier_of_a_constraint_that_is_not_active(lib: Library) -> None:
    condition = nearest(lib, [[1, 0], [0, 1]], [1, 7], multipliers=lib.array(np.array([4.0, 2.0])))
    found = pulled(lib, condition, [1, 2], [3, 2])
    assert_told(found, RegularityWarning, r"multiplier of ineq\[1\]")


def test_each_finding_is_told_once() -> None:
    """A linearisation that is used twice warns once."""
    lin = linearize(nearest(NUMPY, [[1, 0]], [1]), np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert [type(w) for w in outcome(lambda: lin.vjp(ONE)).warnings] == [RegularityWarning]
    assert outcome(lambda: lin.vjp(ONE)).quiet


# -- 42: dependent gradients -----------------------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@AND_JAX
def test_duplicate_constraint(lib: Library, by: tuple[str, str]) -> None:
    """The first two are one, in other units; the third has no part in it."""
    route, solver = by
    condition = nearest(lib, [[1, 1, 0], [30, 30, 0], [0, 0, 1]], [1, 30, 1], "eq", route=route)
    a = [lib.array(np.array(x, float)) for x in ([0.5, 0.5, 1], [1, 1, 1], [1, 0, 0])]
    found = outcome(lambda: implicit_vjp(condition, *a, solver=solver))
    assert_told(found, QualificationError, r"LICQ fails: the gradients of eq\[0\], eq\[1\]")
    assert ("eq[2]" in found.text) is (lib in JAX)  # there all that are active are named


@WAYS
def test_more_active_than_variables(lib: Library, by: tuple[str, str]) -> None:
    route, solver = by
    condition = nearest(lib, [[1, 0], [0, 1], [1, 1]], [0, 0, 0], route=route)
    found = pulled(lib, condition, [0, 0], [1, 1], solver=solver)
    assert_told(found, QualificationError, r"LICQ.*ineq\[0\], ineq\[1\], ineq\[2\]")


@LIBS
@EACH_ROUTE
@pytest.mark.parametrize("solver", ["auto", "lu", "minres"])
def test_duplicate_constraint_with_given_multipliers(lib: Library, route: str, solver: str) -> None:
    """Then nothing is recovered, and the failed solve has to tell; or, consistent, it is right."""
    multipliers = lib.array(np.array([1.0, 0.0]))
    condition = nearest(lib, [[1, 1], [2, 2]], [1, 2], "eq", route=route, multipliers=multipliers)
    found = pulled(lib, condition, [0.5, 0.5], [1, 1], solver=solver)
    if found.quiet:
        assert_right(lib, found, [0.25, -0.25], 1e-5)
    else:
        assert_told(found, QualificationError, r"LICQ.*eq\[0\], eq\[1\]")


@LIBS
def test_gradient_of_a_constraint_is_zero(lib: Library) -> None:
    xp = functions(lib)
    condition = KKT(lambda y, t: xp.sum((y - t) ** 2), eq=lambda y, t: xp.sum(y**2))
    assert_told(pulled(lib, condition, [0, 0], [1, 1]), QualificationError, r"LICQ.*eq\[0\].*or zero")


# -- 45: feasibility -------------------------------------------------------------------------------------------------
@WAYS
@pytest.mark.parametrize("kind", ["eq", "ineq"])
def test_infeasible_point(lib: Library, by: tuple[str, str], kind: str) -> None:
    route, solver = by
    condition = nearest(lib, [[1, 0], [1, 1]], [0.6, 1], kind, route=route)
    found = pulled(lib, condition, [0.6, 0.5], [1, 1], solver=solver)
    assert_told(found, InfeasibleError, rf"y violates {kind}\[1\] by 0.1\.")
    assert isinstance(found.error, (ValueError, np.linalg.LinAlgError))


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(("lib", "mode"), with_choices(["warn", "nan", "ignore"], ["nan"]))
def test_infeasible_point_in_other_modes(lib: Library, mode: str) -> None:
    condition = nearest(lib, [[1, 1]], [1], "eq")
    found = pulled(lib, condition, [0.6, 0.5], [1, 1], on_failure=mode)
    assert found.error is None
    if mode == "warn":
        assert_told(found, SolveWarning, r"InfeasibleError: y violates eq\[0\]")
    assert bool(np.all(np.isnan(lib.numpy(found.value)))) is (mode == "nan")


@LIBS
@EACH_ROUTE
def test_linear_equality_projects(lib: Library, route: str) -> None:
    """dy/dθ is the projector on the null space, not the identity."""
    rows = np.array([[1.0, 2.0, 2.0]]) / 3
    a = [lib.array(x) for x in (np.zeros(3), np.array([1.0, 2.0, 2.0]))]
    condition = nearest(lib, rows, [0.0], "eq", route=route)
    found = outcome(lambda: implicit_jacobian(condition, *a))
    assert_right(lib, found, np.eye(3) - rows.T @ rows, 1e-5)


# -- 46: the Hessian -------------------------------------------------------------------------------------------------
def flat(lib: Library, route: str) -> KKT:
    """y₀ = θ₀ by the objective, which is linear in y₁, and y₁ = θ₀ θ₁ by the constraint."""
    return KKT(
        lambda y, t: y[0] ** 2 / 2 - t[0] * y[0] - t[1] * y[1], eq=lambda y, t: y[1] - t[0] * t[1], route=route
    )  # fmt: skip


@WAYS
def test_hessian_is_singular_but_not_on_the_null_space(lib: Library, by: tuple[str, str]) -> None:
    route, solver = by
    found = pulled(lib, flat(lib, route), [2, 6], [2, 3], solver=solver)
    if route == "schur":
        assert_told(found, (SingularError, NotPositiveDefiniteError), "route='schur' needs a regular Hessian")
    else:
        assert_right(lib, found, [2.5, 1.0], 1e-5)


@LIBS
@EACH_ROUTE
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_methods_for_positive_definite_systems(lib: Library, route: str, solver: str) -> None:
    """On the saddle system they fail, with a way out; on the smaller ones of the other routes they are right."""
    condition = nearest(lib, [[1, 1]], [1], "eq", route=route)
    found = pulled(lib, condition, [0.5, 0.5], [1, 1], solver=solver)
    if route == "kkt":
        assert_told(found, NotPositiveDefiniteError, "A saddle system never is: use 'lu', 'ldlt' or 'minres'")
    else:
        assert_right(lib, found, [0.25, -0.25], 1e-5)


@LIBS
@EACH_ROUTE
@pytest.mark.parametrize("solver", ["auto", "lu", "minres"])
def test_reduced_hessian_is_singular(lib: Library, route: str, solver: str) -> None:
    """Along the constraint the objective is constant: the solution is not unique."""
    condition = KKT(lambda y, t: y[1] ** 2 + t[0] * y[1], eq=lambda y, t: y[1] - t[0], route=route)
    found = pulled(lib, condition, [2, 3], [3, 0], solver=solver)
    assert_told(found, SingularError, "singular")
    if route == "kkt":
        assert_told(found, SingularError, "singular on the null space of the active constraints")


@LIBS
@EACH_ROUTE
@pytest.mark.parametrize("solver", ["auto", "lu", "minres", "gmres"])
def test_constrained_maximum(lib: Library, route: str, solver: str) -> None:
    """The reduced Hessian is negative: nothing fails that need not."""
    condition = nearest(lib, [[1, 1]], [1], "eq", weight=-1.0, route=route)
    assert_right(lib, pulled(lib, condition, [0.5, 0.5], [1, 1], solver=solver), [0.25, -0.25], 1e-5)


# -- batches, and compiled programs ----------------------------------------------------------------------------------
BAD = [("infeasible", "raise"), ("infeasible", "nan"), ("weak", "raise")]


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(("lib", "what"), with_choices(BAD, BAD[:1]))
def test_bad_item_of_a_batch(lib: Library, what: tuple[str, str]) -> None:
    fault, mode = what
    program = ball(lib, items=(3,))
    y, theta = program.y.copy(), program.theta.copy()
    if fault == "infeasible":
        y[1] *= 1.1
    else:
        theta[1, :2] = y[1]
    bad = changed(program, y=y, theta=theta)
    found = outcome(lambda: bad.ask("vjp", bad.condition(), batched=True, on_failure=mode))
    if fault == "weak":
        assert_told(found, RegularityWarning, r"item 1: ineq\[0\] is weakly active")
        value = found.value
    elif mode == "raise":
        assert_told(found, InfeasibleError, r"y violates item 1: ineq\[0\]")
        value = found.error.value
    else:
        value = found.value
        assert np.all(np.isnan(lib.numpy(value)[1]))
    np.testing.assert_allclose(lib.numpy(value)[::2], program.truth("vjp")[::2], rtol=rtol_for(lib))


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize("fault", ["none", "infeasible", "licq"])
def test_under_jit_there_is_nan(lib: Library, fault: str) -> None:
    """A compiled program cannot raise: no number comes out that looks like an answer."""
    import jax

    rows, bounds = ([[1, 1], [2, 2]], [1, 2]) if fault == "licq" else ([[1, 1]], [1])
    condition = nearest(lib, rows, bounds, "eq")
    gradient = jax.jit(lambda y, theta: implicit_vjp(condition, y, theta, lib.array(ONE)))
    got = gradient(lib.array(np.array([0.6 if fault == "infeasible" else 0.5, 0.5])), lib.array(np.array([1.0, 1.0])))
    np.testing.assert_allclose(got, [0.25, -0.25] if fault == "none" else [np.nan, np.nan], atol=1e-12)


@pytest.mark.parametrize("lib", TORCH, ids=lambda lib: lib.name)
def test_told_in_the_backward_pass(lib: Library) -> None:
    layer = implicit_function(nearest(lib, [[1, 1]], [1], "eq"))(lambda theta: theta - 0.25)
    theta = lib.array(np.array([1.0, 1.0])).requires_grad_()
    y = layer(theta)
    with pytest.raises(InfeasibleError, match=r"y violates eq\[0\] by 0.5"):
        y.sum().backward()


# -- wrong arguments -------------------------------------------------------------------------------------------------
SQUARE: Callable[..., Any] = lambda y, t: ((y - t) ** 2).sum()
TOTAL: Callable[..., Any] = lambda y, t: y.sum() - 1.0
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "multipliers too many": (lambda: KKT(SQUARE, eq=TOTAL, multipliers=np.ones(3)), ShapeError,
                             r"multipliers of eq have shape \(3,\); expected \(1,\)"),
    "multipliers of nothing": (lambda: KKT(SQUARE, eq=TOTAL, multipliers=(np.ones(1), np.ones(1))), InputError,
                               "there is no ineq"),
    "multipliers missing": (lambda: KKT(SQUARE, eq=TOTAL, ineq=TOTAL, multipliers=(np.ones(1), None)), InputError,
                            "multipliers: there are ineq, and its part is None"),
    "three multipliers": (lambda: KKT(SQUARE, eq=TOTAL, multipliers=(1, 2, 3)), InputError, "3 parts"),
    "eq returns None": (lambda: KKT(SQUARE, eq=lambda y, t: None), CallbackError, "eq returned"),
    "ineq returns text": (lambda: KKT(SQUARE, ineq=lambda y, t: "no"), CallbackError, "ineq returned"),
    "f returns a vector": (lambda: KKT(lambda y, t: y - t, eq=TOTAL), CallbackError, r"f returned.*\(2,\)"),
    "no constraint in eq": (lambda: KKT(SQUARE, eq=lambda y, t: y[:0]), InputError, "hold no constraint"),
    "no constraints": (lambda: KKT(SQUARE), InputError, "needs eq or ineq"),
    "f is a number": (lambda: KKT(1.0, eq=TOTAL), InputError, "f is float"),
    "eq is an array": (lambda: KKT(SQUARE, eq=np.ones(2)), InputError, "eq is ndarray"),
    "unknown route": (lambda: KKT(SQUARE, eq=TOTAL, route="range"), UnknownNameError,
                      "route = 'range': expected one of auto, kkt, schur, nullspace"),
    "active_tol": (lambda: KKT(SQUARE, eq=TOTAL, active_tol=2.0), InputError, "active_tol = 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what: str) -> None:
    make, kind, pattern = WRONG[what]
    found = outcome(lambda: implicit_vjp(make(), np.array([0.5, 0.5]), np.array([1.0, 1.0]), ONE))
    assert_told(found, kind, pattern)


E, ROW = np.eye(2), np.ones((1, 2))
WRONG_DATA: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "a key of another name": (lambda: QP(Q=E), {"c": np.ones(2)}, InputError, r"\['c'\]; expected a dict with some"),
    "an array": (lambda: QP(Q=E), np.ones(2), InputError, "expected a dict"),
    "given twice": (lambda: QP(Q=E, q=np.ones(2)), {"q": np.ones(2)}, InputError, "q is given to QP and in theta"),
    "no objective": (lambda: QP(A=ROW), {"b": np.ones(1)}, InputError, "neither Q nor q"),
    "b without A": (lambda: QP(Q=E), {"b": np.ones(1)}, InputError, "QP has b and no A"),
    "G without h": (lambda: QP(Q=E, G=ROW), {"q": np.ones(2)}, InputError, "QP has G and no h"),
    "Q of another size": (lambda: QP(Q=np.eye(3), A=ROW), {"b": np.ones(1)}, ShapeError,
                          r"Q has shape \(3, 3\); expected \(2, 2\)"),
    "b of another size": (lambda: QP(Q=E, A=ROW), {"b": np.ones(2)}, ShapeError,
                          r"b has shape \(2,\); expected \(1,\)"),
    "A with other columns": (lambda: QP(Q=E, A=np.ones((1, 3))), {"b": np.ones(1)}, ShapeError,
                             r"A has shape \(1, 3\); expected \(1, 2\)"),
    "a vector as Q": (lambda: QP(Q=np.ones(2)), {"q": np.ones(2)}, ShapeError, r"Q has shape \(2,\); expected 2 axes"),
    "no constraints": (lambda: QP(Q=E), {"q": np.ones(2)}, InputError, "no constraint"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data_of_a_quadratic_program_is_named(what: str) -> None:
    make, theta, kind, pattern = WRONG_DATA[what]
    assert_told(outcome(lambda: implicit_vjp(make(), np.array([0.5, 0.5]), theta, ONE)), kind, pattern)


# -- no false alarms -------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), route=st.sampled_from(ROUTES), error=st.sampled_from([0.0, 1e-9]),
       solver=st.sampled_from(["auto", "lu", "minres"]))  # fmt: skip
def test_random_quadratic_programs_are_right_and_quiet(seed: int, route: str, error: float, solver: str) -> None:
    """Strictly convex, strictly complementary, from a chosen primal-dual solution; y accurate to 1e-9."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    p, k, free = int(rng.integers(0, n // 2 + 1)), int(rng.integers(1, n // 2 + 1)), int(rng.integers(0, 4))
    Q, rows = rng.normal(size=(n, n)), np.linalg.qr(rng.normal(size=(n, n)))[0]
    Q, A, G = Q @ Q.T + np.eye(n), rows[:p], np.concatenate([rows[p : p + k], rng.normal(size=(free, n))])
    y, lam, mu = rng.normal(size=n), rng.normal(size=p), np.append(rng.uniform(0.1, 2, k), np.zeros(free))
    h = G @ y + np.append(np.zeros(k), rng.uniform(0.1, 2, free))
    theta = {"q": -(Q @ y + A.T @ lam + G.T @ mu), "b": A @ y, "h": h}
    J = rows[: p + k]
    saddle = np.block([[Q, J.T], [J, np.zeros((p + k, p + k))]])
    v = rng.normal(size=n)
    u = np.linalg.solve(saddle, np.append(v, np.zeros(p + k)))
    near = y + error * rng.uniform(-1, 1, size=n)
    layer = QP(Q=Q, A=A, G=G, route=route)
    got = implicit_vjp(layer, near, theta, v, solver=solver)  # a warning would be an error
    np.testing.assert_allclose(got["q"], -u[:n], atol=1e-7)
    np.testing.assert_allclose(got["b"], u[n : n + p], atol=1e-6)
    np.testing.assert_allclose(got["h"], np.append(u[n + p :], np.zeros(free)), atol=1e-6)


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_at_a_solution_that_is_rounded(lib: Library, seed: int, dtype: str) -> None:
    program, rng = ball(lib, dtype), np.random.default_rng(seed)
    error = 1e-9 if dtype == "float64" else 1e-6
    near = changed(program, y=program.y * (1 + error * rng.uniform(-1, 1, size=2)))
    for route in ROUTES:
        near.check("vjp", near.condition(route=route), 1e-5 if dtype == "float64" else 3e-2)
