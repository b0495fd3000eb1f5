"""The comparison on quadratic programs: a batch of small ones, differentiated by all of their data."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import array_api_compat
import numpy as np

from benchmarks.measure import Setting, interleave
from benchmarks.problems import relative_error
from benchmarks.report import Row, Skipped
from implicitdiff import QP, implicit_vjp

__all__ = ["Programs", "by_hand", "qp"]


class Programs:
    """Strictly convex programs made from their solutions, p equalities and r inequalities, two fifths of them active.

    Parameters
    ----------
    items, n, p, r : int
    seed : int
    """

    def __init__(self, items: int, n: int, p: int, r: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        L = rng.normal(size=(items, n, n))
        Q, A, G = (
            L @ np.matrix_transpose(L) / n + np.eye(n),
            rng.normal(size=(items, p, n)),
            rng.normal(size=(items, r, n)),
        )
        active = np.arange(r) < 2 * r // 5
        self.y, self.lam, self.cotangent = (rng.normal(size=(items, k)) for k in (n, p, n))
        self.mu = np.where(active, rng.uniform(0.5, 2.0, size=(items, r)), 0.0)
        slack = np.where(active, 0.0, rng.uniform(0.5, 2.0, size=(items, r)))

        def times(M: Any, x: Any) -> Any:
            return (M @ x[..., None])[..., 0]

        q = -(times(Q, self.y) + times(np.matrix_transpose(A), self.lam) + times(np.matrix_transpose(G), self.mu))
        self.theta = {"Q": Q, "q": q, "A": A, "b": times(A, self.y), "G": G, "h": times(G, self.y) + slack}

    @cached_property
    def truth(self) -> dict[str, Any]:
        """The gradients by all data, one by one."""
        theta = self.theta
        found = [by_hand({k: x[i] for k, x in theta.items()}, self.y[i], self.lam[i], self.mu[i], self.cotangent[i])
                 for i in range(len(self.y))]  # fmt: skip
        return {name: np.stack([one[name] for one in found]) for name in theta}


def by_hand(theta: Any, y: Any, lam: Any, mu: Any, v: Any) -> dict[str, Any]:
    """Gradients of one program by its KKT matrix and LU, as Amos & Kolter (2017, arXiv:1703.00443) write them."""
    xp = array_api_compat.array_namespace(y)
    Q, A, G = theta["Q"], theta["A"], theta["G"]
    n, p, r = y.shape[0], A.shape[0], G.shape[0]
    slack = G @ y - theta["h"]
    K = xp.concat([
        xp.concat([Q, A.T, G.T * mu], axis=1),
        xp.concat([A, xp.zeros((p, p + r), dtype=y.dtype)], axis=1),
        xp.concat([G, xp.zeros((r, p), dtype=y.dtype), xp.eye(r, dtype=y.dtype) * slack], axis=1),
    ])  # fmt: skip
    u = xp.linalg.solve(K, xp.concat([v, xp.zeros(p + r, dtype=y.dtype)])[:, None])[:, 0]
    a, b, c = -u[:n], -u[n : n + p], -mu * u[n + p :]

    def outer(x: Any, z: Any) -> Any:
        return x[:, None] * z[None, :]

    return {"Q": (outer(a, y) + outer(y, a)) / 2, "q": a, "A": outer(b, y) + outer(lam, a), "b": -b,
            "G": outer(c, y) + outer(mu, a), "h": -c}  # fmt: skip


def qp(fw: Any, setting: Setting) -> list[Row | Skipped]:
    """A batch of programs against the KKT matrices written by hand, mapped over the batch."""
    sizes = (8, 6, 2, 5) if setting.short else (128, 50, 10, 20)
    problem = Programs(*sizes)
    theta = {name: fw.put(x) for name, x in problem.theta.items()}
    y, lam, mu, v = map(fw.put, (problem.y, problem.lam, problem.mu, problem.cotangent))

    def ours(y: Any, theta: Any, lam: Any, mu: Any, v: Any) -> Any:
        return implicit_vjp(QP(multipliers=(lam, mu)), y, theta, v, batched=True)

    def recovered(y: Any, theta: Any, lam: Any, mu: Any, v: Any) -> Any:
        return implicit_vjp(QP(), y, theta, v, batched=True)

    arrays = (y, theta, lam, mu, v)
    ways = {f"multipliers given{way}": f for way, f in fw.ways(ours, arrays).items()}
    ways |= {f"multipliers recovered{way}": f for way, f in fw.ways(recovered, arrays).items()}
    hand = fw.mapped(by_hand, (theta, y, lam, mu, v))
    times = interleave({**ways, "hand": hand}, setting)
    items, n, p, r = sizes
    size = f"{items} x (n = {n}, {p} eq, {r} ineq)"
    rows: list[Row | Skipped] = []
    for way, f in ways.items():
        found = {name: fw.numpy(x) for name, x in f().items()}
        error = max(relative_error(found[name], problem.truth[name]) for name in problem.truth)
        bar = 1.5 if fw.name == "jax" and way.startswith("multipliers given") else None
        rows.append(fw.row(f"qp, {way} / {fw.by_hand}", size, times, way, "hand", bar, error, 1e-8))
    return rows
