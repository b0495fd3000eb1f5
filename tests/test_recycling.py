"""Sequences of gradients: the same values as cold ones, with fewer products, wherever the state goes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARIES, Library
from frameworks import framework

import implicitdiff
from implicitdiff import (
    CG,
    GMRES,
    MINRES,
    Auto,
    InputError,
    SequenceState,
    ShapeError,
    Stationary,
    implicit_function,
    implicit_grad,
    implicit_jvp,
    implicit_vjp,
    sequence_state,
)

N, STEPS, K = 40, 8, 30
LIBS = pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.name)


def hessian(seed: int = 0) -> np.ndarray:
    """Positive definite, of condition 1e3."""
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.normal(size=(N, N)))[0]
    return (V * np.geomspace(1e-2, 10, N)) @ V.T


class Path:
    """min ½ yᵀ(H + diag exp θ) y − cᵀ y at points θ on a smooth path, with ∂L/∂y that changes, too."""

    def __init__(self, xp: Any = np, array: Any = np.asarray, H: np.ndarray | None = None) -> None:
        self.xp, self.array, self.H = xp, array, hessian() if H is None else H
        self.c = np.cos(3.0 * np.arange(N)) + 0.5
        self.condition = self.of(array(self.H))
        t = np.arange(STEPS)[:, None]
        self.thetas = -4 + 0.03 * t * np.cos(np.arange(N)) + 0.002 * t**2

    def of(self, M: Any) -> Stationary:
        """The condition, by its products."""
        xp, c = self.xp, self.array(self.c)
        times = lambda v: xp.linalg.vecdot(M, v[..., None, :])
        return Stationary(
            grad=lambda y, t: times(y) + xp.exp(t) * y - c,
            hvp=lambda y, t, v: times(v) + xp.exp(t) * v,
            mixed_vjp=lambda y, t, u: xp.exp(t) * y * u,
            mixed_jvp=lambda y, t, d: xp.exp(t) * y * d,
        )

    def at(self, theta: np.ndarray, H: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """y, a cotangent, and the gradient, in closed form."""
        A = (self.H if H is None else H) + np.diag(np.exp(theta))
        y, v = np.linalg.solve(A, self.c), np.sin(np.arange(N) + theta[0])
        return y, v, -np.exp(theta) * y * np.linalg.solve(A, v)

    def run(self, solver: Any, state: Any = "new", thetas: Any = None, **options: Any) -> Any:
        """Gradients along the path: true errors, reports, and the last state."""
        errors, reports = [], []
        for theta in self.thetas if thetas is None else thetas:
            y, v, g = self.at(theta)
            at = (self.condition, self.array(y), self.array(theta), self.array(v))
            value, state, report = implicit_vjp(*at, solver=solver, state=state, return_report=True, **options)
            errors.append(_off(value, g))
            reports.append(report)
        return errors, reports, state


def _off(value: Any, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.array(np.from_dlpack(value)) - truth) / np.linalg.norm(truth))


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
@pytest.mark.parametrize("solver", [CG(rtol=1e-9, recycle=K), CG(rtol=1e-9), GMRES(rtol=1e-9), Auto(), "lu"], ids=repr)
def test_the_values_are_those_of_cold_solves(lib: Library, solver: Any) -> None:
    errors, reports, state = Path(lib.xp, lib.array).run(solver)
    assert max(errors) <= 1e-6
    assert isinstance(state, SequenceState)
    assert int(state.count) == 4
    assert all(report.converged for report in reports)
    k = K if getattr(solver, "recycle", 0) else 0
    assert tuple(state.directions.shape) == (k, N)
    assert reports[0].recycled == 0
    assert (reports[-1].recycled > 0) is (k > 0)


def test_products_fall_with_what_is_shared() -> None:
    path = Path()
    spent = {}
    for name, solver in (("cold", CG(rtol=1e-8)), ("started", CG(rtol=1e-8)), ("recycled", CG(rtol=1e-8, recycle=60))):
        total = 0
        state: Any = "new"
        for theta in path.thetas:
            y, v, _ = path.at(theta)
            _, state, report = implicit_vjp(
                path.condition, y, theta, v, solver=solver, state="new" if name == "cold" else state, return_report=True
            )
            total += report.iterations
        spent[name] = total
    assert spent["started"] < 0.9 * spent["cold"]
    assert spent["recycled"] < 0.5 * spent["cold"]


def test_the_residual_that_is_told_is_the_true_one_and_products_are_counted() -> None:
    path, made = Path(), list[int]()
    hvp = path.condition.hvp

    def counted(*args: Any) -> Any:
        made.append(1)
        return hvp(*args)

    condition, state = Stationary(hvp=counted, mixed_vjp=path.condition.mixed_vjp), "new"
    for rtol in (1e-5, 1e-9):  # followed, and recomputed
        for theta in path.thetas:
            y, v, _ = path.at(theta)
            made.clear()
            _, state, report = implicit_vjp(
                condition, y, theta, v, solver=CG(rtol=rtol, recycle=K), state=state, return_report=True
            )
            A = path.H + np.diag(np.exp(theta))
            true = np.linalg.norm(v - A @ report.solution) / np.linalg.norm(v)
            assert abs(true - report.residual) <= 1e-3 * rtol + 1e-3 * true
            assert true <= rtol
        assert report.matvecs == len(made)


def test_a_sequence_in_one_point_needs_no_iteration() -> None:
    path = Path()
    _, reports, state = path.run(CG(recycle=60), thetas=[path.thetas[0]] * 3)
    assert [report.iterations > 0 for report in reports] == [True, False, False]
    other = np.cos(np.arange(N) ** 2.0)  # another right-hand side: A M is the identity where the pairs are
    y, _, _ = path.at(path.thetas[0])
    at = (path.condition, y, path.thetas[0])
    _, _, cold = implicit_vjp(*at, other, solver=CG(), state="new", return_report=True)
    _, _, warm = implicit_vjp(*at, other, solver=CG(recycle=60), state=state, return_report=True)
    assert warm.drift < 1
    assert warm.iterations < 0.5 * cold.iterations


def test_pairs_of_another_matrix_are_dropped_and_the_value_is_right() -> None:
    path = Path()
    solver = CG(rtol=1e-8, recycle=K)
    _, _, state = path.run(solver)
    other = Path(H=np.linalg.inv(hessian(5)) * 100)
    theta = other.thetas[0]
    y, v, g = other.at(theta)
    cold = implicit_vjp(other.condition, y, theta, v, solver=CG(rtol=1e-8), return_report=True)[1]
    value, after, report = implicit_vjp(other.condition, y, theta, v, solver=solver, state=state, return_report=True)
    assert _off(value, g) <= 1e-6
    assert report.dropped
    assert report.recycled == 0
    assert report.drift > 1
    assert report.iterations <= 4 * cold.iterations + 10
    errors, reports, _ = other.run(solver, state=after)
    assert max(errors) <= 1e-6
    assert reports[-1].recycled > 0
    assert not reports[-1].dropped


@LIBS
def test_batched(lib: Library) -> None:
    path = Path(lib.xp, lib.array)
    state: Any = "new"
    for theta in path.thetas:
        each = [path.at(theta + shift) for shift in (0.0, 0.5, -1.0)]
        y, v, g = (np.stack(part) for part in zip(*each, strict=True))
        thetas = np.stack([theta + shift for shift in (0.0, 0.5, -1.0)])
        value, state, report = implicit_vjp(
            path.condition, *map(lib.array, (y, thetas, v)), solver=CG(rtol=1e-9, recycle=K), state=state,
            return_report=True, batched=True,
        )  # fmt: skip
        assert _off(value, g) <= 1e-6
    assert tuple(state.directions.shape) == (3, K, N)
    assert tuple(report.recycled.shape) == (3,)
    assert int(report.recycled[0]) > 0


def test_the_state_is_a_value() -> None:
    path = Path()
    solver = CG(recycle=K)
    _, _, state = path.run(solver, thetas=path.thetas[:3])
    before = pickle.dumps(state)
    first = path.run(solver, state=state, thetas=path.thetas[3:])
    assert pickle.dumps(state) == before
    again = path.run(solver, state=pickle.loads(before), thetas=path.thetas[3:])
    assert all(np.array_equal(a, b) for a, b in zip(first[2], again[2], strict=True))


def test_forward_and_with_estimates() -> None:
    path, state = Path(), "new"
    solver = CG(rtol=1e-6, recycle=K)
    for theta in path.thetas:
        y, _, _ = path.at(theta)
        d = np.cos(np.arange(N))
        truth = -np.linalg.solve(path.H + np.diag(np.exp(theta)), np.exp(theta) * y * d)
        w, state, report = implicit_jvp(
            path.condition, y, theta, d, solver=solver, state=state, return_report=True, error=True
        )
        off = np.linalg.norm(w - truth)
        assert off <= 1e-4 * np.linalg.norm(truth)
        assert off / 3 <= report.error.absolute <= 3 * off
        polished, state, _ = implicit_jvp(
            path.condition, y + 1e-4, theta, d, solver=solver, state=state, return_report=True, polish=1
        )
        assert np.linalg.norm(polished - truth) <= 1e-4 * np.linalg.norm(truth)


def test_what_is_handed_out() -> None:
    path = Path()
    y, v, _ = path.at(path.thetas[0])
    at = (path.condition, v, y, path.thetas[0])
    assert len(implicit_grad(*at, state="new")) == 2
    assert [type(x) for x in implicit_grad(*at, state="new", return_report=True)[1:]] == [
        SequenceState, implicitdiff.Report,
    ]  # fmt: skip
    state = sequence_state(y, CG(recycle=3))
    assert state.directions.shape == (3, N)
    assert np.array_equal(implicit_grad(*at, state=state, solver=CG(recycle=3))[0], implicit_grad(*at, solver=CG()))


def test_what_is_refused() -> None:
    path = Path()
    y, v, _ = path.at(path.thetas[0])
    at = (path.condition, v, y, path.thetas[0])
    with pytest.raises(InputError, match="one of them"):
        implicit_grad(*at, state="new", x0=v)
    with pytest.raises(InputError, match="state = 'old'"):
        implicit_grad(*at, state="old")
    with pytest.raises(ShapeError, match="another recycle"):
        implicit_grad(*at, state=sequence_state(y, CG(recycle=3)), solver=CG(recycle=4))
    with pytest.raises(InputError, match="recycle = -1"):
        CG(recycle=-1)


def test_a_solve_that_failed_leaves_nothing() -> None:
    path = Path()
    y, v, _ = path.at(path.thetas[0])
    _, state = implicit_vjp(
        path.condition, y, path.thetas[0], v, solver=CG(rtol=1e-12, maxiter=2, recycle=K), state="new",
        on_failure="ignore",
    )  # fmt: skip
    assert int(state.count) == 0
    assert not state.directions.any()


@pytest.mark.slow
def test_inside_a_scan_it_is_what_it_is_outside() -> None:
    jax = framework("jax").jax
    jnp = jax.numpy
    path, solver = Path(jnp, jnp.asarray), CG(rtol=1e-9, recycle=K)
    points = [tuple(map(jnp.asarray, (*path.at(theta)[:2], theta))) for theta in path.thetas]

    def body(state: Any, at: Any) -> Any:
        y, v, theta = at
        value, state, report = implicit_vjp(path.condition, y, theta, v, solver=solver, state=state, return_report=True)
        return state, (value, report.iterations, report.recycled)

    together = jax.tree.map(lambda *x: jnp.stack(x), *points)
    start = sequence_state(points[0][0], solver)
    state, (values, iterations, recycled) = jax.jit(lambda s, at: jax.lax.scan(body, s, at))(start, together)
    _, reports, outside = path.run(solver)
    assert max(_off(value, path.at(theta)[2]) for value, theta in zip(values, path.thetas, strict=True)) <= 1e-6
    assert [abs(int(i) - r.iterations) <= 1 for i, r in zip(iterations, reports, strict=True)] == [True] * STEPS
    assert [int(r) for r in recycled] == [r.recycled for r in reports]
    assert jax.tree.structure(state) == jax.tree.structure(outside)


# -- of a decorated solver -------------------------------------------------------------------------------
def test_a_decorated_solver_remembers_from_call_to_call() -> None:
    path, told = Path(), []
    argmin = implicit_function(path.condition, solver=CG(rtol=1e-9, recycle=60), on_report=told.append)(
        lambda theta: path.at(theta)[0]
    )
    for theta in path.thetas:
        _, v, g = path.at(theta)
        assert _off(argmin.vjp(theta, v), g) <= 1e-6
    assert told[-1].recycled > 0
    assert told[-1].iterations < 0.5 * told[0].iterations
    batched = np.stack(path.thetas[:2])
    other = implicit_function(path.condition, solver=CG(recycle=60), batched=True)(
        lambda theta: np.stack([path.at(t)[0] for t in theta])
    )
    other.past.states.update(argmin.past.states)  # of other shapes: dropped
    found = other.vjp(batched, np.stack([path.at(t)[1] for t in batched]))
    assert _off(found, np.stack([path.at(t)[2] for t in batched])) <= 1e-6


def test_a_backward_pass_of_torch_remembers_the_last() -> None:
    torch = framework("torch").torch
    path, told = Path(framework("torch").xp, torch.asarray), []
    argmin = implicit_function(path.condition, solver=CG(rtol=1e-9, recycle=60), on_report=told.append)(
        lambda theta: path.at(theta.numpy())[0]
    )
    for theta in path.thetas:
        _, v, g = path.at(theta)
        leaf = torch.asarray(theta).requires_grad_()
        (argmin(leaf) * torch.asarray(v)).sum().backward()
        assert _off(leaf.grad, g) <= 1e-6
    assert told[-1].recycled > 0
    assert told[-1].iterations < 0.5 * told[0].iterations


@pytest.mark.parametrize("k", [10, 100])
def test_minres(k: int) -> None:
    errors, reports, _ = Path().run(MINRES(rtol=1e-8, recycle=k))
    assert max(errors) <= 1e-6
    assert reports[-1].recycled > 0
    assert reports[-1].iterations < (0.8 if k == 10 else 0.2) * reports[0].iterations


@pytest.mark.slow(on=("array_api_strict",))
@LIBS
@pytest.mark.parametrize("solver", [CG(rtol=1e-8, recycle=8), MINRES(rtol=1e-8, recycle=8)], ids=repr)
def test_what_few_pairs_cannot_hold_the_diagonal_does(lib: Library, solver: Any) -> None:
    path = Path(lib.xp, lib.array, H=0.03 * hessian() / 10)
    path.thetas = path.thetas + np.linspace(0, 8, N)[::-1]  # penalties from 0.02 to 50
    errors, reports, state = path.run(solver)
    assert max(errors) <= 1e-6
    assert max(r.iterations for r in reports[-4:]) < 0.4 * reports[0].iterations
    A = path.H + np.diag(np.exp(path.thetas[-1]))
    known = np.log(np.array(np.from_dlpack(state.diagonal)) / np.diag(A))
    assert np.ptp(known) < 0.3 * np.ptp(np.log(np.diag(A)))


def test_an_indefinite_matrix_shares_starts_only() -> None:
    H = hessian()
    path = Path(H=H - 0.5 * np.eye(N))
    errors, reports, state = path.run(MINRES(rtol=1e-9, recycle=K))
    assert max(errors) <= 1e-6
    assert not state.directions.any()
    assert reports[-1].iterations < reports[0].iterations


def test_under_a_transform_of_torch_there_is_no_state() -> None:
    torch = framework("torch").torch
    path = Path(framework("torch").xp, torch.asarray)
    y, v, _ = map(torch.asarray, path.at(path.thetas[0]))
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.vmap(lambda t: implicit_vjp(path.condition, y, t, v, state="new")[0])(torch.asarray(path.thetas[:2]))


@pytest.mark.parametrize("given", ["products", "matrix"])
def test_units_are_found_once_and_change_nothing(given: str) -> None:
    d = 10.0 ** np.where(np.arange(N) % 2, 5, -5)
    path, state = Path(), "new"
    A = lambda t: (path.H + np.diag(np.exp(t))) / d[:, None] / d
    products = {"hvp": lambda y, t, v: A(t) @ v} if given == "products" else {"hessian": lambda y, t: A(t)}
    condition = Stationary(mixed_vjp=lambda y, t, u: np.exp(t) * y * u / d**2, **products)
    reports = []
    for theta in path.thetas:
        y, v, g = path.at(theta)
        value, state, report = implicit_vjp(
            condition, y * d, theta, v / d, solver=CG(rtol=1e-9, recycle=60), state=state, return_report=True
        )
        assert _off(value, g) <= 1e-6
        reports.append(report)
    assert reports[-1].iterations < 0.3 * reports[0].iterations
    if given == "products":
        assert reports[0].matvecs > N  # it was assembled for its scale
        assert reports[-1].matvecs <= reports[-1].iterations + 2
