"""`linear_solve` on tensors of which Torch records derivatives.

For A x = b and the cotangent x̄ of x let z = A⁻ᵀ x̄. The cotangents are b̄ = z and Ā = −z xᵀ, where z is the solution of
a system again: any order follows. Forward, ẋ = A⁻¹ (ḃ − Ȧ x).

A method of least squares has x = A⁺ b, and with r = b − A x, as long as the rank stays what it is (Golub and Pereyra),

    ẋ = A⁺ (ḃ − Ȧ x) + A⁺ A⁺ᵀ Ȧᵀ r + (I − A⁺ A) Ȧᵀ A⁺ᵀ x,
    b̄ = z = A⁺ᵀ x̄,    Ā = −z xᵀ + r (A⁺ z)ᵀ + (A⁺ᵀ x) (x̄ − Aᵀ z)ᵀ.

References
----------
G. H. Golub, V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 10 (1973) 413-432. DOI 10.1137/0710036
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
        ctx.save_for_backward(matrix, output, inputs[3])
        ctx.save_for_forward(matrix, output, inputs[3])

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        matrix, x, b = ctx.saved_tensors
        system, A = _transposed(ctx.system, matrix)
        z = _apply(system, A, cotangent, [])
        if matrix is None:
            return None, None, None, z
        by_matrix = -_outer(ctx.system, z, x)
        if ctx.system.least_squares:
            r, rest = b - _times(ctx.system, matrix, x), cotangent - _times(ctx.system, matrix.mT, z)
            by_matrix = by_matrix + _outer(ctx.system, r, _apply(replace(ctx.system, x0=None), matrix, z, []))
            by_matrix = by_matrix + _outer(ctx.system, _apply(system, A, x, []), rest)
        return None, None, by_matrix, z

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, dA: Array | None, db: Array | None) -> Array:
        matrix, x, given = ctx.saved_tensors
        b = torch.zeros_like(given) if db is None else db
        if dA is not None:
            b = b - _times(ctx.system, dA, x)
        moved = _apply(ctx.system, ctx.system.A if matrix is None else matrix, b, [])
        if dA is None or matrix is None or not ctx.system.least_squares:
            return moved
        system, A = _transposed(ctx.system, matrix)
        r, turned = given - _times(ctx.system, matrix, x), dA.mT
        outside = _times(ctx.system, turned, _apply(system, A, x, []))
        into = _apply(system, A, _times(ctx.system, turned, r), []) - _times(ctx.system, matrix, outside)
        return moved + _apply(replace(ctx.system, x0=None), matrix, into, []) + outside

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], system: System, reports: list[Report], *tensors: Array | None
    ) -> tuple[Array, int]:
        outs = []
        for i in range(info.batch_size):
            each = [x if d is None or x is None else x.select(d, i) for x, d in zip(tensors, in_dims[2:], strict=True)]
            outs.append(Solved.apply(system, reports, *each))
        return torch.stack(outs), 0


def _times(system: System, matrix: Array, x: Array) -> Array:
    """A x, for each right-hand side or item."""
    return (matrix @ x[..., None])[..., 0] if system.batched or x.ndim == 1 else matrix @ x


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
