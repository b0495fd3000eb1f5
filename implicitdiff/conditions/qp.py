"""Quadratic programs, differentiable in all of their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, needed, times
from implicitdiff.conditions.base import Maps, finite_part
from implicitdiff.conditions.constrained import Constrained, Degenerate, Route
from implicitdiff.conditions.lagrangian import FirstOrder
from implicitdiff.conditions.point import Point
from implicitdiff.errors import InputError, ShapeError
from implicitdiff.linalg.operator import LinearMap, Operator
from implicitdiff.linalg.rows import (
    SparseMatrix,
    SparseRows,
    as_sparse,
    rows_times,
    scaled_rows,
    stacked,
    turned_times,
)

__all__ = ["QP"]

_NAMES = ("Q", "q", "A", "b", "G", "h")
_AXES = {"Q": 2, "q": 1, "A": 2, "b": 1, "G": 2, "h": 1}


@dataclass(frozen=True, eq=False, repr=False)
class QP(Constrained):
    """The solution y of min ½ yᵀQy + qᵀy subject to Ay = b, Gy <= h, from whatever solver.

    Every one of Q, q, A, b, G and h may be a parameter: theta is a dict of those that are, by these names. The others
    are given here and are constants, shared by all items of a batch. Derivatives are closed forms; no autodiff is
    needed, on any framework.

    Parameters
    ----------
    Q : array or SciPy sparse matrix, shape (n, n), optional
        Its symmetric part counts; the derivative with respect to it is symmetric.
    q : array, shape (n,), optional
        Zero where it is not given.
    A, b : array, shapes (p, n) and (p,), optional
        Equalities. A may be a SciPy sparse matrix.
    G, h : array, shapes (r, n) and (r,), optional
        Inequalities. G may be a SciPy sparse matrix. Where Q, A or G is sparse, the whole system is, and is factored by
        SuperLU on every framework; matrices in theta are dense.
    multipliers, route, active_tol, degenerate
        As for `KKT`; the multipliers are the pair of those of Ay = b and of Gy <= h, or the one that there is.

    Raises
    ------
    InputError, ShapeError
        Where data is missing, given twice, or does not fit together.

    References
    ----------
    B. Amos, J. Z. Kolter, "OptNet: Differentiable optimization as a layer in neural networks", ICML 2017.
    arXiv:1703.00443

    Examples
    --------
    The point of the half-plane y₁ + y₂ <= 1 that is next to (1, 2) is (0, 1), and moves with the bound:

    >>> import numpy as np
    >>> from implicitdiff import QP, implicit_jacobian
    >>> nearest = QP(Q=np.eye(2), q=-np.array([1.0, 2.0]), G=np.ones((1, 2)))
    >>> np.round(implicit_jacobian(nearest, np.array([0.0, 1.0]), {"h": np.array([1.0])})["h"], 6)
    array([[0.5],
           [0.5]])
    """

    data: dict[str, Any]
    multipliers: Any
    route: str
    active_tol: float | None
    degenerate: str
    eq = None
    ineq = None

    def __init__(
        self, Q: Any = None, q: Any = None, A: Any = None, b: Any = None, G: Any = None, h: Any = None, *,
        multipliers: Any = None, route: Route = "auto", active_tol: float | None = None,
        degenerate: Degenerate = "raise",
    ) -> None:  # fmt: skip
        given = {name: value for name, value in zip(_NAMES, (Q, q, A, b, G, h), strict=True) if value is not None}
        for name, value in given.items():
            if len(getattr(value, "shape", ())) != _AXES[name]:
                raise ShapeError(f"{name} has shape {getattr(value, 'shape', None)}; expected {_AXES[name]} axes.")
        sparse = {name: (x + x.T) / 2 if name == "Q" else x for name, x in given.items() if hasattr(x, "tocsr")}
        given = {**given, **{name: SparseMatrix(x) for name, x in sparse.items()}}
        fields = {"data": given, "multipliers": multipliers, "route": route, "active_tol": active_tol,
                  "degenerate": degenerate}  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_options()

    @property
    def arrays(self) -> dict[str, Any]:
        return {"data": self.data, **super().arrays}

    def _shown(self) -> dict[str, Any]:
        return {**self.data, **super()._shown()}

    def without_bounds(self, theta: Any) -> Any:
        names = theta.tree.unflatten(list(range(len(theta.leaves))))
        place = names.get("h") if isinstance(names, dict) else None
        parts, xp = theta.parts(theta.vector), theta.backend.xp
        if place is None or not needed(theta.backend, xp.isinf(parts[place])):
            return theta.vector
        return theta.backend.concat([finite_part(xp, x) if i == place else x for i, x in enumerate(parts)])

    def maps(self, point: Point) -> Maps:
        return _Bound(self, point).maps(point)


class _Blocks(NamedTuple):
    """The symmetric part of Q; q; A over G; b over h; the number of equalities; where h is infinite.

    There rows and right-hand sides are zero.
    """

    H: Any
    q: Array
    rows: Any
    right: Array
    p: int
    absent: Array


@dataclass(frozen=True)
class _Bound(Constrained):
    """A QP with its data at hand."""

    qp: QP
    point: Point
    eq = None
    ineq = None

    @property
    def multipliers(self) -> Any:
        """The user's."""
        return self.qp.multipliers

    @property
    def active_tol(self) -> float | None:  # type: ignore[override]
        """The user's."""
        return self.qp.active_tol

    @property
    def degenerate(self) -> str:  # type: ignore[override]
        """The user's."""
        return self.qp.degenerate

    @property
    def _names(self) -> list[str]:
        names = self.point.theta.tree.unflatten(list(range(len(self.point.theta.leaves))))
        if not isinstance(names, dict) or not set(names) <= set(_NAMES):
            raise InputError(f"theta is {names if not isinstance(names, dict) else sorted(names)}; expected a dict "
                             f"with some of {', '.join(_NAMES)}.")  # fmt: skip
        if twice := sorted(set(names) & set(self.qp.data)):
            raise InputError(f"{', '.join(twice)} is given to QP and in theta: which one counts?")
        return sorted(names, key=lambda name: names[name])

    def parts(self, theta: Array) -> dict[str, Array]:
        """Vectors (*lead, m) of θ as arrays by name."""
        backend, lead = self.point.backend, tuple(theta.shape[:-1])
        pieces = zip(self._names, self.point.theta.parts(theta), self.point.theta.leaves, strict=True)
        return {name: backend.reshape(part, (*lead, *leaf.shape)) for name, part, leaf in pieces}

    def all_data(self, theta: Array) -> dict[str, Array]:
        """All data at θ, checked and completed, with the axes of the items in front."""
        point, n = self.point, self.point.y.n
        backend, device, dtype = point.backend, point.y.device, point.y.dtype
        fixed = {name: self._fixed(name, x) for name, x in self.qp.data.items()}
        data = {**fixed, **self.parts(theta)}
        if "Q" not in data and "q" not in data:
            raise InputError("QP has neither Q nor q: give them to QP, or in theta.")
        for matrix, vector in (("A", "b"), ("G", "h")):
            if vector in data and matrix not in data:
                raise InputError(f"QP has {vector} and no {matrix}.")
            if matrix in data and vector not in data:
                raise InputError(f"QP has {matrix} and no {vector}.")
        empty: dict[str, tuple[int, ...]] = {"Q": (n, n), "q": (n,), "A": (0, n), "b": (0,), "G": (0, n), "h": (0,)}
        if any(isinstance(x, SparseRows) for x in data.values()) and "Q" not in data:
            data["Q"] = SparseRows.zeros((n, n), backend, point.items, dtype, device)
        for name, shape in empty.items():
            if name not in data:
                data[name] = backend.xp.zeros(shape, dtype=dtype, device=device)
        p, r = data["A"].shape[-2], data["G"].shape[-2]
        expected = {"Q": (n, n), "q": (n,), "A": (p, n), "b": (p,), "G": (r, n), "h": (r,)}
        for name, shape in expected.items():
            got = tuple(data[name].shape)
            if got[len(got) - _AXES[name] :] != shape:
                raise ShapeError(f"{name} has shape {got[len(got) - _AXES[name] :]}; expected {shape} for y of {n}.")
            if not isinstance(data[name], SparseRows):
                data[name] = backend.xp.broadcast_to(data[name], (*point.items, *shape))
        return data

    def _fixed(self, name: str, x: Any) -> Any:
        """Data that is no parameter."""
        point = self.point
        if isinstance(x, SparseMatrix):
            return x.on(point.backend, point.items, point.y.dtype, point.y.device)
        return point.backend.astype(point.backend.as_leaf(x, name), point.y.dtype)

    @cached_property
    def _here(self) -> _Blocks:
        return self._blocks(self.point.theta.vector)

    def _blocks(self, theta: Array) -> _Blocks:
        xp, d = self.point.backend.xp, self.all_data(theta)
        right = xp.concat([d["b"], d["h"]], axis=-1)
        absent = xp.concat([xp.zeros_like(d["b"], dtype=xp.bool), d["h"] == float("inf")], axis=-1)
        right = xp.where(absent, xp.zeros_like(right), right)
        H, rows = _system(self.point.backend, d, absent)
        return _Blocks(H, d["q"], rows, right, d["A"].shape[-2], absent)

    # -- to first order --------------------------------------------------------------------------------
    def first_order(self, point: Point) -> FirstOrder:
        here, y = self._here, point.y.vector
        xp, H = point.backend.xp, here.H
        values = rows_times(here.rows, y) - here.right
        values = xp.where(here.absent, xp.full_like(values, -float("inf")), values)
        return FirstOrder(here.p, values, here.rows, rows_times(H, y) + here.q, lambda v: rows_times(H, v), H)

    def system(self, point: Point, first: FirstOrder, z: Array) -> Maps:
        xp, backend, n = point.backend.xp, point.backend, point.y.n
        (H, _, rows, _, p, _), y = self._here, point.y.vector
        k = rows.shape[-2]

        def product(x: Array) -> Array:
            v, w = x[..., :n], x[..., n:]
            return xp.concat([rows_times(H, v) + turned_times(xp, rows, w), rows_times(rows, v)], axis=-1)

        A = Operator(backend, n + k, n + k, point.items, y.dtype, point.y.device, forward=product, adjoint=product,
                     symmetric=True, trusted=True)  # fmt: skip

        def residual_of(there: _Blocks, y: Array, z: Array) -> Array:
            slope = rows_times(there.H, y) + there.q + turned_times(xp, there.rows, z)
            return xp.concat([slope, rows_times(there.rows, y) - there.right], axis=-1)

        def at(both: Array, theta: Array) -> Array:
            return residual_of(self._blocks(theta), both[..., :n], both[..., n:])

        return Maps(lambda: residual_of(self._here, y, z), at, A, self._mixed(z, n + k, p), hessian=H)

    # -- B = (∂²𝓛/∂θ∂y, ∂c/∂θ) ---------------------------------------------------------------------------
    def _mixed(self, z: Array, rows: int, p: int) -> LinearMap:
        point, y = self.point, self.point.y.vector
        n, lam, mu = point.y.n, z[..., :p], z[..., p:]
        names = self._names

        def adjoint(u: Array) -> Array:
            a, by_lam, by_mu = u[..., :n], u[..., n : n + p], u[..., n + p :]
            # 𝓛 is linear in each of the data; its derivative along u = (a, by_lam, by_mu) in (y, λ, μ):
            made: dict[str, Callable[[], Array]] = {
                "Q": lambda: (_outer(a, y) + _outer(y, a)) / 2,
                "q": lambda: a,
                "A": lambda: _outer(lam, a) + _outer(by_lam, y),
                "b": lambda: -by_lam,
                "G": lambda: _outer(mu, a) + _outer(by_mu, y),
                "h": lambda: -by_mu,
            }
            lead = tuple(u.shape[:-1])
            leaves = zip(names, point.theta.leaves, strict=True)
            parts = [point.backend.reshape(made[name](), (*lead, leaf.size)) for name, leaf in leaves]
            parts = parts or [point.backend.xp.zeros((*lead, 0), dtype=u.dtype, device=point.y.device)]
            g = parts[0] if len(parts) == 1 else point.backend.concat(parts)
            return point.backend.astype(g, point.theta.dtype)

        return LinearMap(
            point.backend, rows, point.theta.n, point.items, point.y.dtype, point.y.device, domain=point.theta.dtype,
            forward=lambda t: self._pushed(t, lam, mu), adjoint=adjoint, kind="given", label="B",
        )  # fmt: skip

    def _pushed(self, t: Array, lam: Array, mu: Array) -> Array:
        """B t."""
        point, y = self.point, self.point.y.vector
        xp, d = point.backend.xp, self.parts(point.backend.astype(t, point.y.dtype))
        lead = tuple(t.shape[:-1])

        def zeros(like: Array) -> Array:
            return xp.zeros((*lead, like.shape[-1]), dtype=like.dtype, device=point.y.device)

        slope, by_lam, by_mu = zeros(y), zeros(lam), zeros(mu)
        if "Q" in d:
            slope = slope + times(_symmetric(xp, d["Q"]), y)
        slope = slope + d["q"] if "q" in d else slope
        for name, z in (("A", lam), ("G", mu)):
            if name in d:
                slope = slope + times(xp.matrix_transpose(d[name]), z)
        by_lam = by_lam + times(d["A"], y) if "A" in d else by_lam
        by_lam = by_lam - d["b"] if "b" in d else by_lam
        by_mu = by_mu + times(d["G"], y) if "G" in d else by_mu
        by_mu = by_mu - d["h"] if "h" in d else by_mu
        return xp.concat([slope, by_lam, by_mu], axis=-1)


def _system(backend: Any, d: dict[str, Any], absent: Array) -> tuple[Any, Any]:
    """The symmetric part of Q, and A over G without what is absent: sparse where one of them is."""
    xp = backend.xp
    if not any(isinstance(d[name], SparseRows) for name in "QAG"):
        rows = xp.concat([d["A"], d["G"]], axis=-2)
        if needed(backend, absent):
            rows = xp.where(absent[..., None], xp.zeros_like(rows), rows)
        return _symmetric(xp, d["Q"]), rows
    H = d["Q"] if isinstance(d["Q"], SparseRows) else as_sparse(backend, _symmetric(xp, d["Q"]))
    rows = stacked([as_sparse(backend, d[name]) for name in "AG"])
    return H, scaled_rows(rows, backend.astype(~absent, rows.dtype), None)


def _outer(a: Array, b: Array) -> Array:
    return a[..., :, None] * b[..., None, :]


def _symmetric(xp: Any, Q: Array) -> Array:
    return (Q + xp.matrix_transpose(Q)) / 2
