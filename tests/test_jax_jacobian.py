"""The dense Jacobian under the user's own jit, where the method depends on the number of right-hand sides."""

import numpy as np
import pytest
from problems import with_eigenvalues

jax = pytest.importorskip("jax")

from implicitdiff import MINRES, NotConvergedError, Root, implicit_jacobian, implicit_vjp  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [300, 3])
def test_more_right_hand_sides_may_mean_that_a_is_assembled_after_all(symmetric, m):
    n = 300  # more than what `auto` assembles for one right-hand side
    rng = np.random.default_rng(0)
    A = np.diag(rng.uniform(1.0, 2.0, n)) + 0.01 * np.diag(np.ones(n - 1), 1)
    A = 0.5 * (A + A.T) if symmetric else A
    C = rng.normal(size=(n, m))
    t = rng.normal(size=m)
    y = np.linalg.solve(A, C @ t)
    A, C, y, t = (jax.numpy.asarray(x, dtype="float32") for x in (A, C, y, t))

    def fun(y, t):
        return 0.5 * y @ (A @ y) - y @ (C @ t)

    condition = fun if symmetric else Root(lambda y, t: A @ y - C @ t)
    found = jax.jit(lambda y, t: implicit_jacobian(condition, y, t))(y, t)
    assert np.allclose(found, np.linalg.solve(A, C), atol=1e-3)


@pytest.mark.slow
def test_a_failed_batch_is_explained():
    """Its solutions come out of the program item by item, of several right-hand sides each."""
    A = jax.numpy.asarray(with_eigenvalues([1.0, 2.0, 4.0, 9.0]))
    condition = Root(lambda y, t: A @ y - t, jacobian=lambda y, t: A)
    y = jax.numpy.ones((3, 4))
    with pytest.raises(NotConvergedError, match="items 0, 1, 2"):
        implicit_jacobian(condition, y, y @ A, batched=True, solver=MINRES(maxiter=1))


def test_what_would_be_a_warning_about_accuracy_is_nan_in_a_program():
    """Unless numbers are asked for, whatever they are."""
    A = jax.numpy.asarray(with_eigenvalues([1.0, 0.5, 0.1, 3e-7]), dtype="float32")
    condition = Root(lambda y, t: A @ y - t, jacobian=lambda y, t: A)

    @jax.jit
    def both(y, t):
        return [implicit_vjp(condition, y, t, y, solver="lu", on_failure=what) for what in ("raise", "ignore")]

    y = jax.numpy.ones(4, dtype="float32")
    told, numbers = both(y, A @ y)
    assert np.all(np.isnan(told))
    assert np.all(np.isfinite(numbers))
