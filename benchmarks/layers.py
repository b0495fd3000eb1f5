"""An equilibrium layer: z = tanh(z Wᵀ + x Uᵀ + b) for a batch of x, and the gradient of all weights.

The batch is one y, whose products are matrix products, or the layer is mapped over its items.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.frameworks import Framework
from benchmarks.measure import Function, Setting, interleave
from benchmarks.report import Row, Skipped
from implicitdiff import FixedPoint, implicit_vjp

__all__ = ["equilibrium"]

RTOL = 1e-10
"""What `auto` asks for in double precision."""


class Layer:
    """Weights, inputs, the fixed point, and the gradient of ‖z‖² by one dense system for each item."""

    def __init__(self, items: int, n: int) -> None:
        rng = np.random.default_rng(0)
        W = rng.normal(size=(n, n))
        self.theta = {
            "W": 0.9 * W / np.linalg.norm(W, 2), "U": rng.normal(size=(n, n)) / n**0.5, "b": 0.1 * rng.normal(size=n)
        }  # fmt: skip
        self.x, self.z = rng.normal(size=(items, n)), np.zeros((items, n))
        for _ in range(400):
            self.z = np.tanh(self.z @ self.theta["W"].T + self.x @ self.theta["U"].T + self.theta["b"])
        slopes = 1 - self.z**2
        A = np.eye(n) - slopes[:, :, None] * self.theta["W"]
        u = slopes * np.linalg.solve(np.swapaxes(A, 1, 2), 2 * self.z[:, :, None])[:, :, 0]
        self.truth = {"W": u.T @ self.z, "U": u.T @ self.x, "b": u.sum(axis=0)}


def layer(z: Any, theta: Any, x: Any) -> Any:
    """T, of one item or of all."""
    return jnp.tanh(z @ theta["W"].T + x @ theta["U"].T + theta["b"])


def ours(z: Any, theta: Any, x: Any) -> Any:
    """By default."""
    return implicit_vjp(FixedPoint(layer), z, theta, 2 * z, args=(x,))


def mapped(gradient: Any) -> Any:
    """Map over the items, and sum what they make of the weights."""

    def run(z: Any, theta: Any, x: Any) -> Any:
        found = jax.vmap(lambda z, x: gradient(z, theta, x))(z, x)
        return jax.tree.map(lambda g: g.sum(axis=0), found)

    return run


def by_products(z: Any, theta: Any, x: Any, count: int) -> Any:
    """As many products with Aᵀ, and one with Bᵀ: what no method does without."""
    _, pull = jax.vjp(lambda z, theta: layer(z, theta, x), z, theta)
    u = jax.lax.fori_loop(0, count, lambda _, v: v - 0.5 * pull(v)[0], 2 * z)
    return pull(u)[1]


def equilibrium(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """Backward pass of a layer of 64 units for a batch of 64, against its products and JAXopt's bicgstab."""
    items, n = (8, 40) if setting.short else (64, 64)
    problem, size = Layer(items, n), f"{items} x n = {n}"
    arrays = jax.tree.map(fw.put, (problem.z, problem.theta, problem.x))
    _, report = implicit_vjp(FixedPoint(layer), *arrays[:2], 2 * arrays[0], args=arrays[2:], return_report=True)
    count = int(report.matvecs)
    ways = {"one y": ours, "mapped": mapped(ours), "products": lambda *a: by_products(*a, count)}
    peer = _jaxopt() if setting.peers else None
    if peer is not None:
        ways.update({"JAXopt, one y": peer, "JAXopt, mapped": mapped(peer)})
    calls = {name: _timed(fw, jax.jit(f), arrays) for name, f in ways.items()}
    times, rows = interleave(calls, setting), list[Row | Skipped]()
    facts = {"matvecs": count, "solver": report.solver}
    for name in ("one y", "mapped"):
        error = max(fw.error(calls[name]()[k], problem.truth[k]) for k in problem.truth)
        case = f"equilibrium layer, {name}"
        rows.append(fw.row(f"{case} / its {count} products", size, times, name, "products", None, error, 1e-6, **facts))
        if peer is not None:
            reference = f"JAXopt, {name}"
            rows.append(fw.row(f"{case} / JAXopt solve_bicgstab", size, times, name, reference, 1.2, error, 1e-6))
        elif setting.peers:
            rows.append(fw.skipped(f"{case} / JAXopt solve_bicgstab", size, "jaxopt cannot be imported"))
    return rows


def _timed(fw: Framework, compiled: Any, arrays: Any) -> Function:
    return fw.timed(lambda: compiled(*arrays))


def _jaxopt() -> Any:
    """Return JAXopt's way to the same gradient, to the same tolerance; None where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that it is no longer maintained
        try:
            from jaxopt.implicit_diff import root_vjp
            from jaxopt.linear_solve import solve_bicgstab
        except ImportError:
            return None

    def solve(product: Any, b: Any) -> Any:
        return solve_bicgstab(product, b, tol=RTOL, maxiter=500)

    def theirs(z: Any, theta: Any, x: Any) -> Any:
        return root_vjp(lambda z, theta: layer(z, theta, x) - z, z, (theta,), 2 * z, solve=solve)[0]

    return theirs
