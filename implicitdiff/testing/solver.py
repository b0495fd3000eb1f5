"""What a linear solver has to fulfil."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.linalg.system import linear_solve
from implicitdiff.outcome import Status
from implicitdiff.registry import get_backend
from implicitdiff.solvers import get_solver
from implicitdiff.testing.common import Checks, close, require, run

__all__ = ["check_solver"]


def check_solver(solver: Any, *, n: int = 12, seed: int = 0, rtol: float = 1e-6) -> None:
    """Check that a solver does what the library relies on.

    It has to solve systems of the ``structure`` that it declares, transposed, with many right-hand sides and in
    batches; in any unit of b; to say of a singular A, of products that hold NaN and of an A of another structure that
    it did not succeed (one of ``least_squares`` has to find the solution of least squares and least norm, and to say
    so); and to be a value: equal to a copy of it, and hashable. An ``approximate`` one has to end as
    `Status.APPROXIMATE`, and is not held to the right solution.

    Parameters
    ----------
    solver : Solver or str
        An instance or a registered name.
    n : int
        Order of the systems.
    seed : int
        Of their random entries.
    rtol : float
        How far a solution may be off, relative to its largest entry.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> from implicitdiff import CG
    >>> from implicitdiff.testing import check_solver
    >>> check_solver(CG())
    """
    run(f"solver {solver!r}", _SolverChecks(get_solver(solver), n, seed, rtol).checks())


class _SolverChecks:
    """Systems with NumPy arrays, and what has to hold of them."""

    def __init__(self, solver: Any, n: int, seed: int, rtol: float) -> None:
        self.solver, self.n, self.rtol = solver, n, rtol
        self.structure = getattr(solver, "structure", "general")
        self.approximate = getattr(solver, "approximate", False)
        self.rng = np.random.default_rng(seed)
        self.A, self.b = self.matrix(), self.rng.normal(size=n)

    def checks(self) -> Checks:
        names = ("solution", "operator", "transpose", "right_hand_sides", "batch", "zero", "scale", "damping", "value")
        found = {name.replace("_", " "): getattr(self, name) for name in names}
        if not self.approximate:
            wrong = ("singular", "non_finite", *(("other_structure",) if self.structure != "general" else ()))
            found |= {name.replace("_", " "): getattr(self, name) for name in wrong}
        return found

    def matrix(self) -> Any:
        """Return a matrix of the declared structure; of an approximation, one close to the identity."""
        Q, _ = np.linalg.qr(self.rng.normal(size=(self.n, self.n)))
        values = np.linspace(1.0, 2.0 if self.approximate else 10.0, self.n)
        if self.structure == "symmetric" and not self.approximate:
            values[::3] *= -1.0
        A = (Q * values) @ Q.T
        if self.structure == "general":
            A = A + 0.2 * self.rng.normal(size=A.shape) / np.sqrt(self.n)
        return A / 2.0 if self.approximate else A

    def solve(self, A: Any, b: Any, **options: Any) -> tuple[Any, Any]:
        symmetric = self.structure != "general"
        definite = True if self.structure == "positive definite" else None
        options = {"symmetric": symmetric, "positive_definite": definite, **options}
        return linear_solve(A, b, solver=self.solver, on_failure="ignore", return_report=True, **options)

    def right(self, A: Any, b: Any, expected: Any, **options: Any) -> Any:
        """Solve, and hold the solution and what is said of it against the truth; return the solution."""
        x, report = self.solve(A, b, **options)
        status = Status.APPROXIMATE if self.approximate else Status.CONVERGED
        require(np.all(np.asarray(report.status) == status), f"status is {report.status}; expected {status.name}")
        require(np.all(np.isfinite(x)), "x holds NaN or Inf")
        if not self.approximate:
            close(x, expected, self.rtol, "x")
        return x

    def solution(self) -> None:
        self.right(self.A, self.b, np.linalg.solve(self.A, self.b))

    def operator(self) -> None:
        A = self.A
        self.right(lambda v: A @ v, self.b, np.linalg.solve(A, self.b), transpose=lambda u: A.T @ u)

    def transpose(self) -> None:
        op = matrix_map(Operator, get_backend("numpy"), self.A, (), self.A.dtype, "cpu",
                        symmetric=self.structure != "general")  # fmt: skip
        state = self.solver.transpose(self.solver.init(op))
        x, status, _ = self.solver.solve(state, self.b, None)
        require(np.all(np.asarray(status) <= int(Status.APPROXIMATE)), f"status of Aᵀ x = b is {status}")
        if not self.approximate:
            close(x, np.linalg.solve(self.A.T, self.b), self.rtol, "the solution of Aᵀ x = b")

    def right_hand_sides(self) -> None:
        b = self.rng.normal(size=(self.n, 3))
        found = self.right(self.A, b, np.linalg.solve(self.A, b))
        for i in range(3):
            close(found[:, i], self.solve(self.A, b[:, i])[0], self.rtol, f"column {i} among others")

    def batch(self) -> None:
        A, b = np.stack([self.A, 3.0 * self.A if not self.approximate else self.A]), self.rng.normal(size=(2, self.n))
        self.right(A, b, np.linalg.solve(A, b[..., None])[..., 0], batched=True)

    def zero(self) -> None:
        x, report = self.solve(self.A, np.zeros(self.n))
        require(not np.any(x), "the solution for b = 0 is not 0")
        require(Status(int(report.status)).ok, f"status for b = 0 is {report.status}")

    def scale(self) -> None:
        x, _ = self.solve(self.A, self.b)
        for c in (1e-30, 1e30):
            close(self.solve(self.A, c * self.b)[0] / c, x, self.rtol, f"the solution for {c:g} b, over {c:g},")

    def damping(self) -> None:
        if "damping" not in getattr(self.solver, "__dataclass_fields__", {}):
            return
        damped = _SolverChecks(replace(self.solver, damping=0.5), self.n, 1, self.rtol)
        damped.A, damped.b = self.A, self.b
        shifted = self.A + 0.5 * np.eye(self.n)
        if np.linalg.cond(shifted) < 1e3:
            damped.right(self.A, self.b, np.linalg.solve(shifted, self.b))

    def value(self) -> None:
        same = copy.deepcopy(self.solver)
        require(same == self.solver and hash(same) == hash(self.solver), "a copy is not equal, or has another hash")

    # -- what must not pass ------------------------------------------------------------------------------
    def _refuses(self, A: Any, what: str, **options: Any) -> None:
        _, report = self.solve(A, self.b, **options)
        require(not Status(int(report.status)).ok, f"{what} is called {Status(int(report.status)).name}")

    def singular(self) -> None:
        values, Q = np.linspace(1.0, 10.0, self.n), np.linalg.qr(self.rng.normal(size=(self.n, self.n)))[0]
        values[0] = 0.0
        A = (Q * values) @ Q.T
        if not getattr(self.solver, "least_squares", False):
            self._refuses(A, "a singular A")
            return
        x, report = self.solve(A, self.b)
        status = Status(int(report.status))
        require(status is Status.LEAST_SQUARES, f"a singular A is called {status.name}; expected LEAST_SQUARES")
        close(
            x, np.linalg.pinv(A, rcond=1e-10, hermitian=True) @ self.b, self.rtol, "x of least squares, and least norm,"
        )

    def non_finite(self) -> None:
        self._refuses(lambda v: np.full_like(v, np.nan), "a product that is NaN", transpose=lambda u: u * np.nan)

    def other_structure(self) -> None:
        A = self.A + np.triu(self.rng.normal(size=self.A.shape), 1)
        self._refuses(lambda v: A @ v, "an A that is not symmetric, and was said to be,")
        if self.structure == "positive definite":
            self._refuses(-self.A, "a negative definite A")
