"""Torch tensors through the public functions: closed forms, every solver, containers, batches, threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
from problems import PROBLEMS, SOLVERS_FOR, STRUCTURES, Problem

from implicitdiff import (
    BackendError,
    CallbackError,
    DTypeError,
    InputError,
    Root,
    SingularError,
    Stationary,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)
from implicitdiff.registry import get_backend

torch = pytest.importorskip("torch")
xp = pytest.importorskip("array_api_compat.torch")

F64 = torch.float64
RTOL = {"float64": 1e-8, "float32": 1e-3}
CASES = [(name, solver) for name in PROBLEMS for solver in SOLVERS_FOR[STRUCTURES[name]]]


def build(name: str, dtype: str = "float64", items: tuple[int, ...] = ()) -> Problem:
    return PROBLEMS[name](xp, getattr(torch, dtype), items)


def close(got: Any, truth: Any, rtol: float) -> None:
    truth = np.asarray(truth)
    assert isinstance(got, torch.Tensor)
    assert tuple(got.shape) == truth.shape
    assert np.linalg.norm(got.detach().numpy() - truth) <= rtol * np.linalg.norm(truth)


# -- closed forms ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("items", [(), (4,)], ids=["single", "batched"])
@pytest.mark.parametrize("given", ["fun", "all"])
@pytest.mark.parametrize(("name", "solver"), CASES)
def test_closed_forms(name: str, solver: str, given: str, items: tuple[int, ...], dtype: str) -> None:
    """VJP, JVP, Jacobian and total gradient; with ``batched`` the functions are those of one item."""
    p = build(name, dtype, items)
    functions = (*p.functions,) if given == "all" else (given,)
    options = {"solver": solver, "batched": bool(items)}
    lin = linearize(p.condition(*functions), p.y, p.theta, **options)
    for got, truth, like in (
        (lin.vjp(p.cotangent), p.truth.vjp, p.theta),
        (lin.jvp(p.tangent), p.truth.jvp, p.y),
        (lin.jacobian(), p.truth.jacobian, p.y),
    ):
        close(got, truth, RTOL[dtype])
        assert got.dtype == like.dtype
    gradient, report = implicit_grad(p.condition(*functions), p.outer, p.y, p.theta, return_report=True, **options)
    close(gradient, p.truth.gradient, RTOL[dtype])
    kind = "given" if given == "all" else "autodiff"
    assert report.derivatives == {"A": kind, "B": kind, "outer": "autodiff"}


@pytest.mark.parametrize("name", ["exponential_root", "minimum"])
def test_functions_that_leave_torch_get_differences(name: str) -> None:
    """A graph that breaks off must not look like a derivative of zero."""
    p = build(name)
    inner = p.functions["fun" if name == "exponential_root" else "grad"]
    key = "fun" if name == "exponential_root" else "grad"

    def through_numpy(y: Any, theta: Any) -> Any:
        return torch.from_numpy(inner(y, theta).detach().numpy().copy())

    def theta_detached(y: Any, theta: Any) -> Any:
        return inner(y, theta.detach())

    for function in (through_numpy, theta_detached):
        value, report = implicit_vjp(p.kind(**{key: function}), p.y, p.theta, p.cotangent, return_report=True)
        close(value, p.truth.vjp, 1e-6)
        assert report.derivatives == {"A": "finite differences", "B": "finite differences"}


def test_many_right_hand_sides_of_products_that_cannot_be_mapped() -> None:
    """A product through NumPy, and one that always returns the same memory, are called one by one."""
    p = build("exponential_root")
    jvp, held = p.functions["jvp"], torch.empty_like(p.y)

    def through_numpy(y: Any, theta: Any, v: Any) -> Any:
        return torch.from_numpy(jvp(y, theta, torch.from_numpy(v.numpy())).numpy())

    def same_memory(y: Any, theta: Any, v: Any) -> Any:
        return held.copy_(jvp(y, theta, v))

    for product in (through_numpy, same_memory):
        jacobian = implicit_jacobian(p.condition("fun", jvp=product), p.y, p.theta, solver="lu")
        close(jacobian, p.truth.jacobian, 1e-10)


def test_functions_of_one_item_are_mapped_in_one_call() -> None:
    """With ``batched`` a condition is called for one item and once, not once for each item."""
    p, shapes = build("minimum", items=(4,)), []

    def fun(y: Any, theta: Any) -> Any:
        shapes.append(tuple(y.shape))
        return p.functions["fun"](y, theta)

    close(implicit_vjp(fun, p.y, p.theta, p.cotangent, batched=True), p.truth.vjp, 1e-8)
    assert set(shapes) == {(5,)}
    assert len(shapes) == 1


def test_one_bad_item_of_a_batch() -> None:
    """The other items are right, and the bad one is named."""
    p = build("minimum", items=(4,))
    y = p.y.clone()
    y[2] = float("nan")
    with pytest.warns(Warning, match=r"item 2"):
        got = implicit_vjp(p.condition("fun"), y, p.theta, p.cotangent, batched=True, on_failure="warn")
    good = [0, 1, 3]
    close(got[good], p.truth.vjp[good], 1e-8)
    assert bool(got[2].isnan().all())

    def fun(y: Any, theta: Any) -> Any:  # singular in the item whose θ₀ is 0
        return (theta[0] * y**2).sum() / 2 - (theta[1:] * y).sum()

    theta = torch.tensor([[2.0, 1.0, 1.0], [0.0, 0.0, 0.0], [4.0, 1.0, 1.0]], dtype=F64)
    y = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.25, 0.25]], dtype=F64)
    with pytest.raises(SingularError, match=r"item 1") as error:
        implicit_vjp(fun, y, theta, torch.ones(3, 2, dtype=F64), batched=True)
    close(error.value.value[[0, 2]], [[-0.5, 0.5, 0.5], [-0.125, 0.25, 0.25]], 1e-10)


# -- what the user's tensors may be ----------------------------------------------------------------------
def test_modules_by_functional_call() -> None:
    """θ may be the parameters of a module; nothing of the module is touched."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 4, dtype=F64)
    theta, x = dict(module.named_parameters()), torch.randn(3, dtype=F64)

    def fun(y: Any, theta: Any) -> Any:
        return y - torch.tanh(torch.func.functional_call(module, theta, (x,)))

    y = torch.tanh(module(x)).detach()
    v = torch.randn(4, dtype=F64)
    with torch.no_grad():
        got = implicit_vjp(Root(fun), y, theta, v)
    bias = v * (1 - y**2)
    close(got["bias"], bias, 1e-12)
    close(got["weight"], torch.outer(bias, x), 1e-12)
    assert all(w.grad is None and w.requires_grad for w in module.parameters())


def test_tensors_that_are_strided_expanded_or_require_gradients() -> None:
    """Any layout of numbers, and flags, gradients and numbers are afterwards as they were."""
    p = build("exponential_root")
    wide = torch.stack([p.theta, p.theta], dim=1)
    theta = wide[:, 0].requires_grad_()
    assert not theta.is_contiguous()
    theta.grad = torch.ones_like(theta)
    y = p.y.clone().requires_grad_()
    before = theta.detach().clone()
    with torch.no_grad():
        close(implicit_vjp(p.condition("fun"), y, theta, p.cotangent), p.truth.vjp, 1e-10)
    assert theta.requires_grad
    assert y.requires_grad
    assert y.grad is None
    assert torch.equal(theta.grad, torch.ones_like(theta))
    assert torch.equal(theta, before)
    one = torch.ones(1, dtype=F64).expand(3)  # stride 0
    got = implicit_vjp(Root(lambda y, t: y - t**2), one, one, one)
    close(got, 2 * np.ones(3), 1e-12)


@pytest.mark.parametrize("solver", ["cg", "minres", "gmres"])
def test_a_callback_may_work_in_place(solver: str) -> None:
    """What a product gets is its own."""
    p = build("minimum")

    def hvp(y: Any, theta: Any, v: Any) -> Any:
        out = p.functions["hvp"](y, theta, v)
        v.mul_(0)
        return out

    got = implicit_vjp(p.condition("grad", "mixed_vjp", hvp=hvp), p.y, p.theta, p.cotangent, solver=solver)
    close(got, p.truth.vjp, 1e-8)


def test_a_function_may_return_a_buffer_of_its_own() -> None:
    """The next call of it overwrites the value, and must not take the recorded graph along."""
    p = build("exponential_root")
    held = torch.zeros(5, dtype=F64)

    def fun(y: Any, theta: Any) -> Any:
        held[...] = p.functions["fun"](y, theta)
        return held

    for solver in ("lu", "gmres"):
        close(implicit_vjp(Root(fun), p.y, p.theta, p.cotangent, solver=solver), p.truth.vjp, 1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("given", ["fun", "all"])
def test_no_grad_and_inference_mode(mode: Any, given: str) -> None:
    """Both are left for the derivatives of ours; tensors made in inference mode are recorded all the same."""
    p = build("exponential_root")
    condition = p.condition(*(p.functions if given == "all" else ("fun",)))
    with mode():
        y, theta, v = p.y * 1, p.theta * 1, p.cotangent * 1
        close(implicit_vjp(condition, y, theta, v), p.truth.vjp, 1e-10)
        data = torch.ones(5, dtype=F64) * 1
        got = implicit_vjp(Root(lambda y, t, d: p.functions["fun"](y, t) * d), y, theta, v, args=(data,))
        close(got, p.truth.vjp, 1e-10)
    close(implicit_vjp(condition, y, theta, v), p.truth.vjp, 1e-10)


def test_callbacks_may_use_autograd() -> None:
    """A gradient written with torch.autograd works, under no_grad too."""
    p = build("minimum")

    def grad(y: Any, theta: Any) -> Any:
        y = y.requires_grad_() if not y.requires_grad else y
        return torch.autograd.grad(p.functions["fun"](y, theta), y, create_graph=True)[0]

    with torch.no_grad():
        close(implicit_vjp(Stationary(grad=grad), p.y, p.theta, p.cotangent), p.truth.vjp, 1e-10)


@pytest.mark.parametrize("error", [UserWarning("a first warning"), ValueError("not tracked, please")])
def test_an_error_at_the_first_call_is_told(error: Exception) -> None:
    """It is not taken for a function that Torch cannot record, although a second call would succeed."""
    calls: list[int] = []

    def once(y: Any, theta: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return y - theta

    one = torch.ones(2, dtype=F64)
    with pytest.raises(type(error), match=str(error)):
        implicit_vjp(Root(once), one, one, one)
    copied, report = implicit_vjp(Root(lambda y, t: copy.deepcopy(y) - t), one, one, one, return_report=True)
    close(copied, np.ones(2), 1e-6)
    assert report.derivatives["A"] == "finite differences"


def test_captured_tensors_that_require_gradients_do_not_enter() -> None:
    """A product that captures a parameter gives no graph that grows with the iterations: one refusal stands for it."""
    p = build("minimum")
    scale = torch.ones((), dtype=F64, requires_grad=True)
    condition = p.condition("grad", "mixed_vjp", hvp=lambda y, t, v: scale * p.functions["hvp"](y, t, v))
    for solver in ("cg", "cholesky"):
        got, report = implicit_vjp(condition, p.y, p.theta, p.cotangent, solver=solver, return_report=True)
        close(got, p.truth.vjp, 1e-8)
        assert [node.name() for node, _ in got.grad_fn.next_functions if node is not None] == ["RefusedBackward"]
        assert not report.solution.requires_grad


def test_shapes_containers_and_floats() -> None:
    """n-d tensors in containers, and Python floats among the parameters."""
    y = {"a": torch.full((2, 2), 3.0, dtype=F64), "b": torch.tensor(2.0, dtype=F64)}
    theta = (torch.full((2, 2), 3.0, dtype=F64), 4.0)

    def fun(y: Any, theta: Any) -> Any:
        return {"a": y["a"] - theta[0], "b": y["b"] ** 2 - theta[1]}

    by_tensor, by_float = implicit_vjp(
        Root(fun), y, theta, {"a": torch.eye(2, dtype=F64), "b": torch.ones((), dtype=F64)}
    )
    close(by_tensor, np.eye(2), 1e-12)
    close(by_float, 0.25, 1e-12)
    jacobian = implicit_jacobian(Root(fun), y, theta)
    assert tuple(jacobian["a"][0].shape) == (2, 2, 2, 2)
    empty = torch.zeros(0, dtype=F64)
    close(implicit_vjp(Root(lambda y, t: y * t.sum()), empty, torch.ones(2, dtype=F64), empty), np.zeros(2), 0.0)


# -- errors ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex128, torch.int64, torch.bool])
@pytest.mark.parametrize("where", ["y", "theta"])
def test_dtypes_that_are_not_supported(dtype: Any, where: str) -> None:
    arrays = {"y": torch.ones(2, dtype=F64), "theta": torch.ones(2, dtype=F64)}
    arrays[where] = arrays[where].to(dtype)
    with pytest.raises(DTypeError, match=f"{where} has dtype"):
        implicit_vjp(Root(lambda y, t: y - t), arrays["y"], arrays["theta"], torch.ones(2, dtype=F64))


def test_devices_and_frameworks_and_layouts() -> None:
    """Mixed ones are told, both by name."""
    one, meta = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64, device="meta")
    root = Root(lambda y, t: y - t)
    with pytest.raises(BackendError, match=r"y lies on cpu, theta on meta"):
        implicit_vjp(root, one, meta, one)
    with pytest.raises(BackendError, match=r"several devices: cpu, meta"):
        implicit_vjp(root, one, {"a": one, "b": meta}, one)
    with pytest.raises(BackendError, match=r"cotangent lies on meta"):
        implicit_vjp(root, one, one, meta)
    with pytest.raises(BackendError, match=r"y is a torch array, theta a numpy array"):
        implicit_vjp(root, one, np.ones(2), one)
    with pytest.raises(BackendError, match="sparse tensor"):
        implicit_vjp(root, one.to_sparse(), one, one)
    with pytest.raises(CallbackError, match=r"numpy"):
        implicit_vjp(Root(lambda y, t: np.zeros(2)), one, one, one)


def test_args_that_require_gradients() -> None:
    """Data is not differentiated: never a derivative of zero in silence."""
    one = torch.ones(2, dtype=F64)
    data = torch.ones(2, dtype=F64, requires_grad=True)
    root = Root(lambda y, t, d: y - t * d)
    with pytest.raises(InputError, match=r"args\[0\] requires a gradient"):
        implicit_jvp(root, one, one, one, args=(data,))
    with torch.no_grad():
        close(implicit_jvp(root, one, one, one, args=(data,)), np.ones(2), 1e-12)


def test_singular_systems_are_told_without_a_warning_of_torch() -> None:
    one = torch.ones(2, dtype=F64)
    for solver in ("lu", "auto"):
        with pytest.raises(SingularError):
            linear_solve(
                torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64), solver=solver
            )
    with pytest.raises(SingularError):
        implicit_vjp(Root(lambda y, t: 0 * y + t), one, 0 * one, one)


# -- threads, loops --------------------------------------------------------------------------------------
def test_eight_threads() -> None:
    """Shared and separate linearisations, vmapped conditions: all right."""
    p, many = build("exponential_root"), build("minimum", items=(4,))
    shared, wrong = linearize(p.condition("fun"), p.y, p.theta, solver="gmres"), []

    def work() -> None:
        try:
            for _ in range(4):
                close(shared.vjp(p.cotangent), p.truth.vjp, 1e-8)
                close(implicit_jacobian(p.condition("fun"), p.y, p.theta), p.truth.jacobian, 1e-8)
                got = implicit_vjp(many.condition("fun"), many.y, many.theta, many.cotangent, batched=True)
                close(got, many.truth.vjp, 1e-8)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_while_loop_respects_the_limit() -> None:
    """No more bodies run than the limit says, and none after the condition has become false on the CPU."""
    loop = get_backend("torch").while_loop
    assert loop(lambda i: i < 100, lambda i: i + 1, 0, limit=7) == 7
    assert loop(lambda i: torch.tensor(i < 5), lambda i: i + 1, 0, limit=7) == 5
    assert loop(lambda i: i < 5, lambda i: i + 1, 0) == 5
