"""
Barrier against active set
==========================

The barrier problem min t f(y, θ) − Σ log(−gᵢ(y, θ)) has the derivative

    dy/dθ = −(t f_YY − φ_YY)⁻¹ (t f_XY − φ_XY),   φ = Σ log(−gᵢ),

with Y for y and X for θ [1]_. As t grows, its minimum tends to that of the constrained problem, and its
derivative to the one of the active set, both in the first order in 1/t.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf

# %%
# The weighted distance to θ on a half ball: g₁ = ‖y‖² − 1 and g₂ = y₁ + y₃ − ½. Both are active here.
M = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 3.0]])
theta = np.array([1.8, -1.6, 0.6])


def f(y, theta):
    return 0.5 * anp.dot(y - theta, anp.dot(M, y - theta))


def g(y, theta):
    return anp.array([anp.sum(y**2) - 1, y[0] + y[2] - 0.5])


# %%
# The constrained solution by Newton's method on the conditions of its active set, with both multipliers
# positive. The derivative by hand is the solution of the same linear system.
y, mu = np.array([0.5, -0.8, 0.0]), np.ones(2)
for _ in range(50):
    J = np.array([2 * y, [1.0, 0.0, 1.0]])
    K = np.block([[M + 2 * mu[0] * np.eye(3), J.T], [J, np.zeros((2, 2))]])
    step = np.linalg.solve(K, np.concatenate([M @ (y - theta) + J.T @ mu, g(y, theta)]))
    y, mu = y - step[:3], mu - step[3:]
by_hand = np.linalg.solve(K, np.concatenate([M, np.zeros((2, 3))]))[:3]
jacobian = idf.implicit_jacobian(idf.KKT(f, ineq=g), y, theta)
active_set_error = np.abs(jacobian - by_hand).max()
print(f"multipliers {mu.round(4)}")
print(f"active set: largest error {active_set_error:.0e}")

# %%
# The barrier problem by Newton's method, from each t to the next.


def barrier_derivatives(y, t):
    J, values = np.array([2 * y, [1.0, 0.0, 1.0]]), g(y, theta)
    gradient = t * M @ (y - theta) - J.T @ (1 / values)
    hessian = t * M + (J.T / values**2) @ J - 2 * np.eye(3) / values[0]
    return gradient, hessian


def barrier_value(y, t):
    return (
        t * f(y, theta) - np.sum(np.log(-g(y, theta)))
        if np.all(g(y, theta) < 0)
        else np.inf
    )


z = np.array([0.1, -0.3, 0.0])
weights = 10.0 ** np.arange(1, 6.1, 0.5)
error_y, error_jacobian = [], []
for t in weights:
    for _ in range(100):
        gradient, hessian = barrier_derivatives(z, t)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (
            barrier_value(z - size * step, t) > barrier_value(z, t) + 1e-12 * t
            and size > 1e-8
        ):
            size /= 2
        z = z - size * step
        if np.linalg.norm(step) < 1e-14:
            break
    found = idf.implicit_jacobian(idf.LogBarrier(f, ineq=g, t=t), z, theta)
    error_y.append(np.linalg.norm(z - y))
    error_jacobian.append(np.linalg.norm(found - jacobian))

# %%
# The slopes on logarithmic axes.
slope_y, slope_jacobian = (
    np.polyfit(np.log(weights[4:]), np.log(error[4:]), 1)[0]
    for error in (error_y, error_jacobian)
)
print(f"slope of the error of y {slope_y:.3f}, of dy/dθ {slope_jacobian:.3f}")

# %%
fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
ax.loglog(weights, error_y, "o-", markersize=4, label=f"y, slope {slope_y:.2f}")
ax.loglog(
    weights,
    error_jacobian,
    "s-",
    markersize=4,
    label=f"dy/dθ, slope {slope_jacobian:.2f}",
)
ax.set(
    xlabel="weight t of the objective", ylabel="distance from the constrained solution"
)
ax.set(title="barrier against active set")
ax.legend()

# %%
# References
# ----------
# .. [1] S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
#    optimization", 2016. `arXiv:1607.05447 <https://arxiv.org/abs/1607.05447>`_
