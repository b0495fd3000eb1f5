"""What an estimate of the error of a gradient is worth, what it costs, and what a polished gradient gains.

Measured on the zoo of the tests, on solutions that real solvers were stopped at or that are off by a known distance.
Rows hold counts and ratios, no times; every estimate that is off by more than a factor of 3 is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import zoo
from zoo.equations import EQUATIONS
from zoo.measure import MODES, Measured, call, measure, raveled, share, survey
from zoo.minima import MINIMA, logistic, multinomial
from zoo.stopped import inexact, perturbed, stopped

import implicitdiff
from benchmarks.bounds import bound
from benchmarks.measure import Setting, Spread
from benchmarks.report import Row
from implicitdiff import CG, GMRES

__all__ = ["certificates"]

WITHIN = ((3, 0.97), (2, 0.95))
"""Factors, and the share of trusted estimates that has to be right within them."""
BOUNDED = ("ridge", "logistic", "quartic", "poisson", "data weights", "multinomial")
"""Strongly convex at y, so that the bound of Ehrhardt and Roberts holds."""
SLOPES = ("logistic", "multinomial", "equilibrium layer")
DECADES = tuple(3 * 10.0**-k for k in range(2, 6))


def certificates(setting: Setting) -> list[Row]:
    """Estimates against true errors, their products against those of an adjoint, and polished gradients."""
    names: Sequence[str] = ("ridge", "kepler") if setting.short else zoo.NAMES
    size = f"{len(names)} problems"
    trusted = _trusted(names, MODES, setting)
    rows = [row for mode in MODES for row in _effectivity(mode, [r for r in trusted if r.mode == mode], size)]
    for solver, makers in (CG(), MINIMA), (GMRES(), EQUATIONS):
        mine = [name for name in names if name in {make.__name__.replace("_", " ") for make in makers} - {"barrier"}]
        rows += _effectivity(
            f"gradient by {solver.name}", _trusted(mine, ("gradient",), setting, solver=solver), f"{len(mine)} problems"
        )
    gains = [row for row in trusted if row.mode == "gradient" and row.counts and row.off <= 0.1]
    rows += [*_costs(setting), _gain(gains, size), _against_bounds(BOUNDED[:1] if setting.short else BOUNDED)]
    return [*rows, *_slopes(SLOPES[:1] if setting.short else SLOPES)]


def _trusted(names: Sequence[str], modes: Sequence[str], setting: Setting, **options: Any) -> list[Measured]:
    """Estimates that are marked as trusted; those that should not be are printed."""
    found: list[Measured] = []
    for name in names:
        solutions: Iterable[Any] = inexact(zoo.problem(name))
        if setting.short:
            solutions = [(how, y) for how, y in solutions if how.endswith("0.01")]
        found += survey(implicitdiff, zoo.problem(name), solutions, modes, **options)
    for row in found:
        if row.trusted and row.missed:
            print(f"missed: {row}")
    return [row for row in found if row.trusted]


def _spread(sample: Sequence[float], low: float = 0.0, high: float = 1.0) -> Spread:
    return Spread(*(float(np.quantile(sample, q)) for q in (0.5, low, high)))


def _effectivity(mode: str, rows: Sequence[Measured], size: str) -> list[Row]:
    """Quantiles of estimate / true error, from 5 to 95 %, and what share is right within a factor."""
    counted = [row for row in rows if row.counts]
    ratios = [row.effectivity for row in counted]
    middle, far = _spread(ratios, 0.05, 0.95), _spread(ratios, 0.01, 0.99)
    wrong, allowed = 1 - share(counted, WITHIN[0][0]), 1 - WITHIN[0][1]
    facts = {"estimates": len(counted), "1 to 99 %": far[1:], "missed": [str(row) for row in counted if row.missed]}
    what = f"certificate, {mode}: estimated / true error (5 to 95 %)"
    rows = [Row(what, size, middle.median, 1.0, middle, None, wrong, allowed, "x", facts)]
    for factor, demanded in WITHIN:
        right = share(counted, factor)
        what, least = f"certificate, {mode}: share demanded / right within {factor}", Spread(*3 * (demanded / right,))
        rows.append(Row(what, size, demanded, right, least, 1.0, wrong, allowed, "of all"))
    return rows


def _costs(setting: Setting) -> list[Row]:
    """Products with A of a certificate over those of the adjoint alone, by CG at 1e-8 (its iterations)."""
    solver, ratios, spent, adjoint = CG(rtol=1e-8, maxiter=2000), [], [], []
    problems = (logistic(30),) if setting.short else (logistic(100, 300), multinomial(64, 10, 600))
    for problem in problems:
        for how, y in islice(stopped(problem), 2 if setting.short else None):
            row = measure(implicitdiff, problem, y, "gradient", how, solver=solver)
            report = call(implicitdiff, problem, y, "gradient", solver=solver)[1]
            spent.append(row.products)
            adjoint.append(int(report.iterations))
            ratios.append(row.products / int(report.iterations))
    size = "n = " + ", ".join(str(problem.n) for problem in problems)
    return [Row("certificate, products / an adjoint by cg at 1e-8", size, float(np.median(spent)),
                float(np.median(adjoint)), _spread(ratios), 0.6, 0.0, 0.0, "products")]  # fmt: skip


def _gain(rows: Sequence[Measured], size: str) -> Row:
    """True error of result − correction over that of the result, where y is right to 10 %."""
    left = _spread([row.polished / row.error for row in rows], 0.05, 0.95)
    after, before = (float(np.median([getattr(row, name) for row in rows])) for name in ("polished", "error"))
    what = "certificate, corrected / plain error, y to 10 %"
    return Row(what, size, after, before, left, 1 / 20, 0.0, 0.0, "relative")


def _against_bounds(names: Sequence[str]) -> Row:
    """Estimates over true errors, and the bound of Ehrhardt and Roberts over them, where y is off by one percent."""
    ours, theirs = [], []
    for problem in map(zoo.problem, names):
        for how, y in perturbed(problem):
            if how in {"random 0.01", "descent 0.01"}:
                row = measure(implicitdiff, problem, y, "gradient", how)
                ours.append(row.effectivity)
                theirs.append(bound(problem, y) / (row.error * float(np.linalg.norm(problem.gradient))))
    middle, other = (float(np.median(found)) for found in (ours, theirs))
    what = "certificate, estimate / Ehrhardt and Roberts' bound, of true errors"
    facts = {"bounds": sorted(theirs), "estimates": sorted(ours)}
    size, ratios = f"{len(names)} problems", [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(what, size, middle, other, _spread(ratios), 1.0, 0.0, 0.0, "x", facts)


def _slopes(names: Sequence[str]) -> list[Row]:
    """Orders of the error of a gradient, plain and polished once, in the distance of y over three decades."""
    rows = []
    for name in names:
        problem = zoo.problem(name)
        d = next(iter(perturbed(problem)))[1] - problem.y
        d *= np.linalg.norm(problem.y) / np.linalg.norm(d)
        for polish, order in ((0, 1), (1, 2)):
            errors = []
            for size in DECADES:
                value, _ = call(implicitdiff, problem, problem.y + size * d, "gradient", polish=polish)
                errors.append(np.linalg.norm(raveled(problem, value, "gradient") - problem.truth("gradient")))
            slope = float(np.polyfit(np.log(DECADES), np.log(errors), 1)[0])
            what = "polished once" if polish else "plain"
            rows.append(Row(f"certificate, {name}, {what}: order {order} / found", "three decades", order, slope,
                            Spread(*3 * (order / slope,)), 1 / (1 - 0.1 / order), 0.0, 0.0, ""))  # fmt: skip
    return rows
