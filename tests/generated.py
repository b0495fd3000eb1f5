"""Problems made from a seed, in any units, with A = ∂F/∂y and B = ∂F/∂θ known analytically.

A family is four plain functions of (y, θ): the objective (where there is one), F, A and B. Each F has the form
G(y, s) − r with θ = (s, r), so any y is a solution for the r that it is given: nothing is solved, and y is exact.
The linear part of G is chosen such that A has the condition number asked for at that y. The truth comes from A and B by
LAPACK and refinement in extended precision, in the units in which the problem was made; the library only ever sees
D y, E θ and S F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from conftest import Library, exact_solve
from problems import columns, matvec, rows

from implicitdiff import (
    FixedPoint,
    Root,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
)
from implicitdiff.backends.numpy import NumpyBackend

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
        d = {"X": rng.normal(size=(k, n)) * np.sqrt(mild(A)), "P": rng.normal(size=(k, K)), "H": A}
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


# -- an instance, in the units of the maker --------------------------------------------------------------
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


@dataclass(frozen=True)
class Units:
    """Positive factors of y, θ, F and f."""

    D: np.ndarray
    E: np.ndarray
    S: np.ndarray
    c: float = 1.0

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"D": self.D, "E": self.E, "S": self.S, "c": np.array(self.c)}


@dataclass(frozen=True)
class Instance:
    """A problem at its solution, in the units of the maker."""

    family: Family
    data: dict[str, np.ndarray]
    y: np.ndarray
    theta: np.ndarray
    structure: str
    weights: np.ndarray
    powers: np.ndarray
    cotangent: np.ndarray
    tangent: np.ndarray

    @property
    def n(self) -> int:
        return self.y.shape[-1]

    @property
    def m(self) -> int:
        return self.theta.shape[-1]

    @property
    def A(self) -> np.ndarray:
        return self.family.A(np, self.data, self.y, self.theta)

    @property
    def B(self) -> np.ndarray:
        return self.family.B(np, self.data, self.y, self.theta)

    @property
    def condition(self) -> float:
        return float(np.max(np.linalg.cond(self.A), initial=1.0))

    def units(self, D: Any = 1.0, E: Any = 1.0, S: Any = 1.0, c: float = 1.0) -> Units:
        """Units that this kind can have: the gradient of c f has c / D, and a fixed point those of y."""
        D, E, S = (
            np.broadcast_to(np.asarray(x, float), (k,)).copy() for x, k in ((D, self.n), (E, self.m), (S, self.n))
        )
        if self.family.kind is Stationary:
            S = c / D
        elif self.family.kind is FixedPoint:
            S = D
        return Units(D, E, S, c)

    def truth(self, entry: str) -> np.ndarray:
        """Return the derivative by this entry, in the units of the maker."""
        if self.y.ndim == 2:
            return np.stack([self.item(i).truth(entry) for i in range(len(self.y))])
        A, B = self.A, self.B
        if entry == "jvp":
            return exact_solve(A, -B @ self.tangent)
        if entry == "jacobian":
            return np.stack([exact_solve(A, -b) for b in B.T], axis=-1)
        if entry == "vjp":
            return -B.T @ exact_solve(A.T, self.cotangent)
        return self.powers - B.T @ exact_solve(A.T, self.weights * self.y)

    def item(self, i: int) -> Instance:
        """Return one item of a batch."""
        return replace(self, y=self.y[i], theta=self.theta[i], cotangent=self.cotangent[i], tangent=self.tangent[i])


def make(
    family: str, rng: np.random.Generator, n: int = 4, condition: float = 10.0, kind: str = "definite",
    items: tuple[int, ...] = (), zero: bool = False,
) -> Instance:  # fmt: skip
    """Return an instance; with ``zero`` one coordinate of y is exactly 0."""
    found = FAMILIES[family]
    kind = kind if found.kind is Stationary else "general"
    A = spectrum(rng, n, condition, kind)
    y = rng.uniform(0.4, 1.4, n) * rng.choice([-1.0, 1.0], n)
    if zero:
        y[rng.integers(n)] = 0.0
    data = {**found.data(rng, A, y), "eye": np.eye(n)}
    if items:
        y = y + mild(A) * rng.normal(size=(*items, n))
    s = rng.uniform(0.3, 0.9, (*items, K))
    theta = np.concatenate([s, np.zeros((*items, n))], axis=-1)
    theta[..., K:] = found.F(np, data, y, theta)
    structure = {"definite": "positive definite", "negative": "negative definite"}.get(kind, kind)
    return Instance(
        found, data, y, theta, structure, rng.uniform(0.5, 2.0, n), rng.uniform(0.5, 2.0, K + n),
        rng.normal(size=(*items, n)), rng.normal(size=(*items, K + n)),
    )  # fmt: skip


# -- the same, as the library sees it --------------------------------------------------------------------
SOURCES = ("products", "matrix", "sparse", "autodiff", "complex step", "differences", "values")
"""Given products, a given matrix, autodiff of the value (or of F), complex step, differences of F, of plain values."""
MODES = {"autodiff": "autograd", "complex step": "complex_step", "differences": "finite_differences",
         "values": "finite_differences"}  # fmt: skip


@dataclass(frozen=True)
class Posed:
    """A problem in given units on an array library: the condition, the point, and the call that is to be made."""

    instance: Instance
    units: Units
    lib: Library
    source: str
    dtype: str = "float64"
    tree: bool = False
    distort: Callable[[str, Callable[..., Any]], Callable[..., Any]] = field(default=lambda name, f: f)
    """Called with the name of each function in base units, to make it noisy or wrong."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def xp(self) -> Any:
        if self.source == "autodiff" and self.lib.xp is np:
            import autograd.numpy

            return autograd.numpy
        return self.lib.xp

    def array(self, x: Any) -> Any:
        return self.lib.array(np.asarray(x, dtype=self.dtype))

    def numbers(self) -> dict[str, Any]:
        """All numbers of the problem and of its units."""
        return {name: self.array(x) for name, x in {**self.instance.data, **self.units.arrays}.items()}

    def split(self, x: Any, cut: int) -> Any:
        """The structure of y or theta: one array, or a dict of two; cut at that coordinate."""
        return {"a": x[..., :cut], "b": x[..., cut:]} if self.tree else x

    def join(self, tree: Any) -> Any:
        return cat(self.xp, [tree["a"], tree["b"]]) if self.tree else tree

    @property
    def cuts(self) -> tuple[int, int]:
        """Where y and theta are cut."""
        return max(self.instance.n // 2, 1), K

    def functions(self) -> dict[str, Callable[..., Any]]:
        """What a condition can be given, in these units; all numbers, those of the units too, arrive as args."""
        kind, (value, F, A, B) = self.instance.family.kind, self.instance.family[1:5]
        xp, fixed = self.xp, kind is FixedPoint
        sign, (cut_y, cut_t) = -1.0 if fixed else 1.0, self.cuts

        def base(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
            return self.distort(name, lambda Y, T, d: f(xp, d, self.join(Y) / d["D"], self.join(T) / d["E"]))

        f, slope = base("value", value or F), base("F", F)
        matrix, mixed = base("A", A), base("B", B)

        def fun(Y: Any, T: Any, d: Any) -> Any:
            out = d["S"] * slope(Y, T, d)
            return self.split(self.join(Y) - out if fixed else out, cut_y)

        def jvp(Y: Any, T: Any, v: Any, d: Any) -> Any:
            v = self.join(v)
            out = d["S"] * matvec(matrix(Y, T, d), v / d["D"])
            return self.split(v - out if fixed else out, cut_y)

        def vjp(Y: Any, T: Any, u: Any, d: Any) -> Any:
            u = self.join(u)
            out = matvec(transpose(xp, matrix(Y, T, d)), d["S"] * u) / d["D"]
            return self.split(u - out if fixed else out, cut_y)

        def jacobian(Y: Any, T: Any, d: Any) -> Any:
            out = rows(columns(matrix(Y, T, d), 1 / d["D"]), d["S"])
            out = d["eye"] - out if fixed else out
            return self.sparse(out)

        def mixed_jvp(Y: Any, T: Any, t: Any, d: Any) -> Any:
            return self.split(sign * d["S"] * matvec(mixed(Y, T, d), self.join(t) / d["E"]), cut_y)

        def mixed_vjp(Y: Any, T: Any, u: Any, d: Any) -> Any:
            out = matvec(transpose(xp, mixed(Y, T, d)), d["S"] * self.join(u)) / d["E"]
            return self.split(sign * out, cut_t)

        return {
            "value": lambda Y, T, d: d["c"] * f(Y, T, d), "fun": fun, "jvp": jvp, "vjp": vjp, "jacobian": jacobian,
            "mixed_jvp": mixed_jvp, "mixed_vjp": mixed_vjp,
        }  # fmt: skip

    def point(self) -> tuple[Any, Any]:
        """The solution y, and θ."""
        it, (cut_y, cut_t) = self.instance, self.cuts
        return self.split(self.array(it.y * self.units.D), cut_y), self.split(
            self.array(it.theta * self.units.E), cut_t
        )

    def sparse(self, M: Any) -> Any:
        """Return a matrix as this source gives it."""
        return scipy.sparse.csc_array(M) if self.source == "sparse" else M

    def condition(self, **replaced: Any) -> Any:
        """The condition with derivatives from ``source``."""
        kind, given = self.instance.family.kind, {**self.functions(), **replaced}
        mixed = {name: given[name] for name in ("mixed_jvp", "mixed_vjp")}
        if kind is not Stationary:
            more = {
                "products": {"jvp": given["jvp"], "vjp": given["vjp"], **mixed},
                "matrix": {"jacobian": given["jacobian"], **mixed},
                "sparse": {"jacobian": given["jacobian"], **mixed},
            }.get(self.source, {})
            return kind(given["fun"], **more, **self.options)
        if self.source in {"products", "matrix", "sparse"}:
            second = {"hvp": given["jvp"]} if self.source == "products" else {"hessian": given["jacobian"]}
            return Stationary(grad=given["fun"], **second, **mixed, **self.options)
        if self.source in {"differences", "complex step"}:
            return Stationary(grad=given["fun"], **self.options)
        return Stationary(given["value"], **self.options)

    @property
    def backend(self) -> Any:
        """The backend that takes derivatives from this source."""
        forced = self.lib.xp is np and self.source in MODES
        return NumpyBackend(MODES[self.source]) if forced else None

    def outer(self) -> Callable[[Any, Any], Any]:
        """L = Σ w y² / 2 + Σ p θ, a number without a unit."""
        D, E = map(self.array, (self.units.D, self.units.E))
        w, p, xp = self.array(self.instance.weights), self.array(self.instance.powers), self.xp
        return lambda Y, T: xp.sum(w * (self.join(Y) / D) ** 2, axis=-1) / 2 + xp.sum(p * self.join(T) / E, axis=-1)

    def call(self, condition: Any, entry: str, **options: Any) -> Callable[[], Any]:
        """The call to be made; its result goes to `base`."""
        D, E, it, (cut_y, cut_t) = self.units.D, self.units.E, self.instance, self.cuts
        y, theta = self.point()
        options = {"args": (self.numbers(),), "backend": self.backend,
                   "batched": it.y.ndim == 2, **options}  # fmt: skip
        if entry == "vjp":
            v = self.split(self.array(it.cotangent / D), cut_y)
            return lambda: implicit_vjp(condition, y, theta, v, **options)
        if entry == "jvp":
            t = self.split(self.array(it.tangent * E), cut_t)
            return lambda: implicit_jvp(condition, y, theta, t, **options)
        if entry == "jacobian":
            return lambda: implicit_jacobian(condition, y, theta, **options)
        outer = self.outer()
        return lambda: implicit_grad(condition, outer, y, theta, **options)

    def base(self, entry: str, value: Any) -> np.ndarray:
        """The numbers of a result, in the units of the maker."""
        D, E = self.units.D, self.units.E
        numbers = self.lib.numpy
        if entry == "jacobian":
            if self.tree:
                value = np.concatenate(
                    [np.concatenate([numbers(value[i][j]) for j in "ab"], axis=-1) for i in "ab"], axis=-2
                )
            else:
                value = numbers(value)
            return value.astype(np.float64) * E / D[:, None]
        leaves = [numbers(value[k]) for k in "ab"] if self.tree else [numbers(value)]
        found = np.concatenate(leaves, axis=-1).astype(np.float64)
        return found / D if entry == "jvp" else found * E


def analytic() -> list[str]:
    """Names of the families whose A, B and F are not the derivatives of F and f, by the complex step: none."""
    wrong = []
    for name, (_, value, F, *_) in FAMILIES.items():
        it = make(name, np.random.default_rng(0))

        def along(f: Callable[..., Array], x: np.ndarray, which: int, it: Instance = it) -> np.ndarray:
            steps = [x + 1e-30j * e for e in np.eye(len(x))]
            points = [(z, it.theta) if which == 0 else (it.y, z) for z in steps]
            return np.stack([np.imag(f(np, it.data, *point)) / 1e-30 for point in points], axis=-1)

        pairs = [(along(F, it.y, 0), it.A), (along(F, it.theta, 1), it.B)]
        if value is not None:
            pairs.append((along(value, it.y, 0), F(np, it.data, it.y, it.theta)))
        if not all(np.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs):
            wrong.append(name)
    return wrong
