"""The sweep: families of problems over sizes, solvers, backends and devices, each row with its error and its floor."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import array_api_compat
import numpy as np

from benchmarks import families_large  # noqa: F401  its families go into the table
from benchmarks.assembly_peer import by_assembly
from benchmarks.families import FAMILIES, Family, Instance
from benchmarks.measure import Setting, interleave, peak_bytes, spread
from benchmarks.report import Skipped
from benchmarks.sample import Sample
from benchmarks.scipy_peer import by_scipy
from implicitdiff import Stationary, Status, implicit_vjp
from implicitdiff.pytree import flatten, map_leaves

__all__ = ["DEVICES", "Sweep", "problem_names", "sweep"]

DEVICES = ("cpu", "cuda")
DIRECT = ("lu", "ldlt", "cholesky")
SHORT = 64
"""Size of a smoke test, or the smallest that the family has."""


class Where:
    """A backend on a device.

    Parameters
    ----------
    backend, device : str
    """

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device
        self.autodiff = backend in {"torch", "jax"}
        self.module = importlib.import_module(backend)
        if backend == "jax":
            self.module.config.update("jax_enable_x64", True)

    @classmethod
    def unavailable(cls, backend: str, device: str) -> str | None:
        """Why nothing can be measured there."""
        if importlib.util.find_spec(backend) is None:
            return f"{backend} is not installed"
        if device == "cpu":
            return "CuPy knows GPUs only" if backend == "cupy" else None
        if backend == "numpy":
            return "NumPy knows the CPU only"
        with contextlib.suppress(Exception):
            module = importlib.import_module(backend)
            if backend == "torch" and module.cuda.is_available():
                return None
            if backend == "jax" and module.default_backend() == "gpu":
                return None
            if backend == "cupy" and module.cuda.runtime.getDeviceCount():
                return None
        return f"{backend} sees no CUDA device"

    def put(self, x: Any) -> Any:
        """Copy a NumPy array to the device."""
        if self.backend == "torch":
            return self.module.tensor(x, device=self.device)
        if self.backend == "jax":
            return self.module.device_put(x, self.module.devices(self.device)[0])
        return self.module.asarray(x)

    def numpy(self, x: Any) -> Any:
        """Copy an array back."""
        if self.backend == "torch":
            return x.detach().cpu().numpy()
        return x.get() if self.backend == "cupy" else np.asarray(x)

    def settled(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Wait, at the end of a call, until the device is done."""
        if self.backend == "jax":
            return lambda: self.module.block_until_ready(function())
        if self.device == "cpu":
            return function

        def called() -> Any:
            out = function()
            if self.backend == "torch":
                self.module.cuda.synchronize()
            else:
                self.module.cuda.Device().synchronize()
            return out

        return called


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Parameters
    ----------
    problems, solvers : tuple of str
        Empty: all.
    sizes : tuple of int
        Empty: those of the family.
    devices : tuple of str
    seed : int
    """

    problems: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    seed: int = 0

    def families(self) -> list[Family]:
        """Return the families asked for."""
        return [f for name, f in FAMILIES.items() if not self.problems or name in self.problems]

    def sizes_of(self, found: Family, setting: Setting, device: str) -> tuple[int, ...]:
        """Return the sizes of a family."""
        if setting.short:
            return (max(min(found.sizes), SHORT) if found.axis == "items" else min(found.sizes),)
        return self.sizes or found.sizes + (found.large if device == "cuda" else ())


def problem_names() -> list[str]:
    """List the families."""
    return list(FAMILIES)


def sweep(backend: str, plan: Sweep, setting: Setting) -> list[Sample | Skipped]:
    """Run everything that was planned for one backend, in this process."""
    out: list[Sample | Skipped] = []
    places = [(device, Where.unavailable(backend, device)) for device in plan.devices]
    out += [Skipped("all problems", "", reason, backend) for _, reason in places if reason is not None]
    jobs = [
        (device, found, size)
        for device, reason in places if reason is None
        for found in plan.families()
        for size in plan.sizes_of(found, setting, device)
    ]  # fmt: skip
    for device, found, size in _progress(jobs, backend):
        problem = found.make(size, np.random.default_rng(plan.seed))
        out += _problem(Where(backend, device), found, problem, plan, setting)
    return out


def _progress(jobs: Sequence[Any], backend: str) -> Iterator[Any]:
    """Go through the jobs with a bar, or a line each where there is no tqdm."""
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        bar = tqdm(jobs, desc=backend, file=sys.stderr, unit="problem")
        for job in bar:
            bar.set_postfix_str(f"{job[1].name} {job[2]} on {job[0]}")
            yield job
        return
    for i, job in enumerate(jobs):
        print(f"{backend} {i + 1}/{len(jobs)}: {job[1].name} {job[2]} on {job[0]}", file=sys.stderr, flush=True)
        yield job


def _problem(where: Where, found: Family, problem: Instance, plan: Sweep, setting: Setting) -> list[Sample | Skipped]:
    """All solvers on one problem."""
    rows: list[Sample | Skipped] = []
    size = f"{found.axis} = {problem.size}"
    for solver in plan.solvers or problem.solvers:
        what = f"{found.name}, {solver}"
        if solver not in problem.solvers:
            rows.append(Skipped(what, size, "the method is not for this problem", where.backend))
        elif solver in DIRECT and problem.size > _most_dense(where, problem):
            rows.append(Skipped(what, size, "too large to be assembled", where.backend))
        else:
            rows.append(_sample(where, found, problem, solver, setting))
    if setting.peers and _assembles(where, problem):
        rows.append(_assembled(where, found, problem, setting))
    if setting.peers and where.backend == "numpy":
        rows += [_peer(found, problem, name, setting) for name in ("cg", "minres", "gmres", "spsolve")
                 if _suits(name, problem)]  # fmt: skip
    return rows


def _most_dense(where: Where, problem: Instance) -> int:
    """Largest size for a direct method; only NumPy has sparse ones."""
    return problem.most_dense if problem.batched or where.backend == "numpy" else min(problem.most_dense, 2500)


def _sample(where: Where, found: Family, problem: Instance, solver: str, setting: Setting) -> Sample:
    arrays = [map_leaves(where.put, tree) for tree in (problem.y, problem.theta, problem.cotangent)]
    args = tuple(map(where.put, problem.args))
    condition = problem.condition(where.autodiff)

    def call(**more: Any) -> Any:
        return implicit_vjp(condition, *arrays, args=args, solver=solver, batched=problem.batched,
                            on_failure="ignore", **more)  # fmt: skip

    value, report = call(return_report=True)
    once = where.settled(call)
    functions = {"ours": once}
    floor = _floor(where, problem, report, arrays, args)
    if floor is not None:
        functions["floor"] = where.settled(floor[1])
    first = interleave({"first": once}, Setting(short=True, rounds=1, seconds=0.0))["first"][0]
    times = interleave(functions, setting)
    told = {name: np.asarray(where.numpy(x) if problem.batched else x) for name, x in (
        ("iterations", report.iterations), ("matvecs", report.matvecs), ("status", report.status),
        ("residual", report.residual),
    )}  # fmt: skip
    return Sample(
        where.backend, where.device, "implicitdiff", found.name, found.axis, problem.size, solver, report.solver,
        Status(int(told["status"].max())).name, report.reason, spread(times["ours"]), first, int(told["matvecs"].sum()),
        int(told["iterations"].max()), float(told["residual"].max()),
        _error(map_leaves(where.numpy, value), problem.truth),
        peak_bytes(once) if where.backend == "numpy" else None,
        None if floor is None else floor[0] * median(times["floor"]),
    )  # fmt: skip


def _floor(
    where: Where, problem: Instance, report: Any, arrays: list[Any], args: tuple[Any, ...]
) -> tuple[float, Callable[[], Any]] | None:  # fmt: skip
    """How many units of work a solve needs at least, and one unit: a product, or LAPACK's bare solve.

    Both with the arrays and the library of the backend.
    """
    if problem.matrix is not None and report.solver in DIRECT:
        matrix = where.put(problem.matrix)
        right = where.put(np.ones((*problem.matrix.shape[:-1], 1)))
        solve: Any = array_api_compat.array_namespace(matrix).linalg.solve
        solve = where.module.jit(solve) if where.backend == "jax" else solve
        return 1, lambda: solve(matrix, right)
    if problem.product is None or problem.batched or not report.iterations:
        return None
    y, theta, v = arrays
    product: Any = problem.product
    if where.backend == "jax":
        product = where.module.jit(product)
    return int(report.iterations) + 2, lambda: product(y, theta, v, *args)


def _error(found: Any, truth: Any) -> float:
    """‖found − truth‖ / ‖truth‖ over all leaves."""
    pairs = list(zip(flatten(found).leaves, flatten(truth).leaves, strict=True))
    gap = sum(float(np.sum((np.asarray(a) - b) ** 2)) for a, b in pairs) ** 0.5
    return gap / sum(float(np.sum(b**2)) for _, b in pairs) ** 0.5


# -- others -----------------------------------------------------------------------------------------------
def _suits(name: str, problem: Instance) -> bool:
    wanted = {"cg": "cg", "minres": "minres", "gmres": "gmres", "spsolve": "lu"}[name]
    if problem.batched or wanted not in problem.solvers:
        return False
    return problem.product is not None and (name != "spsolve" or 2500 < problem.size <= problem.most_dense)


def _assembles(where: Where, problem: Instance) -> bool:
    """Whether the whole Hessian may be made by autodiff."""
    has_objective = isinstance(problem.condition(True), Stationary)
    return where.autodiff and has_objective and not problem.batched and problem.size <= 1000


def _assembled(where: Where, found: Family, problem: Instance, setting: Setting) -> Sample:
    """The same gradient through a Hessian that autodiff makes, and a dense solve."""
    call = where.settled(by_assembly(where, problem))
    first = interleave({"first": call}, Setting(short=True, rounds=1, seconds=0.0))["first"][0]
    error = _error(where.numpy(call()), problem.truth)
    times = interleave({"theirs": call}, setting)["theirs"]
    return Sample(
        where.backend, where.device, "assembly", found.name, found.axis, problem.size, "hessian + solve", "solve",
        "CONVERGED", "", spread(times), first, problem.size, 0, float("nan"), error,
    )  # fmt: skip


def _peer(found: Family, problem: Instance, name: str, setting: Setting) -> Sample:
    """The same gradient through SciPy's solver, on the same product and at the same tolerance."""
    call = by_scipy(problem, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, info, products = call()
        times = interleave({"theirs": call}, setting)["theirs"]
    status = "CONVERGED" if info == 0 else f"info = {info}"
    return Sample(
        "numpy", "cpu", "scipy", found.name, found.axis, problem.size, name, name, status, "", spread(times), times[0],
        products, products, float("nan"), _error(value, problem.truth),
    )  # fmt: skip
