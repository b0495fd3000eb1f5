"""
A conservation law as a root
============================

Burgers' equation ∂u/∂t + u ∂u/∂x = 0 carries each value u along a straight line, so until the first shock
its solution at (x, t) is the root u of

    G(u; x, t, a) = u − g(x − u t; a) = 0,

where g is the profile at t = 0 [1]_. The root can be found with any solver. Its derivatives with respect to
position, time and the parameters of the profile cost one solve each, here with the number ∂G/∂u = 1 + t g′:

    | ∂u/∂x = g′ / (1 + t g′),
    | ∂u/∂t = −u g′ / (1 + t g′),
    | ∂u/∂a = (∂g/∂a) / (1 + t g′).
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import newton

import implicitdiff as idf

# %%
# The profile is a bump of height a. The first shock forms at t = √e / a, where 1 + t g′ reaches zero.


def g(x, a):
    return a * anp.exp(-(x**2) / 2)


def residual(u, theta):
    return u - g(theta["x"] - u * theta["t"], theta["a"])


def solve(theta):
    def slope(u, theta):
        shift = theta["x"] - u * theta["t"]
        return 1 - theta["t"] * shift * g(shift, theta["a"])

    start = g(theta["x"], theta["a"])
    return newton(residual, start, fprime=slope, args=(theta,), tol=1e-14, maxiter=200)


# %%
# One root for each of 241 positions. They do not depend on one another: ``batched=True`` takes them as a
# batch of scalar problems, and the Jacobian has one number for each.
x = np.linspace(-3, 4, 241)
t, a = 1.3, 1.0
theta = {"x": x, "t": np.full_like(x, t), "a": np.full_like(x, a)}
u = solve(theta)
du = idf.implicit_jacobian(idf.Root(residual), u, theta, batched=True)

# %%
# Checks: the closed form, and the conservation law itself, which nobody told the library.
shift = x - u * t
slope = -shift * g(shift, a)
closed = {
    "x": slope / (1 + t * slope),
    "t": -u * slope / (1 + t * slope),
    "a": g(shift, 1.0) / (1 + t * slope),
}
closed_error = max(np.abs(du[name] - closed[name]).max() for name in closed)
law_error = np.abs(du["t"] + u * du["x"]).max()
print(f"largest error against the closed form {closed_error:.1e}")
print(f"largest |u_t + u u_x|                 {law_error:.1e}")
print(
    f"steepest slope {du['x'].min():.3f} at t = {t}, a shock at t = {np.sqrt(np.e) / a:.3f}"
)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for time, shade in [(0.0, 0.35), (0.65, 0.6), (1.3, 1.0)]:
    profile = solve({**theta, "t": np.full_like(x, time)})
    left.plot(x, profile, color="tab:blue", alpha=shade, label=f"t = {time}")
left.set(xlabel="position x", ylabel="u", title="the profile steepens")
left.legend()
for name, colour in [("x", "tab:orange"), ("t", "tab:green"), ("a", "tab:red")]:
    right.plot(x, closed[name], color=colour, label=f"∂u/∂{name}, closed form")
    right.plot(x[::12], du[name][::12], "o", color=colour, markersize=4)
right.set(
    xlabel="position x", ylabel="derivative of u", title=f"t = {t} (dots: implicitdiff)"
)
right.legend(loc="lower left")

# %%
# References
# ----------
# .. [1] G. B. Whitham, *Linear and Nonlinear Waves*, Wiley 1974, chapter 2.
#    `DOI 10.1002/9781118032954 <https://doi.org/10.1002/9781118032954>`_
