"""The families that are matrix-free or sparse: saddle system, fixed-point layer, grid, distillation."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from benchmarks.families import Instance, family, space
from implicitdiff import FixedPoint, Stationary

__all__ = ["distillation", "grid", "layer", "saddle"]


@family("saddle", (300, 3_000, 30_000, 300_000), "n", "a stationary point of a Lagrangian: symmetric, indefinite",
        (3_000_000,))  # fmt: skip
def saddle(n: int, rng: np.random.Generator) -> Instance:
    """½ Σ d u² + Σ p_i (u_i − u_{i+k} − θ_i) with u of 2k and p of k entries: solved by elimination."""
    k = n // 3
    d, theta, v = rng.uniform(1.0, 30.0, size=2 * k), rng.normal(size=k), rng.normal(size=3 * k)
    # d₁u₁ + p = 0, d₂u₂ − p = 0, u₁ − u₂ = θ, so p = −θ / (1/d₁ + 1/d₂)
    weight = 1 / (1 / d[:k] + 1 / d[k:])
    p = -theta * weight
    y = np.concatenate([-p / d[:k], p / d[k:], p])
    # y is linear in θ: the gradient is vᵀ dy/dθ
    truth = weight * (v[:k] / d[:k] - v[k : 2 * k] / d[k:] - v[2 * k :])

    def product(y: Any, theta: Any, x: Any, d: Any) -> Any:
        xp = space(y)
        u1, u2, p = x[:k], x[k : 2 * k], x[2 * k :]
        return xp.concat([d[:k] * u1 + p, d[k:] * u2 - p, u1 - u2])

    def objective(y: Any, theta: Any, d: Any) -> Any:
        xp = space(y)
        u = y[: 2 * k]
        return 0.5 * xp.sum(d * u * u) + xp.sum(y[2 * k :] * (y[:k] - y[k : 2 * k] - theta))

    def gradient(y: Any, theta: Any, d: Any) -> Any:
        xp = space(y)
        return product(y, theta, y, d) - xp.concat([xp.zeros_like(d), theta])

    given = {"grad": gradient, "hvp": product, "mixed_vjp": lambda y, theta, u, d: -u[2 * k :]}
    return Instance(
        3 * k, y, theta, v, (d,), truth,
        lambda autodiff: Stationary(objective, kind="saddle") if autodiff else Stationary(**given, kind="saddle"),
        product, solvers=("minres", "auto", "gmres", "ldlt"),
    )  # fmt: skip


@family("layer", (100, 1_000, 10_000), "n", "a fixed-point layer: not symmetric", (100_000, 1_000_000))
def layer(n: int, rng: np.random.Generator) -> Instance:
    """Solve y_i = tanh(0.5 a_i y_{i−1} − 0.4 b_i y_{i+1} + θ_i) on a ring."""
    a, b = rng.uniform(0.5, 1.0, size=(2, n))
    theta, v = rng.normal(size=n), rng.normal(size=n)

    def inner(y: Any, theta: Any, a: Any, b: Any) -> Any:
        xp = space(y)
        return 0.5 * a * xp.roll(y, 1) - 0.4 * b * xp.roll(y, -1) + theta

    def T(y: Any, theta: Any, a: Any, b: Any) -> Any:
        return space(y).tanh(inner(y, theta, a, b))

    y = np.zeros(n)
    for _ in range(400):
        y = T(y, theta, a, b)

    def slope(y: Any, theta: Any, a: Any, b: Any) -> Any:
        return 1 - T(y, theta, a, b) ** 2

    def jvp(y: Any, theta: Any, x: Any, a: Any, b: Any) -> Any:
        return slope(y, theta, a, b) * inner(x, 0 * theta, a, b)

    def vjp(y: Any, theta: Any, u: Any, a: Any, b: Any) -> Any:
        xp = space(y)
        w = slope(y, theta, a, b) * u
        return xp.roll(0.5 * a * w, -1) - xp.roll(0.4 * b * w, 1)

    s, index = 1 - y**2, np.arange(n)
    J = scipy.sparse.csc_array((np.concatenate([0.5 * a * s, -0.4 * b * s]),
                                (np.concatenate([index, index]), np.concatenate([(index - 1) % n, (index + 1) % n]))),
                               shape=(n, n))  # fmt: skip
    truth = s * scipy.sparse.linalg.splu((scipy.sparse.eye_array(n) - J).T.tocsc()).solve(v)
    given = {"jvp": jvp, "vjp": vjp, "mixed_vjp": lambda y, theta, u, a, b: slope(y, theta, a, b) * u}
    return Instance(
        n, y, theta, v, (a, b), truth, lambda autodiff: FixedPoint(T) if autodiff else FixedPoint(T, **given),
        lambda y, theta, x, a, b: x - vjp(y, theta, x, a, b), solvers=("gmres", "auto", "lu"),
    )  # fmt: skip


@family("grid", (900, 10_000, 90_000, 1_000_000), "n", "a robust Markov random field on a grid, sparse Hessian")
def grid(n: int, rng: np.random.Generator) -> Instance:
    """½ ‖y − θ‖² + Σ over neighbours of a pseudo-Huber function of their difference; θ is the image."""
    side = round(n**0.5)
    y, v = rng.normal(size=(side, side)), rng.normal(size=(side, side))

    def penalty(d: Any) -> Any:
        return space(d).sqrt(1 + d * d)

    def slope(d: Any) -> Any:
        return d / penalty(d)

    def spread(right: Any, down: Any) -> Any:  # the adjoint of the two differences
        xp = space(right)
        zero_column, zero_row = 0 * right[:, :1], 0 * down[:1, :]
        by_right = xp.concat([zero_column, right], axis=1) - xp.concat([right, zero_column], axis=1)
        return by_right + xp.concat([zero_row, down], axis=0) - xp.concat([down, zero_row], axis=0)

    def differences(y: Any) -> tuple[Any, Any]:
        return y[:, 1:] - y[:, :-1], y[1:, :] - y[:-1, :]

    def objective(y: Any, theta: Any) -> Any:
        xp = space(y)
        return 0.5 * xp.sum((y - theta) ** 2) + sum(xp.sum(penalty(d)) for d in differences(y))

    def gradient(y: Any, theta: Any) -> Any:
        return y - theta + spread(*(slope(d) for d in differences(y)))

    def product(y: Any, theta: Any, x: Any) -> Any:
        return x + spread(*(e / penalty(d) ** 3 for d, e in zip(differences(y), differences(x), strict=True)))

    theta = y + spread(*(slope(d) for d in differences(y)))  # the image whose denoised version is y
    hessian = _grid_hessian(side, [1 / penalty(d) ** 3 for d in differences(y)])
    found = scipy.sparse.linalg.splu(hessian).solve(v.ravel()) if n <= 100_000 else _tight(hessian, v.ravel())
    given = {"grad": gradient, "hvp": product, "mixed_vjp": lambda y, theta, u: -u}
    sparse = {**given, "hessian": lambda y, theta: hessian}
    return Instance(
        side * side, y, theta, v, (), found.reshape(side, side),
        lambda autodiff: Stationary(objective) if autodiff else Stationary(**(sparse if n <= 100_000 else given)),
        product, solvers=("cg", "auto", "lu", "minres"), most_dense=100_000,
    )  # fmt: skip


def _grid_hessian(side: int, weights: list[Any]) -> Any:
    number = np.arange(side * side).reshape(side, side)
    pairs = ((number[:, 1:], number[:, :-1]), (number[1:, :], number[:-1, :]))
    H = scipy.sparse.eye_array(side * side, format="csc")
    for (one, other), weight in zip(pairs, weights, strict=True):
        i, j, w = one.ravel(), other.ravel(), weight.ravel()
        entries = (np.concatenate([w, w, -w, -w]), (np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])))
        H = H + scipy.sparse.csc_array(entries, shape=H.shape)
    return H.tocsc()


def _tight(A: Any, b: Any) -> Any:
    x, info = scipy.sparse.linalg.cg(A, b, rtol=1e-14, atol=0.0, maxiter=10_000)
    if info:
        raise RuntimeError(f"SciPy's cg ended with info = {info}")
    return x


@family("distillation", (640, 7840), "n", "dataset distillation: ten synthetic images are the parameters")
def distillation(n: int, rng: np.random.Generator) -> Instance:
    """½ ‖θ W − I‖² + ½ λ ‖W‖²: ridge regression on ten images θ of n / 10 features, W of n / 10 × 10."""
    classes, decay, features = 10, 0.1, n // 10
    theta = rng.normal(size=(classes, features)) / features**0.5
    H = theta.T @ theta + decay * np.eye(features)
    W, v = np.linalg.solve(H, theta.T), rng.normal(size=(features, classes))
    U = np.linalg.solve(H, v)
    truth = -((theta @ W - np.eye(classes)) @ U.T + theta @ U @ W.T)

    def objective(W: Any, theta: Any) -> Any:
        xp = space(W)
        rest = theta @ W - xp.eye(classes, dtype=W.dtype)
        return 0.5 * xp.sum(rest * rest) + 0.5 * decay * xp.sum(W * W)

    def product(W: Any, theta: Any, V: Any) -> Any:
        return theta.T @ (theta @ V) + decay * V

    def mixed_vjp(W: Any, theta: Any, U: Any) -> Any:
        return (theta @ W - space(W).eye(classes, dtype=W.dtype)) @ U.T + theta @ U @ W.T

    given = {"grad": lambda W, theta: product(W, theta, W) - theta.T, "hvp": product, "mixed_vjp": mixed_vjp}
    return Instance(
        features * classes, W, theta, v, (), truth,
        lambda autodiff: Stationary(objective) if autodiff else Stationary(**given), product,
        solvers=("cg", "auto", "minres"),
    )  # fmt: skip
