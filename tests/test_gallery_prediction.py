"""The pages about structured prediction, against the problems solved anew by Newton's method in NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
from helpers_gallery import central, run_page
from scipy.sparse.linalg import spsolve

pytestmark = pytest.mark.slow  # the pages themselves run with the documentation


# -- denoising -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def denoising() -> dict[str, Any]:
    return run_page("51_denoising")


def difference_operators(n: int) -> list[Any]:
    """Sparse matrices that take differences to the right, below and on both diagonals of an n by n image."""
    index = np.arange(n * n).reshape(n, n)
    pairs = [
        (index[:, 1:], index[:, :-1]),
        (index[1:], index[:-1]),
        (index[1:, 1:], index[:-1, :-1]),
        (index[1:, :-1], index[:-1, 1:]),
    ]
    eye = scipy.sparse.eye_array(n * n, format="csr")
    return [eye[a.ravel()] - eye[b.ravel()] for a, b in pairs]


def denoise_robust(parameters: Any, x: np.ndarray) -> np.ndarray:
    """Newton's method, with halved steps, on the energy with the penalty √(z² + ε²)."""
    weights, eps = np.exp(parameters[:4]), np.exp(parameters[4])
    operators, flat = difference_operators(len(x)), x.ravel()

    def energy(y: Any) -> float:
        return 0.5 * np.sum((y - flat) ** 2) + sum(
            w * np.sum(np.sqrt((D @ y) ** 2 + eps**2)) for w, D in zip(weights, operators, strict=True)
        )

    y = flat.copy()
    for _ in range(100):
        gradient, H = y - flat, scipy.sparse.eye_array(flat.size, format="csc")
        for w, D in zip(weights, operators, strict=True):
            z = D @ y
            root = np.sqrt(z**2 + eps**2)
            gradient = gradient + w * (D.T @ (z / root))
            H = H + w * (D.T @ scipy.sparse.diags_array(eps**2 / root**3) @ D)
        step, size = spsolve(H.tocsc(), gradient), 1.0
        while size > 1e-6 and energy(y - size * step) > energy(y) - 1e-4 * size * (gradient @ step):
            size /= 2
        y = y - size * step
        if np.abs(gradient).max() < 1e-11:
            break
    return y.reshape(x.shape)


def test_denoising_gradient_against_the_image_found_by_newton(denoising: dict[str, Any]) -> None:
    noisy, clean, start = denoising["noisy"], denoising["clean"], denoising["start"]
    parameters = np.append(start["weights"], start["eps"])
    loss = lambda p: 0.5 * np.sum((denoise_robust(p, noisy) - clean) ** 2)
    found = np.append(denoising["gradient"]["weights"], denoising["gradient"]["eps"])
    np.testing.assert_allclose(found, central(loss, parameters, 1e-4), rtol=2e-6)
    assert denoising["value"] == pytest.approx(loss(parameters), rel=1e-8)


def test_gaussian_energy_against_its_closed_form(denoising: dict[str, Any]) -> None:
    weights, noisy, clean = np.log([0.3, 0.2, 0.1, 0.4]), denoising["noisy"], denoising["clean"]
    operators = difference_operators(24)

    def system(weights: Any) -> np.ndarray:
        return np.eye(576) + sum(np.exp(w) * (D.T @ D).toarray() for w, D in zip(weights, operators, strict=True))

    y = np.linalg.solve(system(weights), noisy.ravel())
    adjoint = np.linalg.solve(system(weights), y - clean.ravel())
    expected = [-np.exp(w) * adjoint @ (D.T @ (D @ y)) for w, D in zip(weights, operators, strict=True)]
    _, gradient, report = denoising["value_and_gradient"](denoising["gaussian"], {"weights": weights})
    np.testing.assert_allclose(gradient["weights"], expected, rtol=1e-6)
    assert report.converged


def test_learned_energies_denoise_an_image_that_they_have_not_seen(denoising: dict[str, Any]) -> None:
    theta = denoising["learned"][denoising["robust"]]
    y = denoise_robust(np.append(theta["weights"], theta["eps"]), denoising["test_noisy"])
    quality = -10 * np.log10(np.mean((y - denoising["test_clean"]) ** 2))
    assert quality == pytest.approx(denoising["quality"]["robust"], abs=0.01)
    assert denoising["quality"]["noisy"] + 2 < denoising["quality"]["gaussian"] < denoising["quality"]["robust"] - 2


# -- a log-linear model ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def log_linear() -> dict[str, Any]:
    return run_page("52_log_linear_model")


def newton_softmax(penalty: np.ndarray, X: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Newton's method with the Hessian written by hand."""
    n, k = X.shape[1], 10
    W, onehot = np.zeros((n, k)), np.eye(k)[c]
    for _ in range(12):
        p = np.exp(X @ W)
        p /= p.sum(axis=1, keepdims=True)
        gradient = X.T @ (p - onehot) + penalty[:, None] * W
        weights = p[:, :, None] * np.eye(k) - p[:, :, None] * p[:, None, :]
        # of all pairs of classes at once: Xᵀ diag(weights) X
        H = np.stack([[(X * weights[:, a, b, None]).T @ X for b in range(k)] for a in range(k)])
        H = H.transpose(2, 0, 3, 1).reshape(n * k, n * k) + np.diag(np.repeat(penalty, k))
        W = W - np.linalg.solve(H, gradient.ravel()).reshape(n, k)
    return W


def held_out_loss(W: np.ndarray, X: np.ndarray, c: np.ndarray) -> float:
    logits = X @ W
    return float(np.mean(np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(len(c)), c]))


def test_gradient_of_the_penalties_against_the_refitted_model(log_linear: dict[str, Any]) -> None:
    train, tune = log_linear["train"], log_linear["tune"]
    gradient = log_linear["start_gradient"]
    largest = int(np.argmax(np.abs(gradient)))
    e = np.zeros(64)
    e[largest] = 1e-3
    ahead, back = (held_out_loss(newton_softmax(np.exp(s * e), *train), *tune) for s in (1, -1))
    assert gradient[largest] == pytest.approx((ahead - back) / 2e-3, rel=1e-5)
    constant = np.ptp(train[0], axis=0) == 0
    assert constant.sum() > 3
    assert np.all(np.abs(gradient[constant]) < 1e-12)  # the weights of a pixel that is always 0 are 0
    assert log_linear["start_gradient"] @ log_linear["direction"] == pytest.approx(log_linear["difference"], rel=1e-3)


def test_a_penalty_each_is_better_on_data_not_used_for_tuning(log_linear: dict[str, Any]) -> None:
    each, common = log_linear["fits"]["a penalty each"], log_linear["fits"]["one common penalty"]
    assert held_out_loss(each, *log_linear["tune"]) < 0.8 * held_out_loss(common, *log_linear["tune"])
    assert held_out_loss(each, *log_linear["test"]) < held_out_loss(common, *log_linear["test"])


# -- truncated fitting -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def truncated() -> dict[str, Any]:
    return run_page("53_truncated_fitting")


def refit(page: dict[str, Any], theta: Any) -> np.ndarray:
    X, s = page["train"]
    y = np.zeros(30)
    for _ in range(30):
        p = 1 / (1 + np.exp(s * (X @ y)))
        H = (X.T * (p * (1 - p))) @ X + np.diag(np.exp(theta))
        y = y - np.linalg.solve(H, -X.T @ (s * p) + np.exp(theta) * y)
    return y


def test_exact_gradient_against_the_refitted_model(truncated: dict[str, Any]) -> None:
    X, s = truncated["held"]
    loss = lambda theta: np.sum(np.logaddexp(0, -s * (X @ refit(truncated, theta))))
    np.testing.assert_allclose(truncated["exact"], central(loss, truncated["theta"], 1e-4), rtol=1e-5, atol=1e-7)


def test_hessian_products_by_differences(truncated: dict[str, Any]) -> None:
    errors = np.array(truncated["difference_errors"])
    assert errors.min() < 2e-6  # the solver was asked for 1e-6
    assert errors[0] > 20 * errors.min()  # rounding
    assert errors[-1] > 1e4 * errors.min()  # curvature
    assert truncated["own_error"] < 1e-7
    assert truncated["report"].derivatives["A"] == "finite differences"


def test_truncated_fitting_falls_behind_the_implicit_gradient(truncated: dict[str, Any]) -> None:
    errors = {name: np.array(values) for name, values in truncated["errors"].items()}
    through, implicit = errors["through K steps"], errors["implicit, at K steps"]
    assert np.all(np.diff(through) < 0)
    assert np.all(np.diff(implicit) < 0)
    assert np.all(implicit < through)
    assert implicit[-1] < through[-1] / 3
    # one step from 0 is −rate ∇f(0), and the penalty of 0 does not enter: the derivative is zero
    assert through[0] == pytest.approx(1, abs=1e-12)
