"""Every library, route, solver and mode of constrained minima against closed forms and block elimination in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, READONLY, STRICT, TORCH, Library, relative_error
from helpers_constraints import (
    EACH_SOLVER,
    MODES,
    PROGRAMS,
    ROUTES,
    Program,
    ball,
    changed,
    circle,
    curved,
    functions,
    rtol_for,
    with_choices,
)
from problems import TIGHT
from scipy.optimize import minimize

from implicitdiff import KKT, implicit_function, implicit_jacobian, implicit_vjp, linearize

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
ALL_LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
EXACT_LIBS = pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)


# -- every route and solver ----------------------------------------------------------------------------------------
def each_program() -> list[Any]:
    """Each library with each program; without autodiff, by finite differences, only the smallest."""
    return [
        pytest.param(lib, name, id=f"{lib.name}-{name}")
        for lib in PLAIN
        for name in (PROGRAMS if lib.name != "array_api_strict" else ("ball",))
    ]


@pytest.mark.parametrize(("lib", "name"), each_program())
@pytest.mark.parametrize(("route", "solver"), EACH_SOLVER)
def test_every_route_and_solver(lib: Library, name: str, route: str, solver: str) -> None:
    program = PROGRAMS[name](lib)
    condition = program.condition(route=route)
    # the products are exact to rounding, or to the error of finite differences: the solver's own tolerance then
    method, modes = (solver, ("vjp", "jvp")) if lib.name == "array_api_strict" else (TIGHT[solver], MODES)
    for mode in modes:
        program.check(mode, condition, rtol_for(lib), solver=method)


@pytest.mark.parametrize("name", PROGRAMS)
@EACH_ROUTE
def test_read_only_arrays(name: str, route: str) -> None:
    program = PROGRAMS[name](READONLY)
    program.check("vjp", program.condition(route=route), 1e-9)


@EACH_ROUTE
def test_finite_differences(route: str) -> None:
    """A library without autodiff: exact to the differences of second derivatives."""
    program = curved(STRICT)
    program.check("vjp", program.condition(route=route), 1e-5)


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize(("route", "solver"), [("kkt", "minres"), ("schur", "cholesky"), ("nullspace", "cg")])
def test_every_route_on_a_compiler(lib: Library, route: str, solver: str) -> None:
    program = circle(lib)
    lin = linearize(program.condition(route=route), program.array(program.y), program.array(program.theta),
                    solver=TIGHT[solver])  # fmt: skip
    for got, mode in (
        (lin.vjp(program.array(program.cotangent)), "vjp"),
        (lin.jvp(program.array(program.tangent)), "jvp"),
    ):
        assert relative_error(lib, got, program.truth(mode)) <= 1e-9


@pytest.mark.parametrize("mode", ["jacobian", "grad"])
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_other_modes_on_a_compiler(lib: Library, mode: str) -> None:
    program = ball(lib)
    program.check(mode, program.condition(), 1e-9)


@EXACT_LIBS
@pytest.mark.parametrize("name", PROGRAMS)
def test_routes_agree(lib: Library, name: str) -> None:
    """The same numbers by three different eliminations."""
    program = PROGRAMS[name](lib)
    found = [lib.numpy(program.ask("jacobian", program.condition(route=route))) for route in ("auto", *ROUTES)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-9 * np.abs(found[0]).max())


def test_truth_is_that_of_the_problem_solved_anew() -> None:
    """Finite differences of SLSQP's solutions: what the other tests call the truth does not rest on our derivation."""
    program = curved(NUMPY)
    constraints = lambda theta: [
        {"type": "eq", "fun": lambda y: program.eq(y, theta)},
        {"type": "ineq", "fun": lambda y: -program.ineq(y, theta)},
    ]

    def solve(theta: np.ndarray) -> np.ndarray:
        options = {"ftol": 1e-15, "maxiter": 300}
        return minimize(program.f, program.y, (theta,), "SLSQP", constraints=constraints(theta), options=options).x

    np.testing.assert_allclose(solve(program.theta), program.y, atol=1e-6)
    differences = np.stack([(solve(program.theta + e) - solve(program.theta - e)) / 2e-3 for e in 1e-3 * np.eye(4)], -1)
    np.testing.assert_allclose(implicit_jacobian(program.condition(), program.y, program.theta), differences, atol=1e-4)


@EACH_ROUTE
def test_report_names_the_route(route: str) -> None:
    program = curved(NUMPY)
    _, report = program.ask("vjp", program.condition(route=route), solver="minres", return_report=True)
    assert report.converged
    assert report.solver == "minres"
    assert report.residual < 1e-8
    assert report.stationarity < 1e-12
    assert {"schur": "Schur complement", "nullspace": "null space", "kkt": "chosen by name"}[route] in report.reason


# -- forms of the constraints, of y and of theta -----------------------------------------------------------------------
def forms_of(lib: Library) -> dict[str, Callable[[Any], Any]]:
    """From four constraints in one vector to other trees of the same."""
    xp = functions(lib)
    return {
        "array (2, 2)": lambda c: xp.reshape(c, (2, 2)),
        "tuple": lambda c: (c[:1], c[1:]),
        "scalars and a list": lambda c: [c[0], (c[1], c[2:])],
        "dict": lambda c: {"upper": c[:3], "lower": c[3:]},
        "an empty part": lambda c: {"first": c[:0], "second": c},
    }


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(("lib", "form"), with_choices(forms_of(NUMPY), ["dict"]))
def test_trees_of_constraints(lib: Library, form: str) -> None:
    """Bounds on both sides of two variables; θ in the inequalities. y follows the bounds that are active."""
    xp, shape = functions(lib), forms_of(lib)[form]
    target, sides = lib.array(np.array([3.0, -2.0])), lib.array(np.vstack([np.eye(2), -np.eye(2)]))
    signs = lib.array(np.array([1.0, 1.0, -1.0, -1.0]))
    condition = KKT(lambda y, t: xp.sum((y - target) ** 2), ineq=lambda y, t: shape(sides @ y - signs * t))
    y, theta = lib.array(np.array([1.0, -1.0])), lib.array(np.array([1.0, 2.0, -3.0, -1.0]))
    got = implicit_jacobian(condition, y, theta)
    np.testing.assert_allclose(lib.numpy(got), [[1, 0, 0, 0], [0, 0, 0, 1]], atol=1e-6)


@EXACT_LIBS
@EACH_ROUTE
def test_trees_and_arguments(lib: Library, route: str) -> None:
    """Trees of y and theta, and args: the program `ball` in other clothes."""
    xp, program = functions(lib), ball(lib)
    a = program.array

    def f(y: Any, t: Any, scale: Any, shift: Any) -> Any:
        return scale * ((y["u"][0] - t["p"][0]) ** 2 + xp.sum((y["v"] - t["p"][1]) ** 2)) + shift

    bound = lambda y, t, scale, shift: xp.sum(y["u"] ** 2) + xp.sum(y["v"] ** 2) - t["r"] ** 2
    y = {"u": a(program.y[:1]), "v": a(program.y[1:].reshape(1, 1))}
    theta = {"p": a(program.theta[:2]), "r": a(program.theta[2])}
    v = {"u": a(program.cotangent[:1]), "v": a(program.cotangent[1:].reshape(1, 1))}
    got = implicit_vjp(KKT(f, ineq=bound, route=route), y, theta, v, args=(2.0, a(np.array(7.0))))
    joined = np.append(lib.numpy(got["p"]), lib.numpy(got["r"]))
    np.testing.assert_allclose(joined, program.truth("vjp"), rtol=1e-9)


@EXACT_LIBS
@EACH_ROUTE
def test_matrix_as_the_solution(lib: Library, route: str) -> None:
    """y of shape (2, 3) whose rows sum to θ, next to T: y = T + (θ − T 1) 1ᵀ / 3."""
    xp, target = functions(lib), lib.array(np.arange(6.0).reshape(2, 3))
    condition = KKT(
        lambda y, t: xp.sum((y - target) ** 2), eq=lambda y, t: xp.sum(y, axis=1) - t, route=route
    )  # fmt: skip
    theta = np.array([1.0, 2.0])
    y = np.arange(6.0).reshape(2, 3) + (theta - [3.0, 12.0])[:, None] / 3
    got = lib.numpy(implicit_jacobian(condition, lib.array(y), lib.array(theta)))
    np.testing.assert_allclose(got, np.repeat(np.eye(2)[:, None, :], 3, axis=1) / 3, atol=1e-10)


@EXACT_LIBS
@EACH_ROUTE
def test_scalar_solution(lib: Library, route: str) -> None:
    """A 0-d y that is held by its one constraint: nothing is left to minimise over."""
    condition = KKT(lambda y, t: (y - 5.0) ** 2, ineq=lambda y, t: y - t**2, route=route)
    got = implicit_jacobian(condition, lib.array(np.array(2.25)), lib.array(np.array(1.5)))
    assert float(got) == pytest.approx(3.0, abs=1e-10)


# -- multipliers -------------------------------------------------------------------------------------------------------
def given_multipliers(program: Program, form: str) -> Any:
    pair = (program.array(program.lam), program.array(program.mu))
    return {"pair": pair, "list": list(pair), "callable": lambda y, t: pair, "recovered": None,
            "callable that declines": lambda y, t: None}[form]  # fmt: skip


FORMS = ["pair", "list", "callable", "recovered", "callable that declines"]


@pytest.mark.slow(on=("jax", "array_api_strict"))
@pytest.mark.parametrize(("lib", "form"), with_choices(FORMS, ["pair"], ["pair", "recovered"]))
def test_multipliers(lib: Library, form: str) -> None:
    program = curved(lib)
    program.check("vjp", program.condition(multipliers=given_multipliers(program, form)), rtol_for(lib))


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
@EACH_ROUTE
def test_multipliers_of_one_kind(lib: Library, route: str) -> None:
    """The array alone, or a pair with None; also in the shape of the constraints."""
    for program, values, pair in (
        (circle(lib), "lam", lambda z: (z, None)), (ball(lib), "mu", lambda z: (None, z)),
    ):  # fmt: skip
        z = program.array(getattr(program, values))
        for given in (z, pair(z), lib.xp.reshape(z, ())):
            program.check("vjp", program.condition(multipliers=given, route=route), rtol_for(lib))


def test_given_multipliers_are_used() -> None:
    """Multipliers enter the Hessian of the Lagrangian: wrong ones give another derivative, and a warning says so."""
    program = curved(NUMPY)
    wrong = (3 * program.lam, program.mu)
    with pytest.warns(UserWarning, match="y is not a solution"):
        got = program.ask("vjp", program.condition(multipliers=wrong))
    assert relative_error(NUMPY, got, program.truth("vjp")) > 1e-3


# -- scale, precision, batches -----------------------------------------------------------------------------------------
@EXACT_LIBS
@EACH_ROUTE
@pytest.mark.parametrize("solver", ["lu", "ldlt", "minres"])
@pytest.mark.parametrize("exponent", [-12, 12])
@pytest.mark.parametrize("what", ["objective", "constraints"])
def test_units_do_not_matter(lib: Library, route: str, solver: str, exponent: int, what: str) -> None:
    program, s = curved(lib), 10.0**exponent
    scaled = lambda function: lambda y, t: s * function(y, t)
    parts = {"f": scaled(program.f)} if what == "objective" else {
        "eq": scaled(program.eq), "ineq": scaled(program.ineq)}  # fmt: skip
    changed(program, **parts).check("jacobian", changed(program, **parts).condition(route=route), 1e-8, solver=solver)


@EXACT_LIBS
@pytest.mark.parametrize("exponents", [(-9, 5, 3, -4, 8), (6, -6, -6, 6, 0)])
def test_units_of_single_constraints_do_not_matter(lib: Library, exponents: tuple[int, ...]) -> None:
    program = curved(lib)
    e, g = lib.array(10.0 ** np.array(exponents[:2])), lib.array(10.0 ** np.array(exponents[2:]))
    scaled = changed(
        program, eq=lambda y, t: e * program.eq(y, t), ineq=lambda y, t: g * program.ineq(y, t),
        lam=program.lam / 10.0 ** np.array(exponents[:2]), mu=program.mu / 10.0 ** np.array(exponents[2:]),
    )  # fmt: skip
    for form in ("recovered", "pair"):
        scaled.check("jacobian", scaled.condition(multipliers=given_multipliers(scaled, form)), 1e-8)


@pytest.mark.parametrize(("lib", "name"), each_program())
@pytest.mark.parametrize(("route", "solver"), [("kkt", "auto"), ("kkt", "minres"), ("schur", "cholesky"),
                                               ("nullspace", "cg")])  # fmt: skip
def test_single_precision(lib: Library, name: str, route: str, solver: str) -> None:
    program = PROGRAMS[name](lib, "float32")
    got = program.check("vjp", program.condition(route=route), rtol_for(lib, "float32"), solver=solver)
    assert got.dtype == lib.xp.float32


@pytest.mark.parametrize(("lib", "name"), each_program())
@pytest.mark.parametrize(("route", "solver"), [("kkt", "auto"), ("kkt", "ldlt"), ("kkt", "minres"), ("kkt", "gmres"),
                                               ("schur", "cholesky"), ("schur", "lu"), ("nullspace", "cg"),
                                               ("nullspace", "auto")])  # fmt: skip
def test_batch(lib: Library, name: str, route: str, solver: str) -> None:
    """On NumPy and the like, the functions take the leading axis; on Torch they are those of one item."""
    program = PROGRAMS[name](lib, items=(3,))
    method, modes = (solver, ("jvp",)) if lib.name == "array_api_strict" else (TIGHT[solver], MODES)
    options = {"solver": method, "batched": True}
    for mode in modes:
        program.check(mode, program.condition(route=route), rtol_for(lib), **options)
    value, report = program.ask("vjp", program.condition(route=route), return_report=True, **options)
    assert lib.numpy(report.converged).tolist() == [True] * 3
    assert value.shape == program.theta.shape


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_batch_on_a_compiler(lib: Library) -> None:
    program = ball(lib, items=(3,))
    program.check("vjp", program.condition(route="nullspace"), 1e-9, batched=True)


@EXACT_LIBS
def test_batch_of_given_multipliers(lib: Library) -> None:
    program = curved(lib, items=(3,))
    pair = (program.array(program.lam), program.array(program.mu))
    program.check("vjp", program.condition(multipliers=pair), 1e-9, batched=True)


@EXACT_LIBS
def test_batch_with_other_active_sets(lib: Library) -> None:
    """Outside of the ball, inside, and outside again: every item has its own active set."""
    program = ball(lib, items=(3,))
    theta, y, jacobian = program.theta.copy(), program.y.copy(), program.jacobian.copy()
    theta[1] = [0.3, 0.2, 1.0]
    y[1], jacobian[1] = theta[1, :2], np.eye(2, 3)
    mixed = changed(program, theta=theta, y=y, jacobian=jacobian)
    for route in ROUTES:
        mixed.check("jacobian", mixed.condition(route=route), 1e-9, batched=True)


@LIBS
def test_wrapped_solver(lib: Library) -> None:
    """A solver that is called, with derivatives asked of the wrapped function itself."""
    program = ball(lib)
    layer = implicit_function(program.condition())(lambda theta: program.array(program.y))
    theta = program.array(program.theta)
    if lib in TORCH:
        theta.requires_grad_()
        layer(theta).backward(program.array(program.cotangent))
        got = theta.grad
    else:
        got = layer.vjp(theta, program.array(program.cotangent))
    assert relative_error(lib, got, program.truth("vjp")) <= rtol_for(lib)
