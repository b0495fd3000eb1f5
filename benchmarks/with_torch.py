"""The cases in Torch."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.frameworks import RTOL, Framework, Peer, cases, time_batch
from benchmarks.measure import Function, Setting, Spread
from benchmarks.networks import networks
from benchmarks.problems import Logistic, Penalties
from benchmarks.qp_layers import qp_layers
from benchmarks.report import Row, Skipped
from implicitdiff import CG, implicit_vjp

__all__ = ["CASES", "Torch", "unavailable"]


def unavailable(setting: Setting) -> str | None:
    """Why nothing can be measured here."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        return "Torch sees no CUDA device"
    return None


def ridge(y: Any, theta: Any, H: Any, c: Any) -> Any:
    """The objective of `problems.Penalties` for one item."""
    return 0.5 * (y @ (H @ y)) + 0.5 * (theta.exp() * y * y).sum() - c @ y


class Torch(Framework):
    """The problems in Torch, and the same work by hand."""

    name = "torch"

    def put(self, x: Any) -> Any:
        return torch.tensor(x, device=self.device)

    def numpy(self, x: Any) -> Any:
        return x.detach().cpu().numpy()

    def timed(self, function: Function) -> Function:
        if self.device == "cpu":
            return function

        def called() -> Any:
            out = function()
            torch.cuda.synchronize()
            return out

        return called

    def ways(self, function: Callable[..., Any], arrays: Any) -> dict[str, Function]:
        return {"": self.timed(lambda: function(*arrays))}

    by_hand = "vmap(KKT matrix + LU)"

    def mapped(self, function: Callable[..., Any], arrays: Any) -> Function:
        return self.timed(lambda: torch.func.vmap(function)(*arrays))

    def logistic(self, W: Any, theta: Any, X: Any, Y: Any) -> Any:
        scores = X @ W
        return (torch.logsumexp(scores, dim=1) - (scores * Y).sum(dim=1)).sum() + 0.5 * theta.exp() @ (W * W).sum(dim=1)

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.func.grad(function)

    def hvp(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def product(y: Any, theta: Any, v: Any, *args: Any) -> Any:
            return torch.func.vjp(lambda y: self.grad(function)(y, theta, *args), y)[1](v)[0]

        return product

    def counted(self, function: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            count.append(1)
            return function(*args)

        return called

    def products(self, function: Callable[..., Any], y: Any, theta: Any, v: Any, *args: Any) -> Callable[[int], Any]:
        y = y.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(y, theta, *args), y, create_graph=True)

        def run(k: int) -> Any:  # the graph is recorded once: the cheapest product that Torch has
            for _ in range(k):
                out = torch.autograd.grad(g, y, v, retain_graph=True)
            return out

        return run

    def jacobian_by_hand(self, function: Any, arrays: Any, *, symmetric: bool) -> Function:
        F = torch.func.grad(function) if symmetric else function

        def by_hand() -> Any:
            A = torch.func.jacrev(F)(*arrays)
            B = torch.func.jacrev(F, argnums=1)(*arrays)
            if symmetric:
                return -torch.cholesky_solve(B, torch.linalg.cholesky(A))
            return -torch.linalg.solve(A, B)

        return self.timed(by_hand)

    # -- batches -------------------------------------------------------------------------------------
    def batch_rows(self, problem: Penalties, setting: Setting) -> list[Row | Skipped]:
        """Rows against a loop of single calls, and against vmap by hand."""
        arrays = [self.put(x) for x in (problem.y, problem.theta, problem.cotangent)]
        args = tuple(self.put(x) for x in problem.args)

        def ours(y: Any, theta: Any, v: Any, **more: Any) -> Any:
            return implicit_vjp(ridge, y, theta, v, args=args, **more)

        def loop() -> Any:
            return torch.stack([ours(*item) for item in zip(*arrays, strict=True)])

        def one(y: Any, theta: Any, v: Any) -> Any:
            A = torch.func.hessian(ridge)(y, theta, *args)
            u = torch.cholesky_solve(v[:, None], torch.linalg.cholesky(A))[:, 0]
            return -torch.func.vjp(lambda t: torch.func.grad(ridge)(y, t, *args), theta)[1](u)[0]

        ways = self.ways(lambda *x: ours(*x, batched=True), arrays)
        by_loop = time_batch(self, ways, self.timed(loop), "loop of single calls", problem, setting, {"": 1 / 3})
        by_hand = self.timed(lambda: torch.func.vmap(one)(*arrays))
        return by_loop + time_batch(self, ways, by_hand, "vmap(hessian + Cholesky)", problem, setting, {})

    # -- others --------------------------------------------------------------------------------------
    def peers(self, rtol: float) -> list[Peer]:
        """TorchOpt, whose backward pass solves with its own CG."""
        name = "TorchOpt solve_cg"
        if importlib.util.find_spec("torchopt") is None:
            return [Peer(name, None, "torchopt is not installed")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses functorch, which Torch has replaced
            try:
                from torchopt.diff.implicit import custom_root
                from torchopt.linear_solve import solve_cg
            except ImportError as error:
                return [Peer(name, None, f"torchopt cannot be imported: {error}")]
        solver = custom_root(self.grad(self.logistic), argnums=1, solve=solve_cg(rtol=rtol))(lambda W, *rest: W)

        def theirs(W: Any, theta: Any, v: Any, X: Any, Y: Any) -> Any:
            theta = theta.detach().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.autograd.grad(solver(W, theta, X, Y), theta, v)[0]

        return [Peer(name, theirs)]

    def syncs(self, setting: Setting) -> list[Row | Skipped]:
        case = "host syncs an iteration of cg / one in ten"
        if self.device != "cuda":
            return [self.skipped(case, "", "no CUDA device: on the CPU the host has nothing to wait for")]
        problem = Logistic(60 if setting.short else 1000)
        arrays = [self.put(x) for x in (problem.W, problem.theta, problem.cotangent, problem.X, problem.Y)]
        ends = [self._syncs(arrays, rtol) for rtol in (1e-3, RTOL)]
        iterations, waits = (b - a for a, b in zip(*ends[:2], strict=True))
        value = implicit_vjp(self.logistic, *arrays[:3], args=tuple(arrays[3:]), solver=CG(rtol=RTOL))
        ratio, facts = waits / (iterations / 10), {"iterations, syncs": ends}
        return [Row(case, f"n = {problem.n}", waits, iterations / 10, Spread(*3 * (ratio,)), 1.0,
                    self.error(value, problem.truth), 1e-6, "syncs", facts, self.name, self.device)]  # fmt: skip

    def _syncs(self, arrays: Any, rtol: float) -> tuple[int, int]:
        """Iterations of a gradient, and how often it waits for the device."""
        W, theta, v, *args = arrays
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                _, report = implicit_vjp(self.logistic, W, theta, v, args=tuple(args), solver=CG(rtol=rtol),
                                         return_report=True)  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return report.iterations, sum("synchroniz" in str(warning.message) for warning in seen)


def _torch(setting: Setting) -> Torch:
    torch.set_num_threads(setting.threads)
    return Torch(setting.device)


CASES = {
    **cases(_torch), "qp layers": lambda setting: qp_layers(_torch(setting), setting),
    "networks": lambda setting: networks(_torch(setting), setting),
}  # fmt: skip
