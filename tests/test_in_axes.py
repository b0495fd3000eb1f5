"""Batches of which parameters are shared, and data are each item's own: against one item after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import JAX, LIBRARIES, NUMPY, TORCH, Library
from frameworks import EACH, framework

from implicitdiff import (
    KKT,
    FixedPoint,
    InaccurateError,
    InputError,
    LeastSquares,
    ProximalGradient,
    Root,
    ShapeError,
    SolveError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
    proxes,
)

ITEMS, N = 4, 3
LIBS = pytest.mark.parametrize("lib", [*LIBRARIES, *JAX], ids=lambda lib: lib.name)
AXES = (0, {"c": None, "s": 0}, (0, None))
ALL = (0, None, (0, None))


def residual(y: Any, theta: Any, X: Any, k: Any) -> Any:
    """F of one item, or of all of them at once: X is each item's own, and k is shared."""
    return (X @ y[..., None])[..., 0] + k * y**3 - y * theta["c"] - theta["s"][..., None]


CONDITION = Root(residual)


class Batch(NamedTuple):
    """The problem in NumPy's arrays, with its solutions, and A and B = (∂F/∂c, ∂F/∂s) of each item."""

    y: np.ndarray
    theta: dict[str, np.ndarray]
    args: tuple[Any, Any]
    A: np.ndarray
    v: np.ndarray
    t: dict[str, np.ndarray]

    def on(self, lib: Library, s: Any = None) -> tuple[Any, Any, Any]:
        """Return y, theta and args as arrays of a library."""
        theta = {"c": lib.array(self.theta["c"]), "s": lib.array(self.theta["s"] if s is None else s)}
        return lib.array(self.y), theta, tuple(map(lib.array, self.args))

    def gradient(self) -> dict[str, np.ndarray]:
        """−Bᵀ A⁻ᵀ v: ∂F/∂c = −diag(y), ∂F/∂s = −1."""
        u = np.linalg.solve(np.swapaxes(self.A, 1, 2), self.v[..., None])[..., 0]
        return {"c": (self.y * u).sum(0), "s": u.sum(1)}

    def tangent(self) -> np.ndarray:
        """−A⁻¹ B t."""
        b = self.y * self.t["c"] + self.t["s"][:, None]
        return np.linalg.solve(self.A, b[..., None])[..., 0]


def batch(seed: int = 0) -> Batch:
    """Return a batch at its exact solutions: y is chosen, and s and X are what makes it one."""
    rng = np.random.default_rng(seed)
    X, y, c, k = rng.normal(size=(ITEMS, N, N)) + 4 * np.eye(N), rng.normal(size=(ITEMS, N)), rng.normal(size=N), 0.3
    s = rng.normal(size=ITEMS)
    left = s[:, None] - ((X @ y[..., None])[..., 0] + k * y**3 - y * c)
    X = X + left[..., None] * y[:, None, :] / (y**2).sum(1)[:, None, None]
    A = X + np.einsum("ij,jk->ijk", 3 * k * y**2 - c, np.eye(N))
    t = {"c": rng.normal(size=N), "s": rng.normal(size=ITEMS)}
    return Batch(y, {"c": c, "s": s}, (X, np.asarray(k)), A, rng.normal(size=(ITEMS, N)), t)


def same(lib: Library, got: Any, expected: Any, rtol: float = 1e-7) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(lib.numpy(got[name]), x, rtol=rtol, err_msg=name)


# -- against closed forms, per item --------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@LIBS
def test_a_shared_leaf_gets_the_sum_and_the_others_their_own(lib: Library) -> None:
    problem = batch()
    y, theta, args = problem.on(lib)
    got, report = implicit_vjp(
        CONDITION, y, theta, lib.array(problem.v), args=args, in_axes=AXES, error=True, return_report=True
    )
    same(lib, got, problem.gradient())
    assert lib.numpy(report.residual).shape == (ITEMS,)
    assert lib.numpy(report.error.absolute).shape == (ITEMS,)
    assert lib.numpy(report.error.correction["c"]).shape == (N,)
    same(lib, linearize(CONDITION, y, theta, args=args, in_axes=AXES).vjp(lib.array(problem.v)), problem.gradient())


@pytest.mark.slow(on=("jax",))
@LIBS
def test_a_tangent_is_shared(lib: Library) -> None:
    problem = batch()
    y, theta, args = problem.on(lib)
    t = {name: lib.array(x) for name, x in problem.t.items()}
    w = implicit_jvp(CONDITION, y, theta, t, args=args, in_axes=AXES)
    np.testing.assert_allclose(lib.numpy(w), problem.tangent(), rtol=1e-7)


@LIBS
def test_a_jacobian_is_that_of_each_item(lib: Library) -> None:
    problem = batch()
    y, theta, args = problem.on(lib)
    found = implicit_jacobian(CONDITION, y, theta, args=args, in_axes=AXES)
    inverse = np.linalg.inv(problem.A)
    np.testing.assert_allclose(lib.numpy(found["c"]), inverse * problem.y[:, None, :], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(lib.numpy(found["s"]), inverse.sum(2), rtol=1e-6)


def loss(y: Any, theta: Any) -> Any:
    return (y**2).sum(-1) + (theta["c"] ** 2).sum(-1) * theta["s"]


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_a_loss_is_of_each_item_and_its_gradient_that_of_the_sum(lib: Library) -> None:
    problem = batch()
    y, theta, args = problem.on(lib)
    got = implicit_grad(CONDITION, loss, y, theta, args=args, in_axes=AXES)
    expected = problem._replace(v=2 * problem.y).gradient()
    c, s = problem.theta["c"], problem.theta["s"]
    same(lib, got, {"c": expected["c"] + 2 * c * s.sum(), "s": expected["s"] + (c**2).sum()})


def alone(call: Callable[..., Any], lib: Library, problem: Batch, *rest: Any, **options: Any) -> list[Any]:
    """One item after the other, each a problem of its own."""
    y, theta, (X, k) = problem.on(lib)
    found = []
    for i in range(ITEMS):
        own = {"c": theta["c"], "s": theta["s"][i, ...]}
        found.append(call(CONDITION, y[i, ...], own, *(x[i, ...] for x in rest), args=(X[i, ...], k), **options))
    return found


@pytest.mark.filterwarnings("ignore::implicitdiff.NotASolutionWarning")
@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
def test_errors_are_those_of_a_loop(lib: Library) -> None:
    """Off the solution, where there is something to estimate: per item, and the correction is summed."""
    problem = batch()
    problem = problem._replace(y=problem.y + 1e-4)
    y, theta, args = problem.on(lib)
    v = lib.array(problem.v)
    options = {"error": True, "return_report": True}
    got, report = implicit_vjp(CONDITION, y, theta, v, args=args, in_axes=AXES, **options)
    items = alone(implicit_vjp, lib, problem, v, **options)
    total = sum(lib.numpy(g["c"]) for g, _ in items)
    np.testing.assert_allclose(lib.numpy(got["c"]), total, rtol=1e-10)
    np.testing.assert_allclose(
        lib.numpy(report.error.absolute), [float(r.error.absolute) for _, r in items], rtol=1e-2, atol=1e-12
    )
    correction = sum(lib.numpy(r.error.correction["c"]) for _, r in items)
    np.testing.assert_allclose(lib.numpy(report.error.correction["c"]), correction, rtol=1e-2, atol=1e-9)
    polished = implicit_vjp(CONDITION, y, theta, v, args=args, in_axes=AXES, polish=2)
    same(lib, polished, batch().gradient(), 1e-6)


def square(y: Any, theta: Any, w: Any) -> Any:
    return ((y - theta * w) ** 2).sum(-1) / 2


OTHERS: dict[str, tuple[Any, Callable[..., np.ndarray]]] = {
    "objective": (Stationary(square), lambda t, w: t * w),
    "fixed point": (FixedPoint(lambda y, t, w: 0.5 * y + t * w), lambda t, w: 2 * t * w),
    "constraints": (
        KKT(square, eq=lambda y, t, w: (y.sum(-1) - w[..., 0])[..., None]),
        lambda t, w: t * w + (w[..., :1] - (t * w).sum(-1, keepdims=True)) / N,
    ),
    "residuals": (LeastSquares(lambda y, t, w: w * y - t), lambda t, w: t / w),
    "loss of residuals": (
        LeastSquares(lambda y, t, w: w * y - t, loss=lambda r, t, w: (r**4 + w * r**2).sum(-1)), lambda t, w: t / w
    ),
    "proximal": (ProximalGradient(square, lambda x, t, step: proxes.lasso(x, 0.1, step)),
                 lambda t, w: np.sign(t * w) * np.maximum(np.abs(t * w) - 0.1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_condition(lib: Library, name: str) -> None:
    """A shared theta, and args of each item's own, against differences of the closed form."""
    if lib.name == "jax" and name not in {"constraints", "proximal"}:
        pytest.skip("each takes a compilation")
    condition, solved = OTHERS[name]
    rng = np.random.default_rng(2)
    t, w, v = 1 + rng.random(N), 1 + rng.random((ITEMS, N)), rng.normal(size=(ITEMS, N))
    got = implicit_vjp(condition, lib.array(solved(t, w)), lib.array(t), lib.array(v), args=(lib.array(w),),
                       in_axes=(0, None, 0))  # fmt: skip
    steps = 1e-6 * np.eye(N)
    expected = [((solved(t + e, w) - solved(t - e, w)) * v).sum() / 2e-6 for e in steps]
    np.testing.assert_allclose(lib.numpy(got), expected, rtol=1e-7, atol=1e-8)


# -- what it may be --------------------------------------------------------------------------------------
@pytest.mark.parametrize("axes", [(0, 0, None), [0, {"c": 0, "s": 0}, [None, None]]], ids=["plain", "trees"])
def test_the_default_is_batched(axes: Any) -> None:
    problem = batch()
    y, theta, args = problem.on(NUMPY)
    theta["c"] = np.broadcast_to(theta["c"], (ITEMS, N)).copy()
    expected = implicit_vjp(CONDITION, y, theta, problem.v, args=args, batched=True)
    same(NUMPY, implicit_vjp(CONDITION, y, theta, problem.v, args=args, in_axes=axes), expected, 0)
    same(NUMPY, implicit_vjp(CONDITION, y, theta, problem.v, args=args, in_axes=axes, batched=True), expected, 0)


def test_numbers_and_nested_args() -> None:
    """A shared theta that is a Python float comes back as one; args are trees, of which None is no leaf."""
    X = 2 + np.arange(3.0)[:, None] * np.ones(2)
    condition = Root(lambda y, t, data: data["X"] * y - t[..., None])
    y = 1.5 / X
    args, axes = ({"X": X, "none": None},), (0, None, ({"X": 0, "none": None},))
    g = implicit_vjp(condition, y, 1.5, np.ones((3, 2)), args=args, in_axes=axes)
    assert isinstance(g, float)
    assert g == pytest.approx((1 / X).sum())


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ((0, None), "expected a tuple of three"),
        (0, "expected a tuple of three"),
        ((None, 0, None), "y has to carry"),
        ((0, 1, None), r"in_axes\[1\] holds 1"),
        ((0, True, None), r"in_axes\[1\] holds True"),
        ((0, {"c": None}, None), r"in_axes\[1\] = .* does not fit"),
        ((0, {"c": None, "s": 0}, (0,)), "1 entries for 2 args"),
        ((0, {"c": None, "s": 0}, (0, "x")), r"in_axes\[2\] holds 'x'"),
    ],
)
def test_what_it_may_not_be(axes: Any, says: str) -> None:
    problem = batch()
    y, theta, args = problem.on(NUMPY)
    with pytest.raises(InputError, match=says):
        implicit_vjp(CONDITION, y, theta, problem.v, args=args, in_axes=axes)


@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_shapes_that_do_not_fit(lib: Library) -> None:
    problem = batch()
    y, theta, (X, k) = problem.on(lib)
    v, t = lib.array(problem.v), {"c": lib.array(np.ones((ITEMS, N))), "s": theta["s"]}
    with pytest.raises(ShapeError, match=r"args\[0\] has shape \(3, 3, 3\); by in_axes it carries .* of 4"):
        implicit_vjp(CONDITION, y, theta, v, args=(X[:3, ...], k), in_axes=AXES)
    with pytest.raises(ShapeError, match=r"tangent\['c'\] has shape \(4, 3\).\nExpected shape \(3,\), like theta"):
        implicit_jvp(CONDITION, y, theta, t, args=(X, k), in_axes=AXES)
    with pytest.raises(ShapeError, match=r"same leading axis of items; got \(4, 3\), \(3,\)"):
        implicit_vjp(CONDITION, y, {**theta, "s": theta["s"][:3, ...]}, v, args=(X, k), in_axes=AXES)


def test_a_function_that_takes_theta_as_it_is_shared() -> None:
    """Without a vmap it comes with the axis, which is said beside the function's own error."""
    y, t = np.ones((4, 2)), np.array(2.0)
    with pytest.raises(ValueError, match="broadcast") as caught:
        implicit_vjp(Root(lambda y, t: t * y - 2), y, t, y, in_axes=(0, None, None))
    assert "repeated for each of the 4 items" in str(caught.value.__notes__)
    got = implicit_vjp(Root(lambda y, t: t[..., None] * y - 2), y, t, y, in_axes=(0, None, None))
    assert float(got) == pytest.approx(-4.0)


def test_args_of_another_library() -> None:
    if not TORCH:
        pytest.skip("needs torch")
    problem = batch()
    y, theta, (_, k) = problem.on(TORCH[0])
    with pytest.raises(InputError, match=r"args\[0\] is numpy's, and y an array of torch"):
        implicit_vjp(CONDITION, y, theta, y, args=(problem.args[0], k), in_axes=AXES)


# -- failures, and what is beside the value ------------------------------------------------------------
def test_a_failed_item_is_told_and_spoils_the_sum_alone() -> None:
    problem = batch()
    y, theta, (X, k) = problem.on(NUMPY)
    X[2] = np.diag(theta["c"] - 3 * k * y[2] ** 2)  # A = 0 there
    with pytest.raises(SolveError, match="3 of 4 converged; item 2: SINGULAR") as caught:
        implicit_vjp(CONDITION, y, theta, problem.v, args=(X, k), in_axes=AXES)
    assert caught.value.value["c"].shape == (N,)
    g = implicit_vjp(CONDITION, y, theta, problem.v, args=(X, k), in_axes=AXES, on_failure="nan")
    assert np.all(np.isnan(g["c"]))
    np.testing.assert_array_equal(np.isnan(g["s"]), [False, False, True, False])


def test_a_limit_is_on_each_item() -> None:
    problem = batch()
    y, theta, args = problem.on(NUMPY)
    y[1] += 1e-2
    with pytest.warns(match="item 1"), pytest.raises(InaccurateError, match=r"^item 1: "):
        implicit_vjp(CONDITION, y, theta, problem.v, args=args, in_axes=AXES, max_error=1e-6)


def test_a_linearisation_is_the_users() -> None:
    """Its theta is as given, it can be copied, and the copy's report is the same."""
    problem = batch()
    y, theta, args = problem.on(NUMPY)
    lin = linearize(CONDITION, y, theta, args=args, in_axes=AXES, error=True)
    expected = lin.vjp(problem.v)
    again = pickle.loads(pickle.dumps(lin))
    assert again.theta["c"].shape == (N,)
    assert again.report.error.correction["c"].shape == (N,)
    same(NUMPY, again.vjp(problem.v), expected, 0)


def test_products_that_are_given_take_all_items() -> None:
    """Without a vmap: theta is spread, and a given product is that of each item."""
    problem = batch()
    y, theta, args = problem.on(NUMPY)
    condition = Root(
        residual, jacobian=lambda y, theta, X, k: X + (3 * k * y**2 - theta["c"])[..., None] * np.eye(N),
        mixed_vjp=lambda y, theta, u, X, k: {"c": -y * u, "s": -u.sum(1)},
    )  # fmt: skip
    same(NUMPY, implicit_vjp(condition, y, theta, problem.v, args=args, in_axes=AXES), problem.gradient())


# -- the frameworks' own derivatives ---------------------------------------------------------------------
def solutions(theta: Any, X: Any, k: Any) -> np.ndarray:
    """Solve all items by Newton's method, in NumPy."""
    c, s, X, k = (np.asarray(x) for x in (theta["c"], theta["s"], X, k))
    assert c.shape == (N,)  # as the user has it
    y = np.zeros((ITEMS, N))
    for _ in range(50):
        F = residual(y, {"c": c, "s": s}, X, k)
        y = y - np.linalg.solve(X + (3 * k * y**2 - c)[..., None] * np.eye(N), F[..., None])[..., 0]
    return y


WRAPPED = implicit_function(CONDITION, in_axes=AXES)(solutions)


def test_a_solver_of_a_batch_on_numpy() -> None:
    problem = batch()
    _, theta, args = problem.on(NUMPY)
    y = WRAPPED(theta, *args)
    A = args[0] + (3 * args[1] * y**2 - theta["c"])[..., None] * np.eye(N)
    problem = problem._replace(y=y, A=A)
    same(NUMPY, WRAPPED.vjp(theta, problem.v, *args), problem.gradient())
    np.testing.assert_allclose(WRAPPED.jvp(theta, problem.t, *args), problem.tangent(), rtol=1e-7)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(("name", "compiled"), [("torch", False), ("jax", False), ("jax", True)])
def test_a_solver_of_a_batch_in_a_framework(name: str, compiled: bool) -> None:
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    problem = batch()
    _, theta, args = problem.on(lib)
    v = lib.array(problem.v)
    y = solutions(problem.theta, *problem.args)
    A = problem.args[0] + (3 * 0.3 * y**2 - problem.theta["c"])[..., None] * np.eye(N)

    def of_c(c: Any) -> Any:
        return (v * WRAPPED({"c": c, "s": theta["s"]}, *args)).sum()

    gradient = (fw.compiled_gradient if compiled else fw.gradient)(of_c)(theta["c"])
    np.testing.assert_allclose(lib.numpy(gradient), problem._replace(y=y, A=A).gradient()["c"], rtol=1e-7)


@EACH
def test_within_a_transform(name: str) -> None:
    """In jit, and as a function that is differentiated again: by c, at a fixed y."""
    fw, lib = framework(name), {"torch": TORCH, "jax": JAX}[name][0]
    problem = batch()
    y, theta, args = problem.on(lib)
    v = lib.array(problem.v)

    def of_c(c: Any) -> Any:
        return implicit_vjp(CONDITION, y, {"c": c, "s": theta["s"]}, v, args=args, in_axes=AXES)["c"]

    if name == "jax":
        np.testing.assert_allclose(lib.numpy(fw.compiled(of_c)(theta["c"])), problem.gradient()["c"], rtol=1e-7)
    got = fw.gradient(lambda c: of_c(c).sum())(theta["c"])
    ends = []
    for h in (1e-6, -1e-6):  # dA/dc = −diag
        moved = problem._replace(A=problem.A - h * np.einsum("j,jk->jk", np.ones(N), np.eye(N)))
        ends.append(moved.gradient()["c"].sum())
    assert float(got.sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_nobody_says_how_many_items() -> None:
    if not TORCH:
        pytest.skip("needs torch")
    wrapped = implicit_function(Stationary(lambda y, t: ((y - t) ** 2).sum()), in_axes=(0, None, None))(
        lambda t: t.expand(4, -1)
    )
    with pytest.raises(InputError, match="neither theta nor args carries"):
        wrapped(TORCH[0].array(np.ones(3)))
