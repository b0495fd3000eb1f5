"""Torch and JAX differentiate constrained solutions themselves, to second order and under their transformations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from frameworks import EACH, framework

from implicitdiff import KKT, QP, implicit_function, implicit_vjp
from implicitdiff.registry import get_backend

THETA = np.array([3.0, 1.0, 1.5])
MANY = np.stack([THETA, 1.1 * THETA, 1.3 * THETA])


def objective(y: Any, theta: Any) -> Any:
    return ((y - theta[:2]) ** 2).sum()


def outside(y: Any, theta: Any) -> Any:
    return (y**2).sum() - theta[2] ** 2


def truth(theta: Any) -> Any:
    """Projection of θ₁:₂ onto the ball of radius θ₃."""
    return theta[:2] / (theta[:2] ** 2).sum() ** 0.5 * theta[2]


def multipliers(y: Any, theta: Any) -> Any:
    return None, (theta[:2] ** 2).sum() ** 0.5 / theta[2] - 1


CONDITIONS: dict[str, dict[str, Any]] = {
    "ineq": {"ineq": outside},
    "eq": {"eq": outside},
    "schur": {"ineq": outside, "route": "schur"},
    "nullspace": {"ineq": outside, "route": "nullspace"},
    "multipliers": {"ineq": outside, "multipliers": multipliers},
    "an array of multipliers": {"ineq": outside, "multipliers": np.array([np.sqrt(10.0) / 1.5 - 1])},
}


def projection(fw: Any, **options: Any) -> Callable[[Any], Any]:
    """The projection, by a black box."""
    if isinstance(options.get("multipliers"), np.ndarray):
        options["multipliers"] = fw.xp.asarray(options["multipliers"])
    return implicit_function(KKT(objective, **options))(fw.black_box(truth))


def loss_of(fw: Any, solution: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loss(theta: Any) -> Any:
        y = solution(theta)
        return fw.xp.sin(y[0]) * y[1] ** 2 + theta[2] * y[0]

    return loss


def assert_same(fw: Any, found: Any, expected: Any, rtol: float = 1e-8) -> None:
    found, expected = fw.numpy(found), fw.numpy(expected)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    ("name", "name_of", "by"),
    [("torch", which, by) for which in CONDITIONS for by in ("jacrev", "jacfwd")]
    + [("jax", "ineq", "jacfwd"), ("jax", "ineq", "jacrev"), ("jax", "nullspace", "jacfwd")],
)
def test_first_order(name: str, name_of: str, by: str) -> None:
    fw = framework(name)
    jacobian, theta = fw.transforms()[by], fw.xp.asarray(THETA)
    assert_same(fw, jacobian(projection(fw, **CONDITIONS[name_of]))(theta), jacobian(truth)(theta))


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    ("name", "name_of"),
    [("torch", which) for which in CONDITIONS] + [("jax", which) for which in ("ineq", "multipliers")],
)
def test_second_order(name: str, name_of: str) -> None:
    """Multipliers follow y and theta when the derivative is differentiated: recovered, or computed by the user."""
    fw = framework(name)
    hessian, theta = fw.transforms()["hessian"], fw.xp.asarray(THETA)
    found = hessian(loss_of(fw, projection(fw, **CONDITIONS[name_of])))(theta)
    assert_same(fw, found, hessian(loss_of(fw, truth))(theta))


@pytest.mark.slow(on=("jax",))
@EACH
def test_vmap_of_grad(name: str) -> None:
    fw = framework(name)
    vmap, grad = (fw.transforms()[key] for key in ("vmap", "grad"))
    found = vmap(grad(loss_of(fw, projection(fw, ineq=outside))))(fw.xp.asarray(MANY))
    assert_same(fw, found, vmap(grad(loss_of(fw, truth)))(fw.xp.asarray(MANY)))


@EACH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Torch's compiler, about itself
def test_compiled_gradient(name: str) -> None:
    fw = framework(name)
    found = fw.compiled_gradient(loss_of(fw, projection(fw, ineq=outside)))(fw.xp.asarray(THETA))
    assert_same(fw, found, fw.gradient(loss_of(fw, truth))(fw.xp.asarray(THETA)))


def test_function_of_the_library_is_differentiated() -> None:
    """The gradient of a function of `implicit_vjp`'s result: y and theta move together."""
    fw = framework("torch")
    condition, v = KKT(objective, ineq=outside), fw.xp.asarray(np.array([1.0, 2.0]))
    pulled = lambda theta: fw.func.vjp(truth, theta)[1](v)[0]
    found = fw.gradient(lambda t: (implicit_vjp(condition, truth(t), t, v) ** 2).sum())(fw.xp.asarray(THETA))
    assert_same(fw, found, fw.gradient(lambda t: (pulled(t) ** 2).sum())(fw.xp.asarray(THETA)))


# -- Torch -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ["kkt", "schur", "nullspace"])
def test_gradcheck(route: str) -> None:
    fw = framework("torch")
    theta = fw.torch.tensor(THETA, requires_grad=True)
    layer = projection(fw, ineq=outside, route=route)
    assert fw.torch.autograd.gradcheck(layer, theta, check_forward_ad=True)
    assert fw.torch.autograd.gradgradcheck(layer, theta)


@pytest.mark.parametrize("solver", ["auto", "lu", "ldlt", "minres", "gmres"])
def test_backward(solver: str) -> None:
    fw = framework("torch")
    theta = fw.torch.tensor(THETA, requires_grad=True)
    layer = implicit_function(KKT(objective, ineq=outside), solver=solver)(fw.black_box(truth))
    loss_of(fw, layer)(theta).backward()
    assert_same(fw, theta.grad, fw.gradient(loss_of(fw, truth))(fw.xp.asarray(THETA)), 1e-7)


# -- JAX ---------------------------------------------------------------------------------------------------------------
def test_new_multipliers_compile_nothing() -> None:
    """Numbers in the condition go into the compiled program: a new condition with other numbers reuses it."""
    fw = framework("jax")
    programs = _programs()
    v = fw.xp.asarray(np.array([1.0, 2.0]))

    def ask(theta: np.ndarray) -> Any:
        theta = fw.xp.asarray(theta)
        given = KKT(objective, ineq=outside, multipliers=multipliers(None, theta)[1])
        return implicit_vjp(given, truth(theta), theta, v)

    ask(THETA)
    before = set(programs)
    for theta in MANY[1:]:
        assert_same(fw, ask(theta), fw.jax.vjp(truth, fw.xp.asarray(theta))[1](v)[0])
    assert set(programs) == before


def test_new_data_of_a_quadratic_program_compile_nothing() -> None:
    fw = framework("jax")
    programs = _programs()

    def ask(scale: float) -> Any:  # min |y|²/2 + q y over s (y₀ + y₁) = b: y = −q + (b / s + Σ q) / 2
        layer = QP(Q=fw.xp.eye(2), A=scale * fw.xp.ones((1, 2)))
        theta = {"q": fw.xp.asarray(np.array([1.0, 2.0])), "b": fw.xp.asarray(np.array([scale]))}
        return implicit_vjp(layer, fw.xp.asarray(np.array([1.0, 0.0])), theta, fw.xp.asarray(np.array([1.0, 0.0])))

    ask(1.0)
    before = set(programs)
    for scale in (2.0, 0.5):
        found = ask(scale)
        np.testing.assert_allclose(found["b"], [0.5 / scale], rtol=1e-12)
        np.testing.assert_allclose(found["q"], [-0.5, 0.5], rtol=1e-12)
    assert set(programs) == before


def _programs() -> dict[Any, Any]:
    """The table of compiled programs."""
    import importlib

    get_backend("jax")
    return importlib.import_module("implicitdiff.backends.jax.programs")._programs


# -- a quadratic program as a layer, to second order in all of its data ------------------------------------------------
def layer_data() -> dict[str, np.ndarray]:
    """Strictly complementary, with the first two of three inequalities active."""
    rng = np.random.default_rng(5)
    Q, A, G = rng.normal(size=(4, 4)), rng.normal(size=(1, 4)), rng.normal(size=(3, 4))
    Q, y = Q @ Q.T + np.eye(4), rng.normal(size=4)
    q = -(Q @ y + A.T @ [0.5] + G.T @ [0.8, 1.3, 0.0])
    return {"Q": Q, "q": q, "A": A, "b": A @ y, "G": G, "h": G @ y + [0.0, 0.0, 0.7]}


def solved(xp: Any, data: dict[str, Any]) -> Any:
    """The closed form for the first two inequalities active; differentiated by the framework."""
    J = xp.concat([data["A"], data["G"][:2]], axis=0)
    upper = xp.concat([(data["Q"] + data["Q"].T) / 2, J.T], axis=1)
    K = xp.concat([upper, xp.concat([J, xp.zeros((3, 3), dtype=J.dtype)], axis=1)], axis=0)
    return xp.linalg.solve(K, xp.concat([-data["q"], data["b"], data["h"][:2]], axis=0)[:, None])[:4, 0]


def black_box(data: dict[str, Any]) -> np.ndarray:
    """The same in NumPy."""
    return solved(np, {key: np.asarray(x) for key, x in data.items()})


@pytest.mark.slow(on=("jax",))
@EACH
def test_layer_to_second_order_in_all_of_its_data(name: str) -> None:
    """All 36 blocks of the Hessian of a loss: a Hessian-vector product along one direction in all data together."""
    fw = framework(name)
    theta = {key: fw.xp.asarray(x) for key, x in layer_data().items()}
    moved = {key: fw.xp.asarray(np.cos(np.arange(x.size)).reshape(x.shape)) for key, x in layer_data().items()}
    layer = implicit_function(QP())(black_box)
    grad = fw.transforms()["grad"]

    def along(solution: Callable[[Any], Any]) -> Any:
        first = grad(lambda d: (solution(d) ** 3).sum())
        pair = lambda d: sum((g * moved[key]).sum() for key, g in first(d).items())
        return first(theta), grad(pair)(theta)

    for found, expected in zip(along(layer), along(lambda d: solved(fw.xp, d)), strict=True):
        for key in theta:
            assert_same(fw, found[key], expected[key], 1e-7)


def test_layer_in_a_batch() -> None:
    """Torch: a thousand problems of one shape in one call, each as when it is alone."""
    fw = framework("torch")
    data = {key: fw.xp.asarray(x) for key, x in layer_data().items()}
    shifts = fw.torch.linspace(0, 0.1, 5, dtype=fw.torch.float64)
    theta = {"q": data["q"] + shifts[:, None], "b": data["b"] - shifts[:, None]}
    fixed = {key: data[key] for key in ("Q", "A", "G", "h")}
    ys = fw.torch.stack([solved(fw.xp, {**data, "q": q, "b": b}) for q, b in zip(*theta.values(), strict=True)])
    together = implicit_vjp(QP(**fixed), ys, theta, fw.torch.ones_like(ys), batched=True)
    for i in range(5):
        item = {key: x[i] for key, x in theta.items()}
        alone = implicit_vjp(QP(**fixed), ys[i], item, fw.torch.ones_like(ys[i]))
        expected = fw.gradient(lambda q, i=i: solved(fw.xp, {**data, "q": q, "b": theta["b"][i]}).sum())(item["q"])
        assert_same(fw, together["q"][i], alone["q"], 1e-12)
        assert_same(fw, alone["q"], expected)
        assert math.isclose(float(together["b"][i, 0]), float(alone["b"][0]), rel_tol=1e-10)
