"""
Differences for Hessian products, and truncated fitting
=======================================================

Two ways around second derivatives and exact fits, both from Domke [1]_, against the exact gradient.

*Differences.* The adjoint solve needs products of the Hessian with a vector only, and two gradients give
one: A v ≈ (∇f(y + r v) − ∇f(y − r v)) / 2r.

*Truncated fitting.* Stop the fit after K steps of gradient descent, and take the derivative of what these
steps compute, by back-propagation through them. It is the exact gradient of another loss, that of the
K-step estimate. The implicit gradient at the same truncated estimate is shown beside it.
"""

import warnings

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from sklearn.datasets import load_breast_cancer

import implicitdiff as idf

# %%
# Logistic regression on the breast cancer data of scikit-learn, 30 standardised features, and a penalty
# exp(θⱼ) for each of them. The loss is the log-likelihood of held-out data.
X, label = load_breast_cancer(return_X_y=True)
X = (X - X.mean(axis=0)) / X.std(axis=0)
sign = 2.0 * label - 1
train, held = (X[::2], sign[::2]), (X[1::2], sign[1::2])
theta = np.log(np.full(30, 5.0))


def fitted_loss(y, X, s):
    return anp.sum(anp.logaddexp(0.0, -s * (X @ y)))


def objective(y, theta):
    return fitted_loss(y, *train) + 0.5 * anp.sum(anp.exp(theta) * y**2)


def held_out(y, theta):
    return fitted_loss(y, *held)


slope = grad(objective)


def hessian(y):
    p = 1 / (1 + np.exp(-train[0] @ y))
    return (train[0].T * (p * (1 - p))) @ train[0] + np.diag(np.exp(theta))


y = np.zeros(30)
for _ in range(30):  # Newton's method
    y = y - np.linalg.solve(hessian(y), slope(y, theta))
exact = idf.implicit_grad(objective, held_out, y, theta, solver="cholesky")
by_hand = -np.exp(theta) * y * np.linalg.solve(hessian(y), grad(held_out)(y, theta))
hand_error = np.abs(exact - by_hand).max() / np.abs(by_hand).max()
print(f"exact gradient against the closed form: {hand_error:.0e}")


def error(gradient):
    return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)


# %%
# Differences, for steps r relative to the lengths of y and v. Rounding spoils small steps, curvature large
# ones. Products by differences are not quite symmetric and linear, so the solver is asked for 1e-6 only, and
# a step that does not allow that is shown with what it gave.
steps = 10.0 ** np.arange(-12, 1)
difference_errors = []
for r in steps:

    def product(y, theta, v, r=r):
        h = r * (1 + np.linalg.norm(y)) / np.linalg.norm(v)
        return (slope(y + h * v, theta) - slope(y - h * v, theta)) / (2 * h)

    condition = idf.Stationary(objective, hvp=product)
    found = idf.implicit_grad(
        condition,
        held_out,
        y,
        theta,
        solver=idf.CG(rtol=1e-6, maxiter=200),
        on_failure="ignore",
    )
    difference_errors.append(error(found))
best = int(np.argmin(difference_errors))
print(f"best step {steps[best]:.0e}: relative error {difference_errors[best]:.0e}")

# %%
# The library takes differences by itself where it has no derivative of the gradient, and says so.


def opaque_gradient(y, theta):
    p = 1 / (1 + np.exp(train[1] * (train[0] @ np.asarray(y, dtype=float))))
    return -train[0].T @ (train[1] * p) + np.exp(theta) * y


found, report = idf.implicit_grad(
    idf.Stationary(grad=opaque_gradient),
    grad(held_out)(y, theta),
    y,
    theta,
    return_report=True,
)
own_error = error(found)
print(f"{report.derivatives['A']} by the library: relative error {own_error:.0e}")

# %%
# Truncated fitting.
rate = 1 / np.linalg.eigvalsh(hessian(np.zeros(30)))[-1]


def truncated(theta, steps):
    y = np.zeros(30)
    for _ in range(steps):
        y = y - rate * (slope(y, theta))
    return y


counts = [1, 3, 10, 30, 100, 300]
errors = {"through K steps": [], "implicit, at K steps": [], "the estimate itself": []}
for k in counts:
    y_k = truncated(theta, k)
    errors["the estimate itself"].append(np.linalg.norm(y_k - y) / np.linalg.norm(y))
    through = grad(lambda theta, k=k: held_out(truncated(theta, k), theta))(theta)
    errors["through K steps"].append(error(through))
    with warnings.catch_warnings():  # not a solution, on purpose
        warnings.simplefilter("ignore", idf.NotASolutionWarning)
        errors["implicit, at K steps"].append(
            error(idf.implicit_grad(objective, held_out, y_k, theta))
        )
for name, values in errors.items():
    print(f"{name:>20}:", " ".join(f"{value:.1e}" for value in values))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7), layout="constrained")
left.loglog(steps, difference_errors, "o-")
left.set(
    xlabel="relative step r",
    ylabel="relative error of the gradient",
    title="Hessian products by differences",
)
for (name, values), marker in zip(errors.items(), ["s-", "o-", "k:"], strict=True):
    right.loglog(counts, values, marker, label=name)
right.set(
    xlabel="steps of gradient descent K",
    ylabel="relative error",
    title="truncated fitting",
)
right.legend()

# %%
# References
# ----------
# .. [1] J. Domke, "Generic methods for optimization-based modeling", AISTATS 2012.
#    `PMLR 22:318-326 <https://proceedings.mlr.press/v22/domke12.html>`_
