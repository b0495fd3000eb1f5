"""Constrained minima: the Karush-Kuhn-Tucker conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicitdiff.conditions.base import Function, check_callables, check_verify
from implicitdiff.conditions.constrained import Constrained, Degenerate, Route
from implicitdiff.conditions.constraint import Constraint
from implicitdiff.conditions.lagrangian import Objective
from implicitdiff.conditions.scipy_constraints import collected
from implicitdiff.errors import InputError

__all__ = ["KKT"]


@dataclass(frozen=True, eq=False, repr=False)
class KKT(Constrained):
    """A solution y of min f(y, θ) subject to eq(y, θ) = 0 and ineq(y, θ) <= 0.

    With the Lagrangian 𝓛 = f + λᵀh + μᵀg, h = 0, g <= 0, μ >= 0, the derivative solves

        [[H, Jᵀ], [J, 0]] (dy, dz) = −(∂²𝓛/∂θ∂y, ∂c/∂θ) dθ,   H = ∂²𝓛/∂y²,   J = ∂c/∂y,

    where c holds the equalities and those inequalities that are active, and z their multipliers. What y violates, and
    active constraints with linearly dependent gradients (LICQ), are errors that name the constraint; a weakly active
    one (multiplier zero) and a multiplier of the wrong sign are warnings. A bound that is infinite, g = −∞, is none.

    Parameters
    ----------
    f : callable
        ``f(y, theta, *args) -> scalar``, to be minimised.
    eq, ineq : callable, SciPy's constraint, or sequence of them, optional
        ``h(y, theta, *args)`` and ``g(y, theta, *args)``: an array of constraints of any shape, or a tree of arrays;
        one of the two at least. Or SciPy's Bounds, LinearConstraint, NonlinearConstraint or dict: rows with lb = ub are
        equalities, wherever it stands. Its functions are called as SciPy does, or, if they require more than one
        argument, as ``fun(y, theta, *args)``, ``jac(y, theta, *args)`` and ``hess(y, theta, v, *args)``.
    grad : callable, optional
        ``∇_y f(y, theta, *args) -> like y``.
    hvp : callable, optional
        ``(∂²f/∂y²) v`` of f, not of 𝓛, as ``hvp(y, theta, v, *args) -> like y``.
    hessian : callable, optional
        ``∂²f/∂y²`` of f, not of 𝓛, as ``hessian(y, theta, *args)``: as for `Stationary`.
    eq_jacobian, ineq_jacobian : callable, optional
        ``∂h/∂y`` and ``∂g/∂y`` as ``eq_jacobian(y, theta, *args)``: a dense array or a SciPy sparse matrix, one row for
        each constraint, one column for each coordinate of the raveled y; or ``(k, *shape)`` for each leaf of y.
    eq_hessian, ineq_hessian : callable, optional
        ``Σ λ_i ∂²h_i/∂y²`` and ``Σ μ_i ∂²g_i/∂y²`` as ``eq_hessian(y, theta, lam, *args)``: SciPy's ``hess(x, v)`` with
        theta in between. ``lam`` holds one number for each constraint, raveled.
    lagrangian_hessian : callable, optional
        ``∂²𝓛/∂y²`` as ``lagrangian_hessian(y, theta, lam, mu, *args)``: what Ipopt and CasADi have, at the weight 1 of
        f. It is used in place of the other second derivatives. What there is none of has shape (0,).
    multipliers : pair of arrays, array, callable or "aux", optional
        (λ, μ), one entry per constraint, as the solver returned them; the array alone where there is one kind of
        constraint; or ``(y, theta, *args) ->`` the same. ``"aux"``: what the solver that `implicit_function` wraps
        returns beside y (``has_aux=True``): the multipliers themselves, or a dict that holds them as ``"multipliers"``.
        By default they are recovered by least squares from ∇f = −Σ λ∇h − Σ μ∇g over the active set.
    route : {"auto", "kkt", "schur", "nullspace"}
        How the saddle system is solved. ``"kkt"`` (and "auto"): by ``solver=`` as a whole. ``"schur"``: by
        ``solver=`` for H, and the Schur complement J H⁻¹ Jᵀ; H has to be regular. ``"nullspace"``: by ``solver=`` for
        the reduced Hessian on null(J), the only part of H that has to be regular.
    active_tol : float, optional
        An inequality is active within this distance, ``-g_i <= active_tol R_i`` with R_i = ‖∇g_i ∘ u‖, u the size of
        the coordinates of y; and a multiplier is zero within this part of what moves y by as much. Default 1e-6 in
        double precision, 3e-4 in single.
    degenerate : {"raise", "select"}
        What is done where active constraints have linearly dependent gradients, or a multiplier of zero: y has a kink
        in θ there. "raise": the former is an error, and of the latter the derivative is that of the side where they are
        not active. "select": one element of the generalised derivative, the one-sided derivative along one direction
        of θ, with a `DegeneracyWarning`; under ``jit``, too.
    verify : bool, default True
        Whether derivatives that are given are held against the functions at their first use, as for `Stationary`.

    Raises
    ------
    InputError
        Where there is no constraint, or an argument is none of these.

    Notes
    -----
    What is given of derivatives is used; what is missing comes from autodiff, or from differences. Those with respect
    to θ are derived from what is given: of ∇f and J, first derivatives along θ are all that is needed.

    The Jacobian J of the constraints is held as a matrix, (k, n) for all k of them, and multipliers cost k³ operations.
    On NumPy it is sparse where ``eq_jacobian`` or ``ineq_jacobian`` returns a SciPy sparse matrix, and so are H (the
    pattern of one that is not given is found by products, as by ``sparsity="detect"`` of `Stationary`) and the whole
    system, which SuperLU factors.

    References
    ----------
    A. V. Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Math. Program. 10 (1976)
    287-311. DOI 10.1007/BF01580677
    S. Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
    optimization", 2016. arXiv:1607.05447

    Examples
    --------
    The point of the line y₁ + y₂ = θ that is next to the origin is (θ, θ) / 2:

    >>> import numpy as np
    >>> from implicitdiff import KKT, implicit_jacobian
    >>> line = KKT(lambda y, theta: (y**2).sum(), eq=lambda y, theta: y.sum() - theta)
    >>> np.round(implicit_jacobian(line, np.array([1.0, 1.0]), np.array(2.0)), 6)
    array([0.5, 0.5])
    """

    f: Callable[..., Any]
    eq: Callable[..., Any] | None = None
    ineq: Callable[..., Any] | None = None
    grad: Callable[..., Any] | None = None
    hvp: Callable[..., Any] | None = None
    hessian: Callable[..., Any] | None = None
    eq_jacobian: Callable[..., Any] | None = None
    ineq_jacobian: Callable[..., Any] | None = None
    eq_hessian: Callable[..., Any] | None = None
    ineq_hessian: Callable[..., Any] | None = None
    lagrangian_hessian: Callable[..., Any] | None = None
    multipliers: Any = None
    route: str = "auto"
    active_tol: float | None = None
    degenerate: str = "raise"
    verify: bool = True

    def __init__(
        self, f: Callable[..., Any], eq: Function = None, ineq: Function = None, *, grad: Function = None,
        hvp: Function = None, hessian: Function = None, eq_jacobian: Function = None, ineq_jacobian: Function = None,
        eq_hessian: Function = None, ineq_hessian: Function = None, lagrangian_hessian: Function = None,
        multipliers: Any = None, route: Route = "auto", active_tol: float | None = None,
        degenerate: Degenerate = "raise", verify: bool = True,
    ) -> None:  # fmt: skip
        if not callable(f):
            raise InputError(f"f is {type(f).__name__}; expected a callable f(y, theta, *args) -> scalar.")
        functions = {
            "eq": eq, "ineq": ineq, "grad": grad, "hvp": hvp, "hessian": hessian, "eq_jacobian": eq_jacobian,
            "ineq_jacobian": ineq_jacobian, "eq_hessian": eq_hessian, "ineq_hessian": ineq_hessian,
            "lagrangian_hessian": lagrangian_hessian,
        }  # fmt: skip
        check_callables(**{name: given for name, given in functions.items() if name not in {"eq", "ineq"}})
        check_verify(verify)
        if eq is None and ineq is None:
            raise InputError("KKT needs eq or ineq; without constraints use Stationary(f).")
        for name in ("eq", "ineq"):
            functions[name] = collected(functions[name], name)
            of = next((n for n in (f"{name}_jacobian", f"{name}_hessian") if functions[n] is not None), None)
            if of is not None and not callable(functions[name]):
                what = "not" if functions[name] is None else "no single function"
                raise InputError(f"{of} is given, and {name} is {what}.")
        fields = {"f": f, **functions, "multipliers": multipliers, "route": route, "active_tol": active_tol,
                  "degenerate": degenerate, "verify": verify}  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_options()

    @property
    def constraints(self) -> tuple[Any, ...]:
        own = {"eq": (self.eq_jacobian, self.eq_hessian), "ineq": (self.ineq_jacobian, self.ineq_hessian)}
        found: list[Any] = []
        for kind, given in (("eq", self.eq), ("ineq", self.ineq)):
            found += (
                given
                if isinstance(given, tuple)
                else []
                if given is None
                else [Constraint(kind, kind, given, *own[kind])]
            )
        return tuple(found)

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        given = [*self.objective(0).given, *(g for c in self.constraints for g in c.given)]
        return (self.f, *(c.fun for c in self.constraints if c.fun), *given) if self.verify and given else ()

    def objective(self, lead: int) -> Objective:
        return Objective(self.f, self.grad, self.hvp, self.hessian, self.lagrangian_hessian)
