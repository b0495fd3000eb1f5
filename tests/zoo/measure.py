"""What an estimate of an error is worth: estimated error / true error, on solutions that are not exact.

``library`` is anything with ``implicit_grad``, ``implicit_jvp`` and ``implicit_jacobian`` that take ``error=True`` and
``return_report=True`` and whose ``report.error`` has the fields of the library's: the library itself, or `Dense`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from implicitdiff import ImplicitDiffError, ImplicitDiffWarning
from implicitdiff.pytree import map_leaves
from zoo.problem import Problem, Vector, flat

MODES = ("gradient", "jvp", "jacobian")


@dataclass(frozen=True)
class Measured:
    """One estimate held against the truth.

    Parameters
    ----------
    problem, how, mode : str
    off : float
        ‖ŷ − y*‖ / ‖y*‖.
    error, estimate, polished : float
        True error of the result, the estimated one, and the true error of result − correction, all over ‖truth‖.
    floor : float
        Below this, relative to ‖truth‖, an error is rounding and an estimate cannot be told from none.
    contraction : float
    trusted : bool
    products : int
        With A, for the certificate.
    refused : str
        The error raised in place of a result.
    """

    problem: str
    how: str
    mode: str
    off: float
    error: float = np.nan
    estimate: float = np.nan
    polished: float = np.nan
    floor: float = 0.0
    contraction: float = np.nan
    trusted: bool = False
    products: int = 0
    refused: str = ""

    @property
    def counts(self) -> bool:
        """Whether there is an error to be estimated."""
        return not self.refused and not max(self.error, self.estimate) <= self.floor

    @property
    def effectivity(self) -> float:
        """Estimated error / true error."""
        return max(self.estimate, self.floor) / max(self.error, self.floor)

    @property
    def missed(self) -> bool:
        """Whether the estimate is off by more than a factor of 3."""
        return self.counts and not 1 / 3 <= self.effectivity <= 3

    def __str__(self) -> str:
        if self.refused:
            return f"{self.problem}, {self.how}, {self.mode}: {self.refused}"
        return (
            f"{self.problem}, {self.how}, {self.mode}: y off {self.off:.1e}, error {self.error:.1e}, estimate "
            f"{self.estimate:.1e} ({self.effectivity:.2f}), contraction {self.contraction:.1e}"
            f"{'' if self.trusted else ', not trusted'}"
        )


def call(library: Any, problem: Problem, y: Vector, mode: str, dtype: str = "float64",
         array: Callable[[Vector], Any] = np.asarray, **options: Any) -> Any:  # fmt: skip
    """``(value, report)`` of a mode at y, on arrays of a framework; warnings of the library are expected there."""
    theta, args = map_leaves(array, problem.cast(dtype))
    y = array(y.astype(dtype))
    rest = {"args": args, "return_report": True, "on_failure": "ignore", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitDiffWarning)
        if mode == "gradient":
            loss = lambda y, t: problem.outer(y, t, *args)
            return library.implicit_grad(problem.condition, loss, y, theta, **rest)
        if mode == "jvp":
            tangent = map_leaves(array, problem.cast_theta(problem.tangent, dtype))
            return library.implicit_jvp(problem.condition, y, theta, tangent, **rest)
        return library.implicit_jacobian(problem.condition, y, theta, **rest)


def raveled(problem: Problem, value: Any, mode: str) -> Vector:
    """A result as the truth is raveled: a Jacobian by rows of y."""
    if mode != "jacobian":
        return flat(value)
    blocks = [value[key] for key in sorted(value)] if isinstance(value, dict) else [value]
    return np.concatenate([np.asarray(b, dtype=np.float64).reshape(problem.n, -1) for b in blocks], axis=1).ravel()


def measure(library: Any, problem: Problem, y: Vector, mode: str = "gradient", how: str = "",
            dtype: str = "float64", **options: Any) -> Measured:  # fmt: skip
    """Hold one estimate against the truth; a result that is refused is recorded as such."""
    truth, n = problem.truth(mode), np.linalg.norm
    blank = Measured(problem.name, how, mode, float(n(y - problem.y) / n(problem.y)))
    try:
        value, report = call(library, problem, y, mode, dtype, error=True, **options)
    except ImplicitDiffError as error:
        return replace(blank, refused=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    found, e = raveled(problem, value, mode), report.error
    corrected = np.inf if e.correction is None else n(found - raveled(problem, e.correction, mode) - truth)
    scale = n(truth) or 1.0
    parts = n(problem.outer_gradients(problem.y, problem.t)[1]) if mode == "gradient" else 0.0
    floor = 64 * float(np.finfo(dtype).eps) * (1 + parts / scale)
    return replace(
        blank, error=float(n(found - truth) / scale), estimate=float(e.absolute / scale),
        polished=float(corrected / scale), floor=floor, contraction=float(e.contraction), trusted=bool(e.trusted),
        products=int(e.products),
    )  # fmt: skip


def survey(library: Any, problem: Problem, solutions: Iterable[tuple[str, Vector]], modes: Sequence[str] = MODES,
           **options: Any) -> list[Measured]:  # fmt: skip
    """Measure some modes at some solutions."""
    return [measure(library, problem, y, mode, how, **options) for how, y in solutions for mode in modes]


def share(rows: Sequence[Measured], factor: float) -> float:
    """Part of the rows whose estimate is right within a factor, of those with an error to estimate."""
    ratios = [row.effectivity for row in rows if row.counts]
    return float(np.mean([1 / factor <= ratio <= factor for ratio in ratios])) if ratios else np.nan


class Dense:
    """The estimate in plain NumPy, to hold others against: exact dense solves with A frozen at ŷ.

    δ = A⁻¹F(ŷ), y⁺ = ŷ − δ, then one adjoint (or tangent) correction with the products at y⁺.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._points = cache(lambda y: self._matrices(np.frombuffer(y)))

    def _matrices(self, y: Vector) -> Any:
        p = self.problem
        x = p.extend(y, p.t, *p.args)
        A, B = p.matrices(x)
        F = p.residual(x, p.t, *p.args)
        delta = np.linalg.solve(A, F)
        after = p.residual(x - delta, p.t, *p.args)
        contraction = np.linalg.norm(after) / (np.linalg.norm(F) or 1.0)
        return A, B, *p.matrices(x - delta), y - delta[: p.n], contraction

    def _report(self, value: Vector, error: Vector, contraction: float) -> tuple[Vector, Any]:
        size = float(np.linalg.norm(error))
        estimate = SimpleNamespace(
            absolute=size, relative=size / np.linalg.norm(value), contraction=contraction, correction=error,
            trusted=contraction <= 0.25, products=0, parts={},
        )  # fmt: skip
        return value, SimpleNamespace(error=estimate)

    def implicit_grad(self, condition: Any, outer: Any, y: Vector, theta: Any, **options: Any) -> Any:
        A, B, A1, B1, y1, contraction = self._points(y.tobytes())
        p = self.problem
        padded = lambda v: np.append(v, np.zeros(len(A) - p.n))
        by_y, by_theta = p.outer_gradients(y, p.t)
        u = np.linalg.solve(A.T, padded(by_y))
        by_y1, by_theta1 = p.outer_gradients(y1, p.t)
        w = np.linalg.solve(A.T, padded(by_y1) - A1.T @ u)
        value = by_theta - B.T @ u
        return self._report(value, value - (by_theta1 - B1.T @ (u + w)), contraction)

    def implicit_jvp(self, condition: Any, y: Vector, theta: Any, tangent: Any, **options: Any) -> Any:
        return self._forward(y, self.problem.tangent)

    def implicit_jacobian(self, condition: Any, y: Vector, theta: Any, **options: Any) -> Any:
        return self._forward(y, np.eye(len(self.problem.t)))

    def _forward(self, y: Vector, tangents: Vector) -> Any:
        A, B, A1, B1, _, contraction = self._points(y.tobytes())
        w = -np.linalg.solve(A, B @ tangents)
        rest = np.linalg.solve(A, -B1 @ tangents - A1 @ w)
        n = self.problem.n
        return self._report(w[:n], -rest[:n], contraction)
