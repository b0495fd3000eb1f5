"""
Kepler's equation
=================

A planet on an ellipse of eccentricity e is, at the mean anomaly M (time, as an angle), where the eccentric
anomaly E satisfies

    E − e sin E = M.

No formula gives E, but its derivatives have one:

    | dE/dM = 1 / (1 − e cos E),
    | dE/de = sin E / (1 − e cos E).

A loss that depends on the position of the planet is then differentiated with respect to the elements of
the orbit.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq

import implicitdiff as idf

# %%
# A black box solves one equation at a time by bisection and interpolation (Brent's method). The condition is
# all that the derivative needs to know.
kepler = idf.Root(lambda E, orbit: E - orbit["e"] * anp.sin(E) - orbit["M"])


@idf.implicit_function(kepler, batched=True)
def eccentric_anomaly(orbit):
    def solve(e, M):
        return brentq(lambda E: E - e * np.sin(E) - M, M - 1, M + 1, xtol=1e-15)

    return np.array([solve(e, M) for e, M in zip(orbit["e"], orbit["M"], strict=True)])


# %%
# The worked example of Meeus [1]_: e = 0.1 and M = 5° give E = 5.554589°.
example = {"e": np.array([0.1]), "M": np.radians([5.0])}
published = 5.554589
example_E = np.degrees(eccentric_anomaly(example)[0])
print(f"E = {example_E:.6f}°, published {published}°")

# %%
# Half an orbit, three eccentricities, 150 equations each.
M = np.linspace(0.0, np.pi, 150)
eccentricities = [0.2, 0.6, 0.9]
solved, errors = {}, []
for e in eccentricities:
    lin = eccentric_anomaly.linearize({"e": np.full_like(M, e), "M": M})
    E, dE = lin.y, lin.jacobian()
    closed = {"M": 1 / (1 - e * np.cos(E)), "e": np.sin(E) / (1 - e * np.cos(E))}
    errors += [
        np.abs(dE[name] - closed[name]).max() / closed[name].max() for name in closed
    ]
    solved[e] = E, dE, closed
print(f"largest relative error against the closed form {max(errors):.1e}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
for e, colour in zip(
    eccentricities, ["tab:blue", "tab:orange", "tab:green"], strict=True
):
    E, dE, closed = solved[e]
    axes[0].plot(np.degrees(M), np.degrees(E), color=colour, label=f"e = {e}")
    for ax, name in zip(axes[1:], ["M", "e"], strict=True):
        ax.plot(np.degrees(M), closed[name], color=colour)
        ax.plot(np.degrees(M)[::8], dE[name][::8], "o", color=colour, markersize=4)
axes[0].set(ylabel="eccentric anomaly E (degrees)", title="solutions")
axes[0].legend()
axes[1].set(ylabel="dE/dM", yscale="log", title="lines: closed form, dots: implicitdiff")
axes[2].set(ylabel="dE/de (radians)", title="towards the eccentricity")
for ax in axes:
    ax.set(xlabel="mean anomaly M (degrees)", xticks=range(0, 181, 45))

# %%
# References
# ----------
# .. [1] J. Meeus, *Astronomical Algorithms*, 2nd ed., Willmann-Bell 1998, example 30.a.
