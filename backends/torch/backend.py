"""Torch: derivatives through a solution, and of them, by Torch's own autodiff."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.arrays import TorchArrays
from implicitdiff.backends.torch.captured import captured
from implicitdiff.backends.torch.composable import Composable
from implicitdiff.backends.torch.function import Implicit
from implicitdiff.backends.torch.group import Group
from implicitdiff.backends.torch.linearization import TorchLinearization
from implicitdiff.backends.torch.outside import Outside
from implicitdiff.backends.torch.problem import RecordedProblem, is_recorded, refuse_captured, refuse_recorded
from implicitdiff.backends.torch.refusal import owned, with_refused
from implicitdiff.backends.torch.system import solve_recorded
from implicitdiff.errors import DerivativeError
from implicitdiff.linalg.system import System
from implicitdiff.linearization import Linearization
from implicitdiff.outcome import Report
from implicitdiff.problem import problem_of

__all__ = ["TorchBackend"]


class TorchBackend(TorchArrays):
    """Backend for Torch tensors, on the CPU and on accelerators.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or True, optional
        Processes that hold a part of the data each (True: all of them). The condition is then the sum over them of each
        one's, and the loss likewise; y, theta and the results are the same everywhere. Every process makes the same
        calls. The results are numbers, which Torch does not differentiate again.
    """

    linearization: Any = TorchLinearization

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.group = None if group is None else Group(group)
        if self.group is not None:
            self.linearization = Linearization

    # -- the sum over a group ------------------------------------------------------------------------
    def combined(self, maps: Any, y: Array, theta: Array) -> Any:
        if self.group is None:
            return maps
        self.group.check_same("y", y)
        self.group.check_same("theta", theta)
        return self.group.summed(maps)

    def local(self, y: Any, theta: Any) -> bool:
        return self.group is None and super().local(y, theta)

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        by_y, by_theta, kind = super().gradients(function, y, theta)
        return (by_y, by_theta, kind) if self.group is None else (self.group.sum(by_y), self.group.sum(by_theta), kind)

    def linear(self, prepared: Any, b: Any, x0: Any, transposed: bool) -> Any:
        if self.group is not None:
            self.group.check_same("the right-hand side (the cotangent)", b)
        return prepared.solve(b, x0, transposed)

    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        # Where to stop follows from numbers that are the same everywhere, up to the last bit: on different hardware one
        # process might stop a step before the others, which would wait for it for ever.
        group = self.group
        agreed = cond if group is None else (lambda s: group.any(cond(s)))
        return super().while_loop(agreed, body, state, limit)

    def if_any(self, wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
        wanted = wanted if self.group is None else self.group.any(self.xp.any(self.xp.asarray(wanted)))
        return super().if_any(wanted, function, value)

    # -- derivatives of the solution -------------------------------------------------------------------

    def custom_derivative(self, function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the solver of an `ImplicitFunction`, and let Torch differentiate what it returns."""
        if self.group is not None:
            if is_recorded((theta, args, kwargs)):
                raise DerivativeError(
                    "the solution is a sum's over a process group, and Torch cannot differentiate it by itself.\n"
                    "Next: detach theta here, and use .vjp, .jvp or .linearize of this function, or implicit_grad."
                )
            return function.run(theta, args, kwargs)
        return self._recorded(function, theta, args, kwargs)

    def outside(
        self, function: Callable[..., Sequence[Any]], arrays: Sequence[Array], shapes: Sequence[tuple[int, ...]]
    ) -> list[Array]:
        return list(Outside.apply(function, *(x.detach() for x in arrays)))

    def solve_system(self, system: System) -> tuple[Any, Report]:
        """Solve a linear system, and let Torch differentiate the solution."""
        return solve_recorded(system)

    def _recorded(self, function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_recorded(args)
        refuse_captured(function.condition)
        options = {**function.options, "backend": self}
        bare = problem_of(function.condition, None, theta, args=args, **options)
        problem = RecordedProblem(bare, Composable(), kwargs, function)
        vector = Implicit.apply(problem, *problem.tensors)
        y = owned(problem.y.unravel(with_refused(vector, problem.captured(vector), captured)))
        return (y, with_refused(problem.aux, problem.theta.tensors, _aux_refused)) if function.has_aux else y


def _aux_refused() -> DerivativeError:
    """Build the error for a derivative of what a solver returned beside its solution."""
    return DerivativeError(
        "a derivative of the solver's aux is asked for, and the solver is a black box: it would come out as zero.\n"
        "Next: detach aux; or give it as a function, has_aux=fun with fun(y, theta, *args), and return y alone."
    )
