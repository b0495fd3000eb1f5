"""Problems whose solution and whose dy/dθ are known in closed form, written against an array namespace.

Every factory takes ``(xp, dtype, items=())`` and returns a `Problem`: arrays of that namespace, functions that call
nothing else, and the truth as NumPy arrays in double precision. With ``items=(k,)`` the same functions serve k
independent problems along a leading axis. A is never a multiple of the identity, it is asymmetric for `Root` and
`FixedPoint`, and B is never square: a lost transpose, sign or factor changes the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from implicitdiff import (
    CG,
    GMRES,
    LDLT,
    LSMR,
    LU,
    MINRES,
    MINRESQLP,
    Auto,
    BiCGSTAB,
    Cholesky,
    FixedPoint,
    Pinv,
    Root,
    Stationary,
    implicit_jvp,
    implicit_vjp,
)

Functions = dict[str, Callable[..., Any]]
POINTS = {"positive definite": "minimum", "negative definite": "maximum", "indefinite": "saddle"}


@dataclass(frozen=True)
class Truth:
    """What the derivatives are, in double precision."""

    jacobian: np.ndarray
    vjp: np.ndarray
    jvp: np.ndarray
    gradient: np.ndarray


@dataclass(frozen=True)
class Problem:
    """A condition with its solution, a loss, directions and the truth.

    ``functions`` are named as the arguments of the condition; ``solution`` maps theta to y.
    """

    kind: type
    structure: str
    functions: Functions
    solution: Callable[[Any], Any]
    y: Any
    theta: Any
    outer: Callable[[Any, Any], Any]
    cotangent: Any
    tangent: Any
    truth: Truth

    def condition(self, *names: str, **replaced: Callable[..., Any]) -> Any:
        """Build the condition from the functions of these names, some of them replaced."""
        stated = {"kind": POINTS[self.structure]} if self.kind is Stationary else {}
        return self.kind(**{**{name: self.functions[name] for name in names}, **stated, **replaced})


def matvec(matrix: Any, v: Any) -> Any:
    """Product of a matrix (rows, columns) with vectors (*items, columns)."""
    return (matrix @ v[..., None])[..., 0]


def columns(matrix: Any, v: Any) -> Any:
    """Scale the columns of a matrix by vectors (*items, columns)."""
    return matrix * v[..., None, :]


def rows(matrix: Any, v: Any) -> Any:
    """Scale the rows of a matrix by vectors (*items, rows)."""
    return v[..., :, None] * matrix


class Numbers:
    """The numbers of a problem: NumPy in double precision for the truth, the library's own for the functions."""

    def __init__(self, xp: Any, dtype: Any, items: tuple[int, ...], n: int, m: int, seed: int) -> None:
        self.xp, self.dtype, self.items, self.n, self.m = xp, dtype, items, n, m
        self.rng = np.random.default_rng(seed)
        self.theta = self.rng.uniform(0.3, 0.9, (*items, m))
        self.cotangent = self.rng.normal(size=(*items, n))
        self.tangent = self.rng.normal(size=(*items, m))
        self.weights = self.rng.uniform(0.5, 2.0, n)
        self.powers = self.rng.uniform(0.5, 2.0, m)
        self.mixing = self.rng.uniform(-0.8, 0.8, (n, m))

    def array(self, values: Any) -> Any:
        """Array of the library."""
        return self.xp.asarray(np.asarray(values), dtype=self.dtype)

    def asymmetric(self, shift: float) -> np.ndarray:
        """Return a matrix with a condition number of order ten, far from symmetric."""
        return shift * np.eye(self.n) + self.rng.normal(size=(self.n, self.n)) / np.sqrt(self.n)

    def symmetric(self, signs: Any) -> np.ndarray:
        """Return a symmetric matrix with eigenvalues between 1 and 3, times these signs."""
        q = np.linalg.qr(self.rng.normal(size=(self.n, self.n)))[0]
        return q @ np.diag(np.linspace(1.0, 3.0, self.n) * signs) @ q.T

    def outer(self) -> Callable[[Any, Any], Any]:
        """L(y, θ) = Σ w y² / 2 + Σ p θ³ / 3: it depends on θ directly, too."""
        xp, w, p = self.xp, self.array(self.weights), self.array(self.powers)
        return lambda y, theta: xp.sum(w * y**2, axis=-1) / 2 + xp.sum(p * theta**3, axis=-1) / 3

    def problem(
        self, kind: type, structure: str, functions: Functions, solution: Callable[[Any], Any], y: np.ndarray,
        jacobian: np.ndarray,
    ) -> Problem:  # fmt: skip
        """Put everything together; y and the Jacobian are the truth."""
        transposed = np.swapaxes(jacobian, -1, -2)
        truth = Truth(
            jacobian=jacobian,
            vjp=matvec(transposed, self.cotangent),
            jvp=matvec(jacobian, self.tangent),
            gradient=self.powers * self.theta**2 + matvec(transposed, self.weights * y),
        )
        a = self.array
        return Problem(
            kind, structure, functions, solution, a(y), a(self.theta), self.outer(), a(self.cotangent),
            a(self.tangent), truth,
        )  # fmt: skip


def exponential_root(xp: Any, dtype: Any, items: tuple[int, ...] = (), n: int = 5, m: int = 3) -> Problem:
    """F = P (log y − K θ): y = exp(K θ), dy/dθ = diag(y) K, whatever the asymmetric P."""
    num = Numbers(xp, dtype, items, n, m, seed=1)
    P, K = num.asymmetric(2.0), num.mixing
    y = np.exp(matvec(K, num.theta))
    p, pt, k, pk, pkt = (num.array(c) for c in (P, P.T, K, P @ K, (P @ K).T))
    functions: Functions = {
        "fun": lambda y, theta: matvec(p, xp.log(y) - matvec(k, theta)),
        "jvp": lambda y, theta, v: matvec(p, v / y),
        "vjp": lambda y, theta, u: matvec(pt, u) / y,
        "jacobian": lambda y, theta: columns(p, 1 / y),
        "mixed_jvp": lambda y, theta, t: -matvec(pk, t),
        "mixed_vjp": lambda y, theta, u: -matvec(pkt, u),
    }
    return num.problem(Root, "general", functions, lambda theta: xp.exp(matvec(k, theta)), y, rows(K, y))


def wide_root(xp: Any, dtype: Any, items: tuple[int, ...] = ()) -> Problem:
    """Return `exponential_root` with more parameters than unknowns: the Jacobian is made in reverse."""
    return exponential_root(xp, dtype, items, n=4, m=7)


def geometric_fixed_point(xp: Any, dtype: Any, items: tuple[int, ...] = ()) -> Problem:
    """T = exp(W log y + K θ): y = exp((I − W)⁻¹ K θ), although T is expansive."""
    num = Numbers(xp, dtype, items, 5, 3, seed=2)
    W, K = num.asymmetric(-1.0), num.mixing
    solved = np.linalg.solve(np.eye(5) - W, K)
    y = np.exp(matvec(solved, num.theta))
    w, wt, k, kt, s = (num.array(c) for c in (W, W.T, K, K.T, solved))

    def fun(y: Any, theta: Any) -> Any:
        return xp.exp(matvec(w, xp.log(y)) + matvec(k, theta))

    functions: Functions = {
        "fun": fun,
        "jvp": lambda y, theta, v: fun(y, theta) * matvec(w, v / y),
        "vjp": lambda y, theta, u: matvec(wt, fun(y, theta) * u) / y,
        "jacobian": lambda y, theta: rows(columns(w, 1 / y), fun(y, theta)),
        "mixed_jvp": lambda y, theta, t: fun(y, theta) * matvec(k, t),
        "mixed_vjp": lambda y, theta, u: matvec(kt, fun(y, theta) * u),
    }
    return num.problem(FixedPoint, "general", functions, lambda t: xp.exp(matvec(s, t)), y, rows(solved, y))


def log_quadratic(xp: Any, dtype: Any, items: tuple[int, ...], structure: str, signs: Any, m: int) -> Problem:
    """f = rᵀ S r / 2 with r = log y − K θ: y = exp(K θ), dy/dθ = diag(y) K, whatever the symmetric S."""
    num = Numbers(xp, dtype, items, 5, m, seed=3)
    S, K = num.symmetric(signs), num.mixing
    y = np.exp(matvec(K, num.theta))
    s, k, sk, skt, eye = (num.array(c) for c in (S, K, S @ K, (S @ K).T, np.eye(5)))

    def slope(y: Any, theta: Any) -> Any:
        return matvec(s, xp.log(y) - matvec(k, theta))

    functions: Functions = {
        "fun": lambda y, theta: xp.sum((xp.log(y) - matvec(k, theta)) * slope(y, theta), axis=-1) / 2,
        "grad": lambda y, theta: slope(y, theta) / y,
        "hvp": lambda y, theta, v: matvec(s, v / y) / y - slope(y, theta) / y**2 * v,
        "hessian": lambda y, theta: rows(columns(s, 1 / y), 1 / y) - columns(eye, slope(y, theta) / y**2),
        "mixed_jvp": lambda y, theta, t: -matvec(sk, t) / y,
        "mixed_vjp": lambda y, theta, u: -matvec(skt, u / y),
    }
    return num.problem(Stationary, structure, functions, lambda theta: xp.exp(matvec(k, theta)), y, rows(K, y))


def saddle(xp: Any, dtype: Any, items: tuple[int, ...] = ()) -> Problem:
    """Return `log_quadratic` with an indefinite S, and more parameters than unknowns."""
    return log_quadratic(xp, dtype, items, "indefinite", [1, -1, 1, -1, 1], m=7)


def minimum(xp: Any, dtype: Any, items: tuple[int, ...] = ()) -> Problem:
    """Return `log_quadratic` with a positive definite S."""
    return log_quadratic(xp, dtype, items, "positive definite", [1, 1, 1, 1, 1], m=3)


def ridge(xp: Any, dtype: Any, items: tuple[int, ...] = (), sign: float = 1.0) -> Problem:
    """f = ± (yᵀ H y / 2 − cᵀ y), H = S + diag(E θ): y = H⁻¹ c, dy/dθ = −H⁻¹ diag(y) E."""
    num = Numbers(xp, dtype, items, 5, 3, seed=4)
    S, E, c = num.symmetric(1.0), num.rng.uniform(0.2, 2.0, (5, 3)), num.rng.normal(size=5)
    H = S + columns(np.eye(5), matvec(E, num.theta))
    y = np.linalg.solve(H, np.broadcast_to(c, (*items, 5))[..., None])[..., 0]
    s, e, et, c, eye = (num.array(x) for x in (S, E, E.T, c, np.eye(5)))

    def hessian(y: Any, theta: Any) -> Any:
        return sign * (s + columns(eye, matvec(e, theta)))

    def quadratic(y: Any, theta: Any) -> Any:
        return xp.sum(y * (matvec(s, y) + matvec(e, theta) * y), axis=-1) / 2 - xp.sum(c * y, axis=-1)

    functions: Functions = {
        "fun": lambda y, theta: sign * quadratic(y, theta),
        "grad": lambda y, theta: sign * (matvec(s, y) + matvec(e, theta) * y - c),
        "hvp": lambda y, theta, v: sign * (matvec(s, v) + matvec(e, theta) * v),
        "hessian": hessian,
        "mixed_jvp": lambda y, theta, t: sign * matvec(e, t) * y,
        "mixed_vjp": lambda y, theta, u: sign * matvec(et, u * y),
    }

    def solution(theta: Any) -> Any:
        right = xp.broadcast_to(sign * c, (*theta.shape[:-1], 5))
        return xp.linalg.solve(hessian(None, theta), right[..., None])[..., 0]

    structure = "positive definite" if sign > 0 else "negative definite"
    return num.problem(Stationary, structure, functions, solution, y, -np.linalg.solve(H, rows(E, y)))


def argmax(xp: Any, dtype: Any, items: tuple[int, ...] = ()) -> Problem:
    """Return `ridge` turned upside down: the solution is a maximum."""
    return ridge(xp, dtype, items, sign=-1.0)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    f.__name__: f for f in (exponential_root, wide_root, geometric_fixed_point, minimum, ridge, saddle, argmax)
}

SOLVERS_FOR: dict[str, tuple[str, ...]] = {
    "general": ("auto", "lu", "gmres", "bicgstab"),
    "positive definite": ("auto", "lu", "cholesky", "cg", "minres", "gmres"),
    "indefinite": ("auto", "lu", "ldlt", "minres", "gmres"),
    "negative definite": ("auto", "lu", "minres", "gmres"),
}
"""The solvers that are right for a structure of A."""

STRUCTURES: dict[str, str] = {name: make(np, np.float64).structure for name, make in PROBLEMS.items()}


# -- linear systems --------------------------------------------------------------------------------------
N = 30
TIGHT: dict[str, Any] = {
    "auto": Auto(rtol=1e-13), "lu": LU(), "ldlt": LDLT(), "cholesky": Cholesky(), "cg": CG(rtol=1e-13),
    "minres": MINRES(rtol=1e-13), "gmres": GMRES(rtol=1e-13), "bicgstab": BiCGSTAB(rtol=1e-13),
    "lsmr": LSMR(rtol=1e-13), "minres_qlp": MINRESQLP(rtol=1e-13), "pinv": Pinv(),
}  # fmt: skip
RIGHT_FOR = {
    "pos": tuple(TIGHT),
    "sym": ("auto", "lu", "ldlt", "minres", "gmres", "bicgstab", "lsmr", "minres_qlp", "pinv"),
    "gen": ("auto", "lu", "gmres", "bicgstab", "lsmr", "pinv"),
}


def with_eigenvalues(values: Any, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues, symmetric to the last bit."""
    values = np.asarray(values, dtype=float)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    a = q @ np.diag(values) @ q.T
    return (a + a.T) / 2


def matrix(structure: str, n: int = N) -> np.ndarray:
    """Return a matrix with a condition number of order ten; SciPy's ``assume_a`` names the structure."""
    if structure == "gen":
        return 2 * np.eye(n) + np.random.default_rng(1).normal(size=(n, n)) / np.sqrt(n)
    values = np.linspace(1.0, 10.0, n)
    return with_eigenvalues(values if structure == "pos" else values * (-1.0) ** np.arange(n))


def vector(n: int = N, seed: int = 2, columns: tuple[int, ...] = ()) -> np.ndarray:
    """Return a vector, or several as columns, without structure."""
    return np.random.default_rng(seed).normal(size=(n, *columns))


class Counted:
    """A product v -> A v that counts its calls."""

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.calls = a, 0

    def __call__(self, v: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.a @ v


def linear_root(a: np.ndarray) -> Root:
    """F = A y − θ: dy = A⁻¹ θ̇, and the pull-back is A⁻ᵀ v."""
    return Root(
        lambda y, theta: a @ y - theta, jvp=lambda y, theta, v: a @ v, vjp=lambda y, theta, u: a.T @ u,
        mixed_jvp=lambda y, theta, t: -t, mixed_vjp=lambda y, theta, u: -u,
    )  # fmt: skip


def solve_both(a: np.ndarray, b: np.ndarray, solver: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """A⁻¹ b and A⁻ᵀ b, each with its report."""
    theta = vector(len(b), seed=5)
    y, root = np.linalg.solve(a, theta), linear_root(a)
    return (
        implicit_jvp(root, y, theta, b, solver=solver, return_report=True),
        implicit_vjp(root, y, theta, b, solver=solver, return_report=True),
    )


def close(x: np.ndarray, reference: np.ndarray, rtol: float = 1e-11) -> None:
    """Compare in the 2-norm."""
    assert np.linalg.norm(x - reference) <= rtol * np.linalg.norm(reference)
