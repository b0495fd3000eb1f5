"""Constrained minima with derivatives at hand: each choice of those on every library, and mistakes in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, PLAIN, STRICT, TORCH, Library, relative_error
from frameworks import framework
from helpers_constraints import MODES, ROUTES, curved, rtol_for

from implicitdiff import (
    KKT,
    CallbackError,
    DerivativeError,
    InconsistentDerivativesError,
    InputError,
    ShapeError,
    check_derivatives,
    implicit_function,
    implicit_jacobian,
    implicit_vjp,
)

FIRST = ("grad", "eq_jacobian", "ineq_jacobian")
SECOND = ("hessian", "eq_hessian", "ineq_hessian")
CHOICES = {
    "all": (*FIRST, *SECOND),
    "hvp": (*FIRST, "hvp", "eq_hessian", "ineq_hessian"),
    "hvp and hessian": (*FIRST, *SECOND, "hvp"),
    "of the Lagrangian": (*FIRST, "lagrangian_hessian"),
    "first": FIRST,
    "second": SECOND,
    "of f": ("grad", "hessian"),
    "of eq": ("eq_jacobian", "eq_hessian"),
    "of ineq": ("ineq_jacobian",),
}


def choices() -> list[Any]:
    """Each library with each choice; fewer where each is a compilation."""
    few = ("all",)
    pairs = [(lib, c) for lib in PLAIN for c in CHOICES] + [(lib, c) for lib in JAX for c in few]
    return [pytest.param(lib, c, id=f"{lib.name}-{c}") for lib, c in pairs]


@pytest.mark.slow(on=("jax", "array_api_strict"))
@pytest.mark.parametrize(("lib", "choice"), choices())
def test_every_choice(lib: Library, choice: str) -> None:
    program, rtol = curved(lib), rtol_for(lib)
    condition = program.condition(*CHOICES[choice])
    for mode in MODES if lib is NUMPY else ("vjp", "jvp"):
        program.check(mode, condition, rtol)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    ("lib", "choice"),
    [(lib, c) for lib in (NUMPY, *TORCH) for c in ("all", "of the Lagrangian", "of ineq")]
    + [(lib, "of eq") for lib in JAX],
    ids=lambda x: getattr(x, "name", x),
)
def test_batch(lib: Library, choice: str) -> None:
    program = curved(lib, items=(3,))
    program.check("vjp", program.condition(*CHOICES[choice]), 1e-9, batched=True)


@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str) -> None:
    program = curved(STRICT)
    program.check("jacobian", program.condition(*CHOICES["all"], route=route), 1e-9)


def without_autodiff(program: Any) -> Any:
    """The same with functions that no library sees through: differences are all there is."""
    return {
        name: (lambda f: lambda *x: f(*(np.array(a, dtype=float) for a in x)))(f)
        for name, f in {"f": program.f, "eq": program.eq, "ineq": program.ineq, **program.derivatives}.items()
    }


def test_differences_only_for_what_is_missing() -> None:
    """A is given; of B is missing what θ does. One that differences of values would not come near to is reached."""
    program = curved(NUMPY)
    parts = without_autodiff(program)
    f, eq, ineq = (parts.pop(name) for name in ("f", "eq", "ineq"))
    calls = {"f": 0}

    def counted(y: Any, theta: Any) -> Any:
        calls["f"] += 1
        return f(y, theta)

    condition = KKT(counted, eq, ineq, **{name: parts[name] for name in CHOICES["all"]}, verify=False)
    got, report = program.ask("vjp", condition, return_report=True)
    assert relative_error(NUMPY, got, program.truth("vjp")) < 1e-9
    assert report.derivatives["A"] == "given"
    assert "finite differences" in report.derivatives["B"]
    assert calls["f"] <= 30  # autodiff was tried; second differences for ten coordinates take hundreds


@pytest.mark.parametrize("lib", [NUMPY, STRICT, *TORCH], ids=lambda lib: lib.name)
def test_certificate(lib: Library) -> None:
    """The estimate of the error tells how far off the derivative at a point nearby is."""
    program = curved(lib)
    y = program.y + 1e-7 * np.linspace(-1.0, 1.0, program.y.size)
    got, report = implicit_vjp(
        program.condition(*CHOICES["all"]), program.array(y), program.array(program.theta),
        program.array(program.cotangent), error=True, return_report=True,
    )  # fmt: skip
    off = np.linalg.norm(lib.numpy(got) - program.truth("vjp"))
    assert off / 3 <= float(report.error.absolute) <= 3 * off


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(("name", "choice"), [("torch", "all"), ("torch", "of the Lagrangian"), ("jax", "all")])
def test_second_derivatives(name: str, choice: str) -> None:
    """The framework differentiates the gradient once more, through what was given."""
    fw, xp = framework(name), framework(name).xp

    def solution(theta: Any) -> Any:
        return theta[:2] / (theta[:2] ** 2).sum() ** 0.5 * theta[2]

    eye = xp.eye(2, dtype=xp.float64)
    given = {
        "grad": lambda y, t: 2 * (y - t[:2]),
        "hessian": lambda y, t: 2 * eye,
        "ineq_jacobian": lambda y, t: 2 * y,
        "ineq_hessian": lambda y, t, z: 2 * z[0] * eye,
    }
    if choice != "all":
        given = {name: given[name] for name in ("grad", "ineq_jacobian")}
        given["lagrangian_hessian"] = lambda y, t, lam, mu: 2 * (1 + mu[0]) * eye
    condition = KKT(lambda y, t: ((y - t[:2]) ** 2).sum(), ineq=lambda y, t: (y**2).sum() - t[2] ** 2, **given)
    projected = implicit_function(condition)(fw.black_box(solution))
    loss = lambda of: lambda theta: xp.sin(of(theta)[0]) * of(theta)[1] ** 2
    theta = xp.asarray(np.array([3.0, 1.0, 1.5]))
    hessian = fw.transforms()["hessian"]
    np.testing.assert_allclose(
        fw.numpy(hessian(loss(projected))(theta)), fw.numpy(hessian(loss(solution))(theta)), rtol=1e-8
    )


# -- forms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["matrix", "trees", "constraints by shape of y", "sparse"])
def test_forms_of_a_jacobian(form: str) -> None:
    """A matrix, SciPy's sparse one, one array for each leaf of y, or constraints × y's own shape."""
    M = np.arange(1.0, 19.0).reshape(3, 6) ** 1.3
    forms: dict[str, Callable[..., Any]] = {
        "matrix": lambda y, t: M,
        "sparse": lambda y, t: scipy.sparse.csr_array(M),
        "trees": lambda y, t: {"a": M[:, :2], "b": M[:, 2:].reshape(3, 2, 2)},
        "constraints by shape of y": lambda y, t: M.reshape(3, 2, 3),
    }
    tree = form == "trees"
    flat = lambda y: np.concatenate([y["a"], y["b"].reshape(-1)]) if tree else np.reshape(y, 6)
    shape = (lambda y: {"a": y[:2], "b": y[2:].reshape(2, 2)}) if tree else (
        (lambda y: y.reshape(2, 3)) if form.startswith("con") else lambda y: y)  # fmt: skip
    theta = np.array([1.0, 2.0, 0.5])
    condition = KKT(lambda y, t: (flat(y) ** 2).sum(), eq=lambda y, t: M @ flat(y) - t, eq_jacobian=forms[form])
    found = implicit_jacobian(condition, shape(np.linalg.pinv(M) @ theta), theta)
    found = np.concatenate([found["a"], found["b"].reshape(4, 3)]) if tree else found.reshape(6, 3)
    np.testing.assert_allclose(found, np.linalg.pinv(M), rtol=1e-7)


def test_sparse_hessians() -> None:
    program = curved(NUMPY)
    sparse = {name: (lambda f: lambda *x: scipy.sparse.csc_array(f(*x)))(program.derivatives[name]) for name in SECOND}
    sparse["hessian"] = lambda y, t: scipy.sparse.linalg.aslinearoperator(program.derivatives["hessian"](y, t))
    first = {name: program.derivatives[name] for name in FIRST}
    program.check("vjp", KKT(program.f, program.eq, program.ineq, **first, **sparse), 1e-9)


def test_transposed_jacobian_is_refused() -> None:
    program = curved(NUMPY)
    turned = KKT(
        program.f, program.eq, program.ineq, eq_jacobian=lambda y, t: program.derivatives["eq_jacobian"](y, t).T
    )
    with pytest.raises(CallbackError, match=r"eq_jacobian returned an array of shape \(6, 2\)"):
        program.ask("vjp", turned)


def test_derivative_of_nothing_is_refused() -> None:
    program = curved(NUMPY)
    with pytest.raises(InputError, match="ineq_jacobian is given, and ineq is not"):
        KKT(program.f, program.eq, ineq_jacobian=program.derivatives["ineq_jacobian"])


# -- mistakes ----------------------------------------------------------------------------------------------------------
GIVEN = [*CHOICES["all"], "hvp", "lagrangian_hessian"]


def mistaken(program: Any, name: str, factor: float = 2.0) -> KKT:
    """One derivative too large by a factor."""
    chosen = CHOICES["of the Lagrangian"] if name == "lagrangian_hessian" else (*CHOICES["all"], "hvp")
    given = {n: program.derivatives[n] for n in chosen}
    right = given[name]
    return KKT(program.f, program.eq, program.ineq, **{**given, name: lambda *x: factor * right(*x)})


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("name", GIVEN)
def test_mistakes_are_told(lib: Library, name: str) -> None:
    program = curved(lib)
    with pytest.raises(InconsistentDerivativesError, match=rf"\b{name}\b.*(.|\n)*a factor of 2 too much"):
        program.ask("vjp", mistaken(program, name))


@pytest.mark.parametrize("name", GIVEN)
def test_check_derivatives(name: str) -> None:
    program = curved(NUMPY)
    chosen = CHOICES["of the Lagrangian"] if name == "lagrangian_hessian" else (*CHOICES["all"], "hvp")
    found = check_derivatives(program.condition(*chosen), program.y, program.theta)
    assert found.ok
    assert name in {row.callable for row in found}
    found = check_derivatives(mistaken(program, name), program.y, program.theta)
    assert {row.callable for row in found if row.verdict == "wrong"} >= {name}


def test_approximations_that_are_meant_pass() -> None:
    program = curved(NUMPY)
    given = {name: program.derivatives[name] for name in CHOICES["all"]}
    approximate = lambda y, t: 1.1 * program.derivatives["hessian"](y, t)
    condition = KKT(program.f, program.eq, program.ineq, **{**given, "hessian": approximate}, verify=False)
    assert relative_error(NUMPY, program.ask("vjp", condition), program.truth("vjp")) > 1e-3


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (2.0, False)])
def test_mistakes_within_a_program_are_nan(lib: Library, factor: float, right: bool) -> None:
    """Nothing can be raised there."""
    program, fw = curved(lib), framework("jax")
    condition = mistaken(program, "ineq_jacobian", factor)
    y, v = program.array(program.y), program.array(program.cotangent)
    got = fw.compiled(lambda t: implicit_vjp(condition, y, t, v))(program.array(program.theta))
    if right:
        assert relative_error(lib, got, program.truth("vjp")) < 1e-9
    else:
        assert np.isnan(fw.numpy(got)).all()


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_constraints_that_do_not_see_theta(lib: Library) -> None:
    """With a Jacobian that is given, eager and within a program: what moves θ is the objective alone."""
    ones = lib.array(np.ones((1, 2)))
    line = KKT(lambda y, t: lib.xp.sum((y - t) ** 2), lambda y, t: lib.xp.sum(y) - 1.0, eq_jacobian=lambda y, t: ones)
    y, theta, v = (lib.array(np.array(x)) for x in ([0.5, 0.5], [1.0, 1.0], [1.0, 2.0]))
    ask = lambda t: implicit_vjp(line, y, t, v)
    for call in (ask, framework("jax").compiled(ask)) if lib.name == "jax" else (ask,):
        assert np.allclose(lib.numpy(call(theta)), [-0.5, 0.5], atol=1e-7)


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_a_program_that_sees_no_theta_is_refused(lib: Library) -> None:
    own = lib.array(np.ones(2))
    line = KKT(
        lambda y, t: lib.xp.sum((y - own) ** 2), lambda y, t: lib.xp.sum(y) - 1.0,
        eq_jacobian=lambda y, t: lib.array(np.ones((1, 2))),
    )  # fmt: skip
    y, fw = lib.array(np.full(2, 0.5)), framework("jax")
    with pytest.raises(DerivativeError, match="does not depend on theta"):
        fw.compiled(lambda t: implicit_vjp(line, y, t, y))(own)


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
def test_multipliers_of_a_batch_carry_its_axis(lib: Library) -> None:
    line = KKT(lambda y, t: lib.xp.sum((y - t) ** 2), lambda y, t: lib.xp.sum(y) - 1.0, multipliers=lib.array(0.5))
    y = lib.array(np.full((2, 2), 0.5))
    with pytest.raises(ShapeError, match=r"multipliers has shape \(\); with batched=True .* of 2"):
        implicit_vjp(line, y, y + 0.5, y, batched=True)
