"""Lent autodiff: Torch and JAX derive functions that run on any framework's arrays, for NumPy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from problems import close

import implicitdiff as idf
from implicitdiff import FixedPoint, Root, Stationary
from implicitdiff.backends.numpy import NumpyBackend

ROOT = Path(__file__).resolve().parents[1]
AUTODIFF_SOURCES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}"))
    for name in ("torch", "jax")
]


@pytest.fixture(params=AUTODIFF_SOURCES)
def lent(request: pytest.FixtureRequest) -> Iterator[NumpyBackend]:
    """Return the backend with each lender in turn; JAX in double precision, as a user would have switched it on."""
    if request.param == "torch":
        yield NumpyBackend("torch")
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield NumpyBackend("jax")
    jax.config.update("jax_enable_x64", before)


# y solves W (log y − K θ) = 0, written three ways: y = exp(K θ), dy/dθ = diag(y) K
rng = np.random.default_rng(7)
W = 2 * np.eye(4) + rng.normal(size=(4, 4)) / 2
K = rng.normal(size=(4, 3))
THETA = rng.uniform(0.3, 0.9, 3)
Y = np.exp(K @ THETA)
COTANGENT, TANGENT = rng.normal(size=4), rng.normal(size=3)


def root(y: Any, theta: Any, w: Any, k: Any) -> Any:
    return w @ (array_namespace(y).log(y) - k @ theta)


def objective(y: Any, theta: Any, w: Any, k: Any) -> Any:
    xp = array_namespace(y)
    return xp.sum((w @ (xp.log(y) - k @ theta)) ** 2) / 2


def fixed(y: Any, theta: Any, w: Any, k: Any) -> Any:
    return y - root(y, theta, w, k) / 3


def outer(y: Any, theta: Any) -> Any:
    xp = array_namespace(y)
    return xp.sum(y**3) / 3 + xp.sum(theta**2) / 2


@pytest.mark.slow(on=("jax",))
@pytest.mark.parametrize(
    "condition", [Root(root), Stationary(objective), FixedPoint(fixed)], ids=lambda c: type(c).__name__
)
def test_exact(lent: NumpyBackend, condition: Any) -> None:
    """All products, to rounding; the report says where they come from, and the arrays are NumPy's own."""
    lin = idf.linearize(condition, Y, THETA, args=(W, K), backend=lent)
    for got, expected in (
        (lin.vjp(COTANGENT), K.T @ (Y * COTANGENT)), (lin.jvp(TANGENT), Y * (K @ TANGENT)),
        (lin.jacobian(), Y[:, None] * K), (lin.gradient(outer), THETA + K.T @ Y**3),
    ):  # fmt: skip
        assert type(got) is np.ndarray
        assert got.dtype == np.float64
        assert got.flags.writeable
        close(got, expected, 1e-11)
    assert lin.report.derivatives == {"A": "autodiff", "B": "autodiff", "outer": "autodiff"}


def test_gradient_given(lent: NumpyBackend) -> None:
    """Products that are given stay the user's; what is missing is lent."""
    given = Stationary(
        grad=lambda y, t, w, k: (w.T @ (w @ (array_namespace(y).log(y) - k @ t))) / y,
        hvp=lambda y, t, v, w, k: np.asarray(w.T @ (w @ (v / y))) / y,  # of NumPy by name: it is never handed over
    )
    got, report = idf.implicit_vjp(given, Y, THETA, COTANGENT, args=(W, K), backend=lent, return_report=True)
    close(got, K.T @ (Y * COTANGENT), 1e-11)
    assert report.derivatives == {"A": "given", "B": "autodiff"}


def layouts() -> dict[str, Any]:
    """The same matrix W, laid out in every way that a hand-over may stumble on."""
    frozen = W.copy()
    frozen.flags.writeable = False
    padded = np.zeros((8, 9))
    padded[::2, 1:5] = W
    return {
        "read-only": frozen, "transposed": W.T.copy().T, "strided": padded[::2, 1:5], "reversed": W[::-1].copy()[::-1],
        "reversed columns": W[:, ::-1].copy()[:, ::-1],
    }  # fmt: skip


@pytest.mark.parametrize("layout", layouts())
def test_layouts(lent: NumpyBackend, layout: str) -> None:
    """Data in any layout is handed over, and is what it was afterwards; y and theta likewise."""
    w = layouts()[layout]
    y = Y[::-1].copy()[::-1] if "reversed" in layout else Y.copy()
    y.flags.writeable = layout != "read-only"
    got = idf.implicit_vjp(Root(root), y, THETA, COTANGENT, args=(w, K), backend=lent)
    close(got, K.T @ (Y * COTANGENT), 1e-11)
    assert np.array_equal(w, W)


def test_trees_and_numbers(lent: NumpyBackend) -> None:
    """Trees, Python floats and NumPy scalars: in theta, and in the data."""

    def fun(y: Any, theta: Any, scale: Any) -> Any:
        return {"a": y["a"] ** 3 - scale * theta[0], "b": y["b"] - theta[1] * theta[0][0]}

    theta = (np.array([8.0, 27.0]), 2.0)
    y = {"a": np.cbrt(2 * theta[0]), "b": np.float64(16.0)}
    got = idf.implicit_vjp(
        Root(fun), y, theta, {"a": np.ones(2), "b": np.float64(1.0)}, args=(np.float64(2.0),), backend=lent
    )
    close(got[0], 2 / (3 * y["a"] ** 2) + np.array([2.0, 0.0]))
    assert isinstance(got[1], float)
    assert got[1] == pytest.approx(8.0)


def test_batches(lent: NumpyBackend) -> None:
    """With batched=True the functions take the leading axis themselves, as NumPy's do."""
    theta = np.array([[1.0, 8.0], [27.0, 64.0], [8.0, 1.0]])
    y = np.cbrt(theta)
    mix = np.array([[2.0, 1.0], [-1.0, 3.0]])

    def fun(y: Any, theta: Any, mix: Any) -> Any:
        return (y**3 - theta) @ mix

    lin = idf.linearize(Root(fun), y, theta, args=(mix,), batched=True, backend=lent)
    close(lin.jvp(np.ones_like(theta)), 1 / (3 * y**2))
    close(lin.vjp(np.ones_like(theta)), 1 / (3 * y**2))
    total = lin.gradient(lambda y, theta: array_namespace(y).sum(y**2 + theta, axis=-1))
    close(total, 2 / (3 * y) + 1)
    assert lin.report.derivatives["A"] == "autodiff"


def test_single_precision(lent: NumpyBackend) -> None:
    """The dtype stays single."""
    args = [x.astype(np.float32) for x in (Y, THETA, COTANGENT)]
    got = idf.implicit_vjp(Root(root), *args, args=(W.astype(np.float32), K.astype(np.float32)), backend=lent)
    assert got.dtype == np.float32
    close(got, K.T @ (Y * COTANGENT), 1e-4)


def by_name(y: Any, theta: Any) -> Any:
    return np.exp(y) - theta


def closed_over(y: Any, theta: Any) -> Any:
    return W @ np.asarray(y) - theta


def deviation(y: Any, theta: Any) -> Any:
    return y * y.std() - theta  # Torch divides by n − 1


@pytest.mark.parametrize("fun", [by_name, closed_over])
def test_function_that_cannot_be_lent(lent: NumpyBackend, fun: Any) -> None:
    """A function that calls NumPy by name is told, with the lender's own words."""
    y = np.array([0.5, 1.0, 1.5, 2.0])
    with pytest.raises(idf.DerivativeError, match=rf"(?s)fun cannot be derived by {lent.autodiff}.*array_namespace"):
        idf.implicit_vjp(Root(fun), y, fun(y, 0.0), np.ones(4), backend=lent)


def test_same_name_other_meaning() -> None:
    """A method of the same name that does something else is found out before it can make a wrong derivative."""
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    y = np.array([0.5, 1.0, 1.5, 2.0])
    with pytest.raises(idf.DerivativeError, match="gives other numbers"):
        idf.implicit_vjp(Root(deviation), y, deviation(y, 0.0), np.ones(4), backend=NumpyBackend("torch"))


def test_detached() -> None:
    """A function that leaves Torch's recording on the way is told."""
    torch = pytest.importorskip("torch")

    def fun(y: Any, theta: Any) -> Any:
        z = y.detach() if isinstance(y, torch.Tensor) else y
        return z**3 - theta

    with pytest.raises(idf.DerivativeError, match="leaves torch"):
        idf.implicit_vjp(Root(fun), np.array([2.0]), np.array([8.0]), np.ones(1), backend=NumpyBackend("torch"))


def test_error_of_the_users(lent: NumpyBackend) -> None:
    """An error that NumPy would meet as well comes as it is."""
    with pytest.raises(idf.CallbackError, match="shape"):
        idf.implicit_vjp(Root(lambda y, t: (y - t)[:1]), np.ones(2), np.ones(2), np.ones(2), backend=lent)
    with pytest.raises(ZeroDivisionError):
        idf.implicit_vjp(Root(lambda y, t: y - t * (1 // 0)), np.ones(2), np.ones(2), np.ones(2), backend=lent)


@pytest.mark.slow
def test_jax_in_single_precision_is_refused() -> None:
    """Double precision would be lost without a word; nobody's flag is touched."""
    if find_spec("jax") is None:
        pytest.skip("needs jax")
    code = (
        "import jax, numpy as np, implicitdiff as idf\n"
        "from implicitdiff.backends.numpy import NumpyBackend\n"
        "root = idf.Root(lambda y, t: y**3 - t)\n"
        "at = lambda d: [np.array([x], dtype=d) for x in (2.0, 8.0, 1.0)]\n"
        "assert abs(idf.implicit_vjp(root, *at('float32'), backend=NumpyBackend('jax'))[0] - 1 / 12) < 1e-5\n"
        "try:\n"
        "    idf.implicit_vjp(root, *at('float64'), backend=NumpyBackend('jax'))\n"
        "except idf.DTypeError as error:\n"
        "    print(error)\n"
        "assert not jax.config.read('jax_enable_x64')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "float64 would become float32" in done.stdout
    assert "jax_enable_x64" in done.stdout


def test_lender_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from implicitdiff import registry

    monkeypatch.setitem(registry.BACKENDS, "torch", "no_such_framework:Backend")
    monkeypatch.setattr(registry, "_cache", {})
    with pytest.raises(idf.BackendError, match="no_such_framework"):
        idf.implicit_vjp(Root(root), Y, THETA, COTANGENT, args=(W, K), backend=NumpyBackend("torch"))
