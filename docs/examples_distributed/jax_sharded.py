"""The gradient of a loss through a ridge regression, with the data and the weights spread over eight devices.

Run with eight devices of a machine, or with eight made of one CPU::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python jax_sharded.py
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from implicitdiff import CG, implicit_grad

jax.config.update("jax_enable_x64", True)


def objective(y, theta, X, T):
    """Squared error, and one penalty for each feature and for each output."""
    error = X @ y["weights"] + y["offset"] - T
    penalty = jnp.sum(jnp.exp(theta["feature"])[:, None] * y["weights"] ** 2) + jnp.sum(
        theta["output"] * y["offset"] ** 2
    )
    return (jnp.sum(error**2) + penalty) / 2


def outer(y, theta):
    """Something of the solution that is to be small."""
    return sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(y))


def solved(X, T, theta):
    """The minimum, by the normal equations, on one device."""
    Z = np.hstack([X, np.ones((len(X), 1))])
    columns = []
    for k in range(T.shape[1]):
        penalty = np.append(np.exp(theta["feature"]), theta["output"][k])
        columns.append(np.linalg.solve(Z.T @ Z + np.diag(penalty), Z.T @ T[:, k]))
    whole = np.stack(columns, axis=1)
    return {"weights": jnp.asarray(whole[:-1]), "offset": jnp.asarray(whole[-1])}


def program_of(gradient, *arguments):
    """The compiled program, as text."""
    return jax.jit(gradient).lower(*arguments).compile().as_text()


def main():
    rng = np.random.default_rng(0)
    X, T = rng.normal(size=(64, 16)), rng.normal(size=(64, 3))
    theta = {"feature": jnp.asarray(rng.normal(size=16)), "output": jnp.asarray(rng.uniform(1, 2, size=3))}
    y = solved(X, T, jax.tree.map(np.asarray, theta))
    X, T = jnp.asarray(X), jnp.asarray(T)

    def gradient(y, theta, X, T):
        return implicit_grad(objective, outer, y, theta, args=(X, T), solver=CG(rtol=1e-13), return_report=True)

    alone, _ = gradient(y, theta, X, T)

    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    # name: how X and T, the weights, and the penalties of the features are spread; the rest is on every device
    layouts = {
        "examples": (("d", None), ("d", None), (None, None), (None,)),
        "features": ((None, "d"), (None, None), ("d", None), ("d",)),
    }
    for name, (rows, targets, weights, feature) in layouts.items():

        def put(x, spec, mesh=mesh):
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

        at = {"weights": put(y["weights"], weights), "offset": put(y["offset"], (None,))}
        to = {"feature": put(theta["feature"], feature), "output": put(theta["output"], (None,))}
        spread, report = gradient(at, to, put(X, rows), put(T, targets))
        error = max(np.max(np.abs(np.asarray(spread[k]) - alone[k])) / np.max(np.abs(alone[k])) for k in alone)
        pairs = [
            *zip(spread.values(), (to[k] for k in spread)),
            *zip(report.solution.leaves, (at[k] for k in sorted(at))),
        ]
        kept = all(got.sharding.is_equivalent_to(like.sharding, got.ndim) for got, like in pairs)
        text = program_of(gradient, at, to, put(X, rows), put(T, targets))
        gathers = len(re.findall(r"all-gather|all-to-all|collective-permute", text))
        reduces = "all-reduce" in text
        print(f"{name}: error {error:.1e}, sharding kept: {kept}, gathers in the program: {gathers}, sums: {reduces}")


if __name__ == "__main__":
    main()
