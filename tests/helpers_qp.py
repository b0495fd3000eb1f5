"""Quadratic programs of which the solution is chosen, and their derivatives by differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import JAX, PLAIN, Library

pytest.importorskip("clarabel")
N, P, R, ITEMS = 5, 2, 4, 3
LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
Data = dict[str, Any]


def program(seed: int = 0) -> tuple[Data, np.ndarray, np.ndarray, np.ndarray]:
    """Data, solution and multipliers, which are chosen: the first two of four inequalities are active."""
    rng = np.random.default_rng(seed)
    Q, A, G = rng.normal(size=(N, N)), rng.normal(size=(P, N)), rng.normal(size=(R, N))
    Q, y, lam = Q @ Q.T + np.eye(N), rng.normal(size=N), rng.normal(size=P)
    mu = np.r_[0.5 + rng.random(2), 0.0, 0.0]
    data = {"Q": Q, "q": -(Q @ y + A.T @ lam + G.T @ mu), "A": A, "b": A @ y, "G": G, "h": G @ y + [0, 0, 0.5, 0.9]}
    return data, y, lam, mu


def batch() -> tuple[Data, np.ndarray, np.ndarray]:
    """Several that share A, with their solutions and multipliers of the inequalities."""
    found, A = [program(seed) for seed in range(ITEMS)], program()[0]["A"]
    data = {name: np.stack([d[name] for d, *_ in found]) for name in found[0][0]}
    y, lam, mu = (np.stack(x) for x in list(zip(*found, strict=True))[1:])
    data |= {"A": A, "b": y @ A.T, "q": data["q"] + np.einsum("ipn,ip->in", data["A"] - A, lam)}
    return data, y, mu


def on(lib: Library, data: Data) -> Data:
    return {name: lib.array(x) for name, x in data.items()}


def resolved(data: Data) -> np.ndarray:
    """Solve with the first two inequalities as equalities."""
    J = np.concatenate([data["A"], data["G"][:2]])
    K = np.block([[(data["Q"] + data["Q"].T) / 2, J.T], [J, np.zeros((P + 2, P + 2))]])
    return np.linalg.solve(K, np.concatenate([-data["q"], data["b"], data["h"][:2]]))[:N]


def gradient(data: Data, v: np.ndarray) -> Data:
    """Return d⟨v, y⟩ / d(data) by central differences."""
    found = {}
    for name, x in data.items():
        g = np.zeros_like(x)
        for i in np.ndindex(*x.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = x.copy()
                moved[i] += step
                ends.append(v @ resolved({**data, name: moved}))
            g[i] = (ends[0] - ends[1]) / 2e-6
        found[name] = g
    return found


def gradient_of_batch(data: Data, v: np.ndarray) -> Data:
    """The same item by item; A is shared."""
    each = [gradient({name: x if name == "A" else x[i] for name, x in data.items()}, v[i]) for i in range(ITEMS)]
    return {name: np.sum([g[name] for g in each], axis=0) if name == "A" else np.stack([g[name] for g in each])
            for name in data}  # fmt: skip


V = np.cos(np.arange(N))
MANY = np.cos(np.arange(ITEMS * N)).reshape(ITEMS, N)


def same(lib: Library, got: Data, expected: Data) -> None:
    for name, x in expected.items():
        np.testing.assert_allclose(lib.numpy(got[name]), x, rtol=1e-6, atol=1e-7, err_msg=name)
