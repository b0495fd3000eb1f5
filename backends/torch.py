"""Torch: derivatives through a solution, and of them, by Torch's own autodiff."""

from __future__ import annotations

from typing import Any

import torch

from implicitdiff.backends.torch_arrays import TorchArrays
from implicitdiff.backends.torch_composable import Composable
from implicitdiff.backends.torch_function import Implicit
from implicitdiff.backends.torch_linearization import TorchLinearization
from implicitdiff.backends.torch_problem import Problem, refuse_recorded
from implicitdiff.backends.torch_system import solve_recorded
from implicitdiff.report import Report
from implicitdiff.system import System

__all__ = ["TorchBackend"]


class TorchBackend(TorchArrays):
    """Backend for Torch tensors, on the CPU and on accelerators."""

    linearization = TorchLinearization

    def custom_derivative(self, function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the solver of an `ImplicitFunction`, and let Torch differentiate what it returns."""
        if torch.compiler.is_compiling():  # a solve is no graph: let the compiler step over it at once
            return torch.compiler.disable(self._recorded)(function, theta, args, kwargs)
        return self._recorded(function, theta, args, kwargs)

    def solve_system(self, system: System) -> tuple[Any, Report]:
        """Solve a linear system, and let Torch differentiate the solution."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(solve_recorded)(system)
        return solve_recorded(system)

    def _recorded(self, function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_recorded(args)
        options = {k: v for k, v in function.options.items() if k != "backend"}
        problem = Problem(self, Composable(), function.condition, options, theta, args, kwargs, function)
        vector = Implicit.apply(problem, *problem.tensors)
        y = problem.y.unravel(vector)
        return (y, problem.aux) if function.has_aux else y
