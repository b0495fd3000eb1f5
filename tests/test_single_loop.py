"""Single loops on batches of samples, SOBA and SABA, against closed forms of the whole problem."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from frameworks import EACH, framework

from implicitdiff import (
    SABA,
    SOBA,
    Bilevel,
    FixedPoint,
    InputError,
    SolveWarning,
    Stationary,
    Status,
    Sweep,
    bilevel,
)
from implicitdiff.outer.sampling import drawn

RNG = np.random.default_rng(0)
N, M, P = 120, 60, 5
X, XV = RNG.normal(size=(N, P)), RNG.normal(size=(M, P))
T, TV = X @ np.ones(P) + RNG.normal(size=N), XV @ np.ones(P) + RNG.normal(size=M)
PULL, PRIOR = 0.7, 0.3
Y0, THETA0 = np.zeros(P), np.full(P, 3.0)
# y is a ridge regression that is pulled towards θ, which is regularised itself: L is a strictly convex quadratic of θ
INNER = Stationary(
    grad=lambda y, c, X, t, i: X[i].T @ (X[i] @ y - t[i]) / len(i) + PULL * (y - c),
    hvp=lambda y, c, v, X, t, i: X[i].T @ (X[i] @ v) / len(i) + PULL * v,
    mixed_vjp=lambda y, c, u, X, t, i: -PULL * u,
)


def loss(y: Any, c: Any, j: Any) -> Any:
    r = XV[j] @ y - TV[j]
    return (r * r).sum() / len(j) / 2 + PRIOR * (c * c).sum() / 2


OUTER = (loss, lambda y, c, j: (XV[j].T @ (XV[j] @ y - TV[j]) / len(j), PRIOR * c))
A = X.T @ X / N + PULL * np.eye(P)
J = PULL * np.linalg.inv(A)


def solved(c: np.ndarray) -> np.ndarray:
    return np.linalg.solve(A, X.T @ T / N + PULL * c)


def gradient(c: np.ndarray) -> np.ndarray:
    """The gradient of the outer value over all samples."""
    return J.T @ XV.T @ (XV @ solved(c) - TV) / M + PRIOR * c


BEST = np.linalg.solve(J.T @ XV.T @ XV @ J / M + PRIOR * np.eye(P), -gradient(np.zeros(P)))
OPTIONS: dict[str, Any] = {"args": (X, T), "optimizer": "sgd", "learning_rate": 0.3}


def run(tolerance: Any, steps: int, **more: Any) -> Any:
    return bilevel(INNER, OUTER, Y0, THETA0, tolerance=tolerance, steps=steps, **{**OPTIONS, **more})


def off(found: Any) -> float:
    return float(np.linalg.norm(found.theta - BEST) / np.linalg.norm(BEST))


def test_the_closed_form_is_the_optimum() -> None:
    assert np.linalg.norm(gradient(BEST)) < 1e-12


def test_variance_reduction_converges_where_constant_steps_stall() -> None:
    """Linearly, to the optimum over all samples; SOBA with the same steps stays at the noise of its batches."""
    reduced = [run(SABA((N, M), 12, step=0.3, seed=seed), 900) for seed in (0, 1)]
    noisy = run(SOBA((N, M), 12, step=0.3, decay=0), 900)
    for found in reduced:
        assert off(found) < 1e-6
        np.testing.assert_allclose(found.y, solved(BEST), rtol=1e-5)
        np.testing.assert_allclose(found.state.adjoint, np.linalg.solve(A, XV.T @ (XV @ found.y - TV) / M), atol=1e-5)
    assert off(noisy) > 1e-3
    assert noisy.status is reduced[0].status is Status.APPROXIMATE


def test_steps_that_fall_come_nearer_than_constant_ones() -> None:
    """Over the last steps of several runs, so that no lucky one decides."""
    errors = []
    for decay in (0.0, 0.5):
        found = [run(SOBA((N, M), 4, step=0.3, decay=decay, seed=seed), 400) for seed in range(2)]
        errors.append(np.sqrt(np.mean([off(f) ** 2 for f in found])))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", [SOBA, SABA])
def test_batches_of_all_samples_are_the_deterministic_step(kind: Any) -> None:
    """None takes no batch; one block of all samples is the mean over them. Both by the formulas of the method."""
    everything = Stationary(
        grad=lambda y, c, X, t: X.T @ (X @ y - t) / N + PULL * (y - c), hvp=lambda y, c, v, X, t: A @ v,
        mixed_vjp=lambda y, c, u, X, t: -PULL * u,
    )  # fmt: skip
    tolerance = SABA((None, M), M, step=0.3) if kind is SABA else SOBA((None, M), M, step=0.3, decay=0)
    found = bilevel(everything, OUTER, Y0, THETA0, tolerance=tolerance, steps=3, **OPTIONS)
    y, u, c = Y0, np.zeros(P), THETA0
    for _ in range(3):
        Xv, tv = XV, TV
        if kind is SOBA:
            j = drawn(np, "cpu", 0, 1, np.int32(_), M, M)
            Xv, tv = XV[j], TV[j]
        d = A @ y - X.T @ T / N - PULL * c, A @ u - Xv.T @ (Xv @ y - tv) / M, PRIOR * c + PULL * u
        y, u, c = y - 0.3 * d[0], u - 0.3 * d[1], c - 0.3 * d[2]
    for ours, theirs in ((found.y, y), (found.state.adjoint, u), (found.theta, c)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_counts_are_the_calls_and_what_they_are_given() -> None:
    calls: dict[str, list[Any]] = {"grad": [], "hvp": []}

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls[name].append(args[-1])
            return getattr(INNER, name)(*args)

        return call

    condition = Stationary(grad=counted("grad"), hvp=counted("hvp"), mixed_vjp=INNER.mixed_vjp, verify=False)
    loop = Bilevel(condition, OUTER, tolerance=SABA((N, M), (12, 6)), **OPTIONS)
    state = loop.init(Y0, THETA0)
    assert int(state.products) == len(calls["hvp"]) > 0  # the largest eigenvalue
    for _ in range(40):
        before = state
        state = loop.step(state)
        assert int(state.products) == len(calls["hvp"])
        assert int(state.inner_gradients - before.inner_gradients) == 1
    batches = calls["grad"][-40:]
    assert {len(set(i.tolist())) for i in batches} == {12}
    assert len({tuple(i) for i in batches}) <= N // 12  # blocks, once for all
    assert sorted({k for i in batches for k in i.tolist()}) == list(range(N))


def leaves(tree: Any) -> list[Any]:
    """Return the arrays and numbers of a state."""
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple) else [tree]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("tolerance", [SOBA((N, M), 10, seed=3), SABA((N, M), 10, seed=3)], ids=["SOBA", "SABA"])
def test_resumes_bit_for_bit_and_steps_are_pure(tolerance: Any, optimizer: str) -> None:
    whole = run(tolerance, 15, optimizer=optimizer)
    half = run(tolerance, 6, optimizer=optimizer)
    kept = pickle.loads(pickle.dumps(half.state))
    rest = run(tolerance, 9, optimizer=optimizer, resume=half.state)
    for one, other in ((half.state, kept), (whole.state, rest.state)):
        for a, b in zip(leaves(one), leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    other = run(type(tolerance)((N, M), 10, seed=4), 15, optimizer=optimizer)
    assert not np.array_equal(other.theta, whole.theta)


def test_draws_are_even_and_independent() -> None:
    """χ² of single draws, of pairs of steps and of pairs of places: beyond 5 standard deviations none is."""
    below, steps, size = 10, 4000, 5
    found = np.array([drawn(np, "cpu", 7, 0, np.int32(t), size, below) for t in range(steps)])
    assert found.min() == 0
    assert found.max() == below - 1

    def deviation(numbers: np.ndarray, kinds: int) -> float:
        counts, expected = np.bincount(numbers, minlength=kinds), len(numbers) / kinds
        return float((((counts - expected) ** 2).sum() / expected - (kinds - 1)) / np.sqrt(2 * (kinds - 1)))

    assert abs(deviation(found.ravel(), below)) < 5
    assert abs(deviation(found[:-1, 0] * below + found[1:, 0], below**2)) < 5
    assert abs(deviation(found[:, 0] * below + found[:, 1], below**2)) < 5
    streams = np.array([drawn(np, "cpu", 7, 1, np.int32(t), 1, below)[0] for t in range(steps)])
    assert abs(deviation(streams * below + found[:, 0], below**2)) < 5


def test_divergence_is_told() -> None:
    with pytest.warns(SolveWarning, match="is not finite"):
        found = run(SABA((N, M), 12, step=1e3), 400)
    assert found.status is Status.NON_FINITE
    assert np.isfinite(found.theta).all()


def test_bounds_hold_and_the_optimum_within_them_is_found() -> None:
    from scipy.optimize import minimize

    value = lambda c: ((XV @ solved(c) - TV) ** 2).sum() / M / 2 + PRIOR * c @ c / 2
    best = minimize(value, Y0, jac=gradient, bounds=[(None, 0.2)] * P, options={"ftol": 1e-15, "gtol": 1e-10}).x
    found = run(SABA((N, M), 12, step=0.3), 900, bounds=(None, 0.2))
    assert (best == 0.2).any()
    np.testing.assert_allclose(found.theta, best, atol=1e-5)


WRONG: list[tuple[Any, str]] = [
    (lambda: SOBA(0), "samples = 0"),
    (lambda: SOBA((100, 2.5)), "samples = .* outer samples"),
    (lambda: SOBA((1, 2, 3)), "samples = .* one number, or two"),
    (lambda: SOBA((None, None)), "neither problem is a mean"),
    (lambda: SOBA(100, 101), "batch = 101: expected between 1 and 100"),
    (lambda: SOBA(100, True), "batch = True"),
    (lambda: SOBA(100, step=0), "step = 0"),
    (lambda: SOBA(100, step="fast"), "step = 'fast'"),
    (lambda: SOBA(100, decay=-1), "decay = -1"),
    (lambda: SOBA(100, seed=1.5), "seed = 1.5"),
    (lambda: SOBA(100, seed=2**31), "seed = 2147483648"),
    (lambda: SABA(100, 24), "batch = 24 does not divide the 100 inner samples.*\n.*batch = 25 or 20"),
    (lambda: run(SOBA(N, 10), 1, inner="lbfgs"), "inner: SOBA solves nothing"),
    (lambda: run(SABA(N, 10), 1, solver="cg"), "solver: SABA solves nothing"),
    (lambda: run(SOBA((N, M), 10), 1, optimizer="L-BFGS-B", learning_rate=None), "batches have others"),
    (lambda: Bilevel(FixedPoint(lambda y, c, i: y), loss, tolerance=SOBA(N, 10)), "F of FixedPoint is no gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=lambda x: None)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# -- frameworks ----------------------------------------------------------------------------------------
def in_framework(xp: Any) -> tuple[Any, Any, tuple[Any, ...], Any, Any]:
    """The problem above as functions that the framework derives itself."""
    Xv, tv = xp.asarray(XV), xp.asarray(TV)

    def objective(y: Any, c: Any, X: Any, t: Any, i: Any) -> Any:
        r = X[i] @ y - t[i]
        return (r * r).sum() / i.shape[0] / 2 + PULL * ((y - c) ** 2).sum() / 2

    def outer(y: Any, c: Any, j: Any) -> Any:
        r = Xv[j] @ y - tv[j]
        return (r * r).sum() / j.shape[0] / 2 + PRIOR * (c * c).sum() / 2

    return objective, outer, (xp.asarray(X), xp.asarray(T)), xp.asarray(Y0), xp.asarray(THETA0)


@pytest.mark.slow(on=("jax",))
@EACH
def test_frameworks_draw_the_same_batches(name: str) -> None:
    fw = framework(name)
    objective, outer, args, y0, theta0 = in_framework(fw.xp)
    for tolerance in (SOBA((N, M), (10, 7), step=0.2), SABA((N, M), (12, 6), step=0.2)):
        loop = Bilevel(objective, outer, tolerance=tolerance, **{**OPTIONS, "args": args})
        same = Bilevel(INNER, OUTER, tolerance=tolerance, **OPTIONS)
        state, mine = loop.init(y0, theta0), same.init(Y0, THETA0)
        for _ in range(6):
            state, mine = loop.step(state), same.step(mine)
        np.testing.assert_allclose(fw.numpy(state.theta), mine.theta, rtol=1e-6)
        np.testing.assert_allclose(fw.numpy(state.y), mine.y, rtol=1e-6)
        assert float(state.value) == pytest.approx(float(mine.value), rel=1e-6)
        assert (int(state.products), int(state.inner_gradients)) == (int(mine.products), int(mine.inner_gradients))


def test_steps_in_a_scan_are_those_one_by_one() -> None:
    fw = framework("jax")
    objective, outer, args, y0, theta0 = in_framework(fw.xp)
    loop = Bilevel(objective, outer, tolerance=SABA((N, M), 12, step=0.3), **{**OPTIONS, "args": args})
    first = loop.init(y0, theta0)
    scan = fw.jax.jit(lambda s: fw.jax.lax.scan(lambda s, _: (loop.step(s), None), s, None, length=900)[0])
    np.testing.assert_allclose(np.asarray(scan(first).theta), BEST, rtol=1e-5)


def test_any_library_of_the_array_standard() -> None:
    xp = pytest.importorskip("array_api_strict")
    B, b, C, c_ = map(xp.asarray, (X, T, XV, TV))
    rows = lambda x, i: xp.take(x, i, axis=0)
    inner = Stationary(
        grad=lambda y, c, i: rows(B, i).T @ (rows(B, i) @ y - rows(b, i)) / i.shape[0] + PULL * (y - c),
        hvp=lambda y, c, v, i: rows(B, i).T @ (rows(B, i) @ v) / i.shape[0] + PULL * v,
        mixed_vjp=lambda y, c, u, i: -PULL * u,
    )
    outer = (
        lambda y, c, j: xp.sum((rows(C, j) @ y - rows(c_, j)) ** 2) / j.shape[0] / 2 + PRIOR * xp.sum(c * c) / 2,
        lambda y, c, j: (rows(C, j).T @ (rows(C, j) @ y - rows(c_, j)) / j.shape[0], PRIOR * c),
    )
    options = {**OPTIONS, "args": (), "tolerance": SABA((N, M), 12), "steps": 8}
    found = bilevel(inner, outer, xp.asarray(Y0), xp.asarray(THETA0), **options)
    np.testing.assert_allclose(np.asarray(found.theta), run(SABA((N, M), 12), 8).theta, rtol=1e-10)


def test_the_step_is_a_third_of_the_inverse_of_the_largest_eigenvalue_on_the_first_batch() -> None:
    for seed in range(3):
        i = drawn(np, "cpu", seed, 0, np.int32(0), 30, N)
        largest = np.linalg.eigvalsh(X[i].T @ X[i] / 30 + PULL * np.eye(P))[-1]
        state = Bilevel(INNER, OUTER, tolerance=SOBA((N, M), 30, seed=seed), **OPTIONS).init(Y0, THETA0)
        assert float(state.scale) == pytest.approx(1 / 3 / largest, rel=0.05)


def test_agrees_with_the_loop_that_solves() -> None:
    everything = Stationary(
        grad=lambda y, c: X.T @ (X @ y - T) / N + PULL * (y - c), hvp=lambda y, c, v: A @ v,
        mixed_vjp=lambda y, c, u: -PULL * u,
    )  # fmt: skip
    every = np.arange(M)
    outer = lambda y, c: loss(y, c, every), lambda y, c: OUTER[1](y, c, every)
    options = {**OPTIONS, "args": (), "tolerance": Sweep(0.1, target=1e-3)}
    found = bilevel(everything, outer, Y0, THETA0, steps=150, **options)
    np.testing.assert_allclose(found.theta, run(SABA((N, M), 12, step=0.3), 900).theta, rtol=1e-5)
