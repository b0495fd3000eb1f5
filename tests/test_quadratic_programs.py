"""Quadratic programs in every one of their data, on every library, route and solver, against differences."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import JAX, NUMPY, PLAIN, TORCH, Library
from helpers_constraints import EACH_SOLVER, with_choices
from problems import TIGHT

from implicitdiff import KKT, QP, implicit_jacobian, implicit_vjp

LIBS = pytest.mark.parametrize("lib", PLAIN, ids=lambda lib: lib.name)
ALL_LIBS = pytest.mark.parametrize("lib", [*PLAIN, *JAX], ids=lambda lib: lib.name)
EXACT_LIBS = pytest.mark.parametrize("lib", [NUMPY, *TORCH], ids=lambda lib: lib.name)


def quadratic_program() -> tuple[dict[str, np.ndarray], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Data, solution and multipliers, from a chosen primal-dual solution; the first two of four G are active."""
    rng = np.random.default_rng(3)
    Q, A, G = rng.normal(size=(6, 6)), rng.normal(size=(2, 6)), rng.normal(size=(4, 6))
    Q, y = Q @ Q.T + np.eye(6), rng.normal(size=6)
    lam, mu = rng.normal(size=2), np.array([0.8, 1.3, 0.0, 0.0])
    data = {"Q": Q, "q": -(Q @ y + A.T @ lam + G.T @ mu), "A": A, "b": A @ y, "G": G,
            "h": G @ y + np.array([0.0, 0.0, 0.5, 0.9])}  # fmt: skip
    return data, y, (lam, mu)


def resolved(data: dict[str, np.ndarray]) -> np.ndarray:
    """Solve with the first two inequalities as equalities."""
    Q = (data["Q"] + data["Q"].T) / 2
    J = np.concatenate([data["A"], data["G"][:2]])
    K = np.block([[Q, J.T], [J, np.zeros((4, 4))]])
    return np.linalg.solve(K, np.concatenate([-data["q"], data["b"], data["h"][:2]]))[:6]


def differences(data: dict[str, np.ndarray], name: str) -> np.ndarray:
    """dy/d(data) by central differences, shape (6, size)."""
    columns = []
    for i in range(data[name].size):
        ends = []
        for s in (1e-6, -1e-6):
            moved = data[name].copy()
            moved.flat[i] += s
            ends.append(resolved({**data, name: moved}))
        columns.append((ends[0] - ends[1]) / 2e-6)
    return np.stack(columns, axis=-1)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    ("lib", "by"), with_choices(EACH_SOLVER, [("kkt", "auto"), ("kkt", "minres"), ("nullspace", "auto")])
)
def test_quadratic_program_in_all_of_its_data(lib: Library, by: tuple[str, str]) -> None:
    (route, solver), (data, y, _) = by, quadratic_program()
    theta = {name: lib.array(x) for name, x in data.items()}
    v = np.cos(np.arange(6.0))
    got = implicit_vjp(QP(route=route), lib.array(y), theta, lib.array(v), solver=TIGHT[solver])
    for name in data:
        expected = (v @ differences(data, name)).reshape(data[name].shape)
        np.testing.assert_allclose(lib.numpy(got[name]), expected, rtol=1e-6, atol=1e-7, err_msg=name)


@LIBS
@pytest.mark.parametrize("name", ["Q", "q", "A", "b", "G", "h"])
@pytest.mark.parametrize("given", [False, True], ids=["recovered", "given"])
def test_quadratic_program_with_fixed_data(lib: Library, name: str, given: bool) -> None:
    """One of the data is theta, the rest is fixed; forward and as a Jacobian."""
    data, y, multipliers = quadratic_program()
    fixed = {other: lib.array(x) for other, x in data.items() if other != name}
    layer = QP(**fixed, multipliers=tuple(map(lib.array, multipliers)) if given else None)
    got = implicit_jacobian(layer, lib.array(y), {name: lib.array(data[name])})[name]
    expected = differences(data, name).reshape(6, *data[name].shape)
    np.testing.assert_allclose(lib.numpy(got), expected, rtol=1e-6, atol=1e-7)


@EXACT_LIBS
def test_quadratic_program_is_the_same_as_its_functions(lib: Library) -> None:
    data, y, _ = quadratic_program()
    theta = {name: lib.array(x) for name, x in data.items()}
    condition = KKT(
        lambda y, t: y @ (t["Q"] @ y) / 2 + t["q"] @ y, eq=lambda y, t: t["A"] @ y - t["b"],
        ineq=lambda y, t: t["G"] @ y - t["h"],
    )  # fmt: skip
    v = lib.array(np.ones(6))
    one, other = implicit_vjp(QP(), lib.array(y), theta, v), implicit_vjp(condition, lib.array(y), theta, v)
    for name in data:
        np.testing.assert_allclose(lib.numpy(one[name]), lib.numpy(other[name]), rtol=1e-8, atol=1e-9)


@pytest.mark.slow(on=("jax",))
@ALL_LIBS
def test_batch_of_quadratic_programs(lib: Library) -> None:
    """Data that is fixed is shared; the rest has the leading axis."""
    data, _, _ = quadratic_program()
    items = [{**data, "q": data["q"] + 0.01 * i, "h": data["h"] * (1 + 0.01 * i)} for i in range(3)]
    ys = np.stack([resolved(item) for item in items])
    fixed = {name: lib.array(data[name]) for name in ("Q", "A", "b", "G")}
    theta = {name: lib.array(np.stack([item[name] for item in items])) for name in ("q", "h")}
    got = implicit_vjp(QP(**fixed), lib.array(ys), theta, lib.array(np.ones((3, 6))), batched=True)
    for i, item in enumerate(items):
        for name in ("q", "h"):
            expected = np.ones(6) @ differences(item, name)
            np.testing.assert_allclose(lib.numpy(got[name])[i], expected, rtol=1e-6, atol=1e-7)
