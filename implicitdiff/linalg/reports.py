"""The public report of a solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from implicitdiff.arrays import to_python
from implicitdiff.linalg.solve import Solution, method_of
from implicitdiff.mode import Mode
from implicitdiff.outcome import Report, Status
from implicitdiff.solvers.sequences import told

__all__ = ["make_report"]


def make_report(
    solution: Solution, damping: float, methods: Sequence[tuple[str, str]], seconds: float, stationarity: Any,
    derivatives: dict[str, str], mode: Mode = Mode.EAGER, solved: Any = None,
) -> Report:  # fmt: skip
    """Turn a solution into the public report: Python numbers for one problem, arrays for a batch.

    Inside of a compiled program, where values are not visible, the fields are arrays, too.
    """
    visible = mode is not Mode.INLINE
    read = to_python if visible else _as_it_is
    status = read(solution.status)
    single = isinstance(status, int)
    name, reason = method_of(solution, methods) if visible else summary_of(methods)

    def known(field: Any) -> Any:
        found = read(field)
        return None if isinstance(found, float) and math.isnan(found) else found

    return Report(
        status=Status(status) if single else status,
        converged=status == Status.CONVERGED if single else status == int(Status.CONVERGED),
        solver=name,
        reason=reason,
        iterations=read(solution.iterations),
        matvecs=read(solution.matvecs),
        residual=read(solution.residual),
        stationarity=read(stationarity),
        solved=None if solved is None else read(solved),
        derivatives=derivatives,
        seconds=seconds,
        rcond=known(solution.rcond),
        damping=damping if solution.damping is None else read(solution.damping),
        rank=known(solution.rank),
        nullity=known(solution.nullity),
        leak=known(solution.leak),
        solution=solution.x,
        **({} if solution.carried is None else {name: read(value) for name, value in told(solution.carried).items()}),
    )


def _as_it_is(x: Any) -> Any:
    return x


def summary_of(methods: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return the name and the reason where it is not known yet which of the methods will be used."""
    return " or ".join(name for name, _ in methods), "; or ".join(reason for _, reason in methods)
