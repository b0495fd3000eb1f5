"""A condition linearised at a point: the four maps, the two solves, the report.

The invariant is F(y*(θ), θ) = 0 for all θ near the point. Differentiating it along θ̇,

    A w + B θ̇ = 0   with  A = ∂F/∂y,  B = ∂F/∂θ,  w = dy along θ̇,

so w solves A w = −B θ̇ (forward), and for a cotangent v of y

    ⟨v, w⟩ = −⟨v, A⁻¹ B θ̇⟩ = ⟨−Bᵀ u, θ̇⟩   with  Aᵀ u = v,

so the cotangent of θ is −Bᵀ u (reverse). One factorisation of A serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

from implicitdiff.arrays import Array, all_finite_items, any_true, item_norm, item_numbers, probe_vector, to_python
from implicitdiff.conditions import as_condition
from implicitdiff.conditions.point import Point
from implicitdiff.errors import (
    DerivativeError,
    NonFiniteError,
    NonFiniteProductError,
    NotASolutionWarning,
    ShapeError,
    SolveError,
    SolveWarning,
)
from implicitdiff.failure import check_mode, explain, settle, warn
from implicitdiff.ravel import Ravel
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.report import Report, Status
from implicitdiff.solve import Solution, make_report, poison, prepare

__all__ = ["Linearization", "linearized"]


Method = TypeVar("Method", bound=Callable[..., Any])


def numeric(method: Method) -> Method:
    """Run a method of `Linearization` in the context in which its backend computes."""

    @functools.wraps(method)
    def run(self: Linearization, *args: Any, **kwargs: Any) -> Any:
        with self._point.backend.computing():
            return method(self, *args, **kwargs)

    return cast(Method, run)


class Linearization:
    """A condition linearised at (y, θ); made by `implicitdiff.linearize`.

    A is factored (or its preconditioner built) at the first solve and serves every later one, forward and reverse.

    Attributes
    ----------
    y, theta : pytree
        The point.
    report : Report or None
        How the latest solve ended.
    """

    def __init__(
        self, condition: Any, y: Any, theta: Any, *, args: tuple[Any, ...] = (), solver: Any = "auto",
        on_failure: str = "raise", backend: Any = None, batched: bool = False, own: bool = False,
    ) -> None:  # fmt: skip
        check_mode(on_failure)
        engine = get_backend(backend) if backend is not None else backend_for({"y": y, "theta": theta})
        self.y, self.theta = y, theta
        self._on_failure = on_failure
        self._bad: Array | None = None
        with engine.computing():
            y_border = Ravel(engine, y, "y", batched, own)
            theta_border = Ravel(engine, theta, "theta", batched, own)
            y_border.check_partner(theta_border)
            self._point = Point(engine, y_border, theta_border, tuple(args))
            for border in (y_border, theta_border):
                self._bad = self._check_finite(border.vector, border, self._bad)
            maps = as_condition(condition).maps(self._point)
        self._B, self._residual, self._at = maps.B, maps.residual, maps.at
        self._prepared = prepare(maps.A, solver)
        self._stationarity: Array | None = None
        self.report: Report | None = None

    @property
    def derivatives(self) -> dict[str, str]:
        """Where the products with A and B come from."""
        return {"A": self._prepared.operator.sources, "B": self._B.sources}

    # -- public --------------------------------------------------------------------------------------
    @numeric
    def vjp(self, cotangent: Any, *, x0: Array | None = None) -> Any:
        """−Bᵀ A⁻ᵀ v.

        Parameters
        ----------
        cotangent : pytree, like y
            v, the gradient of a loss with respect to y.
        x0 : array, shape (n,), optional
            Warm start for the raveled adjoint u (``report.solution`` of an earlier call).

        Returns
        -------
        pytree, like theta

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        border = self._point.y
        v = border.like(cotangent, "cotangent", dtype=border.dtype)
        g, error = self._reverse(v, x0, "cotangent")
        return self._deliver(self._point.theta.unravel(g), error)

    @numeric
    def jvp(self, tangent: Any, *, x0: Array | None = None) -> Any:
        """Derivative of y along a tangent of θ: the solution w of A w = −B θ̇.

        Parameters
        ----------
        tangent : pytree, like theta
            θ̇.
        x0 : array, shape (n,), optional
            Warm start for the raveled w.

        Returns
        -------
        pytree, like y

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        border = self._point.theta
        t = border.like(tangent, "tangent", dtype=border.dtype)
        w, error = self._forward(t, x0)
        return self._deliver(self._point.y.unravel(w), error)

    @numeric
    def jacobian(self) -> Any:
        """Dense dy/dθ.

        All columns are solved together, forward for m <= n and in reverse otherwise.

        Returns
        -------
        array, shape y.shape + theta.shape
            For pytrees the structure of y with, at each leaf, the structure of theta.

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        p = self._point
        xp, n, m, items = p.backend.xp, p.y.n, p.theta.n, p.items
        if n == 0 or m == 0:
            return p.nest(xp.zeros((*items, n, m), dtype=p.y.dtype, device=p.y.device))
        if m <= n:
            w, error = self._push(
                xp.moveaxis(self._B.dense(), -1, 0), None, self._bad, p.theta.vector + 1
            )  # (m, *items, n)
            return self._deliver(p.nest(xp.moveaxis(w, 0, -1)), error)
        unit = xp.eye(n, dtype=p.y.dtype, device=p.y.device)
        unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(items), n)), (n, *items, n))
        rows, error = self._pull(*self._solve(unit, None, transposed=True, bad=self._bad))
        return self._deliver(p.nest(xp.moveaxis(rows, 0, -2)), error)

    @numeric
    def gradient(self, outer: Any, x0: Array | None = None) -> Any:
        """Total gradient of a loss ``L(y, theta) -> scalar``: ∂L/∂θ − Bᵀ A⁻ᵀ ∂L/∂y.

        Parameters
        ----------
        outer : callable
            L; with ``batched=True`` it returns one scalar per item.
        x0 : array, shape (n,), optional
            Warm start for the raveled adjoint.

        Returns
        -------
        pytree, like theta

        Raises
        ------
        SolveError
            Where the solve failed, under ``on_failure="raise"``.
        """
        p = self._point
        loss = p.scalar_function(outer, "outer", args=())
        by_y, by_theta, kind = p.backend.gradients(loss, p.y.vector, p.theta.vector)
        wrong = self._product_error(by_y, "the gradient of outer with respect to y")
        wrong = wrong or self._product_error(by_theta, "the gradient of outer with respect to theta")
        g, error = self._pull(*self._solve(by_y, x0, transposed=True, bad=self._bad))
        error = wrong or error
        if self.report is not None:
            self.report = replace(self.report, derivatives={**self.report.derivatives, "outer": kind})
        return self._deliver(p.theta.unravel(by_theta + g), error)

    # -- for a framework's own derivative of the solution ----------------------------------------------
    @numeric
    def solve(self, b: Array, *, transposed: bool = False) -> Array:
        """A⁻¹ b, or A⁻ᵀ b, for raveled right-hand sides (*rhs, *items, n); failures as for `vjp`."""
        bad = self._check_finite(b, self._point.y, self._bad, "b")
        solution, error = self._solve(b, None, transposed=transposed, bad=bad)
        return self._deliver(self._poisoned(solution, solution.x), error)

    @numeric
    def pullback(self, v: Array) -> Array:
        """−Bᵀ A⁻ᵀ v for raveled cotangents (*rhs, *items, n); failures as for `vjp`."""
        return self._deliver(*self._reverse(v, None, "cotangent"))

    # -- vectors -------------------------------------------------------------------------------------
    def _reverse(self, v: Array, x0: Array | None, name: str) -> tuple[Array, SolveError | None]:
        """−Bᵀ A⁻ᵀ v on vectors."""
        bad = self._check_finite(v, self._point.y, self._bad, name)
        return self._pull(*self._solve(v, x0, transposed=True, bad=bad))

    def _forward(self, t: Array, x0: Array | None) -> tuple[Array, SolveError | None]:
        """−A⁻¹ B t on vectors."""
        bad = self._check_finite(t, self._point.theta, self._bad, "tangent")
        return self._push(self._B.matvec(t), x0, bad, t)

    def _push(self, b: Array, x0: Array | None, bad: Array | None, t: Array) -> tuple[Array, SolveError | None]:
        """−A⁻¹ b."""
        wrong = self._product_error(b, "mixed_jvp (B t)")
        if not any_true(self._point.backend.xp, b != 0):
            self._check_dependence(t)
        solution, error = self._solve(-b, x0, transposed=False, bad=bad)
        return self._poisoned(solution, solution.x), wrong or error

    def _pull(self, solution: Solution, error: SolveError | None) -> tuple[Array, SolveError | None]:
        """−Bᵀ u."""
        u = solution.x
        g = -self._B.rmatvec(u)
        if error is None and not any_true(self._point.backend.xp, solution.failed):
            error = self._product_error(g, "mixed_vjp (Bᵀ u)")
        if not any_true(self._point.backend.xp, g != 0):
            self._check_dependence(u)
        return self._poisoned(solution, g), error

    def _solve(
        self, b: Array, x0: Array | None, *, transposed: bool, bad: Array | None
    ) -> tuple[Solution, SolveError | None]:
        if x0 is not None:
            x0 = self._start(x0, b)
        solution = self._prepared.solve(b, x0, transposed=transposed)
        xp, operator = self._point.backend.xp, self._prepared.operator
        failed = solution.failed
        if bad is not None:  # items with NaN among their inputs have been told: NaN out, and no second message
            failed = failed & ~bad
            code = xp.full_like(solution.status, int(Status.NON_FINITE))
            nan = xp.full_like(solution.x, float("nan"))
            solution = solution._replace(
                status=xp.where(bad, code, solution.status), x=xp.where(bad[..., None], nan, solution.x)
            )
        wrong = self._check_stationarity(solution)
        self.report = make_report(solution, self._prepared.solver, self._stationarity, self.derivatives)
        if wrong is not None or not any_true(xp, failed):
            return solution, wrong
        return solution, explain(operator, solution)

    def _poisoned(self, solution: Solution, x: Array) -> Array:
        return poison(self._point.backend.xp, solution, x) if self._on_failure == "nan" else x

    def _deliver(self, value: Any, error: SolveError | None) -> Any:
        """Hand the value over, or raise or warn with the value attached: nothing is lost."""
        if error is not None:
            error.value, error.report = value, self.report
            settle(error, self._on_failure)
        return value

    def _start(self, x0: Any, b: Array) -> Array:
        found = self._point.backend.as_leaf(x0, "x0")
        if found.shape != b.shape:
            raise ShapeError(f"x0 has shape {tuple(found.shape)}; expected the raveled {tuple(b.shape)}.")
        self._point.y.check_placed(found, "x0", b.dtype)
        return self._point.backend.astype(found, b.dtype)

    # -- checks --------------------------------------------------------------------------------------
    def _check_finite(self, vector: Array, border: Ravel, bad: Array | None, name: str | None = None) -> Array | None:
        """Raise where an input is not finite; in a batch that need not raise, return the bad items so far."""
        xp = self._point.backend.xp
        finite = xp.isfinite(vector)
        if not any_true(xp, ~finite):
            return bad
        where = border.finite_leaf(finite)
        if name is not None:
            where = name + where.removeprefix(border.name)
        error = NonFiniteError(f"{where} holds NaN or Inf.\nNext: check what produced it; a diverged solver often has.")
        if self._on_failure == "raise" or not self._point.items:
            raise error
        if self._on_failure == "warn":
            warn(str(error), SolveWarning)
        here = ~xp.all(finite, axis=-1)
        return here if bad is None else bad | here

    def _product_error(self, product: Array, what: str) -> SolveError | None:
        """Return the error for a product that holds NaN or Inf, None where it is finite."""
        xp = self._point.backend.xp
        bad = ~all_finite_items(xp, product)
        if not any_true(xp, bad):
            return None
        items = ""
        if self._point.items:
            last = xp.any(xp.reshape(bad, (-1, self._point.items[0])), axis=0)
            items = f"items {item_numbers(xp, last)}: "
        return NonFiniteProductError(
            f"{items}{what} holds NaN or Inf, although y and theta are finite.\n"
            "Likely cause: a derivative that does not exist at this point (a square root or a log at 0).\n"
            "Next: evaluate that product at (y, theta), and smooth the function there."
        )

    def _check_dependence(self, vector: Array) -> None:
        """Raise where the product with B vanishes because F does not see θ at all.

        A derivative that happens to be zero is fine, so F itself is asked: at another θ, is it the same to the bit,
        here and at another y? (y = 0 may be a solution for every θ, and then F(0, θ) tells nothing.)
        """
        p = self._point
        xp = p.backend.xp
        if self._at is None or 0 in (p.theta.n, p.y.n, *p.items) or not any_true(xp, vector != 0):
            return
        y, theta = p.y.vector, p.theta.vector
        moved = _nearby(p.theta)
        for at in (y, _nearby(p.y)):
            there = xp.asarray(self._at(at, moved), copy=True)  # it may be a buffer that the next call fills again
            if any_true(xp, there != self._at(at, theta)):
                return
        raise DerivativeError(
            "F does not depend on theta: it is the same to the last bit at another theta.\n"
            "Likely cause: the function uses a theta from the enclosing scope (a closure) instead of its argument.\n"
            "Next: write it as f(y, theta, *args) and use that theta."
        )

    def _check_stationarity(self, solution: Solution) -> SolveError | None:
        # F near y is A δ for an error δ of y, so ‖F‖ is held against ‖A‖ max(‖y‖, 1), with the lower estimate
        # of ‖A‖ that the solve brought along: scaling F scales both sides.
        if self._stationarity is not None:
            return None
        p = self._point
        xp, y = p.backend.xp, p.y.vector
        if self._residual is None or p.y.n == 0:
            self._stationarity = xp.full(p.items, float("nan") if p.y.n else 0.0, dtype=p.y.dtype, device=p.y.device)
            return None
        residual = self._residual()
        size = item_norm(xp, residual)
        self._stationarity = size
        norm = solution.operator_norm
        if norm is None or any_true(xp, norm == 0):
            norm = self._norm_along(residual, size)
        length = item_norm(xp, y)
        length = xp.where(length > 1, length, xp.ones_like(length))
        level = 1e-5 if float(xp.finfo(p.y.dtype).eps) < 1e-10 else 1e-3
        bad = size > level * xp.asarray(norm, dtype=size.dtype) * length
        if any_true(xp, bad):  # the estimate is a lower one: a short solve may not have seen the direction of F
            norm = xp.maximum(xp.asarray(norm, dtype=size.dtype), self._norm_along(residual, size))
            bad = size > level * norm * length
        if any_true(xp, bad):
            self._warn_not_solution(size, bad)
        return None if self._bad is not None else self._product_error(residual, "F(y, theta)")

    def _norm_along(self, residual: Array, size: Array) -> Array:
        xp = self._point.backend.xp
        safe = xp.where(size > 0, size, xp.ones_like(size))
        return item_norm(xp, self._prepared.operator.matvec(residual / safe[..., None]))

    def _warn_not_solution(self, size: Array, bad: Array) -> None:
        xp = self._point.backend.xp
        if self._point.items:
            head = (
                f"y is not a solution in items {item_numbers(xp, bad)}: ‖F(y, theta)‖ up to {float(xp.max(size)):.3g}."
            )
        else:
            head = f"y is not a solution: ‖F(y, theta)‖ = {to_python(size):.3g}."
        warn(
            f"{head}\nThe derivative is that of a solution at y, and is off by as much as y is.\n"
            "Next: solve to a tighter tolerance, or check that the condition matches the solver.",
            NotASolutionWarning,
        )


def linearized(condition: Any, y: Any, theta: Any, *, backend: Any = None, **options: Any) -> Linearization:
    """Linearise with the arrays' backend, by its own `Linearization` if it records what is done with the results."""
    engine = get_backend(backend) if backend is not None else backend_for({"y": y, "theta": theta})
    return getattr(engine, "linearization", Linearization)(condition, y, theta, backend=engine, **options)


def _nearby(border: Ravel) -> Array:
    """Return another point, one percent away."""
    xp, x = border.backend.xp, border.vector
    return x + 0.01 * probe_vector(xp, border.n, x.dtype, border.device) * (1 + xp.abs(x))
