"""Why a derivative that JAX takes eagerly is NaN.

``jax.grad`` and ``jax.jvp`` of a solution call no function of ours with the result: a failed solve comes out as NaN.
Where nothing is traced but the derivative itself, its tangents (or cotangents) pass through here in numbers: a linear
identity, with a look at what passes. If what comes out is not finite, and what went in was, the same derivative is
taken once more by the library's own call, which finds the cause and does as ``on_failure`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from implicitdiff.backends.jax.reports import between
from implicitdiff.errors import ImplicitDiffError, SolveWarning
from implicitdiff.linearization import Linearization
from implicitdiff.outcome import warn
from implicitdiff.problem import Problem

__all__ = ["Watch"]


class Watch:
    """Looks at the two ends of one linear map: the tangents of θ and those of y.

    Parameters
    ----------
    problem : Problem
        In numbers.
    mapped : bool
        Whether what passes carries a leading axis of several (co)tangents.
    """

    def __init__(self, problem: Problem, *, mapped: bool = False) -> None:
        self._problem, self._mapped = problem, mapped
        self._given: list[Any] | None = None
        self._copy: Watch | None = None

    @property
    def over_many(self) -> Watch:
        """The same for several (co)tangents at once."""
        if self._copy is None:
            self._copy = Watch(self._problem, mapped=True)
        return self._copy

    def pass_through(self, tree: Any, end: str) -> Any:
        """Return a tree as it is; looked at when, and if, it is there in numbers."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, _watched.bind(*leaves, watch=self, end=end, mode="jvp"))

    def look(self, leaves: Sequence[Any], mode: str, *, last: bool) -> None:
        """See what goes into a product in forward ("jvp") or reverse mode ("vjp"), or what comes out of it."""
        between(self._problem.settings.on_report, last=last)
        if not last:
            self._given = list(leaves)
        elif self._given is not None and _finite(self._given) and not _finite(leaves):
            given, self._given = self._given, None
            self._explain(mode, given, leaves)

    def _explain(self, mode: str, given: list[Any], found: Sequence[Any]) -> None:
        t = self._problem
        if t.settings.on_failure not in {"raise", "warn"} or not _finite(jax.tree.leaves(t.theta)):  # NaN in, NaN out
            return
        if self._mapped:
            axes = [tuple(range(1, leaf.ndim)) for leaf in found]
            good = [np.isfinite(np.asarray(leaf)).all(axis=axis) for leaf, axis in zip(found, axes, strict=True)]
            item = int(np.argmin(np.logical_and.reduce(good)))
            given = [leaf[item] for leaf in given]
        like = t.y if mode == "vjp" else t.theta
        try:
            quiet = replace(t, settings=replace(t.settings, on_report=None), copy=False)
            lin: Linearization[Any, Any] = Linearization(quiet)
            getattr(lin, mode)(jax.tree.unflatten(jax.tree.structure(like), given))
        except ImplicitDiffError as error:
            if t.settings.on_failure == "raise":
                raise
            warn(f"{type(error).__name__}: {error}", SolveWarning)


def _finite(leaves: Sequence[Any]) -> bool:
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves)


# -- the identity, to JAX ------------------------------------------------------------------------------
_watched = Primitive("implicitdiff_watched")
_watched.multiple_results = True


def _value(*leaves: Any, watch: Watch, end: str, mode: str) -> list[Any]:
    watch.look(leaves, mode, last=end == ("y" if mode == "jvp" else "theta"))
    return list(leaves)


def _transposed(cotangents: Any, *leaves: Any, mode: str, **params: Any) -> list[Any]:
    found = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    return _watched.bind(*found, mode="vjp" if mode == "jvp" else "jvp", **params)


def _pushed(primals: Any, tangents: Any, **params: Any) -> tuple[list[Any], list[Any]]:
    full = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return _watched.bind(*primals, **params), _watched.bind(*full, **params)


def _mapped(leaves: Any, axes: Any, *, watch: Watch, **params: Any) -> tuple[list[Any], list[int]]:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return _watched.bind(*moved, watch=watch.over_many, **params), [0] * len(moved)


_watched.def_impl(_value)
_watched.def_abstract_eval(lambda *leaves, **_: list(leaves))
ad.primitive_jvps[_watched] = _pushed
ad.primitive_transposes[_watched] = _transposed
batching.primitive_batchers[_watched] = _mapped
mlir.register_lowering(_watched, lambda _, *leaves, **__: list(leaves))
