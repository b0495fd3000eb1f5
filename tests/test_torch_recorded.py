"""The public functions on tensors of which Torch records derivatives: their results are differentiable, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from implicitdiff import (
    Root,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
)

torch = pytest.importorskip("torch")

from torch.autograd import grad, gradcheck, gradgradcheck  # noqa: E402
from torch.func import jacrev, jvp, vjp  # noqa: E402

# Torch's forward mode loads its decompositions through torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

F64 = torch.float64
_numbers = np.random.default_rng(0)
P = torch.from_numpy(_numbers.normal(size=(4, 4)) + 3 * np.eye(4))
K = torch.from_numpy(_numbers.uniform(-0.5, 0.5, (4, 3)))
THETA = torch.tensor([0.3, 0.8, 0.5], dtype=F64)
ONES = torch.ones(4, dtype=F64)


def residual(y: Any, theta: Any) -> Any:
    """P (log y − K θ²), asymmetric in y: y = exp(K θ²)."""
    return P @ (y.log() - K @ theta**2)


def truth(theta: Any) -> Any:
    return torch.exp(K @ theta**2)


@implicit_function(Root(residual))
def solve(theta: Any) -> Any:
    """Return NumPy, so that nothing can be differentiated through it; `.numpy()` refuses tracked tensors."""
    return np.exp(K.numpy() @ theta.numpy() ** 2)


def leaf(x: Any = THETA) -> Any:
    return x.clone().requires_grad_()


def same(got: Any, expected: Any, rtol: float = 1e-9) -> None:
    got = torch.as_tensor(got)
    assert got.shape == expected.shape
    assert float((got - expected).detach().norm()) <= rtol * float(expected.detach().norm())


# -- the functions on tensors that are recorded ----------------------------------------------------------
def by_hand(y: Any, theta: Any) -> tuple[Any, Any]:
    return jacrev(residual)(y, theta), jacrev(residual, 1)(y, theta)


def vjp_by_hand(y: Any, theta: Any, v: Any) -> Any:
    A, B = by_hand(y, theta)
    return -B.T @ torch.linalg.solve(A.T, v)


def jvp_by_hand(y: Any, theta: Any, t: Any) -> Any:
    A, B = by_hand(y, theta)
    return -torch.linalg.solve(A, B @ t)


def jacobian_by_hand(y: Any, theta: Any, _: Any) -> Any:
    A, B = by_hand(y, theta)
    return -torch.linalg.solve(A, B)


def outer(y: Any, theta: Any) -> Any:
    return (y**3).sum() * theta[0] + theta.exp().sum()


def gradient_by_hand(y: Any, theta: Any, _: Any) -> Any:
    by_y, by_theta = torch.func.grad(outer, (0, 1))(y, theta)
    return by_theta + vjp_by_hand(y, theta, by_y)


FUNCTIONS: dict[str, tuple[Any, Any, Any]] = {
    "vjp": (lambda y, t, v: implicit_vjp(Root(residual), y, t, v), vjp_by_hand, ONES),
    "jvp": (lambda y, t, d: implicit_jvp(Root(residual), y, t, d), jvp_by_hand, THETA),
    "jacobian": (lambda y, t, _: implicit_jacobian(Root(residual), y, t), jacobian_by_hand, THETA),
    "grad": (lambda y, t, _: implicit_grad(Root(residual), outer, y, t), gradient_by_hand, THETA),
    "linearize": (lambda y, t, v: linearize(Root(residual), y, t).vjp(v), vjp_by_hand, ONES),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_recorded_tensors(name: str) -> None:
    """y, θ and the vector are independent arguments; the result is differentiable in each of them."""
    ours, expected, vector = FUNCTIONS[name]
    arguments = [truth(THETA), THETA, vector]
    same(ours(*arguments), expected(*arguments))
    assert not ours(*arguments).requires_grad
    tensors = [x.clone().requires_grad_() for x in arguments]
    found = grad((ours(*tensors) ** 2).sum(), tensors, allow_unused=True, create_graph=True)
    wanted = grad((expected(*tensors) ** 2).sum(), tensors, allow_unused=True, create_graph=True)
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
    assert len(pairs) >= 2
    for a, b in pairs:
        same(a, b)
        same(grad((a**2).sum(), tensors[1], retain_graph=True)[0], grad((b**2).sum(), tensors[1], retain_graph=True)[0])
    same(
        torch.func.grad(lambda t: (ours(arguments[0], t, vector) ** 2).sum())(THETA),
        torch.func.grad(lambda t: (expected(arguments[0], t, vector) ** 2).sum())(THETA),
    )
    same(jvp(lambda t: ours(arguments[0], t, vector), (THETA,), (THETA,))[1],
         jvp(lambda t: expected(arguments[0], t, vector), (THETA,), (THETA,))[1])  # fmt: skip


def test_only_the_cotangent_is_recorded() -> None:
    v = ONES.clone().requires_grad_()
    (found,) = grad((implicit_vjp(Root(residual), truth(THETA), THETA, v) ** 2).sum(), v)
    jacobian = jacrev(truth)(THETA)
    same(found, 2 * jacobian @ (jacobian.T @ ONES))


def test_products_of_a_wrapped_solver_see_its_solution_move() -> None:
    """``.vjp`` of an implicit function runs the solver, so its derivative is the total one."""
    theta = leaf()
    (found,) = grad(solve.vjp(theta, ONES).pow(2).sum(), theta)
    (expected,) = grad(vjp(truth, t := leaf())[1](ONES)[0].pow(2).sum(), t)
    same(found, expected)


def test_a_stationary_point_with_given_products() -> None:
    """Second order through products that the user gave."""
    S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)

    def scaled(y: Any, theta: Any, v: Any) -> Any:
        return theta[0] * (S @ v)

    condition = Stationary(
        grad=lambda y, t: t[0] * (S @ y) - t[1:], hvp=scaled,
        mixed_vjp=lambda y, t, u: torch.cat([(u @ (S @ y))[None], -u]),
    )  # fmt: skip
    wrapped = implicit_function(condition, solver="cg")(lambda t: torch.linalg.solve(t[0] * S, t[1:]))
    assert gradcheck(wrapped, (leaf(),))
    assert gradgradcheck(wrapped, (leaf(),))


# -- a solution inside of a condition ----------------------------------------------------------------------
@implicit_function(lambda z, t: (z**4 / 4 + z**2 / 2 - t * z).sum())
def inner(t: Any) -> Any:
    """z³ + z = t, by Cardano."""
    d = np.sqrt(t.numpy() ** 2 / 4 + 1 / 27)
    return np.cbrt(t.numpy() / 2 + d) + np.cbrt(t.numpy() / 2 - d)


@pytest.mark.parametrize("kind", ["root", "objective"])
def test_fault_75_nested_solutions(kind: str) -> None:
    """y³ + y = z + θ², z the solution at y + θ: hessian, forward over reverse, through both."""
    conditions: dict[str, Any] = {
        "root": Root(lambda y, t: y**3 + y - t**2 + inner(y)),
        "objective": lambda y, t: ((y**3 + y - t**2 + inner(y)) ** 2).sum() / 2,
    }
    z = torch.tensor([0.2, 0.5], dtype=F64)
    y = z**3 + z  # so that inner(y) = z

    def theta_of(y: Any, z: Any) -> Any:
        return (y**3 + y + z).sqrt()

    def slopes(z: Any) -> tuple[Any, Any]:
        """dy/dθ and d²y/dθ² by the chain rule, with y and θ as functions of z."""
        one = lambda f: torch.func.grad(lambda z: f(z).sum())
        y_of, t_of = (lambda z: z**3 + z), (lambda z: theta_of(z**3 + z, z))
        slope = lambda z: one(y_of)(z) / one(t_of)(z)
        return slope(z), one(slope)(z) / one(t_of)(z)

    wrapped = implicit_function(conditions[kind])(lambda t: y.clone())
    found = torch.func.hessian(lambda t: (wrapped(t) ** 2).sum())(theta_of(y, z))
    first, second = slopes(z)
    same(found, torch.diag(2 * first**2 + 2 * y * second))


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theta_dtype", [torch.float32, torch.float64])
def test_fault_33_mixed_precisions_wrapped(y_dtype: Any, theta_dtype: Any) -> None:
    """y³ = θ, from a solver that works in its own precision; by keyword, in a container, to second order."""

    @implicit_function(Root(lambda y, th: {"y": y["y"] ** 3 - th["t"]}))
    def fit(th: Any) -> Any:
        return {"y": th["t"].to(y_dtype) ** (1 / 3)}

    t = torch.tensor([1.5, 2.0], dtype=theta_dtype, requires_grad=True)
    y = fit(th={"t": t})["y"]
    (g,) = grad(y.sum(), t, create_graph=True)
    (h,) = grad(g.sum(), t)
    assert (y.dtype, g.dtype, h.dtype) == (y_dtype, theta_dtype, theta_dtype)
    exact = t.detach().double()
    same(g.detach().double(), exact ** (-2 / 3) / 3, 1e-6)
    same(h.double(), -2 / 9 * exact ** (-5 / 3), 1e-6)
    pulled = fit.vjp(th={"t": t.detach()}, cotangent={"y": torch.ones(2, dtype=y_dtype)})["t"]
    assert pulled.dtype == theta_dtype
    same(pulled.double(), exact ** (-2 / 3) / 3, 1e-6)
