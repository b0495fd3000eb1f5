"""`solve_qp`: quadratic programs solved, and differentiated in all of their data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from implicitdiff.arrays import Array, listed
from implicitdiff.compilers import untraced
from implicitdiff.conditions import QP
from implicitdiff.conditions.constrained import Degenerate
from implicitdiff.decorator import ImplicitFunction
from implicitdiff.errors import (
    InfeasibleError,
    InputError,
    NonFiniteError,
    NotConvergedError,
    NotPositiveDefiniteError,
    ShapeError,
    UnboundedError,
)
from implicitdiff.outcome import Report, settle
from implicitdiff.problem import Settings
from implicitdiff.programs.interior_point import settings_of
from implicitdiff.programs.program import NON_FINITE, NONCONVEX, SOLVED, Program, is_sparse
from implicitdiff.programs.solve import solve_all, solve_sparse
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.typing import FunctionOptions, OnFailure, SolverLike, completed

__all__ = ["solve_qp"]

_AXES = {"Q": 2, "q": 1, "A": 2, "b": 1, "G": 2, "h": 1}


@untraced
def solve_qp(
    Q: Any, q: Any, A: Any = None, b: Any = None, G: Any = None, h: Any = None, *, batched: bool = False,
    solver: str | SolverLike = "auto", on_failure: OnFailure = "raise",
    on_report: Callable[[Report], object] | None = None, backend: Any = None, degenerate: Degenerate = "raise",
    return_multipliers: bool = False, settings: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """Solve min ½ yᵀQy + qᵀy subject to Ay = b, Gy <= h, so that the solution can be differentiated in all of the data.

    A strictly convex program is solved by Newton's method on the active set, all of a batch at once; where that ends
    without a solution, and where Q is singular, by Clarabel (``pip install 'implicitdiff[qp]'``), and made exact to
    rounding on its active set. Constraints may be left out. `QP` differentiates the solution: by Torch's and JAX's own
    autodiff, forward and in reverse, to second order, within ``jax.jit`` and under ``vmap``. It is solved on the CPU,
    in double precision, wherever the arrays are.

    Parameters
    ----------
    Q : array or SciPy sparse matrix, shape (n, n)
        Positive semidefinite; its symmetric part counts. Zeros make it a linear program.
    q : array, shape (n,)
        The slope at zero.
    A, b : array, shapes (p, n) and (p,), optional
        Equalities. A may be a SciPy sparse matrix.
    G, h : array, shapes (r, n) and (r,), optional
        Inequalities; an entry of h may be infinite. G may be a SciPy sparse matrix. What is sparse is a constant,
        shared by all items, and makes all of the program sparse.
    batched : bool
        Whether they carry a leading axis of independent programs. Those that do not are shared by all of them, and get
        the gradient that is summed over the programs.
    solver : str or Solver
        Of the derivative's linear system; see `linearize`.
    on_failure : {"raise", "warn", "nan", "ignore"}
        What it does where a program is not solved, or a derivative fails. Within ``jax.jit`` y is NaN there.
    on_report : callable, optional
        Called with the `Report` of each derivative, as for `implicit_function`.
    backend : str or Backend, optional
        Default: read off the arrays.
    degenerate : {"raise", "select"}
        What a derivative does at a kink: dependent active constraints, or a multiplier of zero; see `KKT`.
    return_multipliers : bool
        Return ``(y, (lam, mu))``, the multipliers of the equalities and of the inequalities, None where there are
        none. They cannot be differentiated; they are what `QP` and `KKT` take.
    settings : mapping, optional
        Clarabel's, by name: ``{"max_iter": 500, "time_limit": 1.0}``.

    Returns
    -------
    array, shape (n,), or (items, n)
        y, in the framework, the dtype and on the device of the data.

    Raises
    ------
    InfeasibleError
        Where no y satisfies the constraints.
    UnboundedError
        Where the objective has no lower bound on them.
    NotPositiveDefiniteError
        Where Q has a negative eigenvalue.
    NotConvergedError
        Where Clarabel stopped without a solution. All of these name its status, and hold ``value``.
    ShapeError, InputError, NonFiniteError
        For a bad argument, or where Clarabel is not installed.

    See Also
    --------
    QP : the condition, for the solution of another solver.

    Notes
    -----
    Without autodiff (NumPy) derivatives are those of a wrapped function,
    ``implicit_function(QP())(lambda data: solve_qp(**data))`` with ``.vjp``, ``.jvp`` and ``.jacobian``.

    References
    ----------
    P. J. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives", 2024.
    arXiv:2405.12762
    B. Amos, J. Z. Kolter, "OptNet: Differentiable optimization as a layer in neural networks", ICML 2017.
    arXiv:1703.00443

    Examples
    --------
    The point of the half-plane y₁ + y₂ <= 1 that is next to (1, 2), and its derivative by the bound:

    >>> import numpy as np
    >>> from implicitdiff import QP, implicit_function, solve_qp
    >>> data = {"Q": np.eye(2), "q": -np.array([1.0, 2.0]), "G": np.ones((1, 2)), "h": np.array([1.0])}
    >>> y, (lam, mu) = solve_qp(**data, return_multipliers=True)
    >>> np.round(y, 6) + 0.0, np.round(mu, 6)
    (array([0., 1.]), array([1.]))
    >>> layer = implicit_function(QP())(lambda data: solve_qp(**data))
    >>> np.round(layer.jacobian(data)["h"], 6)
    array([[0.5],
           [0.5]])
    """
    given = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h}
    both = {name: value for name, value in given.items() if value is not None}
    _check_pairs(both)
    Settings(solver, on_failure)
    sparse = {name: x for name, x in both.items() if is_sparse(x)}
    data = {name: x for name, x in both.items() if name not in sparse}
    engine = backend_for(data) if backend is None else get_backend(backend)
    arrays = {name: engine.as_leaf(x, name) for name, x in data.items()}
    bound = "A" in both or "G" in both
    if not bound:  # an inequality that is absent
        zero = engine.xp.zeros_like(arrays["q"])
        absent = {"G": zero[..., None, :], "h": zero[..., :1] + float("inf")}
        arrays, data = {**arrays, **absent}, {**data, **absent}  # what the framework differentiates are the user's
    axes = _check_shapes({**arrays, **sparse}, batched)
    call = _Call(engine, data, sparse, axes, on_failure, settings_of(settings or {}))
    y, lam, mu = call.solved()
    options: dict[str, Any] = {"solver": solver, "on_failure": on_failure, "on_report": on_report, "backend": engine}
    if batched:
        options["in_axes"] = (0, {name: 0 if axes[name] else None for name in data}, 0)
    condition = QP(**sparse, multipliers=_multipliers, degenerate=degenerate)
    function: Any = ImplicitFunction(_solution, condition, True, completed(FunctionOptions, options))
    y, multipliers = function(data, y, lam, mu)
    return (y, multipliers if bound else (None, None)) if return_multipliers else y


def _solution(data: Any, y: Array, lam: Array | None, mu: Array | None) -> Any:
    return y, (lam, mu)


def _multipliers(y: Array, data: Any, solved: Array, lam: Array | None, mu: Array | None) -> Any:
    return lam, mu


def _check_pairs(data: Mapping[str, Any]) -> None:
    for one, other in (("Q", "q"), ("A", "b"), ("G", "h"), ("q", "Q"), ("b", "A"), ("h", "G")):
        if one in data and other not in data:
            raise InputError(f"solve_qp has {one} and no {other}.")
    if "Q" not in data:
        raise InputError("solve_qp has neither Q nor q.\nNext: zeros, where the objective has no such part.")


def _check_shapes(arrays: Mapping[str, Any], batched: bool) -> dict[str, bool]:
    """Raise where shapes do not fit; whether each carries the axis of items."""
    axes = {name: batched and len(x.shape) == _AXES[name] + 1 for name, x in arrays.items()}
    for name, x in arrays.items():
        if len(x.shape) != _AXES[name] + axes[name]:
            more = " (or one more, of items)" if batched else ""
            hint = "\nNext: batched=True, for a leading axis of programs." if len(x.shape) > _AXES[name] else ""
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected {_AXES[name]} axes{more}.{hint}")
    items = {int(arrays[name].shape[0]) for name, own in axes.items() if own}
    if batched and len(items) != 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items())
        raise ShapeError(f"with batched=True the data need one leading axis of programs; got {shapes}.")
    n = int(arrays["q"].shape[-1])
    for name, vector in (("Q", "q"), ("A", "b"), ("G", "h")):
        if name in arrays:
            expected = (int(arrays[vector].shape[-1]), n)
            if tuple(arrays[name].shape[-2:]) != expected:
                got, by = tuple(arrays[name].shape[-2:]), "q" if vector == "q" else f"{vector} and q"
                raise ShapeError(f"{name} has shape {got}; expected {expected}, by {by}.")
    return axes


class _Call:
    """One call: from the framework to NumPy and back."""

    def __init__(
        self, engine: Any, data: Mapping[str, Any], sparse: Mapping[str, Any], axes: Mapping[str, bool], mode: str,
        settings: Any,
    ) -> None:  # fmt: skip
        self.engine, self.data, self.sparse, self.mode, self.settings = engine, data, sparse, mode, settings
        shapes = {name: tuple(map(int, x.shape)) for name, x in data.items()}
        self.sizes = [shapes[name][-1] if name in shapes else 0 for name in ("q", "b", "h")]
        self.items = tuple(dict.fromkeys(shapes[name][0] for name, own in axes.items() if own))
        self.seen: list[tuple[tuple[int, ...], list[str]]] | None = []
        """What ran at once, and can be told of; None where nobody listens any more."""

    def solved(self) -> tuple[Array, Array | None, Array | None]:
        """Return y and the multipliers; failures as ``on_failure`` says."""
        arrays = list(self.data.values())
        shapes = [(*self.items, size) for size in (*self.sizes, 1)]
        *found, bad = self.engine.outside(self._outside, arrays, shapes)
        seen, self.seen = self.seen, None
        error = self._error(*seen[-1]) if seen else None
        y = found[0]
        if self.mode == "nan" or (not seen and self.mode != "ignore"):
            xp = self.engine.xp
            y = xp.where(bad > 0, xp.full_like(y, float("nan")), y)
        if error is not None:
            error.value = y  # type: ignore[attr-defined]
            settle(error, self.mode)  # type: ignore[arg-type]
        lam, mu = (z if size else None for z, size in zip(found[1:], self.sizes[1:], strict=True))
        return y, lam, mu

    def _outside(self, *arrays: Any) -> list[Any]:
        """Solve in NumPy: y, λ, μ, and whether that failed, with whatever leading axes the data have."""
        data = dict(zip(self.data, arrays, strict=True))
        leads = [x.shape[: x.ndim - _AXES[name]] for name, x in data.items()]
        lead, dtype = np.broadcast_shapes(*leads), np.result_type(*arrays)
        p = self.sizes[1]
        y, z, status = (self._sparsely if self.sparse else self._densely)(data, lead)
        if self.seen is not None:
            self.seen.append((lead, status))
        bad = np.array([one != SOLVED for one in status], dtype=float)[:, None]
        return [x.reshape(*lead, x.shape[-1]).astype(dtype) for x in (y, z[:, :p], z[:, p:], bad)]

    def _densely(self, data: Mapping[str, Any], lead: tuple[int, ...]) -> Any:
        n, p, r = self.sizes
        Q, rows = _along(data, "Q", lead, n, n), [_along(data, "A", lead, p, n), _along(data, "G", lead, r, n)]
        right = np.concatenate([_along(data, "b", lead, p), _along(data, "h", lead, r)], axis=1)
        program = Program(
            (Q + Q.swapaxes(1, 2)) / 2, _along(data, "q", lead, n), np.concatenate(rows, axis=1), right, p
        )
        return solve_all(program, self.settings)

    def _sparsely(self, data: Mapping[str, Any], lead: tuple[int, ...]) -> Any:
        """Some matrices are sparse: so is each program, and the dense ones are those of all items."""
        from scipy import sparse

        n, p, r = self.sizes
        matrices = [sparse.csc_array(x, dtype=float) for x in self._matrices(data)]
        Q, K = (matrices[0] + matrices[0].T) / 2, sparse.vstack(matrices[1:], format="csc")
        right = np.concatenate([_along(data, "b", lead, p), _along(data, "h", lead, r)], axis=1)
        return solve_sparse(Q.tocsc(), _along(data, "q", lead, n), K, right, p, self.settings)

    def _matrices(self, data: Mapping[str, Any]) -> list[Any]:
        n, p, r = self.sizes
        found = []
        for name, rows in (("Q", n), ("A", p), ("G", r)):
            x = self.sparse.get(name, data.get(name, np.zeros((rows, n))))
            if x.ndim > 2 and math.prod(x.shape[:-2]) != 1:
                raise InputError(
                    f"{name} differs from item to item, beside a sparse matrix, which does not.\n"
                    "Next: solve the items one by one, or with dense matrices."
                )
            found.append(x if is_sparse(x) else x.reshape(rows, n))
        return found

    def _error(self, lead: tuple[int, ...], found: Sequence[str]) -> Exception | None:
        """Build the error for the programs that were not solved; None where all were."""
        by_status: dict[str, list[int]] = {}
        for i, one in enumerate(found):
            if one != SOLVED:
                by_status.setdefault(one, []).append(i)
        if not by_status:
            return None
        kind, says = _explained(next(iter(by_status)), self.data)
        bad = sum(map(len, by_status.values()))
        named = "; ".join(f"{'item' if len(i) == 1 else 'items'} {listed(i)}: {s}" for s, i in by_status.items())
        return kind(f"{len(found) - bad} of {len(found)} solved; {named}.\n{says}" if lead else says)


def _along(data: Mapping[str, Any], name: str, lead: tuple[int, ...], *shape: int) -> Any:
    """Return one of the data for all programs along one axis, in double precision; zeros where there is none."""
    count = math.prod(lead)
    if name not in data:
        return np.zeros((count, *shape))
    return np.broadcast_to(np.asarray(data[name], dtype=float), (*lead, *shape)).reshape(count, *shape)


def _explained(status: str, data: Mapping[str, Any]) -> tuple[type[Exception], str]:
    """Return the class of the error for a status, and what it says."""
    if status == NON_FINITE:
        return NonFiniteError, (
            f"one of {', '.join(data)} holds NaN or Inf (h alone may hold inf).\nNext: check what produced it."
        )
    if status == NONCONVEX:
        return NotPositiveDefiniteError, (
            "Q has a negative eigenvalue, so that the program is not convex.\n"
            "Next: check the sign of Q; a local minimum from another solver is differentiated by QP."
        )
    if "PrimalInfeasible" in status:
        return InfeasibleError, (
            f"no y satisfies the constraints (Clarabel: {status}).\n"
            "The convention is A y = b and G y <= h.\n"
            "Next: check the signs of G and h, or which rows contradict others."
        )
    if "DualInfeasible" in status:
        return UnboundedError, (
            f"½ yᵀQy + qᵀy has no lower bound on the constraints (Clarabel: {status}).\n"
            "Likely cause: Q is singular, and nothing bounds y where it is.\nNext: check the sign of q, or add bounds."
        )
    return NotConvergedError, (
        f"Clarabel stopped without a solution: {status}.\n"
        "Likely cause: data of very different sizes, or constraints that are barely feasible.\n"
        "Next: settings={'max_iter': 500}, or leave out constraints that say the same."
    )
