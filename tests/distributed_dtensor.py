"""Cases of distributed_torch.py with tensors spread over a mesh of two."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import implicitdiff as idf
from implicitdiff import CG, MINRES, ImplicitDiffError, Root, Stationary

SIZE = int(sys.argv[3])
TIGHT = {"cg": CG(rtol=1e-13), "minres": MINRES(rtol=1e-13)}

rng = np.random.default_rng(5)
X, T = torch.from_numpy(rng.normal(size=(31, 7))), torch.from_numpy(rng.normal(size=(31, 3)))
THETA = torch.from_numpy(rng.normal(size=7))
VW, VO, D = (torch.from_numpy(rng.normal(size=shape)) for shape in ((7, 3), (3,), (7,)))
LAYOUTS = {  # of X, T, the weights and theta; what is left is in every process
    "features": (Shard(1), Replicate(), Shard(0), Shard(0)),
    "outputs": (Replicate(), Shard(1), Shard(1), Replicate()),
    "examples": (Shard(0), Shard(0), Replicate(), Replicate()),
}


def objective(y: Any, theta: Any, x: Any, t: Any) -> Any:
    error = x @ y["w"] + y["o"] - t
    return ((error**2).sum() + (theta.exp()[:, None] * y["w"] ** 2).sum() + (y["o"] ** 2).sum()) / 2


def grad(y: Any, theta: Any, x: Any, t: Any) -> Any:
    error = x @ y["w"] + y["o"] - t
    return {"w": x.T @ error + theta.exp()[:, None] * y["w"], "o": error.sum(0) + y["o"]}


def hvp(y: Any, theta: Any, v: Any, x: Any, t: Any) -> Any:
    change = x @ v["w"] + v["o"]
    return {"w": x.T @ change + theta.exp()[:, None] * v["w"], "o": change.sum(0) + v["o"]}


GIVEN = Stationary(
    grad=grad, hvp=hvp, mixed_vjp=lambda y, theta, u, x, t: theta.exp() * (y["w"] * u["w"]).sum(1),
    mixed_jvp=lambda y, theta, d, x, t: {"w": (theta.exp() * d)[:, None] * y["w"], "o": 0 * y["o"]},
)  # fmt: skip
CONDITIONS = {"objective": objective, "grad": Stationary(grad=grad), "root": Root(grad), "given": GIVEN}


def outer(y: Any, theta: Any) -> Any:
    return (y["w"] ** 4).sum() + (y["o"] ** 3).sum() + (theta**3).sum()


def solved() -> Any:
    z = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
    penalty = torch.cat([THETA.exp(), THETA.new_ones(1)])
    both = torch.linalg.solve(z.T @ z + torch.diag(penalty), z.T @ T)
    return {"w": both[:-1], "o": both[-1]}


def spread(mesh: Any, x: torch.Tensor, how: Any) -> DTensor:
    return distribute_tensor(x, mesh, [how])


def problem(mesh: Any, layout: str) -> tuple[Any, ...]:
    """Return y, θ, the data, a cotangent and a tangent, spread."""
    rows, targets, weights, theta = LAYOUTS[layout]
    tree = lambda w, o: {"w": spread(mesh, w, weights), "o": spread(mesh, o, Replicate())}
    data = (spread(mesh, X, rows), spread(mesh, T, targets))
    y = solved()
    return tree(y["w"], y["o"]), spread(mesh, THETA, theta), data, tree(VW, VO), spread(mesh, D, theta)


def derivatives(condition: Any, at: tuple[Any, ...], solver: str) -> tuple[list[Any], list[int]]:
    y, theta, data, v, t = at
    lin = idf.linearize(condition, y, theta, args=data, solver=TIGHT[solver])
    out, counts = [], []
    for call in (lambda: lin.vjp(v), lambda: lin.jvp(t), lambda: lin.gradient(outer)):
        out.append(call())
        counts.append(lin.report.iterations)
    return [out[0], out[1]["w"], out[1]["o"], out[2]], counts


def compare(mesh: Any, layout: str, form: str, solver: str) -> dict[str, Any]:
    condition = CONDITIONS[form]
    at = problem(mesh, layout)
    alone, once = derivatives(condition, (solved(), THETA, (X, T), {"w": VW, "o": VO}, D), solver)
    found, counts = derivatives(condition, at, solver)
    like = [at[1], at[0]["w"], at[0]["o"], at[1]]
    kept = all(isinstance(g, DTensor) and g.placements == x.placements for g, x in zip(found, like, strict=True))
    errors = [float((g.full_tensor() - e).norm() / e.norm()) for g, e in zip(found, alone, strict=True)]
    return {"error": max(errors), "kept": kept, "iterations": counts, "alone": once}


def bare(mesh: Any) -> dict[str, Any]:
    """A single tensor of one axis is spread as well; the product comes back with a sum still to be made."""
    a = X.T @ X + torch.eye(7, dtype=X.dtype)
    y, v = torch.linalg.solve(a, THETA), D
    rows = spread(mesh, X, Shard(0))
    seen = []

    def product(_: Any, __: Any, p: Any) -> Any:
        out = rows.T @ (rows @ p)
        seen.append(any(q == Partial() for q in out.placements))
        return out + p if form == "summed" else out

    errors, kept = [], True
    for form in ("left", "summed"):
        shift = torch.eye(7, dtype=X.dtype) if form == "summed" else 0
        where = spread(mesh, y, Replicate() if form == "left" else Shard(0))
        near = Stationary(
            grad=lambda y, t: y - y, hvp=product, mixed_vjp=lambda y, t, u: -u, mixed_jvp=lambda y, t, d: -d
        )
        got = idf.implicit_vjp(near, where, where, spread(mesh, v, where.placements[0]), solver=TIGHT["cg"])
        expected = torch.linalg.solve(X.T @ X + shift, v)
        errors.append(float((got.full_tensor() - expected).norm() / expected.norm()))
        kept = kept and got.placements == where.placements
    return {"error": max(errors), "kept": kept, "partial": any(seen)}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ImplicitDiffError as error:
        return f"{type(error).__name__}: {error}"
    return "silent"


def told(mesh: Any, what: str) -> dict[str, str]:
    y, theta, data, v, _ = problem(mesh, "features")
    if what == "jacobian":
        return {"told": message(lambda: idf.implicit_jacobian(objective, y, theta, args=data, solver="cg"))}
    if what == "nan":
        w = v["w"].full_tensor()
        w[5, 0] = torch.nan  # in the second shard
        v["w"] = spread(mesh, w, Shard(0))
    condition: Any = objective
    if what == "detached":
        condition = lambda y, theta, x, t: objective(y, theta.detach(), x, t)
    if what == "indefinite":
        condition = lambda *at: -objective(*at)
    solver = {"lu": "lu", "auto": "auto", "gmres": "gmres", "cholesky": "cholesky"}.get(what, "cg")
    return {"told": message(lambda: idf.implicit_vjp(condition, y, theta, v, args=data, solver=solver))}


def found(case: str) -> dict[str, Any]:
    """What a case came to."""
    kind, *rest = case.split(":")
    mesh = init_device_mesh("cpu", (SIZE,))
    return {"told": told, "bare": bare}.get(kind, lambda *r: compare(r[0], kind, *r[1:]))(mesh, *rest)
