"""The cases that Torch and JAX share: what is compared with what, whatever the framework.

A `Framework` writes the same functions and the same work by hand in one framework; `with_torch` and `with_jax` are
the two. The problems, their solutions and the derivatives held against ours are NumPy's, from `problems`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, ClassVar

from benchmarks.cases import SIZES, counted_row, timed_row
from benchmarks.measure import Function, Setting, interleave
from benchmarks.problems import Logistic, Penalties, Quadratic, Ridge, System, relative_error
from benchmarks.programs import qp
from benchmarks.report import Row, Skipped
from benchmarks.small import small
from implicitdiff import CG, Auto, Root, Stationary, implicit_jacobian, implicit_vjp

__all__ = ["RTOL", "Framework", "Peer", "cases", "time_batch"]

RTOL = 1e-8
EAGER = 1e-4
"""Seconds that a call outside of jit may take beside the bar on its ratio."""
TOO_LONG = "it takes many times as long, as it did at smaller sizes"


@dataclass(frozen=True)
class Peer:
    """Another library's way to the same gradient.

    Parameters
    ----------
    name : str
    function : callable or None
        ``function(W, theta, v, X, Y) -> gradient``; None where the library cannot be imported.
    reason : str
        Why it cannot.
    against : str
        Which of our ways it is compared with.
    bar : float or None
        What the ratio may be.
    most : int
        The largest n that is worth the wait.
    """

    name: str
    function: Callable[..., Any] | None
    reason: str = ""
    against: str = ""
    bar: float | None = 1.0
    most: int = 10**9


class Framework(ABC):
    """The problems in one framework, and the same work by hand.

    Parameters
    ----------
    device : str
        Where the arrays are.
    """

    name: ClassVar[str]

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @abstractmethod
    def put(self, x: Any) -> Any:
        """Copy a NumPy array to the device."""

    @abstractmethod
    def numpy(self, x: Any) -> Any:
        """Copy an array back."""

    @abstractmethod
    def timed(self, function: Function) -> Function:
        """Wait, at the end of a call, until the device is done."""

    @abstractmethod
    def ways(self, function: Callable[..., Any], arrays: Any) -> dict[str, Function]:
        """Ways in which a user may call a function; the first is the one that bars are set on."""

    by_hand: ClassVar[str]
    """What `mapped` is called in a table."""

    @abstractmethod
    def mapped(self, function: Callable[..., Any], arrays: Any) -> Function:
        """Map a function of one item over the leading axis of all arrays, compiled where a user would."""

    @abstractmethod
    def logistic(self, W: Any, theta: Any, X: Any, Y: Any) -> Any:
        """The objective of `problems.Logistic`."""

    @abstractmethod
    def grad(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Gradient by the first argument, as a function."""

    @abstractmethod
    def hvp(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Hessian-vector product as a function of (y, theta, v, *args)."""

    @abstractmethod
    def counted(self, function: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
        """Let a function append to a list each time that it is run."""

    @abstractmethod
    def products(self, function: Callable[..., Any], y: Any, theta: Any, v: Any, *args: Any) -> Callable[[int], Any]:
        """Return a function that makes k Hessian-vector products as cheaply as the framework can."""

    @abstractmethod
    def jacobian_by_hand(self, function: Any, arrays: Any, *, symmetric: bool) -> Function:
        """Assemble A and B, factor, solve; ``function`` is the objective if A is symmetric, else F."""

    @abstractmethod
    def batch_rows(self, problem: Penalties, setting: Setting) -> list[Row | Skipped]:
        """Rows of the batch."""

    @abstractmethod
    def peers(self, rtol: float) -> list[Peer]:
        """Other libraries on the logistic problem."""

    @abstractmethod
    def syncs(self, setting: Setting) -> list[Row | Skipped]:
        """How often a gradient on an accelerator makes the host wait."""

    # -- objectives in operators that every framework has -------------------------------------------
    @staticmethod
    def quadratic(y: Any, theta: Any, A: Any, C: Any) -> Any:
        """The objective of `problems.Quadratic`."""
        return 0.5 * (y * (A @ y)).sum() - (y * (C @ theta)).sum()

    @staticmethod
    def system(y: Any, theta: Any, A: Any, C: Any) -> Any:
        """The equations of `problems.System`."""
        return A @ y - C @ theta

    @staticmethod
    def ridge(y: Any, theta: Any, A0: Any, b: Any) -> Any:
        """The objective of `problems.Ridge`."""
        return 0.5 * (y * (A0 @ y)).sum() + 0.5 * (theta * y * y).sum() - (b * y).sum()

    # -- rows ----------------------------------------------------------------------------------------
    def error(self, value: Any, truth: Any) -> float:
        """Relative error of a value in this framework."""
        return relative_error(self.numpy(value), truth)

    def row(self, *given: Any, **more: Any) -> Row:
        """Return a row of this framework."""
        return replace(timed_row(*given, **more), backend=self.name, device=self.device)

    def skipped(self, case: str, size: str, reason: str) -> Skipped:
        """Return a row that is none."""
        return Skipped(case, size, reason, self.name)


def cases(framework: Callable[[Setting], Framework]) -> dict[str, Callable[[Setting], list[Row | Skipped]]]:
    """Cases of a framework that is made when the first one runs."""
    found = {
        "gradient": gradient, "jacobian": jacobian, "batch": batch, "qp": qp, "products": products, "syncs": syncs,
        "small": small,
    }  # fmt: skip
    return {name: partial(_at, case, framework) for name, case in found.items()}


def _at(case: Callable[..., Any], framework: Callable[[Setting], Framework], setting: Setting) -> Any:
    return case(framework(setting), setting)


# -- the matrix-free gradient ----------------------------------------------------------------------------
def gradient(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """Matrix-free gradient against its own products, and against what others need for it."""
    rows: list[Row | Skipped] = []
    for size in ((60, 700),) if setting.short else SIZES:
        problem = Logistic(*size)
        arrays = [fw.put(x) for x in (problem.W, problem.theta, problem.cotangent, problem.X, problem.Y)]
        solvers = {"cg": CG(rtol=RTOL), "auto": Auto(rtol=RTOL)}
        rows += _gradient(fw, problem, arrays, solvers, setting)
    return rows


def _gradient(fw: Framework, problem: Logistic, arrays: Any, solvers: Any, setting: Setting) -> list[Row | Skipped]:
    def ours(solver: Any, W: Any, theta: Any, v: Any, *args: Any, **more: Any) -> Any:
        return implicit_vjp(fw.logistic, W, theta, v, args=args, solver=solver, **more)

    _, report = ours(solvers["cg"], *arrays, return_report=True)
    needed, size = int(report.iterations) + 2, f"n = {problem.n}"
    ways = {f"cg{way}": f for way, f in fw.ways(partial(ours, solvers["cg"]), arrays).items()}
    first = next(iter(ways))
    way, auto = next(iter(fw.ways(partial(ours, solvers["auto"]), arrays).items()))
    ways[f"auto{way}"] = auto
    run = fw.products(fw.logistic, *arrays)
    facts = {"iterations": needed - 2, "matvecs": int(report.matvecs), "solver": report.solver, "rtol": RTOL}
    starts = {name: _seconds(f) for name, f in ways.items()}
    times = interleave({**ways, "floor": fw.timed(lambda: run(needed))}, setting)
    bar, rows = 1.10 if problem.n >= 5000 else 1.30, list[Row | Skipped]()
    for name, f in ways.items():
        where = (fw.error(f(), problem.truth), 1e-6)
        more = {**facts, "first call": starts[name], "one product": median(times["floor"]) / needed}
        mine = bar if name in (first, f"auto{way}") else None
        rows.append(fw.row(f"gradient, {name} / (iterations + 2) products", size, times, name, "floor", mine, *where,
                           **more))  # fmt: skip
        if name == "cg, eager":
            rows.append(fw.row("gradient, cg, eager, less 100 µs / under jit", size, times, name, first, 1.2, *where,
                               allowance=EAGER))  # fmt: skip
    return rows + (_peers(fw, problem, arrays, ways, setting) if setting.peers else [])


def _seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peers(
    fw: Framework, problem: Logistic, arrays: Any, ways: Mapping[str, Function], setting: Setting
) -> list[Row | Skipped]:  # fmt: skip
    rows, size = list[Row | Skipped](), f"n = {problem.n}"
    for peer in fw.peers(RTOL):
        ours = f"cg{peer.against}"
        case = f"gradient, {ours} / {peer.name}"
        if peer.function is None or problem.n > peer.most:
            rows.append(fw.skipped(case, size, peer.reason or TOO_LONG))
            continue
        theirs = fw.timed(partial(peer.function, *arrays))
        try:
            found = theirs()
        except Exception as error:  # another library's own failure is a fact to be told, not ours to die of
            rows.append(fw.skipped(case, size, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"))
            continue
        times = interleave({ours: ways[ours], "peer": theirs}, setting)
        rows.append(fw.row(case, size, times, ours, "peer", peer.bar, fw.error(ways[ours](), problem.truth), 1e-6,
                           peer_error=fw.error(found, problem.truth)))  # fmt: skip
    return rows


# -- the other cases ---------------------------------------------------------------------------------------
def jacobian(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """Dense Jacobian against assembling both matrices and factoring by hand."""
    n = 40 if setting.short else 500
    rows: list[Row | Skipped] = []
    for what, problem, function in (
        ("dense B", Quadratic(n), fw.quadratic), ("dense B", System(n), fw.system), ("diagonal B", Ridge(n), fw.ridge),
    ):  # fmt: skip
        rows += _jacobian(fw, what, problem, function, setting)
    return rows


def _jacobian(fw: Framework, what: str, problem: Any, function: Any, setting: Setting) -> list[Row]:
    symmetric = not isinstance(problem, System)
    condition = Stationary(function) if symmetric else Root(function)
    arrays = [fw.put(x) for x in (problem.y, problem.theta, *problem.args)]

    def ours(y: Any, theta: Any, *args: Any, **more: Any) -> Any:
        return implicit_jacobian(condition, y, theta, args=args, **more)

    _, report = ours(*arrays, return_report=True)
    ways = fw.ways(ours, arrays)
    first = next(iter(ways))
    times = interleave({**ways, "hand": fw.jacobian_by_hand(function, arrays, symmetric=symmetric)}, setting)
    rows, size = [], f"n = m = {problem.y.size}"
    for way, f in ways.items():
        case, where = f"jacobian, auto ({report.solver}){way}, {what}", (fw.error(f(), problem.truth), 1e-9)
        facts = {"residual": float(report.residual)}
        rows.append(fw.row(f"{case} / assembly + LAPACK", size, times, way, "hand", 1.2 if way == first else None,
                           *where, **facts))  # fmt: skip
        if way == ", eager":
            rows.append(fw.row(f"{case}, less 100 µs / under jit", size, times, way, first, 1.2, *where,
                               allowance=EAGER, **facts))  # fmt: skip
    return rows


def batch(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """A batch of small problems in one call."""
    return fw.batch_rows(Penalties(*((32, 4) if setting.short else (1024, 16))), setting)


def products(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """Products with A that a gradient takes, counted where they are run."""
    problem, made = Logistic(60 if setting.short else 100), list[int]()
    W, theta, v, *args = (fw.put(x) for x in (problem.W, problem.theta, problem.cotangent, problem.X, problem.Y))
    condition = Stationary(grad=fw.grad(fw.logistic), hvp=fw.counted(fw.hvp(fw.logistic), made))

    def call() -> Any:
        return implicit_vjp(condition, W, theta, v, args=tuple(args), solver=CG(rtol=RTOL), return_report=True)

    call()
    made.clear()  # a first call may look at the functions
    _, report = call()
    return [counted_row(problem.n, len(made), report, fw.name)]


def syncs(fw: Framework, setting: Setting) -> list[Row | Skipped]:
    """How often a gradient on an accelerator makes the host wait."""
    return fw.syncs(setting)


def time_batch(
    fw: Framework, ways: Mapping[str, Function], hand: Function, reference: str, problem: Penalties, setting: Setting,
    bars: Mapping[str, float],
) -> list[Row | Skipped]:  # fmt: skip
    """Rows of several ways through a batch against one by hand, and of the eager one against that under jit."""
    times = interleave({**ways, "hand": hand}, setting)
    items, n = problem.y.shape
    rows, size, first = list[Row | Skipped](), f"{items} x n = {n}", next(iter(ways))
    for way, f in ways.items():
        where = fw.error(f(), problem.truth), 1e-10
        rows.append(fw.row(f"batch{way} / {reference}", size, times, way, "hand", bars.get(way), *where))
        if way == ", eager":
            rows.append(fw.row("batch, eager, less 100 µs / under jit", size, times, way, first, 1.2, *where,
                               allowance=EAGER))  # fmt: skip
    return rows
