"""The public functions: each a few lines over a `Linearization`."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from implicitdiff.compilers import public
from implicitdiff.linearization import Linearization, linearized
from implicitdiff.outcome import Report
from implicitdiff.problem import problem_of
from implicitdiff.typing import DEFAULTS, ConditionLike, Options, StartedOptions, T, Y

__all__ = ["implicit_grad", "implicit_jacobian", "implicit_jvp", "implicit_vjp", "linearize"]


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

    Returns
    -------
    pytree, like theta

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
    return _with_report(lin, lin.product("vjp", cotangent, x0, lin.control), return_report)


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

    Returns
    -------
    pytree, like y

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
    return _with_report(lin, lin.product("jvp", tangent, x0, lin.control), return_report)


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
    return _with_report(lin, lin.product("jacobian", None, x0, lin.control), return_report)


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

    Returns
    -------
    pytree, like theta

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
    return _with_report(lin, lin.product(mode, outer, x0, lin.control), return_report)


def _at(condition: Any, y: Any, theta: Any, vector: Any, options: Any) -> tuple[Linearization[Any, Any], Any]:
    """Return what is linearised there, and the start of the solve."""
    x0 = options.pop("x0", None)
    return linearized(problem_of(condition, y, theta, vector=vector, **options)), x0


def _with_report(lin: Linearization[Any, Any], value: Any, wanted: bool) -> Any:
    return (value, lin.report) if wanted else value
