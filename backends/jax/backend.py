"""JAX: traced from end to end, compiled when called eagerly, differentiable to any order where it is being traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from implicitdiff.arrays import Array, nan_where
from implicitdiff.backends.array_api import ArrayAPIBackend
from implicitdiff.backends.jax.derivatives import Derivatives, without_derivative
from implicitdiff.backends.jax.function import differentiable_call
from implicitdiff.backends.jax.loops import compiled, from_host
from implicitdiff.backends.jax.runner import Runner
from implicitdiff.backends.jax.space import JaxSpace, JaxTreeSpace
from implicitdiff.backends.jax.systems import solved
from implicitdiff.backends.jax.tracers import is_traced, underivable
from implicitdiff.backends.jax.varying import alike, is_mapped, varying
from implicitdiff.diagnosis import independent, loss_independent
from implicitdiff.error_estimate import ErrorEstimate
from implicitdiff.errors import BackendError
from implicitdiff.linalg.system import System, SystemRun
from implicitdiff.linalg.vector_space import TreeVector, is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.outcome import Report, Status
from implicitdiff.problem import Problem
from implicitdiff.pytree import flatten, hint
from implicitdiff.ravel import reject_dtype
from implicitdiff.solvers.sequences import SequenceState, fitted, pairs_of

__all__ = ["INLINE", "JaxBackend"]

_ARRAYS = (jax.Array, np.ndarray, np.generic)
"""What JAX takes for an array; it makes its own of NumPy's."""

jax.tree_util.register_pytree_node(TreeVector, lambda v: (v.leaves, None), lambda _, leaves: TreeVector(leaves))

_ARRAY_FIELDS = (
    "status", "converged", "iterations", "matvecs", "residual", "stationarity", "rcond", "solved", "rank",
    "nullity", "leak", "solution", "recycled", "dropped", "drift", "error", "polished_y",
)  # fmt: skip
_STATIC_FIELDS = ("solver", "reason", "seconds", "damping")


def _report_parts(report: Report) -> tuple[tuple[Any, ...], Any]:
    found = hasattr(report.damping, "dtype")  # a number that was given, or an array that was found
    static = {name: getattr(report, name) for name in _STATIC_FIELDS} | ({"damping": None} if found else {})
    arrays = tuple(getattr(report, name) for name in _ARRAY_FIELDS)
    kinds = tuple(sorted(report.derivatives.items()))
    return (*arrays, report.damping if found else None), (kinds, *static.values())


def _report_whole(static: Any, arrays: Any) -> Report:
    kinds, *named = static
    *arrays, found = arrays
    fields = {**dict(zip(_ARRAY_FIELDS, arrays, strict=True)), **dict(zip(_STATIC_FIELDS, named, strict=True))}
    fields = fields if found is None else {**fields, "damping": found}
    return Report(derivatives=dict(kinds), **fields)


jax.tree_util.register_pytree_node(Report, _report_parts, _report_whole)

_ESTIMATED = ("absolute", "relative", "parts", "contraction", "trusted", "correction", "value", "products")


def _estimate_parts(found: ErrorEstimate) -> tuple[tuple[Any, ...], Any]:
    arrays = tuple(getattr(found, name) for name in _ESTIMATED)
    named = not hasattr(found.cause, "dtype")  # where it was not traced
    return (*arrays, None if named else found.cause), (found.cause if named else None, found.doubt)


def _estimate_whole(static: Any, arrays: Any) -> ErrorEstimate:
    *arrays, cause = arrays
    named, doubt = static
    fields = dict(zip(_ESTIMATED, arrays, strict=True))
    return ErrorEstimate(**fields, cause=cause if named is None else named, doubt=doubt)


jax.tree_util.register_pytree_node(ErrorEstimate, _estimate_parts, _estimate_whole)


class JaxBackend(ArrayAPIBackend):
    """Backend for JAX arrays.

    Called with arrays it compiles the whole derivative once for each condition, loss, solver and structure, and keeps
    the program as long as the user's functions live. Called while JAX is tracing (under ``jit``, ``grad``, ``vmap``)
    it becomes part of what is traced: then nothing can be raised or warned about, and a failed solve is NaN.
    """

    mode = Mode.COMPILED
    """Whether what is wrong can be told after the run: not where the user traces."""

    def __init__(self) -> None:
        super().__init__(jnp)
        self.name = "jax"
        self._supported = (np.dtype(np.float32), np.dtype(np.float64))

    # -- arrays of the user ------------------------------------------------------------------------
    def as_leaf(self, leaf: Any, where: str) -> Array:
        if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
            return jnp.asarray(leaf)
        if isinstance(leaf, (*_ARRAYS, bool, int, float, complex)):  # JAX's typed literals are among them
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            if dtype not in self._supported:
                raise reject_dtype(dtype, where)
            return leaf if self.is_array(leaf) else jnp.asarray(leaf)
        kind = type(leaf).__module__.partition(".")[0] if hasattr(leaf, "dtype") else type(leaf).__name__
        raise BackendError(f"{where} is {kind}; expected an array of jax.{hint(leaf, where)}")

    def is_array(self, x: Any) -> bool:
        return isinstance(x, jax.Array)

    def as_array(self, x: Any, device: Any, dtype: Any) -> Array | None:
        if isinstance(x, (int, float)) and not isinstance(x, np.generic):
            return jnp.asarray(x, dtype=dtype)
        if not isinstance(x, _ARRAYS) or not jnp.issubdtype(x.dtype, jnp.number):
            return None
        x = x if self.is_array(x) else jnp.asarray(x)
        return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)

    def common_dtype(self, dtypes: Sequence[Any]) -> Any:
        return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)

    def device(self, x: Array) -> Any:
        return None  # not known of what is traced; JAX itself refuses arrays of several devices

    def guard(self, x: Array) -> Array:
        return x

    def astype(self, x: Array, dtype: Any) -> Array:
        return x.astype(dtype)

    def callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def local(self, y: Any, theta: Any) -> bool:
        leaves = jax.tree.leaves((y, theta))
        return not is_traced(leaves) and all(len(getattr(leaf, "devices", set)()) <= 1 for leaf in leaves)

    def look_at(self, x: Array) -> Array:
        return np.asarray(x)  # of JAX, every operation is compiled for every shape

    def put_back(self, x: Array) -> Array:
        return jnp.asarray(x)

    def sees(self, *arrays: Array) -> bool:
        return not is_traced(arrays)

    def on_host(self, function: Callable[..., Any], like: Any, *arrays: Array) -> tuple[Array, ...]:
        if not is_traced(arrays):
            return super().on_host(function, like, *arrays)
        shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in like)

        def host(*given: Any) -> Any:  # JAX may not be called from within one of its own programs
            found = function(*map(np.asarray, given))
            return tuple(np.asarray(x, dtype=form.dtype) for x, form in zip(found, shapes, strict=True))

        arrays = tuple(map(lax.stop_gradient, arrays))  # a solve has its own rule, and what looks at y has none
        return tuple(jax.pure_callback(host, shapes, *arrays, vmap_method="sequential"))

    def trees(self, y: Any, theta: Any) -> bool:
        leaves = [flatten(tree).leaves for tree in (y, theta)]
        if not all(leaves) or not all(self.is_array(leaf) for group in leaves for leaf in group):
            return False
        return all(len({leaf.dtype for leaf in group}) == 1 for group in leaves)

    # -- derivatives ---------------------------------------------------------------------------------
    def differentiate(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        return Derivatives(self, function, y, theta, whole=_is_whole(function))

    def differentiate_gradient(self, function: Callable[..., Array], y: Array, theta: Array) -> Any:
        def gradient(z: Any, t: Any) -> Any:
            value, pull = jax.vjp(lambda w: function(w, t), z)
            return pull(jnp.ones_like(value))[0]

        return Derivatives(self, gradient, y, theta, whole=_is_whole(function))

    def check_dependence(self, function: Callable[[Any], Any], theta: Any) -> None:
        if self.mode is Mode.INLINE and not _uses(function, theta):  # nothing can be told later: a silent zero
            raise independent("what JAX traced of it does not use it")

    def gradients(self, function: Callable[..., Array], y: Array, theta: Array) -> tuple[Array, Array, str]:
        if not _uses(lambda both: function(*both), (y, theta)):  # a silent zero
            raise loss_independent("what JAX traced of it does not use them")
        value, pull = jax.vjp(function, y, theta)
        return (*pull(jnp.ones_like(value)), "autodiff")

    def synchronize(self, tree: Any) -> None:
        jax.block_until_ready(tree)

    def outside(
        self, function: Callable[..., Sequence[Any]], arrays: Sequence[Array], shapes: Sequence[tuple[int, ...]]
    ) -> list[Array]:
        arrays = [lax.stop_gradient(x) for x in arrays]
        if not is_traced(arrays):
            return [jnp.asarray(x) for x in function(*map(np.asarray, arrays))]
        dtype = jnp.result_type(*arrays)

        def called(*x: Any) -> tuple[Any, ...]:
            return tuple(np.asarray(value, dtype=dtype) for value in function(*map(np.asarray, x)))

        like = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        return list(jax.pure_callback(called, like, *arrays, vmap_method="expand_dims"))

    # -- loops and linear algebra ----------------------------------------------------------------------
    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function)

    def batched(self, product: Callable[[Array], Array], items: tuple[int, ...]) -> Callable[[Array], Array]:
        def many(x: Any) -> Any:
            return product(x) if is_tree_vector(x) or x.ndim == len(items) + 1 else jax.vmap(product)(x)

        return many

    def while_loop(
        self, cond: Callable[[Any], Any], body: Callable[[Any], Any], state: Any, limit: int | None = None
    ) -> Any:
        state = alike(jax.tree.map(jnp.asarray, state))

        def step(old: Any) -> Any:
            return _like(old, body(old))

        return lax.while_loop(cond, step, state)

    @property
    def spread(self) -> bool:
        return is_mapped()

    def if_any(self, wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
        # A loop of one turn and not a cond: under vmap a cond does both branches for every item, always.
        value = jax.tree.map(jnp.asarray, value)

        def once(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            return _like(carry, (jnp.zeros_like(carry[0]), function(carry[1])))

        return lax.while_loop(lambda carry: carry[0], once, alike((jnp.any(wanted), value)))[1]

    def detached(self, x: Array) -> Array:
        return lax.stop_gradient(x)

    def underivable(self, tree: Any, error: Callable[[], Exception]) -> Any:
        return underivable(tree, error)

    def space(self, x: Any) -> Any:
        return JaxTreeSpace(jnp, x) if is_tree_vector(x) else JaxSpace(jnp, x.shape, x.dtype, None)

    def to_double(self, x: Array) -> Array:
        return x.astype(jnp.float64) if jax.config.read("jax_enable_x64") else x

    def lu_factor(self, matrix: Array) -> Any:
        lu, _, permutation = lax.linalg.lu(matrix)
        return lu, permutation

    def lu_solve(self, factor: Any, b: Array, transposed: bool) -> Array:
        lu, permutation = factor
        if transposed:
            b = lax.linalg.triangular_solve(lu, b, left_side=True, lower=False, transpose_a=True)
            b = lax.linalg.triangular_solve(lu, b, left_side=True, lower=True, transpose_a=True, unit_diagonal=True)
            return _permuted(b, jnp.argsort(permutation, axis=-1))
        b = _permuted(b, permutation)
        b = lax.linalg.triangular_solve(lu, b, left_side=True, lower=True, unit_diagonal=True)
        return lax.linalg.triangular_solve(lu, b, left_side=True, lower=False)

    def triangular_inverse(self, upper: Array) -> Array:
        unit = jnp.broadcast_to(jnp.eye(upper.shape[-1], dtype=upper.dtype), upper.shape)
        return lax.linalg.triangular_solve(upper, unit, left_side=True, lower=False, unit_diagonal=True)

    def cho_factor(self, matrix: Array) -> Array:
        return lax.linalg.cholesky(matrix, symmetrize_input=False)

    def cho_solve(self, factor: Array, b: Array) -> Array:
        half = lax.linalg.triangular_solve(factor, b, left_side=True, lower=True)
        return lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)

    # -- calls ---------------------------------------------------------------------------------------
    @property
    def inline(self) -> JaxBackend:
        """Return the backend for what is being traced."""
        return INLINE

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(self.inline, function)

    def black_box(self, function: Callable[..., Any], like: Any) -> Callable[..., Any]:
        return from_host(function, like)

    def runner(self, problem: Problem) -> Runner:
        return Runner(problem, self.inline)

    def solved(self, system: System) -> SystemRun:
        """Solve a linear system: compiled where values are at hand."""
        return solved(system, self.inline)

    def custom_derivative(self, call: Any, theta: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return differentiable_call(self, call, theta, args, kwargs)


class _Inline(JaxBackend):
    """The same inside of what is being traced: a solve has derivatives of its own."""

    mode = Mode.INLINE

    def linear(self, prepared: Any, b: Any, x0: Any, transposed: bool) -> Any:
        if not prepared.operator.n or 0 in b.shape or prepared.operator.rows != prepared.operator.columns:
            return prepared.solve(b, x0, transposed=transposed)
        operator, _ = prepared.state(transposed)
        _, state = prepared.state(False)
        prepared.state(True)
        if hasattr(prepared.solver, "plan"):
            prepared.solver.plan(state, b.shape[0] if len(b.shape) > len(operator.items) + 1 else 1)
        product = operator.matvec
        b = varying(b, jax.eval_shape(product, b)) if is_mapped() else b
        beside, prepared.beside = prepared.beside, None
        carried = None
        if isinstance(x0, SequenceState):
            carried = jax.tree.map(jnp.zeros_like, fitted(x0, self, b, pairs_of(prepared.solver)))

        def solver(flipped: bool) -> Callable[[Any, Any], Any]:
            def solve(_: Any, pair: Any) -> tuple[Any, Any]:
                right, made_of = pair
                if prepared.on_solved is not None:  # what was assembled belongs to each: one alone may be run
                    prepared.counted = 0
                solution = prepared.solve(right, None if flipped else x0, transposed=transposed ^ flipped)
                solution = _looked_at(prepared, solution, right, transposed ^ flipped, made_of)
                if flipped and carried is not None:  # both solves return the same form
                    solution = solution._replace(carried=carried)
                if not (prepared.least_squares and prepared.differentiated):
                    return alike(((solution.x, made_of), solution._replace(x=None)))
                least = solution.status == int(Status.LEAST_SQUARES)
                return alike(((nan_where(self, least, solution.x), made_of), solution))

            return solve

        (x, _), rest = lax.custom_linear_solve(
            lambda pair: (product(pair[0]), pair[1]), (b, beside), solver(False), transpose_solve=solver(True),
            symmetric=bool(operator.symmetric), has_aux=True,
        )  # fmt: skip
        if prepared.least_squares and prepared.differentiated:  # without a solution A⁻¹(ḃ − Ȧ x) is no derivative
            least = rest.status == int(Status.LEAST_SQUARES)
            x = self.space(x).select(self.xp.broadcast_to(least, x.shape[:-1]), without_derivative(rest.x), x)
        return rest._replace(x=x)


def _looked_at(prepared: Any, solution: Any, b: Any, transposed: bool, made_of: Any) -> Any:
    """The solution as a limit leaves it; what b is made of came along by an identity, which JAX transposes, too."""
    estimate = None
    if prepared.limit is not None:
        solution, estimate = prepared.limit(solution, b, transposed, made_of)
    if prepared.on_solved is not None:
        prepared.on_solved(solution, b, transposed, estimate)
    return solution


INLINE = _Inline()


def _like(old: Any, new: Any) -> Any:
    """Give what a turn of a loop returned the dtypes that it was given, and let it vary as that does."""
    return varying(jax.tree.map(lambda a, b: jnp.asarray(b, dtype=a.dtype), old, new), old)


def _permuted(b: Any, permutation: Any) -> Any:
    """Rows of b, shape (*items, n, k), in another order: whole rows are moved, and no index is checked."""
    take = lambda rows, order: rows.at[order].get(mode="promise_in_bounds")  # noqa: E731
    for _ in range(permutation.ndim - 1):
        take = jax.vmap(take)
    return take(b, permutation)


def _is_whole(function: Any) -> bool:
    """Whether a function is all of a condition."""
    return not hasattr(function, "point") or bool(function.point.whole)


def _uses(function: Callable[[Any], Any], x: Any) -> bool:
    """Whether the value of a function is made of its argument; an empty one need not be."""
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    needed = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            needed.update(map(id, equation.invars))
    inputs = [v for v in jaxpr.invars if 0 not in v.aval.shape]
    return not inputs or 0 in jaxpr.outvars[0].aval.shape or any(id(v) in needed for v in inputs)
