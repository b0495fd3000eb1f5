"""Quadratic programs solved and differentiated in Torch: `solve_qp`, Clarabel by hand, layers of other libraries."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch

from benchmarks.measure import Function, Setting, interleave
from benchmarks.problems import relative_error
from benchmarks.programs import Programs, by_hand
from benchmarks.report import Row, Skipped
from implicitdiff import solve_qp

__all__ = ["qp_layers"]

BACKWARD = 0.2
"""What the ratio to another layer's backward pass may be."""


class Layer(NamedTuple):
    """A layer: the solution of its parameters, and these, by name, as leaves."""

    solve: Callable[[], Any]
    parameters: dict[str, Any]


def qp_layers(fw: Any, setting: Setting) -> list[Row | Skipped]:
    """A batch of programs, forward and backward."""
    sizes = (8, 6, 2, 5) if setting.short else (128, 50, 10, 20)
    problem, (items, n, p, r) = Programs(*sizes), sizes
    size, v = f"{items} x (n = {n}, {p} eq, {r} ineq)", fw.put(problem.cotangent)
    leaves = {name: fw.put(x).requires_grad_() for name, x in problem.theta.items()}
    ours = Layer(lambda: solve_qp(**leaves, batched=True), leaves)
    point = ({name: x.detach() for name, x in leaves.items()}, *map(fw.put, (problem.y, problem.lam, problem.mu)), v)
    hand = fw.mapped(by_hand, point)
    rows: list[Row | Skipped] = _rows(fw, problem, size, setting, ours, "Clarabel, one by one", _clarabel(problem), 1.0,
                                      fw.by_hand, hand, None, v)  # fmt: skip
    for name, make in (("cvxpylayers", _cvxpylayers), ("qpth", _qpth)) if setting.peers else ():
        try:
            theirs = make(problem, fw)
            backward = _backward(theirs, v)
            error = relative_error(fw.numpy(theirs.solve()), problem.y)
            backward()
        except Exception as failure:  # another library's own failure is a fact to be told
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0][:100]}"
            rows.append(fw.skipped(f"solve_qp / {name}", size, reason))
            continue
        rows += _rows(fw, problem, size, setting, ours, name, _quietly(theirs.solve), 1.0, name, _quietly(backward),
                      BACKWARD, v, peer_error=error)  # fmt: skip
    return rows


def _rows(
    fw: Any, problem: Programs, size: str, setting: Setting, ours: Layer, solver: str, solve: Function, bar: float,
    differentiator: str, differentiate: Function, least: float | None, v: Any, **facts: Any,
) -> list[Row | Skipped]:  # fmt: skip
    backward = _backward(ours, v)
    times = interleave(
        {
            "ours": fw.timed(ours.solve),
            "theirs": fw.timed(solve),
            "back": fw.timed(backward),
            "their back": differentiate,
        },
        setting,
    )
    found = dict(zip(ours.parameters, map(fw.numpy, backward()), strict=True))
    error = max(relative_error(found[name], problem.truth[name]) for name in problem.truth)
    solved = relative_error(fw.numpy(ours.solve()), problem.y)
    return [
        fw.row(f"solve_qp / {solver}", size, times, "ours", "theirs", bar, solved, 1e-8, **facts),
        fw.row(f"solve_qp, backward / {differentiator}", size, times, "back", "their back", least, error, 1e-8),
    ]


def _backward(layer: Layer, v: Any) -> Function:
    y = layer.solve()
    return lambda: torch.autograd.grad(y, tuple(layer.parameters.values()), v, retain_graph=True)


def _quietly(function: Function) -> Function:
    """Without warnings, which others give of each other."""

    def called() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()

    return called


def _clarabel(problem: Programs) -> Function:
    clarabel, data = importlib.import_module("clarabel"), problem.theta
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    p, r = data["b"].shape[1], data["h"].shape[1]
    cones = [clarabel.ZeroConeT(p), clarabel.NonnegativeConeT(r)]

    def one(i: int) -> Any:
        Q, rows = scipy.sparse.csc_matrix(np.triu(data["Q"][i])), np.concatenate([data["A"][i], data["G"][i]])
        right = np.concatenate([data["b"][i], data["h"][i]])
        solver = clarabel.DefaultSolver(Q, data["q"][i], scipy.sparse.csc_matrix(rows), right, cones, settings)
        return solver.solve().x

    return lambda: np.array([one(i) for i in range(len(data["q"]))])


# -- other libraries -------------------------------------------------------------------------------------
def _cvxpylayers(problem: Programs, fw: Any) -> Layer:
    """With Clarabel as its solver; it wants ½|Ly|² in place of ½yᵀQy, and differentiates by L."""
    cp, layers = importlib.import_module("cvxpy"), importlib.import_module("cvxpylayers.torch")
    data = {"L": np.swapaxes(np.linalg.cholesky(problem.theta["Q"]), 1, 2), **problem.theta}
    del data["Q"]
    leaves = {name: fw.put(np.ascontiguousarray(x)).requires_grad_() for name, x in data.items()}
    given = {name: cp.Parameter(x.shape[1:]) for name, x in data.items()}
    y = cp.Variable(data["q"].shape[1])
    objective = cp.Minimize(cp.sum_squares(given["L"] @ y) / 2 + given["q"] @ y)
    program = cp.Problem(objective, [given["A"] @ y == given["b"], given["G"] @ y <= given["h"]])
    layer = layers.CvxpyLayer(program, parameters=list(given.values()), variables=[y])
    options = {"solve_method": "Clarabel"}
    return Layer(lambda: layer(*leaves.values(), solver_args=options)[0], leaves)


def _qpth(problem: Programs, fw: Any) -> Layer:
    """Its backward pass solves with the factors of its last interior-point step."""
    function = importlib.import_module("qpth.qp").QPFunction(verbose=-1, check_Q_spd=False)
    leaves = {name: fw.put(x).requires_grad_() for name, x in problem.theta.items()}
    order = ("Q", "q", "G", "h", "A", "b")
    return Layer(lambda: function(*(leaves[name] for name in order)), leaves)
