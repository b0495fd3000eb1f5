"""
A small deep equilibrium layer
==============================

A deep equilibrium layer [1]_ returns the fixed point of a map in place of the last of many layers:

    z = tanh(W z + U x + b).

Training needs the gradient of a loss through z, and that is one linear solve with I − ∂T/∂z, however many
iterations found z. Nothing of the iterations is stored.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import implicitdiff as idf

# %%
# The layer has 8 units and reads one number. W is scaled to a Frobenius norm below 0.9, so the map
# contracts by at least that factor, and plain iteration finds the fixed point.


def layer(z, theta, x):
    W = 0.9 * theta["W"] / anp.sqrt(1 + anp.sum(theta["W"] ** 2))
    return anp.tanh(W @ z + anp.outer(theta["U"], x) + theta["b"][:, None])


def equilibrium(theta, x):
    z = np.zeros((8, x.size))
    for _ in range(400):
        z, before = layer(z, theta, x), z
        if np.abs(z - before).max() < 1e-13:
            break
    return z


# %%
# It is to learn a function of one variable from 40 samples. All samples together are one fixed point of
# 320 unknowns.
x = np.linspace(-1, 1, 40)
target = np.sin(4 * x) * np.exp(-(x**2))


def loss(z, theta):
    return anp.mean((theta["v"] @ z - target) ** 2)


def value_and_gradient(theta):
    z = equilibrium(theta, x)
    gradient = idf.implicit_grad(idf.FixedPoint(layer), loss, z, theta, args=(x,))
    return loss(z, theta), gradient


rng = np.random.default_rng(4)
start = {
    "W": rng.normal(size=(8, 8)),
    "U": rng.normal(size=8),
    "b": rng.normal(size=8),
    "v": rng.normal(size=8) / 3,
}

# %%
# The gradient at the start, against central differences of the re-solved layer along one direction.
_, gradient = value_and_gradient(start)
direction = {name: rng.normal(size=value.shape) for name, value in start.items()}
slope = sum(np.sum(gradient[name] * direction[name]) for name in start)


def along(step):
    theta = {name: start[name] + step * direction[name] for name in start}
    return loss(equilibrium(theta, x), theta)


difference = (along(1e-5) - along(-1e-5)) / 2e-5
print(f"slope by implicitdiff {slope:.9f}, by differences {difference:.9f}")

# %%
# Training with SciPy's L-BFGS, which knows nothing but values and gradients.
names, sizes = list(start), [start[name].size for name in start]


def unpack(flat):
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(start[name].shape)
        for name, part in zip(names, parts, strict=True)
    }


def pack(theta):
    return np.concatenate([theta[name].ravel() for name in names])


def objective(flat):
    value, gradient = value_and_gradient(unpack(flat))
    return value, pack(gradient)


losses = [loss(equilibrium(start, x), start)]
result = minimize(
    objective,
    pack(start),
    jac=True,
    method="L-BFGS-B",
    callback=lambda intermediate_result: losses.append(intermediate_result.fun),
    options={"maxiter": 80},
)
trained = unpack(result.x)
print(
    f"mean square error {losses[0]:.3f} before, {losses[-1]:.1e} after {result.nit} iterations"
)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
fine = np.linspace(-1, 1, 200)
left.plot(x, target, "k.", label="samples")
left.plot(fine, start["v"] @ equilibrium(start, fine), color="tab:gray", label="before")
left.plot(
    fine, trained["v"] @ equilibrium(trained, fine), color="tab:blue", label="after"
)
left.set(xlabel="x", ylabel="output of the network", title="what the layer learned")
left.legend()
right.semilogy(losses, color="tab:blue")
right.set(xlabel="iteration of L-BFGS", ylabel="mean square error", title="training")

# %%
# References
# ----------
# .. [1] S. Bai, J. Z. Kolter, V. Koltun, "Deep equilibrium models", NeurIPS 2019.
#    `arXiv:1909.01377 <https://arxiv.org/abs/1909.01377>`_
