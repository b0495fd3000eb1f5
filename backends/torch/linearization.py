"""`linearize` and the functions over it, on tensors of which Torch records derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.captured import captured
from implicitdiff.backends.torch.composable import Composable
from implicitdiff.backends.torch.function import Known, Solve, cotangent_of_theta, tangent_of_y
from implicitdiff.backends.torch.problem import (
    RecordedProblem,
    Slots,
    collecting,
    is_recorded,
    refuse_captured,
    refuse_recorded,
    under_transform,
)
from implicitdiff.backends.torch.refusal import owned, with_refused
from implicitdiff.compilers import is_within_compiled
from implicitdiff.conditions.point import Point
from implicitdiff.error_estimate import ErrorControl
from implicitdiff.errors import InputError
from implicitdiff.linearization import Linearization
from implicitdiff.polishing import uncertified
from implicitdiff.problem import Problem
from implicitdiff.pytree import flatten
from implicitdiff.ravel import Raveler
from implicitdiff.solvers.sequences import SequenceState
from implicitdiff.verification.outer import check_outer

if TYPE_CHECKING:
    from implicitdiff.backends.torch.arrays import TorchArrays

__all__ = ["TorchLinearization"]

Tensors = Sequence[Array]


class TorchLinearization(Linearization[Any, Any]):
    """A linearisation whose products Torch differentiates where it records y, θ or the vector.

    y and θ are then independent of each other, as they are as arguments. The numbers are those of the core. Only under
    a transform of ``torch.func``, which hides the numbers, are they made by the functions that compose.
    """

    def __init__(self, problem: Problem) -> None:
        refuse_recorded(problem.args)
        self._recording = RecordedProblem(problem, Composable(), {})
        self._engine = collecting(cast("TorchArrays", problem.backend))
        refuse_captured(problem.condition)
        if under_transform():
            self.y, self.theta, self._run = problem.y, problem.theta, None
        else:
            super().__init__(replace(problem, backend=self._engine))
        self._asked = problem

    def _product(self, mode: str, direction: Any, x0: Any, control: ErrorControl) -> Any:
        if isinstance(x0, SequenceState) and under_transform():
            raise InputError(
                "a state is given under a transform of torch.func, which hides the numbers that it would hold.\n"
                "Next: take the derivative outside, with batched=True where there are several problems."
            )
        if mode == "gradient":
            refuse_captured(direction)
            if under_transform():
                check_outer(direction, self._engine, self._recording.problem.y, self._recording.problem.theta, None)
        vector = direction if mode in {"vjp", "jvp"} else ()
        rule = partial(getattr(self, f"_{mode}"), direction)
        numbers = super()._product
        return self._recorded(rule, vector, lambda: numbers(mode, direction, x0, control), control)

    # -- the modes, of functions that compose ----------------------------------------------------------
    def _vjp(self, _: Any, point: Point, tensors: Tensors, cotangent: Any) -> Any:
        v = point.y.like(cotangent, "cotangent", dtype=point.y.dtype)
        return point.theta.unravel(cotangent_of_theta(self._recording, point.y.vector, v, tensors))

    def _jvp(self, _: Any, point: Point, tensors: Tensors, tangent: Any) -> Any:
        t = point.theta.like(tangent, "tangent", dtype=point.theta.dtype)
        return point.y.unravel(tangent_of_y(self._recording, point.y.vector, t, tensors))

    def _jacobian(self, _: Any, point: Point, tensors: Tensors, __: Any) -> Any:
        maps = self._recording.composed(point.y.vector, tensors)[1]
        columns = Solve.apply(self._recording, False, point.y.vector, -maps.B.dense().movedim(-1, 0), *tensors)
        columns = columns if maps.embedding is None else maps.embedding.restrict(columns)
        return point.nest(columns.movedim(0, -1))

    def _gradient(self, outer: Any, point: Point, tensors: Tensors, _: Any) -> Any:
        loss = point.scalar_function(outer, "outer", args=())
        by_y, by_theta, _ = point.backend.gradients(loss, point.y.vector, point.theta.vector)
        return point.theta.unravel(by_theta + cotangent_of_theta(self._recording, point.y.vector, by_y, tensors))

    def _recorded(
        self, rule: Callable[..., Any], vector: Any, numbers: Callable[[], Any], control: ErrorControl
    ) -> Any:
        """Return the numbers, with the rule to differentiate them by where somebody may ask."""
        y, v, problem = Slots(self.y), Slots(vector), self._recording

        def function(*tensors: Array) -> Any:
            at, rest = tensors[: y.count], tensors[y.count :]
            point = self._point_at(y.filled(at), rest[v.count :])
            return rule(point, rest[v.count :], v.filled(rest[: v.count]))

        inputs = (*y.tensors, *v.tensors, *problem.tensors)
        if under_transform():
            if control.wanted:
                raise uncertified("a transform of torch.func")
            found = function(*inputs)
            self._shown = problem.report
            return found
        found = numbers()
        tree, tensors = flatten(found), self._engine.captures.tensors
        if control.wanted:
            recorded = [x for x in (*inputs, *tensors) if is_recorded(x)]
            return with_refused(found, recorded, lambda: uncertified("a derivative of the derivative"))
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
        problem = self._recording
        engine, batched = problem.composable, problem.batched
        raveler = Raveler(engine, y, "y", batched)
        problem.y = raveler.structure()
        theta = Raveler(engine, problem.theta.filled(problem.split(tensors)[0]), "theta", batched)
        raveler.check_partner(theta)
        return Point(engine, raveler, theta, ())
