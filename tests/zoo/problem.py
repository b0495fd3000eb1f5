"""A problem of the zoo, and the truth about it: y*, dy*/dθ and the gradient, to rounding and without the library.

Everything is a function of arrays over the namespace of `space`, so that autograd derives it exactly. What is true of
y* comes from a residual of its own, with the multipliers among the unknowns where there are constraints: Newton's
method to rounding, then J = −A⁻¹B of dense matrices.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import array_api_compat
import autograd
import numpy as np

from implicitdiff import Condition
from implicitdiff.pytree import map_leaves

Vector = np.ndarray


def space(*values: Any) -> Any:
    """Namespace of arrays, of which autograd may be tracing some."""
    if any(type(x).__module__.startswith("autograd") for x in values):
        return autograd.numpy
    return array_api_compat.array_namespace(*values)


def tracking(y: Any, theta: Any, *args: Any) -> Any:
    """An outer loss with curvature that varies, and a term of θ itself."""
    xp = space(y, theta)
    return xp.sum((y - 0.3) ** 2) / 2 + xp.sum(xp.sin(2 * y)) / 2 + 0.05 * xp.sum(theta**2)


def flat(tree: Any) -> Vector:
    """One vector from a vector, or from a dict of vectors in the order of its keys."""
    parts = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else [tree]
    return np.concatenate([np.ravel(np.asarray(part, dtype=np.float64)) for part in parts])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without autograd's warning that a function does not see an argument: its derivative is zero."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Output seems independent", UserWarning)
        yield


def newton(residual: Callable[[Vector], Vector], x: Vector, steps: int = 60) -> Vector:
    """Solve residual(x) = 0 until the step is rounding: damped by ‖residual‖, polished by full steps."""
    jacobian = autograd.jacobian(residual)
    F = residual(x)
    for _ in range(steps):
        step = np.linalg.solve(jacobian(x), F)
        small = np.linalg.norm(step) <= 1e-14 * (1 + np.linalg.norm(x))
        length = 1.0
        while not small and length > 1e-4:
            trial = residual(x - length * step)
            if np.linalg.norm(trial) < np.linalg.norm(F) or np.linalg.norm(step) < 1e-9 * (1 + np.linalg.norm(x)):
                break
            length /= 2
        x = x - length * step
        F = residual(x)
        if small:
            return x
    if not np.linalg.norm(step) <= 1e-11 * (1 + np.linalg.norm(x)):
        raise RuntimeError(f"Newton's method ended with a step of {np.linalg.norm(step):.1e}")
    return x


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem with a known solution.

    Parameters
    ----------
    name : str
    condition : Condition
        What the library is given.
    theta, args : vector and data, as the library is given them
        theta may be a dict of vectors; `pack` makes it of its flat vector.
    residual : callable
        ``residual(x, t, *args) -> like x``, F in the unknowns x = y or x = (y, multipliers); t is theta, raveled.
    start : callable
        ``() -> x`` from where Newton's method finds the solution that is meant.
    n : int
        Number of entries of y.
    stops : callable
        ``stops(problem)`` yields ``(how, y)``: solutions that real solvers were stopped at.
    outer : callable
        ``L(y, theta, *args)``.
    admit : callable
        ``admit(y_star, d)``: y* perturbed along d, as a solver of this problem would leave it.
    extend : callable
        ``extend(y, t, *args) -> x``: y with its multipliers.
    """

    name: str
    condition: Condition
    theta: Any
    args: tuple[Any, ...]
    residual: Callable[..., Any]
    start: Callable[[], Vector]
    n: int
    stops: Callable[[Problem], Iterable[tuple[str, Vector]]]
    outer: Callable[..., Any] = tracking
    admit: Callable[[Vector, Vector], Vector] = np.add
    extend: Callable[..., Vector] = lambda y, t, *args: y
    pack: Callable[[Vector], Any] = lambda t: t

    @property
    def t(self) -> Vector:
        """θ, raveled."""
        return flat(self.theta)

    def loss(self, y: Any, theta: Any) -> Any:
        """L(y, θ), in the form of the library."""
        return self.outer(y, theta, *self.args)

    def solve(self, t: Vector, x: Vector | None = None) -> Vector:
        """x*(θ), to rounding."""
        return newton(lambda z: self.residual(z, t, *self.args), self.start() if x is None else x)

    @quietly()
    def matrices(self, x: Vector, t: Vector | None = None) -> tuple[Vector, Vector]:
        """A and B at a point."""
        here = self.t if t is None else t
        A = autograd.jacobian(lambda z: self.residual(z, here, *self.args))(x)
        return A, autograd.jacobian(lambda s: self.residual(x, s, *self.args))(here)

    @quietly()
    def outer_gradients(self, y: Vector, t: Vector) -> tuple[Vector, Vector]:
        """∂L/∂y and ∂L/∂θ."""
        both = autograd.grad(lambda z, s: self.outer(z, self.pack(s), *self.args), (0, 1))(y, t)
        return both[0], both[1]

    @cached_property
    def x(self) -> Vector:
        """y* and its multipliers."""
        return self.solve(self.t)

    @property
    def y(self) -> Vector:
        """y*, shape (n,)."""
        return self.x[: self.n]

    @cached_property
    def jacobian(self) -> Vector:
        """dy*/dθ, shape (n, m)."""
        A, B = self.matrices(self.x)
        return -np.linalg.solve(A, B)[: self.n]

    @cached_property
    def gradient(self) -> Vector:
        """dL/dθ, shape (m,)."""
        by_y, by_theta = self.outer_gradients(self.y, self.t)
        return by_theta + self.jacobian.T @ by_y

    @cached_property
    def tangent(self) -> Vector:
        """A direction of θ, the same in every run."""
        return np.random.default_rng(len(self.t)).normal(size=len(self.t))

    def truth(self, mode: str) -> Vector:
        """What ``implicit_grad``, ``implicit_jvp`` or ``implicit_jacobian`` should have returned, raveled."""
        return {
            "gradient": lambda: self.gradient,
            "jvp": lambda: self.jacobian @ self.tangent,
            "jacobian": lambda: self.jacobian.ravel(),
        }[mode]()

    def cast(self, dtype: str) -> tuple[Any, tuple[Any, ...]]:
        """θ and the data in a precision."""
        return map_leaves(lambda x: x.astype(dtype), (self.theta, self.args))

    def rounded(self, dtype: str) -> Problem:
        """The problem whose data are those that a precision can hold."""
        theta, args = map_leaves(lambda x: x.astype(dtype).astype(np.float64), (self.theta, self.args))
        return replace(self, theta=theta, args=args)

    def cast_theta(self, t: Vector, dtype: str) -> Any:
        """A vector like θ in the form of the library."""
        return map_leaves(lambda x: x.astype(dtype), self.pack(t))
