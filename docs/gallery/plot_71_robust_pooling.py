"""
Robust pooling, and objectives with kinks
=========================================

Pooling replaces numbers xᵢ by one number y that minimises Σᵢ φ(y − xᵢ). Which φ is used decides what an
outlier does to y, and to its derivative [1]_,

    dy/dxᵢ = φ″(y − xᵢ) / Σⱼ φ″(y − xⱼ).

Some penalties have kinks, or kinks in their slope. There the formula holds on either side, and at the kink
itself a smooth neighbour gives a derivative in between.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf

# %%
# Five penalties with the width α = 1, and the weight φ′(z)/z of each. From −1 to 1 the Huber and the truncated
# penalty are the quadratic one.
penalties = {
    "quadratic": lambda z: z**2 / 2,
    "pseudo-Huber": lambda z: anp.sqrt(1 + z**2) - 1,
    "Huber": lambda z: anp.where(anp.abs(z) <= 1, z**2 / 2, anp.abs(z) - 0.5),
    "Welsch": lambda z: 1 - anp.exp(-(z**2) / 2),
    "truncated": lambda z: anp.where(anp.abs(z) <= 1, z**2 / 2, 0.5),
}
weights = {
    "quadratic": np.ones_like,
    "pseudo-Huber": lambda z: 1 / np.sqrt(1 + z**2),
    "Huber": lambda z: 1 / np.maximum(np.abs(z), 1),
    "Welsch": lambda z: np.exp(-(z**2) / 2),
    "truncated": lambda z: (np.abs(z) <= 1) * 1.0,
}

# %%
# Nine numbers stay, the tenth moves from −1 to 4. Weighted means, repeated, find a minimum next to the median
# for all its positions at once.
fixed = np.array([-0.9, -0.6, -0.35, -0.2, 0.0, 0.1, 0.3, 0.55, 0.8])


def pool(weight, x):
    y = np.median(x, axis=-1)
    for _ in range(2000):
        w = weight(y[..., None] - x)
        y, before = np.sum(w * x, axis=-1) / np.sum(w, axis=-1), y
        if np.abs(y - before).max() < 1e-15:
            break
    return y


def with_tenth(s):
    return np.concatenate(
        [np.broadcast_to(fixed, (*np.shape(s), 9)), np.asarray(s)[..., None]], axis=-1
    )


s = np.linspace(-1, 4, 201)
x = with_tenth(s)
pooled, slopes, differences = {}, {}, {}
for name, penalty in penalties.items():
    y = pool(weights[name], x)
    jacobian = idf.implicit_jacobian(
        lambda y, x, penalty=penalty: anp.sum(penalty(y[..., None] - x), axis=-1),
        y,
        x,
        batched=True,
    )
    pooled[name], slopes[name] = y, jacobian[:, -1]
    h = 1e-5
    ahead, back = (pool(weights[name], with_tenth(s + d)) for d in (h, -h))
    differences[name] = (ahead - back) / (2 * h)

# %%
# Check against central differences of the pooled value. They mean nothing where a kink, or the jump of the
# truncated mean, lies between the two points.
agreement = {}
for name in penalties:
    error = np.abs(slopes[name] - differences[name])
    agreement[name] = np.mean(error < 1e-6)
    print(
        f"{name:>12}: {np.sum(error < 1e-6)} of {s.size} agree, median error {np.median(error):.0e}"
    )

# %%
# At a kink
# ---------
# Where the tenth number is at the distance 1 from y, the slope of the Huber penalty has a kink. Inside it pulls y
# by 1/10 of its own shift, outside by nothing. The pseudo-Huber penalty is smooth, and gives a value in between.
kink_position = 1 + (fixed.sum() + 1) / 9


def slope_at(name, s):
    x = with_tenth(s)
    objective = lambda y, x: anp.sum(penalties[name](y - x))
    return idf.implicit_jacobian(objective, pool(weights[name], x[None])[0], x)[-1]


at_kink = {
    "Huber, 1e-6 inside": slope_at("Huber", kink_position - 1e-6),
    "Huber, 1e-6 outside": slope_at("Huber", kink_position + 1e-6),
    "pseudo-Huber": slope_at("pseudo-Huber", kink_position),
}
for name, value in at_kink.items():
    print(f"{name:>20}: dy/dx = {value:.4f}")

# %%
# The absolute value as a penalty gives the median. Its slope is a sign and its second derivative zero, so the
# formula has nothing to say. For an even number of data any point between the middle two is a median, and the
# library refuses to differentiate it. Smoothed to √(z² + ε²) the penalty has a second derivative. As ε falls, dy/dx
# becomes that of the median of five numbers: 1 for the one in the middle, 0 for the others.
numbers = np.array([-0.9, -0.2, 0.3, 0.55, 2.0])
median = idf.Stationary(grad=lambda y, x: np.sum(np.sign(y - x)))
try:
    idf.implicit_jacobian(median, np.array(0.1), numbers[:4])
except idf.SingularError as problem:
    message = str(problem).splitlines()[0]
    print(message)

widths = 10.0 ** np.arange(0, -3.1, -0.5)
median_errors = []
for width in widths:
    smooth = lambda y, x, e=width: anp.sum(anp.sqrt((y - x) ** 2 + e**2))
    y = pool(lambda z, e=width: 1 / np.sqrt(z**2 + e**2), numbers[None])[0]
    derivative = idf.implicit_jacobian(smooth, y, numbers)
    median_errors.append(np.abs(derivative - np.array([0, 0, 1, 0, 0])).max())
print("errors for the median:", " ".join(f"{error:.0e}" for error in median_errors))

# %%
fig, (value, slope, kink) = plt.subplots(1, 3, figsize=(10.5, 3.7), layout="constrained")
for name, y in pooled.items():
    (line,) = value.plot(s, y, label=name)
    slope.plot(s, differences[name], color=line.get_color(), linewidth=1)
    slope.plot(s[::8], slopes[name][::8], "o", color=line.get_color(), markersize=3.5)
value.set(xlabel="position of the tenth number", ylabel="pooled value y", title="y")
value.legend(fontsize="small")
slope.set(
    xlabel="position of the tenth number",
    ylabel="dy/dx of the tenth number",
    ylim=(-0.15, 0.3),
    title="lines: differences, dots: implicitdiff",
)
kink.loglog(widths, median_errors, "o-")
kink.set(
    xlabel="width of the smoothing ε", ylabel="error of dy/dx", title="smoothed median"
)

# %%
# References
# ----------
# .. [1] S. Gould, R. Hartley, D. Campbell, "Deep declarative networks", IEEE TPAMI 44 (2022) 3988-4004.
#    `arXiv:1909.04866 <https://arxiv.org/abs/1909.04866>`_
