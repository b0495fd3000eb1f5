"""Linear systems, compiled once for each solver and structure."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from implicitdiff.backends.jax.programs import Call, Program, Split, program_for
from implicitdiff.backends.jax.tracers import is_traced, is_transformed
from implicitdiff.linalg.system import System, SystemRun
from implicitdiff.problem import Problem

__all__ = ["solved"]


def solved(system: System, inline: Any) -> SystemRun:
    """Solve a linear system: compiled where values are at hand or transformed, inline where JAX is tracing."""
    matrix, product = (system.A, None) if hasattr(system.A, "shape") else (None, system.A)
    arrays, transformed = (matrix, system.b, system.x0), False
    if is_traced(arrays):
        system, transformed = replace(system, backend=inline), is_transformed((product, system.transpose), arrays)
        if not transformed:
            return system.solved()
    elif matrix is not None and system.symmetric is None and matrix.ndim >= 2:
        same = matrix.shape[-1] == matrix.shape[-2] and bool(jnp.all(matrix == jnp.swapaxes(matrix, -1, -2)))
        system = replace(system, symmetric=same)
    static = (system.symmetric, system.positive_definite)
    problem = Problem(system.backend, product, None, None, static, system.settings, system.batched)
    call = Call(problem, "transformed" if transformed else "solve", system.transpose, Split(static), arrays)
    program = program_for(call, _build_solve)
    start = time.perf_counter()
    solution = program(call)
    if is_traced(solution) and not transformed:
        return replace(system, backend=inline).solved()
    return SystemRun(solution, {**program.facts["report"], "seconds": time.perf_counter() - start}, system.backend.mode)


def _build_solve(program: Program, call: Call, matrix: Any, b: Any, x0: Any) -> Any:
    problem = call.problem
    A = problem.condition if matrix is None else matrix
    symmetric, definite = problem.args
    settings = problem.settings
    system = System(problem.backend, A, b, x0, symmetric, definite, call.outer, problem.batched, settings)
    solution, facts, _ = system.solved()
    program.facts["report"] = {name: facts[name] for name in ("methods", "derivatives", "damping")}
    return solution
