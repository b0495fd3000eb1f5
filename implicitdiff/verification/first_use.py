"""What the user gives of derivatives is held against the function that they are of, at its first use.

Let G(y, θ) be the function that the user wrote (∇f, F or T), z and t directions without structure in the units of y and
θ, and u one in those of 1/G. Two evaluations of G give u'[G(y + εz, θ) − G(y − εz, θ)] / 2ε, and two more the same
along t; every product that was given has to give the same:

    u'(jvp z) = (vjp u)'z = u'(jacobian z),     u'(mixed_jvp t) = (mixed_vjp u)'t.

The adjoint that was solved for, Aᵀu = v, is a second u: it weighs what the result depends on, A⁻¹ included. In forward
mode the solution w is a second z. What a product has to do with the condition (signs, y − T) is not the user's concern,
and not looked at. A callable is blamed only if it is wrong beyond the noise of G in two draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Checked
from implicitdiff.identities import identity, remember
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.pytree import flatten
from implicitdiff.verification.mistakes import error_for, wrong_in

__all__ = ["verify"]

_verified: dict[Any, Any] = {}


def _key_of(problem: Any, functions: tuple[Callable[..., Any], ...]) -> tuple[Any, list[Any]]:
    """Make a key of functions and structure, and list what has to live for it to mean the same."""
    held: list[Any] = []
    names = tuple(map(identity, functions, [held] * len(functions)))
    shapes = []
    for tree in (problem.y, problem.theta):
        flat = flatten(tree)
        shapes.append((flat.spec, *map(_form, flat.leaves)))
    return (names, tuple(shapes), problem.backend.name, problem.batched), held


def _form(leaf: Any) -> Any:
    shape = getattr(leaf, "shape", None)
    return type(leaf) if shape is None else (tuple(shape), leaf.dtype)


def verify(problem: Any, rules: Callable[[], Any], mode: str = "", solution: Any = None) -> None:
    """Hold what was given against its function, once for the same functions and structure.

    Parameters
    ----------
    problem : Problem
    rules : callable
        Returns the `Rules` at the point.
    mode : str
        Of the rules, in which a system was solved.
    solution : array, optional
        The solution of that system.

    Raises
    ------
    InconsistentDerivativesError
        With the names of the callables at fault.
    """
    functions = getattr(problem.condition, "to_verify", ())
    if not functions or not problem.backend.local(problem.y, problem.theta):
        return
    key, held = _key_of(problem, functions)
    if key in _verified:
        return
    for checked in rules().maps.checked:
        if not checked.point.y.n or is_tree_vector(checked.point.y.vector):
            continue
        known = solution is not None and 0 not in solution.shape and checked.solved is not None
        x = _raveled(checked, solution) if known else None
        short = checked.point.theta.n <= checked.point.y.n
        forward = mode in {"jvp", "solve"} or (mode == "jacobian" and short)
        wrongs = wrong_in(checked, *((None, x) if forward else (x, None)))
        if wrongs:
            raise error_for(checked, wrongs)
    remember(_verified, key, True, held)


def _raveled(checked: Checked, x: Any) -> Array:
    """The first of several right-hand sides, as one vector per item."""
    backend = checked.point.backend
    if is_tree_vector(x):
        x = backend.concat([backend.reshape(leaf, (-1,)) for leaf in x.leaves])
    return x[0, ...] if len(x.shape) > len(checked.point.items) + 1 else x
