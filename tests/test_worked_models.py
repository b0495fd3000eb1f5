"""Worked examples with matrices: ridge, softmax maximum likelihood, a network as a triangular root, a baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from conftest import GENERAL, Library

import implicitdiff as idf
from implicitdiff.backends.numpy import NumpyBackend


# -- ridge regression --------------------------------------------------------------------------------------
def ridge_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    X = rng.standard_normal((30, 6)) * np.array([1.0, 3.0, 0.3, 2.0, 1.0, 0.5])
    t = X @ np.array([1.0, -0.5, 2.0, 0.0, 0.3, -1.0]) + 0.3 * rng.standard_normal(30)
    return X, t, np.array([0.5, 2.0, 0.1, 7.0, 1.0, 0.02])


RIDGE = idf.Stationary(
    grad=lambda w, penalty, X, t: X.T @ (X @ w - t) + penalty * w,
    hvp=lambda w, penalty, v, X, t: X.T @ (X @ v) + penalty * v,
    hessian=None,
    mixed_vjp=lambda w, penalty, u, X, t: w * u,
    mixed_jvp=lambda w, penalty, tangent, X, t: w * tangent,
)


def test_ridge_gradient_jacobian_and_products_against_the_closed_form(lib: Library, solver: str) -> None:
    X, t, penalty = ridge_data()
    H = X.T @ X + np.diag(penalty)
    w = np.linalg.solve(H, X.T @ t)
    jacobian = -np.linalg.solve(H, np.diag(w))  # from H dw + diag(w) dpenalty = 0; not symmetric
    data = lib.array(X), lib.array(t)
    lin = idf.linearize(RIDGE, lib.array(w), lib.array(penalty), args=data, solver=solver)
    v, tangent = np.linspace(-1, 2, 6), np.linspace(3, 1, 6)
    np.testing.assert_allclose(lib.numpy(lin.jacobian()), jacobian, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(lib.numpy(lin.vjp(lib.array(v))), jacobian.T @ v, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(lib.numpy(lin.jvp(lib.array(tangent))), jacobian @ tangent, rtol=1e-7, atol=1e-9)
    assert lin.report.converged
    assert lin.report.derivatives == {"A": "given", "B": "given"}


@pytest.mark.parametrize("solver", ["cholesky", "cg", "auto"])
def test_ridge_validation_gradient_against_differences_of_the_closed_form(solver: str) -> None:
    X, t, penalty = ridge_data()
    train, held = (X[:20], t[:20]), (X[20:], t[20:])

    def fit(penalty: np.ndarray) -> np.ndarray:
        return np.linalg.solve(train[0].T @ train[0] + np.diag(penalty), train[0].T @ train[1])

    def loss(w: Any, penalty: Any) -> Any:
        return ((held[0] @ w - held[1]) ** 2).sum() + 0.01 * (penalty**2).sum()

    g = idf.implicit_grad(RIDGE, loss, fit(penalty), penalty, args=train, solver=solver)
    step = 1e-5
    numeric = [
        (loss(fit(penalty + step * e), penalty + step * e) - loss(fit(penalty - step * e), penalty - step * e))
        / (2 * step)
        for e in np.eye(6)
    ]
    np.testing.assert_allclose(g, numeric, rtol=1e-6, atol=1e-7)


def test_ridge_jacobian_with_respect_to_targets_and_data_as_a_dict() -> None:
    X, t, penalty = ridge_data()

    def objective(w: Any, theta: dict[str, Any]) -> Any:
        return 0.5 * anp.sum((theta["X"] @ w - theta["t"]) ** 2) + 0.5 * anp.sum(penalty * w**2)

    H = X.T @ X + np.diag(penalty)
    w = np.linalg.solve(H, X.T @ t)
    found = idf.implicit_jacobian(objective, w, {"X": X, "t": t}, backend=NumpyBackend("autograd"))
    residual = X @ w - t
    inverse = np.linalg.inv(H)
    # δ(Xᵀ(X w − t)) = δXᵀ r + Xᵀ δX w
    by_X = -(np.einsum("ab,i->aib", inverse, residual) + np.einsum("ai,b->aib", inverse @ X.T, w))
    np.testing.assert_allclose(found["t"], inverse @ X.T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found["X"], by_X, rtol=1e-10, atol=1e-13)


# -- softmax maximum likelihood ----------------------------------------------------------------------------
def multinomial(y: Any, counts: Any) -> Any:
    """Log-likelihood of class counts under softmax of the logits (y, 0)."""
    logits = anp.concatenate([y, anp.zeros(1)])
    return anp.sum(counts * logits) - anp.sum(counts) * anp.log(anp.sum(anp.exp(logits)))


@pytest.mark.parametrize("solver", ["lu", "minres", "gmres", "auto"])
def test_softmax_maximum_likelihood_of_counts(solver: str) -> None:
    # softmax(y, 0) = counts / Σ counts, hence y_k = log(c_k / c_K): a maximum, with asymmetric dy/dc
    counts = np.array([5.0, 1.0, 9.0, 3.0])
    y = np.log(counts[:-1] / counts[-1])
    found = idf.implicit_jacobian(multinomial, y, counts, solver=solver)
    expected = np.concatenate([np.diag(1 / counts[:-1]), np.full((3, 1), -1 / counts[-1])], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def softmax_regression(W: Any, theta: dict[str, Any], X: Any, labels: Any) -> Any:
    """Negative log-likelihood of weighted samples with a penalty per feature."""
    logits = X @ W
    likelihood = logits[np.arange(labels.size), labels] - anp.log(anp.sum(anp.exp(logits), axis=1))
    return -anp.sum(theta["weights"] * likelihood) + 0.5 * anp.sum(theta["penalty"][:, None] * W**2)


def fit_softmax(theta: dict[str, np.ndarray], X: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Newton's method with derivatives written by hand, far beyond the accuracy that the test asks for."""
    n, k = X.shape[1], int(labels.max()) + 1
    W, onehot = np.zeros((n, k)), np.eye(k)[labels]
    for _ in range(30):
        p = np.exp(X @ W)
        p /= p.sum(axis=1, keepdims=True)
        g = X.T @ (theta["weights"][:, None] * (p - onehot)) + theta["penalty"][:, None] * W
        middle = theta["weights"][:, None, None] * (np.einsum("ia,ab->iab", p, np.eye(k)) - p[:, :, None] * p[:, None])
        H = np.einsum("ij,iab,il->jalb", X, middle, X).reshape(n * k, n * k)
        H += np.diag(np.repeat(theta["penalty"], k))
        W = W - np.linalg.solve(H, g.ravel()).reshape(n, k)
    return W


def test_softmax_regression_against_differences_of_the_refitted_problem(solver: str) -> None:
    rng = np.random.default_rng(3)
    X, labels = rng.standard_normal((25, 4)), rng.integers(0, 3, 25)
    theta = {"weights": rng.uniform(0.5, 2, 25), "penalty": np.array([0.3, 1.0, 2.0, 0.7])}
    C = rng.standard_normal((4, 3))
    W = fit_softmax(theta, X, labels)
    grad = idf.implicit_vjp(softmax_regression, W, theta, C, args=(X, labels), solver=solver)
    step = 1e-5
    for key in theta:
        for i in range(min(theta[key].size, 5)):
            plus, minus = ({**theta, key: theta[key] + s * step * np.eye(theta[key].size)[i]} for s in (1, -1))
            numeric = np.sum(C * (fit_softmax(plus, X, labels) - fit_softmax(minus, X, labels))) / (2 * step)
            assert grad[key][i] == pytest.approx(numeric, rel=1e-6, abs=1e-9)


# -- back-propagation as a triangular root -----------------------------------------------------------------
def network() -> tuple[list[dict[str, np.ndarray]], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    sizes = [3, 5, 4, 2]
    layers = [{"W": rng.standard_normal((b, a)), "b": rng.standard_normal(b)} for a, b in pairwise(sizes)]
    return layers, rng.standard_normal(3), rng.standard_normal(2)


def activations(layers: Any, x: Any) -> list[Any]:
    found = []
    for layer in layers:
        x = anp.tanh(layer["W"] @ x + layer["b"])
        found.append(x)
    return found


def layer_residuals(z: list[Any], layers: Any, x: Any) -> list[Any]:
    """z_i − tanh(W_i z_{i−1} + b_i): lower triangular in the activations, with ones on the diagonal."""
    before = [x, *z[:-1]]
    return [zi - anp.tanh(layer["W"] @ a + layer["b"]) for zi, layer, a in zip(z, layers, before, strict=True)]


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("mode", ["autograd", "complex_step"])
def test_backpropagation_is_the_adjoint_of_a_triangular_root(solver: str, mode: str) -> None:
    layers, x, target = network()
    z = activations(layers, x)
    found, report = idf.implicit_grad(
        idf.Root(layer_residuals), lambda z, layers: anp.sum((z[-1] - target) ** 2), z, layers, args=(x,),
        solver=solver, backend=NumpyBackend(mode), return_report=True,
    )  # fmt: skip
    ordinary = grad(lambda layers: anp.sum((activations(layers, x)[-1] - target) ** 2))(layers)
    for got, expected in zip(found, ordinary, strict=True):
        np.testing.assert_allclose(got["W"], expected["W"], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(got["b"], expected["b"], rtol=1e-8, atol=1e-11)
    assert report.solver == ("lu" if solver == "auto" else solver)


def test_the_network_really_is_triangular() -> None:
    layers, x, _ = network()
    z = np.concatenate(activations(layers, x))

    def flat(y: Any, layers: Any) -> Any:
        return anp.concatenate(layer_residuals([y[:5], y[5:9], y[9:]], layers, x))

    A = np.stack([(flat(z + 1e-30j * e, layers)).imag / 1e-30 for e in np.eye(11)], axis=1)
    assert not np.any(np.triu(A, 1))
    np.testing.assert_array_equal(np.diag(A), np.ones(11))
    assert np.any(np.tril(A, -1))


# -- the diagonal of the Hessian in place of the Hessian ----------------------------------------------------
@dataclass(frozen=True)
class Diagonal(idf.Solver):
    """Divide by the diagonal of A: an approximation, and told as one."""

    name: ClassVar[str] = "diagonal"

    def init(self, operator: Any) -> np.ndarray:
        return np.diagonal(operator.dense())

    def transpose(self, state: np.ndarray) -> np.ndarray:
        return state

    def solve(self, state: np.ndarray, b: np.ndarray, x0: Any = None) -> tuple[np.ndarray, idf.Status, idf.Counts]:
        return b / state, idf.Status.APPROXIMATE, idf.Counts()


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two directions in degrees."""
    return math.degrees(math.acos(float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))))


def hypergradients(X: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, idf.Report]:
    """Of the loss on held-out rows: by the library, by the diagonal baseline, and the exact one in closed form."""
    penalty = ridge_data()[2]
    train, held = (X[:20], t[:20]), (X[20:], t[20:])
    H = train[0].T @ train[0] + np.diag(penalty)
    w = np.linalg.solve(H, train[0].T @ train[1])
    v = 2 * held[0].T @ (held[0] @ w - held[1])
    exact = idf.implicit_vjp(RIDGE, w, penalty, v, args=train, solver="cholesky")
    baseline, report = idf.implicit_vjp(RIDGE, w, penalty, v, args=train, solver=Diagonal(), return_report=True)
    np.testing.assert_allclose(baseline, -w * v / np.diag(H), rtol=1e-12)
    return exact, baseline, -w * np.linalg.solve(H, v), report


def test_diagonal_hessian_baseline_against_the_exact_direction(record_property: Any) -> None:
    X, t, _ = ridge_data()
    mixing = np.eye(6) + 0.8 * np.triu(np.ones((6, 6)), 1)  # correlated features: the off-diagonal part matters
    exact, baseline, closed, report = hypergradients(X @ mixing, t)
    np.testing.assert_allclose(exact, closed, rtol=1e-9)
    degrees = angle(exact, baseline)
    record_property("angle between the baseline and the exact direction, degrees", round(degrees, 2))
    assert degrees > 10  # a different direction, not only another length
    assert report.status is idf.Status.APPROXIMATE
    assert not report.converged
    assert report.residual > 0.1
    assert report.solver == "diagonal"


def test_diagonal_hessian_baseline_is_exact_for_orthogonal_features() -> None:
    X, t, _ = ridge_data()
    Q = np.linalg.qr(X[:20])[0] * np.array([1.0, 3.0, 0.3, 2.0, 1.0, 0.5])
    exact, baseline, _, report = hypergradients(np.concatenate([Q, X[20:]]), t)
    np.testing.assert_allclose(baseline, exact, rtol=1e-9)
    assert report.status is idf.Status.APPROXIMATE  # by design, however small the residual happens to be
    assert report.residual < 1e-12
