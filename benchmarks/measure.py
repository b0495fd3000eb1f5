"""How time and memory are taken: warm-up apart, side by side in one process, medians with their spread.

A ratio of two times means something only where both were taken under the same load, so the functions to compare
run in turn, A B A B …, and a ratio is formed within each round; what is told is the median of the ratios and their
range.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

__all__ = ["Setting", "Spread", "import_seconds", "interleave", "machine", "peak_bytes", "ratio", "spread"]

Function = Callable[[], Any]

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "NPROC",  # the thread pool of XLA
)  # fmt: skip
PACKAGES = ("implicitdiff", "numpy", "scipy", "array-api-compat")
PACKAGES_OF = {
    "torch": ("torch", "torchopt", "clarabel", "cvxpylayers", "qpth"),
    "jax": ("jax", "jaxlib", "jaxopt", "optimistix", "lineax"),
}


@dataclass(frozen=True)
class Setting:
    """How much work a run is.

    Parameters
    ----------
    short : bool
        Tiny sizes: for a smoke test, where times mean nothing.
    rounds : int
        Least number of times that each function is timed.
    seconds : float
        Rounds go on until this much time is spent, up to ten times ``rounds``; where a round takes so long that
        ``rounds`` of them would take more than five times as much, three have to do.
    clock : {"wall", "cpu"}
        ``"cpu"`` counts the processor time of this process: on a machine that others use too, with one thread and no
        accelerator, it says the same with less noise.
    threads : int
        Threads of the BLAS and of the framework.
    peers : bool
        Whether other libraries do the same work, too.
    device : {"cpu", "cuda"}
        Where the arrays are.
    """

    short: bool = False
    rounds: int = 9
    seconds: float = 3.0
    clock: Literal["wall", "cpu"] = "wall"
    threads: int = 1
    peers: bool = False
    device: str = "cpu"

    @property
    def now(self) -> Callable[[], float]:
        """The clock, in seconds."""
        return time.process_time if self.clock == "cpu" else time.perf_counter


class Spread(NamedTuple):
    """Median and range of a sample."""

    median: float
    low: float
    high: float


def spread(sample: list[float]) -> Spread:
    """Median, least and largest of a sample."""
    return Spread(median(sample), min(sample), max(sample))


def ratio(times: Mapping[str, list[float]], ours: str, reference: str, allowance: float = 0.0) -> Spread:
    """Spread of the ratio of two functions, formed round by round; ``allowance`` is taken off ours first."""
    return spread([max(a - allowance, 0.0) / b for a, b in zip(times[ours], times[reference], strict=True)])


def interleave(functions: Mapping[str, Function], setting: Setting, least: float = 0.005) -> dict[str, list[float]]:
    """Seconds per call of each function, taken in turn.

    Parameters
    ----------
    functions : mapping of str to callable
        What to time.
    setting : Setting
    least : float
        A function that takes less than this many seconds is called several times in a row, since a clock and a
        scheduler disturb a short interval most.

    Returns
    -------
    dict of str to list of float
        Entry i of every list was taken in round i.
    """
    calls = {name: _calls(function, least, setting) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    enabled, begin = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.disable()  # a collection would fall on whichever function happens to run
    try:
        for done in range(10 * setting.rounds):
            spent = time.perf_counter() - begin
            if spent > setting.seconds * (1 if done >= setting.rounds else 5) and done >= min(setting.rounds, 3):
                break
            for name, function in functions.items():
                times[name].append(_time(function, calls[name], setting.now))
    finally:
        if enabled:
            gc.enable()
    return times


def _calls(function: Function, least: float, setting: Setting) -> int:
    function()  # warm-up: imports, caches, thread pools
    if setting.short:
        return 1
    return max(1, round(least / max(_time(function, 1, time.perf_counter), 1e-7)))


def _time(function: Function, calls: int, now: Callable[[], float]) -> float:
    start = now()
    for _ in range(calls):
        function()
    return (now() - start) / calls


def peak_bytes(function: Function) -> int:
    """Most memory that a call holds at once beside what was there before it, in bytes (NumPy arrays included)."""
    function()  # what is allocated once (imports, caches) is not the call's
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def import_seconds(statement: str, setting: Setting, bytecode: Path) -> float:
    """Seconds that an import takes in a fresh interpreter, without the start of the interpreter itself.

    Parameters
    ----------
    statement : str
        The import.
    setting : Setting
        For its clock.
    bytecode : Path
        Folder for compiled modules. An installed package has its own beside it, a checkout may have none (and an
        environment may forbid it): with a common folder, filled by a first import, all start alike.
    """
    now = f"time.{setting.now.__name__}()"
    code = f"import time; start = {now}; {statement}; print({now} - start)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def machine(threads: int, backends: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the machine and the software: nothing that names the host or its owner."""
    packages = [*PACKAGES, *(name for backend in backends for name in PACKAGES_OF.get(backend, ()))]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "precision": "float64",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            return f"{named['model name']} (family {named.get('cpu family')}, model {named.get('model')})"
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
