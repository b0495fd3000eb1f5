"""
Back-propagation is the implicit function theorem
=================================================

All activations of a network, taken together, are the root of one system,

    Fᵢ(z, θ) = zᵢ − tanh(Wᵢ zᵢ₋₁ + bᵢ) = 0 for every layer i.

A = ∂F/∂z is block lower triangular with ones on its diagonal. The adjoint system Aᵀ u = ∂L/∂z is upper
triangular, and solving it from the last block to the first is back-propagation: u holds the derivatives
of the loss with respect to the activations.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from scipy.linalg import solve_triangular

import implicitdiff as idf

# %%
# A network of four layers and a loss.
rng = np.random.default_rng(5)
sizes = [3, 6, 5, 4, 2]
layers = [
    {"W": rng.normal(size=(b, a)), "b": rng.normal(size=b)} for a, b in pairwise(sizes)
]
x, target = rng.normal(size=3), rng.normal(size=2)


def network(layers):
    z = [x]
    for layer in layers:
        z.append(anp.tanh(layer["W"] @ z[-1] + layer["b"]))
    return z[1:]


def residuals(z, layers):
    before = [x, *z[:-1]]
    return [
        zi - anp.tanh(layer["W"] @ zb + layer["b"])
        for zi, zb, layer in zip(z, before, layers, strict=True)
    ]


def loss(z, layers):
    return anp.sum((z[-1] - target) ** 2)


# %%
# Back substitution, as a solver: it never factors anything. It keeps what it was given, for the figure.
seen = []


@dataclass(frozen=True)
class BackSubstitution(idf.Solver):
    """Solve with a triangular matrix with ones on its diagonal."""

    name: ClassVar[str] = "back substitution"

    def init(self, operator):
        seen.append(operator.dense())
        return seen[-1], False

    def transpose(self, state):
        return state[0], not state[1]

    def solve(self, state, b, x0=None):
        matrix, transposed = state
        u = solve_triangular(
            matrix, b, trans=int(transposed), lower=True, unit_diagonal=True
        )
        return u, idf.Status.CONVERGED, idf.Counts()


z = network(layers)
gradient, report = idf.implicit_grad(
    idf.Root(residuals), loss, z, layers, solver=BackSubstitution(), return_report=True
)
ordinary = grad(lambda layers: loss(network(layers), layers))(layers)


# %%
# Three ways to the same gradient: back substitution in the adjoint system, LU of the same matrix, and
# autograd's back-propagation through the network.
def flat(tree):
    return np.concatenate(
        [part.ravel() for layer in tree for part in (layer["W"], layer["b"])]
    )


by_lu = idf.implicit_grad(idf.Root(residuals), loss, z, layers, solver="lu")
size = np.abs(flat(ordinary)).max()
error = np.abs(flat(gradient) - flat(ordinary)).max() / size
error_lu = np.abs(flat(by_lu) - flat(ordinary)).max() / size
A = seen[0]
print(f"relative difference from back-propagation: {error:.1e} by back substitution,")
print(f"{error_lu:.1e} by LU")
print(f"largest entry of A above its diagonal: {np.abs(np.triu(A, 1)).max():.1f}")

# %%
# The adjoint u of the first layer is autograd's derivative with respect to their activations.
adjoint = report.solution
first = sizes[1]


def from_first(z_1):
    z = z_1
    for layer in layers[1:]:
        z = anp.tanh(layer["W"] @ z + layer["b"])
    return anp.sum((z - target) ** 2)


adjoint_error = np.abs(adjoint[:first] - grad(from_first)(z[0])).max()
print(f"largest error of the adjoint of the first layer: {adjoint_error:.1e}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
shown = left.imshow(A, cmap="RdBu_r", vmin=-2, vmax=2)
for edge in np.cumsum(sizes[1:])[:-1] - 0.5:
    left.axhline(edge, color="k", linewidth=0.6)
    left.axvline(edge, color="k", linewidth=0.6)
left.set(
    xlabel="activation",
    ylabel="equation",
    title="A = ∂F/∂z, a block for each pair of layers",
)
fig.colorbar(shown, ax=left, shrink=0.8)
right.plot(flat(ordinary), flat(gradient), "o", markersize=4)
right.axline((0, 0), slope=1, color="k", linewidth=0.7)
right.set(
    xlabel="back-propagation (autograd)",
    ylabel="implicitdiff",
    title="gradient of the loss, each weight",
)
