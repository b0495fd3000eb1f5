"""The page about argmin and argmax, against roots found numerically and differences of re-solved problems."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import central, run_page
from scipy.optimize import brentq, minimize


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return run_page("11_argmin")


def test_three_stationary_points(page: dict[str, Any]) -> None:
    for i in (0, 31, 79):
        x = page["x"][i]
        # the derivative in y of x y⁴ + 2 x² y³ − 12 y², as the coefficients of a polynomial
        roots = np.sort(np.roots([4 * x, 6 * x**2, -24, 0]).real)
        found = np.sort([page["branches"][name][i] for name in page["branches"]])
        np.testing.assert_allclose(found, roots, atol=1e-10)
    assert page["scalar_error"] < 1e-12


@pytest.mark.parametrize("name", ["upper", "lower"])
def test_slopes_are_differences_of_the_roots(page: dict[str, Any], name: str) -> None:
    x, y, slope = (values[20] for values in (page["x"], page["branches"][name], page["slopes"][name]))

    def root(x: Any) -> float:
        derivative = lambda y: 4 * x * y**3 + 6 * x**2 * y**2 - 24 * y
        return brentq(derivative, y - 0.3, y + 0.3, xtol=1e-13)

    assert float(slope) == pytest.approx(float(central(root, x, 1e-5)), rel=1e-7)
    assert page["slopes"]["y = 0"][20] == 0


def test_vector_argmin_against_the_minimum_found_again(page: dict[str, Any]) -> None:
    a = page["a"]

    def solve(x: Any) -> np.ndarray:  # x (y − a) + exp(y) = 0, each component by bisection
        return np.array([brentq(lambda y, a=a: x * (y - a) + np.exp(y), -20, 20, xtol=1e-13) for a in a])

    np.testing.assert_allclose(page["vector_derivative"], central(solve, 1.7, 1e-5), rtol=1e-7)
    assert page["vector_error"] < 1e-13


def test_influence_of_each_datum_against_the_maximum_found_again(page: dict[str, Any]) -> None:
    t = page["t"]

    def solve(weights: Any) -> np.ndarray:
        def negative(y: Any) -> float:
            return float(np.sum(weights * 0.5 * ((t - y[0]) ** 2 * np.exp(-y[1]) + y[1])))

        def slope(y: Any) -> np.ndarray:
            scaled = (t - y[0]) * np.exp(-y[1])
            return np.array([-np.sum(weights * scaled), 0.5 * np.sum(weights * (1 - scaled * (t - y[0])))])

        return minimize(negative, np.array([1.0, 1.0]), jac=slope, method="BFGS", options={"gtol": 1e-11}).x

    np.testing.assert_allclose(page["influence"], central(solve, page["weights"], 1e-3), rtol=1e-4, atol=1e-6)
    assert page["argmax_error"] < 1e-14
    assert page["report"].solver == "lu"  # a maximum has no Cholesky factor
