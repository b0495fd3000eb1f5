"""`implicit_function`: give a black-box solver the derivative of its solution."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from implicitdiff.errors import BackendError, CallbackError, DTypeError, InputError
from implicitdiff.linearization import Linearization, linearized
from implicitdiff.registry import backend_for, get_backend

__all__ = ["ImplicitFunction", "implicit_function"]


class ImplicitFunction:
    """A solver whose solution can be differentiated; made by `implicit_function`.

    Calling it runs the solver, and where the framework has autodiff, that differentiates the result. ``vjp``, ``jvp``
    and ``jacobian`` run it and differentiate its solution; ``linearize`` runs it once and serves many products.
    """

    def __init__(self, solve: Callable[..., Any], condition: Any, has_aux: bool, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, solve)
        self.solve, self.condition, self.has_aux, self.options = solve, condition, has_aux, options
        self.shapes: dict[Any, Any] = {}  # of solutions, by the form of the arguments

    def __call__(self, theta: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the solver: ``y``, or ``(y, aux)`` with ``has_aux=True``."""
        backend = self.options["backend"]
        engine = get_backend(backend) if backend is not None else backend_for({"theta": theta})
        custom = getattr(engine, "custom_derivative", None)
        return self.run(theta, args, kwargs) if custom is None else custom(self, theta, args, kwargs)

    def linearize(self, theta: Any, *args: Any, **kwargs: Any) -> Linearization:
        """Solve, and linearise the condition at the solution (``.y`` of the result)."""
        out = self(theta, *args, **kwargs)
        y = out[0] if self.has_aux else out
        with self.explaining(y):
            return linearized(self.condition, y, theta, args=args, own=True, **self.options)

    @contextlib.contextmanager
    def explaining(self, y: Any) -> Iterator[None]:
        """Add the likely cause to an error about a solution that is a pair."""
        try:
            yield
        except (InputError, DTypeError, BackendError, CallbackError) as error:
            if type(y) is tuple and len(y) == 2 and not self.has_aux:
                error.args = (f"{error}\n{_name(self.solve)} returned a pair: if it is (y, aux), say has_aux=True.",)
            raise

    def vjp(self, theta: Any, cotangent: Any, *args: Any, **kwargs: Any) -> Any:
        """Solve at theta and pull a cotangent of y back to theta: −Bᵀ A⁻ᵀ v, structured like theta."""
        lin = self.linearize(theta, *args, **kwargs)
        with self.explaining(lin.y):
            return lin.vjp(cotangent)

    def jvp(self, theta: Any, tangent: Any, *args: Any, **kwargs: Any) -> Any:
        """Solve at theta and push a tangent of theta forward: dy along θ̇, structured like y."""
        lin = self.linearize(theta, *args, **kwargs)
        with self.explaining(lin.y):
            return lin.jvp(tangent)

    def jacobian(self, theta: Any, *args: Any, **kwargs: Any) -> Any:
        """Solve at theta and return the dense dy/dθ, shape y.shape + theta.shape."""
        lin = self.linearize(theta, *args, **kwargs)
        with self.explaining(lin.y):
            return lin.jacobian()

    def run(self, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the solver and no more, and check that it returned something of the right kind."""
        out = self.solve(theta, *args, **kwargs)
        name = _name(self.solve)
        if out is None:
            raise CallbackError(f"{name} returned None.\nExpected the solution y.")
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise CallbackError(
                f"{name} returned {type(out).__name__}.\nExpected the pair (y, aux), since has_aux=True."
            )
        return out


def _name(solve: Any) -> str:
    return str(getattr(solve, "__name__", "the solver"))


def implicit_function(
    condition: Any, *, solver: Any = "auto", has_aux: bool = False, on_failure: str = "raise", backend: Any = None,
    batched: bool = False,
) -> Callable[[Callable[..., Any]], ImplicitFunction]:  # fmt: skip
    """Decorate a solver ``y = solve(theta, *args, **kwargs)`` so that its solution can be differentiated.

    The solver is a black box: SciPy, a loop, a compiled program. Only the condition that its solution satisfies is
    differentiated, at the solution.

    Parameters
    ----------
    condition : Condition or callable
        Called as ``f(y, theta, *args)`` with the positional arguments of the solver; keyword arguments go to the
        solver alone.
    solver, on_failure, backend, batched
        Of the linear solve; see `implicitdiff.linearize`.
    has_aux : bool
        Whether the solver returns ``(y, aux)``.

    Returns
    -------
    callable
        Takes the solver, returns an `ImplicitFunction` with ``.vjp``, ``.jvp``, ``.jacobian`` and ``.linearize``.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.optimize import minimize
    >>> from implicitdiff import implicit_function
    >>> @implicit_function(lambda y, theta: ((y - theta) ** 2).sum() + (y**4).sum() / 4)
    ... def argmin(theta):
    ...     f = lambda y: ((y - theta) ** 2).sum() + (y**4).sum() / 4
    ...     return minimize(f, theta, method="Newton-CG", jac=lambda y: 2 * (y - theta) + y**3, tol=1e-12).x
    >>> theta = np.array([1.5])
    >>> np.round(argmin(theta), 6), np.round(argmin.jacobian(theta), 6)  # dy/dθ = 2 / (2 + 3 y²)
    (array([1.]), array([[0.4]]))
    """
    if condition is None:
        raise InputError("condition is None; expected Stationary(f), Root(F), FixedPoint(T), or the objective f.")
    options = {"solver": solver, "on_failure": on_failure, "backend": backend, "batched": batched}

    def decorate(solve: Callable[..., Any]) -> ImplicitFunction:
        if not callable(solve):
            raise InputError(f"implicit_function decorates a solver; got {type(solve).__name__}.")
        return ImplicitFunction(solve, condition, has_aux, options)

    return decorate
