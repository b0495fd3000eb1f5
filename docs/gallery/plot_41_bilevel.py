"""
A bi-level problem: softmax classes moved to targets
====================================================

The example of Gould et al. [1]_. There are m classes in the plane, with the likelihoods

    ℓᵢ(x; Θ) = exp(aᵢ·x + bᵢ) / Σⱼ exp(aⱼ·x + bⱼ),   Θ = (a, b).

The most likely point of a class in the unit ball is gᵢ(Θ) = argmax over ‖x‖ ≤ 1 of log ℓᵢ(x; Θ). The outer
problem moves these points to targets: Θ goes down the gradient of ½ Σ ‖gᵢ(Θ) − tᵢ‖², which takes the
derivative of every argmax with its constraint.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf

# %%
# The m lower problems are written as one: the unknown holds the m points as rows, and there is one constraint
# for each.


def log_likelihoods(y, theta):
    logits = y @ theta["a"].T + theta["b"]
    return anp.diag(logits) - anp.log(anp.sum(anp.exp(logits), axis=1))


def lower(y, theta):
    return -anp.sum(log_likelihoods(y, theta))


def outside(y, theta):
    return anp.sum(y**2, axis=1) - 1


classes = idf.KKT(lower, ineq=outside)

# %%
# The lower problems are concave. Accelerated projected gradient ascent solves them, from where the points were
# before. Its momentum is dropped for a class where it points uphill no longer.


def solve(theta, y):
    rate = 2 / np.linalg.norm(theta["a"] - theta["a"].mean(axis=0), 2) ** 2
    ahead, count = y, np.zeros((len(y), 1))
    for _ in range(5000):
        logits = ahead @ theta["a"].T + theta["b"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        new = ahead + rate * (theta["a"] - p @ theta["a"] / p.sum(axis=1, keepdims=True))
        new /= np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1)
        move = new - y
        uphill = np.sum((new - ahead) * move, axis=1, keepdims=True) >= 0
        count = np.where(uphill, count + 1, 0)
        ahead, y = new + count / (count + 3) * move, new
        if np.abs(move).max() < 1e-14:
            break
    return y


# %%
# Gradient descent on Θ, for m = 3, 5 and 8 classes, from a random start. The targets are spaced evenly on the
# circle.


def upper(y, targets):
    return 0.5 * np.sum((y - targets) ** 2)


def descend(m, steps=100, rate=1.0):
    rng = np.random.default_rng(m)
    angles = 2 * np.pi * np.arange(m) / m
    targets = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    theta = {"a": rng.normal(size=(m, 2)), "b": rng.normal(size=m)}
    y = solve(theta, np.zeros((m, 2)))
    first, losses, start = y, [upper(y, targets)], dict(theta)
    for _ in range(steps):
        gradient = idf.implicit_vjp(classes, y, theta, y - targets)
        theta = {name: theta[name] - rate * gradient[name] for name in theta}
        y = solve(theta, y)
        losses.append(upper(y, targets))
    return {
        "targets": targets,
        "before": first,
        "after": y,
        "losses": losses,
        "theta": theta,
        "start": start,
    }


runs = {m: descend(m) for m in (3, 5, 8)}
for m, run in runs.items():
    print(f"m = {m}: loss {run['losses'][0]:.3f} before, {run['losses'][-1]:.1e} after")

# %%
# Check at the first Θ of m = 5: central differences, with the points solved for again.
five = runs[5]
gradient = idf.implicit_vjp(
    classes, five["before"], five["start"], five["before"] - five["targets"]
)
rng = np.random.default_rng(0)
direction = {name: rng.normal(size=value.shape) for name, value in five["start"].items()}


def along(step):
    theta = {name: five["start"][name] + step * direction[name] for name in direction}
    return upper(solve(theta, five["before"]), five["targets"])


slope = sum(np.sum(gradient[name] * direction[name]) for name in direction)
difference = (along(1e-5) - along(-1e-5)) / 2e-5
print(f"slope by implicitdiff {slope:.8f}, by differences {difference:.8f}")

# %%
# The regions show the most likely class of each point of the plane.
fig, axes = plt.subplots(2, 4, figsize=(11, 5.6), layout="constrained")
square = np.linspace(-1.3, 1.3, 200)
plane = np.stack(np.meshgrid(square, square), axis=-1)
around = np.linspace(0, 2 * np.pi, 200)
for column, (m, run) in enumerate(runs.items()):
    for row, (when, theta) in enumerate(
        [("before", run["start"]), ("after", run["theta"])]
    ):
        ax, points = axes[row, column], run[when]
        ax.imshow(
            np.argmax(plane @ theta["a"].T + theta["b"], axis=-1),
            extent=(-1.3, 1.3, -1.3, 1.3),
            origin="lower",
            cmap="Set3",
            vmin=0,
            vmax=11,
            alpha=0.7,
        )
        ax.plot(np.cos(around), np.sin(around), "k", linewidth=0.8)
        ax.plot(*run["targets"].T, "kx", label="targets")
        ax.plot(*points.T, "o", color="tab:red", markersize=5, label="most likely points")
        for point, target in zip(points, run["targets"], strict=True):
            ax.plot(*np.stack([point, target]).T, color="tab:red", linewidth=0.7)
        ax.set(title=f"m = {m}, {when}", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
axes[0, 3].axis("off")
axes[0, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
for m, run in runs.items():
    axes[1, 3].semilogy(run["losses"], label=f"m = {m}")
axes[1, 3].set(xlabel="step", ylabel="upper loss", title="descent")
axes[1, 3].legend()

# %%
# References
# ----------
# .. [1] S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
#    optimization", 2016. `arXiv:1607.05447 <https://arxiv.org/abs/1607.05447>`_
