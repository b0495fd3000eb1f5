"""`implicit_function`: give a black-box solver the derivative of its solution."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, ParamSpec, TypeVar, Unpack, cast, overload

from implicitdiff.axes import axes_of, first, items_of, mapped_of, spread
from implicitdiff.closures import Memory
from implicitdiff.compilers import public, untraced
from implicitdiff.conditions import as_condition
from implicitdiff.error_estimate import ErrorControl
from implicitdiff.errors import BackendError, CallbackError, DTypeError, InputError
from implicitdiff.linearization import Linearization, linearized
from implicitdiff.problem import problem_of
from implicitdiff.records import brief
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.solvers import get_solver
from implicitdiff.solvers.sequences import Past
from implicitdiff.typing import DEFAULTS, ConditionLike, FunctionOptions, T, Y, completed

__all__ = ["ImplicitFunction", "implicit_function"]

P = ParamSpec("P")
R = TypeVar("R")
Aux = TypeVar("Aux")
_EMPTY = inspect.Parameter.empty


class ImplicitFunction(Generic[P, R, Y]):
    """A solver whose solution can be differentiated; made by `implicit_function`.

    Calling it runs the solver, and where the framework has autodiff, that differentiates the result. ``vjp``, ``jvp``
    and ``jacobian`` run it and differentiate its solution; ``linearize`` runs it once and serves many products. All of
    them take what the solver takes, by position or by name.
    """

    def __init__(self, solve: Callable[..., Any], condition: Any, has_aux: Any, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, solve)
        self.solve, self.condition, self.options = solve, condition, options
        self.has_aux = has_aux is True
        self.aux = has_aux if callable(has_aux) else None
        self.shapes = Memory()  # of solutions, by the form of the arguments
        self.past = Past(get_solver(options["solver"]))
        self._spread: dict[tuple[bool, ...], ImplicitFunction[Any, Any, Any]] = {}

    def __repr__(self) -> str:
        return f"<implicit_function {_name(self.solve)} of {brief(self.condition)}>"

    def __reduce__(self) -> Any:
        """Pickle a decorated function as functions are, by its name; any other by what it is made of."""
        path, found = getattr(self, "__qualname__", ""), cast("Any", sys.modules.get(self.__module__))
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is self:
            return path
        return type(self), (self.solve, self.condition, self.aux or self.has_aux, self.options)

    @untraced
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the solver: ``y``, or ``(y, aux)`` where there is an aux."""
        theta, data, options = self._bound(args, kwargs)
        out: Any = self._solution(theta, data, options)
        found: Any = out if self.aux is None else (out, self.aux(out, theta, *data))
        return found

    def _solution(self, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        backend = self.options["backend"]
        engine = get_backend(backend) if backend is not None else backend_for({"theta": theta})
        custom = engine.custom_derivative
        if custom is None:
            return self.run(theta, args, kwargs)
        shared, mapped = axes_of(self.options["in_axes"], None, theta, args)
        if not shared:
            return custom(self, theta, args, kwargs)
        each = spread(engine, theta, shared, items_of(theta, shared, mapped_of(args, mapped)))
        return custom(self._of_each(shared), each, args, kwargs)  # the framework sums over what is spread

    def _of_each(self, shared: tuple[bool, ...]) -> ImplicitFunction[Any, Any, Any]:
        """Return the same function of a theta that is spread over the items."""
        if shared not in self._spread:

            @functools.wraps(self.solve)
            def solve(theta: Any, *args: Any, **kwargs: Any) -> Any:
                return self.solve(first(theta, shared), *args, **kwargs)

            options = {**self.options, "in_axes": (0, 0, self.options["in_axes"][2])}
            self._spread[shared] = ImplicitFunction(solve, self.condition, self.has_aux, options)
        return self._spread[shared]

    @untraced
    def linearize(self, /, *args: P.args, **kwargs: P.kwargs) -> Linearization[Y, Any]:
        """Solve, and linearise the condition at the solution (``.y`` of the result)."""
        theta, data, options = self._bound(args, kwargs)
        out = self._solution(theta, data, options)
        y: Y = out[0] if self.has_aux else out
        with self.explaining(y):
            condition = as_condition(self.condition).received(out[1]) if self.has_aux else self.condition
            return linearized(problem_of(condition, y, theta, args=data, copy=True, **self.options))

    def _next(self, lin: Linearization[Any, Any], kind: str, take: Callable[[Any], Any]) -> Any:
        """Take a product as the next one of a sequence, where the solver recycles."""
        return self.past.product(lin, kind, take, traced=lin._asked.backend.traced)

    @contextlib.contextmanager
    def explaining(self, y: Any) -> Iterator[None]:
        """Add the likely cause to an error about a solution that is a pair."""
        try:
            yield
        except (InputError, DTypeError, BackendError, CallbackError) as error:
            if type(y) is tuple and len(y) == 2 and not self.has_aux:
                error.args = (f"{error}\n{_name(self.solve)} returned a pair: if it is (y, aux), say has_aux=True.",)
            raise

    @overload
    def vjp(self, theta: T, /, *args: Any, **kwargs: Any) -> T: ...

    @overload
    def vjp(self, /, **kwargs: Any) -> Any: ...

    @untraced
    def vjp(self, /, *args: Any, **kwargs: Any) -> Any:
        """Solve and pull a cotangent of y, the second argument, back to theta: −Bᵀ A⁻ᵀ v, structured like theta.

        Parameters
        ----------
        *args, **kwargs
            ``(theta, cotangent, *data)``: the cotangent, or ``cotangent=``, stands behind theta.
        """
        cotangent, args, kwargs = self._taken("cotangent", args, kwargs)
        lin = self.linearize(*args, **kwargs)
        with self.explaining(lin.y):
            return self._next(lin, "vjp", lambda x0: lin.vjp(cotangent, x0=x0))

    @untraced
    def jvp(self, /, *args: Any, **kwargs: Any) -> Y:
        """Solve and push a tangent of theta, the second argument, forward: dy along θ̇, structured like y.

        Parameters
        ----------
        *args, **kwargs
            ``(theta, tangent, *data)``: the tangent, or ``tangent=``, stands behind theta.
        """
        tangent, args, kwargs = self._taken("tangent", args, kwargs)
        lin = self.linearize(*args, **kwargs)
        with self.explaining(lin.y):
            return self._next(lin, "jvp", lambda x0: lin.jvp(tangent, x0=x0))

    @untraced
    def jacobian(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Solve and return the dense dy/dθ, shape y.shape + theta.shape."""
        lin = self.linearize(*args, **kwargs)
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
        _refuse_record(name, out[0] if self.has_aux else out)
        return out

    # -- arguments -------------------------------------------------------------------------------------
    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return theta, the data of solver and condition, and what is for the solver alone."""
        values, rest, names = list(args), dict(kwargs), list(self._parameters)
        first = names[0] if names else "theta"
        if not values:
            if first not in rest:
                raise TypeError(f"{_name(self.solve)} is called without its parameter {first!r}, which is theta here.")
            values = [rest.pop(first)]
        data = [i for i, name in enumerate(names) if name in rest and self._is_data(name)]
        for name in names[len(values) : max(data, default=-1) + 1]:
            if not self._is_data(name) or (name not in rest and self._parameters[name] is _EMPTY):
                raise InputError(
                    f"{names[max(data)]} is data of the condition, and {name}, which stands before it, is not, or is "
                    f"missing.\nLikely cause: {name} is an option of {_name(self.solve)}; data goes by position.\n"
                    "Next: write the data right behind theta, and the options behind it, or behind a *."
                )
            values.append(rest.pop(name) if name in rest else self._parameters[name])
        return values[0], tuple(values[1:]), rest

    @functools.cached_property
    def _parameters(self) -> dict[str, Any]:
        """What the solver takes by position: names in order, with their defaults."""
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return {p.name: p.default for p in _signature(self.solve) if p.kind in by_position}

    def _is_data(self, name: str) -> bool:
        """Whether a parameter of the solver is one of the condition, too, or has to be given anyway."""
        return self._parameters[name] is _EMPTY or name in self._known

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        """Names that the functions of the condition give to their data: what stands behind y and theta."""
        functions = vars(self.condition).values() if hasattr(self.condition, "maps") else (self.condition,)
        return frozenset(p.name for function in functions if callable(function) for p in _signature(function)[2:])

    def _taken(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Take the vector out of the arguments: by name, or the one behind theta."""
        if name in kwargs:
            return kwargs[name], args, {k: v for k, v in kwargs.items() if k != name}
        at = 1 if len(args) > 1 else 0  # theta may be among the keywords
        if not args or (at == 0 and not kwargs):
            raise TypeError(f"expected theta and a {name}.")
        return args[at], (*args[:at], *args[at + 1 :]), kwargs


def _name(solve: Any) -> str:
    return str(getattr(solve, "__name__", "the solver"))


def _signature(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled code need not tell
        return []


def _refuse_record(name: str, y: Any) -> None:
    """Raise for a record that holds the solution: the result of SciPy, a table of pandas."""
    held = [a for a in ("x", "root", "to_numpy") if hasattr(y, a)]
    if held and (isinstance(y, dict) or type(y).__module__.partition(".")[0] in {"scipy", "pandas"}):
        field = "to_numpy()" if held[-1] == "to_numpy" else held[-1]
        raise CallbackError(
            f"{name} returned {type(y).__name__}.\nExpected the solution y, an array or a tree of arrays.\n"
            f"Next: return its .{field}, and the rest as aux, with has_aux=True."
        )


@overload
def implicit_function(
    condition: ConditionLike, *, has_aux: Literal[False] = False, **options: Unpack[FunctionOptions]
) -> Callable[[Callable[P, Y]], ImplicitFunction[P, Y, Y]]: ...


@overload
def implicit_function(
    condition: ConditionLike, *, has_aux: Literal[True], **options: Unpack[FunctionOptions]
) -> Callable[[Callable[P, tuple[Y, Aux]]], ImplicitFunction[P, tuple[Y, Aux], Y]]: ...


@overload
def implicit_function(
    condition: ConditionLike, *, has_aux: Callable[..., Aux], **options: Unpack[FunctionOptions]
) -> Callable[[Callable[P, Y]], ImplicitFunction[P, tuple[Y, Aux], Y]]: ...


@public(FunctionOptions, DEFAULTS)
def implicit_function(condition: ConditionLike, *, has_aux: Any = False, **options: Unpack[FunctionOptions]) -> Any:
    """Decorate a solver ``y = solve(theta, *args, **kwargs)`` so that its solution can be differentiated.

    The solver is a black box: SciPy, a loop, a compiled program. Only the condition that its solution satisfies is
    differentiated, at the solution.

    Parameters
    ----------
    condition : Condition or callable
        Called as ``f(y, theta, *args)``. theta is the solver's first argument, whatever its name, and args are its
        data: what it takes by position and is given by position, or by name where it has no default or where a
        function of the condition has a parameter of that name, too. Other keyword arguments are options, which go to
        the solver alone.
    solver, on_failure, backend, batched
        Of the linear solve; see `implicitdiff.linearize`. With ``CG(recycle=k)`` or ``MINRES(recycle=k)`` derivatives
        share from call to call and from backward pass to backward pass what a sequence can; not under JAX.
    in_axes : tuple, optional
        As for `linearize`, for a solver of whole batches: it gets theta and args as they are, and returns y with the
        leading axis.
    max_error, polish
        Of each derivative, as for `linearize`: in the backward pass of Torch and JAX, too. Second derivatives, and
        Torch's forward mode, are refused with them.
    on_report : callable, optional
        Called with the `Report` of each derivative, when it has been computed: by ``.vjp``, ``.jvp``, ``.jacobian`` and
        ``.linearize``, and in the backward and the forward pass of Torch and JAX. Within ``jax.jit`` it is called
        through JAX's callback, while the program runs or just after; ``seconds`` is not known there, and under
        ``jax.vmap`` the fields are arrays. What it raises is raised, but from within ``jax.jit``, which wraps it.
    has_aux : bool or callable
        Whether the solver returns ``(y, aux)``. Such an aux is what the solver says about its run, and no function:
        where it enters a derivative, that is an error in reverse mode and NaN in forward mode, and not zero.
        With a callable ``aux(y, theta, *args)`` the solver returns y alone, and a call ``(y, aux(y, theta, *args))``,
        which is differentiated in full: ∂aux/∂θ + ∂aux/∂y · dy/dθ.

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
    if not (isinstance(has_aux, bool) or callable(has_aux)):
        raise InputError(f"has_aux is {type(has_aux).__name__}; expected a bool or a function aux(y, theta, *args).")
    if not (options.get("on_report") is None or callable(options["on_report"])):
        kind = type(options["on_report"]).__name__
        raise InputError(f"on_report is {kind}; expected a function that takes a Report.")
    given = completed(FunctionOptions, options)
    ErrorControl(False, given["max_error"], given["polish"]).check()

    def decorate(solve: Callable[..., Any]) -> ImplicitFunction[Any, Any, Any]:
        if not callable(solve):
            raise InputError(f"implicit_function decorates a solver; got {type(solve).__name__}.")
        return ImplicitFunction(solve, condition, has_aux, given)

    return decorate
