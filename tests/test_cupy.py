"""CuPy: on a GPU where there is one, and on a stand-in made of NumPy wherever the tests run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import standin_cupy
from problems import PROBLEMS, RIGHT_FOR, SOLVERS_FOR, STRUCTURES, TIGHT, Problem, close, matrix, vector

import implicitdiff as idf
from implicitdiff import registry

PAIRS = [(name, solver) for name in PROBLEMS for solver in SOLVERS_FOR[STRUCTURES[name]]]
LOADED = ("cupy", "cupyx", "array_api_compat.cupy", "implicitdiff.backends.cupy")


def _forget(patch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n in LOADED or n.startswith(tuple(f"{x}." for x in LOADED))]:
        patch.delitem(sys.modules, name)
    patch.setattr(registry, "_cache", {k: v for k, v in registry._cache.items() if k != "cupy"})


@pytest.fixture(params=["standin", pytest.param("device", marks=pytest.mark.gpu)])
def cp(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or what stands in for it."""
    if request.param == "device":
        if find_spec("cupy") is None:
            pytest.skip("needs cupy")
        import cupy

        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            pytest.skip("needs a CUDA device")
        yield cupy
        return
    with pytest.MonkeyPatch.context() as patch:
        _forget(patch)
        for name, module in standin_cupy.modules().items():
            patch.setitem(sys.modules, name, module)
        import array_api_compat

        patch.delattr(array_api_compat, "cupy", raising=False)
        yield sys.modules["cupy"]
        _forget(patch)


def on_host(x: Any) -> np.ndarray:
    """Return the numbers of a CuPy array."""
    return x.get() if hasattr(x, "get") else np.array(x)


def right(cp: Any, got: Any, expected: np.ndarray, rtol: float = 1e-9) -> None:
    assert isinstance(got, cp.ndarray)
    close(on_host(got), expected, rtol)


def made(cp: Any, name: str, items: tuple[int, ...] = (), dtype: Any = np.float64) -> Problem:
    return PROBLEMS[name](cp, dtype, items)


GIVEN = {"general": ("fun", "jvp", "vjp"), "symmetric": ("grad", "hvp")}


def given(problem: Problem) -> Any:
    names = GIVEN["general" if problem.structure == "general" else "symmetric"]
    return problem.condition(*names, "mixed_jvp", "mixed_vjp")


@pytest.mark.parametrize(("name", "solver"), PAIRS)
def test_given_products(cp: Any, name: str, solver: str) -> None:
    """Every solver, forward and in reverse, on one problem."""
    p = made(cp, name)
    lin = idf.linearize(given(p), p.y, p.theta, solver=TIGHT[solver])
    right(cp, lin.vjp(p.cotangent), p.truth.vjp)
    right(cp, lin.jvp(p.tangent), p.truth.jvp)
    assert lin.report.derivatives["A"] == "given"
    assert lin.report.converged


@pytest.mark.parametrize(("name", "solver"), PAIRS)
def test_batches(cp: Any, name: str, solver: str) -> None:
    """Every solver on several problems together."""
    p = made(cp, name, (3,))
    lin = idf.linearize(given(p), p.y, p.theta, solver=TIGHT[solver], batched=True)
    right(cp, lin.vjp(p.cotangent), p.truth.vjp)
    right(cp, lin.jvp(p.tangent), p.truth.jvp)
    assert on_host(lin.report.converged).all()


@pytest.mark.parametrize("solver", ["lu", "cg", "auto"])
def test_single_precision(cp: Any, solver: str) -> None:
    p = made(cp, "ridge", dtype=np.float32)
    got = idf.implicit_vjp(given(p), p.y, p.theta, p.cotangent, solver=solver)
    assert got.dtype == np.float32
    right(cp, got, p.truth.vjp, 1e-4)


@pytest.mark.parametrize("structure", RIGHT_FOR)
def test_linear_solve(cp: Any, structure: str) -> None:
    """Matrices, one right-hand side and several."""
    a, b = matrix(structure), vector(columns=(4,))
    for solver in RIGHT_FOR[structure]:
        x = idf.linear_solve(cp.asarray(a), cp.asarray(b), solver=TIGHT[solver])
        right(cp, x, np.linalg.solve(a, b), 1e-9)


@pytest.mark.parametrize("solver", ["lu", "auto"])
def test_singular(cp: Any, solver: str) -> None:
    """A singular matrix is told; in a batch by its number, and the others are right."""
    a = np.stack([np.diag([1.0, 2.0, 3.0]), np.diag([1.0, 0.0, 3.0])])
    with pytest.raises(idf.SingularError):
        idf.linear_solve(cp.asarray(a[1]), cp.ones(3), solver=solver)
    with pytest.raises(idf.SingularError, match=r"item 1") as caught:
        idf.linear_solve(cp.asarray(a), cp.ones((2, 3)), solver=solver, batched=True)
    right(cp, caught.value.value[0], np.array([1, 1 / 2, 1 / 3]))


def test_not_positive_definite(cp: Any) -> None:
    """What cuSOLVER leaves of a failed Cholesky factorisation is not taken for one."""
    a = np.stack([matrix("pos", 6), matrix("sym", 6)])
    with pytest.raises(idf.NotPositiveDefiniteError):
        idf.linear_solve(cp.asarray(a[1]), cp.ones(6), solver="cholesky")
    with pytest.raises(idf.NotPositiveDefiniteError, match=r"item 1") as caught:
        idf.linear_solve(cp.asarray(a), cp.ones((2, 6)), solver="cholesky", batched=True)
    right(cp, caught.value.value[0], np.linalg.solve(a[0], np.ones(6)))


def test_callbacks_cannot_spoil_the_iteration(cp: Any) -> None:
    """A product that works in place on its argument changes a copy."""
    a = cp.asarray(matrix("pos", 8))

    def spoiling(v: Any) -> Any:
        out = a @ v
        v *= 0
        return out

    x = idf.linear_solve(spoiling, cp.ones(8), solver="cg", positive_definite=True)
    right(cp, x, np.linalg.solve(matrix("pos", 8), np.ones(8)))


def test_other_framework(cp: Any) -> None:
    with pytest.raises(idf.BackendError, match="numpy"):
        idf.implicit_vjp(lambda y, t: ((y - t) ** 2).sum(), cp.ones(2), np.ones(2), cp.ones(2))


# -- on the stand-in alone -------------------------------------------------------------------------------
@pytest.fixture
def standin(cp: Any) -> Any:
    if not hasattr(cp, "fft") or cp.ndarray is not standin_cupy.ndarray:
        pytest.skip("counts what a device would not tell")
    return cp


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_loop_seldom_waits(standin: Any, solver: str) -> None:
    """The numbers of an iteration stay on the device, and its condition is looked at every ten bodies."""
    a, counts = standin.asarray(matrix("pos", 300)), []
    for rtol in (1e-4, 1e-12):
        options = {"solver": type(TIGHT[solver])(rtol=rtol), "symmetric": True, "return_report": True}
        standin_cupy.waits.clear()
        _, report = idf.linear_solve(lambda v: a @ v, standin.ones(300), **options)
        counts.append((report.iterations, len(standin_cupy.waits)))
    (few, seldom), (many, often) = counts
    assert many > few + 20
    assert often - seldom <= (many - few) / 10 + 2


def test_devices(standin: Any) -> None:
    """Arrays of two devices are told apart, and so are those of another than the current device."""
    here, there = standin.ones(2), standin.ones(2)
    there.place = 1
    quadratic = idf.Stationary(grad=lambda y, t: y - t)
    with pytest.raises(idf.BackendError, match=r"(?s)Device 0.*Device 1|Device 1.*Device 0"):
        idf.implicit_vjp(quadratic, here, there, standin.ones(2))
    with pytest.raises(idf.BackendError, match=r"(?s)Device 0.*Device 1|Device 1.*Device 0"):
        idf.implicit_vjp(quadratic, {"a": here, "b": there}, here, standin.ones(2))


# -- derivatives that are not given ------------------------------------------------------------------------
def cubic(y: Any, theta: Any) -> Any:
    return y**3 - theta


def squares(y: Any, theta: Any) -> Any:
    return ((y - theta**2) ** 2).sum()


@pytest.mark.parametrize("mode", ["auto", "torch", "finite_differences"])
def test_derived(cp: Any, mode: str) -> None:
    """Torch's autodiff where Torch is installed, and finite differences otherwise; the report says so."""
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    from implicitdiff.backends.cupy import CupyBackend

    exact = mode != "finite_differences"
    options = {"backend": CupyBackend(mode), "return_report": True}
    theta = cp.asarray(np.array([1.0, 2.0, 3.0]))
    got, report = idf.implicit_grad(squares, lambda y, t: (y**2).sum() + t.sum(), theta**2, theta, **options)
    right(cp, got, 4 * np.array([1.0, 2.0, 3.0]) ** 3 + 1, 1e-12 if exact else 1e-5)
    assert set(report.derivatives.values()) == {"autodiff" if exact else "finite differences"}
    y = cp.asarray(np.array([1.0, 2.0, 3.0]))
    lin = idf.linearize(idf.Root(cubic), y, y**3, backend=CupyBackend(mode))
    right(cp, lin.jvp(cp.ones(3)), 1 / (3 * np.array([1.0, 4.0, 9.0])), 1e-12 if exact else 1e-7)


def test_function_of_cupy_by_name(cp: Any) -> None:
    """A function that calls CuPy by name is derived by finite differences, unless Torch is insisted on."""
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    from implicitdiff.backends.cupy import CupyBackend

    fun = idf.Root(lambda y, t: cp.exp(y) - t)
    y = cp.asarray(np.array([0.5, 1.0]))
    at = (y, cp.exp(y), cp.ones(2))
    got, report = idf.implicit_vjp(fun, *at, backend=CupyBackend(), return_report=True)
    right(cp, got, np.exp([-0.5, -1.0]), 1e-7)
    assert report.derivatives["A"] == "finite differences"
    with pytest.raises(idf.DerivativeError, match="fun cannot be derived by torch"):
        idf.implicit_vjp(fun, *at, backend=CupyBackend("torch"))
    with pytest.raises(idf.UnknownNameError, match="finite_differences"):
        CupyBackend("numbers")
