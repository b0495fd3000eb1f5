"""The gradient through SciPy's own solvers: the same callables, the same tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
from scipy.sparse.linalg import LinearOperator

from benchmarks.families import Instance

__all__ = ["by_scipy"]

RTOL = 1e-10


def by_scipy(problem: Instance, name: str) -> Callable[[], tuple[Any, int, int]]:
    """Return a function that computes the gradient, SciPy's ``info`` and the number of products.

    Parameters
    ----------
    problem : Instance
    name : {"cg", "minres", "gmres", "spsolve"}
    """
    condition: Any = problem.condition(False)
    y, theta, args, n = problem.y, problem.theta, problem.args, problem.y.size
    mixed = condition.mixed_vjp
    sign = 1.0 if hasattr(condition, "vjp") else -1.0  # F = y − T has B = −∂T/∂θ
    count = [0]

    def matvec(v: Any) -> Any:
        count[0] += 1
        return problem.product(y, theta, v.reshape(y.shape), *args).ravel()  # type: ignore[misc]

    def solve() -> tuple[Any, int]:
        v = problem.cotangent.ravel()
        if name == "spsolve":
            return scipy.sparse.linalg.splu(condition.hessian(y, theta, *args)).solve(v), 0
        A = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
        options: dict[str, Any] = {"rtol": RTOL, "maxiter": 10 * n}
        if name != "minres":
            options["atol"] = 0.0
        if name == "gmres":
            options["restart"] = 50
        u, info = getattr(scipy.sparse.linalg, name)(A, v, **options)
        return u, info

    def call() -> tuple[Any, int, int]:
        count[0] = 0
        u, info = solve()
        return sign * mixed(y, theta, u.reshape(y.shape), *args), info, count[0]

    return call
