"""`linear_solve` on tensors of which Torch records derivatives.

For A x = b and the cotangent x̄ of x let z = A⁻ᵀ x̄. The cotangents are b̄ = z and Ā = −z xᵀ, where z is the solution of
a system again: any order follows. Forward, ẋ = A⁻¹ (ḃ − Ȧ x).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.captured import captured
from implicitdiff.backends.torch.problem import collecting, is_recorded, refuse_captured, under_transform
from implicitdiff.backends.torch.refusal import owned, with_refused
from implicitdiff.compilers import is_within_compiled
from implicitdiff.errors import DerivativeError
from implicitdiff.linalg.system import System, solve_system
from implicitdiff.outcome import Report

if TYPE_CHECKING:
    from implicitdiff.backends.torch.arrays import TorchArrays

__all__ = ["solve_recorded"]


def solve_recorded(system: System) -> tuple[Array, Report]:
    """Solve a system, differentiable where its matrix or its right-hand side is recorded."""
    hidden = callable(system.A) and not hasattr(system.A, "shape") and torch.is_grad_enabled()
    if hidden:
        system = _watched(system)
    if not (hidden or is_recorded((system.A, system.b)) or under_transform()):
        return solve_system(system)
    reports: list[Report] = []
    x = _apply(system, system.A, system.b, reports)
    return owned(x) if is_within_compiled() else x, reports[0]


def _watched(system: System) -> System:
    """Let products tell which recorded tensors they use."""
    refuse_captured(system.A, system.transpose)
    engine = collecting(cast("TorchArrays", system.backend))
    transpose = None if system.transpose is None else engine.callback(system.transpose)
    return replace(system, backend=engine, A=engine.callback(system.A), transpose=transpose)


def _apply(system: System, A: Any, b: Array, reports: list[Report]) -> Array:
    matrix = A if isinstance(A, torch.Tensor) else None
    x = Solved.apply(replace(system, A=A if matrix is None else None, b=None), reports, matrix, b)
    captures = cast("TorchArrays", system.backend).captures
    return x if captures is None else with_refused(x, captures.tensors, captured)


class Solved(torch.autograd.Function):
    """A⁻¹ b; the inputs are the rest of the system, a list for the report, the matrix where there is one, and b."""

    @staticmethod
    def forward(system: System, reports: list[Report], matrix: Array | None, b: Array) -> Array:
        plain = system.A if matrix is None else matrix.detach()
        x, report = solve_system(replace(system, A=plain, b=b.detach()))
        reports.append(report)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Array) -> None:
        ctx.system, _, matrix, _ = inputs
        ctx.save_for_backward(matrix, output)
        ctx.save_for_forward(matrix, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        matrix, x = ctx.saved_tensors
        system, A = _transposed(ctx.system, matrix)
        z = _apply(system, A, cotangent, [])
        return None, None, None if matrix is None else -_outer(ctx.system, z, x), z

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, dA: Array | None, db: Array | None) -> Array:
        matrix, x = ctx.saved_tensors
        b = torch.zeros_like(x) if db is None else db
        if dA is not None:
            b = b - (dA @ x[..., None])[..., 0] if ctx.system.batched or x.ndim == 1 else b - dA @ x
        return _apply(ctx.system, ctx.system.A if matrix is None else matrix, b, [])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], system: System, reports: list[Report], *tensors: Array | None
    ) -> tuple[Array, int]:
        outs = []
        for i in range(info.batch_size):
            each = [x if d is None or x is None else x.select(d, i) for x, d in zip(tensors, in_dims[2:], strict=True)]
            outs.append(Solved.apply(system, reports, *each))
        return torch.stack(outs), 0


def _outer(system: System, z: Array, x: Array) -> Array:
    """z xᵀ, summed over right-hand sides, or per item."""
    if system.batched or x.ndim == 1:
        return z[..., :, None] * x[..., None, :]
    return z @ x.mT


def _transposed(system: System, matrix: Array | None) -> tuple[System, Any]:
    """Return the system of Aᵀ, and Aᵀ."""
    system = replace(system, x0=None)
    if matrix is not None:
        return system, matrix.mT
    if system.symmetric or system.positive_definite:
        return system, system.A
    if system.transpose is None:
        raise DerivativeError(
            "the gradient of a solution needs products with Aᵀ, and A is a function.\n"
            "Next: give transpose=, or symmetric=True where it is."
        )
    return replace(system, transpose=system.A), system.transpose
