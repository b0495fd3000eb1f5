"""Roots whose motion conserves something: against closed forms and solutions found anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
from conftest import LIBRARIES, TORCH, Library, relative_error
from frameworks import EACH, framework

import implicitdiff as idf
from implicitdiff import FixedPoint, InputError, Root, ShapeError, SingularError, SolveError
from implicitdiff.solvers import suitable

GENERAL = ("auto", *suitable())
K, Y = np.array([2.0, 1.0]), np.array([1.0, 2.0])
JACOBIAN = np.array([[-1.0, 2.0], [1.0, -2.0]]) / 3  # of T (k₂, k₁) / (k₁ + k₂) for T = 3


def exchange(xp: Any) -> Any:
    """A ⇌ B with rates k₁ and k₂."""

    def rates(y: Any, k: Any) -> Any:
        flow = k[..., 0] * y[..., 0] - k[..., 1] * y[..., 1]
        return xp.stack([-flow, flow], axis=-1)

    return rates


WAYS: dict[str, Any] = {
    "vector": lambda lib: lib.array(np.ones(2)),
    "matrix": lambda lib: lib.array(np.ones((2, 1))),
    "function": lambda lib: lambda y, k: y[..., 0] + y[..., 1],
}


@pytest.mark.parametrize("lib", [*LIBRARIES[:2], *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", GENERAL)
def test_exchange(lib: Library, solver: str, way: str) -> None:
    if lib.name == "array_api_strict" and way == "function":
        pytest.skip("its entries are not numbers")
    root = Root(exchange(lib.xp), conserve=WAYS[way](lib))
    y, k = lib.array(Y), lib.array(K)
    assert relative_error(lib, idf.implicit_jacobian(root, y, k, solver=solver), JACOBIAN) <= 1e-7
    found, report = idf.implicit_vjp(root, y, k, lib.array([1.0, 0.0]), solver=solver, return_report=True)
    assert relative_error(lib, found, JACOBIAN[0]) <= 1e-7
    assert report.converged


def test_the_pseudo_inverse_is_something_else() -> None:
    """... and without a word a singular A is an error."""
    least = idf.implicit_jacobian(Root(exchange(np), singular="minimum-norm"), Y, K)
    np.testing.assert_allclose(least[:, 0], [-0.4, 0.2], rtol=1e-7)
    with pytest.raises(idf.SingularError):
        idf.implicit_jacobian(Root(exchange(np)), Y, K)


def test_a_total_that_is_a_parameter() -> None:
    """C(y, θ) = y₁ + y₂ − T: the derivative in T is there, too."""
    root = Root(lambda y, t: exchange(np)(y, t), conserve=lambda y, t: y[0] + y[1] - t[2])
    found = idf.implicit_jacobian(root, Y, np.array([2.0, 1.0, 3.0]))
    np.testing.assert_allclose(found, np.column_stack([JACOBIAN, [1 / 3, 2 / 3]]), rtol=1e-7)


def test_units() -> None:
    """Species in units of 1e-9 and 1e6; the total is one of both."""
    d = np.array([1e-9, 1e6])
    root = Root(lambda z, k: exchange(np)(z / d, k) * d, conserve=1 / d)
    np.testing.assert_allclose(idf.implicit_jacobian(root, d * Y, K), d[:, None] * JACOBIAN, rtol=1e-6)


def test_batch_and_error_estimate() -> None:
    y, k = np.stack([Y, 2 * Y, [2.0, 2.0]]), np.stack([K, K, [1.0, 1.0]])
    root = Root(exchange(np), conserve=np.ones((2, 1)))
    found, report = idf.implicit_vjp(root, y, k, np.ones((3, 2)) * [1.0, 0.0], batched=True, return_report=True)
    np.testing.assert_allclose(found, [[-1 / 3, 2 / 3], [-2 / 3, 4 / 3], [-1.0, 1.0]], rtol=1e-6)
    assert report.converged.all()
    off = Y + np.array([1e-5, -1e-5])
    _, report = idf.implicit_vjp(root, off, K, np.array([1.0, 0.0]), return_report=True, error=True)
    assert 1e-6 <= report.error.relative <= 1e-4


# -- a network of reactions ------------------------------------------------------------------------------
def enzyme(y: Any, k: Any) -> Any:
    """E + S ⇌ C → E + P, P → S: E + C and S + C + P stay."""
    binding, turnover, decay = k[0] * y[0] * y[1] - k[1] * y[2], k[2] * y[2], k[3] * y[3]
    return np.stack([-binding + turnover, -binding + decay, binding - turnover, turnover - decay])


TOTALS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])


def steady(k: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Steady state with the totals of the start."""

    def equations(y: Any) -> Any:
        return np.concatenate([enzyme(y, k)[1:3], TOTALS.T @ (y - start)])

    return scipy.optimize.root(equations, start, tol=1e-13).x


@pytest.mark.parametrize("solver", ["auto", "gmres", "lsmr"])
@pytest.mark.parametrize("form", ["array", "function"])
def test_an_enzyme_against_steady_states_found_anew(form: str, solver: str) -> None:
    k, start = np.array([3.0, 0.5, 1.2, 0.8]), np.array([0.4, 0.9, 0.3, 0.5])
    y = steady(k, start)
    root = Root(enzyme, conserve=TOTALS if form == "array" else lambda y, k: TOTALS.T @ y)
    found = idf.implicit_jacobian(root, y, k, solver=solver)
    h = 1e-5
    truth = np.stack([(steady(k + h * e, start) - steady(k - h * e, start)) / (2 * h) for e in np.eye(4)], axis=-1)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(TOTALS.T @ found, 0.0, atol=1e-9)


# -- a Markov chain --------------------------------------------------------------------------------------
def chain(xp: Any, logits: Any) -> Any:
    e = xp.exp(logits)
    return e / xp.sum(e, axis=-1, keepdims=True)


def stationary(logits: np.ndarray) -> np.ndarray:
    P = chain(np, logits)
    n = len(P)
    return np.linalg.lstsq(np.vstack([P.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1.0), rcond=None)[0]


@EACH
def test_stationary_distribution(name: str) -> None:
    """Of a chain with n states, through a framework: against one that is found anew."""
    f = framework(name)
    xp, logits = f.xp, np.random.default_rng(0).normal(size=(5, 5))
    root = Root(lambda p, t: xp.matmul(chain(xp, t).T, p) - p, conserve=xp.asarray(np.ones(5)))
    solve = idf.implicit_function(root)(lambda t: xp.asarray(stationary(np.asarray(t))))
    weights = np.arange(5.0)
    found = f.gradient(lambda t: xp.sum(xp.asarray(weights) * solve(t) ** 2))(xp.asarray(logits))
    h, truth = 1e-6, np.zeros((5, 5))
    for i, j in np.ndindex(5, 5):
        e = np.zeros((5, 5))
        e[i, j] = h
        truth[i, j] = weights @ (stationary(logits + e) ** 2 - stationary(logits - e) ** 2) / (2 * h)
    np.testing.assert_allclose(f.numpy(found), truth, rtol=1e-6, atol=1e-9)


def test_fixed_point_of_the_power_iteration() -> None:
    logits = np.random.default_rng(1).normal(size=(4, 4))
    y = stationary(logits)
    point = FixedPoint(lambda p, t: chain(np, t).T @ p, conserve=np.ones(4))
    root = Root(lambda p, t: chain(np, t).T @ p - p, conserve=np.ones(4))
    found = [idf.implicit_jacobian(condition, y, logits) for condition in (point, root)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[0].sum(axis=0), 0.0, atol=1e-12)


# -- what is told ----------------------------------------------------------------------------------------
def test_what_is_not_conserved_is_told() -> None:
    with pytest.raises(SolveError, match="conserve: F does not conserve it: Wᵀ A z is 1 of"):
        idf.implicit_vjp(Root(exchange(np), conserve=np.array([1.0, -1.0])), Y, K, np.ones(2))
    regular = Root(lambda y, t: np.array([[2.0, 1.0], [0.0, 1.0]]) @ y - t, conserve=np.ones(2))
    with pytest.raises(SolveError, match="does not conserve"):
        idf.implicit_vjp(regular, np.array([0.5, 1.0]), np.array([2.0, 1.0]), np.ones(2))


def test_a_normalisation_that_is_not_conserved_is_taken_at_its_word() -> None:
    """F sees differences of y only, and W fixes y₀: not Wᵀ F = 0, and right all the same."""
    D = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]])
    root = Root(lambda y, t: D.T @ (D @ y - t), jacobian=lambda y, t: D.T @ D, mixed_jvp=lambda y, t, d: -D.T @ d,
                conserve=np.array([1.0, 0.0, 0.0]), verify=False)  # fmt: skip
    theta = np.array([1.0, -2.0, 0.5])
    y = np.linalg.pinv(D) @ theta
    moved = idf.implicit_jvp(root, y - y[0], theta, np.array([1.0, 0.0, 0.0]))
    least = np.linalg.pinv(D) @ [1.0, 0.0, 0.0]
    np.testing.assert_allclose(moved, least - least[0], atol=1e-12)


def test_arguments() -> None:
    with pytest.raises(InputError, match="conserve is list"):
        Root(exchange(np), conserve=[1.0, 1.0])
    with pytest.raises(idf.NonFiniteError, match="conserve holds NaN"):
        idf.implicit_vjp(Root(exchange(np), conserve=np.array([1.0, np.nan])), Y, K, np.ones(2))
    with pytest.raises(ShapeError, match=r"conserve has shape \(3,\); expected \(n, k\) with n = 2"):
        idf.implicit_vjp(Root(exchange(np), conserve=np.ones(3)), Y, K, np.ones(2))


# -- W that does not hold all of it ----------------------------------------------------------------------
def exchanges(y: Any, k: Any) -> Any:
    """Independent exchanges A ⇌ B: as many totals as pairs."""
    flow = k * y[0::2] - y[1::2]
    return np.stack([-flow, flow], axis=-1).reshape(-1)


@pytest.mark.parametrize("pairs", [2, 70])
@pytest.mark.parametrize("solver", [name for name in GENERAL if name != "bicgstab"])
def test_a_law_that_is_missing_is_told(solver: str, pairs: int) -> None:
    """The system that W borders is still singular, and a solution of least norm is none, whoever finds one."""
    W = np.kron(np.eye(pairs), np.ones((2, 1)))
    k = np.linspace(1.0, 2.0, pairs)
    y = np.stack([np.ones(pairs), k], axis=-1).reshape(-1)
    cotangent = np.sin(np.arange(2.0 * pairs))
    whole = idf.implicit_vjp(Root(exchanges, conserve=W), y, k, cotangent, solver=solver)
    np.testing.assert_allclose(whole, (cotangent[1::2] - cotangent[0::2]) / (1 + k), rtol=1e-6)
    with pytest.raises(SingularError, match="conserve: A bordered by W is still singular"):
        idf.implicit_vjp(Root(exchanges, conserve=W[:, 1:]), y, k, cotangent, solver=solver)
    with pytest.raises(SingularError, match="conserve: A bordered by W is still singular"):
        idf.implicit_jvp(Root(exchanges, conserve=W[:, 1:], verify=False), y, k, np.ones(pairs), solver=solver)


@pytest.mark.parametrize("solver", ["auto", "lsmr"])
@pytest.mark.parametrize("more", [0.0, 2.0], ids=["zero", "dependent"])
def test_columns_of_w_that_say_nothing_are_told(more: float, solver: str) -> None:
    with pytest.raises(SingularError, match="conserve: column 1 of W is zero" if not more else "conserve: .* depend"):
        idf.implicit_vjp(Root(exchange(np), conserve=np.array([[1.0, more], [1.0, more]])), Y, K, np.ones(2),
                         solver=solver)  # fmt: skip


@pytest.mark.parametrize("lib", [*LIBRARIES[:2], *TORCH], ids=lambda lib: lib.name)
def test_whole_numbers(lib: Library) -> None:
    """W of counts of atoms is an array of integers."""
    W = lib.xp.asarray(lib.array(np.ones((2, 1))), dtype=lib.xp.int64)
    found = idf.implicit_jacobian(Root(exchange(lib.xp), conserve=W), lib.array(Y), lib.array(K))
    assert relative_error(lib, found, JACOBIAN) <= 1e-7


# -- beside a pattern ------------------------------------------------------------------------------------
def diffusion(xp: Any) -> Any:
    """Exchange between neighbours of a ring, one rate for each pair: the total stays."""

    def flow(y: Any, k: Any) -> Any:
        out = k * y - xp.roll(y, -1)
        return xp.roll(out, 1) - out

    return flow


@EACH
@pytest.mark.parametrize("form", ["array", "function"])
def test_with_a_pattern(name: str, form: str) -> None:
    """A is assembled from a few products, and bordered as it is."""
    f, n = framework(name), 60
    k = 1 + 0.3 * np.sin(np.arange(n))
    A = np.stack([diffusion(np)(e, k) for e in np.eye(n)], axis=-1)
    y = np.linalg.lstsq(np.vstack([A, np.ones(n)]), np.append(np.zeros(n), 1.0 * n), rcond=None)[0]
    xp, where = f.xp, (A != 0)
    conserve = xp.asarray(np.ones(n)) if form == "array" else (lambda y, k: xp.sum(y))
    v = np.cos(np.arange(n))
    found, report = idf.implicit_vjp(
        Root(diffusion(xp), conserve=conserve, sparsity=where), xp.asarray(y), xp.asarray(k), xp.asarray(v),
        return_report=True,
    )  # fmt: skip
    border = np.block([[A, np.ones((n, 1))], [np.ones((1, n)), 0.0]])
    B = np.roll(np.diag(y), 1, axis=0) - np.diag(y)
    np.testing.assert_allclose(f.numpy(found), -B.T @ np.linalg.solve(border.T, np.append(v, 0.0))[:n], rtol=1e-6)
    assert report.solver == "lu"
    assert "assembled from" in report.reason
