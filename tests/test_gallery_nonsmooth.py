"""The pages about robust pooling and optimal transport, against closed forms and other solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import run_page
from scipy.optimize import minimize_scalar


# -- pooling -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pooling() -> dict[str, Any]:
    return run_page("71_robust_pooling")


PENALTIES = {
    "quadratic": lambda z: z**2 / 2,
    "pseudo-Huber": lambda z: np.sqrt(1 + z**2) - 1,
    "Huber": lambda z: np.where(np.abs(z) < 1, z**2 / 2, np.abs(z) - 0.5),
    "Welsch": lambda z: -np.expm1(-(z**2) / 2),
    "truncated": lambda z: np.minimum(z**2, 1) / 2,
}
CURVATURES = {
    "quadratic": np.ones_like,
    "pseudo-Huber": lambda z: (1 + z**2) ** -1.5,
    "Huber": lambda z: np.where(np.abs(z) < 1, 1.0, 0.0),
    "Welsch": lambda z: (1 - z**2) * np.exp(-(z**2) / 2),
    "truncated": lambda z: np.where(np.abs(z) < 1, 1.0, 0.0),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_pooled_value_minimises_and_its_derivative_is_the_closed_form(pooling: dict[str, Any], name: str) -> None:
    for i in (0, 60, 120, 200):  # none of them within 0.1 of a kink
        x, y = pooling["x"][i], pooling["pooled"][name][i]
        objective = lambda y, x=x: np.sum(PENALTIES[name](y - x))
        near = minimize_scalar(objective, bounds=(y - 0.05, y + 0.05), method="bounded", options={"xatol": 1e-10})
        assert y == pytest.approx(near.x, abs=1e-6)
        curvature = CURVATURES[name](y - x)
        assert pooling["slopes"][name][i] == pytest.approx(curvature[-1] / curvature.sum(), abs=1e-12)


def test_derivatives_are_differences_of_the_pooled_value(pooling: dict[str, Any]) -> None:
    for name, share in pooling["agreement"].items():
        assert share >= (200 / 201 if name == "truncated" else 1), name
    assert pooling["slopes"]["Welsch"].min() < -0.05  # an outlier may push y away from itself
    assert np.all(pooling["slopes"]["quadratic"] == pytest.approx(0.1))


def test_at_the_kink_the_sides_differ_and_the_smooth_neighbour_lies_between(pooling: dict[str, Any]) -> None:
    inside, outside, smooth = pooling["at_kink"].values()
    assert inside == pytest.approx(1 / 10, abs=1e-12)
    assert outside == pytest.approx(0, abs=1e-12)
    assert 0.01 < smooth < inside - 0.01
    assert "Hessian is zero" in pooling["message"]


def test_smoothed_median_converges(pooling: dict[str, Any]) -> None:
    widths, errors = pooling["widths"], np.array(pooling["median_errors"])
    assert np.all(np.diff(errors) < 0)
    # φ″ is 1/ε at the median and ε²/z³ elsewhere: the error falls as ε³
    slope = np.polyfit(np.log(widths[-4:]), np.log(errors[-4:]), 1)[0]
    assert slope == pytest.approx(3, abs=0.05)


# -- optimal transport -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def transport() -> dict[str, Any]:
    return run_page("72_optimal_transport")


def plain_sinkhorn(theta: dict[str, Any], eps: float) -> np.ndarray:
    """Plan by Sinkhorn's iteration as it was published: scalings of exp(−C/ε), no logarithms."""
    K = np.exp(-theta["C"] / eps)
    v = np.ones_like(theta["b"])
    for _ in range(20000):
        u = theta["a"] / (K @ v)
        new = theta["b"] / (K.T @ u)
        done, v = np.abs(new / v - 1).max() < 1e-14, new
        if done:
            break
    return u[:, None] * K * v


def test_plan_and_marginals(transport: dict[str, Any]) -> None:
    P, theta = transport["P"], transport["theta"]
    np.testing.assert_allclose(P, plain_sinkhorn(theta, transport["eps"]), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(P.sum(axis=1), theta["a"], atol=1e-13)
    np.testing.assert_allclose(P.sum(axis=0), theta["b"], atol=1e-13)


@pytest.mark.parametrize("entry", [(5, 20), (10, 24), (30, 36), (12, 12)])
def test_gradient_of_the_cost_by_a_cost_entry(transport: dict[str, Any], entry: tuple[int, int]) -> None:
    theta = transport["theta"]

    def cost(change: float) -> float:
        C = theta["C"].copy()
        C[entry] += change
        return float(np.sum(plain_sinkhorn({**theta, "C": C}, transport["eps"]) * C))

    difference = (cost(1e-5) - cost(-1e-5)) / 2e-5
    assert transport["of_cost"]["C"][entry] == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_change_of_the_plan_along_a_shift_of_mass(transport: dict[str, Any]) -> None:
    theta, tangent = transport["theta"], transport["tangent"]
    ahead, back = (
        plain_sinkhorn({**theta, "a": theta["a"] + h * tangent["a"]}, transport["eps"]) for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(transport["change"], (ahead - back) / 2e-6, atol=1e-7)
    np.testing.assert_allclose(transport["change"].sum(axis=1), tangent["a"], atol=1e-12)
    np.testing.assert_allclose(transport["change"].sum(axis=0), 0, atol=1e-12)


def test_envelope_and_the_flat_direction(transport: dict[str, Any]) -> None:
    np.testing.assert_allclose(transport["of_objective"]["C"], transport["P"], atol=1e-12)
    np.testing.assert_allclose(transport["of_objective"]["a"], transport["y"]["f"], atol=1e-12)
    assert transport["difference_error"] < 1e-7
    assert "singular" in transport["message"]
