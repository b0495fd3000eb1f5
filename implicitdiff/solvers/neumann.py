"""Truncated Neumann series: Neumann, one step of it, and the phantom gradient.

A⁻¹ = α Σ_j (I − αA)^j where the series converges, which it does where every eigenvalue μ of A has |1 − αμ| < 1. The sum
of K terms leaves the error (I − αA)^K A⁻¹ b and the residual (I − αA)^K b, which is b − A x of a Richardson iteration
from zero. One term, x = αb, is the one-step gradient (Jacobian-free backpropagation); with a damped step τ of the
fixed-point map it is the phantom gradient.

References
----------
J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020.
arXiv:1911.02590
S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin, "JFB: Jacobian-free backpropagation for implicit networks",
AAAI 2022. DOI 10.1609/aaai.v36i6.20619
J. Bolte, E. Pauwels, S. Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023. arXiv:2305.13768
Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang, Z. Lin, "On training implicit models", NeurIPS 2021. arXiv:2111.05177
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator
from implicitdiff.outcome import Status
from implicitdiff.solvers.approximation import Applied, ApproximateState, Approximation, dominant, number
from implicitdiff.tolerances import GROWTH

__all__ = ["Neumann", "OneStep", "Phantom", "step_for"]


def step_for(operator: Operator, step: Any) -> Any:
    """Return α: as given, or one over the eigenvalue of largest size."""
    if step not in (None, "auto"):
        return float(step)
    xp = operator.backend.xp
    largest = dominant(operator)
    usable = (largest != 0) & xp.isfinite(largest)
    return xp.where(usable, 1 / xp.where(usable, largest, xp.ones_like(largest)), xp.ones_like(largest))


class _Sum(NamedTuple):
    x: Array
    t: Array  # (I − αA)^j b: the residual of x, and the next term over α
    size: Array
    active: Array
    status: Array
    terms: Array
    turn: Any


def _series(state: ApproximateState, space: Any, r: Array, terms: int) -> Applied:
    """Sum up terms of the series with the step that was prepared; an item that grows beyond all measure is stopped."""
    op, zero = state.operator, space.scalar(0.0)
    alpha = number(space, op, state.prepared)
    size = space.norm(r)
    count = space.counter(1)
    first = _Sum(
        space.scale(alpha, space.copy(r)), space.copy(r), size, space.isfinite(size), space.counter(), count, 0
    )

    def step(s: _Sum) -> _Sum:
        a = space.where(s.active, alpha, zero)
        t = space.axpy(-a, op.matvec(s.t), s.t)
        x = space.axpy(a, t, s.x)
        norm = space.where(s.active, space.norm(t), s.size)
        grown = s.active & (norm > GROWTH.of(space.eps) * size)
        status = space.where(grown, int(Status.DIVERGED), s.status)
        done = space.where(s.active, s.terms + 1, s.terms)
        return _Sum(x, t, norm, s.active & ~grown & space.isfinite(norm), status, done, s.turn + 1)

    end = op.backend.while_loop(
        lambda s: space.any(s.active) & (s.turn < terms - 1), step, first, limit=terms - 1
    )  # fmt: skip
    return Applied(end.x, end.terms, end.turn, end.status, end.size)


@dataclass(frozen=True, eq=False, repr=False)
class Neumann(Approximation):
    """A truncated Neumann series: α Σ_{j<terms} (I − αA)^j b.

    Parameters
    ----------
    terms : int, default 20
        Terms of the series: as many products, that for the true residual among them.
    step : float or "auto", default "auto"
        α. By default one over the eigenvalue of A of largest size, with its sign, found by power iteration (up to 30
        products, once for each A). A step with which the series diverges is told.
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    The error of an eigenvector of a symmetric A to the eigenvalue μ is (1 − αμ)^terms: at a condition number κ some κ
    terms make one digit. As many products of `Truncated` make a digit with √κ of them.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Neumann, linear_solve
    >>> A = np.diag([1.0, 2.0])
    >>> x, report = linear_solve(A, np.ones(2), solver=Neumann(terms=4, step=0.5), return_report=True)
    >>> print(x, report.status.name, report.matvecs)
    [0.9375 0.5   ] APPROXIMATE 4
    """

    terms: int = 20
    step: Any = "auto"
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "neumann"
    cost: ClassVar[str] = "terms"

    def prepare(self, operator: Operator) -> Any:
        return step_for(operator, self.step)

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        return _series(state, space, r, self.terms)


@dataclass(frozen=True, eq=False, repr=False)
class OneStep(Approximation):
    """The one-step gradient, or Jacobian-free backpropagation: x = α b in place of A⁻¹ b.

    Parameters
    ----------
    step : float or "auto", default "auto"
        α. By default 1 where A = I − ∂T comes of a `FixedPoint`, which takes no product but that for the residual; else
        as for `Neumann`.
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    Exact where T is a step of Newton's method, and to ρ where T contracts by ρ. Elsewhere it is hardly more than a
    direction of descent.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import FixedPoint, implicit_jvp
    >>> square_root = FixedPoint(lambda y, t: (y + t / y) / 2)  # Newton's method
    >>> implicit_jvp(square_root, np.array([3.0]), np.array([9.0]), np.ones(1), solver="one_step").round(6)
    array([0.166667])
    """

    step: Any = "auto"
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "one_step"

    def prepare(self, operator: Operator) -> Any:
        return 1.0 if operator.offset and self.step in (None, "auto") else step_for(operator, self.step)

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        alpha = number(space, state.operator, state.prepared)
        return Applied(space.scale(alpha, space.copy(r)), space.counter(1))


@dataclass(frozen=True, eq=False, repr=False)
class Phantom(Approximation):
    """The phantom gradient: τ Σ_{j<steps} (I − τA)^j b, a few damped steps of the fixed-point map unrolled.

    Parameters
    ----------
    steps : int, default 5
        Terms: as many products, that for the true residual among them.
    tau : float, default 0.5
        τ, the part of each step that is taken. (``damping`` is another thing, here as everywhere.)
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b.

    Notes
    -----
    It is `Neumann` with a step that is not looked for, and meant for A = I − ∂T of a contraction T. Where A is larger
    than 2/τ it diverges, which is told.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Phantom, linear_solve
    >>> linear_solve(np.diag([1.0, 2.0]), np.ones(2), solver=Phantom(steps=2, tau=0.5))
    array([0.75, 0.5 ])
    """

    steps: int = 5
    tau: float = 0.5
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "phantom"
    cost: ClassVar[str] = "steps"

    def prepare(self, operator: Operator) -> Any:
        return float(self.tau)

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        return _series(state, space, r, self.steps)
