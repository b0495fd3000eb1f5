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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__:  # as python -m tests.fuzzing
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from conftest import Outcome, outcome
from families import FAMILIES
from fuzz_cases import (
    FRAMEWORKS,
    ITERATIVE,
    MISTAKES,
    Case,
    draw,
    noisy,
    preconditioner,
    replaced,
    scale,
    wrong,
    wrong_numbers,
)
from generated import Posed, make

import implicitdiff as idf
from implicitdiff import Stationary
from implicitdiff.verification.first_use import _verified

FAILURES = ("silent wrong", "false alarm", "misleading")


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
            "jit": False,
        }
        said = ", ".join(
            f"{k}={v if k != 'condition' else f'{v:.1e}'}" for k, v in asdict(c).items() if plain.get(k, ()) != v
        )
        return f"{self.word}: {said}\n    error {self.error:.2g}; {self.text or 'silent'}"


# -- one case --------------------------------------------------------------------------------------------
_made: dict[tuple[Any, ...], Any] = {}


def posed(case: Case) -> Posed:
    """Return the problem of a case."""
    rng = np.random.default_rng([case.seed, 1])
    it = make(case.family, rng, case.n, case.condition, case.kind, (case.items,) if case.items else ())
    D, E, S = (scale(name, k, rng, case.dtype) for name, k in ((case.y, it.n), (case.theta, it.m), (case.F, it.n)))
    units = it.units(D, E, S, float(S[0]))
    more = wrong_numbers(it, units.E, case.mistake)
    distort = noisy(it, case.noise, case.seed) if case.noise else wrong
    options = stated(case) if FAMILIES[case.family].kind is Stationary else {}
    lib = FRAMEWORKS[case.framework]
    return Posed(it, units, lib, case.source, case.dtype, case.tree, distort, options, more)


def functions(problem: Posed, case: Case) -> tuple[Any, Any]:
    """Return the condition and the loss; on JAX those of an earlier case, whose program is compiled."""
    if case.framework != "jax":
        in_functions = case.mistake and MISTAKES[case.mistake].in_functions
        return problem.condition(**(replaced(problem, case.mistake) if in_functions else {})), None
    if case.seed % 4 == 0 or (case.mistake and MISTAKES[case.mistake].in_functions):
        _verified.clear()  # what was given is checked once for the same functions; here the numbers are wrong
    key = (case.family, case.source, case.tree, case.n, case.kind, case.dtype, case.mistake == "closure")
    if key not in _made:
        _made[key] = problem.condition(**replaced(problem, case.mistake)), problem.logs()
    return _made[key]


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
        most = 1000 if solver == "bicgstab" else 300  # whose residual leaves the true one in single precision
        solver = ITERATIVE[solver](maxiter=most, **more)
    condition, outer = functions(problem, case)
    more = {"compiled": partial(jitted, case)} if case.jit else {}
    found = outcome(displaced(problem, case).call(condition, case.entry, outer, solver=solver, **more))
    if found.value is None:
        return judged(case, problem, found, np.inf)
    value = problem.base(case.entry, found.value)
    if case.jit and np.isnan(value).any():
        alarm = healthy(replace(case, condition=problem.instance.condition))
        return Verdict(case, "false alarm" if alarm else "told", np.inf, "NaN")
    error = worst(value, problem.instance.truth(case.entry), case)
    return judged(case, problem, found, error)


def jitted(case: Case, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call as JAX compiles it, or that of an earlier case of the same structure."""
    import jax

    key = replace(case, seed=0, condition=0.0, y="", theta="", F="", mistake=_program(case.mistake))
    return _made.setdefault(key, jax.jit(ask))


def _program(mistake: str) -> str:
    """Return the mistake, where it takes a program of its own."""
    return mistake if mistake and MISTAKES[mistake].compiled else ""


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
    with np.errstate(over="ignore"):
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
    return not hard(case)


def hard(case: Case) -> bool:
    """Whether units differ within a leaf for a method that sees products only: then a solve may fail, if it is told."""
    free = case.solver in ITERATIVE and case.source not in {"matrix", "sparse"}
    return free and bool({"mixed", "few"} & {case.y, case.F})


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
    if case.mistake == "singular" and case.solver == "cholesky":  # rounding may leave a negative eigenvalue
        kinds += (idf.NotPositiveDefiniteError,)
    if any(isinstance(e, kinds) and re.search(mistake.pattern, str(e), re.IGNORECASE) for e in found.told):
        return "told"
    if mistake.harmless and found.quiet and error <= 0.01:
        return "right"
    if hard(case) and found.told and all(map(_plausible(case), found.told)):
        return "told"
    return "misleading" if found.told else "silent wrong"


def _plausible(case: Case) -> Callable[[Exception], bool]:
    """Whether a word is one that an ill-conditioned or noisy case may bring."""
    names = {"SingularError", "NotConvergedError", "NotASolutionWarning", "SolveWarning"}
    if case.noise:
        names |= {"NoiseError", "RegularityWarning", "NotPositiveDefiniteError"}
    if case.noise or case.condition * accuracy(case) > 1e-4:
        names |= {"AccuracyWarning"}
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
