"""
A point constrained to a ball
=============================

y is the point of the unit ball next to θ. Inside of the ball the constraint is not active, and y = θ.
Outside it is, and y = θ / ‖θ‖:

    | dy/dθ = I for ‖θ‖ < 1,
    | dy/dθ = (I − y yᵀ) / ‖θ‖ for ‖θ‖ > 1.

At ‖θ‖ = 1 the constraint is weakly active: it holds, but with a multiplier of zero. The solution has a kink
there, and the library warns. A logarithmic barrier gives a smooth neighbour,

    min over y of t ½ ‖y − θ‖² − log(1 − ‖y‖²),

with a derivative that passes from one branch to the other.
"""

import warnings

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq

import implicitdiff as idf


def distance(y, theta):
    return 0.5 * anp.sum((y - theta) ** 2)


def outside(y, theta):
    return anp.sum(y**2) - 1


# %%
# θ moves along a line from the inside to the outside. Which branch holds is found by the library, from y.
ball = idf.KKT(distance, ineq=outside)
direction = np.array([1.0, 0.5])
offset = np.array([0.0, 0.2])
s = np.linspace(0, 1.6, 66)
solutions, slopes, closed = [], [], []
for si in s:
    theta = offset + si * direction
    size = np.linalg.norm(theta)
    y = theta / max(size, 1)
    solutions.append(y)
    slopes.append(idf.implicit_jvp(ball, y, theta, direction))
    closed.append(direction if size < 1 else (direction - y * (y @ direction)) / size)
solutions, slopes, closed = map(np.array, (solutions, slopes, closed))
active_set_error = np.abs(slopes - closed).max()
print(f"largest error of dy/ds {active_set_error:.0e}")

# %%
# At the switch.
theta = np.array([0.6, 0.8])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    at_switch = idf.implicit_jacobian(ball, theta, theta)
print(caught[0].message)
print("dy/dθ =", at_switch.round(6).tolist())

# %%
# The same, and all else that the derivative rests on, is in the report of `implicitdiff.check_regularity`.
regularity = idf.check_regularity(ball, theta, theta)
print(regularity)

# %%
# The barrier. Its minimum lies along θ, at the root ρ of t (ρ − ‖θ‖) + 2 ρ / (1 − ρ²) = 0.


def barrier_solution(theta, t):
    size = np.linalg.norm(theta)
    rho = brentq(lambda r: t * (r - size) * (1 - r**2) + 2 * r, 0, 1, xtol=1e-15)
    return rho * theta / size


weights = [10.0, 100.0, 1000.0]
smoothed, barrier_errors = {}, {}
for t in weights:
    barrier = idf.LogBarrier(distance, ineq=outside, t=t)
    thetas = offset + s[:, None] * direction
    smoothed[t] = np.array(
        [
            idf.implicit_jvp(barrier, barrier_solution(theta, t), theta, direction)
            for theta in thetas
        ]
    )
    h = 1e-6 * direction
    differences = np.array(
        [
            (barrier_solution(theta + h, t) - barrier_solution(theta - h, t)) / 2e-6
            for theta in thetas
        ]
    )
    barrier_errors[t] = np.abs(smoothed[t] - differences).max()
    print(f"barrier t = {t:6.0f}: differs by {barrier_errors[t]:.0e} from differences")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
around = np.linspace(0, 2 * np.pi, 200)
left.fill(np.cos(around), np.sin(around), color="0.92")
path = offset + s[:, None] * direction
left.plot(*path.T, color="tab:gray", label="θ(s)")
left.plot(*solutions.T, color="tab:blue", linewidth=2.5, label="y(s)")
left.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
left.set(xlim=(-1.1, 1.8), ylim=(-1.1, 1.2), title="projection onto the ball")
left.legend(loc="lower right")
for t, shade in zip(weights, (0.4, 0.65, 1.0), strict=True):
    right.plot(
        s,
        smoothed[t][:, 0],
        color="tab:orange",
        alpha=shade,
        label=f"barrier, t = {t:.0f}",
    )
right.plot(s, closed[:, 0], "k", linewidth=1, label="closed form")
right.plot(
    s[::4], slopes[::4, 0], "o", color="tab:blue", markersize=4, label="active set"
)
right.set(xlabel="s", ylabel="dy₁/ds", title="the derivative jumps at the switch")
right.legend(fontsize="small")
