"""The solution as a function that JAX differentiates: forward, in reverse, under any transformation, to any order.

Let y*(θ) solve F(y, θ) = 0, with A = ∂F/∂y and B = ∂F/∂θ. One rule is enough: the tangent of y* along θ̇ is the solution
w of A(y*, θ) w = −B(y*, θ) θ̇. The solve is a ``lax.custom_linear_solve``, which JAX transposes and differentiates, and
y* in it is the solution function itself, so reverse mode and every higher order follow.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from implicitdiff.accuracy import inaccurate
from implicitdiff.arrays import nan_where
from implicitdiff.backends.base import Backend
from implicitdiff.backends.jax.auxiliary import unknown_tangent
from implicitdiff.backends.jax.contents import captures_differentiated
from implicitdiff.backends.jax.programs import call_for, program_for
from implicitdiff.backends.jax.reports import hand_out_solved
from implicitdiff.backends.jax.rules import arrays_in, arrays_of, functions_of
from implicitdiff.backends.jax.runner import looked_at, newtons
from implicitdiff.backends.jax.tracers import is_traced, underivable
from implicitdiff.backends.jax.watch import Watch
from implicitdiff.certificate import certify_adjoint, certify_tangent
from implicitdiff.conditions import as_condition
from implicitdiff.diagnosis import warn_not_solution
from implicitdiff.errors import CallbackError, DerivativeError
from implicitdiff.linalg.solve import Solution
from implicitdiff.polishing import uncertified
from implicitdiff.problem import Problem, problem_of
from implicitdiff.ravel import Raveler
from implicitdiff.rules import Rules
from implicitdiff.solution_check import Step
from implicitdiff.verification.first_use import verify

__all__ = ["differentiable_call"]

_OPAQUE = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)  # fmt: skip
"""What JAX raises where a solver needs to see numbers."""
_FORWARD = (
    "a second derivative of the solution is taken in forward mode, and the condition has none: it uses a custom_vjp.\n"
    "Likely cause: jax.hessian, which is forward over reverse.\n"
    "Next: jax.jacrev(jax.grad(loss)) in its place, or jax.custom_jvp in place of custom_vjp."
)


class _Statics:
    """The parts of (args, kwargs) that are no arrays: they do not pass through JAX."""

    def __init__(self, tree: Any) -> None:
        leaves, self.treedef = jax.tree.flatten(tree)
        self.is_array = [isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in leaves]
        self.arrays = [leaf for leaf, array in zip(leaves, self.is_array, strict=True) if array]
        self.rest = [None if array else leaf for leaf, array in zip(leaves, self.is_array, strict=True)]

    def join(self, arrays: Any) -> Any:
        """Put the tree together again."""
        found = iter(arrays)
        leaves = [next(found) if array else leaf for leaf, array in zip(self.rest, self.is_array, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)


def differentiable_call(
    backend: Backend, function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the solver of an `ImplicitFunction`, and let JAX differentiate what it returns."""
    if captures_differentiated((*functions_of(function.condition), arrays_of(function.condition))):
        raise DerivativeError(
            "the condition uses a value from the enclosing scope that JAX is differentiating.\n"
            "Likely cause: a theta in a closure. The solution is differentiated with respect to its argument alone.\n"
            "Next: pass the value in theta (a tuple, a dict), or put jax.lax.stop_gradient around it."
        )
    statics, aux = _Statics((args, kwargs)), list[Any]()
    run = jax.custom_jvp(lambda theta, arrays: _solution(function, theta, statics.join(arrays), aux))

    def rule(primals: Any, tangents: Any) -> Any:
        (theta, arrays), (theta_dot, arrays_dot) = primals, tangents
        _refuse(arrays_dot)
        out = run(theta, arrays)
        y = out[0] if function.has_aux else out
        options = {**function.options, "backend": backend}
        with function.explaining(y):
            problem = problem_of(function.condition, y, theta, args=statics.join(arrays)[0], **options)
            if problem.settings.control.wanted:
                y, theta = underivable((y, theta), _twice)
                problem = replace(problem, y=y, theta=theta)
            w = _tangent(problem, _instantiated(theta, theta_dot))
        return out, (w, unknown_tangent(_instantiated(theta, theta_dot), out[1])) if function.has_aux else w

    run.defjvp(rule, symbolic_zeros=True)
    out = run(theta, statics.arrays)
    if not function.has_aux:
        return out
    return out[0], aux[0].join(out[1])


# -- the solver ----------------------------------------------------------------------------------------
def _solution(function: Any, theta: Any, arguments: tuple[Any, Any], aux: list[Any]) -> Any:
    """y, or y and the arrays of aux, as JAX arrays; what else is in aux goes around JAX."""
    args, kwargs = arguments
    if is_traced(theta, args, kwargs):
        out = _traced(function, theta, args, kwargs)
    else:
        out = function.run(theta, args, kwargs)
        _remember(function, out, theta, args)
    if not function.has_aux:
        return _arrays(out, theta)
    y, extra = out
    aux[:] = [statics := _Statics(extra)]
    return _arrays(y, theta), [jnp.asarray(array) for array in statics.arrays]


def _arrays(y: Any, theta: Any) -> Any:
    """Numbers of NumPy or Python as JAX arrays, of theta's precision where they are plain floats."""
    for leaf in jax.tree.leaves(y):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int)):
            raise CallbackError(f"the solver returned {type(leaf).__name__}.\nExpected the solution y, as arrays.")
    dtype = jnp.result_type(*jax.tree.leaves(theta))

    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype=dtype if type(leaf) is float else None)

    return jax.tree.map(convert, y)


def _traced(function: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let JAX trace the solver; where it has to see numbers, call it back from the compiled program."""
    try:
        return function.run(theta, args, kwargs)
    except _OPAQUE:
        pass
    statics = _Statics((theta, args, kwargs))
    shapes = _known_shapes(function, theta, args, kwargs)

    def host(arrays: Any) -> Any:
        theta, args, kwargs = statics.join(_handed(function, arrays))
        out = function.run(theta, args, kwargs)
        return jax.tree.map(lambda leaf, like: np.asarray(leaf, dtype=like.dtype), out, shapes)

    return jax.pure_callback(host, shapes, statics.arrays, vmap_method="sequential")


def _handed(function: Any, arrays: Any) -> Any:
    """What the solver gets: NumPy arrays. JAX may not be called from within one of its own programs."""
    return [np.asarray(array) for array in arrays]


def _forms(theta: Any, args: Any) -> Any:
    """Make a key of structures, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten((theta, args))
    return treedef, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def _remember(function: Any, out: Any, theta: Any, args: Any) -> None:
    """Keep the form of a solution, for when the solver cannot be asked before the program runs."""
    if all(isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)) for leaf in jax.tree.leaves(out)):
        function.shapes[_forms(theta, args)] = jax.tree.map(_shape, out)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _known_shapes(function: Any, theta: Any, args: Any, kwargs: Any) -> Any:
    """Form of the solution: from an earlier call, or from a call with ones in place of what is traced."""
    key = _forms(theta, args)
    if key not in function.shapes:
        ones = jax.tree.map(_one, (theta, args, kwargs))
        with jax.ensure_compile_time_eval():
            out = function.run(*ones)
        _remember(function, out, theta, args)
    if key not in function.shapes:
        raise CallbackError(
            "the solver needs to see numbers, and what it returns is no tree of arrays.\n"
            "Next: call it outside of jit and vmap, or let it return arrays (y, or y and aux)."
        )
    return function.shapes[key]


def _one(leaf: Any) -> Any:
    return np.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.core.Tracer) else leaf


# -- the rule ------------------------------------------------------------------------------------------
def _refuse(tangents: Any) -> None:
    """Raise where a derivative with respect to data is asked for, which would come out as zero."""
    for leaf in jax.tree.leaves(tangents, is_leaf=_is_zero):
        if not _is_zero(leaf) and getattr(leaf, "dtype", None) != jax.dtypes.float0:
            raise DerivativeError(
                "a derivative with respect to args is asked for, and args are data that is not differentiated.\n"
                "Next: pass it in theta, or use jax.lax.stop_gradient."
            )


def _twice() -> Exception:
    return uncertified("a second derivative of the solution", "max_error or polish")


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiated(theta: Any, tangent: Any) -> Any:
    """Zeros where JAX knows that a tangent is zero."""
    leaves = jax.tree.leaves(tangent, is_leaf=_is_zero)
    like, treedef = jax.tree.flatten(theta)
    full = [jnp.zeros_like(x) if _is_zero(t) else t for x, t in zip(like, leaves, strict=True)]
    return jax.tree.unflatten(treedef, full)


def _tangent(problem: Problem, tangent: Any) -> Any:
    """The solution w of A w = −B θ̇, from a program that JAX may transform further."""
    known = not is_traced(*arrays_in(problem))
    control, backend = problem.settings.control, cast("Any", problem.backend)
    if control.polish != 0:
        y = newtons(problem, control.polish, backend.inline)
        problem = replace(problem, y=y, condition=as_condition(problem.condition).elsewhere())
        problem = replace(problem, settings=replace(problem.settings, control=control._replace(polish=0)))
    if known:  # numbers: what jit could not tell, is told here
        _look_at_point(problem)
    watch = Watch(problem) if known else None
    tangent = tangent if watch is None else watch.pass_through(tangent, "theta")
    call = call_for(problem, "tangent at a checked point" if known else "tangent", (problem.y, problem.theta), tangent)
    try:
        w = program_for(call, _build_tangent)(call)
    except TypeError as error:  # what differentiates is JAX, through the functions of the condition
        if "custom_vjp" not in str(error):
            raise
        raise DerivativeError(_FORWARD) from error
    return w if watch is None else watch.pass_through(w, "y")


def _build_tangent(program: Any, call: Any, y: Any, theta: Any, dynamic: Any, tangent: Any) -> Any:
    problem = replace(call.problem_at(y, theta, dynamic), backend=call.problem.backend.inline)
    limit = problem.settings.control.max_error
    rules = Rules(problem, flat=limit is not None)
    if limit is not None:
        rules.prepared.limit = partial(_limited, rules, limit)
        rules.prepared.beside = rules.point.theta.like(tangent, "tangent", dtype=rules.point.theta.dtype)
    if problem.settings.on_report is not None:
        rules.prepared.on_solved = partial(hand_out_solved, rules)
    return rules.tangent(tangent, solution_checked=call.mode != "tangent")


def _limited(rules: Rules, max_error: float, solution: Solution, b: Any, transposed: bool, t: Any) -> Any:
    """NaN for a solution whose derivative is off by more than it may be; and the estimate of that."""
    found = certify_adjoint(rules, solution, b) if transposed else certify_tangent(rules, solution, b, t)
    if rules.problem.settings.on_failure == "ignore":
        return solution, found
    return solution._replace(x=nan_where(rules.point.backend, inaccurate(found, max_error), solution.x)), found


def _look_at_point(problem: Problem) -> None:
    """Warn where y is not a solution, and raise where what the user gave of derivatives is wrong."""
    step = looked_at(problem, sure=False)
    if is_traced(step):
        return
    verify(problem, lambda: Rules(problem, flat=True))
    if bool(jnp.any(step.doubtful)):
        step = looked_at(problem, sure=True)
    if bool(jnp.any(step.unsolved)):
        warn_not_solution(np, Step(*map(np.asarray, step)), Raveler(problem.backend, problem.y, "y", problem.batched))
