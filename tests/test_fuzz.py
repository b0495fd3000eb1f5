"""A few hundred cases of the fuzzer, and the fuzzer itself; ``python -m tests.fuzzing`` runs for long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import JAX, NUMPY, STRICT, TORCH, Library, Outcome
from families import FAMILIES
from fuzz_cases import MISTAKES, Case, draw
from fuzzing import judged, posed, run, table, verdicts
from generated import analytic, make

from implicitdiff import SingularError

COUNTS = {"numpy": 80, "array_api_strict": 12, "torch": 60, "jax": 12}
OPEN: dict[tuple[str, int], str] = {}
"""Failures that are known, by framework and seed, and why; one that is mended has to go from here."""
PARTS = [(NUMPY, 0), (NUMPY, 1), (NUMPY, 2), (STRICT, 0), *((lib, 0) for lib in (*TORCH, *JAX))]


@pytest.mark.slow
@pytest.mark.parametrize(("lib", "part"), PARTS, ids=[f"{lib.name}-{part}" for lib, part in PARTS])
def test_nothing_is_wrong_in_silence(lib: Library, part: int, request: pytest.FixtureRequest) -> None:
    """Right, or told; no false alarm, and the cause that is named is the cause."""
    long = request.config.getoption("--exhaustive", default=False)
    count = 10_000 if long else COUNTS[lib.name]
    found = list(verdicts(lib.name, count, seed=part * count))
    failures = [v for v in found if v.failure and (long or (lib.name, v.case.seed) not in OPEN)]
    assert not failures, "\n".join([table(found), *map(str, failures[:20])])
    mended = [v.case.seed for v in found if not v.failure and (lib.name, v.case.seed) in OPEN]
    assert not mended, f"no longer open: {mended}"


def test_the_truth_is_analytic() -> None:
    """A and B of every family are the derivatives of its F, and F is that of its objective: by the complex step."""
    assert analytic() == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e10, np.inf])
def test_the_condition_is_the_one_asked_for(family: str, condition: float) -> None:
    found = make(family, np.random.default_rng(0), 6, condition).condition
    assert condition / 4 <= found <= 4 * condition if condition < np.inf else found > 1e14


def test_cases_follow_from_their_seeds() -> None:
    """A case is drawn again as it was, and every mistake is drawn now and then."""
    cases = [draw("numpy", seed) for seed in range(3000)]
    assert cases[::300] == [draw("numpy", seed) for seed in range(0, 3000, 300)]
    assert {case.mistake for case in cases} == {"", *MISTAKES}
    assert str(run(cases[0])) == str(run(cases[0]))


FOUND = [
    # what rounding of A leaves, times the condition number
    (410833, "softmax", "float32", 5, "negative", 6.7e6, "products", "lu", "jacobian", "one", "one", "one", False, 0,
     ""),
    (300025, "waves", "float32", 5, "general", 1.6e6, "differences", "auto", "jacobian", "one", "large", "one", True, 0,
     ""),
    (444466, "tanh_map", "float32", 2, "general", 7.1e5, "autodiff", "lu", "vjp", "small", "few", "small", True, 3,
     ""),
    (80127, "tanh_map", "float32", 8, "general", np.inf, "sparse", "gmres", "jacobian", "mixed", "one", "small", False,
     0, ""),
    # noise: zeros of GMRES, steps far beyond y, a natural length taken from theta
    (411715, "kepler", "float64", 8, "general", 5.1, "differences", "gmres", "grad", "mixed", "one", "one", True, 3,
     "random 1e-4"),
    (415275, "kepler", "float64", 8, "general", 24.0, "differences", "lu", "grad", "small", "one", "few", True, 0,
     "random 1e-2"),
    (417055, "waves", "float64", 8, "general", 7.1e4, "differences", "auto", "jvp", "one", "large", "one", False, 0,
     "fixed 1e-8"),
]  # fmt: skip
"""Failures of long runs, from other seeds: each was one."""


@pytest.mark.parametrize("fields", FOUND, ids=lambda fields: f"{fields[0]}")
def test_what_long_runs_found(fields: tuple[object, ...]) -> None:
    mistake = "singular" if fields[5] == np.inf else ""
    case = Case(fields[0], "numpy", *fields[1:], mistake)  # type: ignore[arg-type, call-arg]
    verdict = run(case)
    assert not verdict.failure, str(verdict)


ONCE = {
    "numpy": {
        910479: "rounding of y far from it is no kink", 914732: "nor in an item of a batch",
        1020927: "nor is it what shows that a map sees y", 1002716: "and a kink of noise is noise in a batch, too",
        914311: "a second opinion that stagnated is no noise", 913953: "rounded beside what is not",
        716977: "singular by rounding, and gmres", 1049156: "rounded, one unit at every step",
        1020318: "an item that needs fewer steps than others",
        1002530: "what cancels in I - T where the solution is small", 1023754: "not symmetric, seen by some columns",
        1202177: "noise of products above a limit", 1208613: "singular to what cancels in I - T",
        1305660: "rounding of a row is no kink of an entry",
        1505365: "entries of a symmetric A are rounded in pairs", 1501569: "a preconditioner hid units",
        1307848: "and with it what it is", 1204474: "asymmetry in mixed units",
        1207075: "two opinions that agreed by accident", 2006489: "noise that counted twice in I - T",
        5006727: "single precision, told too late", 6010255: "a step of bicgstab that was too long",
        6009166: "the same, and singular", 6116139: "two opinions that agreed, of a noise in B",
    },
    "torch": {
        500094: "singular in single precision", 501514: "the same", 504001: "off, in a unit of its own",
        706231: "blamed on a Hessian", 800509: "a fixed point under gmres",
        2006152: "bicgstab in single precision", 7008898: "a step of it that was too long", 7009361: "the same",
    },
    "jax": {
        600641: "minres with a matrix, ill-conditioned", 1002331: "mixed units, compiled",
        1202789: "an A in single precision that is made twice, and differs",
    },
}  # fmt: skip
"""Seeds that failed, and the kind."""


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    ("framework", "seed"),
    [(lib.name, seed) for lib in (NUMPY, *TORCH, *JAX) for seed in ONCE[lib.name]],
    ids=lambda x: str(x),
)
def test_what_went_wrong_once(framework: str, seed: int) -> None:
    verdict = run(draw(framework, seed))
    assert not verdict.failure, str(verdict)


HEALTHY = Case(0, "numpy", "quartic", "float64", 3, "definite", 10.0, "products", "lu", "vjp", "one", "one", "one",
               False, 0, "", "")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told", "error", "word"),
    [
        ({}, False, 1e-9, "right"), ({}, False, 0.02, "silent wrong"), ({}, True, np.inf, "false alarm"),
        ({"condition": 1e12}, True, np.inf, "told"), ({"condition": 1e12}, False, 0.02, "silent wrong"),
        ({"mistake": "singular"}, True, np.inf, "told"), ({"mistake": "singular"}, False, 0.0, "silent wrong"),
        ({"mistake": "NaN in y"}, True, np.inf, "misleading"), ({"noise": "random 1e-6"}, True, np.inf, "told"),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, object], told: bool, error: float, word: str) -> None:
    """The fuzzer can fail: what it would say of an outcome."""
    case = replace(HEALTHY, **changes)  # type: ignore[arg-type]
    found = Outcome(error=SingularError("A is singular")) if told else Outcome(value=0.0)
    assert judged(case, posed(case), found, error).word == word
