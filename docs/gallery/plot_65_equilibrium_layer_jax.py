"""
An equilibrium layer in JAX
===========================

An equilibrium layer, z = tanh(W z + U x + b), as a user of JAX writes it: the iteration is the user's
own ``while_loop``, :func:`implicitdiff.implicit_function` makes it differentiable, and ``jax.jit``, ``jax.vmap`` and
``jax.value_and_grad`` go through it like through any other function. It is trained on a batch of sequences, to tell at
every place the mean of what stands two places before and two behind.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import implicitdiff as idf

jax.config.update("jax_enable_x64", True)

# %%
# The map for *one* sequence. All states of the sequence are unknowns of one fixed point: each hears its
# two neighbours and the input, so that z has the shape (places, units). W is scaled so that the map contracts:
# two neighbours make a vector at most √2 longer than z.

PLACES, UNITS = 12, 10


def layer(z, theta, x):
    W = 0.95 * theta["W"] / jnp.sqrt(2 * (1 + jnp.sum(theta["W"] ** 2)))
    end = jnp.zeros((1, UNITS))
    before, after = jnp.concatenate([end, z[:-1]]), jnp.concatenate([z[1:], end])
    neighbours = jnp.concatenate([before, after], axis=1)
    return jnp.tanh(neighbours @ W + x[:, None] * theta["U"] + theta["b"])


# %%
# The solver is plain iteration until nothing moves. Nothing of it is differentiated or stored, so that it may stop when
# it likes. The backward pass is one solve with I − ∂T, whose method is named here.


@idf.implicit_function(idf.FixedPoint(layer), solver="bicgstab")
def equilibrium(theta, x):
    def moving(carry):
        _, change, k = carry
        return (change > 1e-12) & (k < 200)

    def body(carry):
        z, _, k = carry
        new = layer(z, theta, x)
        return new, jnp.abs(new - z).max(), k + 1

    start = (jnp.zeros((PLACES, UNITS)), jnp.inf, 0)
    return jax.lax.while_loop(moving, body, start)[0]


# %%
# The batch comes from ``jax.vmap`` over the sequences, with one theta for all.


def predictions(theta, xs):
    states = jax.vmap(equilibrium, in_axes=(None, 0))(theta, xs)
    return (states @ theta["v"])[:, 2:-2]


def wanted(xs):
    return (xs[:, :-4] + xs[:, 4:]) / 2


def loss(theta, xs):
    return jnp.mean((predictions(theta, xs) - wanted(xs)) ** 2)


rng = np.random.default_rng(1)
theta = {
    "W": jnp.asarray(rng.normal(size=(2 * UNITS, UNITS))),
    "U": jnp.asarray(rng.normal(size=UNITS) / 2),
    "b": jnp.asarray(rng.normal(size=UNITS) / 4),
    "v": jnp.asarray(rng.normal(size=UNITS) / 3),
}
xs = jnp.asarray(rng.uniform(-1, 1, size=(64, PLACES)))
value_and_gradient = jax.jit(jax.value_and_grad(loss))

# %%
# The gradient along one direction, against central differences of the layer solved anew.
_, gradient = value_and_gradient(theta, xs)
direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), theta)
slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))


def along(step):
    moved = jax.tree.map(lambda p, d: p + step * d, theta, direction)
    return value_and_gradient(moved, xs)[0]


difference = (along(1e-5) - along(-1e-5)) / 2e-5
print(f"slope by implicitdiff {slope:.9f}, by differences {difference:.9f}")

# %%
# Training by Adam, whose every step is one compiled call.


@jax.jit
def step(theta, m, v, k, xs):
    value, g = jax.value_and_grad(loss)(theta, xs)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, v, g)

    def update(p, m, v):
        return p - 0.02 * (m / (1 - 0.9**k)) / (jnp.sqrt(v / (1 - 0.99**k)) + 1e-8)

    return jax.tree.map(update, theta, m, v), m, v, value


trained, zeros = theta, jax.tree.map(jnp.zeros_like, theta)
m, v, losses = zeros, zeros, []
for k in range(1, 401):
    trained, m, v, value = step(trained, m, v, float(k), xs)
    losses.append(float(value))
print(f"mean square error {losses[0]:.3f} before, {losses[-1]:.4f} after {k} steps")

# %%
# A sequence that it has not seen.
new = jnp.asarray(rng.uniform(-1, 1, size=(1, PLACES)))
inner = np.arange(2, PLACES - 2)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(new[0], ".-", color="tab:gray", label="input", alpha=0.4)
left.plot(inner, wanted(new)[0], "k--", label="wanted")
left.plot(inner, predictions(theta, new)[0], color="tab:orange", label="before training")
left.plot(inner, predictions(trained, new)[0], color="tab:blue", label="after")
left.set(xlabel="place", title="a new sequence")
left.legend()
right.semilogy(losses, color="tab:blue")
right.set(xlabel="step of Adam", ylabel="mean square error", title="training")
