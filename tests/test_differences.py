"""FAULTS 58, 60 to 62, 65 and 66: differences with steps in any unit, measured noise, kinks; the complex step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Library
from scipy.optimize import brentq

import implicitdiff as idf
from implicitdiff.backends.numpy import NumpyBackend

SOURCES = ("finite_differences", "complex step, or differences")


class Plain(NumpyBackend):
    """NumPy without autograd, whoever has imported it."""

    def _tape(self) -> bool:
        return False


def backend_of(source: str) -> NumpyBackend:
    """Return the backend."""
    return NumpyBackend(source) if source == "finite_differences" else Plain()


SOURCE = pytest.mark.parametrize("source", SOURCES)
RNG = np.random.default_rng(7)
A = np.array([[2.0, 0.3, 0.1], [0.1, 1.5, -0.4], [0.2, 0.0, 1.0]])
H = A @ A.T
T = np.array([1.0, 2.0, -0.7])


def count(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the number of its calls as an attribute."""

    def counted(*args: Any) -> Any:
        counted.calls += 1  # type: ignore[attr-defined]
        return f(*args)

    counted.calls = 0  # type: ignore[attr-defined]
    return counted


# -- units -----------------------------------------------------------------------------------------------
UNITS = [1e-9, 1e-3, 1e9]
MIXED = [*((u, u, u) for u in UNITS), (1e-9, 1.0, 1e9), (1e6, 1e-6, 1.0)]


def in_units(D: np.ndarray, E: np.ndarray, S: np.ndarray, kind: str) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A problem written in other units: the condition, y, theta and dy/dtheta."""
    # values alone say nothing of the unit of a zero beside entries of others
    last = 0.6 if kind == "plain" and len(set(D)) > 1 else 0.0
    y, theta = np.array([0.4, -1.3, last]), np.array([0.7, 1.9, -0.2])
    shift = np.exp(0.3 * y) + A @ y - np.sin(theta)

    def root(y: Any, theta: Any) -> Any:
        return S * (np.exp(0.3 * y / D) + A @ (y / D) - np.sin(theta / E) - shift)

    def plain(y: Any, theta: Any) -> Any:
        z = y / D
        return S[0] * (np.sum(np.exp(0.3 * z)) / 0.3 + 0.5 * z @ H @ z - z @ (np.sin(theta / E) + start))

    start = np.exp(0.3 * y) + H @ y - np.sin(theta)
    jacobian = np.linalg.solve(np.diag(0.3 * np.exp(0.3 * y)) + (A if kind == "root" else H), np.diag(np.cos(theta)))
    return idf.Root(root) if kind == "root" else plain, D * y, E * theta, D[:, None] * jacobian / E


@SOURCE
@pytest.mark.parametrize("kind", ["root", "plain"])
@pytest.mark.parametrize(("D", "E"), [*((d, d) for d in MIXED), *itertools.permutations(MIXED[3:], 2)])
def test_units_do_not_matter(D: tuple[float, ...], E: tuple[float, ...], kind: str, source: str) -> None:
    """``y -> D y, theta -> E theta``: the products are those of the new units; a 0 beside any other size is right."""
    scale = np.array(D), np.array(E), np.array(MIXED[4])
    condition, y, theta, expected = in_units(*scale, kind)
    backend = backend_of(source)
    point = idf.conditions.point.Point
    raveler = idf.ravel.Raveler
    with backend.computing():
        maps = idf.conditions.as_condition(condition).maps(
            point(backend, raveler(backend, y, "y"), raveler(backend, theta, "theta"), ())
        )
        scaled_a, scaled_b = maps.A.dense() * scale[0], maps.B.dense() * scale[1]
    rows = np.max(np.abs(scaled_a), axis=1, keepdims=True)  # equilibrated, as the solve is to be
    found = -np.linalg.solve(scaled_a / rows, scaled_b / rows)
    np.testing.assert_allclose(found, expected / scale[0][:, None] * scale[1], rtol=1e-5, atol=1e-6)
    assert maps.A.accuracy < 1e-6


@SOURCE
@pytest.mark.parametrize("variance", [1e-4, 1.0, 1e4])
def test_ridge_with_prior_variance(variance: float, source: str) -> None:
    X = RNG.standard_normal((20, 3))
    t = X @ T
    K = X.T @ X + np.eye(3) / variance
    w = np.linalg.solve(K, X.T @ t)
    found = idf.implicit_jacobian(
        lambda w, v: 0.5 * (X @ w - t) @ (X @ w - t) + w @ w / (2 * v),
        w,
        np.array(variance),
        backend=backend_of(source),
    )
    np.testing.assert_allclose(found, np.linalg.solve(K, w) / variance**2, rtol=1e-6)


@SOURCE
def test_parameters_of_other_sizes(source: str) -> None:
    found = idf.implicit_jacobian(
        lambda y, t: 0.5 * (y - np.exp(t[1]) - 1e-6 * t[0]) ** 2, np.exp(0.3) + 0.1, np.array([1e5, 0.3]),
        backend=backend_of(source),
    )  # fmt: skip
    np.testing.assert_allclose(found, [1e-6, np.exp(0.3)], rtol=1e-6)


@SOURCE
@pytest.mark.parametrize("mean", [1e-12, 1e-6, 0.4])
def test_kepler(mean: float, source: str) -> None:
    e = 0.3
    E = brentq(lambda E: E - e * np.sin(E) - mean, 0, 2, xtol=1e-30, rtol=1e-15)
    found = idf.implicit_jacobian(
        idf.Root(lambda E, p: E - p[1] * np.sin(E) - p[0]), E, np.array([mean, e]), backend=backend_of(source)
    )
    np.testing.assert_allclose(found, np.array([1, np.sin(E)]) / (1 - e * np.cos(E)), rtol=1e-8)


@SOURCE
def test_diode(source: str) -> None:
    def current(v: Any, p: Any) -> Any:
        return p["Is"] * (np.exp(v / (p["n"] * 0.02585)) - 1) - (p["Vs"] - v) / p["R"]

    p = {"Vs": 5.0, "R": 1e6, "Is": 1e-14, "n": 1.0}
    v = brentq(lambda v: current(v, p), 0, 1, xtol=1e-16)
    found, report = idf.implicit_jacobian(
        idf.Root(current), v, p, backend=backend_of(source), return_report=True
    )  # fmt: skip
    slope = p["Is"] * np.exp(v / 0.02585) / 0.02585 + 1e-6
    expected = {"Vs": 1e-6, "R": -(5 - v) / 1e12, "Is": -np.expm1(v / 0.02585), "n": (slope - 1e-6) * v}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value / slope, rel=1e-7), name
    assert report.derivatives["A"] == ("finite differences" if source == "finite_differences" else "complex step")


def test_tiny_entry_among_ones(lib: Library) -> None:
    """An entry of 1e-12 among ones is no tiny unit: its step grows until it shows."""
    y = np.array([1.0, 1e-12, -1.0])
    A_, B_ = lib.array(A), lib.array(A @ y)
    found = idf.implicit_jacobian(idf.Root(lambda y, t: A_ @ y - t + 0 * B_), lib.array(y), B_)
    np.testing.assert_allclose(lib.numpy(found), np.linalg.inv(A), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["root", "plain"])
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1.0, 1e4])
def test_zero_in_a_unit_of_its_own(unit: float, kind: str) -> None:
    """Beside entries of another unit in its leaf: a step of the leaf's size would average over many periods."""
    D, y = np.array([1.0, unit, 1.0]), np.array([0.4, 0.0, -1.3])
    t = H @ y + np.sin(y)
    root = idf.Root(lambda y, t: H @ (y / D) + np.sin(y / D) - t)
    plain = idf.Stationary(lambda y, t: 0.5 * (y / D) @ H @ (y / D) - np.sum(np.cos(y / D)) - y / D @ t)
    found = idf.implicit_jacobian(
        root if kind == "root" else plain, D * y, t, backend=NumpyBackend("finite_differences")
    )
    expected = np.linalg.inv(H + np.diag(np.cos(y)))
    np.testing.assert_allclose(found / D[:, None], expected, atol=1e-6 if kind == "root" else 1e-3)


# -- noise -----------------------------------------------------------------------------------------------
def noisy(level: float, seed: int) -> Callable[[Any], Any]:
    rng = np.random.default_rng(seed)
    return lambda F: F + level * rng.standard_normal(np.shape(F))


NOISES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "1e-8": (noisy(1e-8, 1), 1e-4),
    "1e-6": (noisy(1e-6, 2), 1e-2),
    "1e-4": (noisy(1e-4, 3), 5e-2),
    "six digits": (lambda F: np.round(F, 6), 1e-2),
    "float32": (lambda F: np.float64(np.float32(F)), 1e-3),
    "constant": (lambda F: (F + 1e8) - 1e8, 1e-4),
}


@pytest.mark.filterwarnings("ignore:y is not a solution")
@pytest.mark.parametrize("kind", ["root", "grad", "fun"])
@pytest.mark.parametrize("name", NOISES)
@SOURCE
def test_noise_is_measured(name: str, kind: str, source: str) -> None:
    """Right to what the noise allows, or told."""
    spoil, rtol = NOISES[name]
    if kind == "fun":
        y, M = np.linalg.solve(H, T), H
        condition: Any = idf.Stationary(lambda y, t: spoil(0.5 * y @ H @ y - y @ t + 3.0))
    else:
        M = A if kind == "root" else H
        y = np.linalg.solve(M, T)
        F = lambda y, t: spoil(M @ y - t)
        condition = idf.Root(F) if kind == "root" else idf.Stationary(grad=F)
    try:
        found = idf.implicit_jacobian(condition, y, T, backend=backend_of(source))
    except (idf.NoiseError, idf.SingularError):
        assert kind == "fun"
        return
    np.testing.assert_allclose(found, np.linalg.inv(M), atol=rtol * np.max(np.abs(np.linalg.inv(M))))


@SOURCE
def test_dropout_is_told(source: str) -> None:
    rng = np.random.default_rng(3)
    condition = idf.Root(lambda y, t: A @ (y * (rng.random(3) > 0.5)) - t)
    with pytest.raises(idf.NoiseError, match="not deterministic"):
        idf.implicit_jacobian(condition, np.linalg.solve(A, T), T, backend=backend_of(source))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("source", ["autograd", *SOURCES])
def test_rounding_that_changes_from_call_to_call_is_not_told(source: str, dtype: str) -> None:
    """Vectorised sums add in another order where memory is aligned otherwise; at a solution that is all there is."""
    calls = iter(range(10**6))
    M, t = A.astype(dtype), T.astype(dtype)

    def fun(y: Any, t: Any) -> Any:
        a, b, c = M[:, 0] * y[0], M[:, 1] * y[1], M[:, 2] * y[2]
        return (a + b) + (c - t) if next(calls) % 2 else a + (b + c) - t

    if source == "autograd":
        pytest.importorskip("autograd.numpy")  # the backend uses it once it is imported
    backend = "numpy" if source == "autograd" else backend_of(source)
    found = idf.implicit_jacobian(idf.Root(fun), np.linalg.solve(M, t), t, backend=backend)
    np.testing.assert_allclose(found, np.linalg.inv(A), rtol=1e-2 if dtype == "float32" else 1e-6)


@SOURCE
@pytest.mark.parametrize("size", [1e7, 1.0, 1e-7])
def test_absolute_values_far_from_their_kinks(size: float, source: str) -> None:
    """``1/2 |y|' H |y| - y't`` at any size."""
    y = size * np.array([1.0, -2.0, 0.5])
    s = np.diag(np.sign(y))
    t = s @ H @ s @ y
    found = idf.implicit_jacobian(
        lambda y, t: 0.5 * np.abs(y) @ H @ np.abs(y) - y @ t, y, t, backend=backend_of(source)
    )
    np.testing.assert_allclose(found, np.linalg.inv(s @ H @ s), rtol=1e-6)


# -- kinks -----------------------------------------------------------------------------------------------
KINKS: dict[str, Callable[[Any], Any]] = {
    "where": lambda y: np.where(y > 0, y, 3 * y),
    "abs": lambda y: 2 * y + np.abs(y),
    "relu": lambda y: y + np.maximum(y, 0),
    "clip": lambda y: y + np.clip(y, -1, 0),
    "jump": lambda y: y + np.sign(y),
}


@SOURCE
@pytest.mark.parametrize("name", KINKS)
def test_kink_at_the_point_is_told(name: str, source: str) -> None:
    condition = idf.Root(lambda y, t: KINKS[name](y) - t)
    with pytest.raises(idf.DerivativeError, match="kink or a jump"):
        idf.implicit_jacobian(condition, np.array([0.0, 0.0]), np.zeros(2), backend=backend_of(source))


@SOURCE
@pytest.mark.parametrize("near", [1e-9, -1e-6, 1e-3])
def test_kink_near_the_point_is_not_reached(near: float, source: str) -> None:
    F = KINKS["where"]
    y = np.array([near, 1.0])
    found = idf.implicit_jacobian(idf.Root(lambda y, t: F(y) - t), y, F(y), backend=backend_of(source))
    np.testing.assert_allclose(found, np.diag([1 if near > 0 else 1 / 3, 1]), rtol=1e-6, atol=1e-12)


@SOURCE
def test_complex_step_is_taken_by_component(source: str) -> None:
    condition = idf.Root(lambda y, t: np.array([1e6 * (y[0] - t[0]), y[1] + abs(y[1]) - t[1]]))
    found = idf.implicit_jacobian(condition, np.array([1.0, 0.5]), np.ones(2), backend=backend_of(source))
    np.testing.assert_allclose(found, np.diag([1, 0.5]), rtol=1e-8, atol=1e-12)


# -- cost ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "most"), [("plain", 2.6), ("root", 0.1)])
def test_evaluations(kind: str, most: float) -> None:
    """Of n = 60 unknowns: 2 n² for a Hessian of values, 4 n for a Jacobian, and a few for all the rest."""
    n = 60
    Q = RNG.standard_normal((n, n))
    K = Q @ Q.T / n + np.eye(n)
    t = RNG.standard_normal(n)
    y = np.linalg.solve(K, t)
    f = count((lambda y, t: 0.5 * y @ K @ y - y @ t) if kind == "plain" else (lambda y, t: K @ y - t))
    condition: Any = f if kind == "plain" else idf.Root(f)
    g = idf.implicit_vjp(condition, y, t, y, backend=NumpyBackend("finite_differences"))
    np.testing.assert_allclose(g, np.linalg.solve(K, y), rtol=1e-5, atol=1e-6)
    assert f.calls <= (most * n**2 if kind == "plain" else 9 * n + 60)  # type: ignore[attr-defined]


def test_batch_by_differences(lib: Library) -> None:
    """Items in different units, each with steps of its own."""
    if lib.per_item:
        pytest.skip("has autodiff")
    A_ = lib.array(A)
    units = lib.array(np.array([1.0, 1e-6, 1e6])[:, None])
    y = np.linalg.solve(A, T)

    def F(y: Any, t: Any) -> Any:
        return (A_ @ (y / units)[..., None])[..., 0] - t / units

    many = np.array([1.0, 1e-6, 1e6])[:, None]
    found = idf.implicit_jacobian(idf.Root(F), lib.array(many * y), lib.array(many * T), batched=True)
    np.testing.assert_allclose(lib.numpy(found), np.stack([np.linalg.inv(A)] * 3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("constant", [1e8, 1e14])
def test_large_constant_is_right_or_told(constant: float) -> None:
    """An objective plus 1e8: the curvature stands above the rounding of the sum only just, or not at all."""
    condition = idf.Stationary(lambda y, t: 0.5 * y @ H @ y - y @ t + constant)
    backend = NumpyBackend("finite_differences")
    y = np.linalg.solve(H, T)
    try:
        found = idf.implicit_jacobian(condition, y, T, backend=backend)
    except (idf.NoiseError, idf.SingularError):
        assert constant > 1e12
        return
    np.testing.assert_allclose(found, np.linalg.inv(H), atol=2e-2 * np.max(np.linalg.inv(H)))


def test_plain_objective_of_condition_1e8_is_right_or_told() -> None:
    """Its smallest curvature lies at the rounding of its values."""
    Q = np.linalg.qr(RNG.standard_normal((4, 4)))[0]
    K = (Q * np.geomspace(1.0, 1e-8, 4)) @ Q.T
    y = np.array([1.0, -0.6, 0.3, 0.8])
    backend = NumpyBackend("finite_differences")
    try:
        found = idf.implicit_jacobian(lambda y, t: 0.5 * y @ K @ y - y @ t, y, K @ y, backend=backend)
    except (idf.NoiseError, idf.SingularError):
        return
    np.testing.assert_allclose(found, np.linalg.inv(K), atol=0.1 * np.max(np.abs(np.linalg.inv(K))))


@SOURCE
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_closure_is_told(source: str, dtype: str, scale: float) -> None:
    """A condition that uses a theta from the enclosing scope, of which only values are known."""
    h, t = H.astype(dtype), (scale * T).astype(dtype)
    with pytest.raises(idf.DerivativeError, match="does not depend on theta"):
        idf.implicit_vjp(
            lambda y, th: y @ h @ y / 2 - y @ t, np.linalg.solve(h, t), t, np.ones_like(t), backend=backend_of(source)
        )


@SOURCE
def test_unidentified_softmax_is_singular(source: str) -> None:
    """Weights that are free up to a shift, seen by a loss that is not."""
    X, labels = RNG.standard_normal((20, 2)), RNG.integers(0, 3, 20)

    def loss(w: Any, t: Any) -> Any:
        z = X @ w.reshape(2, 3)
        return np.sum(np.log(np.sum(np.exp(z), axis=1)) - z[np.arange(20), labels] * t)

    condition = idf.Stationary(loss)
    w = RNG.standard_normal(6)
    with pytest.raises((idf.SingularError, idf.NotPositiveDefiniteError)):
        idf.implicit_grad(condition, lambda w, t: w[0] + np.sum(w**2), w, np.array(1.0), backend=backend_of(source))


@SOURCE
def test_map_that_ignores_y(source: str) -> None:
    """``T = cos(theta)`` up to rounding: A = I - 0 is known well."""
    theta = np.array([0.7])
    found = idf.implicit_jacobian(
        idf.FixedPoint(lambda y, t: np.cos(t) + (y - (y + 1) + 1)), np.cos(theta), theta, backend=backend_of(source)
    )
    np.testing.assert_allclose(found, [[-np.sin(0.7)]], rtol=1e-6)
