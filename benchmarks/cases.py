"""What is compared with what: each case times our call and the same work by hand, and checks both results.

A case is a function from a `Setting` to rows; ``CASES`` names them for ``--only``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve

from benchmarks.batches import batches
from benchmarks.measure import Setting, Spread, import_seconds, interleave, peak_bytes, ratio
from benchmarks.problems import Batch, Diagonal, Logistic, Quadratic, Ridge, System, relative_error
from benchmarks.report import Row
from benchmarks.scale import scale
from benchmarks.small import small_with_numpy
from implicitdiff import CG, Auto, Stationary, implicit_jacobian, implicit_vjp

__all__ = ["CASES", "SIZES", "counted_row", "timed_row", "unavailable"]

Times = Mapping[str, list[float]]

SIZES = ((100, 700), (1000, 700), (10_000, 200))
"""Features and samples of the logistic regressions: n = 500, 5 000, 50 000."""


def unavailable(setting: Setting) -> str | None:
    """Why nothing can be measured here."""
    return "NumPy knows the CPU only" if setting.device != "cpu" else None


def timed_row(case: str, size: str, times: Times, ours: str, reference: str, bar: float | None, error: float,
              allowed: float, allowance: float = 0.0, **facts: Any) -> Row:  # fmt: skip
    """Row of two entries of the same interleaved measurement."""
    return Row(case, size, median(times[ours]), median(times[reference]), ratio(times, ours, reference, allowance), bar,
               error, allowed, facts=facts)  # fmt: skip


def gradient(setting: Setting) -> list[Row]:
    """Matrix-free gradient against its own products, and against SciPy's CG."""
    rows = []
    for size in ((60, 700),) if setting.short else SIZES:
        rows += _gradient(Logistic(*size), setting)
    return rows


def _gradient(problem: Logistic, setting: Setting) -> list[Row]:
    rtol = 1e-8
    where = (problem.condition, problem.W, problem.theta, problem.cotangent)
    solvers = {"cg": CG(rtol=rtol), "auto": Auto(rtol=rtol)}

    def ours(name: str, **more: Any) -> Any:
        return implicit_vjp(*where, args=problem.args, solver=solvers[name], **more)

    found = {name: ours(name, return_report=True) for name in solvers}
    by_scipy, products = problem.by_scipy(rtol)
    iterations = found["cg"][1].iterations

    def floor() -> None:
        for _ in range(iterations + 2):
            problem.product()

    times = interleave(
        {"cg": lambda: ours("cg"), "floor": floor, "auto": lambda: ours("auto"),
         "scipy": lambda: problem.by_scipy(rtol)}, setting,
    )  # fmt: skip
    bar, size = 1.10 if problem.n >= 5000 else 1.30, f"n = {problem.n}"
    rows = []
    for name, (value, report) in found.items():
        error = relative_error(value, problem.truth)
        facts = {"iterations": report.iterations, "matvecs": report.matvecs, "solver": report.solver, "rtol": rtol}
        rows += [
            timed_row(f"gradient, {name} / (iterations + 2) products", size, times, name, "floor", bar, error, 1e-6,
                      **facts),
            timed_row(f"gradient, {name} / SciPy cg", size, times, name, "scipy", 1.0, error, 1e-6, **facts,
                      scipy_products=products, scipy_error=relative_error(by_scipy, problem.truth)),
        ]  # fmt: skip
    return rows


def products(setting: Setting) -> list[Row]:
    """Products with A that a gradient takes, counted where they are made."""
    problem, made = Logistic(60 if setting.short else 100), list[int]()

    def hvp(*args: Any) -> Any:
        made.append(1)
        return problem.hvp(*args)

    condition = Stationary(grad=problem.grad, hvp=hvp, mixed_vjp=problem.mixed_vjp)
    call = (condition, problem.W, problem.theta, problem.cotangent)
    implicit_vjp(
        *call, args=problem.args, solver=CG(rtol=1e-8)
    )  # the products given are checked at the first call only
    made.clear()
    _, report = implicit_vjp(*call, args=problem.args, solver=CG(rtol=1e-8), return_report=True)
    return [counted_row(problem.n, len(made), report)]


def counted_row(n: int, made: int, report: Any, backend: str = "numpy") -> Row:
    """Row of the products that were made and those that a solve by CG needs; the report must tell the same."""
    told = abs(made - report.matvecs) / made
    needed, same = report.iterations + 2, Spread(*3 * (made / (report.iterations + 2),))
    facts = {"iterations": report.iterations, "matvecs": report.matvecs, "solver": report.solver}
    return Row("products with A, cg / (iterations + 2)", f"n = {n}", made, needed, same, 1.0, told, 0.0, "products",
               facts, backend=backend)  # fmt: skip


def jacobian(setting: Setting) -> list[Row]:
    """Dense Jacobian against assembling both matrices and calling LAPACK through SciPy."""
    n = 40 if setting.short else 500
    return [
        *_jacobian("dense B", Quadratic(n), ("cholesky", "auto"), by_cholesky, setting),
        *_jacobian("dense B", System(n), ("lu", "auto"), by_lu, setting),
        *_jacobian("diagonal B", Ridge(n), ("cholesky", "auto"), by_cholesky, setting),
    ]


def by_hand(problem: Any, factor_and_solve: Callable[[Any, Any], Any]) -> Any:
    """Assemble A and B from the same callables, and solve for all columns."""
    at = (problem.y, problem.theta)
    A = problem.matrix(*at, *problem.args)
    B = np.stack([problem.mixed_jvp(*at, e, *problem.args) for e in np.eye(problem.theta.size)], axis=1)
    return -factor_and_solve(A, B)


def by_cholesky(A: Any, B: Any) -> Any:
    """A⁻¹ B for symmetric positive definite A."""
    return cho_solve(cho_factor(A, lower=True, check_finite=False), B, check_finite=False)


def by_lu(A: Any, B: Any) -> Any:
    """A⁻¹ B."""
    return lu_solve(lu_factor(A, check_finite=False), B, check_finite=False)


def _jacobian(what: str, problem: Any, solvers: tuple[str, ...], lapack: Any, setting: Setting) -> list[Row]:
    def ours(name: str, **more: Any) -> Any:
        return implicit_jacobian(problem.condition, problem.y, problem.theta, args=problem.args, solver=name, **more)

    functions: dict[str, Callable[[], Any]] = {name: partial(ours, name) for name in solvers}
    functions["hand"] = lambda: by_hand(problem, lapack)
    times = interleave(functions, setting)
    rows = []
    for name in solvers:
        value, report = ours(name, return_report=True)
        label = name if name != "auto" else f"auto ({report.solver})"
        rows.append(timed_row(
            f"jacobian, {label}, {what} / assembly + LAPACK", f"n = m = {problem.y.size}", times, name, "hand", 1.2,
            relative_error(value, problem.truth), 1e-9, solver=report.solver, residual=report.residual,
        ))  # fmt: skip
    return rows


def batch(setting: Setting) -> list[Row]:
    """A batch of small problems in one call against one LAPACK call, and against a loop of calls."""
    items, n = (32, 4) if setting.short else (1024, 16)
    problem = Batch(items, n)

    def ours(solver: str) -> Any:
        return implicit_vjp(problem.condition, problem.y, problem.theta, problem.cotangent,
                            args=(problem.H, problem.C), solver=solver, batched=True)  # fmt: skip

    def loop() -> Any:
        each = zip(problem.y, problem.theta, problem.cotangent, problem.H, problem.C, strict=True)
        return np.stack([implicit_vjp(problem.condition, y, t, v, args=(H, C)) for y, t, v, H, C in each])

    truth, size, rows = problem.by_numpy(), f"{items} x n = {n}", []
    for name in ("auto", "cholesky", "lu"):
        functions: dict[str, Callable[[], Any]] = {name: partial(ours, name), "numpy": problem.by_numpy}
        times = interleave(functions, setting)
        error = relative_error(ours(name), truth)
        rows.append(timed_row(f"batch, {name} / numpy.linalg.solve", size, times, name, "numpy", None, error, 1e-10))
    times = interleave({"auto": lambda: ours("auto"), "loop": loop}, setting)
    error = max(relative_error(ours("auto"), truth), relative_error(loop(), truth))
    rows.append(timed_row("batch, auto / loop of single calls", size, times, "auto", "loop", 1 / 3, error, 1e-10))
    return rows


def imports(setting: Setting) -> list[Row]:
    """Importing the package against importing what it needs, each in a fresh interpreter."""
    rounds = 1 if setting.short else 3 * setting.rounds
    statements = {
        "ours": "import implicitdiff",
        "backend": "import implicitdiff.backends.numpy",  # what a first call adds
        "reference": "import numpy, scipy.linalg",
    }
    times: dict[str, list[float]] = {name: [] for name in statements}
    with TemporaryDirectory() as folder:
        for done in range(rounds + 1):
            for name, statement in statements.items():
                seconds = import_seconds(statement, setting, Path(folder))
                if done:  # the first round fills the caches
                    times[name].append(seconds)
    return [
        timed_row(f"import {what} / import numpy, scipy.linalg", "-", times, name, "reference", bar, 0.0, 0.0)
        for name, what, bar in (("ours", "implicitdiff", 1.15), ("backend", "and the NumPy backend", None))
    ]


def memory(setting: Setting) -> list[Row]:
    """Most memory that a call holds beside the caller's arrays: matrix-free, a Jacobian, a batch."""
    return [_matrix_free_memory(setting), *_matrix_memory(setting)]


def _matrix_memory(setting: Setting) -> list[Row]:
    """Of a Jacobian and of a batch, in matrices of A's shape (of a batch: all of them), against the same by hand.

    By hand A, B, its image and the factors are held at once; no further matrix is needed.
    """
    n, items, small = (40, 32, 4) if setting.short else (500, 1024, 16)
    dense, many = Quadratic(n), Batch(items, small)

    def jacobian() -> Any:
        return implicit_jacobian(dense.condition, dense.y, dense.theta, args=dense.args)

    def vjp() -> Any:
        return implicit_vjp(many.condition, many.y, many.theta, many.cotangent, args=(many.H, many.C), batched=True)

    rows = []
    for case, size, entries, ours, reference, truth in (
        ("jacobian, dense B / assembly + LAPACK", f"n = m = {n}", n * n, jacobian,
         lambda: by_hand(dense, by_cholesky), dense.truth),
        ("batch / numpy.linalg.solve", f"{items} x n = {small}", items * small**2, vjp, many.by_numpy,
         many.by_numpy()),
    ):  # fmt: skip
        error = relative_error(ours(), truth)
        a, b = (round(peak_bytes(f) / (8 * entries), 1) for f in (ours, reference))
        rows.append(Row(f"memory, {case}", size, a, b, Spread(*3 * (a / b,)), None, error, 1e-9, "matrices"))
    return rows


def _matrix_free_memory(setting: Setting) -> Row:
    """Most memory that matrix-free CG holds beside the caller's arrays, in vectors of length n.

    The four are x, r, p and Ap; the product allocates its result, which is Ap, and nothing else. Python's own objects
    are some percent of a vector, hence one decimal.
    """
    n = 20_000 if setting.short else 1_000_000
    problem = Diagonal(n)
    found: list[Any] = []

    def ours() -> None:
        found[:] = [implicit_vjp(problem.condition, problem.y, problem.theta, problem.cotangent, solver=CG(rtol=1e-8))]

    peak = round(peak_bytes(ours) / (8 * n), 1)
    product = round(peak_bytes(lambda: problem.d * problem.cotangent) / (8 * n), 1)
    same = Spread(*3 * (peak / 4,))
    error = relative_error(found[0], problem.truth)
    return Row("memory, cg / four vectors (x, r, p, Ap)", f"n = {n}", peak, 4.0, same, 1.0, error, 1e-6,
               "n-vectors", {"one product": product})  # fmt: skip


def certificates(setting: Setting) -> list[Row]:
    """Estimated errors against true ones: see `benchmarks.certificates`, which brings autograd in."""
    from benchmarks.certificates import certificates as measured

    return measured(setting)


def sparse(setting: Setting) -> list[Row]:
    """Sparse systems: see `benchmarks.sparse_systems`."""
    from benchmarks.sparse_systems import sparse as measured

    return measured(setting)


def sequences(setting: Setting) -> list[Row]:
    """Products of one adjoint after another: see `benchmarks.sequences`, which brings scikit-learn in."""
    from benchmarks.sequences import sequences as measured

    return measured(setting)


CASES: dict[str, Callable[[Setting], list[Row]]] = {
    "gradient": gradient, "jacobian": jacobian, "batch": batch, "products": products, "import": imports,
    "memory": memory, "small": small_with_numpy, "scale": scale, "certificates": certificates,
    "sequences": sequences, "batches": batches, "sparse": sparse,
}  # fmt: skip
