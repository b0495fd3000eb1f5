"""FAULTS 57: what is active, weak, violated or a kink does not depend on units, and the result follows.

With y → D y, θ → E θ, f → c f and constraint i → s_i c_i the derivative is D (dy/dθ) E⁻¹, and nothing is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, TORCH, Library, assert_told, outcome
from helpers_constraints import ROUTES, functions

from implicitdiff import (
    KKT,
    QP,
    LogBarrier,
    ProjectedGradient,
    ProximalGradient,
    RegularityWarning,
    check_regularity,
    implicit_jacobian,
    implicit_vjp,
    projections,
    proxes,
)
from implicitdiff.backends.numpy import NumpyBackend

EXACT = pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
ALL = pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)

# A quadratic program with two active bounds, one equality, and six constraints that are far away.
S = np.array([[3.0, 1.0, 0.5, 0.2], [1.0, 2.0, 0.3, -0.4], [0.5, 0.3, 1.5, 0.6], [0.2, -0.4, 0.6, 2.5]])
ROW = np.array([[1.0, -1.0, 2.0, 0.5]])
Y = np.array([0.0, 0.7, 1.0, 0.4])
BOX = np.concatenate([-np.eye(4), np.eye(4)])
EDGE = np.concatenate([np.zeros(4), np.ones(4)])
MU = np.array([0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 1.2, 0.0])
THETA = np.append(S @ Y + 0.5 * ROW[0] + BOX.T @ MU, ROW @ Y)
HELD = np.concatenate([ROW, BOX[MU > 0]])
SADDLE = np.block([[S, HELD.T], [HELD, np.zeros((3, 3))]])
TRUTH = np.linalg.solve(SADDLE, np.concatenate([np.eye(5), np.zeros((2, 5))]))[:4]

MIXED = {4: np.array([1e4, 1e-9, 1e9, 1e2]), 5: np.array([1e-9, 1e5, 1.0, 1e9, 1e-3]),
         8: np.array([1e-9, 1e9, 1.0, 1e3, 1e9, 1e-9, 1e-4, 1e6])}  # fmt: skip
SCALES: dict[str, tuple[Any, Any, Any, Any]] = {
    "plain": (1.0, 1.0, 1.0, 1.0),
    "y small": (1e-9, 1.0, 1.0, 1.0),
    "y large": (1e9, 1.0, 1.0, 1.0),
    "y mixed": (MIXED[4], 1.0, 1.0, 1.0),
    "theta mixed": (1.0, MIXED[5], 1.0, 1.0),
    "f small": (1.0, 1.0, 1e-9, 1.0),
    "f large": (1.0, 1.0, 1e9, 1.0),
    "constraints mixed": (1.0, 1.0, 1.0, MIXED[8]),
    "all": (MIXED[4][::-1], MIXED[5], 1e-6, MIXED[8][::-1]),
}
"""D, E, c and s."""
SCALED = pytest.mark.parametrize("scales", SCALES)


def program(lib: Library, scales: str, kind: str, **options: Any) -> tuple[Any, Any, Any, Callable[[Any], np.ndarray]]:
    """The condition, y and θ in units, and what brings a Jacobian back."""
    D, E, c, s = (np.broadcast_to(x, (n,)) for x, n in zip(SCALES[scales], (4, 5, 1, 8), strict=True))
    G, h = s[:, None] * BOX / D, s * EDGE
    xp, array = functions(lib), lib.array
    if kind == "KKT":
        a = {name: array(x) for name, x in {"S": c * S / D / D[:, None], "D": D, "E": E, "c": c, "row": ROW[0] / D,
             "G": G, "h": h}.items()}  # fmt: skip
        f = lambda y, t: xp.sum(y * (a["S"] @ y)) / 2 - a["c"][0] * xp.sum((t / a["E"])[:4] * y / a["D"])
        eq = lambda y, t: xp.sum(a["row"] * y) - (t / a["E"])[4]
        condition: Any = KKT(f, eq=eq, ineq=lambda y, t: a["G"] @ y - a["h"], **options)
        theta: Any = array(E * THETA)
        back = lambda J: lib.numpy(J) / D[:, None] * E
    else:
        condition = QP(Q=array(c * S / D / D[:, None]), A=array(ROW / D / E[4]), G=array(G), h=array(h), **options)
        theta = {"q": array(-c * THETA[:4] / D), "b": array(ROW @ Y / E[4])}
        back = lambda J: np.concatenate(
            [-lib.numpy(J["q"]) / D[:, None] * c / D, lib.numpy(J["b"]) / D[:, None] / E[4]], axis=-1
        )
    return condition, array(D * Y), theta, back


@EXACT
@SCALED
@pytest.mark.parametrize("kind", ["KKT", "QP"])
@pytest.mark.parametrize("route", ROUTES)
def test_same_active_set_in_any_units(lib: Library, scales: str, kind: str, route: str) -> None:
    condition, y, theta, back = program(lib, scales, kind, route=route)
    found = outcome(lambda: implicit_jacobian(condition, y, theta))
    assert found.quiet, found.text
    np.testing.assert_allclose(back(found.value), TRUTH, rtol=1e-8, atol=1e-9)


@EXACT
@SCALED
@pytest.mark.parametrize("distance", [1e-9, -1e-9, 2e-5])
def test_active_up_to_a_tolerance_in_any_units(lib: Library, scales: str, distance: float) -> None:
    """Off a bound by the tolerance of a solver, or, held by its multiplier, by more than counts as touching."""
    condition, y, theta, back = program(lib, scales, "KKT")
    near = np.array([distance, 0.0, -distance, 0.0]) * np.broadcast_to(SCALES[scales][0], 4)
    found = outcome(lambda: implicit_jacobian(condition, y + lib.array(near), theta))
    assert not any(isinstance(e, RegularityWarning) for e in found.told), found.text
    assert found.error is None, found.text
    np.testing.assert_allclose(back(found.value), TRUTH, rtol=1e-3 * abs(distance) ** 0.25, atol=1e-8)


@pytest.mark.parametrize("scales", ["y small", "y mixed", "all"])
@pytest.mark.parametrize("fault", ["weak", "violated", "wrong sign"])
def test_what_is_told_in_any_units(scales: str, fault: str) -> None:
    """The same constraint is named."""
    condition, *_ = program(NUMPY, scales, "KKT")
    D, E, _, _ = (np.broadcast_to(x, (n,)) for x, n in zip(SCALES[scales], (4, 5, 1, 8), strict=True))
    mu, there = MU.copy(), Y.copy()
    if fault == "violated":
        there[0] = -0.01
    else:
        mu[0] = 0.0 if fault == "weak" else -0.3
    theta = E * np.append(S @ there + 0.5 * ROW[0] + BOX.T @ mu, ROW @ there)
    found = check_regularity(condition, D * there, theta)
    named = {"weak": found.weakly_active, "violated": found.violated, "wrong sign": found.wrong_sign}
    assert {name: which for name, which in named.items() if which} == {fault: ("ineq[0]",)}


@pytest.mark.parametrize("scales", SCALES)
def test_regularity_in_any_units(scales: str) -> None:
    condition, y, theta, _ = program(NUMPY, scales, "KKT")
    found = check_regularity(condition, y, theta)
    assert found.regular, found.problems
    assert found.active == ("eq[0]", "ineq[0]", "ineq[6]")
    assert (found.rank, found.inertia) == (3, (4, 3, 0))


@pytest.mark.slow
@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize("scales", ["y mixed", "all"])
def test_same_active_set_under_jax(lib: Library, scales: str) -> None:
    condition, y, theta, back = program(lib, scales, "QP")
    np.testing.assert_allclose(back(implicit_jacobian(condition, y, theta)), TRUTH, rtol=1e-8, atol=1e-9)


# -- the box: y = clip(a, 0, 1) --------------------------------------------------------------------------------------
A = np.array([-1.0, 0.3, 2.0, 0.6])


@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
@pytest.mark.parametrize("unit", [1e-7, 1e7, np.array([1e-7, 1e7, 1.0, 1e3])], ids=["small", "large", "mixed"])
def test_box(lib: Library, unit: Any) -> None:
    unit = np.broadcast_to(unit, (4,))
    condition = QP(Q=lib.array(np.diag(unit**-2.0)), G=lib.array(BOX), h=lib.array(np.append(np.zeros(4), unit)))
    y, theta = lib.array(np.clip(A, 0, 1) * unit), {"q": lib.array(-A / unit)}
    found = outcome(lambda: implicit_jacobian(condition, y, theta))
    assert found.quiet, found.text
    np.testing.assert_allclose(-lib.numpy(found.value["q"]) / unit / unit[:, None], np.diag([0.0, 1, 0, 1]), atol=1e-12)


# -- infinite bounds -------------------------------------------------------------------------------------------------
@ALL
@pytest.mark.parametrize("where", ["given", "theta"])
def test_infinite_bounds_of_a_quadratic_program(lib: Library, where: str) -> None:
    h = np.array([0.0, np.inf, 0.0, 0.0, np.inf, np.inf, 1.0, np.inf])
    data = {"G": lib.array(BOX), "h": lib.array(h)}
    theta = {"q": lib.array(-A)} | ({"h": data.pop("h")} if where == "theta" else {})
    g = implicit_vjp(QP(Q=lib.array(np.eye(4)), **data), lib.array(np.clip(A, 0, 1)), theta, lib.array(np.ones(4)))
    np.testing.assert_allclose(lib.numpy(g["q"]), [0.0, -1.0, 0.0, -1.0], atol=1e-12)
    if where == "theta":
        np.testing.assert_allclose(lib.numpy(g["h"]), [-1.0, 0, 0, 0, 0, 0, 1.0, 0], atol=1e-12)


def bounded(lib: Library, batched: bool = False) -> KKT:
    """The point of the box [θ₁, θ₂] next to θ₀; θ has the shape (3, n)."""
    xp = functions(lib)
    rows = (lambda t, i: t[..., i, :]) if batched else (lambda t, i: t[i])
    return KKT(
        lambda y, t: xp.sum((y - rows(t, 0)) ** 2, axis=-1),
        ineq=lambda y, t: {"low": rows(t, 1) - y, "high": y - rows(t, 2)},
    )


def boxes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two items whose bounds are infinite in other places, with y and the derivative of Σ y."""
    inf = np.inf
    theta = np.array([[A, [0, -inf, -inf, -inf], [inf, inf, 1, inf]], [A, [-inf] * 4, [inf, inf, inf, 0.5]]])
    y = np.clip(theta[:, 0], theta[:, 1], theta[:, 2])
    truth = np.stack([theta[:, 0] == y, theta[:, 1] == y, theta[:, 2] == y], axis=1).astype(float)
    return theta, y, truth


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize("lib", [NUMPY, *TORCH, *JAX], ids=lambda lib: lib.name)
def test_infinite_bounds_in_theta_and_in_a_padded_batch(lib: Library) -> None:
    theta, y, truth = boxes()
    batch = bounded(lib, batched=not lib.per_item)
    g = implicit_vjp(batch, lib.array(y), lib.array(theta), lib.array(np.ones((2, 4))), batched=True)
    np.testing.assert_allclose(lib.numpy(g), truth, atol=1e-9)
    one = implicit_vjp(bounded(lib), lib.array(y[0]), lib.array(theta[0]), lib.array(np.ones(4)))
    np.testing.assert_allclose(lib.numpy(one), truth[0], atol=1e-9)


@pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
def test_nan_in_theta_is_still_named(lib: Library) -> None:
    theta = boxes()[0][0].copy()
    theta[1, 1] = np.nan
    found = outcome(lambda: implicit_vjp(bounded(lib), lib.array(np.zeros(4)), lib.array(theta), lib.array(np.ones(4))))
    assert_told(found, Exception, "theta holds NaN")


# -- projections and proximal operators ------------------------------------------------------------------------------
UNITS = {"unit": 1.0, "small": 1e-8, "large": 1e8, "mixed": np.array([1e-7, 1e7, 1.0, 1e3])}
HALF = np.array([2.0, 0.3, -1.5, 0.05])
# θ, y, dy/dθ of ½ ‖y − θ‖² over a set, or with a penalty, whose numbers are in units u (of y) and c (of f)
SETS: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
    "box": (A, np.clip(A, 0, 1), np.diag([0.0, 1, 0, 1])),
    "lasso": (HALF, np.sign(HALF) * np.maximum(np.abs(HALF) - 0.5, 0), np.diag([1.0, 0, 1, 0])),
    "ridge": (HALF, HALF / 1.5, np.eye(4) / 1.5),
    "simplex": (np.array([0.9, 0.5, -0.5, -0.1]), np.array([0.7, 0.3, 0, 0]),
                np.pad(np.array([[0.5, -0.5], [-0.5, 0.5]]), (0, 2))),
    "ball": (np.array([3.0, 4.0, 0, 0]), np.array([0.6, 0.8, 0, 0]),
             (np.eye(4) - np.outer([0.6, 0.8, 0, 0], [0.6, 0.8, 0, 0])) / 5),
}  # fmt: skip
ALONE = ("box", "lasso", "ridge")
"""Those that leave coordinates apart, each in a unit of its own."""


def fixed_point(lib: Library, which: str, u: np.ndarray, c: float) -> Any:
    xp, unit, one = functions(lib), lib.array(u), float(u[0])
    f = lambda y, t: c * xp.sum((y / unit - t) ** 2) / 2
    if which in ("lasso", "ridge"):
        prox = proxes.lasso if which == "lasso" else proxes.ridge
        level = c * 0.5 / unit if which == "lasso" else c * 0.5 / unit**2
        return ProximalGradient(f, lambda x, t, step: prox(x, level, step))
    sets: dict[str, Callable[[Any], Any]] = {
        "box": lambda x: projections.box(x, 0 * unit, unit),
        "simplex": lambda x: projections.simplex(x, total=one),
        "ball": lambda x: projections.ball(x, radius=one),
    }
    return ProjectedGradient(f, lambda x, t: sets[which](x))


@EXACT
@pytest.mark.parametrize(("which", "unit"), [(s, u) for s in SETS for u in UNITS if u != "mixed" or s in ALONE])
@pytest.mark.parametrize("c", [1.0, 1e-6, 1e6])
def test_sets_and_penalties_in_any_units(lib: Library, which: str, unit: str, c: float) -> None:
    u, (theta, y, truth) = np.broadcast_to(UNITS[unit], 4), SETS[which]
    condition = fixed_point(lib, which, u, c)
    found = outcome(lambda: implicit_jacobian(condition, lib.array(y * u), lib.array(theta)))
    assert found.quiet, found.text
    np.testing.assert_allclose(lib.numpy(found.value) / u[:, None], truth, atol=1e-9)


@EXACT
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("which", ["box", "lasso"])
def test_a_kink_is_told_in_any_units(lib: Library, which: str, unit: str) -> None:
    """θ lies on the bound, or at the threshold, of its second coordinate."""
    u, theta = np.broadcast_to(UNITS[unit], 4), SETS[which][0].copy()
    theta[1] = 0.0 if which == "box" else 0.5
    y = SETS[which][1].copy()
    y[1] = 0.0
    found = outcome(
        lambda: implicit_vjp(fixed_point(lib, which, u, 1.0), *(lib.array(x) for x in (y * u, theta, 1 / u)))
    )
    assert_told(found, RegularityWarning, r"kink.*at 1 \(")


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize(("which", "unit", "c"), [("lasso", "small", 1e6), ("box", "large", 1e-6)])
def test_sets_and_penalties_under_jax(lib: Library, which: str, unit: str, c: float) -> None:
    u, (theta, y, truth) = np.broadcast_to(UNITS[unit], 4), SETS[which]
    condition = fixed_point(lib, which, u, c)
    found = implicit_jacobian(condition, lib.array(y * u), lib.array(theta))
    np.testing.assert_allclose(lib.numpy(found) / u[:, None], truth, atol=1e-9)


@pytest.mark.parametrize("lib", TORCH, ids=lambda lib: lib.name)
def test_items_of_a_batch_have_steps_of_their_own(lib: Library) -> None:
    """The lasso in units of 1e-8 beside the one in units of 1e8."""
    theta, y, truth = SETS["lasso"]
    u = np.array([1e-8, 1.0, 1e8])[:, None]
    f = lambda y, t: lib.xp.sum((y / t["u"] - t["a"]) ** 2) / 2
    condition = ProximalGradient(f, lambda x, t, step: proxes.lasso(x, 0.5 / t["u"], step))
    a = {"u": lib.array(u[:, 0]), "a": lib.array(np.tile(theta, (3, 1)))}
    g = implicit_vjp(condition, lib.array(y * u), a, lib.array(1 / u * np.ones(4)), batched=True)
    np.testing.assert_allclose(lib.numpy(g["a"]), np.tile(np.diag(truth), (3, 1)), atol=1e-9)


def test_infinite_bounds_in_theta_by_differences() -> None:
    """A step from an infinite entry leads nowhere, and those of the others are not longer for it."""
    theta, y, truth = boxes()
    backend = NumpyBackend("finite_differences")
    one = implicit_vjp(bounded(NUMPY), y[0], theta[0], np.ones(4), backend=backend)
    np.testing.assert_allclose(one, truth[0], atol=1e-6)
    many = implicit_vjp(bounded(NUMPY, batched=True), y, theta, np.ones((2, 4)), batched=True, backend=backend)
    np.testing.assert_allclose(many, truth, atol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "finite_differences"])
def test_infinite_bounds_of_a_projection(mode: str) -> None:
    """In theta, too."""
    f = lambda y, t: ((y - t["a"]) ** 2).sum() / 2
    onto = ProjectedGradient(f, lambda x, t: projections.box(x, t["low"], np.inf))
    theta = {"a": A, "low": np.array([0.0, -np.inf, -np.inf, 0.0])}
    g = implicit_vjp(onto, np.maximum(A, theta["low"]), theta, np.ones(4), backend=NumpyBackend(mode))
    np.testing.assert_allclose(g["a"], [0.0, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(g["low"], [1.0, 0, 0, 0], atol=1e-6)


# -- nothing there ---------------------------------------------------------------------------------------------------
SQUARE: Callable[..., Any] = lambda y, t: (y * y).sum() + 0 * t.sum()
BELOW: Callable[..., Any] = lambda y, t: y - 9.0
EMPTY: dict[str, Any] = {
    "KKT": KKT(SQUARE, eq=lambda y, t: y.sum() + 0 * t.sum(), ineq=BELOW),
    "LogBarrier": LogBarrier(lambda y, t: SQUARE(y, t) - y.sum() / 9, ineq=BELOW, t=1.0),
    "ProjectedGradient": ProjectedGradient(SQUARE, lambda x, t: projections.box(x, -1.0, 1.0)),
    "ProximalGradient": ProximalGradient(SQUARE, lambda x, t, step: proxes.lasso(x, 1.0, step)),
}


@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("which", EMPTY)
@pytest.mark.parametrize(("n", "m"), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["auto", "finite_differences"])
def test_empty_y_or_theta(lib: Library, which: str, n: int, m: int, mode: str) -> None:
    y, theta = lib.array(np.zeros(n)), lib.array(np.zeros(m))
    options: dict[str, Any] = {"backend": NumpyBackend(mode)} if lib is NUMPY else {}
    if which == "ProximalGradient" and n and mode != "auto":
        pytest.skip("y = 0 lies at a kink of nothing")
    assert lib.numpy(implicit_vjp(EMPTY[which], y, theta, y, **options)).shape == (m,)
    assert lib.numpy(implicit_jacobian(EMPTY[which], y, theta, **options)).shape == (n, m)


def test_empty_data_of_a_quadratic_program() -> None:
    assert implicit_vjp(QP(Q=np.eye(2), G=np.eye(2), h=np.ones(2)), np.zeros(2), {}, np.ones(2)) == {}
    none = QP(Q=np.zeros((0, 0)), G=np.zeros((1, 0)), h=np.ones(1))
    assert implicit_vjp(none, np.zeros(0), {"q": np.zeros(0)}, np.zeros(0))["q"].shape == (0,)
    assert check_regularity(none, np.zeros(0), {"q": np.zeros(0)}).regular


# -- random quadratic programs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("seed", range(40))
def test_random_programs_in_random_units(lib: Library, seed: int) -> None:
    """Coordinates that are zero up to the tolerance of a solver, whose units nothing but the curvature tells."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    p, k = int(rng.integers(0, n // 2 + 1)), int(rng.integers(1, n // 2 + 1))
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    H = rotation * np.geomspace(1, 10 ** rng.uniform(0, 4), n) @ rotation.T
    J = np.linalg.qr(rng.normal(size=(n, n)))[0] if seed % 2 else np.eye(n)[rng.permutation(n)]
    G = np.concatenate([J[p : p + k], -J[p : p + k]])
    y = rng.normal(size=n) * (rng.random(n) < 0.6)
    y[int(rng.integers(n))] = 1.0
    lam, mu = rng.normal(size=p), np.append(rng.uniform(0.1, 2, k), np.zeros(k))
    h = G @ y + np.append(np.zeros(k), rng.uniform(0.5, 2, k))
    q = -(H @ y + J[:p].T @ lam + G.T @ mu)
    held = J[: p + k]
    saddle = np.block([[H, held.T], [held, np.zeros((p + k, p + k))]])
    truth = -np.linalg.solve(saddle, np.concatenate([np.eye(n), np.zeros((p + k, n))]))[:n]
    D, c = 10 ** rng.uniform(-9, 9, n), 10 ** rng.uniform(-6, 6)
    s, r = 10 ** rng.uniform(-9, 9, 2 * k), 10 ** rng.uniform(-9, 9, p)
    near = y + rng.choice([0.0, 1e-12]) * rng.uniform(-1, 1, n)
    data = (c * H / np.outer(D, D), None, r[:, None] * J[:p] / D, r * (J[:p] @ y), s[:, None] * G / D, s * h)
    condition = QP(*(None if x is None else lib.array(x) for x in data), route=ROUTES[seed % 3])
    found = outcome(lambda: implicit_jacobian(condition, lib.array(D * near), {"q": lib.array(c * q / D)}))
    assert found.quiet, found.text
    got = lib.numpy(found.value["q"]) / np.outer(D, D) * c
    np.testing.assert_allclose(got, truth, atol=1e-6 * np.abs(truth).max() + 1e-12)
