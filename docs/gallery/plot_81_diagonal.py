"""
The diagonal of the Hessian as a descent direction
==================================================

The gradient of a loss L through the minimum y of f(y, θ) is −Bᵀ u with A u = ∂L/∂y. A common shortcut for
large problems divides by the diagonal of the Hessian A in place of solving with A. That costs nothing, and
gives another direction than the gradient. This page makes the shortcut a solver, and measures the angle
between the two directions and what the shortcut costs a descent.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf


# %%
# The solver is a few lines. ``Status.APPROXIMATE`` says that it never claims to have solved the system. Under
# its name it can be chosen anywhere.
@dataclass(frozen=True)
class Diagonal(idf.Solver):
    """Divide by the diagonal of A."""

    entries: Any = None
    name: ClassVar[str] = "hessian-diagonal"
    approximate: ClassVar[bool] = True

    def init(self, operator):
        return np.diagonal(operator.dense()) if self.entries is None else self.entries

    def transpose(self, state):
        return state

    def solve(self, state, b, x0=None):
        return b / state, idf.Status.APPROXIMATE, idf.Counts()


idf.register_solver("hessian-diagonal", Diagonal)

# %%
# Ridge regression with 300 features and a penalty exp(θⱼ) for each. Neighbouring features have the
# correlation ρ. Half of the features have no effect, so that some penalties should grow and others shrink.


def data(rho, n=300, rows=450):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2 * rows, n))
    X = np.empty_like(noise)
    X[:, 0] = noise[:, 0]
    for j in range(1, n):
        X[:, j] = rho * X[:, j - 1] + np.sqrt(1 - rho**2) * noise[:, j]
    effects = rng.normal(size=n) * (np.arange(n) % 2)
    t = X @ effects + 5 * rng.normal(size=2 * rows)
    return (X[:rows], t[:rows]), (X[rows:], t[rows:])


def hessian(theta, X):
    return X.T @ X + np.diag(np.exp(theta))


def fit(theta, X, t):
    return np.linalg.solve(hessian(theta, X), X.T @ t)


ridge = idf.Stationary(
    grad=lambda w, theta, X, t: X.T @ (X @ w - t) + np.exp(theta) * w,
    hvp=lambda w, theta, v, X, t: X.T @ (X @ v) + np.exp(theta) * v,
    mixed_vjp=lambda w, theta, u, X, t: np.exp(theta) * w * u,
)


def validation(w, held):
    return np.mean((held[0] @ w - held[1]) ** 2)


def direction(w, theta, train, held, solver):
    cotangent = 2 * held[0].T @ (held[0] @ w - held[1]) / held[1].size
    return idf.implicit_vjp(
        ridge, w, theta, cotangent, args=train, solver=solver, return_report=True
    )


def angle(a, b):
    return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


# %%
# The angle between the shortcut and the gradient grows with the correlation. Conjugate gradients give the
# gradient without forming A, and are checked against the closed form −exp(θ) ∘ w ∘ A⁻¹ ∂L/∂w.
theta = np.full(300, np.log(30.0))
correlations = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
angles, gradient_errors = [], []
for rho in correlations:
    train, held = data(rho)
    w = fit(theta, *train)
    exact, cg_report = direction(w, theta, train, held, "cg")
    shortcut, report = direction(w, theta, train, held, "hessian-diagonal")
    v = 2 * held[0].T @ (held[0] @ w - held[1]) / held[1].size
    closed = -np.exp(theta) * w * np.linalg.solve(hessian(theta, train[0]), v)
    gradient_errors.append(np.abs(exact - closed).max() / np.abs(closed).max())
    angles.append(angle(exact, shortcut))
    print(
        f"rho = {rho:4.2f}: angle {angles[-1]:4.1f} degrees, {cg_report.iterations} CG iterations"
    )
print(
    f"gradient against the closed form: largest relative error {max(gradient_errors):.1e}"
)
print(f"the shortcut ends {report.status.name} with a residual of {report.residual:.2f}")

# %%
# Descent on the validation loss at ρ = 0.9: 40 steps of the same length along either direction. Below 90
# degrees the shortcut goes downhill too. It gets less far. Its diagonal is known here without forming A: the
# sums of squares of the columns, plus the penalties. (300 penalties are tuned on the loss that is shown, so it
# may fall below 25, the variance of the noise.)
train, held = data(0.9)
squares = np.sum(train[0] ** 2, axis=0)


def descend(solver_at, steps=40, length=1.0):
    theta = np.full(300, np.log(30.0))
    losses = [validation(fit(theta, *train), held)]
    for _ in range(steps):
        w = fit(theta, *train)
        gradient, _ = direction(w, theta, train, held, solver_at(theta))
        theta = theta - length * gradient / np.linalg.norm(gradient)
        losses.append(validation(fit(theta, *train), held))
    return np.array(losses)


exact_losses = descend(lambda theta: "cholesky")
shortcut_losses = descend(lambda theta: Diagonal(squares + np.exp(theta)))
print(
    f"validation loss {exact_losses[0]:.2f}, after 40 steps along the gradient {exact_losses[-1]:.2f},"
)
print(f"along the shortcut {shortcut_losses[-1]:.2f}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(correlations, angles, "o-")
left.axhline(90, color="k", linewidth=0.7, linestyle=":")
left.text(0.0, 87, "beyond: uphill", va="top")
left.set(
    xlabel="correlation of neighbouring features",
    ylabel="angle to the gradient (degrees)",
    ylim=(0, 95),
    title="direction of the shortcut",
)
right.plot(exact_losses, label="gradient")
right.plot(shortcut_losses, label="diagonal of the Hessian")
right.set(
    xlabel="step", ylabel="validation loss", title="descent with steps of equal length"
)
right.legend()
