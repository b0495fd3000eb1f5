"""Problems made from a seed, in any units, as the library sees them.

The truth comes from the analytic A and B of `families` by LAPACK and refinement in extended precision, in the units in
which the problem was made; the library only ever sees D y, E θ and S F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
from conftest import Library, exact_solve
from families import FAMILIES, Array, Family, K, cat, mild, spectrum, transpose
from problems import columns, matvec, rows

from implicitdiff import FixedPoint, Stationary, implicit_grad, implicit_jacobian, implicit_jvp, implicit_vjp
from implicitdiff.backends.numpy import NumpyBackend

LOGS = partial(np.linspace, 1.0, 2.0)
"""Weights of a loss that is the same for every problem of a size."""


# -- an instance, in the units of the maker --------------------------------------------------------------
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
        if entry == "grad of logs":
            direct = np.concatenate([LOGS(K) / self.theta[:K], np.zeros(self.n)])
            return direct - B.T @ exact_solve(A.T, LOGS(self.n) / self.y)
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
        y = y + 0.3 * mild(A) * rng.uniform(-1, 1, (*items, n))  # the Hessian of every item is of the same kind
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
    more: dict[str, Any] = field(default_factory=dict)
    """More numbers, for ``distort``."""

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
        return {name: self.array(x) for name, x in {**self.instance.data, **self.units.arrays, **self.more}.items()}

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

    def logs(self) -> Callable[[Any, Any], Any]:
        """L = Σ w log |y| + Σ w log |s|: another unit adds a constant, and it sees no number of the problem."""
        xp = self.xp
        total = lambda x: xp.sum(self.array(LOGS(x.shape[-1])) * xp.log(x * x), axis=-1) / 2
        return lambda Y, T: total(self.join(Y)) + total(self.join(T)[..., :K])

    def call(
        self, condition: Any, entry: str, outer: Any = None, *, compiled: Callable[..., Any] = lambda ask: ask,
        **options: Any,
    ) -> Callable[[], Any]:  # fmt: skip
        """The call to be made; its result goes to `base`. ``compiled`` gets it as a function of all arrays."""
        D, E, it, (cut_y, cut_t) = self.units.D, self.units.E, self.instance, self.cuts
        y, theta = self.point()
        options = {"backend": self.backend, "batched": it.y.ndim == 2, **options}
        vector = None
        if entry == "vjp":
            vector = self.split(self.array(it.cotangent / D), cut_y)
        elif entry == "jvp":
            vector = self.split(self.array(it.tangent * E), cut_t)
        elif entry != "jacobian":
            outer = outer or self.outer()

        def ask(y: Any, theta: Any, vector: Any, args: Any) -> Any:
            more = {"args": (args,), **options}
            if entry == "jacobian":
                return implicit_jacobian(condition, y, theta, **more)
            if vector is None:
                return implicit_grad(condition, outer, y, theta, **more)
            return (implicit_vjp if entry == "vjp" else implicit_jvp)(condition, y, theta, vector, **more)

        return lambda: compiled(ask)(y, theta, vector, self.numbers())

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
