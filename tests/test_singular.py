"""Flat directions: losses that do not see them, losses that do, and A⁺ in place of A⁻¹; with every solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES, TORCH, Library, relative_error
from frameworks import EACH, framework

import implicitdiff as idf
from implicitdiff import FixedPoint, NotInvariantError, Root, SingularError, Stationary, UnknownNameError
from implicitdiff.solvers import get_solver

SOLVERS = tuple(name for name in idf.solver_names() if not getattr(get_solver(name), "approximate", False))
GENERAL = tuple(name for name in SOLVERS if getattr(get_solver(name), "structure", "general") == "general")
LIBS = pytest.mark.parametrize("lib", [*LIBRARIES[:2], *TORCH], ids=lambda lib: lib.name)
N, M = 6, 3


class Softmax:
    """Logits y whose softmax is that of W θ: free by a shift. y = W θ + s, so that dL/dθ = Wᵀ v for v ⟂ 1."""

    def __init__(self, xp: Any = np, array: Any = np.asarray, items: int = 0) -> None:
        rng = np.random.default_rng(0)
        self.W = rng.normal(size=(N, M))
        lead = (items,) if items else ()
        self.theta = rng.normal(size=(*lead, M))
        self.y = self.theta @ self.W.T + 0.7
        self.seen = rng.normal(size=(*lead, N))
        self.unseen = self.seen - self.seen.mean(axis=-1, keepdims=True)
        self.truth = self.unseen @ self.W
        W = array(self.W)

        def softmax(z: Any) -> Any:
            e = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
            return e / xp.sum(e, axis=-1, keepdims=True)

        def hessian(z: Any, v: Any) -> Any:  # of log Σ exp
            s = softmax(z)
            return s * v - s * xp.sum(s * v, axis=-1, keepdims=True)

        self.functions = {
            "grad": lambda y, t: softmax(y) - softmax(t @ W.T),
            "hvp": lambda y, t, v: hessian(y, v),
            "mixed_vjp": lambda y, t, u: -hessian(t @ W.T, u) @ W,
            "mixed_jvp": lambda y, t, d: -hessian(t @ W.T, d @ W.T),
        }

    def condition(self, singular: str) -> Stationary:
        return Stationary(**self.functions, singular=singular)

    def hessian(self) -> np.ndarray:
        s = np.exp(self.y) / np.exp(self.y).sum()
        return np.diag(s) - np.outer(s, s)


@LIBS
@pytest.mark.parametrize("solver", SOLVERS)
def test_gauge_with_every_solver(lib: Library, solver: str) -> None:
    """The one gradient that there is; and an error, with the leak, where the loss sees the shift."""
    p = Softmax(lib.xp, lib.array)
    y, theta = lib.array(p.y), lib.array(p.theta)
    gauge = p.condition("gauge")
    found, report = idf.implicit_vjp(gauge, y, theta, lib.array(p.unseen), solver=solver, return_report=True)
    assert relative_error(lib, found, p.truth) <= 1e-9
    assert report.converged
    assert report.leak <= 1e-9
    if report.solver == "pinv":
        assert (report.rank, report.nullity) == (N - 1, 1)
    with pytest.raises(NotInvariantError, match=r"sees its null space: 0\.273") as told:
        idf.implicit_vjp(gauge, y, theta, lib.array(p.seen), solver=solver)
    leak = abs(p.seen.sum()) / np.sqrt(N) / np.linalg.norm(p.seen)
    assert told.value.report.leak == pytest.approx(leak, rel=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_minimum_norm_with_every_solver(solver: str) -> None:
    """−A⁺B, whatever the loss sees."""
    p = Softmax()
    condition, pinv = p.condition("minimum-norm"), np.linalg.pinv(p.hessian(), rcond=1e-12, hermitian=True)
    B = np.stack([p.functions["mixed_jvp"](p.y, p.theta, e) for e in np.eye(M)], axis=-1)
    found, report = idf.implicit_vjp(condition, p.y, p.theta, p.seen, solver=solver, return_report=True)
    np.testing.assert_allclose(found, -B.T @ pinv @ p.seen, rtol=1e-8)
    assert report.status is idf.Status.LEAST_SQUARES
    assert not report.converged
    tangent = np.array([1.0, -2.0, 0.5])
    moved = idf.implicit_jvp(condition, p.y, p.theta, tangent, solver=solver)
    np.testing.assert_allclose(moved, -pinv @ B @ tangent, rtol=1e-8, atol=1e-10)
    jacobian = idf.implicit_jacobian(condition, p.y, p.theta, solver=solver)
    np.testing.assert_allclose(jacobian, -pinv @ B, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_by_default_a_loss_that_sees_a_flat_direction_is_an_error(solver: str) -> None:
    p = Softmax()
    with pytest.raises(idf.SolveError) as told:
        idf.implicit_vjp(p.condition("raise"), p.y, p.theta, p.seen, solver=solver)
    assert not isinstance(told.value, NotInvariantError)


@LIBS
@pytest.mark.parametrize("solver", ["auto", "cg", "lsmr"])
def test_items_of_a_batch_are_told_one_by_one(lib: Library, solver: str) -> None:
    if lib.per_item:
        one = Softmax(lib.xp, lib.array)
    p = Softmax(lib.xp, lib.array, items=3)
    condition = (one if lib.per_item else p).condition("gauge")
    v = p.unseen.copy()
    v[1] += 1.0
    args = condition, lib.array(p.y), lib.array(p.theta), lib.array(v)
    with pytest.raises(NotInvariantError, match="item 1") as told:
        idf.implicit_vjp(*args, solver=solver, batched=True)
    leak = lib.numpy(told.value.report.leak)
    assert leak[1] == pytest.approx(np.sqrt(N) / np.linalg.norm(v[1]), rel=1e-8)
    assert max(leak[0], leak[2]) <= 1e-9
    found = lib.numpy(idf.implicit_vjp(*args, solver=solver, batched=True, on_failure="nan"))
    assert np.all(np.isnan(found[1]))
    np.testing.assert_allclose(found[[0, 2]], p.truth[[0, 2]], rtol=1e-8)


@pytest.mark.parametrize("solver", GENERAL)
def test_roots_and_fixed_points(solver: str) -> None:
    """Asymmetric, with other null spaces left and right: F = P (D y − K θ) sees y but for one direction."""
    rng = np.random.default_rng(2)
    P, D, K = rng.normal(size=(4, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 2))
    theta = rng.normal(size=2)
    y = np.linalg.lstsq(D, K @ theta, rcond=None)[0]
    given = {"mixed_vjp": lambda y, t, u: -(P @ K).T @ u, "mixed_jvp": lambda y, t, d: -P @ K @ d}
    root = Root(lambda y, t: P @ (D @ y - K @ t), jacobian=lambda y, t: P @ D, singular="gauge", **given)
    fixed = FixedPoint(
        lambda y, t: y - P @ (D @ y - K @ t), jacobian=lambda y, t: np.eye(4) - P @ D, singular="gauge",
        mixed_vjp=lambda y, t, u: (P @ K).T @ u,
    )  # fmt: skip
    w = rng.normal(size=3)
    for condition in (root, fixed):
        found = idf.implicit_vjp(condition, y, theta, D.T @ w, solver=solver)
        np.testing.assert_allclose(found, K.T @ w, rtol=1e-7)
        with pytest.raises(NotInvariantError, match="null space"):
            idf.implicit_vjp(condition, y, theta, rng.normal(size=4), solver=solver)
    # forward the minimum-norm representative, or one of its like
    moved = idf.implicit_jvp(root, y, theta, np.array([1.0, 2.0]), solver=solver)
    np.testing.assert_allclose(D @ moved, K @ [1.0, 2.0], rtol=1e-7)
    if solver not in {"gmres", "bicgstab"}:
        np.testing.assert_allclose(moved, np.linalg.pinv(D) @ K @ [1.0, 2.0], rtol=1e-7, atol=1e-9)


def test_a_tangent_without_a_solution_is_singular() -> None:
    """F = A y − θ leaves the range of A: no y* is near, whatever the loss is."""
    A = np.diag([1.0, 2.0, 0.0])
    root = Root(lambda y, t: A @ y - t, jacobian=lambda y, t: A, mixed_jvp=lambda y, t, d: -d, singular="gauge")
    y = np.array([1.0, 1.0, 5.0])
    with pytest.raises(SingularError, match="no solution"):
        idf.implicit_jvp(root, y, A @ y, np.ones(3))


def test_a_regular_matrix_is_solved_as_ever() -> None:
    A = np.array([[3.0, 1.0], [0.5, 2.0]])
    for singular in ("gauge", "minimum-norm"):
        root = Root(lambda y, t: A @ y - t, jacobian=lambda y, t: A, mixed_vjp=lambda y, t, u: -u, singular=singular)
        for solver in GENERAL:
            found, report = idf.implicit_vjp(
                root, np.linalg.solve(A, np.ones(2)), np.ones(2), np.ones(2), solver=solver, return_report=True
            )
            np.testing.assert_allclose(found, np.linalg.solve(A.T, np.ones(2)), rtol=1e-9)
            assert report.nullity in {0, None}


def test_the_name_is_checked() -> None:
    for make in (lambda s: Stationary(lambda y, t: 0.0, singular=s), lambda s: Root(lambda y, t: y, singular=s)):
        with pytest.raises(UnknownNameError, match="singular = 'pinv': expected one of 'raise', 'gauge'"):
            make("pinv")


# -- frameworks with autodiff ----------------------------------------------------------------------------
@pytest.mark.slow(on=("jax",))
@EACH
def test_matrix_factors(name: str) -> None:
    """Factors u vᵀ of rank one, free by a number: gradients, compiled ones and Hessians of what does not see it."""
    f = framework(name)
    xp, K = f.xp, f.xp.asarray(np.random.default_rng(0).normal(size=(7, 2)))

    def product(theta: Any) -> Any:
        z = xp.exp(K @ theta)
        return z[:3, None] * z[None, 3:]

    def misfit(y: Any, theta: Any) -> Any:
        return xp.sum((y["u"][:, None] * y["v"][None, :] - product(theta)) ** 2) / 2

    @idf.implicit_function(Stationary(misfit, singular="gauge"), solver="auto")
    def factors(theta: Any) -> Any:
        z = np.exp(np.asarray(K) @ np.asarray(theta))
        return {"u": xp.asarray(1.7 * z[:3]), "v": xp.asarray(z[3:] / 1.7)}

    def loss(theta: Any) -> Any:
        y = factors(theta)
        return xp.sum(xp.sin(y["u"][:, None] * y["v"][None, :]))

    theta = xp.asarray(np.array([0.3, -0.2]))
    truth = f.gradient(lambda t: xp.sum(xp.sin(product(t))))(theta)
    np.testing.assert_allclose(f.numpy(f.gradient(loss)(theta)), f.numpy(truth), rtol=1e-9)
    hessian = f.transforms()["hessian"]
    A_ = np.array([[1.0, 2.0], [2.0, 4.0]])
    A = xp.asarray(A_)
    curvature = hessian(lambda t: xp.sum(xp.sin(product(t))))(theta)
    np.testing.assert_allclose(f.numpy(hessian(loss)(theta)), f.numpy(curvature), rtol=1e-8)
    y = factors(theta)
    with pytest.raises(NotInvariantError, match=r"sees its null space: 0\.93"):
        idf.implicit_grad(factors.condition, lambda y, t: xp.sum(y["u"] ** 3), y, theta)
    slope = Root(lambda y, t: A @ (A @ y - t), singular="minimum-norm")
    least = idf.implicit_function(slope)(lambda t: xp.asarray(np.linalg.pinv(A_) @ np.asarray(t)))
    with pytest.raises(idf.DerivativeError, match=r"second derivative|differentiated again"):
        hessian(lambda t: xp.sum(least(t) ** 3))(theta)
    if name == "jax":  # nothing can be raised there
        inside = f.compiled(lambda t, y: idf.implicit_grad(factors.condition, lambda y, t: xp.sum(y["u"] ** 3), y, t))
        assert np.all(np.isnan(f.numpy(inside(theta, y))))


def test_the_unit_of_a_coordinate_does_not_matter() -> None:
    """Rank, leak of an invariant loss and gradient stay under y → D y."""
    p = Softmax()
    d = 10.0 ** np.array([-5, 3, 0, 6, -2, 1])
    condition = Stationary(
        hessian=lambda y, t: p.hessian() / d[:, None] / d, singular="gauge",
        mixed_vjp=lambda y, t, u: p.functions["mixed_vjp"](p.y, t, u / d),
    )  # fmt: skip
    for solver in ("lu", "cholesky", "pinv"):
        found, report = idf.implicit_vjp(condition, d * p.y, p.theta, p.unseen / d, solver=solver, return_report=True)
        np.testing.assert_allclose(found, p.truth, rtol=1e-7)
        assert (report.rank, report.nullity) == (N - 1, 1)
