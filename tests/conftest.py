"""What the tests share: the array libraries, the names of the solvers, and what a call came to."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import array_api_strict
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
from selection import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

from implicitdiff import (
    CG,
    MINRES,
    FixedPoint,
    ImplicitDiffWarning,
    Root,
    Stationary,
    implicit_grad,
    implicit_jvp,
    implicit_vjp,
    linear_solve,
)
from implicitdiff import solvers as registry
from implicitdiff.solvers import suitable

SOLVERS = ("lu", "cholesky", "cg", "minres", "gmres", "auto")
DIRECT = tuple(name for name in suitable("positive definite", direct=True) if name in SOLVERS)
ITERATIVE = tuple(suitable("positive definite", direct=False))
GENERAL = (*suitable(), "auto")
SYMMETRIC_ONLY = tuple(name for name in SOLVERS if name not in GENERAL)
SHORT = {"cg": CG(maxiter=100), "minres": MINRES(maxiter=100)}
"""For solves that are meant to fail: the same methods, without their 1 000 iterations."""


@dataclass(frozen=True)
class Library:
    """An array library under test: its namespace, and the way from NumPy and back."""

    name: str
    xp: ModuleType
    readonly: bool = False
    per_item: bool = False
    """Whether the functions given for a batch are those of one item, and mapped over."""

    def array(self, values: Any, dtype: str | None = None, device: Any = None) -> Any:
        """Array of the library from numbers or a NumPy array; dtype defaults to that of a NumPy array, else float64."""
        found = np.array(values, dtype=dtype or getattr(values, "dtype", np.float64))
        if self.xp is np:
            found.flags.writeable = not self.readonly
            return found
        return self.xp.asarray(found, device=device)

    def numpy(self, x: Any) -> np.ndarray:
        """Return a NumPy array (a copy) of the same numbers."""
        if self.xp is np:
            return np.array(x)
        return np.array(np.from_dlpack(x.to_device(self.xp.Device("CPU_DEVICE"))))

    def owns(self, x: Any) -> bool:
        """Whether it is an array of this library."""
        return isinstance(x, (np.ndarray, np.generic) if self.xp is np else type(self.xp.asarray(0.0)))


class Framework(Library):
    """A framework with autodiff and vmap, whose arrays NumPy can read."""

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x.detach().numpy() if self.name == "torch" and self.owns(x) else np.asarray(x))

    def owns(self, x: Any) -> bool:
        return isinstance(x, type(self.xp.asarray(0.0)))


class Hashed(tuple[Any, ...]):
    """A tuple that looks for an item by its hash."""

    def __init__(self, items: Any) -> None:
        self.found = frozenset(items)

    def __contains__(self, item: object) -> bool:
        return item in self.found


class Registered:
    """What a page of the documentation registers is gone after it, as are the names that it is made of."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        before = dict(registry._FACTORIES)
        result = yield
        if not isinstance(item, pytest.DoctestItem):
            return result
        registry._FACTORIES.clear()
        registry._FACTORIES.update(before)
        return result


def pytest_configure(config: pytest.Config) -> None:
    """A hook of this file alone would not see the documentation."""
    config.pluginmanager.register(Registered())


def look_up_dtypes() -> None:
    """Let array_api_strict find a dtype among those allowed by its hash, in place of a comparison with each.

    It looks at every operation, and spends two fifths of its time there.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("array_api_strict.")]
    tables = [*map(vars, modules), *(found for m in modules if (found := getattr(m, "_dtype_categories", None)))]
    for table in tables:
        for name, value in list(table.items()):
            if isinstance(value, tuple) and value and all(type(v) is type(array_api_strict.int8) for v in value):
                table[name] = Hashed(value)


look_up_dtypes()


def _torch() -> tuple[Library, ...]:
    if not importlib.util.find_spec("torch"):
        return ()
    import array_api_compat.torch

    return (Framework("torch", array_api_compat.torch, per_item=True),)


UNFINISHED = "Error reading persistent compilation cache"
"""JAX reads what another process has not written to its end, and compiles it anew."""


def compile_fast() -> None:
    """Let JAX compile in a third of the time: that takes most of the tests' time, and running next to none."""
    flags = "--xla_backend_optimization_level=0"
    installed = version("jaxlib") if importlib.util.find_spec("jaxlib") else ""
    if installed.startswith(("0.9.", "0.10.")):  # XLA ends the process at a flag that it does not know
        flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", flags)
    # what one process has compiled, others read: workers, and programs that tests start
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _jax() -> tuple[Library, ...]:
    if not importlib.util.find_spec("jax"):
        return ()
    compile_fast()
    import jax

    jax.config.update("jax_enable_x64", True)
    return (Framework("jax", jax.numpy, per_item=True),)


NUMPY, STRICT = Library("numpy", np), Library("array_api_strict", array_api_strict)
READONLY = Library("numpy-readonly", np, readonly=True)
TORCH, JAX = _torch(), _jax()
"""Empty where the framework is not installed."""
PLAIN = (NUMPY, STRICT, *TORCH)
LIBRARIES = (NUMPY, STRICT, READONLY, *TORCH)


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from the thirty thousand cases: tests and benchmarks that call it wait for it."""
    gc.collect()
    if version("hypothesis").split(".")[:2] != ["6", "100"]:  # which then finds its own draws unreliable
        gc.freeze()


@pytest.fixture(params=LIBRARIES, ids=lambda lib: lib.name)
def lib(request: pytest.FixtureRequest) -> Library:
    """Each array library in turn."""
    return request.param


@pytest.fixture
def xp(lib: Library) -> ModuleType:
    """Array namespace of ``lib``."""
    return lib.xp


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> str:
    """Each solver by name."""
    return request.param


@dataclass(frozen=True)
class Outcome:
    """What a call came to: its value, or its error, and the warnings on the way."""

    value: Any = None
    error: Exception | None = None
    warnings: list[Warning] = field(default_factory=list)

    @property
    def quiet(self) -> bool:
        """Whether the call returned without an error or a warning."""
        return self.error is None and not self.warnings

    def but(self, *kinds: type[Warning]) -> Outcome:
        """Return it without warnings of these types."""
        return Outcome(self.value, self.error, [w for w in self.warnings if not isinstance(w, kinds)])

    @property
    def told(self) -> list[Exception]:
        """The error and the warnings."""
        return [e for e in (self.error, *self.warnings) if e is not None]

    @property
    def text(self) -> str:
        """Messages of the error and the warnings."""
        return "\n".join(f"{type(e).__name__}: {e}" for e in self.told)


def outcome(call: Callable[[], Any]) -> Outcome:
    """Run a call and record what it came to; only `Exception` is caught, so that Ctrl-C stays Ctrl-C."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", UNFINISHED)
        try:
            value, error = call(), None
        except Exception as exception:
            value, error = None, exception
    return Outcome(value, error, [w.message for w in caught if isinstance(w.message, Warning)])


def relative_error(lib: Library, got: Any, expected: Any) -> float:
    """‖got − expected‖ / ‖expected‖, both scaled first so that 1e-200 and 1e200 are measured alike."""
    got, expected = lib.numpy(got).astype(np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    size = np.linalg.norm(expected / scale) or 1.0
    return float(np.linalg.norm((got - expected) / scale) / size)


def assert_right(lib: Library, found: Outcome, expected: Any, rtol: float) -> None:
    """No error, no warning, an array of the library, and the right numbers."""
    assert found.quiet, f"false alarm: {found.text}"
    assert lib.owns(found.value), f"returned {type(found.value)}"
    error = relative_error(lib, found.value, expected)
    assert error <= rtol, f"silently wrong: relative error {error:.3g} > {rtol:.3g}"


def assert_told(found: Outcome, kinds: type[Exception] | Sequence[type[Exception]], pattern: str) -> None:
    """Check for an error or warning of one of these types whose message matches, and nothing foreign beside it."""
    kinds = (kinds,) if isinstance(kinds, type) else tuple(kinds)
    assert found.told, f"silent; returned {found.value!r}"
    foreign = [e for e in found.warnings if not isinstance(e, ImplicitDiffWarning)]
    assert not foreign, f"foreign warnings: {foreign!r}"
    right = [e for e in found.told if isinstance(e, kinds) and re.search(pattern, str(e), re.IGNORECASE)]
    assert right, f"expected {[k.__name__ for k in kinds]} matching {pattern!r}; told: {found.text}"
    assert all(len(str(e).splitlines()) <= 5 for e in found.told), f"longer than five lines: {found.text}"


def assert_right_or_told(
    lib: Library, found: Outcome, expected: Any, rtol: float,
    kinds: type[Exception] | Sequence[type[Exception]], pattern: str,
) -> None:  # fmt: skip
    """Right without a word, or an error that names the cause: never wrong in silence."""
    if found.quiet:
        assert_right(lib, found, expected, rtol)
    else:
        assert_told(found, kinds, pattern)


# -- one linear system A x = b through every public door -----------------------------------------------------------
#
# F(y, θ) = A y − C θ with a signed cyclic shift C: orthogonal, not symmetric, and free of rounding, so a jvp along
# Cᵀ b solves A w = b, and a vjp of b gives Cᵀ A⁻ᵀ b. A sign or a transpose in the wrong place changes the answer.

SYMMETRIC_DOORS = ("vjp:hvp", "jvp:hvp", "grad:hessian", "jvp:hessian", "vjp:sparse-hessian")
GENERAL_DOORS = (
    "solve:matrix", "solve:callable", "solve:sparse", "vjp:root", "jvp:root", "vjp:adjoint", "grad:jacobian",
    "jvp:jacobian", "vjp:sparse-jacobian", "jvp:sparse-jacobian", "vjp:fixed-point", "jvp:fixed-point",
)  # fmt: skip
DOORS = SYMMETRIC_DOORS + GENERAL_DOORS


def each_door(*doors: str, readonly: bool = False) -> pytest.MarkDecorator:
    """Parametrize over libraries and doors; SciPy's sparse matrices go with NumPy only."""
    libraries = [lib for lib in LIBRARIES if readonly or not lib.readonly]
    pairs = [(lib, door) for lib in libraries for door in doors if "sparse" not in door or lib.xp is np]
    return pytest.mark.parametrize(("lib", "door"), pairs, ids=[f"{lib.name}-{door}" for lib, door in pairs])


def shift(n: int) -> np.ndarray:
    """Signed cyclic shift, shape (n, n)."""
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    return np.roll(np.diag(signs), 1, axis=1)


def solution_at(n: int) -> np.ndarray:
    """Return a y without structure, shape (n,), of order one."""
    return np.cos(3.0 * np.arange(n)) + 0.5


def condition_of(lib: Library, form: str, A: np.ndarray, C: np.ndarray) -> Any:
    """F(y, θ) = A y − C θ as a condition with given derivatives of that form."""
    M, Mt, N, Nt = (lib.array(m) for m in (A, A.T, C, C.T))

    def fun(y: Any, t: Any) -> Any:
        return M @ y - N @ t

    sign = 1.0 if form == "fixed-point" else -1.0
    mixed = {"mixed_vjp": lambda y, t, u: sign * (Nt @ u), "mixed_jvp": lambda y, t, d: sign * (N @ d)}
    forward, adjoint = (lambda y, t, v: M @ v), (lambda y, t, u: Mt @ u)
    sparse = scipy.sparse.csr_array(A)
    if form == "fixed-point":
        return FixedPoint(lambda y, t: y - fun(y, t), jvp=lambda y, t, v: v - M @ v, vjp=lambda y, t, u: u - Mt @ u,
                          **mixed)  # fmt: skip
    return {
        "hvp": lambda: Stationary(grad=fun, hvp=forward, kind="saddle", **mixed),
        "hessian": lambda: Stationary(grad=fun, hessian=lambda y, t: M, kind="saddle", **mixed),
        "sparse-hessian": lambda: Stationary(grad=fun, hessian=lambda y, t: sparse, kind="saddle", **mixed),
        "root": lambda: Root(fun, jvp=forward, vjp=adjoint, **mixed),
        "adjoint": lambda: Root(fun, vjp=adjoint, **mixed),
        "jacobian": lambda: Root(fun, jacobian=lambda y, t: M, **mixed),
        "sparse-jacobian": lambda: Root(fun, jacobian=lambda y, t: sparse, **mixed),
    }[form]()


def through(
    lib: Library, door: str, A: np.ndarray, b: np.ndarray, solver: Any, *, dtype: str = "float64", **options: Any
) -> Outcome:
    """Solve with A (or Aᵀ) through a public door; what to expect is `expected_through`."""
    route, form = door.split(":")
    A, b = A.astype(dtype), b.astype(dtype)
    if route == "solve":
        Mt = lib.array(A.T)
        M = lib.array(A)
        given = {"matrix": M, "callable": lambda v: M @ v, "sparse": scipy.sparse.csr_array(A)}[form]
        if form == "callable":
            options["transpose"] = lambda u: Mt @ u
        return outcome(lambda: linear_solve(given, lib.array(b), solver=solver, **options))
    options.pop("symmetric", None)
    C, y = shift(len(b)).astype(dtype), solution_at(len(b)).astype(dtype)
    theta = C.T @ (A @ y)
    call = {"vjp": implicit_vjp, "jvp": implicit_jvp, "grad": implicit_grad}[route]
    arrays = [lib.array(y), lib.array(theta), lib.array(C.T @ b if route == "jvp" else b)]
    if route == "grad":
        arrays = [arrays[2], arrays[0], arrays[1]]
    condition = condition_of(lib, form, A, C)
    return outcome(lambda: call(condition, *arrays, solver=solver, **options))


def expected_through(door: str, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the truth for `through`: A⁻¹ b, or Cᵀ A⁻ᵀ b for the reverse doors."""
    if door.startswith(("vjp", "grad")):
        return shift(len(b)).T @ exact_solve(A.T, b)
    return exact_solve(A, b)


def exact_solve(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A⁻¹ b for the numbers as they are stored: LAPACK, refined with residuals in extended precision."""
    wide_A, wide_b = A.astype(np.longdouble), b.astype(np.longdouble)
    scale = np.max(np.abs(wide_b)) or np.longdouble(1)
    factor = scipy.linalg.lu_factor(A.astype(np.float64))
    x = np.zeros_like(wide_b)
    for _ in range(8):
        x = x + scipy.linalg.lu_solve(factor, ((wide_b / scale) - wide_A @ x).astype(np.float64))
    return (x * scale).astype(np.float64)


def with_condition(
    n: int, condition: float, seed: int, *, kind: str = "definite", dtype: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random matrix of that condition number ("definite", "indefinite" or "general") and a random b."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    P, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = np.geomspace(1.0, 1.0 / condition, n)
    if kind == "indefinite":
        values = values * np.where(np.arange(n) % 2, -1.0, 1.0)
    A = (Q * values) @ (P if kind == "general" else Q).T
    if kind != "general":
        A = (A + A.T) / 2
    return A.astype(dtype), rng.standard_normal(n).astype(dtype)
