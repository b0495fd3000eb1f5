"""
Linear equality constraints: null space and multipliers
=======================================================

A minimum of f(y, θ) on the plane A y = b can move along the plane only. With a basis F of the null space of
A, the Hessian H = ∂²f/∂y² and B = ∂²f/∂y∂θ, its derivative is [1]_

    dy/dθ = −F (Fᵀ H F)⁻¹ Fᵀ B,

or, with Lagrange multipliers and for regular H, dy/dθ = H⁻¹Aᵀ(A H⁻¹Aᵀ)⁻¹A H⁻¹B − H⁻¹B. Both, and the saddle
system as a whole, are routes of `implicitdiff.KKT` by name.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.linalg import null_space

import implicitdiff as idf

# %%
# Softmax is an argmin
# --------------------
# y minimises Σ yᵢ log yᵢ − θ·y with Σ yᵢ = 1. The solution is p = softmax(θ), and dy/dθ = diag(p) − p pᵀ.


def negative_entropy(y, theta):
    return anp.sum(y * anp.log(y)) - anp.dot(theta, y)


def total(y, theta):
    return anp.sum(y) - 1


theta = np.array([1.0, -0.5, 0.3, 2.0])
p = np.exp(theta) / np.exp(theta).sum()
closed = np.diag(p) - np.outer(p, p)

by_route = {
    route: idf.implicit_jacobian(
        idf.KKT(negative_entropy, eq=total, route=route), p, theta
    )
    for route in ("kkt", "schur", "nullspace")
}
F = null_space(np.ones((1, 4)))
by_hand = -F @ np.linalg.solve(F.T @ np.diag(1 / p) @ F, F.T @ -np.eye(4))
softmax_errors = {
    route: np.abs(found - closed).max() for route, found in by_route.items()
}
softmax_errors["formula by hand"] = np.abs(by_hand - closed).max()
for name, error in softmax_errors.items():
    print(f"{name:>15}: largest error {error:.0e}")

# %%
# Where the Hessian is singular
# -----------------------------
# The smoothest curve through five knots minimises the sum of squared second differences, with the values at the
# knots as constraints. The Hessian is singular, since straight lines cost nothing. On the null space of the
# constraints it is regular, so the derivative exists. The route by H⁻¹ does not, and the library says so.
n = 101
knots = np.array([0, 20, 50, 70, 100])
values = np.array([0.0, 1.0, -0.5, 0.8, 0.3])


def roughness(y, values):
    return 0.5 * anp.sum((y[2:] - 2 * y[1:-1] + y[:-2]) ** 2)


def at_knots(y, values):
    return y[knots] - values


D = np.diff(np.eye(n), 2, axis=0)
A = np.eye(n)[knots]
saddle = np.block([[D.T @ D, A.T], [A, np.zeros((5, 5))]])
y = np.linalg.solve(saddle, np.concatenate([np.zeros(n), values]))[:n]

splines = {
    route: idf.implicit_jacobian(idf.KKT(roughness, eq=at_knots, route=route), y, values)
    for route in ("kkt", "nullspace")
}
try:
    idf.implicit_jacobian(idf.KKT(roughness, eq=at_knots, route="schur"), y, values)
except idf.SolveError as problem:
    message = str(problem)
    print(message)

# %%
# Checks: the inverse of the saddle matrix, and the cubic splines that the curves tend to as the grid is refined.
cardinal = np.linalg.solve(saddle, np.concatenate([np.zeros((n, 5)), np.eye(5)]))[:n]
spline_errors = {
    route: np.abs(found - cardinal).max() for route, found in splines.items()
}
smooth = CubicSpline(knots, np.eye(5), bc_type="natural")(np.arange(n))
spline_gap = np.abs(splines["nullspace"] - smooth).max()
print(
    ", ".join(
        f"{route}: largest error {error:.0e}" for route, error in spline_errors.items()
    )
)
print(f"largest distance from the natural cubic splines {spline_gap:.4f}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(np.arange(n), y)
left.plot(knots, values, "ko", label="knots")
left.set(xlabel="position", ylabel="y", title="smoothest curve through the knots")
left.legend()
for k in range(5):
    (line,) = right.plot(smooth[:, k], linewidth=1)
    right.plot(
        np.arange(n)[::5],
        splines["nullspace"][::5, k],
        "o",
        markersize=3.5,
        color=line.get_color(),
    )
right.set(
    xlabel="position",
    ylabel="dy / d value at a knot",
    title="dots: implicitdiff, lines: cubic splines",
)

# %%
# References
# ----------
# .. [1] S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
#    optimization", 2016. `arXiv:1607.05447 <https://arxiv.org/abs/1607.05447>`_
