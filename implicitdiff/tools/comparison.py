"""`compare_solvers`: the linear solvers side by side on the user's own problem."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from implicitdiff.api import implicit_grad
from implicitdiff.arrays import divisor, item_norm, to_python
from implicitdiff.compilers import untraced
from implicitdiff.errors import ImplicitDiffWarning, InputError, SolveError
from implicitdiff.outcome import Report, Status
from implicitdiff.ravel import Raveler
from implicitdiff.records import duration, html_table, memory_size
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.solvers import get_solver, solver_names, suitable
from implicitdiff.tools.comparison_plot import draw
from implicitdiff.typing import ConditionLike

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Comparison", "SolverRow", "compare_solvers"]

COSTS = 5, 10, 20
"""Products of the approximations that are compared."""


@dataclass(frozen=True)
class SolverRow:
    """How one solver did.

    Attributes
    ----------
    solver : str
        As it was asked for.
    used : str
        The method that was really used.
    status : str
        Name of the `Status`, the worst over the items of a batch.
    converged : bool
        Whether the true residual is within the tolerance, in all items.
    seconds : float
        Median wall-clock time of a call after the first, in seconds.
    first : float
        Wall-clock time of the first call, which compiles where the framework does, in seconds.
    products, iterations : int
        Products with A, and iterations; the sum and the largest over the items.
    residual : float
        True relative residual of the linear system, the largest over the items.
    error : float
        ‖g − g_ref‖ / ‖g_ref‖ of the gradient, against that of the converged solver with the smallest residual. One with
        damping solves another system, and is no reference; NaN where there is none.
    memory : int or None
        Most that the call held at once beside its arguments, in bytes; None where it cannot be seen.
    message : str
        First line of the error, where the solve failed.
    estimate : float
        Estimated error of the gradient (`ErrorEstimate.absolute`) over the size of the corrected one, the largest over
        the items: that of y as a solution, which all solvers share, and what the solver adds. NaN where it was not
        asked for, or F is not known.
    """

    solver: str
    used: str
    status: str
    converged: bool
    seconds: float
    first: float
    products: int
    iterations: int
    residual: float
    error: float
    memory: int | None
    message: str = ""
    estimate: float = math.nan


class Comparison(Sequence[SolverRow]):
    """The rows of `compare_solvers`, in the order asked for; prints as a table, in a notebook as well.

    Parameters
    ----------
    rows : sequence of SolverRow
        One for each solver.
    facts : dict
        What all rows share: backend, number of unknowns and parameters, repeats.

    Attributes
    ----------
    gradients : list
        The gradient by each solver, structured like theta.
    """

    def __init__(self, rows: Sequence[SolverRow], facts: dict[str, Any], gradients: Sequence[Any] = ()) -> None:
        self.rows, self.facts, self.gradients = tuple(rows), dict(facts), list(gradients)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fastest(self) -> SolverRow | None:
        """The fastest of those that converged."""
        return min((row for row in self.rows if row.converged), key=lambda row: row.seconds, default=None)

    def __str__(self) -> str:
        head, *body = self._cells()
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)
        ]
        notes = [f"{row.solver}: {row.message}" for row in self.rows if row.message]
        return "\n".join([self._about(), lines[0], "-" * len(lines[0]), *lines[1:], *notes])

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        return html_table(head, body, self._about())

    def _about(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())

    def _cells(self) -> Iterator[list[str]]:
        yield ["solver", "used", "status", "time", "first call", "products", "residual", "error", "estimate", "memory"]
        for row in self.rows:
            yield [
                row.solver, row.used, row.status, duration(row.seconds), duration(row.first), str(row.products),
                f"{row.residual:.1e}", "reference" if row.error == 0 and row.converged else f"{row.error:.1e}",
                "-" if math.isnan(row.estimate) else f"{row.estimate:.1e}",
                "-" if row.memory is None else memory_size(row.memory),
            ]  # fmt: skip

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, for a data frame.

        Returns
        -------
        list of dict
        """
        return [asdict(row) for row in self.rows]

    def plot(self, axes: Any = None) -> Any:
        """Draw the error of the gradient against the products with A: approximations as lines, solutions as open marks.

        Parameters
        ----------
        axes : matplotlib axes, optional
            By default a new figure's.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            Where matplotlib is not installed, or no row has an error.
        """
        return draw(self.rows, axes)

    def save(self, path: str | Path) -> None:
        """Write the rows to a file, by its suffix: .json or .csv.

        Parameters
        ----------
        path : str or Path
            Where to.

        Raises
        ------
        InputError
            For another suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            import json

            path.write_text(json.dumps({"facts": self.facts, "rows": self.to_dicts()}, indent=1), encoding="utf-8")
        elif path.suffix == ".csv":
            import csv

            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(SolverRow.__dataclass_fields__))
                writer.writeheader()
                writer.writerows(self.to_dicts())
        else:
            raise InputError(f"path = {str(path)!r}: expected a name that ends with .json or .csv.")


def compare_solvers(
    condition: ConditionLike, outer: Any, y: Any, theta: Any, *, solvers: Sequence[Any] | None = None,
    args: tuple[Any, ...] = (),
    backend: Any = None, batched: bool = False, repeats: int = 3, memory: bool = True, error: bool = True,
    approximations: bool = False,
) -> Comparison:  # fmt: skip
    """Compute the gradient of a loss through a solution with several linear solvers, and compare them.

    A solver that fails is a row with its status and message, not an error.

    Parameters
    ----------
    condition, outer, y, theta, args, backend, batched
        As for `implicit_grad`.
    solvers : sequence of str or Solver, optional
        Names, or instances with their own options. Default: ``"auto"`` and every registered method that is exact.
    repeats : int
        Timed calls after the first; the median counts.
    memory : bool
        Whether to measure memory, by one more call. It is seen for NumPy on the CPU, and for Torch and CuPy on a GPU.
    error : bool
        Whether to estimate the error of each gradient, by one more call.
    approximations : bool
        Whether to add every registered approximation, at a few numbers of products each where it has the choice.

    Returns
    -------
    Comparison
        A sequence of `SolverRow`; ``print`` it, or ``save`` it.

    Raises
    ------
    InputError, DTypeError, BackendError, CallbackError, DerivativeError
        As `implicit_grad`, for what no solver could help.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Stationary, compare_solvers
    >>> H = np.diag([1.0, 2.0, -4.0])  # a saddle point
    >>> inner = Stationary(grad=lambda y, t: H @ y - t, hessian=lambda y, t: H, mixed_vjp=lambda y, t, u: -u)
    >>> theta = np.ones(3)
    >>> y = np.linalg.solve(H, theta)
    >>> found = compare_solvers(inner, np.ones(3), y, theta, solvers=("lu", "cholesky", "minres"))
    >>> [(row.solver, row.status) for row in found]
    [('lu', 'CONVERGED'), ('cholesky', 'NOT_POSITIVE_DEFINITE'), ('minres', 'CONVERGED')]
    """
    solvers = ["auto", *suitable("positive definite")] if solvers is None else solvers
    if isinstance(solvers, str) or not solvers:
        raise InputError(f"solvers = {solvers!r}: expected a sequence of names or instances.")
    if repeats < 1:
        raise InputError(f"repeats = {repeats!r}: expected a positive integer.")
    options = {"args": args, "backend": backend, "batched": batched}
    return _compared((condition, outer, y, theta), solvers, (repeats, memory, error), options, approximations)


@untraced
def _compared(
    what: tuple[Any, ...],
    solvers: Sequence[Any],
    measures: tuple[int, bool, bool],
    options: dict[str, Any],
    approximations: bool,
) -> Comparison:
    (_, _, y, theta), repeats = what, measures[0]
    engine = options["backend"]
    engine = get_backend(engine) if engine is not None else backend_for({"y": y, "theta": theta})
    batched, trials = options["batched"], []
    ravelers = [Raveler(engine, tree, name, batched) for name, tree in (("y", y), ("theta", theta))]
    more = _approximations(ravelers[0].n) if approximations else []
    for i, solver in enumerate([*solvers, *more]):
        get_solver(solver)  # an unknown name is told before anything runs
        call = _Call(engine, what, {**options, "backend": engine}, solver)
        trials.append((_label(solver), *call.measured(*measures, quiet=i > 0)))
    facts = {"backend": engine.name, "n": ravelers[0].n, "m": ravelers[1].n, "repeats": repeats}
    if batched:
        facts["items"] = ravelers[0].items[0]
    return Comparison(_rows(engine, ravelers[1], trials), facts, [gradient for _, gradient, *_ in trials])


def _approximations(n: int) -> list[Any]:
    """Return the registered approximations, at a few costs where they have the choice."""
    found: list[Any] = []
    for solver in map(get_solver, solver_names()):
        if getattr(solver, "approximate", False):
            found += solver.at_costs(COSTS, n) if hasattr(solver, "at_costs") else [solver]
    return found


def _label(solver: Any) -> str:
    """Return a name, or a class with the options that are not its defaults."""
    if isinstance(solver, str):
        return solver
    known = getattr(solver, "__dataclass_fields__", {})
    always = getattr(solver, "cost", "")
    options = [f"{name}={getattr(solver, name)!r}" for name, f in known.items()
               if name == always or getattr(solver, name) != f.default]  # fmt: skip
    return f"{type(solver).__name__}({', '.join(options)})"


class _Call:
    """A call of `implicit_grad` with one of the solvers."""

    def __init__(self, engine: Backend, arguments: tuple[Any, ...], options: dict[str, Any], solver: Any) -> None:
        self.engine, self.arguments, self.options, self.solver = engine, arguments, options, solver

    def __call__(self) -> tuple[Any, Report, str]:
        try:
            value, report = implicit_grad(*self.arguments, **self.options, solver=self.solver, return_report=True)
        except SolveError as error:
            if error.report is None:  # of the point, not of a solver
                raise
            return error.value, error.report, str(error).partition("\n")[0]
        self.engine.synchronize(value)
        return value, report, ""

    def _estimate(self) -> float:
        """Estimated relative error of the gradient; NaN where F is not known."""
        options = {**self.options, "solver": self.solver, "on_failure": "ignore", "error": True}
        try:
            value, report = implicit_grad(*self.arguments, **options, return_report=True)
        except InputError:
            return math.nan
        found = report.error
        if found is None or found.correction is None:
            return math.nan if found is None else _largest(found.relative)
        trees, batched, xp = (value, found.correction), self.options["batched"], self.engine.xp
        g, off = (Raveler(self.engine, tree, "the gradient", batched).vector for tree in trees)
        size, absolute = item_norm(xp, g - off), xp.asarray(found.absolute)
        return _largest(xp.where(size > 0, absolute / divisor(xp, size), xp.asarray(found.relative)))

    def measured(
        self, repeats: int, memory: bool, error: bool, *, quiet: bool
    ) -> tuple[Any, Report, str, float, float, int | None, float]:
        """Return gradient, report, message, seconds of later calls and of the first, bytes, and the estimated error."""
        with warnings.catch_warnings():
            if quiet:  # told with the first solver
                warnings.simplefilter("ignore", ImplicitDiffWarning)
            first = _timed(self)
            warnings.simplefilter("ignore", ImplicitDiffWarning)
            later = [_timed(self)[0] for _ in range(repeats)]
            held = self.engine.peak_memory(self) if memory else None
            estimate = self._estimate() if error else math.nan
        return (*first[1], sorted(later)[len(later) // 2], first[0], held, estimate)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def _rows(engine: Backend, raveler: Raveler, trials: Sequence[tuple[Any, ...]]) -> list[SolverRow]:
    """Turn the trials into rows, with their errors against the tightest."""
    xp = engine.xp
    vectors = [raveler.like(gradient, "the gradient", dtype=raveler.dtype) for _, gradient, *_ in trials]
    reports = [trial[2] for trial in trials]
    sound = [i for i, report in enumerate(reports) if _all(report.converged) and not report.damping]
    best = min(sound, key=lambda i: _largest(reports[i].residual), default=None)
    rows = []
    for vector, (label, _, report, message, seconds, first, held, estimate) in zip(vectors, trials, strict=True):
        error = math.nan
        if best is not None and raveler.n:
            size = _largest(item_norm(xp, vectors[best]))
            error = _largest(item_norm(xp, vector - vectors[best])) / (size or 1.0)
        rows.append(SolverRow(
            label, report.solver, Status(int(_largest(report.status))).name, _all(report.converged), seconds, first,
            int(_total(report.matvecs)), int(_largest(report.iterations)), _largest(report.residual), error, held,
            message, estimate,
        ))  # fmt: skip
    return rows


def _all(x: Any) -> bool:
    return bool(x.all()) if hasattr(x, "all") else bool(x if not hasattr(x, "shape") else _largest(x))


def _values(x: Any) -> list[float]:
    if not getattr(x, "shape", ()):
        return [float(to_python(x))]
    return [float(x[i]) for i in range(x.shape[0])]


def _largest(x: Any) -> float:
    found = _values(x)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _total(x: Any) -> float:
    return sum(_values(x))
