"""
Nonlinear equality constraints: circle and sphere
=================================================

A minimum of f(y, θ) on the surface h(y, θ) = 0 makes the Lagrangian f + λ h stationary. Differentiating

    ∇f + λ ∇h = 0 and h = 0

gives a linear system for dy and dλ, whose matrix holds the Hessian of the Lagrangian: the curvature of the
constraint enters through λ. The multiplier need not be known. It follows from y.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf

# %%
# A linear function on a circle
# -----------------------------
# y minimises θ·y on the circle of radius r, so y = −r θ / ‖θ‖, and
#
#     dy/dθ = −r (I − y yᵀ / r²) / ‖θ‖ and dy/dr = y / r.
#
# The radius is a parameter like any other.


def linear(y, parameters):
    return anp.dot(parameters["theta"], y)


def on_circle(y, parameters):
    return anp.sum(y**2) - parameters["r"] ** 2


circle = idf.KKT(linear, eq=on_circle)
circle_errors, arrows = [], []
for angle in np.radians([20, 80, 150, 215, 300]):
    parameters = {
        "theta": 1.7 * np.array([np.cos(angle), np.sin(angle)]),
        "r": np.array(0.8),
    }
    size = np.linalg.norm(parameters["theta"])
    y = -parameters["r"] * parameters["theta"] / size
    dy = idf.implicit_jacobian(circle, y, parameters)
    unit = y / parameters["r"]
    closed = {
        "theta": -parameters["r"] * (np.eye(2) - np.outer(unit, unit)) / size,
        "r": unit,
    }
    circle_errors.append(max(np.abs(dy[name] - closed[name]).max() for name in closed))
    turned = np.array(
        [-parameters["theta"][1], parameters["theta"][0]]
    )  # θ turns at the rate 1
    arrows.append((y, dy["theta"] @ turned, dy["r"]))
print(f"circle: largest error {max(circle_errors):.0e}")

# %%
# Projection onto the sphere
# --------------------------
# The point of the unit sphere next to x is y = x / ‖x‖, with dy/dx = (I − y yᵀ) / ‖x‖.
x = np.array([1.0, -2.0, 0.5])
projection = idf.KKT(
    lambda y, x: 0.5 * anp.sum((y - x) ** 2), eq=lambda y, x: anp.sum(y**2) - 1
)
y = x / np.linalg.norm(x)
projection_error = np.abs(
    idf.implicit_jacobian(projection, y, x)
    - (np.eye(3) - np.outer(y, y)) / np.linalg.norm(x)
).max()
print(f"projection: largest error {projection_error:.0e}")

# %%
# A quadratic on the sphere
# -------------------------
# The unit vector that minimises ½ yᵀ S y is the eigenvector of the smallest eigenvalue, and the multiplier is
# that eigenvalue, up to its sign. Perturbation theory gives dy = −(S − λ I)⁺ dS y, with the pseudo-inverse.
rng = np.random.default_rng(2)
S, change = (M + M.T for M in rng.normal(size=(2, 4, 4)))
rayleigh = idf.KKT(
    lambda y, S: 0.5 * anp.dot(y, anp.dot(S, y)),
    eq=lambda y, S: 0.5 * (anp.sum(y**2) - 1),
)


def smallest(S):
    eigenvalues, vectors = np.linalg.eigh(S)
    y = vectors[:, 0]
    return eigenvalues[0], y * np.sign(y[np.argmax(np.abs(y))])


eigenvalue, y = smallest(S)
found = idf.implicit_jvp(rayleigh, y, S, change)
by_hand = -np.linalg.pinv(S - eigenvalue * np.eye(4)) @ change @ y
quadratic_error = np.abs(found - by_hand).max()
print(f"eigenvector: largest error {quadratic_error:.0e}")

# %%
# Along the line S + s dS, the derivative of the eigenvector.
s = np.linspace(-0.6, 0.6, 61)
vectors = np.array([smallest(S + si * change)[1] for si in s])
vectors *= np.sign(np.sum(vectors * y, axis=1))[:, None]
slopes = np.array(
    [
        idf.implicit_jvp(rayleigh, v, S + si * change, change)
        for si, v in zip(s, vectors, strict=True)
    ]
)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
around = np.linspace(0, 2 * np.pi, 200)
left.plot(0.8 * np.cos(around), 0.8 * np.sin(around), color="tab:gray")
for k, (point, by_angle, by_radius) in enumerate(arrows):
    left.plot(*point, "ko", markersize=4)
    for arrow, colour, name in (
        (by_angle, "tab:blue", "θ turns"),
        (by_radius, "tab:orange", "r grows"),
    ):
        left.quiver(
            *point,
            *(0.5 * arrow),
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.008,
            label=name if k == 0 else None,
        )
left.set(xlabel="y₁", ylabel="y₂", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.9))
left.set(title="minimum on the circle, half of its derivatives")
left.legend(loc="upper center", ncols=2, fontsize="small")
for k in range(4):
    (line,) = right.plot(s, np.gradient(vectors[:, k], s), linewidth=1)
    right.plot(
        s[::4],
        slopes[::4, k],
        "o",
        markersize=4,
        color=line.get_color(),
        label=f"y{'₁₂₃₄'[k]}",
    )
right.set(
    xlabel="s",
    ylabel="dy/ds",
    title="eigenvector of S + s dS\nlines: differences, dots: implicitdiff",
)
right.legend(fontsize="small")
