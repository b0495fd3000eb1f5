"""FAULTS 55 and 56: y → D y, θ → E θ, F → S F (f → c f) makes D (dy/dθ) E⁻¹ of dy/dθ, and changes nothing else.

A metamorphic suite. A problem from `generated` is posed in drawn units, from 1e-9 to 1e9, all equal or mixed within one
vector, powers of two or not, and the result is held against LAPACK's in the units of the maker. The cases are a
covering design: every pair of (family, source of derivatives, solver, entry, library, units of y, of θ, of F, tree)
that can occur does occur. ``--exhaustive`` draws some thousand more.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import JAX, NUMPY, READONLY, STRICT, TORCH, Library, Outcome, exact_solve, outcome
from families import FAMILIES, K, spectrum
from generated import SOURCES, Instance, Posed, make
from problems import SOLVERS_FOR

from implicitdiff import (
    KKT,
    QP,
    DerivativeError,
    FixedPoint,
    LogBarrier,
    NotASolutionWarning,
    NotPositiveDefiniteError,
    ProjectedGradient,
    ProximalGradient,
    SingularError,
    Stationary,
    implicit_vjp,
)

N = 4
ITERATIVE = ("cg", "minres", "gmres")
LIBS = {lib.name: lib for lib in (NUMPY, READONLY, STRICT, *TORCH)}
SCALES = ("one", "small", "large", "mixed", "powers of two", "leaves")
ACCURACY = {"differences": 2e-6, "values": 2e-3}
"""What is demanded; of products without truncation 1e-7, which is 1000 times the tolerance of an iterative solve."""


class Case(NamedTuple):
    """One row of the design."""

    family: str
    source: str
    solver: str
    entry: str
    library: str
    y: str
    theta: str
    F: str
    tree: bool
    zero: bool

    def __str__(self) -> str:
        words = (*self[:5], f"y {self.y}", f"theta {self.theta}", f"F {self.F}")
        return "-".join((*words, *(("tree",) if self.tree else ()), *(("zero",) if self.zero else ())))


FACTORS = (
    tuple(FAMILIES), SOURCES, ("lu", "cholesky", "ldlt", "cg", "minres", "gmres", "auto"),
    ("vjp", "jvp", "jacobian", "grad"), tuple(LIBS), SCALES, SCALES, SCALES, (False, True), (False, True),
)  # fmt: skip


def possible(case: Case) -> bool:
    """Whether there is such a case: a solver for the structure, a source on the library, leaves in a tree."""
    general = FAMILIES[case.family].kind is not Stationary
    solvers = (*SOLVERS_FOR["general" if general else "positive definite"], *(() if general else ("ldlt",)))
    sources = {"torch": {"products", "matrix", "autodiff"},
               "array_api_strict": {"products", "matrix", "differences", "values"}}  # fmt: skip
    return (
        case.solver in solvers
        and case.source in sources.get(case.library, SOURCES)
        and not (general and case.source == "values")
        and (case.tree or "leaves" not in (case.y, case.theta, case.F))
        and not (case.F == "one" and FAMILIES[case.family].kind is FixedPoint and case.y != "one")  # F has those of y
    )


def draw(rng: np.random.Generator) -> Case:
    """Return a possible case."""
    while True:
        case = Case(*(levels[rng.integers(len(levels))] for levels in FACTORS))
        if possible(case):
            return case


def covering(seed: int = 0, tries: int = 40, patience: int = 12) -> list[Case]:
    """Rows such that all pairs of levels occur that can: the one of several drawn that brings most, again and again."""
    rng, seen, found, idle = np.random.default_rng(seed), set(), [], 0
    while idle < patience:
        drawn = [draw(rng) for _ in range(tries)]
        new = [set(itertools.combinations(enumerate(case), 2)) - seen for case in drawn]
        best = max(range(tries), key=lambda i: len(new[i]))
        idle = 0 if new[best] else idle + 1
        if new[best]:
            seen |= new[best]
            found.append(drawn[best])
    return found


def scale(name: str, size: int, cut: int, rng: np.random.Generator) -> np.ndarray:
    """Factors of that name for a vector whose leaves meet at ``cut``."""
    exponents = rng.permutation(np.linspace(-9, 9, size))
    return {
        "one": np.ones(size), "small": np.full(size, 1e-9), "large": np.full(size, 1e9), "mixed": 10.0**exponents,
        "powers of two": 2.0 ** np.round(3 * exponents), "leaves": np.where(np.arange(size) < cut, 1e-7, 1e6),
    }[name]  # fmt: skip


def posed(case: Case, lib: Library, rng: np.random.Generator, instance: Instance | None = None) -> Posed:
    """Return the problem of a case, in its units."""
    it = instance or make(case.family, rng, N, zero=case.zero)
    D, E, S = (scale(name, size, cut, rng) for name, size, cut in
               ((case.y, it.n, it.n // 2), (case.theta, it.m, K), (case.F, it.n, it.n // 2)))  # fmt: skip
    return Posed(it, it.units(D, E, S, float(S[0])), lib, case.source, tree=case.tree)


def has_to_be_right(case: Case) -> bool:
    """Whether an answer is demanded: not of a method without a matrix whose units are mixed within a leaf.

    Nor where a coordinate is 0 to a difference and its unit is not that of its leaf: a step is found, or it is told.
    """
    units = {case.y} if FAMILIES[case.family].kind is not FixedPoint else {case.y, case.F}
    units |= {case.F} if case.source != "values" else set()
    mixed, free = units & {"mixed", "powers of two"}, case.source not in {"matrix", "sparse"}
    if case.solver in ITERATIVE and free and mixed:
        return False
    return not (case.zero and differenced(case) and mixed)


def differenced(case: Case) -> bool:
    """Whether a difference is taken somewhere: of the loss, too, where a library has nothing better."""
    return case.source in {"differences", "values"} or (case.entry == "grad" and case.library == "array_api_strict")


def check(problem: Posed, entry: str, found: Outcome, demanded: bool = True) -> None:
    """Right to the accuracy of the source, without a word; where it is not demanded, right or told."""
    if not demanded and not found.quiet:
        return
    assert found.quiet, found.text
    value, report = found.value
    truth, got = problem.instance.truth(entry), problem.base(entry, value)
    error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    bound = ACCURACY.get(problem.source, 2e-6 if (entry, problem.lib) == ("grad", STRICT) else 1e-7)
    assert error <= (bound if demanded else 1e-2), f"relative error {error:.2g}, {report}"
    assert np.all(report.converged), str(report)


FOUND = [Case("tanh_map", "complex step", "auto", "vjp", "numpy", "powers of two", "mixed", "large", False, False)]
"""What only the long run met, and was wrong."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the design to the test that runs it."""
    if "case" in metafunc.fixturenames:
        cases = [*covering(), *FOUND]
        if metafunc.config.getoption("--exhaustive", default=False):
            rng = np.random.default_rng(1)
            cases = list(dict.fromkeys([*cases, *(draw(rng) for _ in range(5000))]))
        metafunc.parametrize("case", cases, ids=str)


def test_same_result_in_any_units(case: Case) -> None:
    rng = np.random.default_rng(sum(map(ord, str(case))))
    problem = posed(case, LIBS[case.library], rng)
    call = problem.call(problem.condition(), case.entry, solver=case.solver, return_report=True)
    check(problem, case.entry, outcome(call), has_to_be_right(case))


JAX_PROGRAMS = [
    ("quartic", "autodiff", "cg", "vjp", True), ("waves", "autodiff", "gmres", "vjp", True),
    ("softmax", "matrix", "cholesky", "jvp", False), ("tanh_map", "products", "auto", "vjp", False),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", JAX_PROGRAMS, ids=lambda p: "-".join(p[:4]))
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_same_result_in_any_units_on_jax(lib: Library, program: tuple[Any, ...]) -> None:
    """The units are arguments: one compiled program serves them all, and each is right."""
    family, source, solver, entry, tree = program
    names = ("one", "small", "large", "leaves") if tree else ("one", "small", "large", "mixed")
    it, condition, wrong = make(family, np.random.default_rng(0), N), None, []
    for i, name in enumerate(names):
        case = Case(family, source, solver, entry, "jax", name, names[i - 1], names[i - 2], tree, False)
        problem = posed(case, lib, np.random.default_rng(i), it)
        condition = condition or problem.condition()
        found = outcome(problem.call(condition, entry, solver=solver, return_report=True))
        try:
            check(problem, entry, found)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join(wrong)


# -- constraints: one problem, five conditions -----------------------------------------------------------
class Bounded:
    """min (y − θ)ᵀ H (y − θ) / 2 over y <= u, y[0] = u[0] with a multiplier of 0.7, in given units."""

    def __init__(self, lib: Library, name: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lib, self.H = lib, spectrum(rng, N, 10.0, "definite")
        self.u = rng.uniform(1.0, 2.0, N) * rng.choice([-1.0, 1.0], N)
        self.slack = np.array([0.0, 0.6, 0.9, 1.3])
        self.D, self.E, self.s = (scale(name, N, N // 2, rng) for _ in range(3))
        self.c = float(self.s[0])
        self.v = rng.normal(size=N)

    def f(self, Y: Any, T: Any) -> Any:
        D, E, H = map(self.lib.array, (self.D, self.E, self.H))
        z = Y / D - T / E
        return self.c * self.lib.xp.sum(z * (H @ z)) / 2

    def g(self, Y: Any, T: Any) -> Any:
        D, u, s = map(self.lib.array, (self.D, self.u, self.s))
        return s * (Y / D - u)

    def clip(self, x: Any) -> Any:
        bound = self.lib.array(self.u * self.D)
        return self.lib.xp.where(x > bound, bound, x)

    def active(self, by: np.ndarray) -> np.ndarray:
        """dy/dθ where only the free coordinates move, by right-hand sides −``by``."""
        J, free = np.zeros((N, N)), slice(1, None)
        J[free] = -exact_solve_columns(self.H[free, free], by[free])
        return J

    def posed(self, kind: str) -> tuple[Any, np.ndarray, Any, np.ndarray]:
        """Condition, y, θ and dy/dθ, the last three in base units."""
        y = self.u - self.slack
        theta = y + np.linalg.solve(self.H, 0.7 * (np.arange(N) == 0))
        J = self.active(-self.H)
        if kind == "LogBarrier":
            y, t = self.u - self.slack - 0.1, 8.0
            theta = y + np.linalg.solve(self.H, 1 / (t * (self.u - y)))
            J = exact_solve_columns(t * self.H + np.diag((self.u - y) ** -2.0), t * self.H)
            return LogBarrier(self.f, ineq=self.g, t=t / self.c), y, theta, J
        if kind == "QP":
            Q, G, h = self.c * self.H / np.outer(self.D, self.D), np.diag(self.s / self.D), self.s * self.u
            return QP(*(self.lib.array(x) if x is not None else None for x in (Q, None, None, None, G, h))), y, theta, J
        if kind == "KKT":
            return KKT(self.f, ineq=self.g), y, theta, J
        step = float(np.min(self.D) ** 2 / self.c)
        if kind == "ProjectedGradient":
            return ProjectedGradient(self.f, lambda x, theta: self.clip(x), step=step), y, theta, J
        return ProximalGradient(self.f, lambda x, theta, step: self.clip(x), step=step), y, theta, J


def exact_solve_columns(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.stack([exact_solve(A, b) for b in B.T], axis=-1)


@pytest.mark.parametrize("units", ["one", "small", "large", "mixed"])
@pytest.mark.parametrize("kind", ["KKT", "QP", "LogBarrier", "ProjectedGradient", "ProximalGradient"])
@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
def test_constraints_in_any_units(lib: Library, kind: str, units: str) -> None:
    problem = Bounded(lib, units)
    condition, y, theta, J = problem.posed(kind)
    Y, T = lib.array(y * problem.D), lib.array(theta * problem.E)
    E = problem.E
    if kind == "QP":  # its parameter is q = −c Hθ / D
        E, J = problem.c / problem.D, problem.active(np.eye(N))
        T = {"q": lib.array(-(problem.H @ theta) * E)}
    found = outcome(lambda: implicit_vjp(condition, Y, T, lib.array(problem.v / problem.D)))
    if (kind, units) == ("ProximalGradient", "mixed") and not found.quiet:
        return  # its step is one number with the unit y² / f, which has to be told if it is too small to see the bound
    assert found.quiet, found.text
    got = lib.numpy(found.value["q"] if kind == "QP" else found.value) * E
    truth = J.T @ problem.v
    bound = 1e-4 if lib is NUMPY and kind != "QP" else 1e-8  # f seen by differences of its values
    assert np.linalg.norm(got - truth) <= bound * np.linalg.norm(truth)


# -- what is told does not depend on units ---------------------------------------------------------------
def unsolved(it: Instance) -> tuple[Instance, type]:
    """The second coordinate of y is 10 % off."""
    y = it.y.copy()
    y[1] *= 1.1
    return replace(it, y=y), NotASolutionWarning


def singular(it: Instance) -> tuple[Instance, type]:
    """One direction of y is free."""
    values, Q = np.linalg.eigh(it.data["H"])
    H = (Q * np.where(np.arange(N) == 0, 0.0, values)) @ Q.T
    data = {**it.data, "H": (H + H.T) / 2}
    theta = it.theta.copy()
    theta[K:] = 0
    theta[K:] = it.family.F(np, data, it.y, theta)
    return replace(it, data=data, theta=theta), SingularError


def indefinite(it: Instance) -> tuple[Instance, type]:
    """A has two negative eigenvalues, for a method that wants none."""
    return make("quadratic", np.random.default_rng(3), N, kind="indefinite"), NotPositiveDefiniteError


def blind(it: Instance) -> tuple[Instance, type]:
    """F does not see θ."""
    theta = it.theta.copy()
    F = it.family.F
    family = it.family._replace(
        F=lambda xp, d, y, t: F(xp, d, y, theta), B=lambda xp, d, y, t: 0 * it.family.B(xp, d, y, t)
    )
    return replace(it, family=family), DerivativeError


TOLD = [
    (unsolved, "products", "lu"), (unsolved, "matrix", "cholesky"), (unsolved, "matrix", "cg"),
    (unsolved, "differences", "auto"), (unsolved, "complex step", "auto"), (singular, "products", "lu"),
    (singular, "matrix", "auto"), (singular, "matrix", "minres"), (singular, "complex step", "cholesky"),
    (singular, "differences", "auto"), (indefinite, "matrix", "cg"), (indefinite, "products", "cholesky"),
    (blind, "differences", "auto"), (blind, "products", "lu"),
]  # fmt: skip


@pytest.mark.parametrize("units", ["one", "small", "large", "mixed"])
@pytest.mark.parametrize(("fault", "source", "solver"), TOLD, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_is_told_does_not_depend_on_units(fault: Any, source: str, solver: str, units: str) -> None:
    it, kind = fault(make("quadratic", np.random.default_rng(2), N))
    case = Case("quadratic", source, solver, "vjp", "numpy", units, units, units, False, False)
    problem = posed(case, NUMPY, np.random.default_rng(0), it)
    found = outcome(problem.call(problem.condition(), "vjp", solver=solver))
    kinds = {kind, NotPositiveDefiniteError} if (fault, solver) == (singular, "cholesky") else {kind}
    assert len(found.told) == 1, found.text or "silent"
    assert type(found.told[0]) in kinds, found.text


@pytest.mark.parametrize("source", ["products", "autodiff", "differences", "values"])
@pytest.mark.parametrize("units", ["one", "small", "large", "mixed"])
def test_a_solution_to_nine_digits_is_one_in_any_units(source: str, units: str) -> None:
    it = make("quartic", np.random.default_rng(4), N, condition=1e3)
    it = replace(it, y=it.y * (1 + 1e-9 * np.random.default_rng(5).normal(size=N)))
    case = Case("quartic", source, "auto", "jvp", "numpy", units, units, units, False, False)
    problem = posed(case, NUMPY, np.random.default_rng(0), it)
    check(problem, "jvp", outcome(problem.call(problem.condition(), "jvp", return_report=True)))
