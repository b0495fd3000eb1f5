"""
Argmin and argmax, one parameter or many
========================================

A stationary point y of f(y, x) satisfies ∂f/∂y = 0. Differentiating this with respect to x gives, for a scalar y,

    dy/dx = − (∂²f/∂x∂y) / (∂²f/∂y²),

and for a vector y the same with the Hessian in place of the second derivative: dy/dx = −A⁻¹ B with A = ∂²f/∂y² and
B = ∂²f/∂y∂x. It holds at a minimum, a maximum and a saddle point alike.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import lambertw

import implicitdiff as idf

# %%
# A scalar function with three stationary points
# ----------------------------------------------
# f(y, x) = x y⁴ + 2 x² y³ − 12 y² [1]_. For every x > 0 its derivative in y vanishes at three points:
#
#     | y = 0, a maximum;
#     | y = (−3 x² ± s) / 4x with s = √(9 x⁴ + 96 x), two minima.


def f(y, x):
    return x * y**4 + 2 * x**2 * y**3 - 12 * y**2


x = np.linspace(0.4, 4, 80)
s = np.sqrt(9 * x**4 + 96 * x)
branches = {
    "y = 0": 0 * x,
    "upper": (-3 * x**2 + s) / (4 * x),
    "lower": (-3 * x**2 - s) / (4 * x),
}

# %%
# The 80 problems of a branch do not depend on one another, so they are one call with ``batched=True``: ``f`` takes and
# returns the axis of problems. The derivative along the tangent 1 is dy/dx.
slopes = {
    name: idf.implicit_jvp(f, y, x, np.ones_like(x), batched=True, solver="lu")
    for name, y in branches.items()
}

# %%
# The closed form, by differentiating the roots.
ds = (36 * x**3 + 96) / (2 * s)
closed = {
    "y = 0": 0 * x,
    "upper": -0.75 + (x * ds - s) / (4 * x**2),
    "lower": -0.75 - (x * ds - s) / (4 * x**2),
}
scalar_error = max(np.abs(slopes[name] - closed[name]).max() for name in branches)
print(f"dy/dx of the three branches: largest error {scalar_error:.1e}")

# %%
# All branches over x, and their derivatives.
colours = {"y = 0": "tab:gray", "upper": "tab:blue", "lower": "tab:orange"}
fig, (level, slice_, slope) = plt.subplots(
    1, 3, figsize=(10.5, 3.6), layout="constrained"
)
grid_x, grid_y = np.meshgrid(np.linspace(0.4, 4, 200), np.linspace(-7, 4, 300))
level.contour(
    grid_x,
    grid_y,
    np.arcsinh(f(grid_y, grid_x)),
    24,
    cmap="Greys_r",
    linewidths=0.6,
    alpha=0.7,
)
for name, y in branches.items():
    level.plot(x, y, color=colours[name], label=name, linewidth=2)
    slope.plot(x, closed[name], color=colours[name], label=f"{name}, closed form")
    slope.plot(x[::5], slopes[name][::5], "o", color=colours[name], markersize=4)
    at = np.interp(1.0, x, y)
    slice_.plot(at, f(at, 1.0), "o", color=colours[name])
level.set(xlabel="x", ylabel="y", title="stationary points y(x) on levels of f")
level.legend(loc="lower left", fontsize="small")
line = np.linspace(-4.6, 2.8, 200)
slice_.plot(line, f(line, 1.0), "k", linewidth=1)
slice_.set(xlabel="y", ylabel="f(y, 1)", title="f at x = 1")
slope.set(
    xlabel="x", ylabel="dy/dx", ylim=(-6, 3), title="derivatives (dots: implicitdiff)"
)
slope.legend(loc="lower right", fontsize="small")

# %%
# A vector, one parameter
# -----------------------
# y minimises ½ x ‖y − a‖² + Σ exp(yᵢ). By hand, y = a − w and dy/dx = w / (x (1 + w)), where w = W(exp(a) / x) is
# Lambert's function.


def penalised(y, x, a):
    return 0.5 * x * anp.sum((y - a) ** 2) + anp.sum(anp.exp(y))


a = np.array([-1.0, 0.0, 1.0, 2.0])
x_0 = np.array(1.7)
w = lambertw(np.exp(a) / x_0).real
vector_derivative = idf.implicit_jacobian(penalised, a - w, x_0, args=(a,))
vector_error = np.abs(vector_derivative - w / (x_0 * (1 + w))).max()
print("dy/dx =", vector_derivative.round(6), f" largest error {vector_error:.1e}")

# %%
# A maximum, many parameters
# --------------------------
# Maximum likelihood of a normal distribution, with a weight θᵢ for each datum and y = (mean, logarithm of the
# variance). Nothing changes for a maximum. The derivative with respect to a weight tells how much a datum pulls the
# estimate: by hand
#
#     | d mean/dθᵢ = (tᵢ − mean) / Σθ,
#     | d log var/dθᵢ = ((tᵢ − mean)² / var − 1) / Σθ.


def log_likelihood(y, weights, t):
    mean, log_variance = y
    return anp.sum(
        weights * -0.5 * ((t - mean) ** 2 * anp.exp(-log_variance) + log_variance)
    )


t = np.array([0.3, -1.1, 2.4, 0.9, 5.0])
weights = np.array([1.0, 2.0, 1.0, 1.5, 0.5])
mean = weights @ t / weights.sum()
variance = weights @ (t - mean) ** 2 / weights.sum()
influence, report = idf.implicit_jacobian(
    log_likelihood,
    np.array([mean, np.log(variance)]),
    weights,
    args=(t,),
    return_report=True,
)
by_hand = np.stack([t - mean, (t - mean) ** 2 / variance - 1]) / weights.sum()
argmax_error = np.abs(influence - by_hand).max()
print(influence.round(4))
print(f"largest error {argmax_error:.1e}, solved by {report.solver}: {report.reason}")

# %%
# References
# ----------
# .. [1] S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
#    optimization", 2016. `arXiv:1607.05447 <https://arxiv.org/abs/1607.05447>`_
