"""One gradient through Bratu's equation on a grid: A by its colours and SuperLU, SuperLU by hand, and CG."""

from __future__ import annotations

from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from benchmarks.measure import Setting, interleave, ratio
from benchmarks.problems import relative_error
from benchmarks.report import Row
from implicitdiff import CG, Stationary, implicit_vjp

__all__ = ["Bratu", "sparse"]

SIDE = 300
BY_HAND = 2.0
"""What the ratio to a Jacobian written by hand, factored by SuperLU, may be."""
SECONDS = 1.0
"""What a gradient may take, the first one too."""


class Bratu:
    """−Δu = λ exp(u) on a square of side² points, u = 0 around it, and its solution for λ = 1.

    Parameters
    ----------
    side : int
    """

    def __init__(self, side: int) -> None:
        self.side, self.area, self.theta = side, 1.0 / (side + 1) ** 2, np.array([1.0])
        chain = sp.diags_array([-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], offsets=[-1, 0, 1])
        eye = sp.eye_array(side)
        self.laplacian = (sp.kron(chain, eye) + sp.kron(eye, chain)).tocsc()
        self.cotangent = np.ones(side * side)
        self.y = np.zeros(side * side)
        for _ in range(6):
            self.y = self.y - self.factored().solve(self.residual(self.y, self.theta))

    def residual(self, u: Any, lam: Any) -> Any:
        """F, the gradient of an energy, without a matrix."""
        inside = u.reshape(self.side, self.side)
        around = np.zeros((self.side + 2, self.side + 2), dtype=u.dtype)
        around[1:-1, 1:-1] = inside
        neighbours = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2]
        return (4 * inside - neighbours - lam[0] * self.area * np.exp(inside)).ravel()

    def factored(self) -> Any:
        """Factors of the Jacobian at y, which is written by hand."""
        A = self.laplacian - sp.diags_array(self.theta[0] * self.area * np.exp(self.y))
        options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
        return splu(A.tocsc(), **options)

    def by_hand(self) -> np.ndarray:
        """The gradient."""
        return np.array([self.area * np.exp(self.y) @ self.factored().solve(self.cotangent)])

    @cached_property
    def condition(self) -> Stationary:
        """With the pattern of the five points."""
        return Stationary(grad=self.residual, sparsity=self.laplacian)


def sparse(setting: Setting) -> list[Row]:
    """A gradient with a pattern against the same by hand, against CG, and the first one, with its colouring."""
    side = 40 if setting.short else SIDE
    problem, free = Bratu(side), CG(rtol=1e-8)
    where, bare = (problem.y, problem.theta, problem.cotangent), Stationary(grad=problem.residual)
    start = setting.now()
    g, report = implicit_vjp(problem.condition, *where, return_report=True)
    first = setting.now() - start
    by_cg, loose = implicit_vjp(bare, *where, solver=free, return_report=True)
    times = interleave(
        {
            "ours": lambda: implicit_vjp(problem.condition, *where),
            "by hand": problem.by_hand,
            "cg": lambda: implicit_vjp(bare, *where, solver=free),
        },
        setting,
    )
    truth, size = problem.by_hand(), f"n = {side}²"
    errors = relative_error(g, truth), relative_error(by_cg, truth)
    facts = {"products": report.matvecs, "reason": report.reason, "first call": first, "products of cg": loose.matvecs}
    rows = [
        Row(f"sparse gradient / {name}", size, median(times["ours"]), median(times[of]), ratio(times, "ours", of), bar,
            errors[0], 1e-9, facts=facts)
        for name, of, bar in (("Jacobian and SuperLU by hand", "by hand", BY_HAND), ("cg", "cg", 1.0))
    ]  # fmt: skip
    found = ratio({"first": [first], "bar": [SECONDS]}, "first", "bar")
    rows.append(
        Row("sparse gradient, first call / 1 s", size, first, SECONDS, found, 1.0, errors[1], 1e-4, facts=facts)
    )
    return rows
