"""What holds for every problem: adjointness, linearity, scaling, agreement with a re-solved problem, structure."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
from conftest import NUMPY, STRICT, Library, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from implicitdiff import GMRES, FixedPoint, Root, implicit_function, implicit_jacobian, implicit_vjp, linearize

PROPERTY = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
SIZES = st.integers(1, 8)
SEEDS = st.integers(0, 2**32 - 1)
METHODS = pytest.mark.parametrize("solver", ["lu", GMRES(rtol=1e-13)], ids=["lu", "gmres"])
LIBS = pytest.mark.parametrize("lib", [NUMPY, pytest.param(STRICT, marks=pytest.mark.exhaustive)],
                               ids=lambda lib: lib.name)  # fmt: skip


class Instance:
    """F = P y + sin(2 y) / 4 − K θ² with a random asymmetric P, solved by Newton's method.

    P is diagonally dominant by a margin that keeps ∂F/∂y regular everywhere.
    """

    def __init__(self, lib: Library, n: int, m: int, seed: int, factor: float = 1.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.P = self.rng.uniform(-1, 1, (n, n)) + (n + 1) * np.diag(self.rng.choice([-1.0, 1.0], n))
        self.K = self.rng.normal(size=(n, m))
        self.lib, self.n, self.m, self.factor = lib, n, m, factor
        self.theta = self.rng.uniform(0.5, 1.5, m)
        self.y = self.solve(self.theta)

    def slope(self, y: np.ndarray) -> np.ndarray:
        return self.P + np.diag(np.cos(2 * y)) / 2

    def solve(self, theta: np.ndarray) -> np.ndarray:
        y = np.zeros(self.n)
        for _ in range(60):
            step = np.linalg.solve(self.slope(y), self.P @ y + np.sin(2 * y) / 4 - self.K @ theta**2)
            y = y - step
            if np.max(np.abs(step)) <= 1e-15 * (1 + np.max(np.abs(y))):
                break
        return y

    def condition(self) -> Root:
        lib, c = self.lib, self.factor
        xp, p, k = lib.xp, lib.array(self.P), lib.array(self.K)

        def half(y: Any) -> Any:
            return xp.cos(2 * y) / 2

        return Root(
            lambda y, theta: c * (p @ y + xp.sin(2 * y) / 4 - k @ theta**2),
            jvp=lambda y, theta, v: c * (p @ v + half(y) * v),
            vjp=lambda y, theta, u: c * (p.T @ u + half(y) * u),
            mixed_jvp=lambda y, theta, t: -2 * c * (k @ (theta * t)),
            mixed_vjp=lambda y, theta, u: -2 * c * (theta * (k.T @ u)),
        )

    def linearize(self, solver: Any) -> Any:
        return linearize(self.condition(), self.lib.array(self.y), self.lib.array(self.theta), solver=solver)

    def vector(self, size: int) -> np.ndarray:
        return self.rng.normal(size=size)


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS)
def test_vjp_and_jvp_are_adjoint(lib: Library, solver: Any, n: int, m: int, seed: int) -> None:
    """⟨v, J t⟩ = ⟨Jᵀ v, t⟩."""
    it = Instance(lib, n, m, seed)
    lin, v, t = it.linearize(solver), it.vector(n), it.vector(m)
    pushed, pulled = lib.numpy(lin.jvp(lib.array(t))), lib.numpy(lin.vjp(lib.array(v)))
    size = np.linalg.norm(v) * np.linalg.norm(pushed) + np.linalg.norm(t) * np.linalg.norm(pulled)
    assert abs(v @ pushed - pulled @ t) <= 1e-11 * size


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS, a=st.floats(-1e3, 1e3), b=st.floats(-1e3, 1e3))
def test_vjp_and_jvp_are_linear(lib: Library, solver: Any, n: int, m: int, seed: int, a: float, b: float) -> None:
    it = Instance(lib, n, m, seed)
    lin = it.linearize(solver)
    for call, size in ((lin.vjp, n), (lin.jvp, m)):
        x, z = it.vector(size), it.vector(size)
        fx, fz = lib.numpy(call(lib.array(x))), lib.numpy(call(lib.array(z)))
        both = lib.numpy(call(lib.array(a * x + b * z)))
        # against the size of the terms: they may cancel
        scale = abs(a) * np.linalg.norm(fx) + abs(b) * np.linalg.norm(fz)
        assert np.linalg.norm(both - (a * fx + b * fz)) <= 1e-11 * scale


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS, power=st.integers(-100, 100))
def test_scaling_the_cotangent(lib: Library, solver: Any, n: int, m: int, seed: int, power: int) -> None:
    """Homogeneous of degree one, from 1e-100 to 1e100."""
    it = Instance(lib, n, m, seed)
    lin, v = it.linearize(solver), it.vector(n)
    plain = lib.numpy(lin.vjp(lib.array(v)))
    assert relative_error(lib, lin.vjp(lib.array(v * 10.0**power)), plain * 10.0**power) <= 1e-11


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS, power=st.integers(-12, 12), sign=st.sampled_from([-1.0, 1.0]))
def test_scaling_the_condition(
    lib: Library, solver: Any, n: int, m: int, seed: int, power: int, sign: float
) -> None:  # fmt: skip
    """The roots of c F are those of F, and so are their derivatives."""
    plain, scaled = Instance(lib, n, m, seed), Instance(lib, n, m, seed, sign * 10.0**power)
    reference = lib.numpy(plain.linearize(solver).jacobian())
    assert relative_error(lib, scaled.linearize(solver).jacobian(), reference) <= 1e-11


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS)
def test_rows_of_the_jacobian_are_vjps_and_columns_jvps(lib: Library, solver: Any, n: int, m: int, seed: int) -> None:
    lin = Instance(lib, n, m, seed).linearize(solver)
    jacobian = lib.numpy(lin.jacobian())
    rows = np.stack([lib.numpy(lin.vjp(lib.array(e))) for e in np.eye(n)])
    columns = np.stack([lib.numpy(lin.jvp(lib.array(e))) for e in np.eye(m)], axis=1)
    np.testing.assert_allclose(rows, jacobian, rtol=0, atol=1e-11 * np.linalg.norm(jacobian))
    np.testing.assert_allclose(columns, jacobian, rtol=0, atol=1e-11 * np.linalg.norm(jacobian))


@METHODS
@LIBS
@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS)
def test_derivative_is_that_of_the_solver(lib: Library, solver: Any, n: int, m: int, seed: int) -> None:
    """Central differences of the re-solved problem, which know nothing of the theorem."""
    it = Instance(lib, n, m, seed)
    wrapped = implicit_function(it.condition(), solver=solver)(lambda theta: lib.array(it.solve(lib.numpy(theta))))
    t, h = it.vector(m), 1e-5
    truth = (it.solve(it.theta + h * t) - it.solve(it.theta - h * t)) / (2 * h)
    assert relative_error(lib, wrapped.jvp(lib.array(it.theta), lib.array(t)), truth) <= 1e-6


@PROPERTY
@given(n=SIZES, m=SIZES, seed=SEEDS)
def test_root_and_fixed_point_agree(n: int, m: int, seed: int) -> None:
    """F = 0 is y = y − F, and what is given for one follows for the other."""
    it = Instance(NUMPY, n, m, seed)
    f = it.condition()
    fixed = FixedPoint(
        lambda y, theta: y - f.fun(y, theta), jvp=lambda y, theta, v: v - f.jvp(y, theta, v),
        vjp=lambda y, theta, u: u - f.vjp(y, theta, u), mixed_vjp=lambda y, theta, u: -f.mixed_vjp(y, theta, u),
    )  # fmt: skip
    np.testing.assert_allclose(
        implicit_jacobian(fixed, it.y, it.theta), implicit_jacobian(f, it.y, it.theta), rtol=1e-10, atol=1e-12
    )


# -- structure -------------------------------------------------------------------------------------------
class Pair(NamedTuple):
    """A named tuple for the trees."""

    left: Any
    right: Any


SHAPES = st.sampled_from([(), (1,), (2,), (1, 3), (2, 2), (2, 1, 2)])
TREES = st.recursive(
    SHAPES.map(np.zeros),
    lambda inner: st.one_of(
        st.tuples(inner, inner), st.lists(inner, min_size=1, max_size=3), st.builds(Pair, inner, inner),
        st.dictionaries(st.sampled_from(["z", "a", "w", "b"]), inner, min_size=1, max_size=3),
    ),
    max_leaves=4,
)  # fmt: skip


def flat(lib: Library, tree: Any) -> np.ndarray:
    return np.concatenate([lib.numpy(leaf).reshape(-1) for leaf in optree.tree_leaves(tree)])


def fill(lib: Library, tree: Any, values: np.ndarray) -> Any:
    """Put values into the leaves of a tree, one after the other."""
    leaves, spec = optree.tree_flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(values, ends[:-1])
    return spec.unflatten([lib.array(part.reshape(leaf.shape)) for part, leaf in zip(parts, leaves, strict=True)])


@LIBS
@PROPERTY
@given(y=TREES, theta=TREES, seed=SEEDS)
def test_trees_round_trip(lib: Library, y: Any, theta: Any, seed: int) -> None:
    """Any structure in, the same structure out, with the numbers of the raveled problem A y = K θ."""
    rng = np.random.default_rng(seed)
    n, m = (sum(leaf.size for leaf in optree.tree_leaves(tree)) for tree in (y, theta))
    A, K = rng.uniform(-1, 1, (n, n)) + (n + 1) * np.eye(n), rng.normal(size=(n, m))
    J, v, t = np.linalg.solve(A, K), rng.normal(size=n), rng.normal(size=m)
    point = rng.normal(size=m)
    condition = Root(
        lambda y, theta: fill(lib, y, A @ flat(lib, y) - K @ flat(lib, theta)),
        jvp=lambda y, theta, v: fill(lib, y, A @ flat(lib, v)),
        vjp=lambda y, theta, u: fill(lib, y, A.T @ flat(lib, u)),
        mixed_vjp=lambda y, theta, u: fill(lib, theta, -K.T @ flat(lib, u)),
        mixed_jvp=lambda y, theta, t: fill(lib, y, -K @ flat(lib, t)),
    )
    lin = linearize(condition, fill(lib, y, J @ point), fill(lib, theta, point))
    pulled, pushed, jacobian = lin.vjp(fill(lib, y, v)), lin.jvp(fill(lib, theta, t)), lin.jacobian()
    for got, like, truth in ((pulled, theta, J.T @ v), (pushed, y, J @ t)):
        assert optree.tree_structure(got) == optree.tree_structure(like)
        assert [g.shape for g in optree.tree_leaves(got)] == [x.shape for x in optree.tree_leaves(like)]
        np.testing.assert_allclose(flat(lib, got), truth, rtol=1e-9, atol=1e-11)
    check_nested(lib, jacobian, y, theta, J)


def check_nested(lib: Library, jacobian: Any, y: Any, theta: Any, J: np.ndarray) -> None:
    """Compare a Jacobian: the structure of y with that of theta at each leaf, shapes y.shape + theta.shape."""
    y_leaves, spec = optree.tree_flatten(y)
    row = 0
    for part, leaf in zip(spec.flatten_up_to(jacobian), y_leaves, strict=True):
        blocks, inner = optree.tree_flatten(part)
        assert inner == optree.tree_structure(theta)
        column = 0
        for block, other in zip(blocks, optree.tree_leaves(theta), strict=True):
            assert block.shape == leaf.shape + other.shape
            truth = J[row : row + leaf.size, column : column + other.size].reshape(leaf.shape + other.shape)
            np.testing.assert_allclose(lib.numpy(block), truth, rtol=1e-9, atol=1e-11)
            column += other.size
        row += leaf.size


@PROPERTY
@given(theta=TREES, seed=SEEDS)
def test_inputs_are_left_alone(theta: Any, seed: int) -> None:
    """Nothing that was handed in is written to, whichever memory the result lives in."""
    lib, rng = NUMPY, np.random.default_rng(seed)
    m = sum(leaf.size for leaf in optree.tree_leaves(theta))
    filled = fill(lib, theta, rng.uniform(1, 2, m))
    v = fill(lib, theta, rng.normal(size=m))
    before = flat(lib, filled), flat(lib, v)
    condition = Root(lambda y, t: optree.tree_map(lambda a, b: a**3 - b**3, y, t))
    got = implicit_vjp(condition, filled, filled, v)  # a solver that returns theta itself
    np.testing.assert_allclose(flat(lib, got), flat(lib, v), rtol=1e-7)
    optree.tree_map(lambda leaf: leaf.fill(np.nan), got)
    assert np.array_equal(before[0], flat(lib, filled))
    assert np.array_equal(before[1], flat(lib, v))
