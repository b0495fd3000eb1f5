"""The dense Jacobian under the user's own jit, where the method depends on the number of right-hand sides."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from implicitdiff import Root, implicit_jacobian  # noqa: E402


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
