"""One of the two processes of test_numpy_distributed.py: each holds a slice of y and of theta."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from standin_mpi import COMM_WORLD as comm

import implicitdiff as idf
from implicitdiff import CG, GMRES, MINRES, BiCGSTAB, Chebyshev, ImplicitDiffError, Root, Stationary
from implicitdiff.backends.numpy import NumpyBackend

RANK = comm.Get_rank()
N, CUT = 60, 23
MINE = slice(0, CUT) if RANK == 0 else slice(CUT, N)
BACKEND = NumpyBackend(reduce=comm.allreduce)

rng = np.random.default_rng(11)
Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
MATRICES = {
    "cg": Q @ np.diag(np.geomspace(1, 100, N)) @ Q.T,
    "minres": Q @ np.diag(np.geomspace(1, 10, N) * (-1.0) ** np.arange(N)) @ Q.T,
    "gmres": 3 * np.eye(N) + rng.normal(size=(N, N)) / np.sqrt(N),
    "restarted": 3 * np.eye(N) + rng.normal(size=(N, N)) / np.sqrt(N),
    "bicgstab": 3 * np.eye(N) + rng.normal(size=(N, N)) / np.sqrt(N),
    "chebyshev": Q @ np.diag(np.linspace(1, 10, N)) @ Q.T,
}
SOLVERS = {
    "cg": CG(rtol=1e-12), "minres": MINRES(rtol=1e-12), "gmres": GMRES(rtol=1e-12),
    "restarted": GMRES(rtol=1e-12, restart=7), "bicgstab": BiCGSTAB(rtol=1e-12), "chebyshev": Chebyshev(terms=60),
}  # fmt: skip
C = rng.normal(size=(N, N)) / 5
Y, V, T = rng.normal(size=(3, N))


def whole(part: Any) -> Any:
    """Put the two slices together: what a product needs of the other process."""
    other = comm.sendrecv(np.asarray(part), 1 - RANK, 1 - RANK)
    return np.concatenate([part, other] if RANK == 0 else [other, part])


def product(m: np.ndarray) -> Callable[[Any], Any]:
    return lambda v: (m @ whole(v))[MINE]


def condition(name: str, **changes: Any) -> Any:
    """F = A y − C θ, by products of slices."""
    A = MATRICES[name]
    forward, mixed = product(A), {"mixed_jvp": lambda y, t, d: -product(C)(d)}
    mixed["mixed_vjp"] = lambda y, t, u: -product(C.T)(u)
    fun = lambda y, t: forward(y) - product(C)(t)
    if name in ("cg", "minres", "chebyshev"):
        return Stationary(**{"grad": fun, "hvp": lambda y, t, v: forward(v), **mixed, **changes})
    adjoint = product(A.T)
    return Root(fun, **{"jvp": lambda y, t, v: forward(v), "vjp": lambda y, t, u: adjoint(u), **mixed, **changes})


def at(name: str) -> tuple[np.ndarray, np.ndarray]:
    return Y[MINE].copy(), np.linalg.solve(C, MATRICES[name] @ Y)[MINE]


def compare(name: str) -> dict[str, Any]:
    A = MATRICES[name]
    lin = idf.linearize(condition(name), *at(name), solver=SOLVERS[name], backend=BACKEND)
    found = [lin.vjp(V[MINE]), lin.jvp(T[MINE])]
    counts, sizes = [lin.report.iterations], [lin.report.stationarity, lin.report.residual]
    expected = [(C.T @ np.linalg.solve(A.T, V))[MINE], np.linalg.solve(A, C @ T)[MINE]]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    theta = np.linalg.solve(C, A @ Y)
    alone = Root(
        lambda y, t: A @ y - C @ t, jvp=lambda y, t, v: A @ v, vjp=lambda y, t, u: A.T @ u,
        mixed_jvp=lambda y, t, d: -C @ d, mixed_vjp=lambda y, t, u: -C.T @ u,
    )  # fmt: skip
    _, report = idf.implicit_jvp(alone, Y, theta, T, solver=SOLVERS[name], return_report=True)
    return {"error": max(errors), "iterations": counts[-1], "alone": report.iterations, "sizes": sizes}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ImplicitDiffError as error:
        return f"{type(error).__name__}: {error}"
    return "silent"


def told(what: str) -> dict[str, str]:
    """Faults, of which each process sees its slice at most."""
    y, theta = at("cg")
    v, solver, changes = V[MINE].copy(), "cg", {}
    if what in ("y", "cotangent") and RANK == 1:
        (y if what == "y" else v)[3] = np.nan
    elif what == "product":
        changes["hvp"] = lambda y, t, v: product(MATRICES["cg"])(v) * (np.nan if RANK == 1 else 1.0)
    elif what == "singular":
        changes["hvp"] = lambda y, t, v: 0 * product(MATRICES["cg"])(v)
    elif what in ("auto", "lu", "cholesky"):
        solver = what
    elif what == "missing":
        changes["mixed_vjp"], changes["mixed_jvp"] = None, None
    elif what == "empty" and RANK == 1:
        y, theta, v = y[:0], theta[:0], v[:0]
    elif what == "maxiter":
        solver = CG(maxiter=3)
    if what == "not a solution":
        y = y + (1e-2 if RANK == 1 else 0.0)
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            idf.implicit_vjp(condition("cg"), y, theta, v, solver=solver, backend=BACKEND)
        return {"told": "; ".join(f"{w.category.__name__}: {w.message}" for w in caught)}
    if what == "jacobian":
        return {"told": message(lambda: idf.implicit_jacobian(condition("cg"), y, theta, solver="cg", backend=BACKEND))}
    if what == "outer":
        loss = lambda y, t: (y**2).sum()
        grad = lambda: idf.implicit_grad(condition("cg"), loss, y, theta, solver="cg", backend=BACKEND)
        return {"told": message(grad)}
    if what == "empty":
        simple = Stationary(
            grad=lambda y, t: y - t, hvp=lambda y, t, v: v, mixed_vjp=lambda y, t, u: -u, mixed_jvp=lambda y, t, d: -d
        )
        return {"told": message(lambda: idf.implicit_vjp(simple, y, y, v, solver="cg", backend=BACKEND))}
    made = condition("cg", **changes)
    return {"told": message(lambda: idf.implicit_vjp(made, y, theta, v, solver=solver, backend=BACKEND))}


def main() -> None:
    results = {}
    for case in sys.argv[1:]:
        kind, _, rest = case.partition(":")
        results[case] = told(rest) if kind == "told" else compare(kind)
    sys.stdout.write(json.dumps(results, default=float) + "\n")


if __name__ == "__main__":
    main()
