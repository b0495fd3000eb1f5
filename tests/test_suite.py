"""Every condition, way of giving derivatives, solver, mode, library, precision and batch against closed forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from conftest import LIBRARIES, Library, relative_error
from problems import PROBLEMS, SOLVERS_FOR, STRUCTURES, TIGHT, Problem

from implicitdiff import (
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
)
from implicitdiff.backends.numpy import NumpyBackend

MIXED = ("mixed_vjp", "mixed_jvp")
STATIONARY_GIVEN: dict[str, tuple[str, ...]] = {
    "all": ("fun", "grad", "hvp", *MIXED),
    "products": ("hvp", *MIXED),
    "hessian": ("grad", "hessian", *MIXED),
    "mixed_vjp only": ("hvp", "mixed_vjp"),
    "mixed_jvp only": ("hvp", "mixed_jvp"),
    "mixed_vjp and grad": ("grad", "hvp", "mixed_vjp"),
    "mixed_jvp and grad": ("grad", "hvp", "mixed_jvp"),
}
ROOT_GIVEN: dict[str, tuple[str, ...]] = {
    "all": ("fun", "jvp", "vjp", *MIXED),
    "jvp only": ("fun", "jvp", *MIXED),
    "vjp only": ("fun", "vjp", *MIXED),
    "jacobian": ("fun", "jacobian", *MIXED),
    "mixed_vjp only": ("fun", "jvp", "vjp", "mixed_vjp"),
    "mixed_jvp only": ("fun", "jvp", "vjp", "mixed_jvp"),
}
DERIVED: dict[str, tuple[str, ...]] = {
    "fun": ("fun",),
    "grad": ("grad",),
    "hvp and grad": ("grad", "hvp"),
    "jvp and fun": ("fun", "jvp"),
    "vjp and fun": ("fun", "vjp"),
    "jacobian and fun": ("fun", "jacobian"),
    "mixed_vjp and fun": ("fun", "mixed_vjp"),
}
BATCHES = pytest.mark.parametrize("items", [(), (4,)], ids=["single", "batched"])
PRECISIONS = pytest.mark.parametrize("dtype", ["float64", "float32"])
SETTINGS = pytest.mark.parametrize(
    ("items", "dtype"), [((), "float64"), ((4,), "float64"), ((), "float32")], ids=["single", "batched", "float32"]
)
LIBS = pytest.mark.parametrize("lib", LIBRARIES[:2], ids=lambda lib: lib.name)
EXACT = {"float64": 1e-10, "float32": 1e-4}
TWO_SOLVERS = {  # one that assembles, one that multiplies
    "general": ("lu", "gmres"),
    "positive definite": ("cholesky", "cg"),
    "indefinite": ("auto", "minres"),
    "negative definite": ("lu", "minres"),
}


def given_for(name: str) -> dict[str, tuple[str, ...]]:
    return ROOT_GIVEN if STRUCTURES[name] == "general" else STATIONARY_GIVEN


def cases(choices: Callable[[str], Any], solvers: Mapping[str, tuple[str, ...]] = SOLVERS_FOR) -> list[Any]:
    """Each problem with each choice for it and each solver that is right for its A."""
    return [
        pytest.param(name, choice, solver, id=f"{name}-{choice}-{solver}")
        for name in PROBLEMS
        for choice in choices(name)
        for solver in solvers[STRUCTURES[name]]
    ]


def build(lib: Library, name: str, dtype: str, items: tuple[int, ...] = ()) -> Problem:
    return PROBLEMS[name](lib.xp, getattr(lib.xp, dtype), items)


def solver_for(name: str, dtype: str) -> Any:
    """Return the solver: in double precision with a tolerance below that of the test."""
    return TIGHT.get(name, name) if dtype == "float64" else name


def check(lib: Library, got: Any, truth: np.ndarray, like: Any, rtol: float) -> None:
    assert lib.owns(got)
    assert got.dtype == like.dtype
    error = relative_error(lib, got, truth)
    assert error <= rtol, f"relative error {error:.3g}"


def check_all(lib: Library, problem: Problem, condition: Any, rtol: float, **options: Any) -> dict[str, str]:
    """Check VJP, JVP and Jacobian from one linearisation; return where its derivatives came from."""
    lin = linearize(condition, problem.y, problem.theta, **options)
    check(lib, lin.vjp(problem.cotangent), problem.truth.vjp, problem.theta, rtol)
    assert lin.report is not None
    assert np.all(lib.numpy(lin.report.converged) if problem.y.ndim > 1 else lin.report.converged)
    check(lib, lin.jvp(problem.tangent), problem.truth.jvp, problem.y, rtol)
    check(lib, lin.jacobian(), problem.truth.jacobian, problem.y, rtol)
    return lin.report.derivatives


@pytest.mark.parametrize(  # batches of the generic library: in test_modes
    ("lib", "items"), [(LIBRARIES[0], ()), (LIBRARIES[0], (4,)), (LIBRARIES[1], ())], ids=["numpy", "batched", "strict"]
)
@pytest.mark.parametrize(("name", "given", "solver"), cases(given_for))
def test_given_derivatives(lib: Library, name: str, given: str, solver: str, items: tuple[int, ...]) -> None:
    """Whatever is given of the exact derivatives, the result is exact."""
    problem = build(lib, name, "float64", items)
    condition = problem.condition(*given_for(name)[given])
    options = {"solver": solver_for(solver, "float64"), "batched": bool(items)}
    derivatives = check_all(lib, problem, condition, EXACT["float64"], **options)
    assert derivatives["A"].startswith("given")
    assert derivatives["B"].startswith("given")


@LIBS
@pytest.mark.parametrize(("name", "given", "solver"), cases(given_for))
def test_given_derivatives_in_single_precision(lib: Library, name: str, given: str, solver: str) -> None:
    """The same in float32, with the solvers' default tolerances."""
    problem = build(lib, name, "float32")
    check_all(lib, problem, problem.condition(*given_for(name)[given]), EXACT["float32"], solver=solver)


SCIPY_MATRICES: dict[str, Callable[[np.ndarray], Any]] = {
    "csr_array": scipy.sparse.csr_array,
    "csc_matrix": scipy.sparse.csc_matrix,
    "coo_array": scipy.sparse.coo_array,
    "LinearOperator": scipy.sparse.linalg.aslinearoperator,
}


@PRECISIONS
@pytest.mark.parametrize(("name", "form", "solver"), cases(lambda name: SCIPY_MATRICES))
def test_scipy_matrices(name: str, form: str, solver: str, dtype: str) -> None:
    """A Hessian or Jacobian may be a SciPy sparse matrix or LinearOperator."""
    problem = build(LIBRARIES[0], name, dtype)
    matrix, first = ("jacobian", "fun") if STRUCTURES[name] == "general" else ("hessian", "grad")
    dense = problem.functions[matrix]
    wrapped = {matrix: lambda y, theta: SCIPY_MATRICES[form](dense(y, theta))}
    condition = problem.condition(first, *MIXED, **wrapped)
    check_all(LIBRARIES[0], problem, condition, EXACT[dtype], solver=solver_for(solver, dtype))


# -- every way to ask ------------------------------------------------------------------------------------
def by_vjp(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_vjp(c, p.y, p.theta, p.cotangent, **o)


def by_jvp(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_jvp(c, p.y, p.theta, p.tangent, **o)


def by_jacobian(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_jacobian(c, p.y, p.theta, **o)


def by_cotangent(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_grad(c, p.cotangent, p.y, p.theta, **o)


def by_wrapped_vjp(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_function(c, **o)(p.solution).vjp(p.theta, p.cotangent)


def by_wrapped_jvp(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_function(c, **o)(p.solution).jvp(p.theta, p.tangent)


def by_wrapped_jacobian(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_function(c, **o)(p.solution).jacobian(p.theta)


def by_wrapped_linearization(p: Problem, c: Any, **o: Any) -> Any:
    return implicit_function(c, **o)(p.solution).linearize(p.theta).vjp(p.cotangent)


MODES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "vjp": (by_vjp, "vjp", "theta"),
    "jvp": (by_jvp, "jvp", "y"),
    "jacobian": (by_jacobian, "jacobian", "y"),
    "grad of a cotangent": (by_cotangent, "vjp", "theta"),
    "implicit_function.vjp": (by_wrapped_vjp, "vjp", "theta"),
    "implicit_function.jvp": (by_wrapped_jvp, "jvp", "y"),
    "implicit_function.jacobian": (by_wrapped_jacobian, "jacobian", "y"),
    "implicit_function.linearize": (by_wrapped_linearization, "vjp", "theta"),
}


@SETTINGS
@LIBS
@pytest.mark.parametrize(("name", "mode", "solver"), cases(lambda name: MODES))
def test_modes(lib: Library, name: str, mode: str, solver: str, items: tuple[int, ...], dtype: str) -> None:
    """Every function of the library gives the same derivative."""
    problem = build(lib, name, dtype, items)
    call, which, like = MODES[mode]
    condition = problem.condition(*given_for(name)["all"])
    got = call(problem, condition, solver=solver_for(solver, dtype), batched=bool(items))
    check(lib, got, getattr(problem.truth, which), getattr(problem, like), EXACT[dtype])


@PRECISIONS
@BATCHES
@LIBS
@pytest.mark.parametrize("name", PROBLEMS)
def test_total_gradient(lib: Library, name: str, items: tuple[int, ...], dtype: str) -> None:
    """Both terms of dL/dθ; the derivatives of L are the backend's own, and the report says which."""
    problem = build(lib, name, dtype, items)
    condition = problem.condition(*given_for(name)["all"])
    # autograd, once imported anywhere, is asked first: the complex step is asked for by name
    backend = NumpyBackend("complex_step") if lib.xp is np else None
    got, report = implicit_grad(
        condition, problem.outer, problem.y, problem.theta, batched=bool(items), backend=backend, return_report=True
    )
    rtol = {"complex step": 1e-10, "finite differences": 1e-8}[report.derivatives["outer"]]
    check(lib, got, problem.truth.gradient, problem.theta, max(rtol, EXACT[dtype]))


# -- derivatives that nobody gave ------------------------------------------------------------------------
ENGINES = ("array_api_strict", "complex_step", "finite_differences")


def derived_for(name: str) -> list[str]:
    return [key for key, names in DERIVED.items() if set(names) <= set(PROBLEMS[name](np, np.float64).functions)]


def tolerance(problem: Problem, names: tuple[str, ...], backend: str, dtype: str) -> float:
    """Return what the derivation can give: second differences of values are worth half the digits."""
    second = problem.kind is Stationary and "grad" not in names
    if dtype == "float32":
        return EXACT[dtype]
    if backend == "complex_step":
        return 1e-7 if second else 1e-10
    return 1e-5 if second else 1e-8


@pytest.mark.parametrize(
    ("backend", "items", "dtype"),
    [
        *((backend, (), dtype) for backend in ENGINES for dtype in ("float64", "float32")),
        *((backend, (2,), "float64") for backend in ENGINES),
    ],
)
@pytest.mark.parametrize(("name", "given", "solver"), cases(derived_for, TWO_SOLVERS))
def test_derived(name: str, given: str, solver: str, backend: str, items: tuple[int, ...], dtype: str) -> None:
    """What is not given is derived: exactly where the complex step can be taken, else by differences."""
    lib = LIBRARIES[1] if backend == "array_api_strict" else LIBRARIES[0]
    problem = build(lib, name, dtype, items)
    engine = None if backend == "array_api_strict" else NumpyBackend(backend)
    exact = backend == "complex_step" and "fun" not in given
    options = {"solver": TIGHT.get(solver, solver) if exact and dtype == "float64" else solver}
    rtol = tolerance(problem, DERIVED[given], backend, dtype)
    check_all(lib, problem, problem.condition(*DERIVED[given]), rtol, backend=engine, batched=bool(items), **options)


@pytest.mark.parametrize(("name", "given"), [(n, g) for n in PROBLEMS for g in derived_for(n)])
def test_derived_with_autograd(name: str, given: str) -> None:
    """Functions written with HIPS autograd have exact derivatives."""
    anp = pytest.importorskip("autograd.numpy")
    problem = PROBLEMS[name](anp, np.float64)
    condition, backend = problem.condition(*DERIVED[given]), NumpyBackend("autograd")
    derivatives = check_all(LIBRARIES[0], problem, condition, EXACT["float64"], solver="lu", backend=backend)
    assert "finite differences" not in derivatives.values()
    gradient, report = implicit_grad(
        condition, problem.outer, problem.y, problem.theta, backend=backend, solver="lu", return_report=True
    )
    check(LIBRARIES[0], gradient, problem.truth.gradient, problem.theta, EXACT["float64"])
    assert report.derivatives["outer"] == "autodiff"
