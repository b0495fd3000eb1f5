"""The pages about roots and fixed points, against differences of re-solved problems and a published number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_gallery import central, run_page
from scipy.optimize import brentq

import implicitdiff as idf


# -- a conservation law ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def conservation() -> dict[str, Any]:
    return run_page("61_conservation_law")


def burgers(x: float, t: float, a: float) -> float:
    """Root of u − a exp(−(x − u t)²/2) by bisection: unique before the first shock."""
    return brentq(lambda u: u - a * np.exp(-((x - u * t) ** 2) / 2), -0.1, 1.1 * a, xtol=1e-14)


@pytest.mark.parametrize("i", [40, 90, 135, 150, 200])
def test_burgers_against_the_root_found_again(conservation: dict[str, Any], i: int) -> None:
    x, t, a = conservation["x"][i], conservation["t"], conservation["a"]
    assert conservation["u"][i] == pytest.approx(burgers(x, t, a), abs=1e-12)
    differences = central(lambda p: burgers(*p), np.array([x, t, a]), 1e-5)
    found = [conservation["du"][name][i] for name in ("x", "t", "a")]
    np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-8)


def test_burgers_obeys_its_own_law_and_the_mass_stays(conservation: dict[str, Any]) -> None:
    du, u = conservation["du"], conservation["u"]
    assert np.abs(du["t"] + u * du["x"]).max() < 1e-13
    assert np.abs(du["x"]).max() > 2  # close to the shock
    # the mass a √(2π) is conserved, so that the derivatives in t and in a integrate to 0 and to √(2π)
    step = np.diff(conservation["x"])[0]
    assert np.sum(du["t"]) * step == pytest.approx(0, abs=0.02)
    assert np.sum(du["a"]) * step == pytest.approx(np.sqrt(2 * np.pi), rel=0.01)


# -- Kepler -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kepler() -> dict[str, Any]:
    return run_page("62_kepler")


def test_kepler_gives_the_published_anomaly(kepler: dict[str, Any]) -> None:
    assert kepler["example_E"] == pytest.approx(5.554589, abs=5e-7)


@pytest.mark.parametrize("e", [0.2, 0.6, 0.9])
def test_kepler_against_newton_and_its_differences(kepler: dict[str, Any], e: float) -> None:
    E, dE, _ = kepler["solved"][e]
    M = np.array([0.3, 1.2, 2.6])

    def newton(parameters: Any) -> np.ndarray:
        e, M = parameters[0], parameters[1:]
        E = M + e
        for _ in range(60):
            E = E - (E - e * np.sin(E) - M) / (1 - e * np.cos(E))
        return E

    at = [np.argmin(np.abs(kepler["M"] - m)) for m in M]
    point = np.concatenate([[e], kepler["M"][at]])
    np.testing.assert_allclose(E[at], newton(point), rtol=1e-12)
    differences = central(newton, point, 1e-6)
    np.testing.assert_allclose(dE["e"][at], differences[:, 0], rtol=1e-7)
    np.testing.assert_allclose(dE["M"][at], np.diagonal(differences[:, 1:]), rtol=1e-7)


# -- a deep equilibrium layer ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def equilibrium() -> dict[str, Any]:
    return run_page("63_equilibrium_layer")


def layer_output(theta: dict[str, Any], x: Any) -> Any:
    """Iterate the layer of the page, written anew, for one sample after another."""
    W = 0.9 * theta["W"] / np.sqrt(1 + np.sum(theta["W"] ** 2))
    out = []
    for sample in x:
        z = np.zeros(len(W))
        for _ in range(500):
            z = np.tanh(W @ z + theta["U"] * sample + theta["b"])
        out.append(theta["v"] @ z)
    return np.array(out)


@pytest.mark.parametrize("name", ["W", "U", "b", "v"])
def test_gradient_of_the_layer_against_differences(equilibrium: dict[str, Any], name: str) -> None:
    start, gradient = equilibrium["start"], equilibrium["gradient"]
    x, target = equilibrium["x"], equilibrium["target"]
    loss = lambda value: np.mean((layer_output({**start, name: value}, x) - target) ** 2)
    index = (1, 2) if name == "W" else (3,)
    e = np.zeros_like(start[name])
    e[index] = 1e-5
    difference = (loss(start[name] + e) - loss(start[name] - e)) / 2e-5
    assert gradient[name][index] == pytest.approx(difference, rel=1e-6)


def test_the_layer_learns(equilibrium: dict[str, Any]) -> None:
    error = np.mean((layer_output(equilibrium["trained"], equilibrium["x"]) - equilibrium["target"]) ** 2)
    assert error == pytest.approx(equilibrium["losses"][-1], rel=1e-6)
    assert error < 1e-2 * equilibrium["losses"][0]


# -- back-propagation ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def network() -> dict[str, Any]:
    return run_page("64_backpropagation")


def test_adjoint_is_back_propagation_written_by_hand(network: dict[str, Any]) -> None:
    z, layers = network["z"], network["layers"]
    before = [network["x"], *z[:-1]]
    delta = 2 * (z[-1] - network["target"])
    adjoint, gradients = [], []
    for zi, zb, layer in zip(reversed(z), reversed(before), reversed(layers), strict=True):
        adjoint.insert(0, delta)
        local = delta * (1 - zi**2)  # tanh' = 1 − tanh²
        gradients.insert(0, {"W": np.outer(local, zb), "b": local})
        delta = layer["W"].T @ local
    np.testing.assert_allclose(network["adjoint"], np.concatenate(adjoint), rtol=1e-12, atol=1e-14)
    for found, expected in zip(network["gradient"], gradients, strict=True):
        np.testing.assert_allclose(found["W"], expected["W"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found["b"], expected["b"], rtol=1e-12, atol=1e-14)


def test_the_system_of_the_network_is_unit_lower_triangular(network: dict[str, Any]) -> None:
    A = network["A"]
    assert not np.any(np.triu(A, 1))
    np.testing.assert_array_equal(np.diag(A), np.ones(len(A)))
    assert np.abs(np.tril(A, -1)).max() > 0.1
    assert network["error"] < 1e-12
    assert network["error_lu"] < 1e-12
    assert network["report"].status is idf.Status.CONVERGED
