"""The public functions: each a few lines over a `Linearization`."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from implicitdiff.compilers import public, untraced
from implicitdiff.errors import InputError
from implicitdiff.linearization import Linearization, linearized
from implicitdiff.outcome import Report
from implicitdiff.problem import problem_of
from implicitdiff.ravel import Raveler
from implicitdiff.records import brief
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.solvers import get_solver
from implicitdiff.solvers.sequences import SequenceState, fresh, pairs_of
from implicitdiff.typing import DEFAULTS, ConditionLike, Options, StartedOptions, T, Y

__all__ = ["implicit_grad", "implicit_jacobian", "implicit_jvp", "implicit_vjp", "linearize", "sequence_state"]


@public(Options, DEFAULTS)
def linearize(condition: ConditionLike, y: Y, theta: T, **options: Unpack[Options]) -> Linearization[Y, T]:
    """Linearise a condition at a solution: factor once, then ``.vjp(v)``, ``.jvp(t)``, ``.jacobian()``, ``.report``.

    Parameters
    ----------
    condition : Condition or callable
        A bare callable is the inner objective: ``Stationary(f)``.
    y, theta : pytree of float32 or float64 arrays
        The solution and the parameters. They are copied where they could be changed in place afterwards.
    args : tuple
        Data handed to every function of the condition after y and theta; not differentiated. Arrays are copied, too.
    solver : str or Solver
        ``"auto"``, ``"lu"``, ``"cholesky"``, ``"cg"``, ``"minres"``, ``"gmres"``, ``"bicgstab"``, a registered
        name, or an instance.
    on_failure : {"raise", "warn", "nan", "ignore"}
        What a failed solve does.
    backend : str or Backend, optional
        Default: read off the arrays.
    batched : bool
        Whether y, theta and the vectors carry a leading axis of independent problems.
    in_axes : tuple, optional
        Of a batch, what carries that axis: ``(y, theta, args)``, each 0 or None, as for JAX's ``vmap``;
        ``batched=True`` is ``(0, 0, None)``. For theta it may be a tree of 0 and None that is a prefix of theta, and
        for args a tuple with an entry for each. What is shared (None) gets the gradient that is summed over the items,
        and one tangent; the Jacobian is per item. Without a vmap (NumPy, CuPy) the functions of the condition take all
        items at once: y and theta with the leading axis, over which a shared theta is spread, and args as they are.
    error : bool
        Whether to estimate how far off the derivative is, because y is not solved for exactly, nor the linear system,
        or because of finite differences and rounding: `Report.error`, an `ErrorEstimate`. It costs a fraction of the
        derivative itself.
    max_error : float, optional
        Estimated relative error above which a derivative is a failure, an `InaccurateError` under ``on_failure``.
    polish : int or "auto"
        How many Newton steps y − A⁻¹F to take before the derivative, each of which squares its error;
        `Report.polished_y` is the y that was reached. ``"auto"`` goes on until ``max_error`` is met, or Newton's method
        stops contracting.

    Returns
    -------
    Linearization

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Root, linearize
    >>> lin = linearize(Root(lambda y, t: y**3 - t), np.array([2.0]), np.array([8.0]))
    >>> np.round(lin.jvp(np.array([12.0])), 6), np.round(lin.jacobian(), 6)
    (array([1.]), array([[0.083333]]))
    """
    return linearized(problem_of(condition, y, theta, copy=True, **options))


@overload
def implicit_vjp(
    condition: ConditionLike, y: Any, theta: T, cotangent: Any, *,
    return_report: Literal[False] = False, **options: Unpack[StartedOptions],
) -> T: ...  # fmt: skip
@overload
def implicit_vjp(
    condition: ConditionLike, y: Any, theta: T, cotangent: Any, *,
    return_report: Literal[True], **options: Unpack[StartedOptions],
) -> tuple[T, Report]: ...  # fmt: skip
@public(StartedOptions, DEFAULTS)
def implicit_vjp(
    condition: ConditionLike, y: Any, theta: Any, cotangent: Any, *,
    return_report: bool = False, **options: Unpack[StartedOptions],
) -> Any:  # fmt: skip
    """Pull a cotangent of y back to theta: −Bᵀ A⁻ᵀ v.

    Parameters
    ----------
    condition, y, theta, args, solver, on_failure, backend, batched, in_axes, error, max_error, polish
        See `linearize`.
    cotangent : pytree, like y
        v, the gradient of a loss with respect to y.
    return_report : bool
        Return ``(value, Report)``.
    x0 : array, shape (n,), optional
        Warm start for the raveled adjoint (``report.solution`` of an earlier call).
    state : "new" or SequenceState, optional
        Of a sequence of nearby problems, like the steps of an outer loop: what an earlier call left, or "new" at the
        first. Then the value comes with the next state.

    Returns
    -------
    pytree, like theta
        With a ``state`` the pair (value, state); the report, where it is asked for, comes last.

    Raises
    ------
    SolveError, InputError, DTypeError, BackendError, CallbackError, DerivativeError
        See `implicitdiff.errors`.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import implicit_vjp
    >>> theta = np.array([1.0, 2.0])
    >>> g = implicit_vjp(lambda y, t: ((y - t**2) ** 2).sum(), theta**2, theta, np.ones(2))
    >>> np.round(g, 6)
    array([2., 4.])
    """
    lin, x0 = _at(condition, y, theta, cotangent, options)
    return _handed_out(lin, x0, lin.product("vjp", cotangent, x0, lin.control), return_report)


@overload
def implicit_jvp(
    condition: ConditionLike, y: Y, theta: Any, tangent: Any, *,
    return_report: Literal[False] = False, **options: Unpack[StartedOptions],
) -> Y: ...  # fmt: skip
@overload
def implicit_jvp(
    condition: ConditionLike, y: Y, theta: Any, tangent: Any, *,
    return_report: Literal[True], **options: Unpack[StartedOptions],
) -> tuple[Y, Report]: ...  # fmt: skip
@public(StartedOptions, DEFAULTS)
def implicit_jvp(
    condition: ConditionLike, y: Any, theta: Any, tangent: Any, *,
    return_report: bool = False, **options: Unpack[StartedOptions],
) -> Any:  # fmt: skip
    """Derivative of y along a tangent of theta: w with A w = −B θ̇.

    Parameters
    ----------
    condition, y, theta, args, solver, on_failure, backend, batched, in_axes, error, max_error, polish
        See `linearize`.
    tangent : pytree, like theta
        θ̇.
    return_report : bool
        Return ``(value, Report)``.
    x0 : array, shape (n,), optional
        Warm start for the raveled w.
    state : "new" or SequenceState, optional
        Of a sequence of nearby problems, like the steps of an outer loop: what an earlier call left, or "new" at the
        first. Then the value comes with the next state.

    Returns
    -------
    pytree, like y
        With a ``state`` the pair (value, state); the report, where it is asked for, comes last.

    Raises
    ------
    SolveError, InputError, DTypeError, BackendError, CallbackError, DerivativeError
        See `implicitdiff.errors`.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import FixedPoint, implicit_jvp
    >>> dy = implicit_jvp(FixedPoint(lambda y, t: 0.5 * y + t), np.array([2.0]), np.array([1.0]), np.array([1.0]))
    >>> np.round(dy, 6)
    array([2.])
    """
    lin, x0 = _at(condition, y, theta, tangent, options)
    return _handed_out(lin, x0, lin.product("jvp", tangent, x0, lin.control), return_report)


@overload
def implicit_jacobian(
    condition: ConditionLike, y: Any, theta: Any, *, return_report: Literal[False] = False,
    **options: Unpack[Options],
) -> Any: ...  # fmt: skip


@overload
def implicit_jacobian(
    condition: ConditionLike, y: Any, theta: Any, *, return_report: Literal[True],
    **options: Unpack[Options],
) -> tuple[Any, Report]: ...  # fmt: skip


@public(Options, DEFAULTS)
def implicit_jacobian(
    condition: ConditionLike, y: Any, theta: Any, *, return_report: bool = False,
    **options: Unpack[Options],
) -> Any:  # fmt: skip
    """Dense dy/dθ; all columns solved together, forward for m <= n and in reverse otherwise.

    Parameters
    ----------
    condition, y, theta, args, solver, on_failure, backend, batched, in_axes, error, max_error, polish
        See `linearize`.
    return_report : bool
        Return ``(value, Report)``.

    Returns
    -------
    array, shape y.shape + theta.shape
        For pytrees the structure of y with, at each leaf, the structure of theta; with ``batched=True`` behind the
        leading axis.

    Raises
    ------
    SolveError, InputError, DTypeError, BackendError, CallbackError, DerivativeError
        See `implicitdiff.errors`.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Stationary, implicit_jacobian
    >>> ridge = Stationary(grad=lambda w, lam, X, t: X.T @ (X @ w - t) + lam * w)
    >>> X, t = np.eye(2), np.array([3.0, 6.0])
    >>> np.round(implicit_jacobian(ridge, t / 3, np.array([2.0, 2.0]), args=(X, t)), 6)
    array([[-0.333333,  0.      ],
           [ 0.      , -0.666667]])
    """
    lin, x0 = _at(condition, y, theta, None, options)
    return _handed_out(lin, x0, lin.product("jacobian", None, x0, lin.control), return_report)


@overload
def implicit_grad(
    condition: ConditionLike, outer: Any, y: Any, theta: T, *,
    return_report: Literal[False] = False, **options: Unpack[StartedOptions],
) -> T: ...  # fmt: skip
@overload
def implicit_grad(
    condition: ConditionLike, outer: Any, y: Any, theta: T, *,
    return_report: Literal[True], **options: Unpack[StartedOptions],
) -> tuple[T, Report]: ...  # fmt: skip
@public(StartedOptions, DEFAULTS)
def implicit_grad(
    condition: ConditionLike, outer: Any, y: Any, theta: Any, *,
    return_report: bool = False, **options: Unpack[StartedOptions],
) -> Any:  # fmt: skip
    """Total gradient of an outer loss through a solution: dL/dθ = ∂L/∂θ − Bᵀ A⁻ᵀ ∂L/∂y.

    Parameters
    ----------
    condition, y, theta, args, solver, on_failure, backend, batched, in_axes, error, max_error, polish
        See `linearize`.
    outer : callable or pytree
        The loss ``L(y, theta) -> scalar`` (one scalar per item with ``batched=True``), or the cotangent ∂L/∂y itself,
        structured like y.
    return_report : bool
        Return ``(value, Report)``.
    x0 : array, shape (n,), optional
        Warm start for the raveled adjoint (``report.solution`` of an earlier call).
    state : "new" or SequenceState, optional
        Of a sequence of nearby problems, like the steps of an outer loop: what an earlier call left, or "new" at the
        first. Then the value comes with the next state.

    Returns
    -------
    pytree, like theta
        With a ``state`` the pair (value, state); the report, where it is asked for, comes last.

    Raises
    ------
    SolveError, InputError, DTypeError, BackendError, CallbackError, DerivativeError
        See `implicitdiff.errors`.

    Examples
    --------
    The solution of min over w of (w − θ²)² is θ², so 2 w has the gradient 4 θ:

    >>> import numpy as np
    >>> from implicitdiff import implicit_grad
    >>> theta = np.array(3.0)
    >>> g = implicit_grad(lambda w, t: (w - t**2) ** 2, lambda w, t: 2 * w, theta**2, theta)
    >>> round(float(g), 6)
    12.0
    """
    mode = "gradient" if callable(outer) else "vjp"
    lin, x0 = _at(condition, y, theta, None if mode == "gradient" else outer, options)
    return _handed_out(lin, x0, lin.product(mode, outer, x0, lin.control), return_report)


@untraced
def sequence_state(y: Any, solver: Any = "auto", *, batched: bool = False, backend: Any = None) -> SequenceState:
    """Begin the state of a sequence of gradients with the shapes that it will have, as ``jax.lax.scan`` needs it.

    Elsewhere ``state="new"`` is enough.

    Parameters
    ----------
    y : pytree
        A solution, for its shapes, dtype and device. Where a system has more unknowns than y (multipliers of
        constraints), take the state of a first call with ``state="new"`` instead.
    solver : str or Solver
        The solver of the sequence: its ``recycle`` says how many pairs there are.
    batched : bool
        Whether y carries a leading axis of independent problems.
    backend : str or Backend, optional
        Default: read off y.

    Returns
    -------
    SequenceState

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import CG, sequence_state
    >>> sequence_state(np.zeros(3), CG(recycle=2)).directions.shape
    (2, 3)
    """
    engine = backend_for({"y": y}) if backend is None else get_backend(backend)
    with engine.computing():
        vector = Raveler(engine, y, "y", batched).vector
        return fresh(engine.xp, vector.shape, vector.dtype, engine.device(vector), pairs_of(get_solver(solver)))


def _at(condition: Any, y: Any, theta: Any, vector: Any, options: Any) -> tuple[Linearization[Any, Any], Any]:
    """Return what is linearised there, and the start of the solve."""
    x0, state = options.pop("x0", None), options.pop("state", None)
    if state is None:
        return linearized(problem_of(condition, y, theta, vector=vector, **options)), x0
    if x0 is not None:
        raise InputError("x0 and state are given: a state brings a start of its own.\nNext: one of them.")
    if not (isinstance(state, SequenceState) or (isinstance(state, str) and state == "new")):
        raise InputError(f"state = {brief(state)}: expected 'new', or the state that an earlier call returned.")
    start = SequenceState() if isinstance(state, str) else state
    return linearized(problem_of(condition, y, theta, vector=vector, **options)), start


def _handed_out(lin: Linearization[Any, Any], x0: Any, value: Any, return_report: bool) -> Any:
    """Return a value, with the state of its sequence where there is one, and with the report if it is asked for."""
    if not isinstance(x0, SequenceState):
        return (value, lin.report) if return_report else value
    state = x0 if lin.carried is None else lin.carried
    return (value, state, lin.report) if return_report else (value, state)
