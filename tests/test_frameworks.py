"""Torch and JAX: every condition, solver, mode, precision and batch against closed forms, eager and compiled.

One file of problems, written against an array namespace, serves every backend; `test_suite` runs it on the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from frameworks import EACH, framework
from problems import PROBLEMS, SOLVERS_FOR, STRUCTURES, TIGHT, Problem

from implicitdiff import (
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)

pytestmark = pytest.mark.cover(together=True)
EXACT = {"float64": 1e-10, "float32": 1e-4}
PAIRS = [(problem, solver) for problem in PROBLEMS for solver in SOLVERS_FOR[STRUCTURES[problem]]]
TWO = {
    "general": ("lu", "gmres"), "positive definite": ("cholesky", "cg"), "indefinite": ("auto", "minres"),
    "negative definite": ("lu", "minres"),
}  # fmt: skip
FEW = [(problem, solver) for problem in PROBLEMS for solver in TWO[STRUCTURES[problem]]]
GIVEN = {
    "general": ("fun", "jvp", "vjp", "mixed_vjp", "mixed_jvp"),
    "symmetric": ("fun", "grad", "hvp", "mixed_vjp", "mixed_jvp"),
}


def build(fw: Any, problem: str, dtype: str = "float64", items: tuple[int, ...] = ()) -> Problem:
    return PROBLEMS[problem](fw.xp, getattr(fw.xp, dtype), items)


def given(problem: str) -> tuple[str, ...]:
    return GIVEN.get(STRUCTURES[problem], GIVEN["symmetric"])


def check(fw: Any, got: Any, truth: np.ndarray, rtol: float = 1e-10) -> None:
    got = fw.numpy(got)
    assert got.shape == truth.shape
    assert np.linalg.norm(got - truth) <= rtol * np.linalg.norm(truth)


def check_modes(fw: Any, p: Problem, condition: Any, rtol: float, **options: Any) -> None:
    """Every mode of the public functions, with its report."""
    got, report = implicit_vjp(condition, p.y, p.theta, p.cotangent, return_report=True, **options)
    assert np.all(np.asarray(report.converged))
    assert got.dtype == p.theta.dtype
    check(fw, got, p.truth.vjp, rtol)
    check(fw, implicit_jvp(condition, p.y, p.theta, p.tangent, **options), p.truth.jvp, rtol)
    check(fw, implicit_jacobian(condition, p.y, p.theta, **options), p.truth.jacobian, rtol)
    got, report = implicit_grad(condition, p.outer, p.y, p.theta, return_report=True, **options)
    check(fw, got, p.truth.gradient, rtol)
    assert report.derivatives["outer"] == "autodiff"


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), PAIRS)
def test_autodiff(name: str, problem: str, solver: str) -> None:
    """The functions alone are given: all products are exact."""
    fw = framework(name)
    p = build(fw, problem)
    check_modes(fw, p, p.condition("fun"), EXACT["float64"], solver=TIGHT[solver])


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_given_products(name: str, problem: str, solver: str) -> None:
    """Products that are given are used."""
    fw = framework(name)
    p = build(fw, problem)
    condition = p.condition(*given(problem))
    check_modes(fw, p, condition, EXACT["float64"], solver=TIGHT[solver])
    report = implicit_vjp(condition, p.y, p.theta, p.cotangent, solver=solver, return_report=True)[1]
    assert report.derivatives == {"A": "given", "B": "given"}


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_single_precision(name: str, problem: str, solver: str) -> None:
    """float32 in, float32 out, with the default tolerances."""
    fw = framework(name)
    p = build(fw, problem, "float32")
    check_modes(fw, p, p.condition("fun"), EXACT["float32"], solver=solver)


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize("way", ["fun", "products"])
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_batched(name: str, problem: str, solver: str, way: str) -> None:
    """Functions written for one item serve a leading axis of items."""
    fw = framework(name)
    p = build(fw, problem, items=(3,))
    condition = p.condition(*(given(problem) if way == "products" else ("fun",)))
    check_modes(fw, p, condition, EXACT["float64"], solver=TIGHT[solver], batched=True)


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_linearize(name: str, problem: str, solver: str) -> None:
    """Factored once, for both directions and again."""
    fw = framework(name)
    p = build(fw, problem)
    lin = linearize(p.condition("fun"), p.y, p.theta, solver=TIGHT[solver])
    for scale in (1.0, -2.0):
        check(fw, lin.vjp(scale * p.cotangent), scale * p.truth.vjp)
        check(fw, lin.jvp(scale * p.tangent), scale * p.truth.jvp)
    check(fw, lin.jacobian(), p.truth.jacobian)
    assert lin.report is not None
    assert lin.report.converged


@pytest.mark.slow(on=("torch",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), PAIRS)
def test_compiled(name: str, problem: str, solver: str) -> None:
    """Inside of what the framework compiles."""
    fw = framework(name)
    p = build(fw, problem)
    condition = p.condition("fun")

    def gradient(y: Any, theta: Any) -> Any:
        return 2 * implicit_grad(condition, p.outer, y, theta, solver=TIGHT[solver])

    check(fw, fw.compiled(gradient)(p.y, p.theta), 2 * p.truth.gradient)


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile, about itself
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_decorator(name: str, problem: str, solver: str) -> None:
    """A black-box solver gets derivatives of the framework's own, to second order, eager and compiled."""
    fw = framework(name)
    p, transform = build(fw, problem), fw.transforms()
    solve = implicit_function(p.condition("fun"), solver=TIGHT[solver])(fw.black_box(p.solution))

    def loss(theta: Any) -> Any:
        return p.outer(solve(theta), theta)

    check(fw, solve(p.theta), fw.numpy(p.y), 1e-14)
    check(fw, fw.gradient(loss)(p.theta), p.truth.gradient)
    check(fw, fw.compiled_gradient(loss)(p.theta), p.truth.gradient)
    check(fw, transform["jacrev"](solve)(p.theta), p.truth.jacobian)
    check(fw, transform["jacfwd"](solve)(p.theta), p.truth.jacobian)
    exact = transform["hessian"](lambda theta: p.outer(p.solution(theta), theta))(p.theta)
    check(fw, transform["hessian"](loss)(p.theta), fw.numpy(exact))


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize(("problem", "solver"), FEW)
def test_decorator_under_vmap(name: str, problem: str, solver: str) -> None:
    """The solver runs once per item; gradients under vmap, and of what was mapped, are right."""
    fw = framework(name)
    p, transform = build(fw, problem), fw.transforms()
    many = fw.xp.stack([p.theta, 1.1 * p.theta, 0.8 * p.theta])
    exact = transform["vmap"](transform["grad"](lambda theta: p.outer(p.solution(theta), theta)))(many)
    solve = implicit_function(p.condition("fun"), solver=TIGHT[solver])(fw.black_box(p.solution))

    def loss(theta: Any) -> Any:
        return p.outer(solve(theta), theta)

    check(fw, transform["vmap"](transform["grad"](loss))(many), fw.numpy(exact))
    check(fw, transform["grad"](lambda theta: transform["vmap"](loss)(theta).sum())(many), fw.numpy(exact))


@pytest.mark.slow(on=("jax",))
@EACH
@pytest.mark.parametrize("problem", PROBLEMS)
def test_decorated_methods(name: str, problem: str) -> None:
    """The methods of the decorated solver are there on every backend."""
    fw = framework(name)
    p = build(fw, problem)
    solve = implicit_function(p.condition("fun"))(fw.black_box(p.solution))
    check(fw, solve.vjp(p.theta, p.cotangent), p.truth.vjp)
    check(fw, solve.jvp(p.theta, p.tangent), p.truth.jvp)
    check(fw, solve.jacobian(p.theta), p.truth.jacobian)


@EACH
@pytest.mark.parametrize("solver", ["auto", "lu", "gmres"])
def test_linear_solve(name: str, solver: str) -> None:
    """A matrix or a function, one right-hand side or several, eager and compiled."""
    fw = framework(name)
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(6, 6)) + 4 * np.eye(6), rng.normal(size=(6, 2))
    M, B = fw.xp.asarray(A), fw.xp.asarray(b)
    truth = np.linalg.solve(A, b)
    check(fw, linear_solve(M, B, solver=TIGHT[solver]), truth)
    check(fw, linear_solve(lambda v: M @ v, B[:, 0], solver=TIGHT[solver]), truth[:, 0])
    check(fw, fw.compiled(lambda M, B: linear_solve(M, B, solver=TIGHT[solver]))(M, B), truth)


@EACH
def test_linear_solve_is_differentiable(name: str) -> None:
    """x̄ᵀ A⁻¹ b has the gradient −A⁻ᵀ x̄ xᵀ with respect to A, and A⁻ᵀ x̄ with respect to b."""
    fw = framework(name)
    rng = np.random.default_rng(1)
    A, b, c = rng.normal(size=(4, 4)) + 3 * np.eye(4), rng.normal(size=4), rng.normal(size=4)
    M, B, C = (fw.xp.asarray(x) for x in (A, b, c))
    adjoint = np.linalg.solve(A.T, c)
    check(fw, fw.gradient(lambda M: C @ linear_solve(M, B))(M), -np.outer(adjoint, np.linalg.solve(A, b)))
    check(fw, fw.gradient(lambda B: C @ linear_solve(M, B))(B), adjoint)
