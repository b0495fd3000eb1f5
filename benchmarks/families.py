"""Problems that grow: each family makes a problem of a given size, from a seed, with a gradient to hold ours against.

The functions are written over the array namespace, so that one definition runs on every backend. Backends with
autodiff get the objective (or F, or T) alone; the others get the products too. The reference gradients come from
NumPy and SciPy: closed forms, factorisations, or a tight solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np

from benchmarks.problems import Logistic
from implicitdiff import QP, Condition, Stationary

__all__ = ["FAMILIES", "Family", "Instance", "family"]

DENSE = ("auto", "lu", "ldlt", "cholesky")
ITERATIVE = ("auto", "cg", "minres", "gmres")


@dataclass
class Instance:
    """One problem, in NumPy.

    Parameters
    ----------
    size : int
        What is put on the axis: unknowns, or items of a batch.
    y, theta, cotangent : array or dict of arrays
    args : tuple of array
        Data of the functions.
    truth : array or dict of arrays
        −Bᵀ A⁻ᵀ v.
    condition : callable
        ``condition(autodiff) -> Condition``: with the products that no autodiff makes, or without.
    product : callable or None
        ``product(y, theta, v, *args)``: one product with A, the unit of cost of the iterative methods.
    batched : bool
    solvers : tuple of str
        Those that are meant for it.
    """

    size: int
    y: Any
    theta: Any
    cotangent: Any
    args: tuple[Any, ...]
    truth: Any
    condition: Callable[[bool], Condition]
    product: Callable[..., Any] | None = None
    batched: bool = False
    solvers: tuple[str, ...] = field(default=ITERATIVE)
    most_dense: int = 2500
    """Largest size at which the direct methods are run."""
    matrix: Any = None
    """A, shape (*items, N, N), for the time of LAPACK alone."""


@dataclass(frozen=True)
class Family:
    """A problem that grows.

    Parameters
    ----------
    name : str
    make : callable
        ``make(size, rng) -> Instance``.
    sizes : tuple of int
        Sizes of a full run on a CPU.
    axis : str
        What a size counts.
    about : str
        One line.
    large : tuple of int
        Sizes beyond, on an accelerator.
    """

    name: str
    make: Callable[[int, np.random.Generator], Instance]
    sizes: tuple[int, ...]
    axis: str
    about: str
    large: tuple[int, ...] = ()


FAMILIES: dict[str, Family] = {}


def family(name: str, sizes: tuple[int, ...], axis: str, about: str, large: tuple[int, ...] = ()) -> Any:
    """Put a maker in the table."""

    def add(make: Callable[[int, np.random.Generator], Instance]) -> Any:
        FAMILIES[name] = Family(name, make, sizes, axis, about, large)
        return make

    return add


def space(x: Any) -> Any:
    """Array namespace of a value."""
    return array_api_compat.array_namespace(x)


@family("logistic", (500, 5_000, 50_000), "n", "multinomial logistic regression, one penalty per feature",
        (500_000, 5_000_000, 50_000_000))  # fmt: skip
def logistic(n: int, rng: np.random.Generator) -> Instance:
    """Make the problem of `problems.Logistic`, matrix-free."""
    samples = 700 if n <= 5000 else max(20, min(200, 10_000_000 // n * 10))
    p = Logistic(max(n // 5, 1), samples, int(rng.integers(2**31)))

    def objective(W: Any, theta: Any, X: Any, Y: Any, P: Any) -> Any:
        xp = space(W)
        scores = X @ W
        top = xp.max(scores, axis=1, keepdims=True)
        entropy = xp.log(xp.sum(xp.exp(scores - top), axis=1)) + top[:, 0] - xp.sum(scores * Y, axis=1)
        return xp.sum(entropy) + 0.5 * xp.sum(xp.exp(theta) * xp.sum(W * W, axis=1))

    def gradient(W: Any, theta: Any, X: Any, Y: Any, P: Any) -> Any:
        xp = space(W)
        scores = X @ W
        e = xp.exp(scores - xp.max(scores, axis=1, keepdims=True))
        return X.T @ (e / xp.sum(e, axis=1, keepdims=True) - Y) + xp.exp(theta)[:, None] * W

    def hvp(W: Any, theta: Any, V: Any, X: Any, Y: Any, P: Any) -> Any:
        xp = space(W)
        Z = P * (X @ V)
        return X.T @ (Z - P * xp.sum(Z, axis=1, keepdims=True)) + xp.exp(theta)[:, None] * V

    def mixed_vjp(W: Any, theta: Any, U: Any, X: Any, Y: Any, P: Any) -> Any:
        xp = space(W)
        return xp.exp(theta) * xp.sum(W * U, axis=1)

    given = {"grad": gradient, "hvp": hvp, "mixed_vjp": mixed_vjp}
    return Instance(
        p.n, p.W, p.theta, p.cotangent, p.args, p.truth,
        lambda autodiff: Stationary(objective) if autodiff else Stationary(**given), hvp,
        solvers=("cg", "minres", "auto"),
    )  # fmt: skip


@family("ridge", (100, 500, 2000), "n", "ridge regression, one penalty per feature, dense")
def ridge(n: int, rng: np.random.Generator) -> Instance:
    """½ yᵀ H y + ½ Σ θ_j y_j² − bᵀ y."""
    X, target = rng.normal(size=(2 * n, n)), rng.normal(size=2 * n)
    H, b, theta = X.T @ X / n, X.T @ target / n, rng.uniform(0.5, 5.0, size=n)
    A = H + np.diag(theta)
    y, v = np.linalg.solve(A, b), rng.normal(size=n)

    def objective(y: Any, theta: Any, H: Any, b: Any) -> Any:
        xp = space(y)
        return 0.5 * (y @ (H @ y)) + 0.5 * xp.sum(theta * y * y) - b @ y

    def product(y: Any, theta: Any, v: Any, H: Any, b: Any) -> Any:
        return H @ v + theta * v

    given = {
        "grad": lambda y, theta, H, b: H @ y + theta * y - b,
        "hessian": lambda y, theta, H, b: H + theta * space(y).eye(n, dtype=y.dtype),
        "mixed_vjp": lambda y, theta, u, H, b: y * u,
    }
    return Instance(
        n, y, theta, v, (H, b), -y * np.linalg.solve(A, v),
        lambda autodiff: Stationary(objective) if autodiff else Stationary(**given), product,
        solvers=(*DENSE, "cg", "minres", "gmres"), matrix=A,
    )  # fmt: skip


def batch_of(n: int) -> Callable[[int, np.random.Generator], Instance]:
    """Return a maker of batches of problems of order n; the size is the number of items."""

    def make(items: int, rng: np.random.Generator) -> Instance:
        X, target = rng.normal(size=(2 * n, n)), rng.normal(size=2 * n)
        H, c = X.T @ X / (2 * n), X.T @ target / (2 * n)
        theta, v = rng.uniform(np.log(0.1), np.log(10.0), size=(items, n)), rng.normal(size=(items, n))
        A = H + np.exp(theta)[:, :, None] * np.eye(n)
        y = np.linalg.solve(A, np.broadcast_to(c, (items, n))[..., None])[..., 0]
        truth = -np.exp(theta) * y * np.linalg.solve(A, v[..., None])[..., 0]

        def objective(y: Any, theta: Any, H: Any, c: Any) -> Any:
            xp = space(y)
            return 0.5 * (y @ (H @ y)) + 0.5 * xp.sum(xp.exp(theta) * y * y) - c @ y

        given = {
            "grad": lambda y, theta, H, c: y @ H + space(y).exp(theta) * y - c,
            "hessian": lambda y, theta, H, c: H + space(y).exp(theta)[..., None] * space(y).eye(n, dtype=y.dtype),
            "mixed_vjp": lambda y, theta, u, H, c: space(y).exp(theta) * y * u,
        }
        return Instance(
            items, y, theta, v, (H, c), truth,
            lambda autodiff: Stationary(objective) if autodiff else Stationary(**given), None, True,
            ("auto", "lu", "cholesky", "cg"), 10**9, A,
        )  # fmt: skip

    return make


for order, counts in ((4, (1, 64, 4096, 65_536)), (16, (1, 64, 1024, 16_384)), (64, (1, 64, 1024))):
    family(f"batch{order}", counts, "items", f"independent problems of order {order}")(batch_of(order))


@family("qp", (1, 16, 128, 1024), "items", "equality-constrained quadratic programs, n = 50, p = 10")
def qp(items: int, rng: np.random.Generator) -> Instance:
    """min ½ yᵀ Q y + qᵀ y subject to A y = b, differentiated by all of Q, q, A, b."""
    n, p = 50, 10
    L = rng.normal(size=(items, n, n))
    Q, A = L @ np.matrix_transpose(L) / n + np.eye(n), rng.normal(size=(items, p, n))
    y, lam, v = rng.normal(size=(items, n)), rng.normal(size=(items, p)), rng.normal(size=(items, n))
    theta = {
        "Q": Q, "q": -(Q @ y[..., None] + np.matrix_transpose(A) @ lam[..., None])[..., 0], "A": A,
        "b": (A @ y[..., None])[..., 0],
    }  # fmt: skip
    K = np.concatenate([np.concatenate([Q, np.matrix_transpose(A)], axis=-1),
                        np.concatenate([A, np.zeros((items, p, p))], axis=-1)], axis=-2)  # fmt: skip
    u = -np.linalg.solve(K, np.concatenate([v, np.zeros((items, p))], axis=-1)[..., None])[..., 0]
    a, w = u[:, :n], u[:, n:]
    truth = {
        "Q": (a[:, :, None] * y[:, None, :] + y[:, :, None] * a[:, None, :]) / 2, "q": a,
        "A": lam[:, :, None] * a[:, None, :] + w[:, :, None] * y[:, None, :], "b": -w,
    }  # fmt: skip
    return Instance(
        items, y, theta, v, (), truth, lambda autodiff: QP(), None, True,
        ("auto", "lu", "ldlt", "minres"), 10**9, K,
    )  # fmt: skip
