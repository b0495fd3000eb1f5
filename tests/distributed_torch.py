"""One of the processes of test_torch_distributed.py: ``python distributed_torch.py RENDEZVOUS RANK SIZE CASE``."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import implicitdiff as idf
from implicitdiff import CG, GMRES, MINRES, Auto, BiCGSTAB, FixedPoint, ImplicitDiffError, Root, Stationary
from implicitdiff.backends.torch import TorchBackend

RANK, SIZE = int(sys.argv[2]), int(sys.argv[3])
TIGHT = {
    "cg": CG(rtol=1e-13), "minres": MINRES(rtol=1e-13), "gmres": GMRES(rtol=1e-13), "bicgstab": BiCGSTAB(rtol=1e-13),
    "auto": Auto(rtol=1e-13),
}  # fmt: skip
N, M, ROWS = 12, 5, 30

rng = np.random.default_rng(3)
X = torch.from_numpy(rng.normal(size=(ROWS, N)))
K = torch.from_numpy(rng.normal(size=(ROWS, M)))
SKEW = torch.from_numpy(rng.normal(size=(N, N)))
THETA = torch.from_numpy(rng.normal(size=M))
V, T = torch.from_numpy(rng.normal(size=N)), torch.from_numpy(rng.normal(size=M))


def shares(whole: bool) -> tuple[Any, ...]:
    """Return the data of this process, or all of it, and the share of what belongs to no example."""
    rows = slice(None) if whole else slice(RANK, None, SIZE)
    return X[rows], K[rows], 1.0 if whole else 1.0 / SIZE


def objective(y: Any, theta: Any, x: Any, k: Any, share: float) -> Any:
    """Least squares with a penalty: its Hessian is positive definite."""
    return ((x @ y - k @ theta) ** 2).sum() / 2 + share * (y**2).sum() / 2


def root(y: Any, theta: Any, x: Any, k: Any, share: float) -> Any:
    """An asymmetric A."""
    return x.T @ (x @ y - k @ theta) + share * (40 * y + SKEW @ y)


def grad(y: Any, theta: Any, x: Any, k: Any, share: float) -> Any:
    return x.T @ (x @ y - k @ theta) + share * y


CONDITIONS: dict[str, tuple[Any, Any]] = {
    "stationary": (Stationary(objective), X.T @ X + torch.eye(N, dtype=X.dtype)),
    "given": (
        Stationary(
            grad=grad, hvp=lambda y, t, v, x, k, share: x.T @ (x @ v) + share * v,
            mixed_vjp=lambda y, t, u, x, k, share: -k.T @ (x @ u),
            mixed_jvp=lambda y, t, d, x, k, share: -x.T @ (k @ d),
        ),
        X.T @ X + torch.eye(N, dtype=X.dtype),
    ),
    "matrix": (
        Stationary(grad=grad, hessian=lambda y, t, x, k, share: x.T @ x + share * torch.eye(N, dtype=x.dtype)),
        X.T @ X + torch.eye(N, dtype=X.dtype),
    ),
    "root": (Root(root), X.T @ X + 40 * torch.eye(N, dtype=X.dtype) + SKEW),
    "fixed point": (
        FixedPoint(lambda y, *rest: y - root(y, *rest)), X.T @ X + 40 * torch.eye(N, dtype=X.dtype) + SKEW,
    ),
}  # fmt: skip


def outer(whole: bool) -> Callable[[Any, Any], Any]:
    x, _, share = shares(whole)
    return lambda y, theta: ((x @ y) ** 2).sum() / 2 + share * (theta**3).sum()


def measured(name: str, solver: str, whole: bool) -> tuple[list[Any], list[int]]:
    """All derivatives, and the iterations that they took."""
    condition, A = CONDITIONS[name]
    y = torch.linalg.solve(A, X.T @ (K @ THETA))
    backend = TorchBackend() if whole else TorchBackend(group=True)
    lin = idf.linearize(condition, y, THETA, args=shares(whole), solver=TIGHT[solver], backend=backend)
    values, counts = [], []
    for call in (lambda: lin.vjp(V), lambda: lin.jvp(T), lin.jacobian, lambda: lin.gradient(outer(whole))):
        values.append(call())
        counts.append(lin.report.iterations)
    options = {"args": shares(whole), "solver": TIGHT[solver], "backend": backend}
    values.append(idf.implicit_grad(condition, outer(whole), y, THETA, **options))
    return values, counts


def compare(name: str, solver: str) -> dict[str, Any]:
    (alone, once), (spread, counts) = measured(name, solver, True), measured(name, solver, False)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(alone, spread, strict=True)]
    return {"error": max(errors), "iterations": counts, "alone": once}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ImplicitDiffError as error:
        return f"{type(error).__name__}: {error}"
    return "silent"


def told(what: str) -> dict[str, str]:
    """Faults that all processes have to tell together."""
    condition, A = CONDITIONS["stationary"]
    y = torch.linalg.solve(A, X.T @ (K @ THETA))
    backend = TorchBackend(group=True)
    options = {"args": shares(False), "backend": backend, "solver": "cg"}
    mine = {"y": y, "theta": THETA, "cotangent": V}
    if what in mine:
        mine[what] = mine[what] + 1e-9 * RANK
    if what == "nan" and RANK == 1:
        options["args"] = (options["args"][0] * float("nan"), *options["args"][1:])
    if what == "recorded":
        solve = idf.implicit_function(condition, backend=backend)(lambda theta, *args: y)
        return {"told": message(lambda: solve(THETA.clone().requires_grad_(), *shares(False)))}
    return {"told": message(lambda: idf.implicit_vjp(condition, *mine.values(), **options))}


def main() -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=RANK, world_size=SIZE, timeout=limit)
    results = {}
    for case in sys.argv[4:]:
        kind, _, rest = case.partition(":")
        if kind == "dtensor":
            from distributed_dtensor import found

            results[case] = found(rest)
        else:
            results[case] = told(rest) if kind == "told" else compare(kind, rest)
    sys.stdout.write(json.dumps(results) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
