"""What a backend has to fulfil."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.api import implicit_grad
from implicitdiff.errors import BackendError, DTypeError
from implicitdiff.registry import get_backend
from implicitdiff.solvers import suitable
from implicitdiff.testing.common import Checks, close, require, run

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["check_backend"]


def check_backend(backend: Backend, *, rtol: float = 1e-6) -> None:
    """Check that a backend does what the core relies on, and that derivatives through it come out right.

    Parameters
    ----------
    backend : str or Backend
        A registered name or an instance. Its arrays have to be readable by ``numpy.asarray``.
    rtol : float
        How far numbers may be off, relative to the largest entry.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> from implicitdiff.testing import check_backend
    >>> check_backend("numpy")
    """
    engine = get_backend(backend)
    run(f"backend {engine.name}", _BackendChecks(engine, rtol).checks())


class _BackendChecks:
    """The methods of a backend one by one, and a problem from end to end."""

    def __init__(self, engine: Backend, rtol: float) -> None:
        self.engine, self.rtol, self.rng = engine, rtol, np.random.default_rng(0)

    def checks(self) -> Checks:
        names = ("leaves", "vector_function", "scalar_function", "loop", "lu", "cholesky", "batched", "space")
        found = {name.replace("_", " "): self._inside(getattr(self, name)) for name in names}
        return found | {f"gradient by {solver}": self.end_to_end(solver) for solver in suitable("positive definite")}

    def _inside(self, check: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with self.engine.computing():
                check()

        return run

    def array(self, values: Any) -> Any:
        return self.engine.xp.asarray(np.array(values, dtype=float))  # a copy: some operations overwrite

    def leaves(self) -> None:
        x = self.array([1.0, 2.0])
        require(self.engine.is_array(x), "is_array is False for an array of its own")
        require(not self.engine.is_array("x"), "is_array is True for a string")
        close(self.engine.as_leaf(x, "x"), [1.0, 2.0], 0.0, "as_leaf(x)")
        for wrong, error in ((3, DTypeError), (self.engine.xp.asarray([1, 2]), DTypeError), ("x", BackendError)):
            try:
                self.engine.as_leaf(wrong, "x")
            except error:
                continue
            raise AssertionError(f"as_leaf takes {wrong!r}; expected {error.__name__}")

    def vector_function(self) -> None:
        y, theta = self.array([0.5, -1.0, 2.0]), self.array([2.0, 0.3, 1.0])
        found = self.engine.differentiate(lambda y, t: y * y * t + y, y, theta)
        by_y, by_theta = 2 * np.asarray(y) * np.asarray(theta) + 1, np.asarray(y) ** 2
        close(found.value(), np.asarray(y) ** 2 * np.asarray(theta) + np.asarray(y), self.rtol, "value()")
        self._products(found, by_y, by_theta)

    def scalar_function(self) -> None:
        y, theta, xp = self.array([0.5, -1.0, 2.0]), self.array([2.0, 0.3, 1.0]), self.engine.xp

        def f(y: Any, t: Any) -> Any:
            return xp.sum(y * y * y * t)

        by_y, by_theta = 6 * np.asarray(y) * np.asarray(theta), 3 * np.asarray(y) ** 2
        self._products(self.engine.differentiate_gradient(f, y, theta), by_y, by_theta)
        g, h, _ = self.engine.gradients(f, y, theta)
        close(g, 3 * np.asarray(y) ** 2 * np.asarray(theta), self._rough(1e-8), "∂f/∂y")
        close(h, np.asarray(y) ** 3, self._rough(1e-8), "∂f/∂θ")

    def _rough(self, accuracy: float) -> float:
        return max(self.rtol, 10 * accuracy)

    def _products(self, found: Any, by_y: Any, by_theta: Any) -> None:
        """Hold the products of a diagonal function against its derivatives, for one vector and for several."""
        require(found.kind in {"autodiff", "complex step", "finite differences"}, f"kind = {found.kind!r}")
        rtol = self._rough(found.accuracy)
        for v in (self.rng.normal(size=3), self.rng.normal(size=(2, 3))):
            for name, diagonal in (("jvp_y", by_y), ("vjp_y", by_y), ("jvp_theta", by_theta), ("vjp_theta", by_theta)):
                close(getattr(found, name)(self.array(v)), v * diagonal, rtol, f"{name} of shape {v.shape}")

    def loop(self) -> None:
        xp = self.engine.xp
        start = (xp.asarray(0), self.array(1.0))
        for limit in (None, 20):
            _, x = self.engine.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] * 2.0), start, limit)
            # with a limit, bodies may run after the condition has become false
            require(float(x) == 32.0 or (limit is not None and float(x) > 32.0), f"2**5 by a loop is {float(x)}")

    def _factored(self, factor: Callable[[Any], Any], solve: Callable[[Any, Any], Any], what: str) -> None:
        M = self.rng.normal(size=(2, 4, 4))
        A, b = M @ np.swapaxes(M, -1, -2) + np.eye(4), self.rng.normal(size=(2, 4, 3))
        for matrix, right in ((A[0], b[0]), (A, b)):
            found = solve(factor(self.array(matrix)), self.array(right))
            close(found, np.linalg.solve(matrix, right), self.rtol, f"{what} of shape {matrix.shape}")

    def lu(self) -> None:
        e = self.engine
        self._factored(e.lu_factor, lambda f, b: e.lu_solve(f, b, False), "lu_solve")
        A, b = self.rng.normal(size=(4, 4)) + 4 * np.eye(4), self.rng.normal(size=(4, 2))
        found = e.lu_solve(e.lu_factor(self.array(A)), self.array(b), True)
        close(found, np.linalg.solve(A.T, b), self.rtol, "lu_solve, transposed,")

    def cholesky(self) -> None:
        e = self.engine
        self._factored(e.cho_factor, e.cho_solve, "cho_solve")
        factor = np.asarray(e.cho_factor(self.array(np.stack([np.eye(2), -np.eye(2)]))))
        require(np.all(np.isfinite(factor[0])), "cho_factor: a definite item is spoilt by another")
        require(np.any(np.isnan(factor[1])), "cho_factor: NaN is expected where a matrix is not positive definite")

    def batched(self) -> None:
        A = self.rng.normal(size=(3, 3))
        many = self.engine.batched(lambda v: self.array(A) @ v, ())
        v = self.rng.normal(size=(4, 3))
        close(many(self.array(v)), v @ A.T, self.rtol, "a batched product")
        close(many(self.array(v[0])), A @ v[0], self.rtol, "a product with one vector")

    def space(self) -> None:
        x, y = self.rng.normal(size=(2, 3))
        space = self.engine.space(self.array(x))
        close(space.inner(self.array(x), self.array(y)), x @ y, self.rtol, "inner")
        close(space.axpy(space.scalar(2.0), self.array(x), self.array(y)), 2 * x + y, self.rtol, "axpy")

    def end_to_end(self, solver: str) -> Callable[[], None]:
        xp = self.engine.xp

        def inner(y: Any, t: Any) -> Any:
            return xp.sum((y - t * t) ** 2) + 0.5 * xp.sum(y - t * t) ** 2

        def check() -> None:
            theta = self.array([1.0, 2.0, -0.5])
            found = implicit_grad(inner, lambda y, t: xp.sum(y * y) + xp.sum(t), theta * theta, theta,
                                  backend=self.engine, solver=solver)  # fmt: skip
            close(found, 4 * np.asarray(theta) ** 3 + 1, max(self.rtol, 1e-4), "the gradient")

        return check
