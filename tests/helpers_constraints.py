"""Constrained minima whose dy/dθ is known, written for every array library and for a leading axis of items.

Each is built from a chosen solution and chosen multipliers: constants in the objective and in the constraints make the
Karush-Kuhn-Tucker conditions hold there. The truth is a closed form, or the block elimination of the saddle system in
NumPy, from derivatives that are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest
import scipy
from conftest import JAX, PLAIN, Library, relative_error
from problems import matvec

from implicitdiff import KKT, implicit_grad, implicit_jacobian, implicit_jvp, implicit_vjp

ROUTES = ("kkt", "schur", "nullspace")
MODES = ("vjp", "jvp", "jacobian", "grad")
SOLVERS = {
    "kkt": ("auto", "lu", "ldlt", "minres", "gmres"),
    "schur": ("auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres"),
    "nullspace": ("auto", "lu", "ldlt", "cholesky", "cg", "minres", "gmres"),
}
"""The solvers that fit a route, for a Hessian that is positive definite."""
EACH_SOLVER = [(route, solver) for route in ROUTES for solver in SOLVERS[route]]


@dataclass(frozen=True)
class Program:
    """min f subject to eq = 0, ineq <= 0, at its solution; arrays in double precision."""

    lib: Library
    f: Callable[..., Any]
    eq: Callable[..., Any] | None
    ineq: Callable[..., Any] | None
    y: np.ndarray
    theta: np.ndarray
    jacobian: np.ndarray
    """dy/dθ, shape (*items, n, m)."""
    lam: np.ndarray | None = None
    mu: np.ndarray | None = None
    dtype: str = "float64"
    derivatives: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Written by hand, by the argument's name."""

    def condition(self, *given: str, **options: Any) -> KKT:
        """Return the condition, with some of the derivatives."""
        return KKT(self.f, eq=self.eq, ineq=self.ineq, **{name: self.derivatives[name] for name in given}, **options)

    def array(self, values: np.ndarray) -> Any:
        """Array of the library, in the precision of the problem."""
        return self.lib.array(np.asarray(values, dtype=self.dtype))

    def ask(self, mode: str, condition: Any, **options: Any) -> Any:
        """Differentiate in one of the MODES."""
        y, theta = self.array(self.y), self.array(self.theta)
        if mode == "jacobian":
            return implicit_jacobian(condition, y, theta, **options)
        if mode == "jvp":
            return implicit_jvp(condition, y, theta, self.array(self.tangent), **options)
        if mode == "vjp":
            return implicit_vjp(condition, y, theta, self.array(self.cotangent), **options)
        xp, axis = functions(self.lib), self.y.ndim - 1 if not self.lib.per_item and self.y.ndim > 1 else None
        weights = self.array(self.weights)
        loss = lambda y, theta: xp.sum(weights * y**2, axis=axis) / 2 + xp.sum(theta**3, axis=axis) / 3
        return implicit_grad(condition, loss, y, theta, **options)

    def truth(self, mode: str) -> np.ndarray:
        """Return what a mode has to come to."""
        if mode == "jacobian":
            return self.jacobian
        if mode == "jvp":
            return matvec(self.jacobian, self.tangent)
        transposed = np.swapaxes(self.jacobian, -1, -2)
        if mode == "vjp":
            return matvec(transposed, self.cotangent)
        return self.theta**2 + matvec(transposed, self.weights * self.y)

    @property
    def cotangent(self) -> np.ndarray:
        return np.cos(3.0 * np.arange(self.y.size)).reshape(self.y.shape) + 0.4

    @property
    def tangent(self) -> np.ndarray:
        return np.sin(2.0 * np.arange(self.theta.size)).reshape(self.theta.shape) + 0.7

    @property
    def weights(self) -> np.ndarray:
        return np.linspace(0.5, 2.0, self.y.shape[-1])

    def check(self, mode: str, condition: Any, rtol: float, **options: Any) -> Any:
        """Compare with the truth; no warning is let through. Return the value."""
        got = self.ask(mode, condition, **options)
        assert self.lib.owns(got)
        error = relative_error(self.lib, got, self.truth(mode))
        assert error <= rtol, f"{mode}: relative error {error:.3g}"
        return got


def scipy_before(*version: int) -> bool:
    """Whether SciPy is older than that."""
    return tuple(map(int, scipy.__version__.split(".")[: len(version)])) < version


def functions(lib: Library) -> Any:
    """Namespace to write functions in: NumPy's functions are differentiated by autograd."""
    return anp if lib.xp is np else lib.xp


def rtol_for(lib: Library, dtype: str = "float64") -> float:
    """Bound for a library: without autodiff the derivatives of the Lagrangian come from finite differences."""
    if dtype == "float32":
        return 3e-2 if lib.name == "array_api_strict" else 2e-4
    return 1e-5 if lib.name == "array_api_strict" else 1e-9


def ball(lib: Library, dtype: str = "float64", items: tuple[int, ...] = ()) -> Program:
    """Projection of θ₁:₂ onto the ball of radius θ₃: y = θ₃ p / ‖p‖, from outside, with μ = ‖p‖ / θ₃ − 1."""
    xp = functions(lib)
    theta = np.array([3.0, 1.0, 1.5]) * np.ones((*items, 3)) + _spread(items, 3)
    p, r = theta[..., :2], theta[..., 2:]
    length = np.linalg.norm(p, axis=-1, keepdims=True)
    u = p / length
    across = (np.eye(2) - u[..., :, None] * u[..., None, :]) * (r / length)[..., None]
    return Program(
        lib,
        lambda y, t: xp.sum((y - t[..., :2]) ** 2, axis=-1),
        None,
        lambda y, t: xp.sum(y**2, axis=-1) - t[..., 2] ** 2,
        r * u, theta, np.concatenate([across, u[..., None]], axis=-1), None, length / r - 1, dtype,
    )  # fmt: skip


def circle(lib: Library, dtype: str = "float64", items: tuple[int, ...] = ()) -> Program:
    """The minimum of θ₁:₃ᵀ y on the sphere of radius θ₄: y = −θ₄ c / ‖c‖, with λ = ‖c‖ / 2 θ₄."""
    xp = functions(lib)
    theta = np.array([1.0, -2.0, 0.5, 0.8]) * np.ones((*items, 4)) + _spread(items, 4)
    c, r = theta[..., :3], theta[..., 3:]
    length = np.linalg.norm(c, axis=-1, keepdims=True)
    u = c / length
    across = (np.eye(3) - u[..., :, None] * u[..., None, :]) * (r / length)[..., None]
    return Program(
        lib,
        lambda y, t: xp.sum(t[..., :3] * y, axis=-1),
        lambda y, t: xp.sum(y**2, axis=-1) - t[..., 3] ** 2,
        None,
        -r * u, theta, np.concatenate([-across, -u[..., None]], axis=-1), length / (2 * r), None, dtype,
    )  # fmt: skip


def _spread(items: tuple[int, ...], m: int) -> np.ndarray:
    """Differences between items."""
    return 0.1 * np.sin(np.arange(int(np.prod((*items, m))))).reshape(*items, m) if items else np.zeros(m)


def affine(lib: Library, dtype: str = "float64", items: tuple[int, ...] = ()) -> Program:
    """A quadratic objective whose slope moves with θ, on a flat that moves with θ."""
    return general(lib, dtype, items, quartic=0.0, curved=0.0, inequalities=False)


def curved(lib: Library, dtype: str = "float64", items: tuple[int, ...] = ()) -> Program:
    """A quartic objective, two curved equalities, and three curved inequalities of which the second is not active."""
    return general(lib, dtype, items, quartic=1.0, curved=0.4, inequalities=True)


def general(
    lib: Library, dtype: str, items: tuple[int, ...], *, quartic: float, curved: float, inequalities: bool
) -> Program:  # fmt: skip
    """f = yᵀSy/2 + q Σy⁴/4 + (c + Kθ)ᵀy, h = Py + s Σ w y²/2 − Rθ − h₀ and g alike, with c, h₀ and g₀ to fit.

    The constants are those of the first item; the others are solved for by Newton's method on the active constraints.
    """
    xp, rng, n, m, p, r = functions(lib), np.random.default_rng(7), 6, 4, 2, 3 if inequalities else 0
    S = rng.normal(size=(n, n))
    S = S @ S.T / n + np.eye(n)
    K, J0, W, R = (rng.normal(size=shape) for shape in ((n, m), (p + r, n), (p + r, n), (p + r, m)))
    W, z = curved * W**2 / 2, np.array([0.7, -1.2, 0.9, 0.0, 1.5][: p + r])
    y0, theta0 = rng.normal(size=n), rng.uniform(0.5, 1.5, size=m)
    slack = np.array([0.0, 0.0, 0.0, 0.8, 0.0][: p + r])
    active = slack == 0
    c0 = J0 @ y0 + W @ y0**2 / 2 - R @ theta0 + slack
    c = -(S @ y0 + quartic * y0**3 + K @ theta0 + (J0 + W * y0).T @ z)
    theta = theta0 * np.ones((*items, m)) + 0.3 * _spread(items, m)
    ys, zs, jacobians = _solved(S, quartic, K, c, J0, W, R, c0, active, theta.reshape(-1, m), y0, z)
    a = {name: lib.array(x.astype(dtype)) for name, x in {"S": S, "K": K, "c": c}.items()}
    e = {name: lib.array(x[:p].astype(dtype)) for name, x in {"J": J0, "W": W, "R": R, "c": c0}.items()}
    g = {name: lib.array(x[p:].astype(dtype)) for name, x in {"J": J0, "W": W, "R": R, "c": c0}.items()}

    def f(y: Any, t: Any) -> Any:
        linear = a["c"] + matvec(a["K"], t)
        return xp.sum(y * matvec(a["S"], y) / 2 + quartic * y**4 / 4 + linear * y, axis=-1)

    def constraint(d: dict[str, Any]) -> Callable[..., Any]:
        return lambda y, t: matvec(d["J"], y) + matvec(d["W"], y**2) / 2 - matvec(d["R"], t) - d["c"]

    return Program(
        lib, f, constraint(e), constraint(g) if inequalities else None, ys.reshape(*items, n), theta,
        jacobians.reshape(*items, n, m), zs[:, :p].reshape(*items, p), zs[:, p:].reshape(*items, r), dtype,
        by_hand(lib, quartic, a, e, g),
    )  # fmt: skip


def by_hand(
    lib: Library, quartic: float, a: dict[str, Any], e: dict[str, Any], g: dict[str, Any]
) -> dict[str, Callable[..., Any]]:  # fmt: skip
    """The derivatives of `general`, for `KKT`."""
    xp = functions(lib)
    eye = lib.array(np.eye(a["c"].shape[-1]).astype(str(a["c"].dtype).rpartition(".")[2]))
    slope = lambda y, t: matvec(a["S"], y) + quartic * y**3 + a["c"] + matvec(a["K"], t)
    curve = lambda y: a["S"] + 3 * quartic * eye * y[..., None, :] ** 2
    rows = lambda d: lambda y, t: d["J"] + d["W"] * y[..., None, :]
    second = lambda d, z: eye * xp.sum(d["W"] * z[..., None], axis=-2)[..., None, :]
    return {
        "grad": slope,
        "hvp": lambda y, t, v: matvec(a["S"], v) + 3 * quartic * y**2 * v,
        "hessian": lambda y, t: curve(y),
        "eq_jacobian": rows(e),
        "ineq_jacobian": rows(g),
        "eq_hessian": lambda y, t, z: second(e, z),
        "ineq_hessian": lambda y, t, z: second(g, z),
        "lagrangian_hessian": lambda y, t, lam, mu: curve(y) + second(e, lam) + second(g, mu),
    }


def _solved(
    S: np.ndarray, quartic: float, K: np.ndarray, c: np.ndarray, J0: np.ndarray, W: np.ndarray, R: np.ndarray,
    c0: np.ndarray, active: np.ndarray, thetas: np.ndarray, y: np.ndarray, z: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """y, z and dy/dθ of each item, by Newton's method on the saddle system of the active constraints."""
    found, n, k = [], len(y), int(active.sum())
    for theta in thetas:
        yi, zi = y.copy(), z.copy()
        for _ in range(30):
            J = J0 + W * yi
            H = S + np.diag(3 * quartic * yi**2 + W.T @ zi)
            gradient = S @ yi + quartic * yi**3 + c + K @ theta + J.T @ zi
            values = (J0 @ yi + W @ yi**2 / 2 - R @ theta - c0)[active]
            saddle = np.block([[H, J[active].T], [J[active], np.zeros((k, k))]])
            step = np.linalg.solve(saddle, -np.concatenate([gradient, values]))
            yi = yi + step[:n]
            zi[active] += step[n:]
        assert np.linalg.norm(step) < 1e-12
        assert np.all(np.linalg.eigvalsh(H) > 0.1)
        assert np.all(zi[2:][active[2:]] > 0)
        jacobian = -np.linalg.solve(saddle, np.concatenate([K, -R[active]]))[:n]
        found.append((yi, zi, jacobian))
    ys, zs, jacobians = (np.stack(parts) for parts in zip(*found, strict=True))
    return ys, zs, jacobians


PROGRAMS: dict[str, Callable[..., Program]] = {f.__name__: f for f in (ball, circle, affine, curved)}


def changed(program: Program, **parts: Any) -> Program:
    """Return the program with other functions or numbers."""
    return replace(program, **parts)


def with_choices(choices: Any, compiled: Any, differenced: Any = None) -> list[Any]:
    """Each library with each choice; fewer where each is a compilation (JAX), or slow (finite differences)."""
    few = {lib.name: compiled for lib in JAX} | ({} if differenced is None else {"array_api_strict": differenced})
    pairs = [(lib, c) for lib in (*PLAIN, *JAX) for c in few.get(lib.name, choices)]
    return [pytest.param(lib, c, id=f"{lib.name}-{c if isinstance(c, str) else '-'.join(c)}") for lib, c in pairs]
