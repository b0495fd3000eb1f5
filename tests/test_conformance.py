"""`implicitdiff.testing` on what is built in, and on what is broken; solvers and backends by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import array_api_strict
import numpy as np
import pytest
from conftest import JAX, TORCH

import implicitdiff as idf
from implicitdiff import failures, registry
from implicitdiff.backends.array_api import ArrayAPIBackend
from implicitdiff.backends.numpy import NumpyBackend
from implicitdiff.solvers import suitable
from implicitdiff.testing import check_backend, check_condition, check_solver

BACKENDS = ["numpy", ArrayAPIBackend(array_api_strict), *(lib.name for lib in (*TORCH, *JAX))]


@pytest.mark.parametrize("name", idf.solver_names())
def test_solvers_conform(name: str) -> None:
    check_solver(name)


def test_a_solver_of_somebody_else_conforms() -> None:
    check_solver(Inverse())


@pytest.mark.slow(on=("array_api_strict", "jax"))
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b if isinstance(b, str) else b.name)
def test_backends_conform(backend: Any) -> None:
    check_backend(backend)


Y, T = np.array([0.5, 2.0]), np.array([0.5, 2.0]) - 0.3 * np.sin([0.5, 2.0])
CONDITIONS = {
    "stationary": (lambda y, t: ((y - t**2) ** 2).sum(), T**2, T),
    "root": (idf.Root(lambda y, t: {"a": y["a"] ** 3 - t}), {"a": np.array([2.0])}, np.array([8.0])),
    "fixed point": (idf.FixedPoint(lambda y, t: 0.3 * np.sin(y) + t), Y, T),
    "kkt": (idf.KKT(lambda y, t: ((y - t) ** 2).sum(), eq=lambda y, t: y.sum() - 1.0), np.array([0.75, 0.25]),
            np.array([1.0, 0.5])),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_conform(name: str) -> None:
    check_condition(*CONDITIONS[name], rtol=1e-4)


@dataclass(frozen=True)
class Inverse(idf.Solver):
    """x = A⁻¹ b by NumPy: a solver as somebody else might write it."""

    name: ClassVar[str] = "inverse"
    direct: ClassVar[bool] = True

    def init(self, operator: Any) -> Any:
        return np.linalg.inv(operator.dense())

    def transpose(self, state: Any) -> Any:
        return np.swapaxes(state, -1, -2)

    def solve(self, state: Any, b: Any, x0: Any = None) -> Any:
        return (state @ b[..., None])[..., 0], idf.Status.CONVERGED, idf.Counts()


class Untransposed(Inverse):
    def transpose(self, state: Any) -> Any:
        return state


class Absolute(Inverse):
    """Stops on an absolute tolerance."""

    def solve(self, state: Any, b: Any, x0: Any = None) -> Any:
        return super().solve(state, np.where(np.abs(b) > 1e-12, b, 0.0))


class Unequal(Inverse):
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize(
    ("solver", "told"),
    [(Untransposed(), "transpose: "), (Absolute(), "scale: "), (Unequal(), "value: ")],
    ids=["untransposed", "absolute", "unequal"],
)
def test_a_broken_solver_is_told(solver: Any, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_solver(solver)


class Wrong(NumpyBackend):
    def lu_solve(self, factor: Any, b: Any, transposed: bool) -> Any:
        return super().lu_solve(factor, b, False)


def test_a_broken_backend_is_told() -> None:
    with pytest.raises(AssertionError, match="lu: AssertionError: lu_solve, transposed"):
        check_backend(Wrong())


def test_a_backend_without_its_methods_is_none() -> None:
    from implicitdiff.backends.base import Backend

    with pytest.raises(TypeError, match="abstract"):
        Backend()  # type: ignore[abstract]
    assert len(Backend.__abstractmethods__) <= 12


@pytest.mark.parametrize(
    ("condition", "y", "told"),
    [
        (
            idf.Root(
                lambda y, t: y**3 - t, mixed_jvp=lambda y, t, v: -v, mixed_vjp=lambda y, t, u: -2 * u, verify=False
            ),
            [2.0],
            "forward and reverse",
        ),
        (idf.Root(lambda y, t: y**3 - t), [2.2], "y is a solution"),
        (idf.Root(lambda y, t: y**3 - t, vjp=lambda y, t, v: 9 * y**2 * v), [2.0], "given products"),
    ],
    ids=["one product", "no solution", "given"],
)
def test_a_broken_condition_is_told(condition: Any, y: list[float], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_condition(condition, np.array(y), np.array([8.0]))


# -- by name -----------------------------------------------------------------------------------------------
@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes."""
    for name in ("BACKENDS", "_ROOTS", "_TAKES", "_cache"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("how", ["factory", "module"])
def test_a_registered_backend_serves_its_arrays(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ArrayAPIBackend):
        def __init__(self) -> None:
            super().__init__(array_api_strict)
            self.name = "own"

    module = types.ModuleType("own_adapter")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_adapter", module)
    idf.register_backend("own", Own if how == "factory" else "own_adapter:Own", roots=("array_api_strict",))
    theta = array_api_strict.asarray([1.0, 2.0])
    assert registry.backend_for({"theta": theta}).name == "own"
    assert registry.get_backend("own") is registry.backend_for({"theta": theta})
    for backend in ("own", None):
        g = idf.implicit_grad(lambda y, t: array_api_strict.sum((y - t * t) ** 2), theta, theta * theta, theta,
                              backend=backend)  # fmt: skip
        np.testing.assert_allclose(np.asarray(g), [2.0, 8.0], rtol=1e-6)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("numpy", "a:B"), "name = 'numpy' is taken"),
        (("", "a:B"), "expected a non-empty string"),
        (("own", "a.b"), "module = 'a.b'"),
        (("own", 3), "module = 3"),
        (("own", "a:B", ("torch",)), "roots: the arrays of 'torch' are served by"),
        (("own", "a:B", "own"), "roots = 'own'"),
        (("own", "a:B", ("own",), ("nothing",)), "takes: 'nothing' is not known"),
    ],
)
def test_a_bad_registration_is_refused(arguments: Any, told: str) -> None:
    before = dict(registry.BACKENDS)
    with pytest.raises(idf.InputError, match=told):
        idf.register_backend(*arguments)
    assert before == registry.BACKENDS


def test_every_failure_has_an_error_and_a_message() -> None:
    assert {status for status in idf.Status if not status.ok} == set(failures._TABLE)


@pytest.mark.parametrize(
    ("structure", "direct", "names"),
    [
        ("general", None, {"lu", "gmres", "bicgstab"}),
        ("symmetric", False, {"minres", "gmres", "bicgstab"}),
        ("positive definite", True, {"lu", "ldlt", "cholesky"}),
    ],
)
def test_solvers_say_what_they_need(structure: str, direct: bool | None, names: set[str]) -> None:
    found: Callable[..., list[str]] = suitable
    assert names <= set(found(structure, direct=direct))
    assert not {"auto", "cholesky" if structure != "positive definite" else "cg"} & set(found(structure, direct=direct))
