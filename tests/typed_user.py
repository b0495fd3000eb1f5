"""What a user writes, as a strict type checker sees it: `tests/test_typing.py` runs mypy on it."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from implicitdiff import (
    CG,
    Linearization,
    Report,
    Root,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
    linearize,
)

Floats = NDArray[np.float64]


def cubic(y: Floats, theta: Floats) -> Floats:
    return y**3 - theta


def loss(y: Floats, theta: dict[str, Floats]) -> Any:
    return (y - theta["a"]).sum()


y: Floats = np.ones(2)
theta: Floats = np.ones(2)
pair = {"a": theta}
root = Root(cubic)

# like theta, like y, and the report where it is asked for
assert_type(implicit_vjp(root, y, pair, y), dict[str, Floats])
assert_type(implicit_vjp(root, y, theta, y, return_report=True), tuple[Floats, Report])
assert_type(implicit_jvp(root, {"y": y}, theta, theta, solver="cg", batched=True), dict[str, Floats])
assert_type(implicit_jvp(root, y, theta, theta, return_report=False), Floats)
assert_type(implicit_grad(Stationary(loss), loss, y, pair, args=(1, "two"), x0=y), dict[str, Floats])
assert_type(implicit_grad(loss, y, y, 2.0, return_report=True, solver=CG(rtol=1e-8)), tuple[float, Report])
assert_type(implicit_jacobian(root, y, theta, return_report=True), tuple[Any, Report])
assert_type(linear_solve(np.eye(2), y, on_failure="warn"), Floats)
assert_type(linear_solve(np.eye(2), y, return_report=True, symmetric=True, solver="mine"), tuple[Floats, Report])

lin = linearize(root, y, pair, solver="lu")
assert_type(lin, Linearization[Floats, dict[str, Floats]])
assert_type(lin.vjp(y), dict[str, Floats])
assert_type(lin.jvp(pair), Floats)
assert_type(lin.report, Report | None)


# a wrapped solver keeps its signature
@implicit_function(root, solver="gmres", on_failure="nan")
def solve(theta: Floats, steps: int = 10, *, tol: float = 1e-8) -> Floats:
    return np.cbrt(theta)


@implicit_function(root, has_aux=True)
def with_aux(theta: Floats) -> tuple[Floats, int]:
    return np.cbrt(theta), 3


@implicit_function(root, has_aux=lambda y, theta: "aux")
def with_function(theta: Floats) -> Floats:
    return np.cbrt(theta)


assert_type(solve(theta, 20, tol=1e-3), Floats)
assert_type(solve.vjp(theta, y), Floats)
assert_type(solve.jvp(theta, theta), Floats)
assert_type(solve.linearize(theta, steps=5).y, Floats)
assert_type(with_aux(theta), tuple[Floats, int])
assert_type(with_aux.jvp(theta, theta), Floats)
assert_type(with_function(theta), tuple[Floats, str])

# what is refused: under --strict an ignore that is not needed is an error
implicit_vjp(root, y, theta, y, solvr="lu")  # type: ignore[call-overload]
implicit_vjp(root, y, theta, y, on_failure="panic")  # type: ignore[call-overload]
implicit_vjp(1.0, y, theta, y)  # type: ignore[call-overload]
implicit_jacobian(root, y, theta, x0=y)  # type: ignore[call-overload]
Root(1.0)  # type: ignore[arg-type]
Stationary(loss, kind="max")  # type: ignore[arg-type]
linearize(root, y, theta, solver=CG)  # type: ignore[arg-type]
linearize(root, y, theta, batched="yes")  # type: ignore[arg-type]
solve(theta, "ten")  # type: ignore[arg-type]
solve(theta, tolerance=1e-3)  # type: ignore[call-arg]
