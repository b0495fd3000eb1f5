"""Multipliers in the conventions of solvers, as those of 𝓛 = f + λᵀh + μᵀg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.conditions.scipy_constraints import Limited, collected, sides_of
from implicitdiff.errors import InputError, ShapeError

if TYPE_CHECKING:
    from implicitdiff.conditions.point import Point

__all__ = ["as_vector", "multipliers_from_scipy", "split_multipliers"]

Pair = tuple[np.ndarray, np.ndarray]


def split_multipliers(v: Any, lb: Any, ub: Any) -> Pair:
    """Split multipliers of lb <= c(y) <= ub, one for each row, into those of equalities and of inequalities.

    It is the form of OSQP's ``y`` and of SciPy's trust-constr: positive where c is held at ub, negative at lb.

    Parameters
    ----------
    v : array, shape (m,)
        The multipliers.
    lb, ub : float or array, shape (m,)
        The limits; rows with lb = ub are equalities.

    Returns
    -------
    lam : array
        One for each equality, in order.
    mu : array
        One for each inequality: those of finite lb first, then those of finite ub, each in order; what
        ``multipliers=`` of `KKT` takes for ``LinearConstraint(A, lb, ub)``.

    Raises
    ------
    ShapeError, InputError
        Where v and the limits do not fit together, or lb > ub.

    Examples
    --------
    >>> from implicitdiff import split_multipliers
    >>> split_multipliers([0.5, -2.0, 3.0], [1.0, 0.0, -1.0], [1.0, 9.0, 4.0])
    (array([0.5]), array([2., 0., 0., 3.]))
    """
    numbers = np.asarray(v, dtype=float).reshape(-1)
    try:
        lb, ub = (np.broadcast_to(np.asarray(x, dtype=float).reshape(-1), numbers.shape) for x in (lb, ub))
    except ValueError as error:
        raise ShapeError(
            f"v has {numbers.size} entries, and the limits have shapes {np.shape(lb)} and {np.shape(ub)}."
        ) from error
    sides = sides_of(lb, ub)
    low, high = np.maximum(-numbers[sides.lower], 0.0), np.maximum(numbers[sides.upper], 0.0)
    return numbers[sides.equal], np.concatenate([low, high])


def multipliers_from_scipy(result: Any, constraints: Any = (), bounds: Any = None) -> Pair:
    """Return the multipliers that `scipy.optimize.minimize` found, as `KKT` takes them.

    Parameters
    ----------
    result : OptimizeResult
        Of trust-constr (its ``v``), or of SLSQP (its ``multipliers``, from SciPy 1.16 on; none for bounds).
    constraints : constraint or sequence of them
        As ``minimize`` was given them: LinearConstraint, NonlinearConstraint, or dicts.
    bounds : Bounds, optional
        Likewise.

    Returns
    -------
    lam, mu : array
        For ``KKT(f, ineq=[*constraints, bounds], multipliers=(lam, mu))``, in that order.

    Raises
    ------
    InputError
        Where the result holds no multipliers, or those of other constraints.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.optimize import LinearConstraint, minimize
    >>> from implicitdiff import KKT, implicit_jacobian, multipliers_from_scipy
    >>> f = lambda y, theta: ((y - theta) ** 2).sum()
    >>> line, theta = LinearConstraint([[1.0, 1.0]], 1.0, 1.0), np.array([2.0, 1.0])
    >>> found = minimize(f, np.zeros(2), (theta,), method="trust-constr", constraints=line)
    >>> lam, mu = multipliers_from_scipy(found, line)
    >>> np.round(lam, 4), mu
    (array([2.]), array([], dtype=float64))
    >>> np.round(implicit_jacobian(KKT(f, line, multipliers=(lam, mu)), found.x, theta), 4)
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    """
    given = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
    limited: list[Limited] = list(collected(given, "constraints") or ())
    if any(not isinstance(c, Limited) for c in limited):
        raise InputError("constraints holds a function; expected what minimize was given.")
    if "v" in result:
        own = limited if bounds is None else [*limited, *collected([bounds], "bounds")]
        return _of_trust_constr(result["v"], own)
    if "multipliers" not in result:
        raise InputError(
            "result holds no multipliers: trust-constr returns them, and SLSQP does from SciPy 1.16 on.\n"
            "Next: leave multipliers= out; they are recovered from y."
        )
    if bounds is not None:
        raise InputError(
            "SLSQP returns no multipliers of bounds.\n"
            "Next: leave multipliers= out; they are recovered from y; or give the bounds as a LinearConstraint."
        )
    return _of_slsqp(np.asarray(result["multipliers"], dtype=float), limited, np.asarray(result["x"]))


def _of_trust_constr(v: Sequence[Any], limited: Sequence[Limited]) -> Pair:
    if len(v) != len(limited):
        raise InputError(f"result has multipliers of {len(v)} constraints, and there are {len(limited)} (with bounds).")
    pairs = [split_multipliers(own, c.lb, c.ub) for own, c in zip(v, limited, strict=True)]
    return _joined(pairs)


def _joined(pairs: Sequence[Pair]) -> Pair:
    lam, mu = (np.concatenate([np.zeros(0), *(pair[i] for pair in pairs)]) for i in (0, 1))
    return lam, mu


def _of_slsqp(found: np.ndarray, limited: Sequence[Limited], x: np.ndarray) -> Pair:
    """Those of equalities come first, with the other sign.

    A constraint that has rows of both kinds SciPy splits: its inequalities stand behind all others.
    """
    counts = []
    for c in limited:
        lb, ub = c.limits(c.rows_at(x))
        sides = sides_of(lb, ub)
        counts.append((sides.equal.size, sides.lower.size + sides.upper.size))
    if sum(map(sum, counts)) != found.size:
        raise InputError(f"result has {found.size} multipliers, and the constraints have {sum(map(sum, counts))} rows.")
    order = sorted(range(len(counts)), key=lambda i: bool(counts[i][0] and counts[i][1]))
    lam, rest = -found[: sum(p for p, _ in counts)], found[sum(p for p, _ in counts) :]
    parts, start = dict[int, np.ndarray](), 0
    for i in order:
        parts[i] = rest[start : start + counts[i][1]]
        start += counts[i][1]
    return lam, np.concatenate([np.zeros(0), *(parts[i] for i in range(len(counts)))])


def as_vector(point: Point, parts: Any, p: int, k: int) -> Array:
    """Return the user's multipliers of k constraints, p of them equalities, as one vector per item."""
    sizes = {"eq": p, "ineq": k - p}
    both = tuple(parts) if isinstance(parts, (tuple, list)) else (parts, None) if p else (None, parts)
    if len(both) != 2:
        raise InputError(f"multipliers holds {len(both)} parts; expected the pair (of eq, of ineq).")
    pairs = zip(sizes.items(), both, strict=True)
    vectors = [_part(point, part, name, size) for (name, size), part in pairs]
    vectors = [x for x in vectors if x.shape[-1]] or vectors[:1]
    return vectors[0] if len(vectors) == 1 else point.backend.concat(vectors)


def _part(point: Point, part: Any, name: str, size: int) -> Array:
    backend, y = point.backend, point.y
    empty = part is None or 0 in getattr(part, "shape", (1,))
    if empty and not size:
        return backend.xp.zeros((*point.items, 0), dtype=y.dtype, device=y.device)
    if empty or not size:
        raise InputError(f"multipliers: there {'are' if size else 'is no'} {name}, and its part is {part!r}.")
    if isinstance(part, np.ndarray) and not backend.is_array(part):  # as most solvers return them
        part = backend.xp.asarray(np.array(part, dtype=str(y.dtype).rpartition(".")[2]), device=y.device)
    leaf = backend.as_leaf(part, f"multipliers of {name}")
    if math.prod(leaf.shape) != size * math.prod(point.items):
        raise ShapeError(f"the multipliers of {name} have shape {tuple(leaf.shape)}; expected {(*point.items, size)}.")
    return backend.astype(backend.reshape(leaf, (*point.items, size)), y.dtype)
