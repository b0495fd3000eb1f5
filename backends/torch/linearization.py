"""`linearize` and the functions over it, on tensors of which Torch records derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.captured import captured
from implicitdiff.backends.torch.composable import Composable
from implicitdiff.backends.torch.function import Known, Solve, pull, push
from implicitdiff.backends.torch.problem import (
    Problem,
    Slots,
    collecting,
    is_recorded,
    refuse_captured,
    refuse_recorded,
    under_transform,
)
from implicitdiff.backends.torch.refusal import owned, with_refused
from implicitdiff.compilers import is_within_compiled, untraced
from implicitdiff.conditions.point import Point
from implicitdiff.linearization import Linearization
from implicitdiff.outcome import check_mode
from implicitdiff.pytree import flatten
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Task
from implicitdiff.verification.outer import check_outer

__all__ = ["TorchLinearization"]

Tensors = Sequence[Array]


class TorchLinearization(Linearization[Any, Any]):
    """A linearisation whose products Torch differentiates where it records y, θ or the vector.

    y and θ are then independent of each other, as they are as arguments. The numbers are those of the core. Only under
    a transform of ``torch.func``, which hides the numbers, are they made by the functions that compose.
    """

    def __init__(
        self, condition: Any, y: Any, theta: Any, *, args: tuple[Any, ...] = (), solver: Any = "auto",
        on_failure: str = "raise", backend: Any = None, batched: bool = False, copy: bool = False,
        on_report: Any = None,
    ) -> None:  # fmt: skip
        check_mode(on_failure)
        refuse_recorded(args)
        options = {"solver": solver, "on_failure": on_failure, "batched": batched, "on_report": on_report}
        self.y, self.theta, self._run = y, theta, None
        self._task = Task(backend, condition, y, theta, args, solver, on_failure, batched, copy, on_report)
        self._problem = Problem(backend, Composable(), condition, options, theta, args, {})
        self._engine = collecting(backend)
        refuse_captured(condition)
        if not under_transform():
            super().__init__(condition, y, theta, args=args, backend=self._engine, copy=copy, **options)
        self._origin = backend

    @untraced
    def vjp(self, cotangent: Any, *, x0: Array | None = None) -> Any:
        def rule(point: Point, tensors: Tensors, cotangent: Any) -> Any:
            v = point.y.like(cotangent, "cotangent", dtype=point.y.dtype)
            return point.theta.unravel(pull(self._problem, point.y.vector, v, tensors))

        return self._recorded(rule, cotangent, lambda: super(TorchLinearization, self).vjp(cotangent, x0=x0))

    @untraced
    def jvp(self, tangent: Any, *, x0: Array | None = None) -> Any:
        def rule(point: Point, tensors: Tensors, tangent: Any) -> Any:
            t = point.theta.like(tangent, "tangent", dtype=point.theta.dtype)
            return point.y.unravel(push(self._problem, point.y.vector, t, tensors))

        return self._recorded(rule, tangent, lambda: super(TorchLinearization, self).jvp(tangent, x0=x0))

    @untraced
    def jacobian(self) -> Any:
        def rule(point: Point, tensors: Tensors, _: Any) -> Any:
            maps = self._problem.composed(point.y.vector, tensors)[1]
            columns = Solve.apply(self._problem, False, point.y.vector, -maps.B.dense().movedim(-1, 0), *tensors)
            columns = columns if maps.embedding is None else maps.embedding.restrict(columns)
            return point.nest(columns.movedim(0, -1))

        return self._recorded(rule, (), super().jacobian)

    @untraced
    def gradient(self, outer: Any, x0: Array | None = None) -> Any:
        def rule(point: Point, tensors: Tensors, _: Any) -> Any:
            loss = point.scalar_function(outer, "outer", args=())
            by_y, by_theta, _ = point.backend.gradients(loss, point.y.vector, point.theta.vector)
            return point.theta.unravel(by_theta + pull(self._problem, point.y.vector, by_y, tensors))

        refuse_captured(outer)
        if under_transform():
            check_outer(outer, self._engine, self.y, self.theta, None)
        return self._recorded(rule, (), lambda: super(TorchLinearization, self).gradient(outer, x0))

    def _recorded(self, rule: Callable[..., Any], vector: Any, numbers: Callable[[], Any]) -> Any:
        """Return the numbers, with the rule to differentiate them by where somebody may ask."""
        y, v, problem = Slots(self.y), Slots(vector), self._problem

        def function(*tensors: Array) -> Any:
            at, rest = tensors[: y.count], tensors[y.count :]
            point = self._point_at(y.filled(at), rest[v.count :])
            return rule(point, rest[v.count :], v.filled(rest[: v.count]))

        inputs = (*y.tensors, *v.tensors, *problem.tensors)
        if under_transform():
            found = function(*inputs)
            self._shown = problem.report
            return found
        found = numbers()
        tree, tensors = flatten(found), self._engine.captures.tensors
        if any(map(is_recorded, inputs)):
            outputs = Known.apply(
                lambda *x: tuple(flatten(function(*x)).leaves), len(tree.leaves), *tree.leaves, *inputs
            )
            found = tree.unflatten(outputs)
        elif not tensors:
            return found
        found = with_refused(found, tensors, captured)
        return owned(found) if is_within_compiled() else found

    def _point_at(self, y: Any, tensors: Sequence[Array]) -> Point:
        """Ravel y and θ without detaching them."""
        problem = self._problem
        engine, batched = problem.composable, problem.options["batched"]
        raveler = Raveler(engine, y, "y", batched)
        problem.y = raveler.structure()
        theta = Raveler(engine, problem.theta.filled(problem.split(tensors)[0]), "theta", batched)
        raveler.check_partner(theta)
        return Point(engine, raveler, theta, ())
