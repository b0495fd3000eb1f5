"""The cases in JAX, under the user's own jit and called eagerly."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve

from benchmarks.frameworks import Framework, Peer, cases, time_batch
from benchmarks.layers import equilibrium
from benchmarks.measure import Function, Setting
from benchmarks.networks import networks
from benchmarks.problems import Penalties
from benchmarks.programs_jax import compiling, restarts
from benchmarks.report import Row, Skipped
from implicitdiff import implicit_vjp

__all__ = ["CASES", "Jax", "unavailable"]


def unavailable(setting: Setting) -> str | None:
    """Why nothing can be measured here."""
    if setting.device == "cuda" and jax.default_backend() != "gpu":
        return "JAX sees no CUDA device"
    return None


def ridge(y: Any, theta: Any, H: Any, c: Any) -> Any:
    """The objective of `problems.Penalties` for one item."""
    return 0.5 * (y @ (H @ y)) + 0.5 * (jnp.exp(theta) * y * y).sum() - c @ y


class Jax(Framework):
    """The problems in JAX, and the same work by hand."""

    name = "jax"

    def put(self, x: Any) -> Any:
        return jax.device_put(x, jax.devices(self.device)[0])

    def numpy(self, x: Any) -> Any:
        return np.asarray(x)

    def timed(self, function: Function) -> Function:
        return lambda: jax.block_until_ready(function())

    def ways(self, function: Callable[..., Any], arrays: Any) -> dict[str, Function]:
        compiled = jax.jit(function)
        return {
            ", under jit": self.timed(lambda: compiled(*arrays)),
            ", eager": self.timed(lambda: function(*arrays)),
        }

    by_hand = "jit(vmap(KKT matrix + LU))"

    def mapped(self, function: Callable[..., Any], arrays: Any) -> Function:
        compiled = jax.jit(jax.vmap(function))
        return self.timed(lambda: compiled(*arrays))

    def logistic(self, W: Any, theta: Any, X: Any, Y: Any) -> Any:
        scores = X @ W
        entropy = (jax.nn.logsumexp(scores, axis=1) - (scores * Y).sum(axis=1)).sum()
        return entropy + 0.5 * jnp.exp(theta) @ (W * W).sum(axis=1)

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(function)

    def hvp(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def product(y: Any, theta: Any, v: Any, *args: Any) -> Any:
            return jax.jvp(lambda y: jax.grad(function)(y, theta, *args), (y,), (v,))[1]

        return product

    def counted(self, function: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            jax.debug.callback(lambda: count.append(1))
            return function(*args)

        return called

    def products(self, function: Callable[..., Any], y: Any, theta: Any, v: Any, *args: Any) -> Callable[[int], Any]:
        _, linear = jax.linearize(lambda y: jax.grad(function)(y, theta, *args), y)
        scale = 1 / jnp.linalg.norm(linear(v))  # so that no power of A overflows

        @jax.jit
        def run(linear: Any, v: Any, k: Any) -> Any:
            return lax.fori_loop(0, k, lambda _, x: scale * linear(x), v)

        return lambda k: run(linear, v, k)

    def jacobian_by_hand(self, function: Any, arrays: Any, *, symmetric: bool) -> Function:
        F = jax.grad(function) if symmetric else function

        @jax.jit
        def by_hand(*arrays: Any) -> Any:
            A, B = jax.jacrev(F)(*arrays), jax.jacrev(F, argnums=1)(*arrays)
            return -cho_solve(cho_factor(A, lower=True), B) if symmetric else -lu_solve(lu_factor(A), B)

        return self.timed(lambda: by_hand(*arrays))

    # -- batches -------------------------------------------------------------------------------------
    def batch_rows(self, problem: Penalties, setting: Setting) -> list[Row | Skipped]:
        """Rows against ``jit(vmap(hessian + Cholesky))``."""
        arrays = [self.put(x) for x in (problem.y, problem.theta, problem.cotangent)]
        args = tuple(self.put(x) for x in problem.args)

        def ours(y: Any, theta: Any, v: Any, **more: Any) -> Any:
            return implicit_vjp(ridge, y, theta, v, args=args, **more)

        @jax.jit
        @jax.vmap
        def by_hand(y: Any, theta: Any, v: Any) -> Any:
            u = cho_solve(cho_factor(jax.hessian(ridge)(y, theta, *args)), v)
            return -jax.vjp(lambda t: jax.grad(ridge)(y, t, *args), theta)[1](u)[0]

        ways = self.ways(partial(ours, batched=True), arrays)
        mapped = jax.jit(jax.vmap(ours))
        ways[", our call under jit(vmap)"] = self.timed(lambda: mapped(*arrays))
        bars = {", under jit": 1.2, ", our call under jit(vmap)": 1.2}
        reference = "jit(vmap(hessian + Cholesky))"
        return time_batch(self, ways, self.timed(lambda: by_hand(*arrays)), reference, problem, setting, bars)

    def syncs(self, setting: Setting) -> list[Row | Skipped]:
        reason = "the loops of JAX run on the device, and the host waits for none of it"
        return [self.skipped("host syncs an iteration of cg / one in ten", "", reason)]

    # -- others --------------------------------------------------------------------------------------
    def peers(self, rtol: float) -> list[Peer]:
        """JAXopt, and Lineax through Optimistix."""
        return [*self._jaxopt(rtol), *self._optimistix(rtol)]

    def _jaxopt(self, rtol: float) -> list[Peer]:
        names = ("JAXopt solve_cg under jit", "JAXopt solve_cg, eager", "JAXopt default solver under jit")
        if importlib.util.find_spec("jaxopt") is None:
            return [Peer(name, None, "jaxopt is not installed") for name in names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that it is no longer maintained
            try:
                from jaxopt.implicit_diff import root_vjp
                from jaxopt.linear_solve import solve_cg, solve_normal_cg
            except ImportError as error:
                return [Peer(name, None, f"jaxopt cannot be imported: {error}") for name in names]
        gradient = jax.grad(self.logistic)

        def theirs(solve: Any, W: Any, theta: Any, v: Any, X: Any, Y: Any) -> Any:
            return root_vjp(lambda W, theta: gradient(W, theta, X, Y), W, (theta,), v, partial(solve, tol=rtol))[0]

        by_cg, by_default = partial(theirs, solve_cg), partial(theirs, solve_normal_cg)
        return [
            Peer(names[0], jax.jit(by_cg), against=", under jit"),
            Peer(names[1], by_cg, against=", eager"),
            Peer(names[2], jax.jit(by_default), against=", under jit", bar=None, most=5000),
        ]

    def _optimistix(self, rtol: float) -> list[Peer]:
        name = "Optimistix ImplicitAdjoint(Lineax CG) under jit"
        if importlib.util.find_spec("optimistix") is None:
            return [Peer(name, None, "optimistix is not installed")]
        import lineax
        import optimistix

        # one step of descent, so short that it stays at the solution
        still = optimistix.GradientDescent(learning_rate=1e-30, rtol=1e30, atol=1e30)
        adjoint = optimistix.ImplicitAdjoint(lineax.CG(rtol=rtol, atol=0.0, norm=optimistix.two_norm))
        tags = frozenset({lineax.positive_semidefinite_tag})

        @jax.jit
        def theirs(W: Any, theta: Any, v: Any, X: Any, Y: Any) -> Any:
            def solution(theta: Any) -> Any:
                objective = lambda W, theta: self.logistic(W, theta, X, Y)  # noqa: E731
                return optimistix.minimise(objective, still, W, theta, adjoint=adjoint, tags=tags).value

            return jax.vjp(solution, theta)[1](v)[0]

        return [Peer(name, theirs, against=", under jit")]


def _jax(setting: Setting) -> Jax:
    jax.config.update("jax_enable_x64", True)
    return Jax(setting.device)


def _of_jax(case: Callable[[Framework, Setting], Any]) -> Callable[[Setting], Any]:
    return lambda setting: case(_jax(setting), setting)


OWN = {
    "equilibrium": equilibrium, "networks": networks, "first call": compiling, "restarts": restarts
}  # fmt: skip

CASES = {**cases(_jax), **{name: _of_jax(case) for name, case in OWN.items()}}
