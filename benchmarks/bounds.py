"""The a-posteriori bound on the error of a hypergradient that there was before, for problems of the zoo.

M. J. Ehrhardt, L. Roberts, "Analyzing inexact hypergradients for bilevel learning", IMA J. Appl. Math. 89 (2024)
254-278. DOI 10.1093/imamat/hxad035
"""

from __future__ import annotations

import sys
from pathlib import Path

import autograd
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from zoo.problem import Problem, Vector, quietly

__all__ = ["bound"]


def bound(problem: Problem, y: Vector) -> float:
    """Bound on ‖ĝ − g*‖ at a y of a strongly convex problem, for an adjoint that is solved for exactly.

    With F, A, B at y, μ the least eigenvalue of A, and d = ‖F‖/μ, which bounds the distance to the solution,

        d (‖∇L‖ L_B / μ + ‖B‖ L_L / μ + ‖B‖ ‖∇L‖ L_A / μ² + L_θ) + d² L_B L_L / μ.

    The theorem asks for Lipschitz constants over all y; here they are those at y itself, of A and B by the spectral
    norms of their unfolded derivatives, and of ∇L by its Hessian: as small as they may be, and known to nobody who has
    not got third derivatives.

    Returns
    -------
    float
        Infinity where A is not positive definite.
    """
    A, B = problem.matrices(y)
    least = float(np.linalg.eigvalsh(A)[0])
    if not least > 0:
        return float("inf")
    slope, n = problem.outer_gradients(y, problem.t)[0], len(y)
    with quietly():
        dA, dB = (
            np.linalg.norm(autograd.jacobian(lambda z, k=k: _entries(problem, z, k))(y), 2) for k in range(2)
        )  # fmt: skip
        curvature = autograd.jacobian(lambda z: autograd.grad(lambda w, s: _outer(problem, w, s), 0)(z, problem.t))(y)
        mixed = autograd.jacobian(lambda z: autograd.grad(lambda w, s: _outer(problem, w, s), 1)(z, problem.t))(y)
    sizes = [float(np.linalg.norm(x, 2)) for x in (B, curvature, mixed.reshape(-1, n))]
    d, loss = float(np.linalg.norm(problem.residual(y, problem.t, *problem.args))) / least, float(np.linalg.norm(slope))
    first = loss * dB / least + sizes[0] * sizes[1] / least + sizes[0] * loss * dA / least**2 + sizes[2]
    return float(d * first + d**2 * dB * sizes[1] / least)


def _outer(problem: Problem, y: Vector, t: Vector) -> float:
    return problem.outer(y, problem.pack(t), *problem.args)


def _entries(problem: Problem, y: Vector, argument: int) -> Vector:
    """A or B at a point that autograd traces, as one vector."""
    at = [y, problem.t]

    def residual(x: Vector) -> Vector:
        return problem.residual(*(x if k == argument else at[k] for k in range(2)), *problem.args)

    return autograd.numpy.ravel(autograd.jacobian(residual)(at[argument]))
