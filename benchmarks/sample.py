"""A row of the sweep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import Spread

__all__ = ["ALLOWED", "Sample"]

ALLOWED = 1e-6
"""Relative error of a gradient whose solve converged (at the default tolerances, residuals of 1e-10)."""


@dataclass(frozen=True)
class Sample:
    """One way through one problem.

    Parameters
    ----------
    backend, device, library : str
        Where, and whose: ``"implicitdiff"`` or another's.
    problem, axis : str
        The family, and what ``size`` counts.
    size : int
    solver, used, status, reason : str
    seconds : Spread
        Of a call after the first.
    first : float
        Seconds of the first call.
    products, iterations : int
    residual, error : float
        Of the linear system; of the gradient, against the reference.
    memory : int or None
        Bytes held at once, beside the caller's arrays.
    floor : float or None
        Seconds of the work that cannot be avoided: the products, or the factorisation and solution by LAPACK.
    """

    backend: str
    device: str
    library: str
    problem: str
    axis: str
    size: int
    solver: str
    used: str
    status: str
    reason: str
    seconds: Spread
    first: float
    products: int
    iterations: int
    residual: float
    error: float
    memory: int | None = None
    floor: float | None = None

    @property
    def correct(self) -> bool:
        """Whether a solve that says it converged gave the right gradient."""
        return self.status != "CONVERGED" or self.error <= ALLOWED

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {**asdict(self), "seconds": self.seconds._asdict(), "correct": self.correct}
