"""The pages about layers in Torch and JAX, against the same layers written anew in NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import run_page
from scipy.optimize import minimize

pytestmark = pytest.mark.slow


# -- a quadratic program in Torch ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def quadratic() -> dict[str, Any]:
    pytest.importorskip("torch")
    pytest.importorskip("clarabel")
    return run_page("33_qp_layer_torch")


def test_divisions_are_those_of_scipy(quadratic: dict[str, Any]) -> None:
    Q, c = quadratic["Q"].numpy(), quadratic["c_new"][:4]
    found = quadratic["divide"](c).numpy()
    sums = {"type": "eq", "fun": lambda y: y.sum() - 1, "jac": np.ones_like}
    for y, gain in zip(found, c.numpy(), strict=True):
        anew = minimize(
            lambda y, gain=gain: 0.5 * y @ Q @ y - gain @ y,
            np.full(len(y), 1 / len(y)),
            jac=lambda y, gain=gain: Q @ y - gain,
            bounds=[(0, None)] * len(y),
            constraints=sums,
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(y, anew.x, atol=1e-5)


def test_slope_of_the_cost_and_what_training_gains(quadratic: dict[str, Any]) -> None:
    assert float(quadratic["slope"]) == pytest.approx(float(quadratic["difference"]), rel=1e-6)
    assert quadratic["regrets"][-1] < quadratic["regrets"][0] / 4


# -- an equilibrium layer in JAX -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def equilibrium() -> dict[str, Any]:
    pytest.importorskip("jax")
    return run_page("65_equilibrium_layer_jax")


def output(theta: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Iterate the layer of the page, written anew, at one place after another."""
    W = 0.95 * theta["W"] / np.sqrt(2 * (1 + np.sum(theta["W"] ** 2)))
    units = len(theta["U"])
    z = np.zeros((len(x) + 2, units))  # with the zeros at both ends
    for _ in range(300):
        for place in range(1, len(x) + 1):
            z[place] = np.tanh(np.r_[z[place - 1], z[place + 1]] @ W + x[place - 1] * theta["U"] + theta["b"])
    return z[3:-3] @ theta["v"]


def test_outputs_of_the_layer(equilibrium: dict[str, Any]) -> None:
    theta = {name: np.asarray(value) for name, value in equilibrium["trained"].items()}
    new = np.asarray(equilibrium["new"])
    found = np.asarray(equilibrium["predictions"](equilibrium["trained"], equilibrium["new"]))
    np.testing.assert_allclose(found[0], output(theta, new[0]), rtol=1e-7)


def test_slope_of_the_loss_and_what_training_gains(equilibrium: dict[str, Any]) -> None:
    assert float(equilibrium["slope"]) == pytest.approx(float(equilibrium["difference"]), rel=1e-6)
    assert equilibrium["losses"][-1] < 1e-2 * equilibrium["losses"][0]
