"""What the fuzzer draws: cases, units, noise, and mistakes of the user with what has to be told of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from conftest import JAX, NUMPY, STRICT, TORCH
from families import FAMILIES, transpose
from generated import Instance, Posed
from problems import SOLVERS_FOR

from implicitdiff import CG, GMRES, MINRES, BiCGSTAB, FixedPoint, Root, Stationary

FRAMEWORKS = {lib.name: lib for lib in (NUMPY, STRICT, *TORCH, *JAX)}
ITERATIVE = {"cg": CG, "minres": MINRES, "gmres": GMRES, "bicgstab": BiCGSTAB}
SOURCES = {
    "numpy": ("products", "matrix", "sparse", "autodiff", "complex step", "differences", "values"),
    "array_api_strict": ("products", "matrix", "differences", "values"),
    "torch": ("products", "matrix", "autodiff"),
    "jax": ("products", "matrix", "autodiff"),
}


@dataclass(frozen=True)
class Case:
    """What was drawn; everything else follows from it and the seed."""

    seed: int
    framework: str
    family: str
    dtype: str
    n: int
    kind: str
    condition: float
    source: str
    solver: str
    entry: str
    y: str
    theta: str
    F: str
    tree: bool
    items: int
    noise: str
    mistake: str
    jit: bool = False
    """Whether all of it is inside of the user's own jit: what would be told is NaN."""


# -- what is drawn ---------------------------------------------------------------------------------------
BLOCK, STRUCTURES = 12, 200
"""On JAX, cases that follow one another are of one structure, and share its compiled program: so many cases, so many
structures before they come again."""


def draw(framework: str, seed: int) -> Case:
    """Return the case of that seed."""
    jax, key = framework == "jax", zlib.crc32(framework.encode())
    rng = np.random.default_rng([seed, key])
    shape = np.random.default_rng([seed // 10**5, seed // BLOCK % STRUCTURES, key]) if jax else rng

    def one(*choices: Any, of: Any = rng) -> Any:
        return choices[of.integers(len(choices))]

    family = one(*FAMILIES, of=shape)
    stationary = FAMILIES[family].kind is Stationary
    kind = one("definite", "definite", "definite", "negative", "indefinite", of=shape) if stationary else "general"
    source = one(*(s for s in SOURCES[framework] if stationary or s != "values"), of=shape)
    structure = {"definite": "positive definite", "negative": "negative definite"}.get(kind, kind)
    solver = one("auto", *SOLVERS_FOR[structure], of=shape)
    dtype = "float64" if framework == "array_api_strict" else one("float64", "float64", "float32", of=shape)
    entry = one("vjp", "jvp", "jacobian", "grad of logs" if jax else "grad", of=shape)
    tree, n = bool(shape.random() < 0.3), int(one(*((1, 4, 4, 9) if jax else (1, 2, 3, 5, 8, 8, 20)), of=shape))
    items = 0 if source == "sparse" else int(one(0, 0, 0, 3, of=shape))
    jit = jax and bool(shape.random() < 0.3)
    condition = 10.0 ** rng.uniform(0, one(4, 4, 12 if dtype == "float64" else 8))
    units = [one("one", "one", "small", "large", "mixed", "few") for _ in range(3)]
    noise = one(*NOISES) if rng.random() < 0.15 and derived(framework, source) else ""
    case = Case(
        seed, framework, family, dtype, n, kind, condition, source, solver, entry, *units, tree, items, noise, "", jit
    )
    if rng.random() < 0.35 and not noise:
        costly = not jax or rng.random() < 0.2
        able = [name for name, m in MISTAKES.items() if m.able(case) and (costly or not m.compiled)]
        case = MISTAKES[one(*able)].prepared(case, rng) if able else case
    return case


def derived(framework: str, source: str) -> bool:
    """Whether the library differentiates what can be made noisy."""
    return source in {"differences", "values"} and framework == "numpy"


def scale(name: str, size: int, rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Units of that name."""
    top = 9.0 if dtype == "float64" else 4.0
    if name == "mixed":
        return 10.0 ** rng.uniform(-top, top, size)
    few = np.where(rng.random(size) < 0.3, 10.0 ** rng.uniform(-top, top), 1.0)
    return {"one": np.ones(size), "small": np.full(size, 10.0 ** rng.uniform(-top, 0)),
            "large": np.full(size, 10.0 ** rng.uniform(0, top)), "few": few}[name]  # fmt: skip


# -- noise -----------------------------------------------------------------------------------------------
def noisy(it: Instance, noise: str, seed: int) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """Return what makes F or f noisy, relative to the size of its terms."""
    A = np.abs(it.A if it.y.ndim == 1 else it.A[0])
    y = np.abs(it.y if it.y.ndim == 1 else it.y[0])
    r = np.abs(it.theta if it.y.ndim == 1 else it.theta[0])[-it.n :]
    sizes = {"F": np.max(A @ y), "value": y @ A @ y / 2 + y @ r}
    rng = np.random.default_rng(seed)

    def distort(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        if name not in sizes:
            return f
        level, size = noise.split(" ")[-1], sizes[name]

        def found(Y: Any, T: Any, d: Any) -> Any:
            if noise == "float32":
                Y, T = (_mapped(x, lambda z: z.astype(np.float32).astype(z.dtype)) for x in (Y, T))
            out = np.asarray(f(Y, T, d))
            if noise == "float32":
                return out.astype(np.float32).astype(out.dtype)[()]
            if noise == "offset":  # of f: ∇f is the same, and the last digits are gone; of F it would move the root
                return out + 1e8 * size * (name == "value")
            if noise == "rounded":
                return (np.round(out / (1e-6 * size)) * (1e-6 * size)).astype(out.dtype)[()]
            # fixed: the same at the same point
            source = np.random.default_rng(zlib.crc32(out.tobytes())) if noise.startswith("fixed") else rng
            return (out + float(level) * size * source.uniform(-1, 1, out.shape)).astype(out.dtype)[()]

        return found

    return distort


def _mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    return {k: f(v) for k, v in tree.items()} if isinstance(tree, dict) else f(tree)


NOISES = ("random 1e-8", "random 1e-6", "random 1e-4", "random 1e-2", "fixed 1e-8", "fixed 1e-6", "fixed 1e-4",
          "rounded", "float32", "offset")  # fmt: skip


# -- mistakes --------------------------------------------------------------------------------------------
REVERSE = ("vjp", "grad", "grad of logs")
INCONSISTENT = ("InconsistentDerivativesError",)


@dataclass(frozen=True)
class Mistake:
    """A mistake of the user: where it can be made, how, and what has to be told of it."""

    able: Callable[[Case], bool]
    kinds: tuple[str, ...]
    pattern: str = ""
    harmless: bool = False
    """Whether the result may be right all the same, and then nothing has to be said."""
    changed: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def in_functions(self) -> bool:
        """Whether the functions are wrong, and not the numbers."""
        return self.kinds[:1] == INCONSISTENT or self.name == "closure"

    @property
    def compiled(self) -> bool:
        """Whether JAX has to compile another program for it."""
        return self.name == "closure" or self.name.startswith("precond") or bool({"kind", "solver"} & {*self.changed})

    def prepared(self, case: Case, rng: np.random.Generator) -> Case:
        """Return the case with this mistake, otherwise healthy."""
        mild = {"condition": min(case.condition, 10.0 ** rng.uniform(0, 2)), "mistake": self.name}
        return replace(case, **{**mild, **self.changed})


def _given(case: Case) -> bool:
    return case.source in {"products", "matrix", "sparse"}


def _kind(case: Case) -> type:
    return FAMILIES[case.family].kind


def _several(case: Case) -> bool:
    return case.n > 2 and case.items == 0


def _bad_for(*solvers: str) -> Callable[[Case], bool]:
    return lambda c: c.solver in solvers and _several(c)


PRECONDITIONER = {"kinds": ("SolveError", "InputError"), "pattern": "precondition", "harmless": True}
MISTAKES: dict[str, Mistake] = {
    "A doubled": Mistake(_given, INCONSISTENT, "hvp|hessian|jvp|vjp|jacobian"),
    "A transposed": Mistake(
        lambda c: _given(c) and _several(c) and _kind(c) is not Stationary and c.family != "kepler",
        INCONSISTENT, "jvp|vjp|jacobian",
    ),
    "mixed_vjp negated": Mistake(lambda c: _given(c) and c.entry in REVERSE, INCONSISTENT, "mixed_vjp"),
    "mixed_jvp doubled": Mistake(lambda c: _given(c) and c.entry == "jvp", INCONSISTENT, "mixed_jvp"),
    "y - T for T": Mistake(lambda c: _given(c) and _kind(c) is FixedPoint, INCONSISTENT, "jvp|vjp|jacobian"),
    "hvp asymmetric": Mistake(
        lambda c: _given(c) and _kind(c) is Stationary and _several(c),
        ("InconsistentDerivativesError", "NotSymmetricError"), "hvp|hessian|symmetric",
    ),
    "unsolved": Mistake(lambda c: not c.jit, ("NotASolutionWarning",)),
    "closure": Mistake(lambda c: not _given(c) and not c.items, ("DerivativeError",), "depend on theta"),
    "NaN in y": Mistake(lambda c: not c.items, ("NonFiniteError",), r"\by\b"),
    "NaN in theta": Mistake(lambda c: not c.items, ("NonFiniteError",), "theta"),
    "NaN in cotangent": Mistake(lambda c: not c.items and c.entry == "vjp", ("NonFiniteError",), "cotangent"),
    "preconditioner NaN": Mistake(_bad_for("cg", "minres", "gmres", "bicgstab"), **PRECONDITIONER),
    "preconditioner 0": Mistake(_bad_for("cg", "minres", "gmres", "bicgstab"), **PRECONDITIONER),
    "preconditioner negative": Mistake(_bad_for("cg", "minres"), **PRECONDITIONER),
    "preconditioner asymmetric": Mistake(_bad_for("cg", "minres"), **PRECONDITIONER),
    # a singular diagonal matrix is a regular one in other units
    "singular": Mistake(
        lambda c: _several(c) and c.family != "kepler", ("SingularError", "NoiseError"), changed={"condition": np.inf}
    ),
    "indefinite": Mistake(
        lambda c: _kind(c) is Stationary and c.solver in {"cg", "cholesky"} and _several(c),
        ("NotPositiveDefiniteError",), changed={"kind": "indefinite"},
    ),
    "not symmetric": Mistake(
        lambda c: _kind(c) is Root and c.family != "kepler" and _several(c), ("NotSymmetricError",),
        changed={"solver": "minres"},
    ),
}  # fmt: skip
MISTAKES = {name: replace(mistake, name=name) for name, mistake in MISTAKES.items()}


def preconditioner(case: Case) -> Any:
    """Return a preconditioner that is none."""
    return _preconditioner(case.framework, case.dtype, case.n, case.mistake.split()[-1])


@functools.cache  # a program that was compiled is found by it
def _preconditioner(framework: str, dtype: str, n: int, kind: str) -> Any:
    M = {"NaN": np.full(n, np.nan), "0": np.zeros(n), "negative": -np.ones(n),
         "asymmetric": np.eye(n) + 5 * np.eye(n, k=1)}[kind]  # fmt: skip
    return FRAMEWORKS[framework].array(M.astype(dtype))


def wrong_numbers(it: Instance, E: np.ndarray, mistake: str) -> dict[str, Any]:
    """Return what says to `wrong` and `replaced` which mistake to make, if any: numbers, so that no program differs."""
    is_ = mistake.__eq__
    return {
        "doubled": 1.0 + is_("A doubled"), "lopsided": 0.5 * is_("hvp asymmetric"),
        "transposed": 1.0 * is_("A transposed"), "y - T": 1.0 * is_("y - T for T"),
        "mixed_vjp": 1.0 - 2 * is_("mixed_vjp negated"), "mixed_jvp": 1.0 + is_("mixed_jvp doubled"),
        **({"at": it.theta * E} if is_("closure") else {}),
    }  # fmt: skip


def wrong(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """Distort A as the numbers say: its first column may count half as much again."""

    def lopsided(Y: Any, T: Any, d: Any) -> Any:
        A = d["doubled"] * f(Y, T, d)
        return A + d["lopsided"] * (A[..., :1] * d["eye"][0, ...])

    return lopsided if name == "A" else f


def replaced(problem: Posed, mistake: str) -> dict[str, Any]:
    """Functions of the condition that are wrong where the numbers say so, or that use a theta of their own."""
    f, (cut_y, cut_t) = problem.functions(), problem.cuts
    if mistake == "closure":
        own = lambda d: problem.split(d["at"], cut_t)
        return {name: (lambda Y, T, d, f=f[name]: f(Y, own(d), d)) for name in ("value", "fun")}

    def product(name: str, other: str) -> Callable[..., Any]:
        def found(Y: Any, T: Any, v: Any, d: Any) -> Any:
            out, swapped = (problem.join(f[each](Y, T, v, d)) for each in (name, other))
            out = out + (swapped - out) * d["transposed"]
            return problem.split(out + (problem.join(v) - 2 * out) * d["y - T"], cut_y)

        return found

    def jacobian(Y: Any, T: Any, d: Any) -> Any:
        J = f["jacobian"](Y, T, d)
        J = J + ((J.T if problem.source == "sparse" else transpose(problem.xp, J)) - J) * d["transposed"]
        return J + (problem.sparse(d["eye"]) - 2 * J) * d["y - T"]

    def mixed(name: str) -> Callable[..., Any]:
        return lambda Y, T, x, d: _mapped(f[name](Y, T, x, d), lambda out: d[name] * out)

    return {"jvp": product("jvp", "vjp"), "vjp": product("vjp", "jvp"), "jacobian": jacobian,
            "mixed_vjp": mixed("mixed_vjp"), "mixed_jvp": mixed("mixed_jvp")}  # fmt: skip
