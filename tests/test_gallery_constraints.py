"""The pages about constraints, against closed forms and differences of problems solved anew by SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import central, run_page
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq, minimize

import implicitdiff as idf


# -- linear equalities -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def linear() -> dict[str, Any]:
    return run_page("21_linear_equality")


@pytest.mark.parametrize("route", ["kkt", "schur", "nullspace"])
def test_softmax_against_its_differences(linear: dict[str, Any], route: str) -> None:
    softmax = lambda theta: np.exp(theta) / np.exp(theta).sum()
    differences = central(softmax, linear["theta"], 1e-6)
    np.testing.assert_allclose(linear["by_route"][route], differences, atol=1e-9)
    np.testing.assert_allclose(linear["by_hand"], differences, atol=1e-9)
    assert linear["softmax_errors"][route] < 1e-9


def test_smoothest_curve_without_a_regular_hessian(linear: dict[str, Any]) -> None:
    knots, n = linear["knots"], linear["n"]
    free = np.setdiff1d(np.arange(n), knots)
    D = np.diff(np.eye(n), 2, axis=0)
    # by elimination: the values at the knots are known, the others solve a least-squares problem
    expected = np.zeros((n, 5))
    expected[knots] = np.eye(5)
    expected[free] = -np.linalg.lstsq(D[:, free], D[:, knots], rcond=None)[0]
    for found in linear["splines"].values():
        np.testing.assert_allclose(found, expected, atol=1e-9)
    splines = CubicSpline(knots, np.eye(5), bc_type="natural")(np.arange(n))
    np.testing.assert_allclose(linear["splines"]["kkt"], splines, atol=2e-3)


def test_the_route_by_the_inverse_hessian_is_refused(linear: dict[str, Any]) -> None:
    assert "singular" in linear["message"]
    assert "nullspace" in linear["message"]


# -- nonlinear equalities ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def nonlinear() -> dict[str, Any]:
    return run_page("22_nonlinear_equality")


def test_minimum_on_a_circle_moves_as_the_closed_form(nonlinear: dict[str, Any]) -> None:
    assert max(nonlinear["circle_errors"]) < 1e-12
    for (y, by_angle, by_radius), angle in zip(nonlinear["arrows"], np.radians([20, 80, 150, 215, 300]), strict=True):
        place = lambda p: -p[1] * np.array([np.cos(p[0]), np.sin(p[0])])
        np.testing.assert_allclose(y, place((angle, 0.8)), atol=1e-12)
        differences = central(place, np.array([angle, 0.8]), 1e-6)
        np.testing.assert_allclose(np.stack([by_angle, by_radius], axis=1), differences, atol=1e-8)


def test_eigenvector_against_differences_of_eigh(nonlinear: dict[str, Any]) -> None:
    S, change, y = nonlinear["S"], nonlinear["change"], nonlinear["y"]

    def eigenvector(s: float) -> np.ndarray:
        v = np.linalg.eigh(S + s * change)[1][:, 0]
        return v * np.sign(v @ y)

    difference = (eigenvector(1e-5) - eigenvector(-1e-5)) / 2e-5
    np.testing.assert_allclose(nonlinear["found"], difference, rtol=1e-6, atol=1e-8)
    assert nonlinear["quadratic_error"] < 1e-12
    assert nonlinear["projection_error"] < 1e-12
    interior = slice(1, -1)
    slopes = np.gradient(nonlinear["vectors"], nonlinear["s"], axis=0)
    np.testing.assert_allclose(nonlinear["slopes"][interior], slopes[interior], atol=0.02)


# -- a ball --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ball() -> dict[str, Any]:
    return run_page("31_ball")


@pytest.mark.slow
def test_projection_onto_the_ball_on_both_sides_of_the_switch(ball: dict[str, Any]) -> None:
    def project(s: Any) -> np.ndarray:
        theta = ball["offset"] + s * ball["direction"]
        return theta / max(np.linalg.norm(theta), 1)

    for i, s in enumerate(ball["s"]):
        assert abs(s - 0.8) > 1e-3  # the switch
        difference = (project(s + 1e-6) - project(s - 1e-6)) / 2e-6
        np.testing.assert_allclose(ball["slopes"][i], difference, atol=1e-8)


@pytest.mark.slow
def test_the_switch_is_told_and_the_inner_side_returned(ball: dict[str, Any]) -> None:
    assert [w.category for w in ball["caught"]] == [idf.RegularityWarning]
    assert "ineq[0] is weakly active" in str(ball["caught"][0].message)
    np.testing.assert_allclose(ball["at_switch"], np.eye(2), atol=1e-9)


@pytest.mark.slow
def test_barrier_is_smooth_and_tends_to_the_active_set(ball: dict[str, Any]) -> None:
    def place(s: float, t: float) -> np.ndarray:  # the radius as the root of a cubic
        theta = ball["offset"] + s * ball["direction"]
        size = np.linalg.norm(theta)
        radius = brentq(lambda r: t * (r - size) * (1 - r * r) + 2 * r, 0, 1, xtol=1e-15)
        return radius / size * theta

    errors = []
    for t, found in ball["smoothed"].items():
        for i in (0, 20, 33, 50):
            s = ball["s"][i]
            np.testing.assert_allclose(found[i], (place(s + 1e-6, t) - place(s - 1e-6, t)) / 2e-6, atol=1e-7)
        errors.append(np.abs(found - ball["closed"])[[0, 65]].max())  # far from the switch
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


# -- barrier against active set --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def barrier() -> dict[str, Any]:
    return run_page("32_barrier")


def test_active_set_solution_is_that_of_slsqp_and_its_differences(barrier: dict[str, Any]) -> None:
    M = barrier["M"]

    def solve(theta: Any) -> np.ndarray:
        return minimize(
            lambda y: 0.5 * (y - theta) @ M @ (y - theta), barrier["y"], jac=lambda y: M @ (y - theta), method="SLSQP",
            constraints=[
                {"type": "ineq", "fun": lambda y: 1 - y @ y, "jac": lambda y: -2 * y},
                {"type": "ineq", "fun": lambda y: 0.5 - y[0] - y[2], "jac": lambda y: np.array([-1.0, 0, -1])},
            ],
            options={"ftol": 1e-15, "maxiter": 200},
        ).x  # fmt: skip

    np.testing.assert_allclose(barrier["y"], solve(barrier["theta"]), atol=1e-7)
    assert np.all(barrier["mu"] > 0)
    np.testing.assert_allclose(barrier["jacobian"], central(solve, barrier["theta"], 1e-3), atol=1e-5)
    assert barrier["active_set_error"] < 1e-12


def test_barrier_converges_in_the_first_order(barrier: dict[str, Any]) -> None:
    for error in (barrier["error_y"], barrier["error_jacobian"]):
        slope = np.polyfit(np.log(barrier["weights"][4:]), np.log(error[4:]), 1)[0]
        assert slope == pytest.approx(-1, abs=0.02)
        assert error[-1] < 1e-5
