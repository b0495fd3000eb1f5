"""
A penalty for each feature of a log-linear model
================================================

The weights y of a log-linear classifier minimise the penalised log-likelihood of the training data,

    f(y, θ) = −Σᵢ log p(cᵢ | xᵢ; y) + ½ Σⱼ exp(θⱼ) ‖yⱼ‖²,

with a penalty exp(θⱼ) for each feature j. Do, Foo and Ng [1]_ choose the penalties by gradient descent on
the log-likelihood of held-out data: its gradient through the fit is −Bᵀ A⁻¹ ∂L/∂y, with A the Hessian of f,
for all features at the price of one.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from scipy.optimize import minimize
from sklearn.datasets import load_digits

import implicitdiff as idf

# %%
# Data: handwritten digits of 8 × 8 pixels. 300 of them train the model, 750 tune the penalties, and the other
# 747 are for the test. A feature is a pixel: 64 penalties, 640 weights.
images, digit = load_digits(return_X_y=True)
order = np.random.default_rng(3).permutation(len(digit))
train, tune, test = ((images[i] / 16, digit[i]) for i in np.split(order, [300, 1050]))


def log_likelihood(y, X, c):
    logits = X @ y
    return anp.sum(
        logits[np.arange(len(c)), c] - anp.log(anp.sum(anp.exp(logits), axis=1))
    )


def objective(y, theta, X, c):
    return -log_likelihood(y, X, c) + 0.5 * anp.sum(anp.exp(theta)[:, None] * y**2)


def held_out(y, theta):
    return -log_likelihood(y, *tune) / len(tune[1])


slope = grad(objective)


def fit(theta, gtol=1e-9):
    found = minimize(
        lambda y: objective(y.reshape(64, 10), theta, *train),
        np.zeros(640),
        jac=lambda y: slope(y.reshape(64, 10), theta, *train).ravel(),
        method="L-BFGS-B",
        options={"maxiter": 2000, "ftol": 0, "gtol": gtol, "maxcor": 30},
    )
    return found.x.reshape(64, 10)


def hypergradient(y, theta):
    return idf.implicit_grad(objective, held_out, y, theta, args=train, solver="cg")


# %%
# Check at the start, all penalties 1: a central difference with the model fitted again.
theta = np.zeros(64)
start_fit = fit(theta)
start_gradient = hypergradient(start_fit, theta)
direction = np.random.default_rng(1).normal(size=64)
ahead, back = (held_out(fit(theta + step * direction), None) for step in (1e-3, -1e-3))
difference = (ahead - back) / 2e-3
print(f"slope {start_gradient @ direction:.7f}, by differences {difference:.7f}")

# %%
# Tuning all 64 penalties by L-BFGS on their logarithms, against the best common penalty from a grid.
losses = []


def value_and_gradient(theta):
    y = fit(theta, gtol=1e-7)
    losses.append(held_out(y, theta))
    return losses[-1], hypergradient(y, theta)


common = min(
    np.linspace(-4, 2, 13), key=lambda level: held_out(fit(np.full(64, level)), None)
)
result = minimize(
    value_and_gradient,
    np.full(64, common),
    jac=True,
    method="L-BFGS-B",
    bounds=[(-5, 7)] * 64,
    options={"maxiter": 10},
)
theta = result.x
fits = {"one common penalty": fit(np.full(64, common)), "a penalty each": fit(theta)}
test_loss = {name: -log_likelihood(y, *test) / len(test[1]) for name, y in fits.items()}
for name, y in fits.items():
    print(
        f"{name:>18}: held-out loss {held_out(y, None):.4f}, test loss {test_loss[name]:.4f}"
    )
accuracy = {
    name: np.mean((test[0] @ y).argmax(axis=1) == test[1]) for name, y in fits.items()
}
print(" ".join(f"{name}: {share:.1%} right." for name, share in accuracy.items()))

# %%
# Pixels that are always white get no gradient, and keep the penalty that they started with.
varies = np.ptp(train[0], axis=0) > 0
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
grid = np.where(varies, theta, np.nan).reshape(8, 8)
shown = left.imshow(grid, cmap="viridis")
left.set(title="tuned penalty of each pixel", xlabel="column", ylabel="row")
fig.colorbar(shown, ax=left, label="logarithm of the penalty θ")
right.plot(losses, ".-", label="a penalty each")
right.axhline(
    held_out(fits["one common penalty"], None),
    color="k",
    ls="--",
    label="best common penalty",
)
right.set(xlabel="evaluation", ylabel="held-out loss per digit", title="tuning")
right.legend()

# %%
# References
# ----------
# .. [1] C. B. Do, C.-S. Foo, A. Y. Ng, "Efficient multiple hyperparameter learning for log-linear models",
#    NeurIPS 2007. `Proceedings
#    <https://papers.nips.cc/paper/3231-efficient-multiple-hyperparameter-learning-for-log-linear-models>`_
