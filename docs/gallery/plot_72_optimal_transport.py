"""
Optimal transport with an entropy
=================================

The transport plan P between the histograms a and b minimises ⟨P, C⟩ + ε Σ Pᵢⱼ (log Pᵢⱼ − 1) under the
marginals P 1 = a and Pᵀ 1 = b [1]_. It has the form

    Pᵢⱼ = exp((fᵢ + gⱼ − Cᵢⱼ) / ε),

where the potentials f and g maximise the dual a·f + b·g − ε Σ Pᵢⱼ. Sinkhorn's iteration finds them. Their
derivatives follow from the dual being stationary, at a cost that does not depend on the iterations.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp

import implicitdiff as idf

# %%
# Two histograms on 40 points, and the squared distance as the cost.
n, eps = 40, 0.02
grid = np.linspace(0, 1, n)
a = np.exp(-((grid - 0.25) ** 2) / 0.015) + 0.02
b = (
    np.exp(-((grid - 0.6) ** 2) / 0.01)
    + 0.7 * np.exp(-((grid - 0.85) ** 2) / 0.003)
    + 0.02
)
theta = {"C": (grid[:, None] - grid) ** 2, "a": a / a.sum(), "b": b / b.sum()}


def sinkhorn(theta):
    f, g = np.zeros(n), np.zeros(n)
    for _ in range(20000):
        f, before = (
            eps * (np.log(theta["a"]) - logsumexp((g - theta["C"]) / eps, axis=1)),
            f,
        )
        g = eps * (
            np.log(theta["b"]) - logsumexp((f[:, None] - theta["C"]) / eps, axis=0)
        )
        if np.abs(f - before).max() < 1e-14:
            break
    return f, g


# %%
# A constant may move from g to f without any change to P. The dual is flat along this direction, and its
# Hessian singular. So the last entry of g is fixed at zero, and is no unknown. With it the last marginal is no
# condition: its mass is what the others leave.


def plan(y, theta):
    f, g = y["f"], anp.append(y["g"], 0.0)
    return anp.exp((f[:, None] + g - theta["C"]) / eps)


def dual(y, theta):
    return (
        anp.dot(theta["a"], y["f"])
        + anp.dot(theta["b"][:-1], y["g"])
        - eps * anp.sum(plan(y, theta))
    )


def solve(theta):
    f, g = sinkhorn(theta)
    return {"f": f + g[-1], "g": g[:-1] - g[-1]}


y = solve(theta)
P = plan(y, theta)

# %%
# Without that, the library says what is wrong.


def free_dual(y, theta):
    P = anp.exp((y["f"][:, None] + y["g"] - theta["C"]) / eps)
    return anp.dot(theta["a"], y["f"]) + anp.dot(theta["b"], y["g"]) - eps * anp.sum(P)


f, g = sinkhorn(theta)
only_f = {"f": np.ones(n), "g": np.zeros(n)}
try:
    idf.implicit_vjp(free_dual, {"f": f, "g": g}, theta, only_f, solver="lu")
except idf.SingularError as problem:
    message = str(problem).splitlines()[0]
    print(message)

# %%
# Checks. The derivative of the whole objective with respect to C is P, and with respect to a it is f: the
# envelope theorem. The derivative of the transport cost ⟨P, C⟩ alone goes through the plan, and is compared with
# differences of the re-solved problem.


def objective(y, theta):
    P = plan(y, theta)
    return anp.sum(P * theta["C"]) + eps * anp.sum(P * (anp.log(P) - 1))


def cost(y, theta):
    return anp.sum(plan(y, theta) * theta["C"])


of_objective = idf.implicit_grad(dual, objective, y, theta)
envelope_error = max(
    np.abs(of_objective["C"] - P).max(), np.abs(of_objective["a"] - y["f"]).max()
)
print(f"envelope theorem: largest error {envelope_error:.0e}")

of_cost, report = idf.implicit_grad(dual, cost, y, theta, return_report=True)
points = range(0, n, 4)
differences = []
for i in points:
    h = 1e-6 * np.eye(n)[i]
    last = 1e-6 * np.eye(n)[-1]  # the mass has to arrive somewhere: in the last bin of b
    ahead, back = (
        cost(solve(moved), moved)
        for moved in (
            {**theta, "a": theta["a"] + h, "b": theta["b"] + last},
            {**theta, "a": theta["a"] - h, "b": theta["b"] - last},
        )
    )
    differences.append((ahead - back) / 2e-6)
difference_error = np.abs(of_cost["a"][list(points)] - differences).max()
print(
    f"cost against differences: largest error {difference_error:.0e}, by {report.solver}"
)

# %%
# Forward: mass of a is moved from the bin at 0.15 to the bin at 0.38. The change of the plan has this change as its
# row sums, and columns that sum to zero.
tangent = {"C": np.zeros((n, n)), "a": np.zeros(n), "b": np.zeros(n)}
tangent["a"][[6, 15]] = -1, 1
dy = idf.implicit_jvp(dual, y, theta, tangent)
change = P * (dy["f"][:, None] + np.append(dy["g"], 0)) / eps
marginal_error = max(
    np.abs(change.sum(axis=1) - tangent["a"]).max(), np.abs(change.sum(axis=0)).max()
)
print(f"marginals of the change: largest error {marginal_error:.0e}")

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
extent = (0, 1, 1, 0)
shown = left.imshow(np.sqrt(P), cmap="Greys", extent=extent)
left.set(xlabel="position in b", ylabel="position in a", title="plan P (square root)")
size = np.abs(change).max()
shown = middle.imshow(change, cmap="RdBu_r", vmin=-size, vmax=size, extent=extent)
middle.set(xlabel="position in b", ylabel="position in a", title="dP, mass moved in a")
fig.colorbar(shown, ax=middle, shrink=0.8)
right.plot(grid, of_cost["a"], label="implicitdiff")
right.plot(grid[list(points)], differences, "ko", markersize=4, label="differences")
right.set(xlabel="position in a", ylabel="d cost / d mass", title="gradient of ⟨P, C⟩")
right.legend()

# %%
# References
# ----------
# .. [1] M. Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS 2013.
#    `arXiv:1306.0895 <https://arxiv.org/abs/1306.0895>`_
