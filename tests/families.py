"""Families of problems with A = ∂F/∂y and B = ∂F/∂θ known analytically.

A family is four plain functions of (y, θ): the objective (where there is one), F, A and B. Each F has the form
G(y, s) − r with θ = (s, r), so any y is a solution for the r that it is given: nothing is solved, and y is exact.
The linear part of G is chosen such that A has the condition number asked for at that y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from problems import columns, matvec, rows

from implicitdiff import FixedPoint, Root, Stationary

Array = Any
K = 2
"""Number of parameters s beside r."""


class Family(NamedTuple):
    """Functions of ``(xp, data, y, theta)`` on the last axis, in the units of the maker."""

    kind: type
    value: Callable[..., Array] | None
    F: Callable[..., Array]
    A: Callable[..., Array]
    B: Callable[..., Array]
    data: Callable[[np.random.Generator, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    """Numbers such that A at this y is this matrix."""


def halves(theta: Array) -> tuple[Array, Array]:
    """Parameters s and r."""
    return theta[..., :K], theta[..., K:]


def dot(xp: Any, a: Array, b: Array) -> Array:
    """Inner product over the last axis."""
    return xp.sum(a * b, axis=-1)


def beside(xp: Any, left: Array, d: dict[str, Array], y: Array) -> Array:
    """(left, −I): what r adds to B."""
    eye = d["eye"] + xp.zeros_like(left[..., :1])
    return cat(xp, [left, -eye])


def cat(xp: Any, parts: list[Array]) -> Array:
    """Concatenate along the last axis; autograd has the old name only."""
    join = xp.concatenate if xp.__name__ == "autograd.numpy" else xp.concat
    return join(parts, axis=-1)


def transpose(xp: Any, M: Array) -> Array:
    """Transpose of the last two axes."""
    return xp.swapaxes(M, -1, -2) if hasattr(xp, "swapaxes") else xp.matrix_transpose(M)


def flat(d: dict[str, Array], name: str, y: Array) -> Array:
    """A constant matrix, for every item."""
    return d[name] + (y * 0)[..., None]


def mixing(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(-1, 1, (n, K))


def mild(A: np.ndarray) -> float:
    """A size of the nonlinear part that does not decide about the condition of A."""
    found = np.linalg.cond(A)
    return 0.3 / found if found < 1e15 else 0.0


# -- minima ----------------------------------------------------------------------------------------------
def quadratic() -> Family:
    """f = yᵀHy/2 − yᵀ(Ks + r)."""
    return Family(
        Stationary,
        lambda xp, d, y, t: dot(xp, y, matvec(d["H"], y) / 2 - matvec(d["K"], t[..., :K]) - t[..., K:]),
        lambda xp, d, y, t: matvec(d["H"], y) - matvec(d["K"], t[..., :K]) - t[..., K:],
        lambda xp, d, y, t: flat(d, "H", y),
        lambda xp, d, y, t: beside(xp, -flat(d, "K", y), d, y),
        lambda rng, A, y: {"H": A, "K": mixing(rng, len(y))},
    )


def quartic() -> Family:
    """f = yᵀHy/2 + Σ w y⁴/4 − yᵀ(Ks + r)."""
    quad = quadratic()

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        w = rng.uniform(0.5, 1.0, len(y)) * mild(A)
        return {"H": A - np.diag(3 * w * y**2), "K": mixing(rng, len(y)), "w": w}

    return Family(
        Stationary,
        lambda xp, d, y, t: quad.value(xp, d, y, t) + dot(xp, d["w"], y**4) / 4,  # type: ignore[misc]
        lambda xp, d, y, t: quad.F(xp, d, y, t) + d["w"] * y**3,
        lambda xp, d, y, t: quad.A(xp, d, y, t) + columns(d["eye"], 3 * d["w"] * y**2),
        quad.B,
        data,
    )


def ridge() -> Family:
    """f = yᵀHy/2 + Σ exp(Ls) y²/2 − yᵀr: a penalty for each group of coordinates, on a logarithmic scale."""

    def penalty(xp: Any, d: dict[str, Array], t: Array) -> Array:
        return d["size"] * xp.exp(matvec(d["L"], t[..., :K]))

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        L = np.eye(K)[np.arange(len(y)) % K]
        size = np.array(rng.uniform(0.5, 1.0) * mild(A))
        return {"H": A, "L": L, "size": size}

    return Family(
        Stationary,
        lambda xp, d, y, t: dot(xp, y, matvec(d["H"], y) / 2 + penalty(xp, d, t) * y / 2 - t[..., K:]),
        lambda xp, d, y, t: matvec(d["H"], y) + penalty(xp, d, t) * y - t[..., K:],
        lambda xp, d, y, t: d["H"] + columns(d["eye"], penalty(xp, d, t)),
        lambda xp, d, y, t: beside(xp, rows(d["L"], penalty(xp, d, t) * y), d, y),
        data,
    )


def softmax() -> Family:
    """f = log Σ exp(Xy + Ps) + yᵀHy/2 − yᵀr: logits, a Hessian diag(p) − ppᵀ, and what makes it definite."""

    def p(xp: Any, d: dict[str, Array], y: Array, t: Array) -> Array:
        e = xp.exp(matvec(d["X"], y) + matvec(d["P"], t[..., :K]))
        return e / xp.sum(e, axis=-1)[..., None]

    def spread(q: Array, M: Array) -> Array:
        """(diag(q) − qqᵀ) M."""
        return rows(M, q) - q[..., :, None] * (q[..., None, :] @ M)

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        k, n = len(y) + 1, len(y)
        X = rng.normal(size=(k, n))
        X = X / np.linalg.norm(X, axis=1)[:, None] * np.sqrt(mild(A))  # ‖Xᵀ (diag(p) − ppᵀ) X‖ <= mild
        d = {"X": X, "P": rng.normal(size=(k, K)), "H": A}
        return {**d, "Xt": d["X"].T.copy()}

    return Family(
        Stationary,
        lambda xp, d, y, t: (
            xp.log(xp.sum(xp.exp(matvec(d["X"], y) + matvec(d["P"], t[..., :K])), axis=-1))
            + dot(xp, y, matvec(d["H"], y) / 2 - t[..., K:])
        ),
        lambda xp, d, y, t: matvec(d["Xt"], p(xp, d, y, t)) + matvec(d["H"], y) - t[..., K:],
        lambda xp, d, y, t: d["Xt"] @ spread(p(xp, d, y, t), d["X"]) + d["H"],
        lambda xp, d, y, t: beside(xp, d["Xt"] @ spread(p(xp, d, y, t), d["P"]), d, y),
        data,
    )


# -- equations -------------------------------------------------------------------------------------------
def waves() -> Family:
    """F = My + w sin y − K s² − r, M not symmetric."""

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        w = rng.uniform(0.5, 1.0, len(y)) * mild(A)
        return {"M": A - np.diag(w * np.cos(y)), "K": mixing(rng, len(y)), "w": w}

    return Family(
        Root,
        None,
        lambda xp, d, y, t: matvec(d["M"], y) + d["w"] * xp.sin(y) - matvec(d["K"], t[..., :K] ** 2) - t[..., K:],
        lambda xp, d, y, t: d["M"] + columns(d["eye"], d["w"] * xp.cos(y)),
        lambda xp, d, y, t: beside(xp, columns(-flat(d, "K", y), 2 * t[..., :K]), d, y),
        data,
    )


def kepler() -> Family:
    """F = g (y − e sin y) − r with e = tanh(Ls): an equation for each coordinate; g sets the condition."""

    def e(xp: Any, d: dict[str, Array], t: Array) -> Array:
        return xp.tanh(matvec(d["L"], t[..., :K]))

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        return {"g": np.linalg.svd(A, compute_uv=False), "L": np.eye(K)[np.arange(len(y)) % K]}

    return Family(
        Root,
        None,
        lambda xp, d, y, t: d["g"] * (y - e(xp, d, t) * xp.sin(y)) - t[..., K:],
        lambda xp, d, y, t: columns(d["eye"], d["g"] * (1 - e(xp, d, t) * xp.cos(y))),
        lambda xp, d, y, t: beside(xp, rows(d["L"], -d["g"] * (1 - e(xp, d, t) ** 2) * xp.sin(y)), d, y),
        data,
    )


def tanh_map() -> Family:
    """T = W tanh y + Ks + r, hence F = y − T; A = I − W diag(1 − tanh² y)."""

    def data(rng: np.random.Generator, A: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        return {"W": (np.eye(len(y)) - A) * np.cosh(y) ** 2, "K": mixing(rng, len(y))}

    return Family(
        FixedPoint,
        None,
        lambda xp, d, y, t: y - matvec(d["W"], xp.tanh(y)) - matvec(d["K"], t[..., :K]) - t[..., K:],
        lambda xp, d, y, t: d["eye"] - columns(d["W"], 1 - xp.tanh(y) ** 2),
        lambda xp, d, y, t: beside(xp, -flat(d, "K", y), d, y),
        data,
    )


FAMILIES = {make.__name__: make() for make in (quadratic, quartic, ridge, softmax, waves, kepler, tanh_map)}


def spectrum(rng: np.random.Generator, n: int, condition: float, kind: str) -> np.ndarray:
    """Return a matrix with that condition number (inf: singular): "definite", "negative", "indefinite" or "general"."""
    P, Q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    values = np.geomspace(1.0, 1.0 / min(condition, 1e300), n) if n > 1 else np.ones(1)
    if not np.isfinite(condition):
        values = np.where(np.arange(n) == n - 1, 0.0, np.linspace(1.0, 0.3, n))
    if kind == "indefinite":
        values = values * np.where(np.arange(n) % 2, -1.0, 1.0)
    if kind == "general":
        return (Q * values) @ P.T
    A = (Q * values) @ Q.T
    return (A + A.T) / 2 * (-1.0 if kind == "negative" else 1.0)
