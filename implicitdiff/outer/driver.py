"""The public loop: `bilevel` and `Bilevel`, its progress, history, warnings and result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from implicitdiff.compilers import untraced
from implicitdiff.errors import AccuracyWarning, InputError, SolveWarning
from implicitdiff.outcome import Status, warn
from implicitdiff.outer.history import History, HistoryRow
from implicitdiff.outer.loop import Steps
from implicitdiff.outer.optimizers import SCIPY
from implicitdiff.outer.schedules import Schedule, Sweep, as_schedule
from implicitdiff.outer.state import BilevelState
from implicitdiff.outer.whole import CAUSES, minimize_whole
from implicitdiff.pytree import flatten
from implicitdiff.records import Record, brief

__all__ = ["Bilevel", "BilevelResult", "bilevel"]

DEFAULT = Sweep(0.1)


@dataclass(frozen=True, eq=False, repr=False)
class BilevelResult(Record):
    """What a bilevel loop came to.

    Attributes
    ----------
    y : pytree
        The inner solution at ``theta``, to the tolerance of the loop; of `SOBA` and `SABA`, where it has moved to.
    theta : pytree
        The parameters.
    status : Status
        ``CONVERGED`` where every gradient came to its tolerance, ``MAX_ITERATIONS`` where one did not; ``NON_FINITE``
        where the loop stopped before one that is not finite; ``APPROXIMATE`` of `SOBA` and `SABA`, which have none. Of
        SciPy's optimizers: where they say so, where they do not, and ``STAGNATED`` where the gradient at their end
        missed its tolerance.
    history : History
        One row for each step; ``.table()``, ``.plot()``, ``.save(path)``.
    state : BilevelState
        What the next step would start from: ``bilevel(…, resume=state)`` goes on as if it had not stopped.
    message : str
        What is to be said of the status.
    """

    y: Any
    theta: Any
    status: Status
    history: History
    state: Any = field(compare=False)
    message: str = ""

    def __repr__(self) -> str:
        value = f", outer value {self.history[-1].value:.6g}" if len(self.history) else ""
        return f"BilevelResult({self.status.name}, {len(self.history)} steps{value}, theta={brief(self.theta)})"


@dataclass(frozen=True, eq=False, repr=False)
class Bilevel(Record):
    """A bilevel loop whose steps are taken one by one: ``init`` makes a state, ``step`` the next from it.

    Both are pure. Under JAX they are compiled, and may be called from within ``jit`` and ``lax.scan``.

    Parameters
    ----------
    condition, outer, args, inner, optimizer, learning_rate, steps, tolerance, solver, project, bounds
        See `bilevel`.
    callback, progress, resume, constraints
        See `bilevel`; for ``run``.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Bilevel
    >>> loop = Bilevel(lambda y, t: ((y - t) ** 2).sum(), lambda y, t: ((y - 3) ** 2).sum(), learning_rate=0.5)
    >>> state = loop.init(np.zeros(1), np.zeros(1))
    >>> for _ in range(3):
    ...     state = loop.step(state)
    >>> np.round(state.theta, 3), int(state.step)
    (array([1.482]), 3)
    """

    condition: Any
    outer: Any
    args: tuple[Any, ...] = ()
    inner: Any = "newton-cg"
    optimizer: Any = "adam"
    learning_rate: float | None = None
    steps: int = 100
    tolerance: Schedule = DEFAULT
    solver: Any = "auto"
    project: Callable[[Any], Any] | None = None
    bounds: Any = None
    callback: Callable[[BilevelState], Any] | None = None
    progress: bool = False
    resume: BilevelState | None = None
    constraints: Any = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise InputError(f"steps = {self.steps!r}: expected a whole number, 0 or more.")
        if self.callback is not None and not callable(self.callback):
            raise InputError(f"callback is {type(self.callback).__name__}; expected a callable of the state.")
        if self.resume is not None and not isinstance(self.resume, BilevelState):
            raise InputError(f"resume is {type(self.resume).__name__}; expected the state of an earlier loop.")
        if self.constraints and self.optimizer != "SLSQP":
            raise InputError("constraints of theta are for optimizer='SLSQP'.\nNext: use it, or project, or bounds.")
        _ = self._steps

    @cached_property
    def _steps(self) -> Steps:
        tolerance = as_schedule(self.tolerance)
        if self._whole:
            names = ("learning_rate", "project", "resume")
            given = [name for name in names if getattr(self, name) is not None]
            if given:
                raise InputError(f"{', '.join(given)}: optimizer={self.optimizer!r} runs the whole loop, and has none.")
            if not tolerance.solves:
                raise InputError(f"optimizer={self.optimizer!r} compares values; batches have others.\nNext: 'sgd'.")
        optimizer = "sgd" if self._whole else self.optimizer
        tolerance = tolerance.comparable() if self._whole else tolerance
        return Steps(
            self.condition, self.outer, tuple(self.args), self.inner, optimizer, self.learning_rate, tolerance,
            self.solver, self.project, None if self._whole else self.bounds,
        )  # fmt: skip

    @property
    def _whole(self) -> bool:
        return isinstance(self.optimizer, str) and self.optimizer in SCIPY

    @untraced
    def init(self, y0: Any, theta0: Any) -> BilevelState:
        """State before the first step.

        Parameters
        ----------
        y0, theta0 : pytree
            Where the inner problem and the loop start; y0 need not be a solution.

        Returns
        -------
        BilevelState

        Raises
        ------
        ImplicitDiffError
            For what is wrong with an argument, as in `implicit_grad`.
        """
        return self._steps.init(y0, theta0)

    @untraced
    def step(self, state: BilevelState) -> BilevelState:
        """Return the state one outer step on: the gradient at ``state.theta``, and the update along it.

        Parameters
        ----------
        state : BilevelState

        Returns
        -------
        BilevelState
        """
        if self._whole:
            raise InputError(f"optimizer={self.optimizer!r} has no single steps.\nNext: call bilevel, or use 'adam'.")
        return self._steps.step(state)

    def run(self, y0: Any, theta0: Any) -> BilevelResult:
        """Run all steps.

        Parameters
        ----------
        y0, theta0 : pytree
            See ``init``.

        Returns
        -------
        BilevelResult

        Raises
        ------
        InputError
            Within ``jax.jit``, where no value is seen; and for what is wrong with an argument.
        """
        if self.resume is None:
            _check_seen(self._steps, y0, theta0)
        if self._whole:
            y, state, found = minimize_whole(self._steps, self, y0, theta0)
            return BilevelResult(y, state.theta, found.status, History(found.rows), state, found.message)
        state = self.init(y0, theta0) if self.resume is None else self.resume
        rows, missed, stop = [], list[int](), ""
        with _Progress(self.progress, self.steps) as bar:
            for _ in range(self.steps):
                began, new = time.perf_counter(), self.step(state)
                row = self._steps.row(state, new, began)
                if not row.gradient_norm < float("inf"):
                    stop = f"the gradient of outer step {row.step} is not finite; the state is that before it."
                    warn(f"bilevel stopped: {stop}", SolveWarning)
                    break
                state = new
                rows.append(row)
                missed += [] if bool(state.met) else [row.step]
                bar.update(row)
                if self.callback is not None and self.callback(state) is True:
                    break
        y, _ = self._steps.finished(state) if rows else (state.y, None)
        status = Status.NON_FINITE if stop else Status.MAX_ITERATIONS if missed else self.tolerance.ends
        if missed and not stop:
            stop = _missed(missed, len(rows))
            warn(stop, AccuracyWarning)
        return BilevelResult(y, state.theta, status, History(rows), state, stop)


def _check_seen(steps: Steps, *trees: Any) -> None:
    """Raise where a history cannot be kept, since values are traced."""
    leaves = [leaf for tree in trees for leaf in flatten(tree).leaves]
    if not steps.problem(*trees).backend.sees(*leaves):
        raise InputError(
            "bilevel keeps a history of values, and y0 or theta0 are traced.\n"
            "Next: call it outside of jax.jit; its steps are compiled in any case. Within: Bilevel(...).init and .step."
        )


def _missed(missed: list[int], steps: int) -> str:
    found = f"{len(missed)} of {steps} outer steps, first in step {missed[0]}"
    return f"the gradient missed its tolerance in {found}.\n{CAUSES}"


class _Progress:
    """A bar of steps, if one is wanted."""

    def __init__(self, wanted: bool, total: int) -> None:
        if wanted and find_spec("tqdm") is None:
            raise InputError('progress=True needs tqdm: python -m pip install "implicitdiff[demo]".')
        self.wanted, self.total, self.bar = wanted, total, None

    def __enter__(self) -> _Progress:
        if self.wanted:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc="outer steps", unit="step")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, row: HistoryRow) -> None:
        """Show a step."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"outer value {row.value:.4g}, gradient {row.gradient_norm:.1e}")
            self.bar.update()


@untraced
def bilevel(
    condition: Any, outer: Any, y0: Any, theta0: Any, *, args: tuple[Any, ...] = (), inner: Any = "newton-cg",
    optimizer: Any = "adam", learning_rate: float | None = None, steps: int = 100,
    tolerance: Schedule = DEFAULT, solver: Any = "auto", project: Callable[[Any], Any] | None = None,
    bounds: Any = None, callback: Callable[[BilevelState], Any] | None = None, progress: bool = False,
    resume: BilevelState | None = None, constraints: Any = (),
) -> BilevelResult:  # fmt: skip
    """Minimise L(y*(θ), θ) over θ, where y*(θ) solves a condition F(y, θ) = 0.

    Each outer step takes the gradient at θ to a tolerance and moves θ along it. Both linear systems, of Newton's method
    and of the adjoint, start from where those of the step before ended.

    Parameters
    ----------
    condition : Condition or callable
        A bare callable is the inner objective: ``Stationary(f)``.
    outer : callable or (callable, callable)
        L(y, theta) -> scalar; or L beside its gradient, ``gradient(y, theta) -> (by_y, by_theta)``, where the arrays
        have no autodiff. ``by_theta`` may be None where L does not use theta.
    y0, theta0 : pytree of float32 or float64 arrays
        Where the inner problem and the loop start; y0 need not be a solution.
    args : tuple
        Data handed to every function of the condition after y and theta.
    inner : {"newton-cg", "lbfgs", "gradient"} or callable
        What solves for y: a name, or a solver of your own, ``inner(y, theta, tolerance, *args) -> y``, that goes on
        from y until ‖F‖ <= tolerance. One without a tolerance, ``inner(y, theta, *args)``, is called as it is. What it
        spends is not counted.
    optimizer : {"adam", "sgd", "L-BFGS-B", "SLSQP"}, optax transformation or factory
        What moves theta. A factory takes a list of parameters, as ``torch.optim.Adam`` does. L-BFGS-B and SLSQP are
        SciPy's, and run the whole loop; they compare values, so that the target of a `Sweep` is 1e-6 then, at most.
    learning_rate : float, optional
        Of "adam" and "sgd", 0.1 by default; for a factory its ``lr``.
    steps : int
        Outer steps to take (with ``resume`` more of them); for SciPy's methods at most.
    tolerance : Sweep, Fixed, Geometric, Summable, SOBA or SABA
        How accurate each gradient has to be. `Sweep` measures it; the next three fix residuals in advance. `SOBA` and
        `SABA` solve nothing: they move y, the adjoint and theta at once, on batches of samples, whose indices every
        function takes as its last argument.
    solver : str or Solver
        For the linear systems. "auto": by products alone, loosely; a matrix that is given is factored. The tolerance of
        an instance is replaced by that of the step.
    project : callable, optional
        ``project(theta) -> theta``, after each update.
    bounds : (low, high) or scipy.optimize.Bounds, optional
        Of theta: each a number, None, or like theta.
    callback : callable, optional
        Called with the state after each step; the loop ends where it returns True.
    progress : bool
        Whether to show a bar (needs tqdm).
    resume : BilevelState, optional
        The state of an earlier loop with the same arguments, to go on from; y0 and theta0 are not used then.
    constraints : dict or sequence of dict, or SciPy's constraint objects
        Of the raveled theta, for ``optimizer="SLSQP"``.

    Returns
    -------
    BilevelResult

    Raises
    ------
    ImplicitDiffError
        For what is wrong with an argument.

    Warns
    -----
    AccuracyWarning
        Where a gradient did not come to its tolerance.
    SolveWarning
        Where a gradient is not finite, and the loop stops.

    References
    ----------
    F. Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016. arXiv:1602.02355

    Examples
    --------
    The inner solution is y = θ, and the outer loss (y − 3)²:

    >>> import numpy as np
    >>> from implicitdiff import Stationary, bilevel
    >>> inner = Stationary(grad=lambda y, t: y - t, hvp=lambda y, t, v: v, mixed_vjp=lambda y, t, u: -u)
    >>> outer = lambda y, t: ((y - 3) ** 2).sum()
    >>> found = bilevel(inner, outer, np.zeros(1), np.zeros(1), optimizer="sgd", steps=30, learning_rate=0.4)
    >>> np.round(found.theta, 4), np.round(found.y, 4), found.status.name
    (array([3.]), array([3.]), 'CONVERGED')
    """
    return Bilevel(
        condition, outer, args, inner, optimizer, learning_rate, steps, tolerance, solver, project, bounds, callback,
        progress, resume, constraints,
    ).run(y0, theta0)  # fmt: skip
