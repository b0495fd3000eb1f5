"""FAULTS 68: given products that disagree with F, or with each other, are told by name; right ones never are."""

from __future__ import annotations

import gc
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from conftest import JAX, NUMPY, STRICT, TORCH, outcome

import implicitdiff as idf
from implicitdiff import FixedPoint, InconsistentDerivativesError, ProximalGradient, Root, Stationary
from implicitdiff.problem import Problem, Settings
from implicitdiff.registry import get_backend
from implicitdiff.rules import Rules
from implicitdiff.verification import first_use as verification
from implicitdiff.verification.mistakes import wrong_in

N = 4
RNG = np.random.default_rng(7)
W = RNG.normal(size=(N, N))
K, M, C = W @ W.T / N + 2 * np.eye(N), 3 * np.eye(N) + W, RNG.normal(size=(N, N)) + 2 * np.eye(N)
Y, V = RNG.normal(size=N), RNG.normal(size=N)
EAGER = (NUMPY, STRICT, *TORCH)
each_eager = pytest.mark.parametrize("lib", EAGER, ids=lambda lib: lib.name)


def parts(lib, *, scale=1.0, items=()):
    """The pieces of ∇f = K y + y³ − C θ, F = M y + y³ − C θ and T = M y / 9 + sin(y) / 3 + C θ, and their points."""
    k, m, mt, c, ct = (lib.array(x) for x in (K, M.T, M, C.T, C))  # for y @ …
    xp = lib.xp
    y = np.broadcast_to(Y, (*items, N))
    right = {"Stationary": y @ K + y**3, "Root": y @ M.T + y**3, "FixedPoint": y - y @ M.T / 9 - np.sin(y) / 3}
    return SimpleNamespace(
        y=lib.array(y), v=lib.array(np.broadcast_to(V, y.shape)),
        theta={name: lib.array(np.linalg.solve(C, r[..., None])[..., 0]) for name, r in right.items()},
        grad=lambda y, t: y @ k + y**3 - t @ c, hvp=lambda y, t, v: v @ k + 3 * y**2 * v,
        root=lambda y, t: y @ m + y**3 - t @ c,
        jvp=lambda y, t, v: v @ m + 3 * y**2 * v, vjp=lambda y, t, u: u @ mt + 3 * y**2 * u,
        jacobian=lambda y, t: lib.array(M) + 3 * xp.eye(N, dtype=y.dtype) * y**2,
        map=lambda y, t: y @ m / 9 + xp.sin(y) / 3 + t @ c,
        mapped=lambda y, t, v: v @ m / 9 + xp.cos(y) * v / 3, pulled=lambda y, t, u: u @ mt / 9 + xp.cos(y) * u / 3,
        mixed_vjp=lambda y, t, u: -(u @ ct), mixed_jvp=lambda y, t, d: -(d @ c),
        turned=lambda y, t, u: -(u @ c), ct=ct, c=c, k=k,
    )  # fmt: skip


def twice(function):
    return lambda *args: 2 * function(*args)


RIGHT = {
    "stationary": lambda p: Stationary(grad=p.grad, hvp=p.hvp, mixed_vjp=p.mixed_vjp, mixed_jvp=p.mixed_jvp),
    "root": lambda p: Root(p.root, jvp=p.jvp, vjp=p.vjp, mixed_vjp=p.mixed_vjp, mixed_jvp=p.mixed_jvp),
    "fixed point": lambda p: FixedPoint(p.map, jvp=p.mapped, vjp=p.pulled, mixed_vjp=lambda y, t, u: u @ p.ct),
}
WRONG = {
    "hvp x 2": (lambda p: Stationary(grad=p.grad, hvp=twice(p.hvp), mixed_vjp=p.mixed_vjp), "hvp is.* grad", "of 2"),
    "hvp of another function": (
        lambda p: Stationary(grad=p.grad, hvp=lambda y, t, v: v @ p.k, mixed_vjp=p.mixed_vjp), "hvp is", "missing"),
    "the sign of hvp": (
        lambda p: Stationary(grad=p.grad, hvp=lambda *a: -p.hvp(*a), mixed_vjp=p.mixed_vjp), "hvp is", "other sign"),
    "mixed_vjp not transposed": (
        lambda p: Stationary(grad=p.grad, hvp=p.hvp, mixed_vjp=p.turned), "mixed_vjp is", "transposed"),
    "mixed_jvp transposed": (
        lambda p: Root(p.root, jvp=p.jvp, mixed_jvp=p.mixed_vjp), "mixed_jvp is", "transposed"),
    "mixed_jvp x 2": (lambda p: Root(p.root, jvp=p.jvp, mixed_jvp=twice(p.mixed_jvp)), "mixed_jvp is", "of 2"),
    "jvp and vjp swapped": (
        lambda p: Root(p.root, jvp=p.vjp, vjp=p.jvp, mixed_vjp=p.mixed_vjp), "jvp and vjp are", "swapped"),
    "vjp alone": (
        lambda p: Root(p.root, jvp=p.jvp, vjp=p.jvp, mixed_vjp=p.mixed_vjp), "^vjp is", "swapped|transposed"),
    "jacobian transposed": (
        lambda p: Root(p.root, jacobian=lambda y, t: p.jacobian(y, t).T, mixed_vjp=p.mixed_vjp), "jacobian", "transp"),
    "products of y - T": (
        lambda p: FixedPoint(p.map, jvp=lambda *a: a[-1] - p.mapped(*a), vjp=lambda *a: a[-1] - p.pulled(*a),
                             mixed_vjp=lambda y, t, u: -(u @ p.ct)),
        "jvp and vjp and mixed_vjp are", r"y - T\(y"),
}  # fmt: skip


def kind_of(condition):
    return type(condition).__name__


def derive(condition, p, mode="vjp", **options):
    call = {"vjp": idf.implicit_vjp, "jvp": idf.implicit_jvp}[mode]
    return outcome(lambda: call(condition, p.y, p.theta[kind_of(condition)], p.v, **options))


def assert_named(found, head, cause):
    assert type(found.error) is InconsistentDerivativesError, found.text
    lines = str(found.error).splitlines()
    assert len(lines) <= 5
    assert re.search(head, lines[0]), lines[0]
    assert re.search(cause, lines[1]), lines[1]


@each_eager
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_callable_is_named(lib, name):
    make, head, cause = WRONG[name]
    p = parts(lib)
    condition = make(p)
    for mode in ("vjp", "jvp"):
        assert_named(derive(condition, p, mode), head, cause)  # at each call, not once
    assert_named(derive(condition, p, on_failure="ignore"), head, cause)  # a mistake is no failed solve


@pytest.mark.parametrize("lib", JAX, ids=lambda lib: lib.name)
@pytest.mark.parametrize("name", ["hvp x 2", *(pytest.param(name, marks=pytest.mark.slow)
                         for name in ("jacobian transposed", "products of y - T"))])  # fmt: skip
def test_a_wrong_callable_is_named_under_jax(lib, name):
    import jax

    make, head, cause = WRONG[name]
    p = parts(lib)
    condition = make(p)
    assert_named(derive(condition, p), head, cause)
    if name == "hvp x 2":
        theta = p.theta["Stationary"]
        solve = idf.implicit_function(condition)(lambda theta: p.y)
        assert_named(outcome(lambda: jax.grad(lambda t: solve(t).sum())(theta)), head, cause)
        with_jit = jax.jit(lambda t: idf.implicit_vjp(condition, p.y, t, p.v))
        assert outcome(lambda: with_jit(theta)).quiet  # values are not seen there


@each_eager
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("solver", ["auto", "lu", "gmres"])
def test_right_ones_pass(lib, name, solver):
    p = parts(lib)
    condition = RIGHT[name](p)
    for mode in ("vjp", "jvp"):
        assert derive(condition, p, mode, solver=solver).quiet


@each_eager
def test_verify_false_lets_an_approximation_pass(lib):
    p = parts(lib)
    gauss_newton = Stationary(grad=p.grad, hvp=lambda y, t, v: v @ p.k, mixed_vjp=p.mixed_vjp, verify=False)
    assert derive(gauss_newton, p).quiet
    assert derive(Root(p.root, jvp=p.vjp, vjp=p.jvp, mixed_vjp=p.mixed_vjp, verify=False), p).quiet
    with pytest.raises(idf.InputError, match="verify = 'no'"):
        Root(p.root, verify="no")


@pytest.mark.parametrize("lib", [NUMPY, STRICT, *TORCH], ids=lambda lib: lib.name)
@pytest.mark.parametrize("name", ["hvp x 2", "jvp and vjp swapped", "products of y - T"])
def test_batches(lib, name):
    make, head, cause = WRONG[name]
    p = parts(lib, items=(3,))
    assert_named(derive(make(p), p, batched=True), head, cause)
    assert derive(RIGHT["root"](p), p, batched=True).quiet


def test_sparse_matrices():
    p = parts(NUMPY)
    wrong = Root(p.root, jacobian=lambda y, t: scipy.sparse.csr_array(p.jacobian(y, t).T), mixed_vjp=p.mixed_vjp)
    assert_named(derive(wrong, p), "jacobian is", "transposed")


def objective(y, t):
    return 0.5 * y @ K @ y + (y**4).sum() / 4 - y @ (C @ t)


def test_the_objective_and_its_gradient():
    p = parts(NUMPY)
    assert derive(Stationary(objective, grad=p.grad, hvp=p.hvp), p).quiet
    assert_named(derive(Stationary(objective, grad=twice(p.grad)), p), "grad is not the gradient of fun", "of 2")
    other = Stationary(objective, hessian=lambda y, t: K, mixed_vjp=p.mixed_vjp)  # of ½ yᵀKy alone
    assert_named(derive(other, p), "hessian is not the derivative of fun", "another function")


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_a_failed_solve_is_not_blamed_on_the_point(solver):
    p = parts(NUMPY)
    wrong = Stationary(grad=p.grad, hvp=lambda *a: -p.hvp(*a), mixed_vjp=p.mixed_vjp)
    assert_named(derive(wrong, p, solver=solver), "hvp is", "other sign")
    saddle = Stationary(grad=lambda y, t: -p.grad(y, t), hvp=lambda *a: -p.hvp(*a))
    assert type(derive(saddle, p, solver=solver).error) is idf.NotPositiveDefiniteError


def test_a_sparse_prior_that_is_missing_is_seen_through_the_adjoint():
    """A term that is 1e-6 of the Hessian, and all of it in the flat direction, makes the result wrong many times."""
    H = np.diag([1.0, 1.0, 0.0]) + 1e-6 * np.eye(3)
    given = {"hvp": lambda y, t, v: H @ v - 0.9e-6 * v, "mixed_vjp": lambda y, t, u: -u}
    theta = np.array([1.0, 2.0, 3e-6])
    found = outcome(lambda: idf.implicit_vjp(
        Stationary(grad=lambda y, t: H @ y - t, **given), theta / np.diag(H), theta, np.ones(3)
    ))  # fmt: skip
    assert_named(found, "hvp is", "missing")


def test_proximal_conditions_look_at_the_smooth_part():
    f = {"grad": lambda y, t: y - t, "mixed_vjp": lambda y, t, u: -u}
    prox = lambda x, t, step: idf.proxes.lasso(x, 0.5, step)
    theta = np.array([2.0, 0.1, -3.0])
    y = idf.proxes.lasso(theta, 0.5, 1.0)
    for factor, right in ((1.0, True), (2.0, False)):
        condition = ProximalGradient(prox=prox, hvp=lambda y, t, v, k=factor: k * v, **f)
        found = outcome(lambda c=condition: idf.implicit_vjp(c, y, theta, np.ones(3)))
        assert found.quiet if right else type(found.error) is InconsistentDerivativesError, found.text


def test_trees_with_zeros():
    """y is zero in one leaf, theta in another: the units are those of the rest, or found by trying."""

    def grad(y, t):
        return {"a": y["a"] - t[0], "b": 1e6 * (y["b"] - t[1] * y["b"] ** 2 - 1e-9)}

    def hvp(y, t, v, factor=1.0):
        return {"a": factor * v["a"], "b": 1e6 * v["b"] * (1 - 2 * t[1] * y["b"])}

    mixed = lambda y, t, u: (-u["a"], -1e6 * u["b"] @ y["b"] ** 2)
    y, theta = {"a": np.zeros(2), "b": np.full(2, 1e-9)}, (np.zeros(2), np.array(0.0))
    ones = {"a": np.ones(2), "b": np.ones(2)}
    right = Stationary(grad=grad, hvp=hvp, mixed_vjp=mixed)
    assert outcome(lambda: idf.implicit_vjp(right, y, theta, ones)).quiet
    wrong = Stationary(grad=grad, hvp=lambda y, t, v: hvp(y, t, v, 3.0), mixed_vjp=mixed)
    assert_named(outcome(lambda: idf.implicit_vjp(wrong, y, theta, ones)), "hvp is", "missing")


# -- paid once -------------------------------------------------------------------------------------------
def counted():
    calls = []

    def grad(y, t):
        calls.append(1)
        return K @ y - t

    return grad, calls


def test_paid_once_for_the_same_functions():
    grad, calls = counted()
    hvp, mixed = (lambda y, t, v: K @ v), (lambda y, t, u: -u)
    y, made = np.linalg.solve(K, V), []
    for _ in range(3):
        before = len(calls)
        idf.implicit_vjp(Stationary(grad=grad, hvp=hvp, mixed_vjp=mixed), y, V, V)  # a fresh condition each time
        made.append(len(calls) - before)
    assert made[0] > made[1] == made[2] == 1  # at y, whether it is a solution
    idf.implicit_vjp(Stationary(grad=grad, hvp=twice(hvp), mixed_vjp=mixed, verify=False), y, V, V)
    assert len(calls) == sum(made) + 1


def test_a_function_made_anew_is_the_same_with_the_same_closure():
    grad, calls = counted()

    def step(factor):
        condition = Stationary(grad=grad, hvp=lambda y, t, v: factor * (K @ v), mixed_vjp=lambda y, t, u: -u)
        before = len(calls)
        found = outcome(lambda: idf.implicit_vjp(condition, np.linalg.solve(K, V), V, V))
        return len(calls) - before, found

    first, again, other = step(1.0), step(1.0), step(2.0)
    assert first[0] > again[0] == 1
    assert_named(other[1], "hvp is", "of 2")


def test_functions_are_not_kept_alive():
    gc.collect()
    before = len(verification._verified)

    class Model:
        def grad(self, y, t):
            return K @ y - t

        def hvp(self, y, t, v):
            return K @ v

    model = Model()
    idf.implicit_vjp(Stationary(grad=model.grad, hvp=model.hvp), np.linalg.solve(K, V), V, V)
    assert len(verification._verified) == before + 1
    del model
    gc.collect()
    assert len(verification._verified) == before


def test_threads():
    errors = []

    def work(factor):
        p = parts(NUMPY)
        condition = Stationary(grad=p.grad, hvp=lambda *a: factor * p.hvp(*a), mixed_vjp=p.mixed_vjp)
        found = [derive(condition, p) for _ in range(5)]
        if any(f.quiet != (factor == 1.0) for f in found):
            errors.append(factor)

    threads = [threading.Thread(target=work, args=(1.0 + i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# -- no false alarm ----------------------------------------------------------------------------------------
def random_problem(seed):
    """A problem with its units, its source of F, and whether F is noisy."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    noise = (0.0, 1e-10, 1e-7, 1e-5)[seed % 4]
    D, E, S = (10.0 ** rng.uniform(-9, 9, size=k) if seed % 3 else np.ones(k) for k in (n, m, n))
    A, B = rng.normal(size=(n, n)) + 3 * np.eye(n), rng.normal(size=(n, m))
    y, theta = rng.normal(size=n), rng.normal(size=m)
    if seed % 5 == 0:
        y[rng.integers(n)] = 0.0
    symmetric = seed % 2 == 0
    if symmetric:
        A, S = A @ A.T, 1 / D
    shift = A @ y + np.sin(y) + B @ np.tanh(theta)

    def F(y, t):
        y, t = y / D, t / E
        found = A @ y + np.sin(y) + B @ np.tanh(t) - shift
        return S * (found + noise * rng.normal(size=n))

    def jvp(y, t, v):
        return S * (A @ (v / D) + np.cos(y / D) * (v / D))

    def vjp(y, t, u):
        u = S * u
        return (A.T @ u + np.cos(y / D) * u) / D

    mixed = {
        "mixed_jvp": lambda y, t, d: S * (B @ (d / E / np.cosh(t / E) ** 2)),
        "mixed_vjp": lambda y, t, u: (B.T @ (S * u)) / np.cosh(t / E) ** 2 / E,
    }
    condition = Stationary(grad=F, hvp=jvp, kind="saddle", **mixed) if symmetric else Root(F, jvp=jvp, vjp=vjp, **mixed)
    wrong = {"hvp": twice(jvp)} if symmetric else {"jvp": twice(jvp), "vjp": vjp}
    mistaken = Stationary(grad=F, kind="saddle", **wrong, **mixed) if symmetric else Root(F, **wrong, **mixed)
    return condition, mistaken, D * y, E * theta, (rng.normal(size=n) / D, rng.normal(size=m) * E), noise


def verdict(condition, y, theta, mode, direction):
    """What is found at the first use, and the solution that it is found with, whatever became of the solve."""
    problem = Problem(get_backend("numpy"), condition, y, theta, settings=Settings("lu", "ignore"))
    with problem.backend.computing():
        rules = Rules(problem)
        solution = getattr(rules, mode)(direction)[1].solution.x
        given = (solution, None) if mode == "vjp" else (None, solution)
        return [wrong.name for wrong in wrong_in(rules.maps.checked[0], *given)]


@pytest.mark.parametrize("block", range(3))
def test_random_problems_in_any_units_pass_and_mistakes_do_not(block):
    missed = []
    for seed in range(70 * block, 70 * block + 70):
        condition, mistaken, y, theta, (v, t), noise = random_problem(seed)
        for mode, x in (("vjp", v), ("jvp", t)):
            assert verdict(condition, y, theta, mode, x) == [], (seed, noise)
            if verdict(mistaken, y, theta, mode, x) not in (["hvp"], ["jvp"]):
                missed.append((seed, noise))
    assert len(missed) <= 4, missed
