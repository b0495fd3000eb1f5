"""One problem as the functions of `torch_function` see it: its trees as tensors, and back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from implicitdiff.arrays import Array
from implicitdiff.backends.torch.autograd import recordable
from implicitdiff.backends.torch.captured import Captures, RefusedCaptures, captured
from implicitdiff.closures import sees
from implicitdiff.conditions import as_condition
from implicitdiff.conditions.base import Maps
from implicitdiff.conditions.point import Point
from implicitdiff.errors import DerivativeError, InputError
from implicitdiff.linearization import Linearization
from implicitdiff.polishing import refused_twice, uncertified
from implicitdiff.problem import Problem
from implicitdiff.pytree import flatten, map_leaves
from implicitdiff.ravel import Raveler
from implicitdiff.solvers import get_solver

if TYPE_CHECKING:
    from implicitdiff.backends.torch.arrays import TorchArrays

__all__ = [
    "RecordedProblem", "Slots", "collecting", "is_recorded", "refuse_captured", "refuse_recorded", "under_transform",
]  # fmt: skip


def is_recorded(tree: Any) -> bool:
    """Whether Torch is recording derivatives with respect to a tensor of the tree."""
    return any(isinstance(leaf, torch.Tensor) and _is_recorded(leaf) for leaf in flatten(tree).leaves)


def _is_recorded(x: Array) -> bool:
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
    return (torch.is_grad_enabled() and x.requires_grad) or tangent is not None


def under_transform() -> bool:
    """Whether this runs under a transform of ``torch.func``, where tensors may be more than they seem."""
    return bool(torch._C._are_functorch_transforms_active())


def plain(x: Array) -> Array:
    """Detach, and tell what to use where Torch maps over numbers by the vmap from before ``torch.func``."""
    try:
        return x.detach()
    except RuntimeError as error:
        if "Batching rule" not in str(error):
            raise
        raise DerivativeError(
            "is_grads_batched=True and vectorize=True of torch.autograd map over a solve in a way that it cannot see.\n"
            "Next: use torch.func.jacrev or jacfwd, or vectorize=False."
        ) from None


def refuse_recorded(args: tuple[Any, ...]) -> None:
    """Raise where a derivative with respect to data is asked for, which would come out as zero."""
    flat = flatten(args)
    for i, leaf in enumerate(flat.leaves):
        if isinstance(leaf, torch.Tensor) and _is_recorded(leaf):
            raise InputError(
                f"{flat.path(i, 'args')} requires a gradient, and args are data that is not differentiated.\n"
                "Next: pass it in theta, or detach it."
            )


def refuse_captured(*functions: Any) -> None:
    """Raise for a recorded tensor in sight of a function where no graph would tell whether it is used: in a transform.

    Parameters
    ----------
    *functions
        Conditions, and other functions of the user.
    """
    if not (under_transform() or torch.autograd.forward_ad._current_level >= 0):
        return
    if torch.is_grad_enabled() and sees(_parts(functions), _is_tensor_or_module, _is_recorded_tensor):
        raise captured()


def _in_sight(condition: Any) -> bool:
    """Whether a condition sees a recorded tensor, or a module that has some."""
    return sees(_parts((condition,)), _is_tensor_or_module, _is_recorded_tensor_or_module)


def _parts(functions: Sequence[Any]) -> list[Any]:
    return [part for f in functions for part in (vars(f).values() if hasattr(f, "maps") else (f,))]


def _is_tensor_or_module(x: Any) -> bool:
    return isinstance(x, (torch.Tensor, torch.nn.Module))


def _is_recorded_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and _is_recorded(x)


def _is_recorded_tensor_or_module(x: Any) -> bool:
    return _is_recorded_tensor(x) or (isinstance(x, torch.nn.Module) and any(map(_is_recorded, x.parameters())))


def collecting(backend: TorchArrays) -> Any:
    """Return a backend of the same kind that collects what functions capture."""
    engine = copy.copy(backend)
    engine.captures = Captures()
    return engine


class Slots:
    """A tree of which the tensors can be replaced.

    Parameters
    ----------
    tree : pytree
        Of tensors and other leaves.
    """

    def __init__(self, tree: Any) -> None:
        self._tree = flatten(tree)
        self._at = [i for i, leaf in enumerate(self._tree.leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [recordable(self._tree.leaves[i]) for i in self._at]
        self.count = len(self.tensors)

    def tensors_of(self, tree: Any) -> list[Array]:
        """Return the leaves of another tree of the same structure, where this one has tensors."""
        leaves = flatten(tree).leaves
        return [leaves[i] for i in self._at]

    def filled(self, tensors: Sequence[Any]) -> Any:
        """Return the tree with other tensors."""
        leaves = list(self._tree.leaves)
        for i, x in zip(self._at, tensors, strict=True):
            leaves[i] = x
        return self._tree.unflatten(leaves)


class RecordedProblem:
    """A condition with its parameters and data.

    Parameters
    ----------
    problem : Problem
        y need not be known.
    composable : Backend
        For what is differentiated again.
    kwargs : dict
        For the solver alone.
    function : ImplicitFunction, optional
        The solver.
    """

    def __init__(
        self, problem: Problem, composable: Any, kwargs: dict[str, Any], function: Any = None
    ) -> None:  # fmt: skip
        self.engine: Any = problem.backend
        self.problem, self.composable, self.function = problem, composable, function
        self.captures: list[Array] = []
        if torch.is_grad_enabled():
            self.engine = copy.copy(self.engine)
            self.engine.captures = RefusedCaptures(self.captures)
        self.condition, self.batched = as_condition(problem.condition), problem.batched
        self.theta, self.data = Slots(problem.theta), Slots((problem.args, kwargs))
        self.tensors = (*self.theta.tensors, *self.data.tensors)
        self.y: Any = None  # a Raveler: the structure of y, once it is known
        self.aux: Any = None
        self.report: Any = None
        self._recording = torch.is_grad_enabled()
        self._latest: tuple[list[Any], Linearization[Any, Any]] | None = None
        self._collected: list[Any] | None = None

    # -- trees and tensors ---------------------------------------------------------------------------
    def split(self, tensors: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Return the tensors of θ, and those of the data."""
        return tensors[: self.theta.count], tensors[self.theta.count :]

    def _trees(self, tensors: Sequence[Array]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        theta, data = self.split(tensors)
        args, kwargs = self.data.filled(data)
        return self.theta.filled(theta), args, kwargs

    def theta_vector(self, tensors: Sequence[Array], tangents: Sequence[Array | None]) -> Array:
        """Ravel a tangent of θ; None stands for zeros."""
        parts = [torch.zeros_like(x) if t is None else t for x, t in zip(tensors, tangents, strict=True)]
        tree = self.theta.filled(parts[: self.theta.count])
        return self._theta_raveler(map_leaves(lambda leaf: 0.0 if isinstance(leaf, float) else leaf, tree)).vector

    def unraveled(self, g: Array, tensors: Sequence[Array]) -> list[Array]:
        """Turn a cotangent of θ into one for each tensor."""
        theta = self.theta.filled(tensors[: self.theta.count])
        raveler = Raveler(self.composable, theta, "theta", self.batched, bare=True)
        return self.theta.tensors_of(raveler.unravel(g))

    def _theta_raveler(self, theta: Any) -> Raveler:
        return Raveler(self.composable, theta, "theta", self.batched)

    # -- numbers, from plain tensors -----------------------------------------------------------------
    def run(self, tensors: Sequence[Array]) -> Array:
        """Run the solver, and return y raveled, in memory of its own."""
        theta, args, kwargs = self._trees([plain(x) for x in tensors])
        with torch.set_grad_enabled(self._recording):
            out = self.function.run(theta, args, kwargs)
        y, self.aux = out if self.function.has_aux else (out, None)
        if self._collected is not None:
            self._collected.append(self.aux)
        elif self.function.has_aux:
            self.condition = as_condition(self.problem.condition).received(self.aux)
        device = next((x.device for x in tensors), None)
        with self.function.explaining(y), self.engine.computing():
            y = map_leaves(lambda leaf: _tensor(leaf, device), y)
            raveler = Raveler(self.engine, y, "y", self.batched, copy=True)
        self.y = raveler.structure()  # the vector is about to hold on to this problem
        return raveler.vector

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what the solver returns beside y in a list, one for each call."""
        outer, self._collected = self._collected, []
        yield
        self.aux, self._collected = self._collected, outer

    def _linearized(self, y: Array, tensors: Sequence[Array], *, shared: bool = False) -> Linearization[Any, Any]:
        theta, args, _ = self._trees([plain(x) for x in tensors])
        engine = self.engine
        if shared:  # the right-hand side comes from `composed`
            engine = copy.copy(engine)
            engine.shared = True
        at = {
            "condition": self.condition,
            "backend": engine,
            "y": self.y.unravel(y.detach()),
            "theta": theta,
            "args": args,
        }
        return Linearization(replace(self.problem, **at))

    def pullback(self, y: Array, v: Array, tensors: Sequence[Array]) -> Array:
        """−Bᵀ A⁻ᵀ v, raveled."""
        lin, v = self._linearized(y, tensors), plain(v)
        if v.ndim > y.ndim:
            return lin.pullback(v)
        return self.function.past.product(lin, "pullback", lambda x0: lin.pullback(v, x0), traced=False)

    def solve(self, y: Array, b: Array, tensors: Sequence[Array], *, transposed: bool) -> Array:
        """A⁻¹ b or A⁻ᵀ b; one factorisation serves all the solves of one point."""
        if self.problem.settings.control.wanted:
            raise uncertified("a second derivative, or one in forward mode or under torch.func,")
        held = [(x.data_ptr(), x._version, x.detach()) for x in (y, *tensors)]
        if self._latest is None or [h[:2] for h in self._latest[0]] != [h[:2] for h in held]:
            self._latest = held, self._linearized(y, tensors, shared=True)
        lin = self._latest[1]
        if "finite differences" in lin.derivatives.values():
            raise DerivativeError(
                "a derivative of the derivative is asked for, and the condition is known by finite differences only.\n"
                "Likely cause: a function of the condition leaves Torch (NumPy, detach).\n"
                "Next: write it in Torch throughout, or ask for first derivatives only."
            )
        x = lin.solve(plain(b), transposed=transposed)
        self.report = lin.report
        return x.clone()  # what is returned gets to know this problem, and the report holds x

    def refuse_approximation(self) -> None:
        """Raise where a solution is differentiated that is an approximation, or one of many."""
        error = refused_twice(get_solver(self.problem.settings.solver), self.condition)
        if error is not None:
            raise error

    def captured(self, y: Array) -> list[Array]:
        """Return the recorded tensors that the condition uses beside its arguments, where it sees some.

        To see one tells nothing: it may be detached, or a module be called with what theta holds (``functional_call``).
        So the functions that the user wrote are asked, once each.
        """
        if not self._recording or not _in_sight(self.condition):
            return []
        captures = Captures()
        try:
            for value in self._values(plain(y), [plain(x) for x in self.tensors]):
                captures.see(value)
        except Exception:  # what is wrong with a function is told where its derivative is asked for
            return []
        self.captures.extend(captures.tensors)
        return self.captures

    def _values(self, y: Array, tensors: Sequence[Array]) -> Iterator[Array]:
        """F at a point, and the products that the user gave."""
        point, maps = self.composed(y, tensors)
        if maps.at is not None:
            yield maps.at(point.y.vector, point.theta.vector)
        u = y.new_ones((*point.items, maps.B.rows))
        if maps.A.kind != "autodiff":
            yield maps.A.matvec(u)
        if maps.B.kind != "autodiff":
            yield maps.B.rmatvec(u)

    # -- products that are differentiated again ------------------------------------------------------
    def composed(self, y: Array, tensors: Sequence[Array]) -> tuple[Point, Maps]:
        """Return the point and the maps of F there, as functions of y and θ."""
        if self.condition.follows and self.condition.singular == "minimum-norm":
            raise DerivativeError(
                "singular='minimum-norm' follows the solution of least norm, whose derivative is not differentiated "
                "again.\nNext: ask for first derivatives, outside of the transforms of torch.func."
            )
        theta, args, _ = self._trees(tensors)
        raveler = copy.copy(self.y)
        raveler.backend, raveler.vector = self.composable, y
        point = Point(self.composable, raveler, self._theta_raveler(theta), args, self.problem.axes.mapped)
        return point, self.condition.maps(point)


def _tensor(leaf: Any, device: Any) -> Any:
    """Turn what came from NumPy into a tensor."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(leaf)).to(device)
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
