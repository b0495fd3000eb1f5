"""
Learning to denoise an image through its most likely estimate
=============================================================

A continuous Markov random field gives the denoised image y as the minimum of an energy. Here, for the noisy
image x,

    E(y; x, θ) = ½ ‖y − x‖² + Σₖ exp(θₖ) Σ ρ(Dₖ y),

where D₁ … D₄ are differences of neighbours to the right, below and on the two diagonals. Samuel and Tappen
[1]_ learn the weights of such an energy from examples: the loss is the distance of the minimum from the
clean image, and its gradient goes through the minimum by the implicit function theorem. Two penalties are
compared: the Gaussian ρ(z) = z²/2, and the robust ρ(z) = √(z² + ε²), which tolerates edges.
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from scipy.optimize import minimize

import implicitdiff as idf

# %%
# Two images of 24 × 24 pixels: one to learn from, one to test. The noise has the standard deviation 0.15.


def image(seed, size=24):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    clean = np.full((size, size), 0.3)
    for level in (0.9, 0.1, 0.6, 1.0):
        centre, radius = rng.uniform(4, size - 4, 2), rng.uniform(3, 7)
        clean[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2] = level
    clean[:, : size // 5] = 0.7
    return clean, clean + 0.15 * rng.normal(size=clean.shape)


clean, noisy = image(1)
test_clean, test_noisy = image(2)

# %%
# The energies. The logarithm of ε is learned as well: a dict holds the parameters.


def differences(y):
    return [
        y[:, 1:] - y[:, :-1],
        y[1:] - y[:-1],
        y[1:, 1:] - y[:-1, :-1],
        y[1:, :-1] - y[:-1, 1:],
    ]


def gaussian(y, theta, x):
    pairs = [
        anp.exp(w) * anp.sum(d**2) / 2
        for w, d in zip(theta["weights"], differences(y), strict=True)
    ]
    return 0.5 * anp.sum((y - x) ** 2) + sum(pairs)


def robust(y, theta, x):
    eps = anp.exp(theta["eps"])
    pairs = [
        anp.exp(w) * anp.sum(anp.sqrt(d**2 + eps**2))
        for w, d in zip(theta["weights"], differences(y), strict=True)
    ]
    return 0.5 * anp.sum((y - x) ** 2) + sum(pairs)


# %%
# The minimum over 576 pixels comes from SciPy. The gradient of the loss takes a solve with the Hessian of the
# energy, by conjugate gradients, with products by autograd.
slope = {energy: grad(energy) for energy in (gaussian, robust)}


def denoise(energy, theta, x, tol=1e-9):
    found = minimize(
        lambda y: energy(y.reshape(x.shape), theta, x),
        x.ravel(),
        jac=lambda y: slope[energy](y.reshape(x.shape), theta, x).ravel(),
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "ftol": 0, "gtol": tol, "maxcor": 30},
    )
    return found.x.reshape(x.shape)


def loss(y, theta):
    return 0.5 * anp.sum((y - clean) ** 2)


def value_and_gradient(energy, theta):
    y = denoise(energy, theta, noisy)
    gradient, report = idf.implicit_grad(
        energy, loss, y, theta, args=(noisy,), solver="cg", return_report=True
    )
    return loss(y, theta), gradient, report


start = {"weights": np.log(np.full(4, 0.1)), "eps": np.log(0.1)}
value, gradient, report = value_and_gradient(robust, start)
print(f"{report.solver}, {report.iterations} iterations, residual {report.residual:.0e}")

# %%
# Check: central differences of the whole, with the image denoised again at each of the ten points.
step = 1e-3
numeric = []
for k in range(5):
    losses = []
    for sign in (1, -1):
        weights, eps = start["weights"].copy(), start["eps"]
        if k < 4:
            weights[k] += sign * step
        else:
            eps += sign * step
        losses.append(
            loss(denoise(robust, {"weights": weights, "eps": eps}, noisy), None)
        )
    numeric.append((losses[0] - losses[1]) / (2 * step))
found = np.append(gradient["weights"], gradient["eps"])
difference_error = np.abs(found - numeric).max() / np.abs(numeric).max()
print("gradient          ", found.round(5))
print(
    "differences       ",
    np.round(numeric, 5),
    f" largest relative error {difference_error:.0e}",
)

# %%
# Learning: a quasi-Newton method on the five parameters, of the Gaussian energy on its four.


def learn(energy, theta):
    def objective(flat):
        parameters = {"weights": flat[:4]} | ({"eps": flat[4]} if len(flat) > 4 else {})
        value, gradient, _ = value_and_gradient(energy, parameters)
        return value, np.append(gradient["weights"], gradient.get("eps", []))

    flat = np.append(theta["weights"], theta.get("eps", []))
    best = minimize(
        objective,
        flat,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-6, 2)] * flat.size,
        options={"maxiter": 15},
    )
    return {"weights": best.x[:4]} | ({"eps": best.x[4]} if flat.size > 4 else {})


def psnr(y, clean):
    return -10 * np.log10(np.mean((y - clean) ** 2))


learned = {
    gaussian: learn(gaussian, {"weights": start["weights"]}),
    robust: learn(robust, start),
}
results = {"noisy": test_noisy}
for energy, theta in learned.items():
    results[energy.__name__] = denoise(energy, theta, test_noisy)
quality = {name: psnr(y, test_clean) for name, y in results.items()}
for name, decibels in quality.items():
    print(f"test image, {name:>8}: {decibels:.1f} dB")

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
panels = {"clean test image": test_clean} | {
    f"{k}, {quality[k]:.1f} dB": y for k, y in results.items()
}
for ax, (title, y) in zip(axes, panels.items(), strict=True):
    shown = ax.imshow(y, cmap="gray", vmin=-0.1, vmax=1.2)
    ax.set(title=title, xticks=[], yticks=[])
fig.colorbar(shown, ax=axes, label="intensity", shrink=0.9)

# %%
# References
# ----------
# .. [1] K. G. G. Samuel, M. F. Tappen, "Learning optimized MAP estimates in continuously-valued MRF models",
#    CVPR 2009. `DOI 10.1109/CVPR.2009.5206774 <https://doi.org/10.1109/CVPR.2009.5206774>`_
