"""The bi-level page, with the lower problems solved anew by SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import run_page
from scipy.optimize import minimize

pytestmark = pytest.mark.slow  # the pages themselves run with the documentation


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return run_page("41_bilevel")


def most_likely(theta: dict[str, Any]) -> np.ndarray:
    """Argmax of each class over the unit ball, by SLSQP."""
    a, b = theta["a"], theta["b"]
    ball = {"type": "ineq", "fun": lambda x: 1 - x @ x, "jac": lambda x: -2 * x}
    points = []
    for i in range(len(b)):

        def negative(x: Any, i: int = i) -> tuple[Any, Any]:
            logits = a @ x + b
            p = np.exp(logits - logits.max())
            return np.log(p.sum()) - logits[i] + logits.max(), p @ a / p.sum() - a[i]

        options = {"ftol": 1e-16, "maxiter": 300}
        points.append(minimize(negative, np.zeros(2), jac=True, method="SLSQP", constraints=ball, options=options).x)
    return np.array(points)


@pytest.mark.parametrize("m", [3, 5, 8])
def test_points_are_the_most_likely_ones_and_reach_their_targets(page: dict[str, Any], m: int) -> None:
    run = page["runs"][m]
    np.testing.assert_allclose(run["before"], most_likely(run["start"]), atol=1e-6)
    np.testing.assert_allclose(run["after"], most_likely(run["theta"]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(run["targets"], axis=1), 1)
    gaps = np.linalg.norm(run["targets"] - np.roll(run["targets"], 1, axis=0), axis=1)
    np.testing.assert_allclose(gaps, 2 * np.sin(np.pi / m))
    assert run["losses"][0] > 1
    assert np.linalg.norm(run["after"] - run["targets"], axis=1).max() < 0.05


def test_slope_along_a_direction_against_the_problems_solved_anew(page: dict[str, Any]) -> None:
    run, direction = page["runs"][5], page["direction"]

    def loss(step: float) -> float:
        moved = {name: run["start"][name] + step * direction[name] for name in direction}
        return 0.5 * float(np.sum((most_likely(moved) - run["targets"]) ** 2))

    assert page["slope"] == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=1e-3)
    assert page["slope"] == pytest.approx(page["difference"], rel=1e-6)


def test_both_kinds_of_lower_solution_occur(page: dict[str, Any]) -> None:
    radii = np.linalg.norm(page["runs"][8]["before"], axis=1)
    assert np.sum(radii < 0.9) == 1  # inside: the constraint is not active
    assert np.sum(np.abs(radii - 1) < 1e-12) == 7


# -- distilled data ----------------------------------------------------------------------------------------
def trained_by_scipy(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax regression on ten images of the digits 0 to 9 with the page's decay."""
    X, Y = np.hstack([images, np.ones((10, 1))]), np.eye(10)

    def both(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = X @ w.reshape(65, 10)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        return -np.mean(np.log(np.sum(p * Y, axis=1))) + 0.005 * w @ w, (X.T @ (p - Y) / 10).ravel() + 0.01 * w

    options = {"ftol": 1e-16, "gtol": 1e-10, "maxiter": 5000, "maxfun": 10_000}
    w = minimize(both, np.zeros(650), jac=True, method="L-BFGS-B", options=options).x.reshape(65, 10)
    return w[:64], w[64]


def real_loss(images: np.ndarray, x: np.ndarray, one_hot: np.ndarray) -> float:
    W, b = trained_by_scipy(images)
    z = x @ W + b
    top = z.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.sum(np.exp(z - top), axis=1)) + top[:, 0] - np.sum(z * one_hot, axis=1)))


def test_learned_images_train_a_classifier_and_their_gradient_is_that_of_training_anew() -> None:
    page = run_page("42_distillation")
    W, b = trained_by_scipy(page["found"].theta)
    x, one_hot = page["unseen"]
    read = np.mean(np.argmax(x @ W + b, axis=1) == np.argmax(one_hot, axis=1))
    assert read == pytest.approx(page["scores"]["ten learned"], abs=0.005)
    assert read > page["scores"]["ten real"] + 0.2
    ends = [real_loss(page["found"].theta + h * page["direction"], *page["seen"]) for h in (1e-3, -1e-3)]
    slope = float(np.sum(page["gradient"] * page["direction"]))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)  # which SciPy's own tolerance leaves of it
