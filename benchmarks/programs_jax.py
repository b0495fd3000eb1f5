"""What belongs to compiled programs: the time to compile one, GMRES at any restart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.sparse.linalg import cg

from benchmarks.frameworks import RTOL, Framework
from benchmarks.measure import Setting, interleave
from benchmarks.problems import Logistic, relative_error
from benchmarks.report import Row, Skipped
from implicitdiff import CG, GMRES, implicit_vjp, linear_solve

__all__ = ["compiling", "restarts"]

RESTARTS = (10, 50, 200, None)


def compiling(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """First call under jit, from nothing to the result, against that of the same gradient written by hand."""
    problem = Logistic(*((20, 60) if setting.short else (100, 700)))
    arrays = [fw.put(x) for x in (problem.W, problem.theta, problem.cotangent, problem.X, problem.Y)]
    gradient = fw.grad(fw.logistic)

    def ours(W: Any, theta: Any, v: Any, *args: Any) -> Any:
        return implicit_vjp(fw.logistic, W, theta, v, args=args, solver=CG(rtol=RTOL))

    def by_hand(W: Any, theta: Any, v: Any, *args: Any) -> Any:
        _, product = jax.linearize(lambda W: gradient(W, theta, *args), W)
        u = cg(product, v, tol=RTOL)[0]
        return -jax.vjp(lambda theta: gradient(W, theta, *args), theta)[1](u)[0]

    def first(function: Callable[..., Any]) -> Callable[[], Any]:
        # a function of its own each time: JAX knows a program again by the function that it is made of
        return fw.timed(lambda: jax.jit(lambda *given: function(*given))(*arrays))

    times = interleave({"ours": first(ours), "by hand": first(by_hand)}, setting)
    error = fw.error(jax.jit(ours)(*arrays), problem.truth)
    case, size = "first call under jit, cg / by hand with jax.scipy's cg", f"n = {problem.n}"
    return [fw.row(case, size, times, "ours", "by hand", 1.3, error, 1e-6)]


def restarts(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """GMRES where eleven steps do, whatever was made room for, against those products and their orthogonalisation."""
    n = 60 if setting.short else 2000
    rng = np.random.default_rng(0)
    A, b = np.eye(n) - 0.1 * rng.normal(size=(n, n)) / n**0.5, rng.normal(size=n)
    truth, matrix, right = np.linalg.solve(A, b), fw.put(A), fw.put(b)

    def ours(restart: int | None, A: Any, b: Any) -> Any:
        return linear_solve(lambda x: A @ x, b, solver=GMRES(restart=restart), return_report=True)

    steps = int(jax.jit(partial(ours, None))(matrix, right)[1].iterations)
    ways = {str(k): jax.jit(lambda A, b, k=k: ours(k, A, b)[0]) for k in RESTARTS}
    ways["floor"] = jax.jit(lambda A, b: _arnoldi(A, b, steps))
    calls = {name: fw.timed(lambda f=f: f(matrix, right)) for name, f in ways.items()}
    times, rows = interleave(calls, setting), list[Row | Skipped]()
    for name in map(str, RESTARTS):
        error = relative_error(fw.numpy(calls[name]()), truth)
        case = f"gmres, restart {name} / its {steps} products, orthogonalised"
        rows.append(fw.row(case, f"n = {n}", times, name, "floor", 1.3, error, 1e-6, iterations=steps))
    return rows


def _arnoldi(A: Any, b: Any, steps: int) -> Any:
    """So many products with A, each orthogonalised twice against those before."""
    basis = jnp.zeros((steps + 1, b.shape[0])).at[0].set(b / jnp.linalg.norm(b))

    def step(j: Any, basis: Any) -> Any:
        w = A @ basis[j]
        for _ in range(2):
            w = w - (basis @ w) @ basis
        return basis.at[j + 1].set(w / jnp.linalg.norm(w))

    return lax.fori_loop(0, steps, step, basis)
