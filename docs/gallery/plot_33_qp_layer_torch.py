"""
A quadratic program as a layer in Torch
=======================================

Money is divided among assets whose returns c are to be predicted from what is known today, x. The division is a
quadratic program,

    y(c) = argmin ½ yᵀ Q y − cᵀ y   subject to   Σ y = 1,   y ≥ 0,

and what counts is not how close the prediction is but what the division earns. :func:`implicitdiff.solve_qp` solves a
batch of such programs and differentiates them, so that a model can be trained on that [1]_.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import implicitdiff as idf

# %%
# The returns follow the features by a law with a bend in it, which a linear model cannot hold. It has to choose where
# it is wrong.

ASSETS, FEATURES = 6, 4
rng = np.random.default_rng(6)
law = torch.tensor(rng.normal(size=(FEATURES, ASSETS)))


def sample(count):
    x = torch.tensor(rng.normal(size=(count, FEATURES)))
    returns = 0.4 * torch.relu(x @ law) ** 2
    return x, returns


x, c = sample(120)
x_new, c_new = sample(200)
mixing = rng.normal(size=(ASSETS, ASSETS))
Q = torch.tensor(0.4 * np.eye(ASSETS) + 0.1 * mixing @ mixing.T)

# %%
# The layer: one call for the whole batch. Q and the constraints are the same for all and need no gradient; they are
# handed over with an axis for the batch.


def divide(c):
    def each(a):
        return a.expand(len(c), *a.shape)

    A, b = Q.new_ones(1, ASSETS), Q.new_ones(1)
    G, h = -torch.eye(ASSETS, dtype=Q.dtype), Q.new_zeros(ASSETS)
    return idf.solve_qp(each(Q), -c, each(A), each(b), each(G), each(h), batched=True)


def cost(y, c):
    return 0.5 * torch.einsum("bi,ij,bj->b", y, Q, y) - (c * y).sum(1)


# %%
# The gradient of the mean cost with respect to the model, against central differences of the programs solved anew.


def prediction(model, x):
    return x @ model[:-1] + model[-1]


def mean_cost(model, x, c):
    return cost(divide(prediction(model, x)), c).mean()


start = torch.tensor(0.1 * rng.normal(size=(FEATURES + 1, ASSETS)))
model = start.clone().requires_grad_()
mean_cost(model, x, c).backward()
direction = torch.tensor(rng.normal(size=start.shape))
slope = (model.grad * direction).sum()
ahead, behind = start + 1e-6 * direction, start - 1e-6 * direction
difference = (mean_cost(ahead, x, c) - mean_cost(behind, x, c)) / 2e-6
print(f"slope by implicitdiff {slope:.8f}, by differences {difference:.8f}")

# %%
# Two ways to the same kind of model. *Prediction first* fits the returns by least squares, and divides by what it
# predicts. *Decision first* goes on from there, down the gradient of the cost itself. Regret is what a division costs
# above the best one, made with the true returns; it is measured on samples that were not trained on.
best = cost(divide(c_new), c_new).mean()


def regret(model):
    with torch.no_grad():
        return float(mean_cost(model, x_new, c_new) - best)


ones = x.new_ones(len(x), 1)
fitted = torch.linalg.lstsq(torch.cat([x, ones], dim=1), c).solution
model = fitted.clone().requires_grad_()
optimizer = torch.optim.Adam([model], lr=0.03)
regrets = [regret(fitted)]
for _ in range(40):
    optimizer.zero_grad()
    mean_cost(model, x, c).backward()
    optimizer.step()
    regrets.append(regret(model.detach()))
print(f"regret: prediction first {regrets[0]:.3f}, decision first {regrets[-1]:.3f}")

# %%
# The decision-first model predicts the returns less well; it is right where it matters for the division.
with torch.no_grad():
    told = {"prediction first": prediction(fitted, x_new)}
    told["decision first"] = prediction(model, x_new)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(regrets, color="tab:blue", label="decision first")
left.axhline(regrets[0], color="tab:gray", linestyle="--", label="prediction first")
left.set(xlabel="step of Adam", ylabel="regret on new samples", ylim=(0, None))
left.legend()
colors = {"prediction first": "tab:gray", "decision first": "tab:blue"}
for name, predicted in told.items():
    right.plot(c_new[:, 0], predicted[:, 0], ".", color=colors[name], label=name)
right.plot([0, c_new[:, 0].max()], [0, c_new[:, 0].max()], "k:")
right.set(xlabel="return of the first asset", ylabel="predicted")
right.legend()

# %%
# References
# ----------
# .. [1] P. L. Donti, B. Amos, J. Z. Kolter, "Task-based end-to-end model learning in stochastic optimization",
#    NeurIPS 2017. `arXiv:1703.04529 <https://arxiv.org/abs/1703.04529>`_
