"""Derivatives inside of ``jax.shard_map``, on four devices made of the CPU; prints the error of each case.

Run by ``test_jax_sharding``, with the names of solvers. On each device min over y of ½ yᵀA y + Σ y⁴/4 − yᵀ(θ ∘ d), with
data d of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from implicitdiff import implicit_function, implicit_jacobian, implicit_vjp

jax.config.update("jax_enable_x64", True)

MESH = Mesh(np.array(jax.devices()), ("b",))
A = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.5, 0.1], [0.0, 0.1, 1.0]])
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
THETA = jnp.array([0.5, -1.0, 2.0])
WEIGHTS = jnp.arange(1.0, 4.0)
SOLVERS = sys.argv[1:]


def local(y: Any, theta: Any, d: Any) -> Any:
    return y @ A @ y / 2 + jnp.sum(y**4) / 4 - y @ (theta * d)


def shared(y: Any, theta: Any, d: Any) -> Any:
    return jax.lax.psum(local(y, theta, d), "b")


def total(y: Any, theta: Any) -> Any:
    return sum(local(y, theta, d) for d in DATA)


@partial(jax.jit, static_argnums=0)
def newton(f: Callable[..., Any], theta: Any, *args: Any) -> Any:
    """Return the minimum, and dy/dθ by the matrices."""
    grad, hess = jax.grad(f), jax.hessian(f)
    step = lambda _, y: y - jnp.linalg.solve(hess(y, theta, *args), grad(y, theta, *args))
    y = jax.lax.fori_loop(0, 15, step, jnp.zeros(3))
    return y, -jnp.linalg.solve(hess(y, theta, *args), jax.jacfwd(grad, argnums=1)(y, theta, *args))


def derivatives(y: Any, d: Any) -> tuple[Any, Any]:
    """All that a device computes: what is summed over devices, and what is its own."""
    y, d = y[0], d[0]
    found = {s: implicit_vjp(local, y, THETA, WEIGHTS, args=(d,), solver=s) for s in SOLVERS}
    solve = implicit_function(local, solver="cg")(lambda theta, d, *, y: y)
    found["wrapped solver"] = jax.grad(lambda theta: solve(theta, d, y=y) @ WEIGHTS)(THETA)
    found["objective"] = implicit_vjp(shared, Y_ALL, THETA, WEIGHTS, args=(d,), solver="cg")
    return found, implicit_jacobian(local, y, THETA, args=(d,))[None]


def main() -> None:
    solutions = [newton(local, THETA, d) for d in DATA]
    y, J = (jnp.stack(parts) for parts in zip(*solutions, strict=True))
    run = jax.shard_map(derivatives, mesh=MESH, in_specs=P("b"), out_specs=(P(), P("b")))
    found, jacobian = jax.jit(run)(y, DATA)
    for name, got in found.items():  # theta is one for all devices, and the derivative by it a sum over them
        show(name, got, WEIGHTS @ (J_ALL if name == "objective" else J.sum(0)))
    show("jacobian", jacobian, J)


def show(name: str, got: Any, want: Any) -> None:
    sys.stdout.write(f"{name}: {float(jnp.max(jnp.abs(got - want))):.1e}\n")


Y_ALL, J_ALL = newton(total, THETA)

if __name__ == "__main__":
    main()
