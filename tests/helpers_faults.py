"""Problems with known derivatives, and one call for each way of asking for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from conftest import Library

from implicitdiff import (
    Condition,
    Root,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
)

MODES = ("vjp", "jvp", "jacobian", "grad", "linearize", "implicit_function")
REVERSE = ("vjp", "grad", "linearize", "implicit_function")


@dataclass(frozen=True)
class Case:
    """A condition at its solution, with the true dy/dθ (*items, n, m), a cotangent v and a tangent t."""

    lib: Library
    condition: Any
    y: Any
    theta: Any
    truth: np.ndarray
    v: Any
    t: Any
    products: dict[str, Callable[..., Any]]

    def expected(self, mode: str) -> np.ndarray:
        """True answer in this mode."""
        number = self.lib.numpy
        if mode == "jacobian":
            return self.truth
        if mode == "jvp":
            return np.einsum("...nm,...m->...n", self.truth, number(self.t))
        pulled = np.einsum("...n,...nm->...m", number(self.weights if mode == "grad" else self.v), self.truth)
        return pulled + 2 * number(self.theta) if mode == "grad" else pulled

    @property
    def weights(self) -> Any:
        """Weights w of the loss Σ w y + Σ θ²: the cotangent, that of the first item for all of them."""
        if len(self.v.shape) < 2:
            return self.v
        return self.v[0, ...] if self.v.shape[0] else self.lib.array(np.ones(self.v.shape[1:]))

    def using(self, kind: type[Condition], *names: str, **others: Any) -> Case:
        """Build the condition from these products only, and from others handed in."""
        given = {name: self.products[name] for name in names} | others
        if kind is Root:
            given = {"jvp" if k == "hvp" else k: g for k, g in given.items()}
            return replace(self, condition=Root(given.pop("grad"), **given))
        return replace(self, condition=kind(**given))


def run(mode: str, case: Case, **options: Any) -> Any:
    """Differentiate the solution in one of the MODES."""
    c, y, theta = case.condition, case.y, case.theta
    if mode == "vjp":
        return implicit_vjp(c, y, theta, case.v, **options)
    if mode == "jvp":
        return implicit_jvp(c, y, theta, case.t, **options)
    if mode == "jacobian":
        return implicit_jacobian(c, y, theta, **options)
    if mode == "linearize":
        return linearize(c, y, theta, **options).vjp(case.v)
    if mode == "implicit_function":
        return implicit_function(c, **options)(lambda theta: y).vjp(theta, case.v)
    xp, v = case.lib.xp, case.weights
    axes = -1 if options.get("batched") and not case.lib.per_item else None
    return implicit_grad(c, lambda y, th: xp.sum(v * y, axis=axes) + xp.sum(th * th, axis=axes), y, theta, **options)


def numbers(shape: tuple[int, ...], shift: float = 0.0) -> np.ndarray:
    """Numbers of order one without structure, the same in every run."""
    k = np.arange(1, int(np.prod(shape)) + 1) + shift
    return np.reshape(np.cos(1.7 * k) + 0.3 * np.sin(k * k), shape)


def make(
    lib: Library, n: int = 4, m: int = 3, *, symmetric: bool = True, dtype: str = "float64",
    theta_dtype: str | None = None, items: tuple[int, ...] = (), device: Any = None,
) -> Case:  # fmt: skip
    """F = K y + y³ − C θ² − r, with r such that F is zero at y; all products are given.

    r is the same for all items, so that the functions are those of one item, and of many along a leading axis.
    """
    w = numbers((n, n))
    K = w @ w.T / max(n, 1) + 2 * np.eye(n) if symmetric else 3 * np.eye(n) + 0.4 * w + np.triu(np.ones((n, n)), 1)
    C, y, theta = numbers((n, m), 5.0), numbers((*items, n), 0.3), numbers((*items, m), 0.7)
    theta = theta.astype(theta_dtype or dtype)
    td = theta.astype(float)
    y, r = _solved(K, (td**2) @ C.T, y.astype(dtype).astype(float))
    y = y.astype(dtype)
    yd = y.astype(float)
    A = K + 3 * yd[..., None] ** 2 * np.eye(n)
    B = -2 * C * td[..., None, :]
    truth = -np.linalg.solve(A, B)

    def put(x: np.ndarray, kind: str = dtype) -> Any:
        return lib.array(x.astype(kind), device=device)

    kt, ct, rx, c = put(K.T), put(C.T, theta_dtype or dtype), put(r), put(C)
    k = put(K)
    products = {
        "grad": lambda y, th: y @ kt + y**3 - th**2 @ ct - rx,
        "hvp": lambda y, th, v: v @ kt + 3 * y**2 * v,
        "vjp": lambda y, th, u: u @ k + 3 * y**2 * u,
        "mixed_vjp": lambda y, th, u: -2 * th * (u @ c),
        "mixed_jvp": lambda y, th, t: -2 * (th * t) @ ct,
    }
    case = Case(lib, None, put(y), put(theta, theta_dtype or dtype), truth, put(numbers((*items, n), 2.0)),
                put(numbers((*items, m), 3.0), theta_dtype or dtype), products)  # fmt: skip
    if symmetric:
        return case.using(Stationary, "grad", "hvp", "mixed_vjp", "mixed_jvp")
    return case.using(Root, "grad", "hvp", "vjp", "mixed_vjp", "mixed_jvp")


def _solved(K: np.ndarray, right: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return y and r with K y + y³ = right + r: r from the first y, the other items by Newton's method from there."""
    if y.ndim == 1:
        return y, K @ y + y**3 - right
    if not y.size:
        return y, np.zeros(len(K))
    r = K @ y[0] + y[0] ** 3 - right[0]
    for i in range(1, len(y)):
        y[i] = y[0]
        for _ in range(50):
            y[i] -= np.linalg.solve(K + np.diag(3 * y[i] ** 2), K @ y[i] + y[i] ** 3 - right[i] - r)
        assert np.linalg.norm(K @ y[i] + y[i] ** 3 - right[i] - r) < 1e-12
    return y, r


def leaves_of(tree: Any) -> list[Any]:
    """Arrays of a nesting of dicts, lists and tuples."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves_of(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves_of(part)]
    return [] if tree is None else [tree]


def snapshot(lib: Library, *trees: Any) -> list[bytes]:
    """Bytes of every array, to compare before and after."""
    return [lib.numpy(leaf).tobytes() for tree in trees for leaf in leaves_of(tree) if hasattr(leaf, "dtype")]
