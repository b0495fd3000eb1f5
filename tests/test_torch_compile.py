"""Fault 75 on Torch: what is public is stepped over by torch.compile, and differentiated once through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import implicitdiff
from implicitdiff import (
    DerivativeError,
    Root,
    bilevel,
    check_derivatives,
    check_regularity,
    compare_solvers,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
    sequence_state,
    solve_qp,
)

torch = pytest.importorskip("torch")

F64 = torch.float64
THETA = torch.tensor([0.3, 0.8], dtype=F64)
Y = THETA**2
V = torch.ones(2, dtype=F64)
CONDITION = Root(lambda y, t: y - t**2)
SOLVE = implicit_function(CONDITION)(lambda t: t.clone() ** 2)
LIN = linearize(CONDITION, Y, THETA)

DOORS: dict[str, Callable[[], Any]] = {
    "implicit_grad": lambda: implicit_grad(CONDITION, lambda y, t: y.sum(), Y, THETA),
    "implicit_vjp": lambda: implicit_vjp(CONDITION, Y, THETA, V),
    "implicit_jvp": lambda: implicit_jvp(CONDITION, Y, THETA, V),
    "implicit_jacobian": lambda: implicit_jacobian(CONDITION, Y, THETA),
    "linearize": lambda: linearize(CONDITION, Y, THETA),
    "vjp": lambda: LIN.vjp(V),
    "jvp": lambda: LIN.jvp(V),
    "jacobian": LIN.jacobian,
    "gradient": lambda: LIN.gradient(lambda y, t: y.sum()),
    "report": lambda: LIN.report,
    "sequence_state": lambda: sequence_state(Y),
    "solve_qp": lambda: solve_qp(torch.eye(2, dtype=F64), V),
    "bilevel": lambda: bilevel(CONDITION, lambda y, t: y.sum(), Y, THETA, steps=1),
    "linear_solve": lambda: linear_solve(torch.eye(2, dtype=F64), V),
    "check_derivatives": lambda: check_derivatives(CONDITION, Y, THETA),
    "check_regularity": lambda: check_regularity(CONDITION, Y, THETA),
    "compare_solvers": lambda: compare_solvers(CONDITION, V, Y, THETA, solvers=("lu",), repeats=1, memory=False),
    "call": lambda: SOLVE(THETA),
    "call.vjp": lambda: SOLVE.vjp(THETA, V),
    "call.jvp": lambda: SOLVE.jvp(THETA, V),
    "call.jacobian": lambda: SOLVE.jacobian(THETA),
    "call.linearize": lambda: SOLVE.linearize(THETA),
}


def test_fault_75_every_function_is_among_them() -> None:
    public = {name for name in implicitdiff.__all__ if inspect.isfunction(getattr(implicitdiff, name))}
    without_tensors = {
        "register_backend",
        "register_solver",
        "solver_names",
        "multipliers_from_scipy",
        "split_multipliers",
    }
    assert public - {"implicit_function"} - without_tensors <= set(DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_fault_75_every_entry_is_stepped_over(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is asked once to step over, before anything is done with a tensor."""
    state = {"compiling": True, "steps": 0}

    def disable(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            state["compiling"], state["steps"] = False, state["steps"] + 1
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state["compiling"])
    monkeypatch.setattr(torch.compiler, "disable", disable)
    DOORS[door]()
    assert state["steps"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own, where it looks at tensors
@pytest.mark.slow
def test_fault_75_compiled() -> None:
    """No more graphs than those before and behind the call, and none anew at the next call."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend="eager")(V)
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(
        lambda y, t: implicit_grad(CONDITION, lambda y, t: (y**2).sum(), 1 * y, t, solver="gmres") + 1, backend="eager"
    )
    for scale in (1.0, 2.0, 3.0):
        theta = scale * THETA
        torch.testing.assert_close(compiled(theta**2, theta), 4 * theta**3 + 1)
    assert counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.slow
@pytest.mark.parametrize("loss", [lambda y: y.exp().sum(), lambda y: (y.reshape(-1, 1) ** 2).sum()])
def test_fault_75_second_derivative_through_the_compiler(loss: Any) -> None:
    """Its backward pass is differentiated no further: an error of ours, or of Torch's, and no term is dropped."""
    theta = THETA.clone().requires_grad_()
    compiled = torch.compile(lambda t: loss(SOLVE(t)), backend="aot_eager")
    (g,) = torch.autograd.grad(compiled(theta), theta, create_graph=True)
    torch.testing.assert_close(g.detach(), torch.func.grad(lambda t: loss(t**2))(THETA))
    with pytest.raises((DerivativeError, RuntimeError), match=r"second derivative|double backward"):
        torch.autograd.grad(g.sum(), theta)
