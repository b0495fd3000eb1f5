"""The gradient as deep declarative networks make it: the whole Hessian by autodiff, and a dense solve.

References
----------
S. Gould, R. Hartley, D. Campbell, "Deep declarative networks", IEEE TPAMI 44 (2022) 3988-4004. arXiv:1909.04866
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.families import Instance

__all__ = ["by_assembly"]


def by_assembly(where: Any, problem: Instance) -> Callable[[], Any]:
    """Return a function that computes the gradient in Torch, or in JAX under jit; nothing is checked.

    Parameters
    ----------
    where : Where
        Torch or JAX on a device.
    problem : Instance
        With an objective.
    """
    fun: Any = problem.condition(True).fun  # type: ignore[attr-defined]
    y, theta, v = (where.put(x) for x in (problem.y, problem.theta, problem.cotangent))
    args, n = tuple(map(where.put, problem.args)), problem.y.size
    functions = where.module if where.backend == "jax" else where.module.func
    solve = where.module.numpy.linalg.solve if where.backend == "jax" else where.module.linalg.solve

    def gradient(y: Any, theta: Any, v: Any, *args: Any) -> Any:
        H = functions.hessian(lambda z: fun(z, theta, *args))(y).reshape(n, n)
        u = solve(H, v.reshape(n, 1)).reshape(y.shape)
        return -functions.vjp(lambda t: functions.grad(fun)(y, t, *args), theta)[1](u)[0]

    run = where.module.jit(gradient) if where.backend == "jax" else gradient
    return lambda: run(y, theta, v, *args)
