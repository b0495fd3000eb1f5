"""``error``, ``max_error`` and ``polish`` where Torch and JAX differentiate, and under ``jit``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES
from helpers_certificates import OFF, THETA, A, root, solution, truth

from implicitdiff import (
    GMRES,
    ImplicitDiffError,
    InaccurateError,
    InputError,
    Root,
    Stationary,
    implicit_grad,
    implicit_vjp,
)

pytestmark = pytest.mark.filterwarnings("ignore::implicitdiff.NotASolutionWarning")


def test_backward_pass_of_torch():
    torch = pytest.importorskip("torch")
    from implicitdiff import DerivativeError, implicit_function

    lib = next(lib for lib in LIBRARIES if lib.name == "torch")
    theta = torch.tensor(THETA, requires_grad=True)

    def solver(theta: Any) -> Any:
        return lib.array(solution() + OFF)

    limited = implicit_function(root(lib), max_error=1e-3)(solver)
    with pytest.raises(InaccurateError, match="above max_error"):
        limited(theta).sum().backward()
    loose = implicit_function(root(lib), max_error=0.5)(solver)
    (found,) = torch.autograd.grad(loose(theta).sum(), theta)
    plain = implicit_vjp(root(lib), lib.array(solution() + OFF), theta.detach(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found, plain)
    polished = implicit_function(root(lib), polish=2)(solver)
    (found,) = torch.autograd.grad(polished(theta).sum(), theta)
    np.testing.assert_allclose(found.numpy(), truth()["vjp"], rtol=1e-6)
    with pytest.raises(DerivativeError, match="a second derivative"):
        torch.autograd.grad(polished(theta).sum(), theta, create_graph=True)
    g = implicit_vjp(root(lib), lib.array(solution()), theta, torch.ones(3, dtype=torch.float64), error=True)
    with pytest.raises(DerivativeError, match="a derivative of the derivative is asked for"):
        g.sum().backward()


@pytest.fixture(scope="module")
def jax_root() -> Any:
    """JAX, and the condition there."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    M = jnp.asarray(A)
    return jax, Root(lambda y, t: M @ y + y**3 / 4 - t)


def test_jax_eager_and_compiled(jax_root):
    jax, condition = jax_root
    y, theta, f = jax.numpy.asarray(solution() + OFF), jax.numpy.asarray(THETA), lambda y, t: ((y - 1) ** 2).sum() / 2
    J = truth()["jacobian"]
    exact = J.T @ (solution() - 1)
    found, report = implicit_grad(condition, f, y, theta, error=True, return_report=True)
    off = np.linalg.norm(np.asarray(found) - exact)
    assert 0.8 < report.error.absolute / off < 1.25
    assert report.error.cause == "inner solution"

    @jax.jit
    def compiled(y: Any, theta: Any) -> Any:
        g, report = implicit_grad(condition, f, y, theta, error=True, return_report=True)
        e = report.error
        return g, e.relative, e.trusted, e.contraction, e.cause, e.correction

    g, relative, trusted, contraction, cause, correction = compiled(y, theta)
    assert float(relative) == pytest.approx(report.error.relative, rel=0.2)
    assert bool(trusted)
    assert float(contraction) < 0.25
    assert int(cause) == 0
    assert np.linalg.norm(np.asarray(g - correction) - exact) < 0.1 * off
    limited = jax.jit(lambda y, t: implicit_grad(condition, f, y, t, max_error=1e-4))
    assert np.isnan(limited(y, theta)).all()
    with pytest.raises(InputError, match="polish='auto' looks at numbers"):
        jax.jit(lambda y, t: implicit_grad(condition, f, y, t, polish="auto"))(y, theta)


@pytest.mark.slow
def test_compiled_jax_looks_forward_and_reports(jax_root):
    """In both modes within one jit: NaN above the limit, and ``on_report`` sees the estimate."""
    jax, condition = jax_root
    from implicitdiff import implicit_function

    y, theta, one = jax.numpy.asarray(solution() + OFF), jax.numpy.asarray(THETA), jax.numpy.ones(3)
    loose, tight = [], []

    @jax.jit
    def derivatives(theta: Any) -> Any:
        found = []
        for limit, reports in ((0.5, loose), (1e-3, tight)):
            solve = implicit_function(condition, max_error=limit, on_report=reports.append)(lambda theta: y)
            found += [jax.jvp(solve, (theta,), (one,))[1], jax.vjp(solve, theta)[1](one)[0]]
        return found

    forward, reverse, *limited = derivatives(theta)
    jax.effects_barrier()
    assert all(np.isnan(value).all() for value in limited)
    for value, mode in ((forward, "jvp"), (reverse, "vjp")):
        off = np.linalg.norm(np.asarray(value) - truth()[mode])
        e = min((report.error for report in loose), key=lambda e: abs(e.absolute - off))
        assert 0.9 <= e.absolute / off <= 1.1
        assert e.cause == "inner solution"
        assert e.trusted is True
    assert len(loose) == len(tight) == 2
    assert all(report.error.relative > 1e-3 for report in tight)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [GMRES])
def test_compiled_jax_sees_a_loss_along_b(solver):
    """As eager estimates do (see `test_a_loss_along_B_is_estimated`)."""
    jax = pytest.importorskip("jax")
    d, b = jax.numpy.linspace(1, 5, 20), jax.numpy.linspace(1, 2, 20)
    condition = Stationary(
        grad=lambda y, t: d * y - t * b, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -(u @ b)
    )

    @jax.jit
    def estimated(y: Any) -> Any:
        options = {"solver": solver(rtol=1e-3), "error": True, "return_report": True}
        g, report = implicit_vjp(condition, y, jax.numpy.asarray(1.0), b, **options)
        return g, report.error.absolute, report.error.trusted

    g, absolute, trusted = estimated(b / d)
    assert 0.5 <= float(absolute) / abs(float(g - b @ (b / d))) <= 2
    assert bool(trusted)


@pytest.mark.slow
def test_backward_pass_of_jax(jax_root):
    jax, condition = jax_root
    from implicitdiff import DerivativeError, implicit_function

    y, theta = jax.numpy.asarray(solution() + OFF), jax.numpy.asarray(THETA)
    limited = implicit_function(condition, max_error=1e-3)(lambda theta: y)
    with pytest.raises(InaccurateError, match="above max_error"):
        jax.grad(lambda t: limited(t).sum())(theta)
    with pytest.raises(InaccurateError, match="above max_error"):
        jax.jvp(limited, (theta,), (theta,))
    assert np.isnan(jax.jit(jax.grad(lambda t: limited(t).sum()))(theta)).all()
    polished = implicit_function(condition, polish=2)(lambda theta: y)
    found = jax.grad(lambda t: polished(t).sum())(theta)
    np.testing.assert_allclose(np.asarray(found), truth()["vjp"], rtol=1e-6)
    with pytest.raises((DerivativeError, ImplicitDiffError), match="a second derivative"):
        jax.jacrev(jax.grad(lambda t: polished(t).sum()))(theta)
