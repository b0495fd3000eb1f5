"""FAULTS 49 on Torch: a tensor in the closure of a condition is told, and its gradient is never None or zero."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.func import functional_call  # noqa: E402

from implicitdiff import (  # noqa: E402
    DerivativeError,
    FixedPoint,
    NoiseError,
    Root,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_vjp,
    linear_solve,
    linearize,
)

F64 = torch.float64
ONE = torch.ones(3, dtype=F64)
TOLD = "enclosing scope that requires a gradient"
TWO = 2 * ONE


def conditions(x: Any) -> dict[str, Any]:
    """Conditions of y = θ / x that capture x."""
    held = {"x": x}
    return {
        "root": Root(lambda y, th: x * y - th),
        "objective": lambda y, th: (x * (y - th / x) ** 2).sum(),
        "given": Stationary(grad=lambda y, th: x * y - th, hvp=lambda y, th, v: x * v, mixed_vjp=lambda y, th, u: -u),
        "in a dict": Root(lambda y, th: held["x"] * y - th),
        "default": Root(lambda y, th, x=x: x * y - th),
    }


@pytest.mark.parametrize("name", conditions(ONE))
@pytest.mark.parametrize("graph", [False, True])
def test_captured_tensor(name: str, graph: bool) -> None:
    leaf = torch.tensor(2.0, dtype=F64, requires_grad=True)
    theta = ONE.clone().requires_grad_()
    wrapped = implicit_function(conditions(leaf * 1 if graph else leaf)[name])(lambda theta: theta / 2)
    with pytest.raises(DerivativeError, match=TOLD):
        wrapped(theta).sum().backward()
    free = implicit_function(conditions(leaf.detach())[name])(lambda theta: theta / 2)
    free(theta).sum().backward()
    torch.testing.assert_close(theta.grad, ONE / 2)
    with torch.no_grad():  # nobody asks for a gradient
        torch.testing.assert_close(wrapped(theta), ONE / 2)


def test_fault_69_captured_module_around() -> None:
    """The gradient by θ alone is there; that by a module is refused, under a map, in a batch, or a broken condition."""
    model = torch.nn.Linear(3, 3, dtype=F64)
    system = torch.linalg.inv(10 * torch.eye(3, dtype=F64) + model.weight.detach())
    condition = Root(lambda y, th: model(y) + 10 * y - th)

    def solution(th: Any) -> Any:
        return (th - model.bias.detach()) @ system.T

    both = torch.stack([ONE, TWO]).requires_grad_()
    for solve in (
        torch.func.vmap(implicit_function(condition)(solution)),
        implicit_function(condition, batched=True)(solution),
    ):
        y = solve(both)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), both, retain_graph=True)[0], (ONE @ system).expand(2, 3)
        )
        for inputs in (both, both.detach()):
            with pytest.raises(DerivativeError, match=TOLD):
                solve(inputs).sum().backward()
    with pytest.raises(DerivativeError, match=TOLD):
        torch.autograd.grad(y.sum(), both, create_graph=True)
    broken = implicit_function(Root(lambda y, th: model(y)[:2] - th))(solution)
    assert broken(ONE).shape == (3,)


def test_captured_under_a_transform() -> None:
    def loss(x: Any) -> Any:
        return implicit_function(Root(lambda y, th: x * y - th))(lambda theta: theta / 2)(ONE).sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(DerivativeError, match=TOLD):
            transform(loss)(torch.tensor(2.0, dtype=F64))


def test_captured_module() -> None:
    """Its parameters may be captured and trained by mistake, or replaced by those in theta."""
    model = torch.nn.Linear(3, 3, dtype=F64)

    def iterate(layer: Any, x: Any) -> Any:
        z = x
        for _ in range(80):
            z = 0.1 * layer(z) + x
        return z

    x = ONE.clone().requires_grad_()
    wrapped = implicit_function(FixedPoint(lambda z, x: 0.1 * model(z) + x))(lambda x: iterate(model, x).detach())
    with pytest.raises(DerivativeError, match=TOLD):
        wrapped(x).sum().backward()
    model.requires_grad_(False)
    wrapped(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(iterate(model, x).sum(), x)[0])
    model.requires_grad_(True)
    trained = implicit_function(FixedPoint(lambda z, theta: 0.1 * functional_call(model, theta, (z,)) + ONE))(
        lambda theta: iterate(lambda z: functional_call(model, theta, (z,)), ONE)
    )
    trained(dict(model.named_parameters())).sum().backward()
    expected = torch.autograd.grad(iterate(model, ONE).sum(), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected)


# -- 69: by the functions themselves -----------------------------------------------------------------------
class Scale(torch.nn.Module):
    """x y, with x a parameter; and everything else that holds a tensor."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(x.detach().clone())
        self.held = {"deep": [{"deeper": ({"x": x},)}]}

    def forward(self, y: Any) -> Any:
        return self.x * y

    def by_method(self, y: Any, th: Any) -> Any:
        return self.x * y - th

    def deep(self, y: Any, th: Any) -> Any:
        return self.held["deep"][0]["deeper"][0]["x"] * y - th


def ways(x: Any) -> dict[str, Any]:
    """More ways in which a condition of y = θ / x may come to x, deep ones and modules among them."""
    scale = Scale(x)
    linear: dict[str, Any] = {"mixed_vjp": lambda y, th, u: -u}
    free = lambda y, th: x.detach() * y - th
    return {
        **conditions(x),
        "partial": Root(functools.partial(lambda x, y, th: x * y - th, x)),
        "bound method": Root(scale.by_method),
        "module": Root(lambda y, th: scale(y) - th),
        "depths": Root(scale.deep),
        "hvp of a module": Stationary(grad=free, hvp=lambda y, th, v: scale(v), **linear),
        "hessian of a module": Stationary(grad=free, hessian=lambda y, th: torch.diag(scale(ONE)), **linear),
        "mixed_vjp of a module": Stationary(
            grad=free, hvp=lambda y, th, v: x.detach() * v, mixed_vjp=lambda y, th, u: -scale(u) / x.detach()
        ),
    }


DERIVATIVES: dict[str, Any] = {
    "grad": lambda c, th: implicit_grad(c, lambda y, th: y.sum(), ONE, th),
    "vjp": lambda c, th: implicit_vjp(c, ONE, th, ONE),
    "jacobian": lambda c, th: implicit_jacobian(c, ONE, th).sum(0),
    "linearize": lambda c, th: linearize(c, ONE, th, solver="lu").vjp(ONE),
    "batched": lambda c, th: implicit_vjp(c, ONE[None], th[None], ONE[None], batched=True)[0],
    "wrapped": lambda c, th: implicit_function(c)(lambda th: th / 2)(th),
}


@pytest.mark.parametrize("name", ways(ONE))
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_fault_69_captured(kind: str, name: str) -> None:
    """The number is there for those who want it; whoever differentiates it by x gets an error, never 0 or nothing."""
    leaf = torch.tensor(2.0, dtype=F64, requires_grad=True)
    wanted = ONE if kind == "wrapped" else ONE / 2
    for x in (leaf, leaf * 1):
        condition = ways(x * ONE if "module" in name else x)[name]
        found = DERIVATIVES[kind](condition, TWO)
        torch.testing.assert_close(found.detach(), wanted)
        with pytest.raises(DerivativeError, match=TOLD):
            found.sum().backward()
    free = DERIVATIVES[kind](ways(leaf.detach())[name], TWO)
    assert free.requires_grad == ("module" in name or name == "bound method")  # its parameters are recorded, still
    with torch.no_grad():
        assert not DERIVATIVES[kind](condition, TWO).requires_grad


def test_fault_69_captured_beside_arguments() -> None:
    """What is defined goes on flowing: by y, θ, and the vector; not by x, and not twice."""
    x = torch.tensor(2.0, dtype=F64, requires_grad=True)
    v = ONE.clone().requires_grad_()
    found = implicit_vjp(Root(lambda y, th: x * y - th**2 / 2), ONE, TWO, v)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), v, retain_graph=True)[0], ONE)
    with pytest.raises(DerivativeError, match=TOLD):
        torch.autograd.grad(found.sum(), x)
    with pytest.raises(DerivativeError, match=TOLD):
        found.sum().backward()


def test_fault_69_captured_by_outer() -> None:
    x = torch.tensor(2.0, dtype=F64, requires_grad=True)
    condition = Root(lambda y, th: 2 * y - th)
    found = implicit_grad(condition, lambda y, th: x * y.sum(), ONE, TWO)
    torch.testing.assert_close(found.detach(), ONE)
    with pytest.raises(DerivativeError, match=TOLD):
        found.sum().backward()
    with pytest.raises(DerivativeError, match=TOLD):
        torch.func.grad(lambda x: implicit_grad(condition, lambda y, th: x * y.sum(), ONE, TWO).sum())(x.detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(DerivativeError, match=TOLD):
            implicit_grad(condition, lambda y, th: dual * y.sum(), ONE, TWO)


def test_fault_69_captured_by_a_product() -> None:
    """`linear_solve` with A as a function: reverse mode, and again."""
    W = torch.tensor([[2.0, 0.5], [0.5, 3.0]], dtype=F64, requires_grad=True)
    b = torch.ones(2, dtype=F64, requires_grad=True)
    for right in (b, b.detach()):
        x = linear_solve(lambda v: W @ v, right, symmetric=True)
        torch.testing.assert_close(x.detach(), torch.linalg.solve(W.detach(), b.detach()))
        with pytest.raises(DerivativeError, match=TOLD):
            x.sum().backward()
    (z,) = torch.autograd.grad(linear_solve(lambda v: W @ v, b, symmetric=True).sum(), b, create_graph=True)
    with pytest.raises(DerivativeError, match=TOLD):
        z.sum().backward()
    fixed = linear_solve(lambda v: W.detach() @ v, b, symmetric=True)
    torch.testing.assert_close(torch.autograd.grad(fixed.sum(), b)[0], z.detach())


# -- 69: aux ---------------------------------------------------------------------------------------------
def with_aux(has_aux: Any) -> Any:
    """y = θ², and aux = ½ ‖y‖² + Σ θ: as numbers of the solver, or as a function."""

    def solve(theta: Any) -> Any:
        y = theta**2
        return y if callable(has_aux) else (y, {"value": aux(y, theta), "steps": torch.tensor(3), "name": "newton"})

    return implicit_function(Root(lambda y, th: y - th**2), has_aux=has_aux)(solve)


def aux(y: Any, theta: Any) -> Any:
    return (y**2).sum() / 2 + theta.sum()


def test_fault_69_aux_of_the_solver() -> None:
    """Its numbers are there; a derivative of it is refused, and does not come out as zero."""
    theta, wrapped = (2 * ONE).requires_grad_(), with_aux(True)
    y, held = wrapped(theta)
    torch.testing.assert_close(held["value"].detach(), torch.tensor(30.0, dtype=F64))
    assert held["name"] == "newton"
    assert not held["steps"].requires_grad
    y.sum().backward()
    torch.testing.assert_close(theta.grad, 4 * ONE)
    for loss in (lambda t: wrapped(t)[0].sum() + wrapped(t)[1]["value"], lambda t: wrapped(t)[1]["value"]):
        with pytest.raises(DerivativeError, match="aux"):
            loss(theta).backward()
        with pytest.raises(DerivativeError, match="aux"):
            torch.func.grad(loss)(theta.detach())
        assert torch.func.jvp(loss, (ONE,), (ONE,))[1].isnan()
    torch.testing.assert_close(torch.func.jvp(lambda t: wrapped(t)[0], (ONE,), (ONE,))[1], 2 * ONE)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda t: wrapped(t)[0].sum()))(ONE[None]), 2 * ONE[None]
    )
    with torch.no_grad():
        assert not wrapped(theta)[1]["value"].requires_grad


def test_fault_69_aux_as_a_function() -> None:
    """d(Σ y + aux) = 2 θ + 2 θ³ + 1."""
    wrapped = with_aux(aux)

    def loss(t: Any) -> Any:
        y, value = wrapped(t)
        return y.sum() + value

    theta = (2 * ONE).requires_grad_()
    loss(theta).backward()
    torch.testing.assert_close(theta.grad, 21 * ONE)
    torch.testing.assert_close(torch.func.hessian(loss)(2 * ONE), torch.diag(26 * ONE))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(ONE[None]), 5 * ONE[None])


# -- 61: dropout -------------------------------------------------------------------------------------------
def test_fault_61_dropout() -> None:
    """A condition that draws random numbers has no solution; one that draws them to no effect has one."""
    drop, one = torch.nn.Dropout(0.5), torch.ones(50, dtype=F64)
    cases: dict[str, Any] = {
        "root": Root(lambda y, th: drop(2 * y - th)),
        "objective": lambda y, th: (drop((y - th / 2) ** 2 + 1)).sum(),
    }
    for condition in cases.values():
        with pytest.raises(NoiseError, match="not deterministic"):
            implicit_vjp(condition, 2 * one, 2 * one, one)
    outer = lambda y, th: (y * torch.rand(50)).sum() * 0 + y.sum()
    torch.testing.assert_close(implicit_grad(Root(lambda y, th: 2 * y - th), outer, one, 2 * one), one / 2)
    drop.eval()
    for condition in cases.values():
        torch.testing.assert_close(implicit_vjp(condition, one, 2 * one, one), one / 2)
    drop.train().p = 0.0
    torch.testing.assert_close(implicit_vjp(cases["root"], one, 2 * one, one), one / 2)
