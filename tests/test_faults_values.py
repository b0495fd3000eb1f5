"""Faults 23 to 27: NaN and Inf in the inputs, in the products, and in one item of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import GENERAL, SOLVERS, Library, assert_right, assert_told, outcome, relative_error
from helpers_faults import MODES, REVERSE, Case, make, numbers, run

from implicitdiff import (
    FixedPoint,
    NonFiniteError,
    NonFiniteProductError,
    NotASolutionWarning,
    NotPositiveDefiniteError,
    Root,
    SingularError,
    SolveError,
    SolveWarning,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)

BAD = (np.nan, np.inf, -np.inf)


class Pair(NamedTuple):
    first: Any
    second: Any


def spoilt(lib: Library, x: Any, index: int | tuple[int, ...], bad: float = np.nan) -> Any:
    """Return a copy with one bad entry."""
    values = lib.numpy(x)
    values[index] = bad
    return lib.array(values)


# -- 23, 24, 25: in y, theta, the cotangent ---------------------------------------------------------------
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["y", "theta"])
def test_fault_23_24_non_finite_point(lib: Library, which: str, mode: str, bad: float) -> None:
    case = make(lib)
    case = replace(case, **{which: spoilt(lib, getattr(case, which), 1, bad)})
    assert_told(outcome(lambda: run(mode, case)), NonFiniteError, rf"^{which} holds NaN or Inf")


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
def test_fault_23_24_every_solver_and_mode_of_failure(lib: Library, solver: str, on_failure: str) -> None:
    case = make(lib)
    for which in ("y", "theta"):
        bad = replace(case, **{which: spoilt(lib, getattr(case, which), 0)})
        found = outcome(lambda bad=bad: run("vjp", bad, solver=solver, on_failure=on_failure))
        assert_told(found, NonFiniteError, rf"^{which} holds")


@pytest.mark.parametrize(
    ("on_failure", "bad"), [("raise", np.inf), ("warn", np.nan), ("nan", -np.inf), ("ignore", np.nan)]
)
def test_fault_25_cotangent_and_tangent(lib: Library, solver: str, on_failure: str, bad: float) -> None:
    case = make(lib)
    v, t = spoilt(lib, case.v, 2, bad), spoilt(lib, case.t, 1, bad)
    options = {"solver": solver, "on_failure": on_failure}
    args = (case.condition, case.y, case.theta)
    assert_told(outcome(lambda: implicit_vjp(*args, v, **options)), NonFiniteError, "^cotangent holds")
    assert_told(outcome(lambda: implicit_grad(case.condition, v, *args[1:], **options)), NonFiniteError,
                "^(cotangent|outer) holds")  # fmt: skip
    assert_told(outcome(lambda: implicit_jvp(*args, t, **options)), NonFiniteError, "^tangent holds")
    lin = linearize(*args, **options)
    assert_told(outcome(lambda: lin.vjp(v)), NonFiniteError, "^cotangent holds")
    assert_told(outcome(lambda: lin.jvp(t)), NonFiniteError, "^tangent holds")
    assert_right(lib, outcome(lambda: lin.vjp(case.v)), case.expected("vjp"), 1e-7)  # and goes on working


def test_fault_25_start_vector(lib: Library, solver: str) -> None:
    case = make(lib)
    x0 = spoilt(lib, case.y, 0)
    found = outcome(lambda: implicit_vjp(case.condition, case.y, case.theta, case.v, solver=solver, x0=x0))
    if found.quiet:
        assert_right(lib, found, case.expected("vjp"), 1e-7)
    else:
        assert_told(found, NonFiniteError, "x0")


def test_fault_23_24_25_leaves_are_named_by_path(lib: Library) -> None:
    one, bad = lib.array([1.0, 2.0]), lib.array([1.0, np.nan])
    condition = Stationary(
        grad=lambda y, th: {"w": [y["w"][0] - th.first, y["w"][1] - th.second["b"]]},
        hvp=lambda y, th, v: v,
        mixed_vjp=lambda y, th, u: Pair(-u["w"][0], {"b": -u["w"][1]}),
    )
    y, theta = {"w": [one, one]}, Pair(one, {"b": one})
    v, t = {"w": [one, one]}, Pair(one, {"b": one})
    tree, named = {"w": [one, bad]}, Pair(one, {"b": bad})
    assert_told(outcome(lambda: implicit_vjp(condition, tree, theta, v)), NonFiniteError, r"^y\['w'\]\[1\] holds")
    assert_told(outcome(lambda: implicit_vjp(condition, y, named, v)), NonFiniteError, r"^theta\.second\['b'\] holds")
    assert_told(outcome(lambda: implicit_vjp(condition, y, theta, tree)), NonFiniteError,
                r"^cotangent\['w'\]\[1\] holds")  # fmt: skip
    assert_told(outcome(lambda: implicit_jvp(condition, y, theta, named)), NonFiniteError,
                r"^tangent\.second\['b'\] holds")  # fmt: skip
    assert outcome(lambda: implicit_jvp(condition, y, theta, t)).quiet


@pytest.mark.parametrize("bad", BAD)
def test_fault_25_linear_solve(lib: Library, solver: str, bad: float) -> None:
    A, b = lib.array(np.diag([1.0, 2.0, 3.0])), lib.array([1.0, 2.0, 3.0])
    assert_told(outcome(lambda: linear_solve(A, spoilt(lib, b, 1, bad), solver=solver)), NonFiniteError, "^b holds")
    found = outcome(lambda: linear_solve(spoilt(lib, A, (1, 1), bad), b, solver=solver))
    assert_told(found, (NonFiniteError, NonFiniteProductError), r"\bA\b.*NaN or Inf")


# -- 26: only in the products -----------------------------------------------------------------------------
def _products(lib: Library, name: str) -> Case:
    """Return a right problem of which one product is NaN at the point."""
    case = make(lib)

    def broken(*args: Any) -> Any:
        return case.products[name](*args) * lib.array(np.nan)

    rest = [k for k in ("grad", "hvp", "mixed_vjp", "mixed_jvp") if k != name]
    return case.using(Stationary, *rest, **{name: broken})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["hvp", "mixed_vjp", "mixed_jvp"])
def test_fault_26_given_product(lib: Library, solver: str, name: str, mode: str) -> None:
    used = {"hvp": True, "mixed_vjp": mode in REVERSE, "mixed_jvp": mode in {"jvp", "jacobian"}}[name]
    case = _products(lib, name)
    found = outcome(lambda: run(mode, case, solver=solver))
    if not used:
        assert_right(lib, found, case.expected(mode), 1e-7)
        return
    assert_told(found, NonFiniteProductError, rf"{name}|product with A" if name == "hvp" else name)
    assert isinstance(found.error, FloatingPointError)


@pytest.mark.parametrize("mode", MODES)
def test_fault_26_given_hessian(lib: Library, solver: str, mode: str) -> None:
    case = make(lib)
    matrix = numbers((4, 4))
    matrix[2, 1] = np.inf
    bad = case.using(Stationary, "grad", "mixed_vjp", "mixed_jvp", hessian=lambda y, th: lib.array(matrix))
    found = outcome(lambda: run(mode, bad, solver=solver))
    assert_told(found, NonFiniteProductError, "(hessian|A).*NaN or Inf")


@pytest.mark.parametrize("mode", MODES)
def test_fault_26_infinite_curvature(lib: Library, solver: str, mode: str) -> None:
    # f = Σ |y|^1.5 + ½ (y − θ)²: the gradient is 0 at 0, the curvature is not finite there
    case = make(lib, n=3, m=3)
    xp, zero = lib.xp, lib.array(np.zeros(3))

    def hvp(y: Any, th: Any, v: Any) -> Any:
        with np.errstate(all="ignore"):
            return v / xp.sqrt(xp.abs(y)) + v

    condition = Stationary(grad=lambda y, th: xp.sign(y) * xp.sqrt(xp.abs(y)) + y - th, hvp=hvp,
                           mixed_vjp=lambda y, th, u: -u, mixed_jvp=lambda y, th, t: -t)  # fmt: skip
    case = replace(case, condition=condition, y=zero, theta=zero)
    assert_told(outcome(lambda: run(mode, case, solver=solver)), NonFiniteProductError, "product with A")


@pytest.mark.slow(on=("array_api_strict",))
@pytest.mark.parametrize("kind", [Root, FixedPoint, Stationary])
def test_fault_26_condition_is_nan_at_the_point(lib: Library, solver: str, kind: type) -> None:
    xp, y = lib.xp, lib.array([0.0, 4.0, 1.0])

    def gradient_of_sqrt(y: Any, th: Any) -> Any:
        with np.errstate(all="ignore"):
            return 0.5 * y / xp.abs(y) / xp.sqrt(xp.abs(y)) - th

    condition = Stationary(grad=gradient_of_sqrt) if kind is Stationary else kind(gradient_of_sqrt)
    theta, v = lib.array([0.0, 0.25, 0.5]), lib.array([1.0, 2.0, 3.0])
    found = outcome(lambda: implicit_vjp(condition, y, theta, v, solver=solver))
    assert_told(found, (NonFiniteProductError, NotASolutionWarning, NonFiniteError), "nan|not a solution")


def test_fault_26_exact_derivatives_of_a_square_root() -> None:
    anp = pytest.importorskip("autograd.numpy")
    y, theta, v = np.array([0.0, 4.0]), np.array([1.0, 2.0]), np.ones(2)
    for solver in SOLVERS:
        with np.errstate(all="ignore"):
            found = outcome(lambda s=solver: implicit_vjp(
                lambda y, th: anp.sum(th * anp.sqrt(anp.abs(y)) + y * y), y, theta, v, solver=s))  # fmt: skip
        assert_told(found, (NonFiniteProductError, NonFiniteError), "NaN or Inf")


def test_fault_26_gradient_of_the_outer_loss(lib: Library, solver: str) -> None:
    case, xp = make(lib), lib.xp
    nan = lib.array(np.nan)

    def by_y(y: Any, th: Any) -> Any:
        return xp.sum(y) * nan

    found = outcome(lambda: implicit_grad(case.condition, by_y, case.y, case.theta, solver=solver))
    assert_told(found, NonFiniteProductError, "outer.*NaN or Inf")


@pytest.mark.parametrize("on_failure", ["warn", "nan", "ignore"])
@pytest.mark.parametrize("name", ["hvp", "mixed_vjp"])
def test_fault_26_is_never_a_finite_number(lib: Library, solver: str, name: str, on_failure: str) -> None:
    case = _products(lib, name)
    found = outcome(lambda: run("vjp", case, solver=solver, on_failure=on_failure))
    assert found.error is None
    if on_failure == "warn":
        assert_told(found, SolveWarning, "NonFiniteProductError")
    else:
        assert not found.warnings
    if on_failure == "nan" or name == "mixed_vjp":
        assert np.all(np.isnan(lib.numpy(found.value)))


# -- 27: one bad item of a batch --------------------------------------------------------------------------
ITEMS, ITEM = 4, 2
GOOD = [i for i in range(ITEMS) if i != ITEM]


def _bad_item(lib: Library, kind: str, *, symmetric: bool = True) -> Case:
    case = make(lib, items=(ITEMS,), symmetric=symmetric)
    if kind in {"y", "theta"}:
        return replace(case, **{kind: spoilt(lib, getattr(case, kind), (ITEM, 1))})
    if kind == "cotangent":
        return replace(case, v=spoilt(lib, case.v, (ITEM, 1)), t=spoilt(lib, case.t, (ITEM, 1)))
    factor = {"zero": 0.0, "negative": -1.0}.get(kind, np.nan)
    one, bad, mark = lib.array(1.0), lib.array(factor), lib.array(lib.numpy(case.theta)[ITEM, 0])

    def scale(theta: Any) -> Any:  # of one item, or of all along the leading axis
        return lib.xp.where(lib.xp.abs(theta[..., :1] - mark) < 1e-3, bad, one)  # near by, too: F is differenced

    name = {"zero": "hvp", "negative": "hvp", "product": "hvp"}.get(kind, kind)
    broken = {name: lambda *args: case.products[name](*args) * scale(args[1])}
    if kind == "zero":  # F is zero there, too, to the last bit: that y solves it is not in question
        broken["grad"] = lambda *args: case.products["grad"](*args) * scale(args[1])
    if kind == "negative":  # all of −F: what is given has to belong together
        broken |= {k: lambda *args, k=k: case.products[k](*args) * scale(args[1])
                   for k in ("grad", "mixed_vjp", "mixed_jvp")}  # fmt: skip
    rest = ["grad", "mixed_vjp", "mixed_jvp", *(() if name == "hvp" else ("hvp",))]
    if not symmetric:
        broken |= {"vjp": lambda *args: case.products["vjp"](*args) * scale(args[1])} if name == "hvp" else {}
        rest += [] if name == "hvp" else ["vjp"]
    return case.using(Stationary if symmetric else Root, *(k for k in rest if k not in broken), **broken)


def _assert_others_right(case: Case, mode: str, value: Any) -> None:
    expected = case.expected(mode)[GOOD]
    error = relative_error(case.lib, case.lib.array(case.lib.numpy(value)[GOOD]), expected)
    assert error <= 1e-7, f"a good item is off by {error:.3g}"


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["y", "theta", "cotangent"])
def test_fault_27_bad_input_of_one_item(lib: Library, which: str, mode: str, on_failure: str) -> None:
    if which == "cotangent" and mode in {"jacobian", "grad"}:
        pytest.skip("takes no cotangent")
    case = _bad_item(lib, which)
    found = outcome(lambda: run(mode, case, batched=True, on_failure=on_failure))
    named = {"cotangent": "tangent" if mode == "jvp" else "cotangent"}.get(which, which)
    pattern = rf"\b{named} .*item {ITEM}.*NaN or Inf"
    if on_failure == "raise":
        assert_told(found, (NonFiniteError, SolveError), pattern)
        return
    assert found.error is None, found.text
    _assert_others_right(case, mode, found.value)
    item = case.lib.numpy(found.value)[ITEM]
    assert not np.all(np.isfinite(item)), f"NaN in, numbers out: {item}"
    if on_failure == "warn":
        assert_told(found, SolveWarning, pattern)
        return
    assert not found.warnings, found.text
    if on_failure == "nan":
        assert np.all(np.isnan(item))


@pytest.mark.parametrize("which", ["y", "theta", "cotangent"])
def test_fault_27_bad_input_with_every_solver(lib: Library, solver: str, which: str) -> None:
    case = _bad_item(lib, which)
    found = outcome(lambda: run("vjp", case, batched=True, on_failure="nan", solver=solver))
    assert found.quiet, found.text
    _assert_others_right(case, "vjp", found.value)
    assert np.all(np.isnan(lib.numpy(found.value)[ITEM]))


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
@pytest.mark.parametrize("kind", ["zero", "product", "mixed_vjp"])
def test_fault_27_bad_operator_of_one_item(lib: Library, solver: str, kind: str, on_failure: str) -> None:
    case = _bad_item(lib, kind)
    found = outcome(lambda: run("vjp", case, batched=True, on_failure=on_failure, solver=solver))
    _assert_item_told(case, found, on_failure, SolveError)


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("mode", MODES)
def test_fault_27_bad_general_operator(lib: Library, solver: str, mode: str) -> None:
    for kind in ("zero", "product"):
        case = _bad_item(lib, kind, symmetric=False)
        found = outcome(lambda case=case: run(mode, case, batched=True, on_failure="nan", solver=solver))
        assert found.quiet, found.text
        _assert_others_right(case, mode, found.value)
        assert np.all(np.isnan(lib.numpy(found.value)[ITEM]))


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
def test_fault_27_one_item_is_a_maximum(lib: Library, solver: str, on_failure: str) -> None:
    case = _bad_item(lib, "negative")
    found = outcome(lambda: run("vjp", case, batched=True, on_failure=on_failure, solver=solver))
    _assert_item_told(case, found, on_failure, NotPositiveDefiniteError)


def test_fault_27_jacobian_names_the_item(lib: Library, solver: str) -> None:
    case = _bad_item(lib, "zero")
    found = outcome(lambda: implicit_jacobian(case.condition, case.y, case.theta, batched=True, solver=solver))
    assert_told(found, (SingularError, NotPositiveDefiniteError), rf"item {ITEM}")


def _assert_item_told(case: Case, found: Any, on_failure: str, kind: type[Exception]) -> None:
    if on_failure == "raise":
        assert_told(found, kind, rf"item {ITEM}")
        return
    assert found.error is None, found.text
    _assert_others_right(case, "vjp", found.value)
    if on_failure == "warn":
        assert_told(found, SolveWarning, rf"item {ITEM}")
        return
    assert not found.warnings, found.text
    if on_failure == "nan":
        assert np.all(np.isnan(case.lib.numpy(found.value)[ITEM]))


def test_fault_27_error_carries_the_other_items(lib: Library, solver: str) -> None:
    case = _bad_item(lib, "zero")
    found = outcome(lambda: implicit_vjp(case.condition, case.y, case.theta, case.v, batched=True, solver=solver))
    assert isinstance(found.error, SolveError)
    solution = lib.numpy(found.error.value)
    v, truth = lib.numpy(case.v), case.truth
    assert solution.shape in {v.shape, lib.numpy(case.theta).shape}
    if solution.shape == lib.numpy(case.theta).shape:  # the promise: what on_failure="ignore" would have returned
        _assert_others_right(case, "vjp", found.error.value)
        return
    pytest.fail(f"error.value has shape {solution.shape}; expected that of theta, {truth.shape[:1] + truth.shape[2:]}")


def test_fault_27_linear_solve(lib: Library, solver: str) -> None:
    A = np.stack([np.diag([1.0, 2.0]), np.zeros((2, 2)), np.array([[2.0, 1.0], [1.0, 3.0]])])
    b = np.array([[1.0, 1.0], [1.0, 2.0], [3.0, 4.0]])
    found = outcome(lambda: linear_solve(lib.array(A), lib.array(b), batched=True, solver=solver, on_failure="nan"))
    assert found.quiet, found.text
    x = lib.numpy(found.value)
    np.testing.assert_allclose(x[[0, 2]], [[1.0, 0.5], [1.0, 1.0]], rtol=1e-8)
    assert np.all(np.isnan(x[1]))
    found = outcome(lambda: linear_solve(lib.array(A), lib.array(b), batched=True, solver=solver))
    assert_told(found, SolveError, r"item 1")
