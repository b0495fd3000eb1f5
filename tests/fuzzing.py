"""A seeded fuzzer: random problems with a known truth, and a verdict on what the library made of each.

``python -m tests.fuzzing --framework numpy --cases 10000 --seed 0`` runs for long, `test_fuzz.py` for seconds. A case
is drawn from its seed alone: sources of derivatives × solvers × precision × units × condition × noise × mistakes ×
batches × trees. The truth is LAPACK's on the analytic A and B of `generated`, and never comes from the library.

==============  =====================================================================================
right           no word, and the error is below 1 %
told            an error or a warning, where one is due or may be
silent wrong    an error above 1 %, or a mistake that has to be told, and no word of it
false alarm     an error or a warning on a healthy case: exact, condition at most 1e4
misleading      an error or a warning that names another cause than the one that is there
==============  =====================================================================================

The last three are failures.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__:  # as python -m tests.fuzzing
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from conftest import JAX, NUMPY, STRICT, TORCH, Outcome, outcome
from generated import FAMILIES, Instance, Posed, make
from problems import SOLVERS_FOR

import implicitdiff as idf
from implicitdiff import CG, GMRES, MINRES, FixedPoint, Root, Stationary

FRAMEWORKS = {lib.name: lib for lib in (NUMPY, STRICT, *TORCH, *JAX)}
ITERATIVE = {"cg": CG, "minres": MINRES, "gmres": GMRES}
SOURCES = {
    "numpy": ("products", "matrix", "sparse", "autodiff", "complex step", "differences", "values"),
    "array_api_strict": ("products", "matrix", "differences", "values"),
    "torch": ("products", "matrix", "autodiff"),
    "jax": ("products", "matrix", "autodiff"),
}
FAILURES = ("silent wrong", "false alarm", "misleading")


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


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    case: Case
    word: str
    error: float
    text: str

    @property
    def failure(self) -> bool:
        return self.word in FAILURES

    def __str__(self) -> str:
        c = self.case
        plain = {
            "kind": "general",
            "tree": False,
            "items": 0,
            "noise": "",
            "mistake": "",
            "y": "one",
            "theta": "one",
            "F": "one",
        }
        said = ", ".join(
            f"{k}={v if k != 'condition' else f'{v:.1e}'}" for k, v in asdict(c).items() if plain.get(k, ()) != v
        )
        return f"{self.word}: {said}\n    error {self.error:.2g}; {self.text or 'silent'}"


# -- what is drawn ---------------------------------------------------------------------------------------
BLOCK = 6
"""Cases on JAX that follow one another are of one shape, and share a compiled program."""


def draw(framework: str, seed: int) -> Case:
    """Return the case of that seed."""
    jax, key = framework == "jax", zlib.crc32(framework.encode())
    rng, shape = np.random.default_rng([seed, key]), np.random.default_rng([seed // BLOCK, key, 1])
    shape = shape if jax else rng

    def one(*choices: Any, of: Any = rng) -> Any:
        return choices[of.integers(len(choices))]

    family = one(*FAMILIES, of=shape)
    stationary = FAMILIES[family].kind is Stationary
    kind = one("definite", "definite", "definite", "negative", "indefinite", of=shape) if stationary else "general"
    source = one(*(s for s in SOURCES[framework] if stationary or s != "values"), of=shape)
    structure = {"definite": "positive definite", "negative": "negative definite"}.get(kind, kind)
    solver = one("auto", *SOLVERS_FOR[structure], of=shape)
    dtype = "float64" if framework == "array_api_strict" else one("float64", "float64", "float32", of=shape)
    entry = one("vjp", "jvp", "jacobian", *(() if jax else ("grad",)), of=shape)  # a loss is compiled for each case
    tree, n = bool(shape.random() < 0.3), 4 if jax else int(one(1, 2, 3, 5, 8, 8, 20))
    items = 0 if jax or source == "sparse" else int(one(0, 0, 0, 3))
    condition = 10.0 ** rng.uniform(0, one(4, 4, 12 if dtype == "float64" else 8))
    units = [one("one", "one", "small", "large", "mixed", "few") for _ in range(3)]
    noise = one(*NOISES) if rng.random() < 0.15 and derived(framework, source) else ""
    case = Case(
        seed, framework, family, dtype, n, kind, condition, source, solver, entry, *units, tree, items, noise, ""
    )
    able = [name for name, mistake in MISTAKES.items() if mistake.able(case) and not (jax and mistake.changed)]
    if rng.random() < (0.2 if jax else 0.35) and not noise and able:
        case = MISTAKES[one(*able)].prepared(case, rng)
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
          "rounded", "float32")  # fmt: skip


# -- mistakes --------------------------------------------------------------------------------------------
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
        return self.kinds[:1] == INCONSISTENT or "DerivativeError" in self.kinds

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
    "mixed_vjp negated": Mistake(lambda c: _given(c) and c.entry in {"vjp", "grad"}, INCONSISTENT, "mixed_vjp"),
    "mixed_jvp doubled": Mistake(lambda c: _given(c) and c.entry == "jvp", INCONSISTENT, "mixed_jvp"),
    "y - T for T": Mistake(lambda c: _given(c) and _kind(c) is FixedPoint, INCONSISTENT, "jvp|vjp|jacobian"),
    "hvp asymmetric": Mistake(
        lambda c: _given(c) and _kind(c) is Stationary and _several(c),
        ("InconsistentDerivativesError", "NotSymmetricError"), "hvp|hessian|symmetric",
    ),
    "unsolved": Mistake(lambda c: True, ("NotASolutionWarning",)),
    "closure": Mistake(lambda c: not _given(c) and not c.items, ("DerivativeError",), "depend on theta"),
    "NaN in y": Mistake(lambda c: not c.items, ("NonFiniteError",), r"\by\b"),
    "NaN in theta": Mistake(lambda c: not c.items, ("NonFiniteError",), "theta"),
    "NaN in cotangent": Mistake(lambda c: not c.items and c.entry == "vjp", ("NonFiniteError",), "cotangent"),
    "preconditioner NaN": Mistake(_bad_for("cg", "minres", "gmres"), **PRECONDITIONER),
    "preconditioner 0": Mistake(_bad_for("cg", "minres", "gmres"), **PRECONDITIONER),
    "preconditioner negative": Mistake(_bad_for("cg", "minres"), **PRECONDITIONER),
    "preconditioner asymmetric": Mistake(_bad_for("cg", "minres"), **PRECONDITIONER),
    "singular": Mistake(_several, ("SingularError", "NoiseError"), changed={"condition": np.inf}),
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
    n = case.n
    M = {"NaN": np.full(n, np.nan), "0": np.zeros(n), "negative": -np.ones(n),
         "asymmetric": np.eye(n) + 5 * np.eye(n, k=1)}[case.mistake.split()[-1]]  # fmt: skip
    return FRAMEWORKS[case.framework].array(M.astype(case.dtype))


def wrong(case: Case) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """Return what distorts the functions of the maker."""

    def distort(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        if case.mistake == "A doubled" and name == "A":
            return lambda Y, T, d: 2 * f(Y, T, d)
        if case.mistake == "hvp asymmetric" and name == "A":

            def lopsided(Y: Any, T: Any, d: Any) -> Any:
                A = f(Y, T, d)
                return A + 0.5 * (A[..., :1] * d["eye"][0])  # its first column counts half as much again

            return lopsided
        return f

    return distort


def replaced(problem: Posed, mistake: str) -> dict[str, Any]:
    """Functions of the condition that are wrong."""
    f = problem.functions()
    if mistake == "A transposed":
        jacobian = f["jacobian"]
        return {"jvp": f["vjp"], "vjp": f["jvp"], "jacobian": lambda Y, T, d: jacobian(Y, T, d).T}
    if mistake == "mixed_vjp negated":
        g = f["mixed_vjp"]
        return {"mixed_vjp": lambda Y, T, u, d: _mapped(g(Y, T, u, d), lambda x: -x)}
    if mistake == "mixed_jvp doubled":
        g = f["mixed_jvp"]
        return {"mixed_jvp": lambda Y, T, t, d: _mapped(g(Y, T, t, d), lambda x: 2 * x)}
    if mistake == "y - T for T":
        jvp, vjp, jacobian = f["jvp"], f["vjp"], f["jacobian"]
        less = lambda v, out: problem.split(problem.join(v) - problem.join(out), problem.cuts[0])
        return {"jvp": lambda Y, T, v, d: less(v, jvp(Y, T, v, d)), "vjp": lambda Y, T, u, d: less(u, vjp(Y, T, u, d)),
                "jacobian": lambda Y, T, d: problem.sparse(d["eye"]) - jacobian(Y, T, d)}  # fmt: skip
    if mistake == "closure":
        value, fun, at = f["value"], f["fun"], problem.point()[1]
        return {"value": lambda Y, T, d: value(Y, at, d), "fun": lambda Y, T, d: fun(Y, at, d)}
    return {}


# -- one case --------------------------------------------------------------------------------------------
_conditions: dict[tuple[Any, ...], Any] = {}


def posed(case: Case) -> Posed:
    """Return the problem of a case."""
    rng = np.random.default_rng([case.seed, 1])
    it = make(case.family, rng, case.n, case.condition, case.kind, (case.items,) if case.items else ())
    D, E, S = (scale(name, k, rng, case.dtype) for name, k in ((case.y, it.n), (case.theta, it.m), (case.F, it.n)))
    units = it.units(D, E, S, float(S[0]))
    distort = noisy(it, case.noise, case.seed) if case.noise else wrong(case)
    options = stated(case) if FAMILIES[case.family].kind is Stationary else {}
    lib = FRAMEWORKS[case.framework]
    return Posed(it, units, lib, case.source, case.dtype, case.tree, distort, options)


def stated(case: Case) -> dict[str, Any]:
    """What the user says about the stationary point, so that a saddle point is no surprise."""
    if "kind" not in inspect.signature(Stationary).parameters:
        return {}
    return {"kind": {"definite": "minimum", "negative": "maximum", "indefinite": "saddle"}[case.kind]}


def run(case: Case) -> Verdict:
    """Run a case, and judge it."""
    problem = posed(case)
    solver = case.solver
    if solver in ITERATIVE:  # n is at most 20
        more = {"preconditioner": preconditioner(case)} if case.mistake.startswith("preconditioner") else {}
        solver = ITERATIVE[solver](maxiter=300, **more)
    key = (case.framework, case.family, case.source, case.tree, case.n, case.kind)
    if case.framework != "jax" or (case.mistake and MISTAKES[case.mistake].in_functions):
        condition = problem.condition(**replaced(problem, case.mistake))
    else:  # one program for many cases
        condition = _conditions.setdefault(key, problem.condition())
    found = outcome(displaced(problem, case).call(condition, case.entry, solver=solver))
    error = np.inf
    if found.value is not None:
        error = worst(problem.base(case.entry, found.value), problem.instance.truth(case.entry), case)
    return judged(case, problem, found, error)


def displaced(problem: Posed, case: Case) -> Posed:
    """Return the problem with the point that the user gives: off, or with a NaN."""
    it, i = problem.instance, case.seed % case.n
    y, theta, v = it.y.copy(), it.theta.copy(), it.cotangent.copy()
    if case.mistake == "unsolved":
        y[..., i] *= 1.3
    elif case.mistake.startswith("NaN"):
        {"y": y, "theta": theta, "cotangent": v}[case.mistake.split()[-1]][..., i] = np.nan
    return replace(problem, instance=replace(it, y=y, theta=theta, cotangent=v))


def worst(got: np.ndarray, truth: np.ndarray, case: Case) -> float:
    """Relative error, the largest over the items."""
    if not case.items:
        got, truth = got[None], truth[None]
    flat = lambda x: x.reshape(len(x), -1)
    errors = np.linalg.norm(flat(got - truth), axis=1) / np.linalg.norm(flat(truth), axis=1)
    return float(np.max(np.where(np.isnan(errors), np.inf, errors)))


def accuracy(case: Case) -> float:
    """Relative error of the products of A."""
    eps = 2e-16 if case.dtype == "float64" else 1e-7
    power = {"differences": 2 / 3, "values": 1 / 2}.get(case.source, 1)
    return 10 * eps**power


def healthy(case: Case) -> bool:
    """Whether nothing may be told: exact, regular, condition at most 1e4 and the units those of leaves or a matrix."""
    if case.noise or case.mistake or case.condition > 1e4 or case.condition * accuracy(case) > 1e-3:
        return False
    free = case.solver in ITERATIVE and case.source not in {"matrix", "sparse"}
    return not (free and {"mixed", "few"} & {case.y, case.F})


def judged(case: Case, problem: Posed, found: Outcome, error: float) -> Verdict:
    """Classify what came of a case."""
    text = " | ".join(f"{type(e).__name__}: {str(e).splitlines()[0]}" for e in found.told)
    foreign = [e for e in found.told if not isinstance(e, (idf.ImplicitDiffError, idf.ImplicitDiffWarning))]
    if foreign:
        return Verdict(case, "misleading", error, text)
    if case.mistake:
        return Verdict(case, _mistake_word(case, found, error), error, text)
    if found.quiet:
        return Verdict(case, "right" if error <= 0.01 else "silent wrong", error, text)
    case = replace(case, condition=problem.instance.condition)
    if healthy(case):
        return Verdict(case, "false alarm", error, text)
    return Verdict(case, "told" if all(map(_plausible(case), found.told)) else "misleading", error, text)


def _mistake_word(case: Case, found: Outcome, error: float) -> str:
    """Whether the mistake was named."""
    mistake = MISTAKES[case.mistake]
    kinds = tuple(getattr(idf, name) for name in mistake.kinds if hasattr(idf, name)) or (idf.DerivativeError,)
    if any(isinstance(e, kinds) and re.search(mistake.pattern, str(e), re.IGNORECASE) for e in found.told):
        return "told"
    if mistake.harmless and found.quiet and error <= 0.01:
        return "right"
    return "misleading" if found.told else "silent wrong"


def _plausible(case: Case) -> Callable[[Exception], bool]:
    """Whether a word is one that an ill-conditioned or noisy case may bring."""
    names = {"SingularError", "NotConvergedError", "NotASolutionWarning", "SolveWarning"}
    if case.noise:
        names |= {"NoiseError", "RegularityWarning", "NotPositiveDefiniteError"}
    if case.condition * accuracy(case) > 1e-2:
        names |= {"NotPositiveDefiniteError", "NoiseError"}
    return lambda e: type(e).__name__ in names


# -- many ------------------------------------------------------------------------------------------------
def verdicts(framework: str, cases: int, seed: int = 0) -> Iterator[Verdict]:
    """Run so many cases."""
    for i in range(cases):
        case = draw(framework, seed + i)
        try:
            yield run(case)
        except Exception as error:  # of the fuzzer or of a user's function: a failure, with its seed
            yield Verdict(case, "misleading", np.inf, f"{type(error).__name__}: {error}")


def table(found: list[Verdict]) -> str:
    """Count the words by what makes the cases differ."""
    words = ("right", "told", *FAILURES)
    lines = [f"{'':24}" + "".join(f"{w:>14}" for w in words)]
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for v in found:
        c = v.case
        state = f"mistake: {c.mistake}" if c.mistake else f"noise: {c.noise}" if c.noise else \
            "condition <= 1e4" if c.condition <= 1e4 else "condition > 1e4"  # fmt: skip
        for name in ("all", f"{c.source}", f"{c.solver}", c.dtype, state):
            groups[name][v.word] += 1
    lines += [
        f"{name:24}" + "".join(f"{counts[w] or '':>14}" for w in words) for name, counts in sorted(groups.items())
    ]
    return "\n".join(lines)


def main() -> int:
    """Run from the command line; the exit status says whether there was a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="numpy")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="failures to print")
    options = parser.parse_args()
    found, failures = [], []
    for verdict in verdicts(options.framework, options.cases, options.seed):
        found.append(verdict)
        if verdict.failure:
            failures.append(verdict)
            if len(failures) <= options.show:
                print(verdict, flush=True)  # noqa: T201
    print(table(found))  # noqa: T201
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
