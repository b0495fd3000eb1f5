"""What one small eager call costs beside its products: n = 3, where the time is that of the way through the library."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Setting, interleave, spread
from benchmarks.problems import Diagonal, relative_error
from benchmarks.report import Row
from implicitdiff import CG, Auto, Stationary, implicit_vjp

if TYPE_CHECKING:
    from benchmarks.frameworks import Framework

__all__ = ["small", "small_with_numpy"]

ALLOWED = {"numpy": 150e-6, "torch": 400e-6, "jax": 100e-6}
"""Seconds over the products."""
RTOL = 1e-8


def small_with_numpy(setting: Setting) -> list[Row]:
    """A gradient with given products."""
    problem = Diagonal(3)
    y, theta, v = problem.y, problem.theta, problem.cotangent
    given = problem.condition

    def floor(iterations: int) -> None:
        for _ in range(iterations + 2):
            given.hvp(y, theta, v)
        given.grad(y, theta)
        given.mixed_vjp(y, theta, v)

    return _rows("numpy", (given, y, theta, v), floor, problem.truth, lambda x: x, setting)


def small(fw: Framework, setting: Setting) -> list[Row]:
    """A gradient from the objective."""
    problem = Diagonal(3)
    y, theta, v, d, c = (fw.put(x) for x in (problem.y, problem.theta, problem.cotangent, problem.d, problem.c))
    condition = Stationary(lambda y, theta: _objective(y, theta, d, c))
    run = fw.products(_objective, y, theta, v, d, c)
    floor = lambda k: run(k + 2)  # noqa: E731
    return _rows(fw.name, (condition, y, theta, v), floor, problem.truth, fw.numpy, setting, fw.timed)


def _objective(y: Any, theta: Any, d: Any, c: Any) -> Any:
    """Of `problems.Diagonal`."""
    return 0.5 * (y @ (d * y)) - theta[0] * (c @ y)


def _rows(
    backend: str, where: tuple[Any, ...], floor: Callable[[int], Any], truth: Any, numpy: Callable[[Any], Any],
    setting: Setting, timed: Callable[[Any], Any] = lambda function: function,
) -> list[Row]:  # fmt: skip
    """Rows of a call with its products taken off, against what that may be.

    Parameters
    ----------
    backend : str
    where : tuple
        Condition, y, theta and the cotangent.
    floor : callable
        Makes as many products as that many iterations of CG take, and whatever else is the user's own.
    truth : array
        The gradient.
    numpy : callable
        Turns a result into an array of NumPy.
    setting : Setting
    timed : callable
        Lets a function return when the device is done.
    """
    rows, allowed = [], ALLOWED[backend]
    for name, solver in (("cg", CG(rtol=RTOL)), ("auto", Auto(rtol=RTOL))):
        value, report = implicit_vjp(*where, solver=solver, return_report=True)
        made = report.iterations if name == "cg" else max(report.matvecs - 2, 0)
        functions = {
            "ours": timed(lambda solver=solver: implicit_vjp(*where, solver=solver)),
            "products": timed(lambda made=made: floor(made)),
        }
        times = interleave(functions, setting)
        over = [max(a - b, 0.0) for a, b in zip(times["ours"], times["products"], strict=True)]
        found = spread([x / allowed for x in over])
        facts = {"call": median(times["ours"]), "its products": median(times["products"]), "solver": report.solver}
        rows.append(
            Row(f"small call, {name}, less its products / {allowed * 1e6:.0f} µs", "n = 3", median(over), allowed,
                found, 1.0, relative_error(numpy(value), truth), 1e-6, facts=facts, backend=backend)
        )  # fmt: skip
    return rows
