"""A condition linearised at a point, as users hold it: derivatives on trees, the report, what a failure does."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Generic, cast

from implicitdiff.accuracy import inaccuracy, inaccurate, nan_items, shown
from implicitdiff.arrays import Array, any_true
from implicitdiff.axes import Axes, Shared, spread
from implicitdiff.compilers import untraced
from implicitdiff.conditions import as_condition
from implicitdiff.covariance import covariance_of, standard_errors_of
from implicitdiff.diagnosis import error_from, reject_non_finite
from implicitdiff.error_estimate import NOTHING, ErrorControl, ErrorEstimate, Polish
from implicitdiff.errors import NotConvergedError, NotPositiveDefiniteError, SingularError, SolveError
from implicitdiff.estimates import Estimate
from implicitdiff.linalg.reports import make_report
from implicitdiff.linalg.solve import method_of
from implicitdiff.mode import Mode
from implicitdiff.outcome import Report, settle
from implicitdiff.polishing import polished
from implicitdiff.problem import Problem
from implicitdiff.pytree import flatten
from implicitdiff.records import brief
from implicitdiff.rules import Rules
from implicitdiff.runs import Run
from implicitdiff.typing import T, Y
from implicitdiff.verification.confirmation import Confirmation
from implicitdiff.verification.first_use import verify
from implicitdiff.verification.outer import check_outer

__all__ = ["Linearization", "linearized"]

BLAMED_ON_A = (NotConvergedError, NotPositiveDefiniteError, SingularError)


class Linearization(Generic[Y, T]):
    """A condition linearised at (y, θ); made by `implicitdiff.linearize`.

    A is factored (or its preconditioner built) at the first solve and serves every later one, forward and reverse.

    Attributes
    ----------
    y, theta : pytree
        The point.
    report : Report or None
        How the latest solve ended.
    """

    y: Y
    theta: T
    _shown: Report | None = None
    _verified: bool = False
    _shared: Shared | None = None
    estimate: Estimate | None = None
    carried: Any = None
    """What the latest solve leaves to the next one of a sequence."""
    mode: Mode = Mode.EAGER
    by_newton: bool = False
    """Whether y is still on its way to the solution, so that nobody need be told how far that is."""

    def __init__(self, problem: Problem) -> None:
        self.y, self.theta = problem.y, problem.theta
        self._problem = self._asked = problem
        engine = problem.backend
        with engine.computing():
            self._runner = engine.runner(problem) if engine.traced else Rules(problem)
        self._run: Run | None = None

    def __repr__(self) -> str:
        p, report = self._asked, self.report  # of the latest solve
        shown = [f"condition={brief(p.condition)}", f"backend={p.backend.name!r}", f"solver={brief(p.settings.solver)}"]
        return f"Linearization({', '.join(shown if report is None else [*shown, f'report={report!r}'])})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what it is made of, and the report; factors and programs are made again."""
        return linearized, (self._asked,), {"_shown": self.report}

    @property
    @untraced
    def report(self) -> Report | None:
        """How the latest solve ended; None before the first."""
        if self._run is not None:
            self._shown, self._run = self._report(self._run), None
        return self._shown

    # -- public --------------------------------------------------------------------------------------
    @untraced
    def vjp(
        self, cotangent: Any, *, x0: Array | None = None, error: bool | None = None, max_error: float | None = None,
        polish: Polish | None = None,
    ) -> T:  # fmt: skip
        """−Bᵀ A⁻ᵀ v.

        Parameters
        ----------
        cotangent : pytree, like y
            v, the gradient of a loss with respect to y.
        x0 : array, shape (n,), optional
            Warm start for the raveled adjoint u (``report.solution`` of an earlier call).
        error : bool, optional
            Whether to estimate how far off the result is (`Report.error`); by default as `linearize` was asked.
        max_error : float, optional
            Estimated relative error above which the result is a failure.
        polish : int or "auto", optional
            Newton steps from y before the derivative is taken.

        Returns
        -------
        pytree, like theta

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        return self.product("vjp", cotangent, x0, self.control.but(error, max_error, polish))

    @untraced
    def jvp(
        self, tangent: Any, *, x0: Array | None = None, error: bool | None = None, max_error: float | None = None,
        polish: Polish | None = None,
    ) -> Y:  # fmt: skip
        """Derivative of y along a tangent of θ: the solution w of A w = −B θ̇.

        Parameters
        ----------
        tangent : pytree, like theta
            θ̇.
        x0 : array, shape (n,), optional
            Warm start for the raveled w.
        error, max_error, polish
            See `vjp`.

        Returns
        -------
        pytree, like y

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        return self.product("jvp", tangent, x0, self.control.but(error, max_error, polish))

    @untraced
    def jacobian(
        self, *, error: bool | None = None, max_error: float | None = None, polish: Polish | None = None
    ) -> Any:
        """Dense dy/dθ.

        All columns are solved together, forward for m <= n and in reverse otherwise.

        Parameters
        ----------
        error, max_error, polish
            See `vjp`. The error of a Jacobian is estimated along four random directions, or in full where A is
            factored.

        Returns
        -------
        array, shape y.shape + theta.shape
            For pytrees the structure of y with, at each leaf, the structure of theta.

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        return self.product("jacobian", None, None, self.control.but(error, max_error, polish))

    @untraced
    def gradient(
        self, outer: Any, x0: Array | None = None, *, error: bool | None = None, max_error: float | None = None,
        polish: Polish | None = None,
    ) -> T:  # fmt: skip
        """Total gradient of a loss ``L(y, theta) -> scalar``: ∂L/∂θ − Bᵀ A⁻ᵀ ∂L/∂y.

        Parameters
        ----------
        outer : callable
            L; with ``batched=True`` it returns one scalar per item.
        x0 : array, shape (n,), optional
            Warm start for the raveled adjoint.
        error, max_error, polish
            See `vjp`.

        Returns
        -------
        pytree, like theta

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        return self.product("gradient", outer, x0, self.control.but(error, max_error, polish))

    # -- of least squares ------------------------------------------------------------------------------
    @untraced
    def covariance(self, scale: bool = True) -> Array:
        """Covariance of the estimate y of a least-squares problem: s²(JᵀJ)⁻¹ with s² = ‖r‖² / (k − n).

        Parameters
        ----------
        scale : bool, default True
            Whether to multiply by s²; otherwise (JᵀJ)⁻¹, for residuals that are divided by known standard deviations.

        Returns
        -------
        array, shape (n, n)
            Over the raveled y; with ``batched=True`` (items, n, n). From a singular value decomposition of J.

        Raises
        ------
        InputError
            Where the condition is not `LeastSquares`, or has a loss or a regularizer, or k <= n.
        SingularError
            Where J has not full rank, under ``on_failure="raise"``.

        Examples
        --------
        A line through four points:

        >>> import numpy as np
        >>> from implicitdiff import LeastSquares, linearize
        >>> x, data = np.arange(4.0), np.array([1.0, 3.0, 5.0, 8.0])
        >>> line = LeastSquares(lambda y, theta: y[0] + y[1] * x - theta)
        >>> np.round(linearize(line, np.array([0.8, 2.3]), data).covariance(), 6)
        array([[ 0.105, -0.045],
               [-0.045,  0.03 ]])
        """
        return covariance_of(self._problem, scale)

    @untraced
    def standard_errors(self, scale: bool = True) -> Y:
        """Square roots of the diagonal of ``covariance(scale)``, structured like y."""
        return cast("Y", standard_errors_of(self._problem, scale))

    @property
    @untraced
    def derivatives(self) -> dict[str, str]:
        """Where the products came from that were used so far."""
        return self._runner.derivatives

    # -- for a framework's own derivative of the solution ----------------------------------------------
    @untraced
    def solve(self, b: Array, *, transposed: bool = False) -> Array:
        """A⁻¹ b, or A⁻ᵀ b, for raveled right-hand sides (*rhs, *items, n); failures as for `vjp`."""
        return self._product("solve_adjoint" if transposed else "solve", b, None, NOTHING)

    @untraced
    def pullback(self, v: Array, x0: Any = None) -> Array:
        """−Bᵀ A⁻ᵀ v for raveled cotangents (*rhs, *items, n); failures as for `vjp`."""
        return self._product("pullback", v, x0, self.control)

    # -- inside --------------------------------------------------------------------------------------
    @property
    def control(self) -> ErrorControl:
        """What is asked for beside each derivative."""
        return self._asked.settings.control

    def product(self, mode: str, direction: Any, x0: Any, control: ErrorControl) -> Any:
        """Run a mode of the rules; what all items share is spread over them, and summed again."""
        if self._shared is None:
            return self._product(mode, direction, x0, control)
        return self._shared.product(self._product, mode, direction, x0, control)

    def _product(self, mode: str, direction: Any, x0: Any, control: ErrorControl) -> Any:
        """Run a mode of the rules, and hand the value over, or the error."""
        if control.polish == 0:
            value, error = self.attempt(mode, direction, x0, control)
        else:
            lin, (value, error) = polished(self, mode, direction, x0, control)
            self.mode, self.carried = lin.mode, lin.carried
            self._run, self._shown = None, None if lin.report is None else replace(lin.report, polished_y=lin.y)
        settings = self._problem.settings
        if settings.on_report is not None and self.mode is not Mode.INLINE and self.report is not None:
            settings.on_report(self.report)
        if error is not None:  # with the value attached: nothing is lost
            error.value, error.report = value, self.report
            settle(error, settings.on_failure)
        return value

    def attempt(self, mode: str, direction: Any, x0: Any, control: ErrorControl) -> tuple[Any, SolveError | None]:
        """Run a mode of the rules, judge what was seen; return the value, and the error if it failed."""
        problem, xp = self._problem, self._problem.backend.xp
        with problem.backend.computing():
            if mode == "gradient":
                seen = problem.backend.local(problem.y, problem.theta)
                point = (lambda: self._rules.point) if seen else None
                check_outer(direction, problem.backend, problem.y, problem.theta, point)
            self._run = run = self._runner(mode, direction, x0, estimate=control.estimates)
            self.estimate, self.mode, self.carried = run.estimate, run.mode, run.diagnostics.solution.carried
            if run.mode is Mode.INLINE:
                return self._limited(run, control), None
            known = None if run.rules is not None else as_condition(problem.condition).structure
            error = self._error_from(run, mode, direction)
            if known is not None and as_condition(problem.condition).structure != known:
                return self.attempt(mode, direction, x0, control)
            if not self._verified and (error is None or type(error) in BLAMED_ON_A):
                # a failed solve is blamed on A only if A is what it should be
                clean = error is None and run.clean is not None and bool(run.clean)  # which says that, too
                sure = clean or (error is None and not run.diagnostics.unsure(xp))
                found = run.diagnostics.solution.x if sure else None
                verify(problem, lambda: run.rules or self._rules, mode, found)
                self._verified = True
            if error is None and run.rules is not None and "finite differences" in run.derivatives.values():
                self._confirmation.check(run.rules, run.diagnostics.solution, mode, direction, x0)
            if error is None and run.estimate is not None and control.max_error is not None:
                found = cast("ErrorEstimate", cast("Report", self.report).error)
                error = inaccuracy(problem.backend, run.estimate, control.max_error, found)
                return self._limited(run, control), error
            return run.value, error

    def _limited(self, run: Run, control: ErrorControl) -> Any:
        """NaN in items whose estimated error is above the limit, where that is asked for or nothing can be raised."""
        mode, limit = self._problem.settings.on_failure, control.max_error
        if run.estimate is None or limit is None or mode == "ignore" or (run.mode is not Mode.INLINE and mode != "nan"):
            return run.value
        return nan_items(self._problem.backend, run.value, inaccurate(run.estimate, limit))

    def newton(self) -> Any:
        """y − A⁻¹F(y, θ), structured like y: a step of Newton's method."""
        with self._problem.backend.computing():
            return self._runner.newton()

    def moved(self, y: Any) -> Linearization[Any, Any]:
        """Return the linearisation at another y."""
        p = self._problem
        quiet = replace(p.settings, on_report=None, control=NOTHING)
        lin = Linearization[Any, Any](replace(p, y=y, condition=as_condition(p.condition).elsewhere(), settings=quiet))
        lin._shared = self._shared
        return lin

    def _error_from(self, run: Run, mode: str, direction: Any) -> SolveError | None:
        if run.rules is not None:
            run.rules.solution_warned = run.rules.solution_warned or self.by_newton
            return error_from(run.diagnostics, run.rules, method_of(run.diagnostics.solution, run.methods)[0], mode)
        if bool(run.clean):  # one look at what a compiled program found
            return None
        xp = self._problem.backend.xp
        if run.certain is not None and any_true(xp, run.diagnostics.step.doubtful):
            self._run = run = run._replace(diagnostics=run.diagnostics._replace(step=run.certain()))
            if bool(run.diagnostics.clean(xp)):
                return None
        return self._inquire(run, mode, direction)

    def _inquire(self, run: Run, mode: str, direction: Any) -> SolveError | None:
        """Find out outside of a compiled program what is wrong, where the functions can be asked again."""
        rules, problem = self._rules, self._problem
        _ = rules.prepared.whole  # a pattern that is wrong is told, or found anew
        point = rules.point
        ravelers = [(point.y, point.y.vector, "y"), (point.theta, point.theta.vector, "theta")]
        if mode in {"vjp", "jvp"}:
            raveler, name = (point.y, "cotangent") if mode == "vjp" else (point.theta, "tangent")
            ravelers.append((raveler, raveler.like(direction, name, dtype=raveler.dtype), name))
        for raveler, vector, name in ravelers:
            if not bool(point.backend.xp.all(raveler.space.finite(vector))):
                reject_non_finite(problem, raveler, vector, name)
        rules.solution_warned = rules.solution_warned or self.by_newton
        rules.kinds.update({"outer": ""} if mode == "gradient" else {})
        return error_from(run.diagnostics, rules, method_of(run.diagnostics.solution, run.methods)[0], mode)

    @cached_property
    def _confirmation(self) -> Confirmation:
        return Confirmation(self._problem, partial(Rules, flat=True))

    @cached_property
    def _rules(self) -> Rules:
        return Rules(self._problem, flat=True, later=True)  # of JAX each operation would be compiled by itself

    def _report(self, run: Run) -> Report:
        e, problem = run.diagnostics, self._problem
        found = make_report(
            e.solution, run.damping, run.methods, run.seconds, e.step.size, run.derivatives, run.mode, ~e.step.unsolved
        )
        if run.estimate is None:
            return found
        visible, condition = run.mode is not Mode.INLINE, as_condition(problem.condition)
        found = replace(found, error=shown(problem.backend.xp, run.estimate, condition, run.damping, visible=visible))
        return found if self._shared is None else self._shared.report(found)


def linearized(problem: Problem) -> Linearization[Any, Any]:
    """Linearise, by the `Linearization` of a backend that records what is done with the results, if it has one."""
    make: Any = problem.backend.linearization or Linearization
    if not problem.axes.shared:
        return make(problem)
    backend, (shared, mapped) = problem.backend, problem.axes
    leading = getattr(flatten(problem.y).leaves[0], "shape", ()) if flatten(problem.y).leaves else ()
    items = int(leading[0]) if leading else 1
    theta = spread(backend, problem.theta, shared, items)
    kept = Shared(backend, problem.theta, shared, items)
    with kept.explaining():
        lin: Linearization[Any, Any] = make(replace(problem, theta=theta, axes=Axes((), mapped)))
    lin._asked, lin.theta, lin._shared = problem, problem.theta, kept
    return lin
