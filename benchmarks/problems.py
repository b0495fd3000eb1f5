"""Problems with a known or independently computed derivative, on NumPy, each made from a seed.

Every problem gives the callables of a condition, a solution, and what SciPy or NumPy need to do the same by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from implicitdiff import Root, Stationary

__all__ = ["Batch", "Diagonal", "Logistic", "Penalties", "Quadratic", "Ridge", "System", "relative_error"]

Array = NDArray[Any]


def relative_error(found: Array, truth: Array) -> float:
    """‖found − truth‖ / ‖truth‖ over all entries; infinite where the shapes differ."""
    if found.shape != truth.shape:
        return float("inf")
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class Logistic:
    """Multinomial logistic regression with one L2 penalty exp(θ_j) per feature; n = 5 p, m = p.

    f(W, θ) = cross entropy of softmax(X W), summed, + ½ Σ_j exp(θ_j) ‖W_j‖²; the outer loss is the cross entropy of
    a validation set. The probabilities at the solution are data: they change with W only, so the caller computes
    them once, not in each of the products.
    """

    classes = 5

    def __init__(self, features: int, samples: int = 700, seed: int = 0) -> None:
        self.samples = samples
        rng = np.random.default_rng(seed)
        true = rng.normal(size=(features, self.classes)) / np.sqrt(features)
        self.X, self.Y = self._data(rng, true)
        validation_X, validation_Y = self._data(rng, true)
        self.theta = rng.uniform(np.log(0.3), np.log(30.0), size=features)
        self.W = self._fit()
        self.P = softmax(self.X @ self.W)
        self.args = (self.X, self.Y, self.P)
        self.cotangent = validation_X.T @ (softmax(validation_X @ self.W) - validation_Y)
        self.condition = Stationary(grad=self.grad, hvp=self.hvp, mixed_vjp=self.mixed_vjp)
        self.n = self.W.size

    def _data(self, rng: np.random.Generator, true: Array) -> tuple[Array, Array]:
        X = rng.normal(size=(self.samples, len(true)))
        labels = np.argmax(3 * X @ true + rng.gumbel(size=(self.samples, self.classes)), axis=1)
        return X, np.eye(self.classes)[labels]

    @staticmethod
    def grad(W: Array, theta: Array, X: Array, Y: Array, P: Array) -> Array:
        """∇_W f."""
        return X.T @ (softmax(X @ W) - Y) + np.exp(theta)[:, None] * W

    @staticmethod
    def hvp(W: Array, theta: Array, V: Array, X: Array, Y: Array, P: Array) -> Array:
        """Product with the Hessian."""
        Z = P * (X @ V)
        Z -= P * Z.sum(axis=1, keepdims=True)
        return X.T @ Z + np.exp(theta)[:, None] * V

    @staticmethod
    def mixed_vjp(W: Array, theta: Array, U: Array, X: Array, Y: Array, P: Array) -> Array:
        """Bᵀ u."""
        return np.exp(theta) * (W * U).sum(axis=1)

    def product(self) -> Array:
        """One Hessian-vector product: the unit of cost."""
        return self.hvp(self.W, self.theta, self.cotangent, *self.args)

    def by_scipy(self, rtol: float) -> tuple[Array, int]:
        """The gradient through SciPy's CG, and the number of its products."""
        shape, count = self.W.shape, 0

        def matvec(v: Array) -> Array:
            nonlocal count
            count += 1
            return self.hvp(self.W, self.theta, v.reshape(shape), *self.args).ravel()

        operator = LinearOperator((self.n, self.n), matvec=matvec, dtype=np.float64)
        u, info = cg(operator, self.cotangent.ravel(), rtol=rtol, atol=0.0, maxiter=10 * self.n)
        if info:
            raise RuntimeError(f"SciPy's cg ended with info = {info}")
        return -self.mixed_vjp(self.W, self.theta, u.reshape(shape), *self.args), count

    @cached_property
    def truth(self) -> Array:
        """The gradient through an assembled Hessian where that is cheap, else through a tight solve."""
        if self.n > 2000:
            return self.by_scipy(1e-13)[0]
        unit = np.eye(self.n).reshape(self.n, *self.W.shape)
        H = np.stack([self.hvp(self.W, self.theta, e, *self.args).ravel() for e in unit])
        u = np.linalg.solve(H, self.cotangent.ravel()).reshape(self.W.shape)
        return -self.mixed_vjp(self.W, self.theta, u, *self.args)

    def _objective(self, W: Array) -> float:
        scores = self.X @ W
        top = scores.max(axis=1)
        entropy = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top - (scores * self.Y).sum(axis=1)
        return float(entropy.sum() + 0.5 * (np.exp(self.theta) @ W**2).sum())

    def _fit(self) -> Array:
        """Newton's method with steps from SciPy's CG."""
        W = np.zeros((self.X.shape[1], self.classes))
        size = np.linalg.norm(self.X.T @ self.Y)
        for _ in range(50):
            P = softmax(self.X @ W)
            g = self.grad(W, self.theta, self.X, self.Y, P)
            if np.linalg.norm(g) <= 1e-11 * size:
                return W

            def matvec(v: Array, W: Array = W, P: Array = P) -> Array:
                return self.hvp(W, self.theta, v.reshape(W.shape), self.X, self.Y, P).ravel()

            operator = LinearOperator((W.size, W.size), matvec=matvec, dtype=np.float64)
            step = cg(operator, -g.ravel(), rtol=1e-4, maxiter=1000)[0].reshape(W.shape)
            length, here = 1.0, self._objective(W)
            while self._objective(W + length * step) > here + 1e-12 * abs(here) and length > 1e-3:
                length /= 2
            W = W + length * step
        raise RuntimeError("the inner problem was not solved")


class Quadratic:
    """f(y, θ) = ½ yᵀ H y − yᵀ C θ with dense H and C: dy/dθ = H⁻¹ C."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        G = rng.normal(size=(n, n))
        self.A = G @ G.T / n + np.eye(n)
        self.C = rng.normal(size=(n, n))
        self.theta = rng.normal(size=n)
        self.y = np.linalg.solve(self.A, self.C @ self.theta)
        self.args = (self.A, self.C)
        self.condition = Stationary(
            grad=lambda y, theta, A, C: A @ y - C @ theta, hessian=self.matrix, mixed_jvp=self.mixed_jvp,
            mixed_vjp=lambda y, theta, u, A, C: -(C.T @ u),
        )  # fmt: skip

    @staticmethod
    def matrix(y: Array, theta: Array, A: Array, C: Array) -> Array:
        """∂F/∂y."""
        return A

    @staticmethod
    def mixed_jvp(y: Array, theta: Array, t: Array, A: Array, C: Array) -> Array:
        """B t."""
        return -(C @ t)

    @cached_property
    def truth(self) -> Array:
        """dy/dθ."""
        return np.linalg.solve(self.A, self.C)


class System(Quadratic):
    """F(y, θ) = A y − C θ with A that is not symmetric."""

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__(n, seed)
        self.A = self.A + 0.5 * np.triu(self.C, 1)
        self.y = np.linalg.solve(self.A, self.C @ self.theta)
        self.args = (self.A, self.C)
        self.condition: Any = Root(
            lambda y, theta, A, C: A @ y - C @ theta, jacobian=self.matrix, mixed_jvp=self.mixed_jvp,
            mixed_vjp=lambda y, theta, u, A, C: -(C.T @ u),
        )  # fmt: skip


class Ridge:
    """Ridge regression with one penalty per feature: A = XᵀX + diag θ, B = diag y, so assembling B is nearly free."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        X, target = rng.normal(size=(2 * n, n)), rng.normal(size=2 * n)
        self.A0, self.b = X.T @ X, X.T @ target
        self.theta = rng.uniform(0.5, 5.0, size=n) * n
        self.args = (self.A0, self.b)
        self.y = np.linalg.solve(self.matrix(self.b, self.theta, *self.args), self.b)
        self.condition = Stationary(
            grad=lambda y, theta, A0, b: A0 @ y + theta * y - b, hessian=self.matrix, mixed_jvp=self.mixed_jvp,
            mixed_vjp=lambda y, theta, u, A0, b: y * u,
        )  # fmt: skip

    @staticmethod
    def matrix(y: Array, theta: Array, A0: Array, b: Array) -> Array:
        """∂F/∂y."""
        return A0 + np.diag(theta)

    @staticmethod
    def mixed_jvp(y: Array, theta: Array, t: Array, A0: Array, b: Array) -> Array:
        """B t."""
        return y * t

    @cached_property
    def truth(self) -> Array:
        """dy/dθ."""
        return -np.linalg.solve(self.matrix(self.y, self.theta, *self.args), np.diag(self.y))


class Batch:
    """Independent problems f(y, θ) = ½ yᵀ H y − yᵀ C θ, all of order n, with their Hessians at hand."""

    def __init__(self, items: int, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        G = rng.normal(size=(items, n, n))
        self.H = G @ np.matrix_transpose(G) / n + np.eye(n)
        self.C = rng.normal(size=(items, n, n))
        self.theta, self.cotangent = rng.normal(size=(2, items, n))
        self.y = np.linalg.solve(self.H, self.C @ self.theta[..., None])[..., 0]
        self.condition = Stationary(
            grad=lambda y, theta, H, C: (H @ y[..., None] - C @ theta[..., None])[..., 0],
            hessian=lambda y, theta, H, C: H,
            mixed_vjp=lambda y, theta, u, H, C: -(u[..., None, :] @ C)[..., 0, :],
        )

    def by_numpy(self) -> Array:
        """Cᵀ H⁻¹ v for the whole batch."""
        u = np.linalg.solve(self.H, self.cotangent[..., None])[..., 0]
        return (u[..., None, :] @ self.C)[..., 0, :]


class Penalties:
    """Ridge regression at many settings of its penalties: f(y, θ) = ½ yᵀ H y + ½ Σ_j exp(θ_j) y_j² − cᵀ y.

    H and c are the same for all items, θ is not: A = H + diag exp θ and B = diag(exp(θ) y).
    """

    def __init__(self, items: int, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        X, target = rng.normal(size=(2 * n, n)), rng.normal(size=2 * n)
        self.H, self.c = X.T @ X / (2 * n), X.T @ target / (2 * n)
        self.args = (self.H, self.c)
        self.theta = rng.uniform(np.log(0.1), np.log(10.0), size=(items, n))
        self.cotangent = rng.normal(size=(items, n))
        self._A = self.H + np.exp(self.theta)[:, :, None] * np.eye(n)
        self.y = np.linalg.solve(self._A, np.broadcast_to(self.c, (items, n))[..., None])[..., 0]

    @cached_property
    def truth(self) -> Array:
        """−B A⁻¹ v for the whole batch."""
        return -np.exp(self.theta) * self.y * np.linalg.solve(self._A, self.cotangent[..., None])[..., 0]


@dataclass
class Diagonal:
    """f(y, θ) = ½ yᵀ D y − θ cᵀ y with a diagonal D: a product that allocates its result and nothing else."""

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.d = rng.uniform(1.0, 10.0, size=self.n)
        self.c, self.cotangent = rng.normal(size=(2, self.n))
        self.theta = np.array([2.0])
        self.y = 2.0 * self.c / self.d
        self.condition = Stationary(
            grad=lambda y, theta: self.d * y - theta * self.c,
            hvp=lambda y, theta, v: self.d * v,
            mixed_vjp=lambda y, theta, u: -np.dot(self.c, u)[None],
        )

    @cached_property
    def truth(self) -> Array:
        """The gradient."""
        return np.array([np.sum(self.c * self.cotangent / self.d)])
