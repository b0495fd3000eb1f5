"""What moves θ: Adam and gradient descent on vectors of any framework, and the optimisers of the frameworks.

Every optimiser is a pure function: its state goes in and comes out, so that a loop may be saved, resumed and compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError, UnknownNameError
from implicitdiff.ravel import Raveler

__all__ = ["SCIPY", "Optimizer", "optimizer_of"]

SCIPY = ("L-BFGS-B", "SLSQP")
"""Methods of SciPy, which run the whole loop themselves."""
RATE = 0.1
"""Step of Adam and of gradient descent where none is given: parameters of an outer problem are often logarithms."""


class Optimizer(Protocol):
    """A rule for θ on vectors."""

    def init(self, theta: Array) -> Any:
        """State before the first step."""

    def update(self, theta: Array, gradient: Array, state: Any) -> tuple[Array, Any]:
        """θ and the state after a step."""


class _Moments(NamedTuple):
    count: Array
    first: Array
    second: Array


@dataclass(frozen=True)
class _Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980), with its usual constants."""

    xp: Any
    rate: float

    def init(self, theta: Array) -> _Moments:
        zero = self.xp.zeros_like(theta)
        return _Moments(self.xp.sum(zero), zero, self.xp.zeros_like(theta))

    def update(self, theta: Array, gradient: Array, state: _Moments) -> tuple[Array, _Moments]:
        count = state.count + 1
        first = 0.9 * state.first + 0.1 * gradient
        second = 0.999 * state.second + 0.001 * gradient * gradient
        step = first / (1 - 0.9**count) / (self.xp.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return theta - self.rate * step, _Moments(count, first, second)


@dataclass(frozen=True)
class _Descent:
    """Gradient descent."""

    rate: float

    def init(self, theta: Array) -> tuple[()]:
        return ()

    def update(self, theta: Array, gradient: Array, state: Any) -> tuple[Array, Any]:
        return theta - self.rate * gradient, state


@dataclass(frozen=True)
class _Transformation:
    """``init(params)`` and ``update(gradient, state, params) -> (updates, state)``, as optax has them."""

    rule: Any
    theta: Raveler

    def init(self, theta: Array) -> Any:
        return self.rule.init(self.theta.unravel(theta))

    def update(self, theta: Array, gradient: Array, state: Any) -> tuple[Array, Any]:
        unravel = self.theta.unravel
        updates, state = self.rule.update(unravel(gradient), state, unravel(theta))
        return theta + self.theta.like(updates, "updates of the optimizer", dtype=self.theta.dtype), state


@dataclass(frozen=True)
class _Factory:
    """``factory(parameters) -> optimizer`` with ``step`` and ``state_dict``, as Torch has them."""

    factory: Callable[..., Any]
    theta: Raveler
    options: dict[str, Any]

    def _made(self, theta: Array) -> tuple[list[Any], Any]:
        backend, raveler = self.theta.backend, self.theta
        pairs = zip(raveler.parts(theta), raveler.leaves, strict=True)
        leaves = [backend.xp.asarray(backend.reshape(part, leaf.shape), copy=True) for part, leaf in pairs]
        made = self.factory(leaves, **self.options)
        if not all(hasattr(made, name) for name in ("step", "state_dict", "load_state_dict")):
            raise InputError(
                f"optimizer(parameters) returned {type(made).__name__}, which has no step and no state_dict.\n"
                "Next: give a factory such as functools.partial(torch.optim.Adam, lr=0.1), or a name."
            )
        return leaves, made

    def init(self, theta: Array) -> Any:
        return copy.deepcopy(self._made(theta)[1].state_dict())

    def update(self, theta: Array, gradient: Array, state: Any) -> tuple[Array, Any]:
        raveler, backend = self.theta, self.theta.backend
        leaves, made = self._made(theta)
        made.load_state_dict(copy.deepcopy(state))
        for leaf, part, form in zip(leaves, raveler.parts(gradient), raveler.leaves, strict=True):
            leaf.grad = backend.xp.asarray(backend.reshape(part, form.shape), copy=True)
        made.step()
        moved = raveler.like(raveler.tree.unflatten(leaves), "theta", dtype=raveler.dtype)
        return backend.detached(backend.xp.asarray(moved, copy=True)), copy.deepcopy(made.state_dict())


def optimizer_of(optimizer: Any, theta: Raveler, learning_rate: float | None) -> Optimizer:
    """Return the rule that an argument names, or is.

    Raises
    ------
    UnknownNameError
        For a name that is none.
    InputError
        For anything else that is no optimiser, or a rate that has no place.
    """
    rate = RATE if learning_rate is None else learning_rate
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise InputError(f"learning_rate = {learning_rate!r}: expected a positive number.")
    if optimizer == "adam":
        return _Adam(theta.backend.xp, rate)
    if optimizer == "sgd":
        return _Descent(rate)
    if isinstance(optimizer, str):
        raise UnknownNameError(f"optimizer = {optimizer!r}: expected adam, sgd, {', '.join(SCIPY)}, or an optimizer.")
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        if learning_rate is not None:
            raise InputError("learning_rate is given beside an optimizer that has its own: give one of the two.")
        return _Transformation(optimizer, theta)
    if callable(optimizer):
        return _Factory(optimizer, theta, {} if learning_rate is None else {"lr": learning_rate})
    raise InputError(
        f"optimizer is {type(optimizer).__name__}.\n"
        "Expected a name, an optax transformation, or a factory that takes parameters, as torch.optim.Adam does."
    )
