"""Whether the cost of a gradient grows with n and no faster, up to n = 10⁷."""

from __future__ import annotations

from functools import partial
from statistics import median

from benchmarks.measure import Setting, interleave, spread
from benchmarks.problems import Diagonal, relative_error
from benchmarks.report import Row
from implicitdiff import CG, implicit_vjp

__all__ = ["CASE", "scale"]

CASE = "scale, cg: a gradient / (iterations + 2) products and the vector work of CG"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
RTOL = 1e-8


def scale(setting: Setting) -> list[Row]:
    """A gradient by CG of a problem with a diagonal A, which is all vector work, against the same vector work alone.

    An iteration reads and writes eleven vectors beside the product: x and p, r and A p, r, p and r, and two inner
    products. Where a vector outgrows a cache both get slower.
    """
    rows = []
    for n in (1000, 10_000) if setting.short else SIZES:
        problem, solver = Diagonal(n), CG(rtol=RTOL)
        where = (problem.condition, problem.y, problem.theta, problem.cotangent)
        value, report = implicit_vjp(*where, solver=solver, return_report=True)
        times = interleave(
            {
                "ours": partial(implicit_vjp, *where, solver=solver),
                "floor": partial(_vector_work, problem, report.iterations),
            },
            setting,
        )
        found = spread([a / b for a, b in zip(times["ours"], times["floor"], strict=True)])
        seconds, error = median(times["ours"]), relative_error(value, problem.truth)
        facts = {"n": n, "iterations": report.iterations, "seconds per unknown": seconds / n}
        rows.append(Row(CASE, f"n = {n}", seconds, median(times["floor"]), found, None, error, 1e-6, facts=facts))
    return rows


def _vector_work(problem: Diagonal, iterations: int) -> float:
    """As many products and updates as CG makes, without its decisions."""
    x, r, p = problem.y * 0, problem.cotangent.copy(), problem.cotangent.copy()
    seen = 0.0
    for _ in range(iterations + 2):
        ap = problem.d * p
        seen += p @ ap
        x += 0.5 * p
        r -= 0.5 * ap
        seen += r @ r
        p *= 0.5
        p += r
    return float(seen)
