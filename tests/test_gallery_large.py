"""The pages about the diagonal of the Hessian and about inexact solutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import run_page
from sklearn.datasets import load_diabetes

import implicitdiff as idf


# -- the diagonal of the Hessian -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def diagonal() -> dict[str, Any]:
    return run_page("81_diagonal")


@pytest.mark.slow
def test_gradient_of_each_penalty_against_differences(diagonal: dict[str, Any]) -> None:
    train, held = diagonal["data"](0.9)
    theta = np.full(300, np.log(30.0))

    def loss(theta: np.ndarray) -> float:  # least squares with the penalty as further rows, not the normal equations
        X = np.concatenate([train[0], np.diag(np.exp(theta / 2))])
        w = np.linalg.lstsq(X, np.concatenate([train[1], np.zeros(300)]), rcond=None)[0]
        return float(np.mean((held[0] @ w - held[1]) ** 2))

    w = diagonal["fit"](theta, *train)
    gradient, _ = diagonal["direction"](w, theta, train, held, "cg")
    for j in (0, 7, 150, 299):
        e = np.zeros(300)
        e[j] = 1e-3
        assert gradient[j] == pytest.approx((loss(theta + e) - loss(theta - e)) / 2e-3, rel=1e-4, abs=1e-7)
    assert max(diagonal["gradient_errors"]) < 1e-8


def test_angles_of_the_diagonal_direction(diagonal: dict[str, Any]) -> None:
    train, held = diagonal["data"](0.9)
    A = train[0].T @ train[0] + 30 * np.eye(300)
    w = np.linalg.solve(A, train[0].T @ train[1])
    v = held[0].T @ (held[0] @ w - held[1])
    exact, shortcut = w * np.linalg.solve(A, v), w * v / np.diag(A)
    cosine = exact @ shortcut / np.linalg.norm(exact) / np.linalg.norm(shortcut)
    found = dict(zip(diagonal["correlations"], diagonal["angles"], strict=True))
    assert found[0.9] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-6)
    assert 20 < found[0.0] < found[0.6] < found[0.95] < 90


def test_the_shortcut_is_told_as_an_approximation(diagonal: dict[str, Any]) -> None:
    report = diagonal["report"]
    assert report.status is idf.Status.APPROXIMATE
    assert not report.converged
    assert report.residual > 0.5
    assert "hessian-diagonal" in idf.solver_names()


def test_the_gradient_descends_further_than_the_shortcut(diagonal: dict[str, Any]) -> None:
    exact, shortcut = diagonal["exact_losses"], diagonal["shortcut_losses"]
    assert np.all(np.diff(exact) < 0)
    assert exact[-1] < shortcut[-1] < shortcut[0] == exact[0]


# -- inexact solutions -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inexact() -> dict[str, Any]:
    return run_page("82_inexact_solutions")


def test_error_of_the_jacobian_has_slope_one_and_obeys_the_bound(inexact: dict[str, Any]) -> None:
    error_y, error = inexact["error_y"], inexact["error_implicit"]
    slope = np.polyfit(np.log10(error_y), np.log10(error), 1)[0]
    assert slope == pytest.approx(1, abs=0.02)
    assert error_y[0] / error_y[-1] > 1e3  # over three decades
    X, _ = load_diabetes(return_X_y=True)
    smallest = np.linalg.svd(X, compute_uv=False)[-1] ** 2 + 0.1
    assert np.all(error <= error_y / smallest)


def test_error_of_the_jacobian_is_the_one_in_closed_form(inexact: dict[str, Any]) -> None:
    # J(ŷ) − J(y) = −A⁻¹ diag(ŷ − y), since A does not depend on y; ŷ by gradient descent in the eigenvectors of A
    X, t = load_diabetes(return_X_y=True)
    t = (t - t.mean()) / t.std()
    values, vectors = np.linalg.eigh(X.T @ X + 0.1 * np.eye(10))
    y = vectors @ (vectors.T @ (X.T @ t) / values)
    steps = 20 * np.arange(1, len(inexact["error_y"]) + 1)
    for k, iterations in list(enumerate(steps))[::8]:
        difference = -vectors @ ((1 - values / values[-1]) ** iterations * (vectors.T @ y))
        inverse = vectors @ np.diag(1 / values) @ vectors.T
        assert inexact["error_y"][k] == pytest.approx(np.linalg.norm(difference), rel=1e-6)
        assert inexact["error_implicit"][k] == pytest.approx(np.linalg.norm(inverse * difference), rel=1e-6)


def test_unrolling_is_worse_at_every_iterate_and_falls_behind(inexact: dict[str, Any]) -> None:
    ratio = inexact["error_unrolled"] / inexact["error_implicit"]
    assert ratio.min() > 2
    assert ratio[-1] > 10
