"""
The error of a gradient, against the error of the solution
==========================================================

Solvers stop early, and ŷ is not quite y. How wrong is the derivative then? The Jacobian at ŷ is
J(ŷ) = −A(ŷ)⁻¹ B(ŷ), so its error is of the order of the error of ŷ [1]_:

    ‖J(ŷ) − dy/dθ‖ ≤ C ‖ŷ − y‖.

Differentiating through the iterations of the solver instead (unrolling) has an error of its own, which lags
behind. This page repeats figure 3 of [1]_: ridge regression on the diabetes data of Efron et al. [2]_, a
penalty for each of the 10 features, solved by gradient descent.

The bound needs a constant that nobody knows, and is far from the error. The library estimates the error itself,
from one Newton step, and hands out a derivative that is corrected by it.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes

import implicitdiff as idf

# %%
# min over y of ½‖X y − t‖² + ½ Σ θⱼ yⱼ². A = XᵀX + diag(θ) does not depend on y, and B = diag(y), so the bound
# holds with C = 1 / (smallest eigenvalue of A).
X, t = load_diabetes(return_X_y=True)
t = (t - t.mean()) / t.std()
theta = np.full(10, 0.1)
A = X.T @ X + np.diag(theta)
y = np.linalg.solve(A, X.T @ t)
jacobian = -np.linalg.solve(A, np.diag(y))  # from A dy + diag(y) dθ = 0
smallest, largest = np.linalg.eigvalsh(A)[[0, -1]]

ridge = idf.Stationary(
    grad=lambda y, theta, X, t: X.T @ (X @ y - t) + theta * y,
    hvp=lambda y, theta, v, X, t: X.T @ (X @ v) + theta * v,
    mixed_vjp=lambda y, theta, u, X, t: u * y,
    mixed_jvp=lambda y, theta, tangent, X, t: tangent * y,
)

# %%
# Gradient descent from 0. Alongside each iterate goes its own derivative with respect to θ: that is
# unrolling, in forward mode. The library warns that ŷ is not a solution. Here that is the point.
step = 1 / largest
y_hat, unrolled = np.zeros(10), np.zeros((10, 10))
rows = []
for iteration in range(1, 801):
    unrolled = unrolled - step * (A @ unrolled + np.diag(y_hat))
    y_hat = y_hat - step * (A @ y_hat - X.T @ t)
    if iteration % 20 == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", idf.NotASolutionWarning)
            implicit, report = idf.implicit_jacobian(
                ridge, y_hat, theta, args=(X, t), error=True, return_report=True
            )
        norm, polished = np.linalg.norm, implicit - report.error.correction
        errors = [norm(J - jacobian) for J in (implicit, unrolled, polished)]
        rows.append((norm(y_hat - y), *errors, report.error.absolute))
error_y, error_implicit, error_unrolled, error_polished, estimated = np.array(rows).T

# %%
# The slope of the implicit error on logarithmic axes, and how far unrolling lies above it.
slope = np.polyfit(np.log(error_y), np.log(error_implicit), 1)[0]
ratio = error_unrolled / error_implicit
print(f"slope of log error: {slope:.3f}")
print(f"error of unrolling / implicit error: {ratio.min():.0f} to {ratio.max():.0f}")
within = bool(np.all(error_implicit <= error_y / smallest))
print(f"within the bound: {within}")
effectivity = estimated / error_implicit
print(f"estimated / true error: {effectivity.min():.3f} to {effectivity.max():.3f}")
print(f"largest error of the polished Jacobian: {error_polished.max():.1e}")

# %%
fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
ax.loglog(error_y, error_unrolled, "s-", markersize=4, label="unrolling")
ax.loglog(error_y, error_y / smallest, "k--", label="bound C ‖ŷ − y‖")
ax.loglog(
    error_y, error_implicit, "o-", markersize=4, label=f"implicit, slope {slope:.2f}"
)
ax.loglog(error_y, estimated, "x", color="black", label="its estimated error")
ax.loglog(error_y, error_polished, "^-", markersize=4, label="polished")
ax.invert_xaxis()
ax.set(
    xlabel="error of the solution ‖ŷ − y‖ (better to the right)",
    ylabel="error of the Jacobian",
    title="gradient descent on the diabetes data",
)
ax.legend()

# %%
# References
# ----------
# .. [1] M. Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022, theorem 1 and
#    figure 3. `arXiv:2105.15183 <https://arxiv.org/abs/2105.15183>`_
# .. [2] B. Efron et al., "Least angle regression", Annals of Statistics 32 (2004) 407-499.
#    `DOI 10.1214/009053604000000067 <https://doi.org/10.1214/009053604000000067>`_
