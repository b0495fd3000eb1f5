"""`check_regularity` on every kind of condition, against NumPy, and every problem that it can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, Library
from helpers_constraints import ball, curved

from implicitdiff import (
    KKT,
    QP,
    FixedPoint,
    InputError,
    LogBarrier,
    Regularity,
    Root,
    Stationary,
    check_regularity,
)

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
M = np.array([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 1.0]])
G = np.array([[2.0, 0.5, 0.0], [1.5, -1.0, 0.3], [0.7, 0.3, 1.0]])
ZERO = np.zeros(3)


# -- without constraints -----------------------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hessian(lib: Library, sign: float) -> None:
    matrix = lib.array(sign * M)
    found = check_regularity(lambda y, t: y @ (matrix @ y) / 2 - t @ y, lib.array(ZERO), lib.array(ZERO))
    values = np.linalg.eigvalsh(sign * M)
    assert found.regular
    assert found.unknowns == found.rank == 3
    assert found.smallest_eigenvalue == pytest.approx(values[0], rel=1e-5)
    assert found.smallest_singular_value == pytest.approx(1 / np.linalg.cond(M), rel=1e-5)
    assert found.inertia == (int(np.sum(values > 0)), int(np.sum(values < 0)), 0)
    assert found.second_order == "not a minimum"
    assert found.stationarity == pytest.approx(0.0, abs=1e-9)


def test_minimum_and_stationarity() -> None:
    """A strict minimum, looked at from a point beside it."""
    found = check_regularity(
        lambda y, t: 2 * y[0] ** 2 + 3 * y[1] ** 2 - t @ y, np.array([0.3, 0.0]), np.array([1.0, 0.0])
    )
    assert (found.second_order, found.inertia, found.rank) == ("minimum", (2, 0, 0), 2)
    assert found.smallest_eigenvalue == pytest.approx(4.0)
    assert found.stationarity == pytest.approx(0.2)


@LIBS
@pytest.mark.parametrize("kind", [Root, FixedPoint])
def test_asymmetric_system(lib: Library, kind: type) -> None:
    matrix = lib.array(G)
    residual = lambda y, t: matrix @ y - t
    condition = Root(residual) if kind is Root else FixedPoint(lambda y, t: y - residual(y, t))
    found = check_regularity(condition, lib.array(ZERO), lib.array(ZERO))
    assert found.regular
    assert found.smallest_singular_value == pytest.approx(1 / np.linalg.cond(G), rel=1e-5)
    assert (found.rank, found.smallest_eigenvalue, found.inertia, found.second_order) == (3, None, None, "unknown")


@LIBS
def test_singular_system(lib: Library) -> None:
    matrix = lib.array(np.outer([1.0, 2.0, 3.0], [1.0, 0.0, -1.0]) + np.diag([0.0, 1.0, 0.0]))
    found = check_regularity(Root(lambda y, t: matrix @ y - t), lib.array(ZERO), lib.array(ZERO))
    assert found.problems == ("A is singular",)
    assert found.rank == 2


def test_singular_hessian_given_as_a_matrix() -> None:
    condition = Stationary(grad=lambda y, t: np.array([y[0] - t[0], 0.0]), hessian=lambda y, t: np.diag([1.0, 0.0]))
    condition = Stationary(grad=condition.grad, hessian=condition.hessian, mixed_vjp=lambda y, t, u: -u)
    found = check_regularity(condition, np.zeros(2), np.zeros(2))
    assert found.problems == ("the Hessian is singular",)
    assert (found.second_order, found.inertia, found.rank) == ("degenerate", (1, 0, 1), 1)


def test_arguments_are_passed_on() -> None:
    found = check_regularity(lambda y, t, k: k * (y - t) ** 2, np.array(1.0), np.array(1.0), args=(3.0,))
    assert found.smallest_eigenvalue == pytest.approx(6.0)


# -- with constraints --------------------------------------------------------------------------------------------------
@LIBS
@pytest.mark.parametrize("route", ["kkt", "schur", "nullspace"])
def test_saddle_system(lib: Library, route: str) -> None:
    """The reduced Hessian of the program `curved`, by NumPy from its own derivatives; whatever the route."""
    program, plain = curved(lib), curved(NUMPY)
    found = check_regularity(program.condition(route=route), program.array(program.y), program.array(program.theta))
    import autograd

    c = lambda y: anp.concatenate([plain.eq(y, plain.theta), plain.ineq(y, plain.theta)])
    z = np.append(plain.lam, plain.mu)
    H = autograd.hessian(lambda y: plain.f(y, plain.theta) + z @ c(y))(plain.y)
    J = autograd.jacobian(c)(plain.y)[[0, 1, 2, 4]]
    basis = np.linalg.svd(J)[2][4:]
    assert found.regular
    assert (found.licq, found.strict_complementarity, found.second_order) == (True, True, "minimum")
    assert found.active == ("eq[0]", "eq[1]", "ineq[0]", "ineq[2]")
    assert (found.unknowns, found.rank, found.inertia) == (6, 4, (6, 4, 0))
    assert found.smallest_eigenvalue == pytest.approx(np.linalg.eigvalsh(basis @ H @ basis.T)[0], rel=1e-5)
    np.testing.assert_allclose(lib.numpy(found.multipliers), z, rtol=1e-5, atol=1e-8)
    assert found.feasibility < 1e-10
    assert found.stationarity < 1e-5


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_saddle_system_on_a_compiler(lib: Library) -> None:
    program = ball(lib)
    found = check_regularity(program.condition(), program.array(program.y), program.array(program.theta))
    assert found.regular
    assert (found.active, found.inertia) == (("ineq[0]",), (2, 1, 0))
    assert found.smallest_eigenvalue == pytest.approx(2 + 2 * program.mu[0], rel=1e-10)


def test_given_multipliers_are_the_ones_shown() -> None:
    program = curved(NUMPY)
    condition = program.condition(multipliers=(program.lam, program.mu))
    found = check_regularity(condition, program.y, program.theta)
    np.testing.assert_allclose(found.multipliers, np.append(program.lam, program.mu))


def test_no_room_to_move() -> None:
    """As many active constraints as variables: the reduced Hessian is empty."""
    found = check_regularity(
        KKT(lambda y, t: ((y - t) ** 2).sum(), ineq=lambda y, t: y - 1.0), np.ones(2), np.array([2.0, 3.0])
    )
    assert found.regular
    assert np.isnan(found.smallest_eigenvalue)
    assert (found.second_order, found.inertia) == ("minimum", (2, 2, 0))


def test_quadratic_program() -> None:
    layer = QP(Q=np.diag([2.0, 4.0]), A=np.ones((1, 2)))
    found = check_regularity(layer, np.array([2.0, 1.0]) / 3, {"b": np.ones(1)})
    assert found.regular
    assert found.smallest_eigenvalue == pytest.approx(3.0)  # along (1, −1) / √2
    np.testing.assert_allclose(found.multipliers, [-4 / 3], rtol=1e-12)


def test_barrier() -> None:
    barrier = LogBarrier(lambda y, t: ((y - t) ** 2).sum(), ineq=lambda y, t: -y, t=1.0)
    y = (1 + np.sqrt(3.0)) / 2 * np.ones(1)  # 2 (y − 1) = 1 / y
    found = check_regularity(barrier, y, np.ones(1))
    assert found.regular
    assert found.smallest_eigenvalue == pytest.approx(2 + y[0] ** -2)
    with np.errstate(all="ignore"):
        outside = check_regularity(barrier, -y, np.ones(1))
    assert outside.problems == ("y is not inside of the barrier",)


def test_barrier_with_equalities() -> None:
    f, total = (lambda y, t: ((y - t) ** 2).sum()), (lambda y, t: y.sum() - 2.0)
    found = check_regularity(LogBarrier(f, ineq=lambda y, t: -y, t=1.0, eq=total), np.ones(2), np.ones(2))
    assert found.regular
    assert found.active == ("eq[0]",)
    assert found.smallest_eigenvalue == pytest.approx(3.0)  # 2 t + 1 / y²


# -- every problem by its name -----------------------------------------------------------------------------------------
SQUARE: Callable[..., Any] = lambda y, t: ((y - t) ** 2).sum()
UPPER: Callable[..., Any] = lambda y, t: y - anp.array([1.0, 5.0])
TWICE: Callable[..., Any] = lambda y, t: anp.stack([y[0] + y[1] - 1, 2 * y[0] + 2 * y[1] - 2])
PROBLEMS: dict[str, tuple[KKT, Any, Any, str, dict[str, Any]]] = {
    "infeasible": (KKT(SQUARE, ineq=UPPER), [1.5, 2.0], [3.0, 2.0], "infeasible in ineq[0]",
                   {"violated": ("ineq[0]",), "feasibility": 0.5}),
    "licq": (KKT(SQUARE, eq=TWICE), [0.5, 0.5], [1.0, 1.0], "LICQ fails in eq[0], eq[1]",
             {"licq": False, "dependent": ("eq[0]", "eq[1]"), "rank": 1}),
    "weak": (KKT(SQUARE, ineq=UPPER), [1.0, 2.0], [1.0, 2.0], "ineq[0] weakly active",
             {"weakly_active": ("ineq[0]",), "strict_complementarity": False, "rank": 0, "active": ("ineq[0]",)}),
    "sign": (KKT(SQUARE, ineq=lambda y, t: 1.0 - y), [1.0, 2.0], [3.0, 2.0], "multiplier of the wrong sign in ineq[0]",
             {"wrong_sign": ("ineq[0]",), "strict_complementarity": False}),
    "flat": (KKT(lambda y, t: y[1] ** 2 + t[0] * y[1], eq=lambda y, t: y[1] - t[0]), [2.0, 3.0], [3.0],
             "the Hessian is singular on the null space of the active constraints", {"second_order": "degenerate"}),
    "maximum": (KKT(lambda y, t: -SQUARE(y, t), eq=lambda y, t: y.sum() - 1), [0.5, 0.5], [1.0, 1.0],
                "the second-order condition fails: the reduced Hessian is not positive definite",
                {"second_order": "not a minimum", "smallest_eigenvalue": -2.0, "inertia": (1, 2, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    condition, y, theta, problem, facts = PROBLEMS[name]
    found = check_regularity(condition, np.array(y), np.array(theta))
    assert not found.regular
    assert problem in found.problems
    for field, expected in facts.items():
        assert getattr(found, field) == (pytest.approx(expected) if isinstance(expected, float) else expected), field
    assert problem in str(found)


def test_several_problems_at_once() -> None:
    condition = KKT(SQUARE, ineq=lambda y, t: anp.stack([y[0] - 1.0, y[1] - 2.0, -y[0] - 1.0, y[1]]))
    found = check_regularity(condition, np.array([1.0, 2.0]), np.array([1.0, 5.0]))
    assert found.violated == ("ineq[3]",)
    assert len(found.problems) > 1


# -- printing, and limits ----------------------------------------------------------------------------------------------
def test_printed() -> None:
    program = ball(NUMPY)
    lines = str(check_regularity(program.condition(), program.y, program.theta)).splitlines()
    assert lines[0] == "Regularity: regular"
    shown = dict(line.split(maxsplit=1) for line in lines[1:])
    assert shown["active"] == "ineq[0]"
    assert shown["inertia"] == "2, 1, 0"
    assert float(shown["multipliers"]) == pytest.approx(program.mu[0], rel=1e-5)
    assert "violated" not in shown  # what is empty is left out


def test_findings_compare_without_their_arrays() -> None:
    program = ball(NUMPY)
    one, other = (check_regularity(program.condition(), program.y, program.theta) for _ in range(2))
    assert isinstance(one, Regularity)
    assert one == other


def test_large_systems_are_refused() -> None:
    with pytest.raises(InputError, match="4097 unknowns"):
        check_regularity(lambda y, t: ((y - t) ** 2).sum(), np.zeros(4097), np.zeros(4097))


def test_warnings_are_not_raised() -> None:
    """What is wrong is in the report, and nowhere else."""
    condition, y, theta, *_ = PROBLEMS["weak"]
    check_regularity(condition, np.array(y), np.array(theta))  # a warning would be an error
