"""Worked examples whose answer is known in closed form: argmin, argmax, roots, fixed points.

Those with matrices (ridge, softmax, back-propagation, baselines) are in test_worked_models.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest
from conftest import GENERAL, JAX, NUMPY, TORCH, Library

import implicitdiff as idf
from implicitdiff.backends.numpy import NumpyBackend


# -- min over w of (w − θ²)², outer loss 2 w: hypergradient 4 θ ------------------------------------------
def square(w: Any, theta: Any) -> Any:
    return (w - theta**2) ** 2


GIVEN_SQUARE = idf.Stationary(
    square,
    grad=lambda w, theta: 2 * (w - theta**2),
    hvp=lambda w, theta, v: 2 * v,
    mixed_vjp=lambda w, theta, u: -4 * theta * u,
    mixed_jvp=lambda w, theta, t: -4 * theta * t,
)


@pytest.mark.parametrize("theta", [-1.7, 0.3, 2.0])
def test_square_has_hypergradient_4_theta(lib: Library, solver: str, theta: float) -> None:
    w, t = lib.array(theta**2), lib.array(theta)
    g = idf.implicit_grad(GIVEN_SQUARE, lambda w, theta: 2 * w, w, t, solver=solver)
    assert g.shape == ()
    assert float(g) == pytest.approx(4 * theta, rel=1e-9)


@pytest.mark.parametrize(("mode", "rtol"), [("autograd", 1e-14), ("complex_step", 1e-6), ("finite_differences", 1e-6)])
def test_square_by_every_source_of_derivatives(mode: str, rtol: float) -> None:
    w, t = np.array([0.49, 2.25]), np.array([0.7, -1.5])
    g, report = idf.implicit_grad(
        lambda w, theta: anp.sum(square(w, theta)), lambda w, theta: anp.sum(2 * w), w, t,
        backend=NumpyBackend(mode), return_report=True,
    )  # fmt: skip
    np.testing.assert_allclose(g, 4 * t, rtol=rtol)
    assert report.derivatives["A"] == ("autodiff" if mode == "autograd" else "finite differences")


@pytest.mark.parametrize("direct", [2.0, -0.5])
def test_direct_dependence_of_the_outer_loss_is_added(direct: float) -> None:
    theta = np.array([1.3])
    g = idf.implicit_grad(GIVEN_SQUARE, lambda w, t: (3 * w + direct * t**3)[0], theta**2, theta)
    np.testing.assert_allclose(g, 3 * 2 * theta + direct * 3 * theta**2, rtol=1e-9)


class Adam:
    """Adam in the precision of its learning rate, bias corrections included.

    References
    ----------
    D. P. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015. arXiv:1412.6980
    """

    def __init__(self, rate: Any) -> None:
        self.rate, self.type = rate, type(rate)
        self.m = self.v = self.type(0)
        self.steps = 0

    def step(self, x: Any, g: Any) -> Any:
        real, self.steps = self.type, self.steps + 1
        beta1, beta2 = real(0.9), real(0.999)
        self.m = beta1 * self.m + real(0.1) * g
        self.v = beta2 * self.v + real(0.001) * g * g
        m = self.m / (1 - beta1 ** real(self.steps))
        v = self.v / (1 - beta2 ** real(self.steps))
        return x - self.rate * m / (np.sqrt(v) + real(1e-8))


PUBLISHED = (1.0, 0.92000055, 0.84024435, 0.76092601, 0.68227065, 0.60453331, 0.52800333, 0.45300627, 0.37990287,
             0.30908880, 0.24098969, 0.17605475, 0.11474530)  # fmt: skip
"""θ of the toy bi-level problem in single precision."""
LAST = -0.0042658  # θ after 100 steps


def bilevel_adam(real: Any, steps: int, hypergradient: Callable[[Any, Any], Any]) -> tuple[list[float], list[float]]:
    """θ from 1.0 by Adam at 8e-2; before each step w moves by 50 Adam steps of 1e-2 from where it was."""
    outer, inner = Adam(real(8e-2)), Adam(real(1e-2))
    theta, w = real(1), real(1)
    path, gradients = [float(theta)], []
    for _ in range(steps):
        for _ in range(50):
            w = inner.step(w, 2 * (w - theta**2))
        gradients.append(hypergradient(w, theta))
        theta = outer.step(theta, gradients[-1])
        assert isinstance(theta, real)
        path.append(float(theta))
    return path, gradients


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_bilevel_adam_in_single_precision_follows_the_published_trajectory(lib: Library) -> None:
    def hypergradient(w: Any, theta: Any) -> Any:
        y, t, v = (lib.array(np.array([x], np.float32)) for x in (w, theta, 2))
        g = lib.numpy(idf.implicit_grad(GIVEN_SQUARE, v, y, t, solver="cg"))
        assert g.dtype == np.float32
        return g[0]

    with warnings.catch_warnings():
        # 50 steps leave w short of θ²; A and B do not depend on w here, so the gradient is exact all the same
        warnings.simplefilter("ignore", idf.NotASolutionWarning)
        path, gradients = bilevel_adam(np.float32, 100, hypergradient)
    np.testing.assert_allclose(path[:13], PUBLISHED, rtol=0, atol=1e-5)
    np.testing.assert_allclose(path[100], LAST, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients[:3], [4.0, 3.6800022, 3.3609774], rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients, 4 * np.array(path[:-1]), rtol=0, atol=1e-6)  # 4 θ


def test_bilevel_adam_is_told_where_the_inner_loop_stopped_short() -> None:
    theta = np.array([0.92], np.float32)
    with pytest.warns(idf.NotASolutionWarning, match="0.1"):
        idf.implicit_vjp(GIVEN_SQUARE, theta**2 + np.float32(0.05), theta, np.array([2], np.float32))


# -- means ---------------------------------------------------------------------------------------------
def test_mean_of_data_has_gradient_one_over_m(lib: Library, solver: str) -> None:
    data = np.array([1.0, -2.0, 4.5, 0.25, 3.0])
    m = data.size
    condition = idf.Stationary(
        grad=lambda y, x: m * y - lib.xp.sum(x),
        hvp=lambda y, x, v: m * v,
        mixed_vjp=lambda y, x, u: -u + 0 * x,
    )
    jacobian = idf.implicit_jacobian(condition, lib.array(data.mean()), lib.array(data), solver=solver)
    assert tuple(jacobian.shape) == (m,)
    np.testing.assert_allclose(lib.numpy(jacobian), np.full(m, 1 / m), rtol=1e-9)


def test_mean_of_vectors_by_finite_differences() -> None:
    data = np.array([[1.0, -2.0], [4.5, 0.25], [3.0, 7.0]])
    jacobian = idf.implicit_jacobian(
        lambda y, x: float(np.sum((x - y) ** 2)), data.mean(axis=0), data, backend=NumpyBackend("finite_differences")
    )
    expected = np.einsum("ac,b->abc", np.eye(2), np.full(3, 1 / 3))
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)


# -- the scalar x y⁴ + 2 x² y³ − 12 y² -----------------------------------------------------------------
def quartic(y: Any, x: Any) -> Any:
    return x * y**4 + 2 * x**2 * y**3 - 12 * y**2


def quartic_stationary(x: float) -> dict[str, tuple[float, float]]:
    """Stationary points in y and their dy/dx: y = 0, and the two roots of 2 x y² + 3 x² y − 12 = 0."""
    s = np.sqrt(9 * x**4 + 96 * x)
    ds = (36 * x**3 + 96) / (2 * s)
    slope = (x * ds - s) / (4 * x**2)
    return {
        "zero": (0.0, 0.0),
        "upper": ((-3 * x**2 + s) / (4 * x), -0.75 + slope),
        "lower": ((-3 * x**2 - s) / (4 * x), -0.75 - slope),
    }


@pytest.mark.parametrize("branch", ["zero", "upper", "lower"])
@pytest.mark.parametrize("x", [0.4, 1.0, 2.5])
def test_quartic_at_each_stationary_point(branch: str, x: float, solver: str) -> None:
    y, slope = quartic_stationary(x)[branch]
    curvature = 12 * x * y**2 + 12 * x**2 * y - 24
    assert (curvature < 0) == (branch == "zero")  # a maximum between two minima
    # at y = 0 also B = 0, and a zero right-hand side has the solution zero whatever A is: no solver may object
    found = idf.implicit_jvp(quartic, np.array(y), np.array(x), np.array(1.0), solver=solver)
    assert float(found) == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_quartic_with_differences_of_values_alone() -> None:
    for y, slope in quartic_stationary(1.0).values():
        found = idf.implicit_jacobian(quartic, np.array(y), np.array(1.0), backend=NumpyBackend("finite_differences"))
        assert found.shape == ()
        assert float(found) == pytest.approx(slope, abs=2e-5)


# -- argmax, and invariance ------------------------------------------------------------------------------
def coin(p: Any, counts: Any) -> Any:
    """Log-likelihood of heads and tails."""
    return counts[0] * anp.log(p) + counts[1] * anp.log(1 - p)


@pytest.mark.parametrize("solver", ["lu", "minres", "gmres", "auto"])
def test_argmax_needs_no_sign(solver: str) -> None:
    counts = np.array([3.0, 5.0])
    p = counts[0] / counts.sum()
    found = idf.implicit_jacobian(coin, np.array(p), counts, solver=solver)
    np.testing.assert_allclose(found, np.array([5.0, -3.0]) / 64, rtol=1e-12)


def test_argmax_and_cholesky_is_told() -> None:
    counts = np.array([3.0, 5.0])
    with pytest.raises(idf.NotPositiveDefiniteError, match="maximum"):
        idf.implicit_jacobian(coin, np.array(counts[0] / counts.sum()), counts, solver="cholesky")


def positive(y: Any, theta: Any) -> Any:
    """Strictly convex in y with a positive minimum, minimised where y₀ + y₁ and y₀ − 2 y₁ meet θ."""
    return 1.5 + (y[0] + y[1] - theta[0] ** 2) ** 2 + anp.cosh(y[0] - 2 * y[1] - theta[1])


@pytest.mark.parametrize("wrap", [anp.exp, anp.log, lambda f: f**3], ids=["exp", "log", "cube"])
def test_gradient_is_invariant_under_monotone_maps_of_the_objective(wrap: Callable[[Any], Any], solver: str) -> None:
    theta = np.array([1.2, -0.7])
    to_theta = np.array([[1.0, 1.0], [1.0, -2.0]])
    y = np.linalg.solve(to_theta, np.array([theta[0] ** 2, theta[1]]))
    expected = np.linalg.solve(to_theta, np.diag([2 * theta[0], 1.0]))
    found = idf.implicit_jacobian(lambda y, t: wrap(positive(y, t)), y, theta, solver=solver)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(idf.implicit_jacobian(positive, y, theta, solver=solver), found, rtol=1e-9, atol=1e-12)


# -- roots -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("x", [-1.5, 0.0, 0.3, 2.0])
def test_root_of_a_cubic(x: float, solver: str) -> None:
    # y = x³ + 2 x² + x y + 4, solved for y by hand; A = x − 1
    root = idf.Root(lambda y, x: x**3 + 2 * x**2 + x * y + 4 - y)
    y = (x**3 + 2 * x**2 + 4) / (1 - x)
    call = lambda: idf.implicit_jvp(root, np.array(y), np.array(x), np.array(1.0), solver=solver)
    if x < 1 and solver in {"cholesky", "cg"}:
        with pytest.raises(idf.NotPositiveDefiniteError):
            call()
    else:
        assert float(call()) == pytest.approx((3 * x**2 + 4 * x + y) / (1 - x), rel=1e-9)


@pytest.mark.parametrize("solver", GENERAL)
def test_inverse_function_polar_coordinates(lib: Library, solver: str) -> None:
    # (r, φ) of a point z solves g(r, φ) = z; ∂(r, φ)/∂z is the inverse of ∂g and not symmetric
    xp = lib.xp
    z = np.array([1.5, -0.8])
    r, phi = np.hypot(*z), np.arctan2(z[1], z[0])

    def residual(y: Any, z: Any) -> Any:
        return xp.stack([y[0] * xp.cos(y[1]) - z[0], y[0] * xp.sin(y[1]) - z[1]])

    found = idf.implicit_jacobian(idf.Root(residual), lib.array([r, phi]), lib.array(z), solver=solver)
    expected = np.array([[z[0] / r, z[1] / r], [-z[1] / r**2, z[0] / r**2]])
    np.testing.assert_allclose(lib.numpy(found), expected, atol=1e-8)


# -- Kepler's equation as a fixed point ------------------------------------------------------------------
def kepler(E: Any, orbit: dict[str, Any]) -> Any:
    """E = M + e sin E: the eccentric anomaly from the mean anomaly."""
    return orbit["M"] + orbit["e"] * anp.sin(E)


@pytest.mark.parametrize("e", [0.1, 0.9])
def test_kepler_equation_is_a_fixed_point(e: float, solver: str) -> None:
    E = np.array([0.4, 1.9, 3.0, 5.5])
    orbit = {"M": E - e * np.sin(E), "e": np.full(4, e)}
    grad = idf.implicit_vjp(idf.FixedPoint(kepler), E, orbit, np.array([1.0, -2.0, 0.5, 3.0]), solver=solver)
    weight = np.array([1.0, -2.0, 0.5, 3.0]) / (1 - e * np.cos(E))
    np.testing.assert_allclose(grad["M"], weight, rtol=1e-8)
    np.testing.assert_allclose(grad["e"], weight * np.sin(E), rtol=1e-8)


def test_kepler_solved_by_iteration_and_decorated() -> None:
    @idf.implicit_function(idf.FixedPoint(kepler))
    def eccentric_anomaly(orbit: dict[str, Any]) -> Any:
        E = np.array(orbit["M"], copy=True)
        for _ in range(200):
            E = kepler(E, orbit)
        return E

    orbit = {"M": np.array(1.1), "e": np.array(0.6)}
    jacobian = eccentric_anomaly.jacobian(orbit)
    E = float(eccentric_anomaly(orbit))
    assert float(jacobian["M"]) == pytest.approx(1 / (1 - 0.6 * np.cos(E)), rel=1e-10)
    assert float(jacobian["e"]) == pytest.approx(np.sin(E) / (1 - 0.6 * np.cos(E)), rel=1e-10)
