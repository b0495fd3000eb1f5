"""Torch's own differentiation of solutions: in reverse, forward, under torch.func, to third order."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from implicitdiff import (
    BackendError,
    CallbackError,
    DerivativeError,
    DTypeError,
    FixedPoint,
    InputError,
    Root,
    SingularError,
    SolveWarning,
    implicit_function,
    implicit_vjp,
)

torch = pytest.importorskip("torch")

from torch.autograd import grad, gradcheck, gradgradcheck  # noqa: E402
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # from Torch's forward mode

F64 = torch.float64
_numbers = np.random.default_rng(0)
P = torch.from_numpy(_numbers.normal(size=(4, 4)) + 3 * np.eye(4))
K = torch.from_numpy(_numbers.uniform(-0.5, 0.5, (4, 3)))
THETA = torch.tensor([0.3, 0.8, 0.5], dtype=F64)
MANY = torch.stack([THETA, 0.5 * THETA, 1.2 * THETA])
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


# -- first, second, third order --------------------------------------------------------------------------
def test_backward() -> None:
    """One adjoint solve of the core; leaves that ask for nothing get nothing."""
    theta, other = leaf(), torch.ones(3, dtype=F64)
    wrapped = implicit_function(Root(lambda y, t: residual(y, t["a"] * t["b"])))(lambda t: truth(t["a"] * t["b"]))
    y = wrapped({"a": theta, "b": other})
    assert y.requires_grad
    (y**3).sum().backward()
    same(theta.grad, grad((truth(t := leaf()) ** 3).sum(), t)[0])
    assert other.grad is None


@pytest.mark.parametrize("order", [1, 2, 3])
def test_repeated_grad(order: int) -> None:
    """``create_graph`` all the way."""
    found = []
    for function in (solve, truth):
        theta = leaf()
        value = (function(theta) ** 3).sum()
        for _ in range(order):
            (g,) = grad(value, theta, create_graph=True)
            value = (g**2).sum()
        found.append(g)
    same(*found)


def argmin_condition(y: Any, theta: Any) -> Any:
    return (theta[:2].exp() * y**2).sum() / 2 + (y**4).sum() / 4 + y[0] * y[1] / 3 - y.sum() * theta[2]


def newton(theta: Any) -> Any:
    y = torch.zeros(2, dtype=F64)
    for _ in range(40):
        g = torch.func.grad(argmin_condition)(y, theta)
        y = y - torch.linalg.solve(jacrev(torch.func.grad(argmin_condition))(y, theta), g)
    return y


def iterate(theta: Any) -> Any:
    y = torch.zeros(4, dtype=F64)
    for _ in range(300):
        y = contraction(y, theta)
    return y


def contraction(y: Any, theta: Any) -> Any:
    return torch.tanh(P @ y / 10 + K @ theta)


WRAPPED = {
    "root": solve,
    "stationary": implicit_function(argmin_condition)(newton),
    "fixed point": implicit_function(FixedPoint(contraction))(iterate),
    "root, given": implicit_function(
        Root(
            residual,
            jvp=lambda y, t, v: P @ (v / y),
            mixed_vjp=lambda y, t, u: -2 * t * (K.T @ (P.T @ u)),
        ),
        solver="gmres",
    )(lambda t: truth(t)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_gradcheck(name: str) -> None:
    """Torch's own checks, forward mode and second order included."""
    assert gradcheck(WRAPPED[name], (leaf(),), check_forward_ad=True)
    assert gradgradcheck(WRAPPED[name], (leaf(),), check_fwd_over_rev=True)


def loss(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda theta: (function(theta) ** 3).sum()


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda s: torch.func.grad(loss(s))(THETA),
    "vjp": lambda s: vjp(s, THETA)[1](ONES)[0],
    "jvp": lambda s: jvp(s, (THETA,), (THETA + 1,))[1],
    "jacrev": lambda s: jacrev(s)(THETA),
    "jacfwd": lambda s: jacfwd(s)(THETA),
    "hessian": lambda s: hessian(loss(s))(THETA),
    "jacrev of jacrev": lambda s: jacrev(jacrev(s))(THETA),
    "jacfwd of jacfwd": lambda s: jacfwd(jacfwd(s))(THETA),
    "jacrev of jacfwd": lambda s: jacrev(jacfwd(s))(THETA),
    "third": lambda s: jacrev(hessian(loss(s)))(THETA),
    "vmap": lambda s: vmap(s)(MANY),
    "vmap along another axis": lambda s: vmap(s, in_dims=1)(MANY.T.contiguous()),
    "vmap of grad": lambda s: vmap(torch.func.grad(loss(s)))(MANY),
    "vmap of hessian": lambda s: vmap(hessian(loss(s)))(MANY),
    "grad of vmap": lambda s: torch.func.grad(lambda t: vmap(loss(s))(t).sum())(MANY),
    "grad of vmap of grad": lambda s: torch.func.grad(lambda t: vmap(torch.func.grad(loss(s)))(t).pow(2).sum())(MANY),
    "vmap of vmap": lambda s: vmap(vmap(s))(torch.stack([MANY, MANY + 0.1])),
    "autograd.functional.hessian": lambda s: torch.autograd.functional.hessian(loss(s), THETA),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    same(TRANSFORMS[name](solve), TRANSFORMS[name](truth))


def test_forward_mode() -> None:
    expected = jvp(truth, (THETA,), (THETA + 1,))[1]
    with torch.autograd.forward_ad.dual_level():
        y = solve(torch.autograd.forward_ad.make_dual(THETA, THETA + 1))
        same(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own, where it looks at tensors
@pytest.mark.slow
def test_compile() -> None:
    """The compiler steps over the solve and compiles what is around it."""
    theta = leaf()
    compiled = torch.compile(lambda t: (solve(2 * t) ** 2).sum() + 1, backend="eager")
    compiled(theta).backward()
    same(theta.grad, grad((truth(2 * (t := leaf())) ** 2).sum(), t)[0])


def test_the_old_vmap_is_told() -> None:
    """``is_grads_batched`` hides the numbers from a solve: an error, with the way round it."""
    theta = leaf()
    with pytest.raises(DerivativeError, match=r"torch\.func\.jacrev"):
        grad(solve(theta), theta, torch.eye(4, dtype=F64), is_grads_batched=True)


def test_batched_functions() -> None:
    """With ``batched`` the solver gets all items, and the condition is written for one."""
    calls = []

    @implicit_function(Root(residual), batched=True)
    def wrapped(theta: Any) -> Any:
        calls.append(tuple(theta.shape))
        return torch.exp(theta**2 @ K.T)

    theta = leaf(MANY)
    (g,) = grad((wrapped(theta) ** 3).sum(), theta, create_graph=True)
    (h,) = grad((g**2).sum(), theta)
    other = leaf(MANY)
    (expected,) = grad((vmap(truth)(other) ** 3).sum(), other, create_graph=True)
    same(g, expected)
    same(h, grad((expected**2).sum(), other)[0])
    assert calls == [(3, 3)]


# -- the solver is a black box ---------------------------------------------------------------------------
def test_the_solver_gets_plain_tensors() -> None:
    """Detached, one item at a time under vmap; in grad mode it may differentiate for itself."""
    seen = []

    @implicit_function(argmin_condition)
    def descend(theta: Any) -> Any:
        seen.append((theta.requires_grad, tuple(theta.shape)))
        y = torch.zeros(2, dtype=F64, requires_grad=True)
        optimizer = torch.optim.LBFGS([y], tolerance_grad=1e-13, tolerance_change=0, max_iter=100)

        def closure() -> Any:
            optimizer.zero_grad()
            value = argmin_condition(y, theta)
            value.backward()
            return value

        optimizer.step(closure)
        return y

    y = descend(theta := leaf())
    same(grad(y.sum(), theta)[0], jacrev(newton)(THETA).sum(0), 1e-6)
    vmap(descend)(MANY)
    assert seen == [(False, (3,))] * 4


def test_containers_modules_and_aux() -> None:
    """y and θ may be containers; aux comes back as it is."""
    module = torch.nn.Linear(3, 4, dtype=F64)
    x, marker = torch.ones(3, dtype=F64), object()

    def fun(y: Any, theta: Any, x: Any) -> Any:
        return {"h": y["h"] - torch.tanh(functional_call(module, theta, (x,))), "s": y["s"] - 2 * y["h"].sum()}

    @implicit_function(Root(fun), has_aux=True)
    def wrapped(theta: Any, x: Any, scale: float = 1.0) -> Any:
        h = np.tanh(theta["weight"].numpy() @ x.numpy() + theta["bias"].numpy())
        return {"h": h, "s": 2 * h.sum()}, marker

    y, aux = wrapped(dict(module.named_parameters()), x, scale=2.0)
    assert aux is marker
    (y["h"].sum() + y["s"]).backward()
    got = module.weight.grad
    expected = grad(3 * torch.tanh(module(x)).sum(), module.weight)[0]
    same(got, expected)


def test_vmap_over_data() -> None:
    """Data may be mapped over, with or without θ."""
    X = torch.stack([K, 0.5 * K])
    wrapped = implicit_function(Root(lambda y, t, k: P @ (y.log() - k @ t**2)))(lambda t, k: torch.exp(k @ t**2))
    got = vmap(torch.func.grad(lambda t, k: wrapped(t, k).sum()), (None, 0))(THETA, X)
    same(got, vmap(torch.func.grad(lambda t, k: torch.exp(k @ t**2).sum()), (None, 0))(THETA, X))
    same(vmap(lambda k: wrapped(THETA, k))(X), torch.exp(X @ THETA**2))


def test_args_that_require_gradients() -> None:
    wrapped = implicit_function(Root(lambda y, t, d: y - t * d))(lambda t, d: t * d)
    one, data = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True)
    for call in (
        lambda: wrapped(one, data),
        lambda: torch.func.grad(lambda d: wrapped(one, d).sum())(one),
        lambda: jvp(lambda d: wrapped(one, d), (one,), (one,)),
    ):
        with pytest.raises(InputError, match=r"args\[0\] requires a gradient"):
            call()
    with torch.no_grad():
        assert not wrapped(one, data).requires_grad


def test_aliasing() -> None:
    """A solver may return θ itself."""
    wrapped, theta = implicit_function(Root(lambda y, t: y - t))(lambda t: t), leaf()
    y = wrapped(theta)
    assert y is not theta
    y.sum().backward()
    same(theta.grad, torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (lambda t: None, CallbackError, "returned None"),
        (lambda t: (t, {"nit": 1}), DTypeError, "has_aux=True"),
        (lambda t: "solved", BackendError, "y is str"),
        (lambda t: t.int(), DTypeError, "y has dtype"),
    ],
)
def test_wrong_solutions(returned: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        implicit_function(Root(lambda y, t: y - t))(returned)(leaf())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode: Any) -> None:
    """Nothing is recorded; data made in inference mode can be used where there is."""
    with mode():
        assert not solve(leaf()).requires_grad
        data = K * 1
    wrapped = implicit_function(Root(lambda y, t, k: P @ (y.log() - k @ t**2)))(lambda t, k: torch.exp(k @ t**2))
    theta = leaf()
    (g,) = grad(wrapped(theta, data).sum(), theta)
    same(g, grad(truth(t := leaf()).sum(), t)[0])


# -- failures in the backward pass -----------------------------------------------------------------------
def singular(on_failure: str) -> Any:
    mask = torch.tensor([1.0, 0.0], dtype=F64)
    return implicit_function(Root(lambda y, t: mask * (y - t)), solver="lu", on_failure=on_failure)(lambda t: t)


def test_failures_in_backward() -> None:
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(SingularError):
        singular("raise")(theta).sum().backward()
    assert theta.grad is None
    with pytest.warns(SolveWarning, match="singular") as caught:
        singular("warn")(theta).sum().backward()
    assert caught[0].filename == __file__
    assert bool(grad(singular("nan")(theta).sum(), theta)[0].isnan().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad(singular("ignore")(theta).sum(), theta)
    with pytest.raises(SingularError):
        grad(singular("raise")(theta).sum(), theta, create_graph=True)
    with pytest.raises(SingularError):
        jvp(singular("raise"), (THETA[:2],), (THETA[:2],))


def test_derivatives_of_differences_are_refused() -> None:
    """Finite differences give a first derivative, never a second of zero."""

    def through_numpy(y: Any, theta: Any) -> Any:
        return torch.from_numpy(residual(y.detach(), theta.detach()).numpy())

    theta = leaf()
    wrapped = implicit_function(Root(through_numpy))(truth)
    same(grad(wrapped(theta).sum(), theta)[0], grad(truth(t := leaf()).sum(), t)[0], 1e-6)
    with pytest.raises(DerivativeError, match="finite differences"):
        grad(wrapped(theta).sum(), theta, create_graph=True)
    value = implicit_vjp(Root(through_numpy), truth(THETA), theta, ONES)
    same(value.detach(), jacrev(truth)(THETA).T @ ONES, 1e-6)
    with pytest.raises(DerivativeError, match="finite differences"):
        value.sum().backward()


def test_eight_threads() -> None:
    """First and second order by reverse mode (Torch's own forward mode is not safe in threads)."""
    expected = jacrev(jacrev(loss(truth)))(THETA)

    def work(_: int) -> None:
        for _ in range(3):
            theta = leaf()
            (g,) = grad(loss(solve)(theta), theta, create_graph=True)
            same(torch.stack([grad(x, theta, retain_graph=True)[0] for x in g]), expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_memory_is_freed() -> None:
    """A first derivative leaves no reference cycle, a second one none that the collector cannot break."""
    gc.collect()
    gc.disable()
    try:
        theta = leaf()
        y = solve(theta)
        node = weakref.ref(y.grad_fn)
        y.sum().backward()
        del y
        assert node() is None
    finally:
        gc.enable()
    y = solve(theta)
    (g,) = grad(y.sum(), theta, create_graph=True)
    node = weakref.ref(y.grad_fn)
    del y, g
    gc.collect()
    assert node() is None
