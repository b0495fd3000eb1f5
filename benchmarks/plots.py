"""Figures of a sweep: time over size, error over time, ours over the floor, CPU against GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import NullFormatter

from benchmarks.report import Result, Row, read_json
from benchmarks.sample import Sample
from benchmarks.scale import CASE

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["crossover", "draw"]

COLOURS = {"numpy": "#1f77b4", "torch": "#d62728", "jax": "#2ca02c", "cupy": "#9467bd"}
SOLVERS = {"auto": "black", "lu": "#d62728", "ldlt": "#e377c2", "cholesky": "#ff7f0e", "cg": "#1f77b4",
           "minres": "#2ca02c", "gmres": "#9467bd", "bicgstab": "#8c564b"}  # fmt: skip
MARKERS = {
    "auto": "o",
    "lu": "s",
    "ldlt": "P",
    "cholesky": "D",
    "cg": "^",
    "minres": "v",
    "gmres": "<",
    "bicgstab": ">",
}


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Draw all figures for which the files hold rows.

    Parameters
    ----------
    files : sequence of Path
        That ``run --json`` wrote.
    out : Path
        Folder for the figures, made where it is not there.

    Returns
    -------
    list of Path
    """
    results = [read_json(path) for path in files]
    samples = [s for result in results for s in result.samples if s.library == "implicitdiff"]
    growing = [row for result in results for row in result.rows if row.case == CASE]
    if not samples and not growing:
        raise SystemExit("the files hold no row of a sweep: run with --problems all")
    out.mkdir(parents=True, exist_ok=True)
    written, figures = [], list(_figures(samples, _about(results))) if samples else []
    for name, figure in [*figures, *([("scale", _growth(growing, _about(results)))] if growing else [])]:
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _growth(rows: Sequence[Row], about: str) -> Any:
    """Time of a gradient over n, beside a line of slope one and the vector work alone."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    rows = sorted(rows, key=lambda row: row.facts["n"])
    n, ours = np.array([row.facts["n"] for row in rows]), np.array([row.ours for row in rows])
    axis.loglog(n, ours, "o-", color=COLOURS["numpy"], label="a gradient by cg")
    axis.loglog(n, [row.reference for row in rows], "x--", color="0.4", label="its vector work alone")
    axis.loglog(n, ours[-1] * n / n[-1], ":", color="0.6", label="slope one")
    axis.set(xlabel="n", ylabel="seconds")
    axis.legend(frameon=False)
    figure.suptitle("seconds of a gradient over n: A diagonal, all is vector work", fontsize=10)
    figure.supxlabel(about, fontsize=7)
    return figure


def _about(results: Sequence[Result]) -> str:
    machines = dict.fromkeys(
        f"{r.machine['cpu']}, {r.machine['cores']} cores, {r.machine['threads']} thread(s)" for r in results
    )
    return "; ".join(machines)


def _figures(samples: Sequence[Sample], about: str) -> Iterator[tuple[str, Any]]:
    yield "time", _grid(samples, _time_over_size, "seconds of a gradient over size, best solver", about)
    yield "solvers", _grid(samples, _solvers_over_size, "seconds over size by solver", about)
    yield "error", _grid(samples, _error_over_time, "error of the gradient over seconds, largest size", about)
    if any(s.floor for s in samples):
        yield (
            "floor",
            _grid(
                [s for s in samples if s.floor],
                _over_floor,
                "time over the floor: products alone, or LAPACK alone",
                about,
            ),
        )
    if len({s.device for s in samples}) > 1:
        yield "devices", _grid(samples, _devices, "CPU against GPU, best solver; the crossover is marked", about)


def _grid(samples: Sequence[Sample], panel: Callable[[Any, list[Sample]], None], title: str, about: str) -> Any:
    """One panel for each problem."""
    problems = list(dict.fromkeys(s.problem for s in samples))
    columns = min(3, len(problems))
    rows = -(-len(problems) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows + 0.9), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, problem in zip(axes.flat, problems, strict=False):
        axis.set_title(problem, fontsize=10)
        panel(axis, [s for s in samples if s.problem == problem])
        axis.grid(alpha=0.3)
        axis.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten run into each other
    for axis in axes.flat[len(problems) :]:
        axis.axis("off")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 8), fontsize=8)
    figure.suptitle(f"{title}\n{about}", fontsize=10)
    return figure


def _best(samples: Sequence[Sample]) -> list[Sample]:
    """The fastest solver that converged at each size, in the order of size."""
    found: dict[int, Sample] = {}
    for s in samples:
        if s.status == "CONVERGED" and (s.size not in found or s.seconds.median < found[s.size].seconds.median):
            found[s.size] = s
    return [found[size] for size in sorted(found)]


def _places(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((s.backend, s.device) for s in samples))


def _line(axis: Any, samples: Sequence[Sample], **style: Any) -> None:
    x, y = [s.size for s in samples], [s.seconds.median for s in samples]
    spread = [[s.seconds.median - s.seconds.low for s in samples], [s.seconds.high - s.seconds.median for s in samples]]
    axis.errorbar(x, y, yerr=spread, capsize=2, lw=1.2, ms=4, **style)


def _loglog(axis: Any, samples: Sequence[Sample]) -> None:
    axis.set(xscale="log", yscale="log", xlabel=samples[0].axis, ylabel="seconds")


def _time_over_size(axis: Any, samples: list[Sample]) -> None:
    for backend, device in _places(samples):
        best = _best([s for s in samples if (s.backend, s.device) == (backend, device)])
        dash = "-" if device == "cpu" else "--"
        _line(axis, best, color=COLOURS[backend], ls=dash, marker="o", label=_name(backend, device))
    _loglog(axis, samples)


def _solver_colour(samples: Sequence[Sample], backend: str, solver: str) -> str:
    """Colours tell backends apart; where there is one, solvers."""
    return COLOURS[backend] if len(_places(samples)) > 1 else SOLVERS.get(solver, "grey")


def _solvers_over_size(axis: Any, samples: list[Sample]) -> None:
    for backend, device in _places(samples):
        for solver in dict.fromkeys(s.solver for s in samples):
            mine = [s for s in samples if (s.backend, s.device, s.solver) == (backend, device, solver)]
            mine = sorted((s for s in mine if s.status == "CONVERGED"), key=lambda s: s.size)
            colour = _solver_colour(samples, backend, solver)
            _line(axis, mine, color=colour, marker=MARKERS.get(solver, "x"), alpha=0.8,
                  ls="-" if device == "cpu" else "--", label=f"{_name(backend, device)} {solver}")  # fmt: skip
    _loglog(axis, samples)


def _error_over_time(axis: Any, samples: list[Sample]) -> None:
    largest = max(s.size for s in samples)
    for s in samples:
        if s.size == largest and s.status == "CONVERGED":
            colour = _solver_colour(samples, s.backend, s.solver)
            axis.plot(s.seconds.median, max(s.error, 1e-17), MARKERS.get(s.solver, "x"), color=colour, ms=6, alpha=0.8,
                      label=f"{_name(s.backend, s.device)} {s.solver}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel=f"seconds at {samples[0].axis} = {largest}", ylabel="relative error")
    axis.set_ylim(1e-17, 1e-5)


def _over_floor(axis: Any, samples: list[Sample]) -> None:
    for backend, device in _places(samples):
        for solver in dict.fromkeys(s.solver for s in samples):
            mine = [s for s in samples if (s.backend, s.device, s.solver) == (backend, device, solver)]
            mine = sorted((s for s in mine if s.floor), key=lambda s: s.size)
            axis.plot([s.size for s in mine], [s.seconds.median / (s.floor or np.nan) for s in mine], lw=1.2, ms=4,
                      color=_solver_colour(samples, backend, solver), marker=MARKERS.get(solver, "x"),
                      label=f"{_name(backend, device)} {solver}")  # fmt: skip
    axis.axhline(1.0, color="black", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel=samples[0].axis, ylabel="time / floor")


def _devices(axis: Any, samples: list[Sample]) -> None:
    _time_over_size(axis, samples)
    for backend in dict.fromkeys(s.backend for s in samples):
        lines = [
            _best([s for s in samples if (s.backend, s.device) == (backend, device)]) for device in ("cpu", "cuda")
        ]
        at = crossover(*lines)
        if at is not None:
            axis.axvline(at, color=COLOURS[backend], lw=0.8, ls=":")
            axis.annotate(f"{at:.2g}", (at, axis.get_ylim()[0]), fontsize=8, color=COLOURS[backend])


def crossover(cpu: Sequence[Sample], gpu: Sequence[Sample]) -> float | None:
    """Size from which the GPU is faster, between the measured ones on the straight line in logarithms.

    Parameters
    ----------
    cpu, gpu : sequence of Sample
        In the order of size.

    Returns
    -------
    float or None
        None where the lines do not cross.
    """
    slow = {s.size: s.seconds.median for s in cpu}
    ratios = [(s.size, np.log(s.seconds.median / slow[s.size])) for s in gpu if s.size in slow]
    for (a, one), (b, other) in itertools.pairwise(ratios):
        if one > 0 >= other:
            return float(np.exp(np.log(a) + np.log(b / a) * one / (one - other)))
    return None


def _name(backend: str, device: str) -> str:
    return backend if device == "cpu" else f"{backend}, GPU"
