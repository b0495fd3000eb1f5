"""The derivative rules on vectors: the four maps at a point, the two solves, and what was seen on the way.

The invariant is F(y*(θ), θ) = 0 for all θ near the point. Differentiating it along θ̇,

    A w + B θ̇ = 0   with  A = ∂F/∂y,  B = ∂F/∂θ,  w = dy along θ̇,

so w solves A w = −B θ̇ (forward), and for a cotangent v of y

    ⟨v, w⟩ = −⟨v, A⁻¹ B θ̇⟩ = ⟨−Bᵀ u, θ̇⟩   with  Aᵀ u = v,

so the cotangent of θ is −Bᵀ u (reverse). One factorisation of A serves both.

Nothing here raises or warns about a value: what was seen is returned as `Diagnostics`, so that the same code runs
inside a compiled program, and is judged outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, cast

from implicitdiff.arrays import Array, any_true, nan_where, needed
from implicitdiff.certificate import certify, newton_step
from implicitdiff.conditions import FixedPoint, as_condition
from implicitdiff.conditions.base import Maps
from implicitdiff.conditions.point import Point
from implicitdiff.curvature import refuted, suspicion
from implicitdiff.diagnosis import check_loss, reject_non_finite
from implicitdiff.errors import ShapeError
from implicitdiff.estimates import Product
from implicitdiff.least_norm import LeastNorm, returned, turned
from implicitdiff.linalg.solve import Prepared, Solution, prepare
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.mode import Mode
from implicitdiff.outcome import Status
from implicitdiff.polishing import once_only
from implicitdiff.problem import Problem
from implicitdiff.ravel import LeafRaveler, Raveler
from implicitdiff.runs import Run
from implicitdiff.solution_check import SolutionCheck, Step
from implicitdiff.solvers import get_solver
from implicitdiff.solvers.sequences import SequenceState
from implicitdiff.tolerances import TINY, UNCERTAIN
from implicitdiff.verification.consistency import contradicted

__all__ = ["Diagnostics", "Rules"]


class Diagnostics(NamedTuple):
    """What was seen on the way, per item where there are any: arrays only, so that it may leave a compiled program."""

    solution: Solution
    inputs: Array
    """Whether y, theta and the vector are finite."""
    right: Array
    """Whether what made the right-hand side (B t, or the gradients of the loss) is finite."""
    image: Array
    """Whether Bᵀ u is finite."""
    zero_product: Array
    """Whether a product with B is exactly zero, and the vector is not."""
    step: Step
    """What was seen of y as a solution."""
    observations: Any = None
    """What the condition saw beside F."""
    suspect: Any = None
    """Items in which the solve saw curvature that contradicts what y is said to be."""
    uncertain: Any = None
    """Items in which the rounding of A may have changed the solution visibly."""

    def unsure(self, xp: Any) -> bool:
        """Whether any item is `uncertain`."""
        return self.uncertain is not None and any_true(xp, self.uncertain)

    def clean(self, xp: Any) -> Array:
        """Whether there is nothing to tell: one number to look at."""
        good = self.inputs & self.right & self.image & self.step.finite & ~self.solution.failed
        good = good & ~self.step.unsolved & ~self.step.doubtful
        if self.observations is not None:
            good = good & self.observations.quiet
        for doubt in (self.suspect, self.uncertain):
            good = good if doubt is None else good & ~doubt
        return xp.all(good) & ~xp.any(self.zero_product)


class Rules:
    """The rules at one point; made where the arrays are, inside a compiled program or out of it.

    ``flat`` concatenates the leaves in any case. ``choices``: of another point, whose form of A is kept.
    A ``trial`` is a point of our own: nothing is raised. With ``later`` F is evaluated when A or B is asked for.
    """

    def __init__(
        self, problem: Problem, *, flat: bool = False, choices: Any = None, trial: bool = False, later: bool = False
    ) -> None:
        engine, settings = problem.backend, problem.settings
        self.condition, self.solver = as_condition(problem.condition), get_solver(settings.solver)
        if getattr(self.solver, "approximate", False) or self.condition.singular == "minimum-norm":
            problem = once_only(problem, self.solver, self.condition)
        keep = () if flat else _may_stay_trees(problem, self.condition, self.solver)
        self.problem, self.nan_on_failure = problem, engine.mode is Mode.INLINE and settings.on_failure != "ignore"

        def raveled(tree: Any, name: str) -> Raveler:
            kind = LeafRaveler if name in keep and not engine.is_vector(tree) else Raveler
            return kind(engine, tree, name, problem.batched, problem.copy)

        y, theta = raveled(problem.y, "y"), raveled(problem.theta, "theta")
        y.check_partner(theta)
        self.point = Point(engine, y, theta, tuple(problem.args), problem.axes.mapped)
        self.point.choices, self.trial = choices, trial
        numbers = self.condition.without_bounds(theta)
        self.inputs = self._finite(y.vector, y, "y") & self._finite(numbers, theta, "theta")
        self.follows = self.condition.follows and self.condition.singular == "minimum-norm" and y.n > 0
        self.kinds, self.product = dict[str, str](), cast("Product", None)
        self.solution_warned = self.warned = self.curved = self.unsure = False
        self._seen: Step | None = None
        if not later:
            _ = self.check

    @cached_property
    def maps(self) -> Maps:
        """A and B, and what the condition saw: the user's functions are evaluated."""
        y, theta = self.point.y.vector, self.point.theta.vector
        return self.point.backend.combined(self.condition.maps(self.point), y, theta)

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.maps.A, self.condition.routed(self.solver), nan_on_failure=self.nan_on_failure)

    @cached_property
    def least_norm(self) -> LeastNorm:
        """Where the solution of least norm is followed."""
        return LeastNorm(self)

    @cached_property
    def check(self) -> SolutionCheck:
        return SolutionCheck(self.point, self.maps, self.prepared)

    @property
    def derivatives(self) -> dict[str, str]:
        """Where the products came from that were used so far."""
        return {"A": self.prepared.operator.sources, "B": self.maps.B.sources, **self.kinds}

    def _finite(self, x: Any, raveler: Raveler, name: str) -> Array:
        """Whether the items of a vector are finite; where values are seen, one that is not is told at once."""
        finite = raveler.finite(x) if x.shape[-1] == raveler.n else self.problem.backend.space(x).finite(x)
        if not self.trial and not self.problem.backend.traced and any_true(self.problem.backend.xp, ~finite):
            reject_non_finite(self.problem, raveler, x, name)
        return finite

    @cached_property
    def flat(self) -> Rules:
        """The same on vectors that are one array."""
        return Rules(self.problem, flat=True) if isinstance(self.point.y, LeafRaveler) else self

    def __call__(self, mode: str, direction: Any, x0: Any, *, estimate: bool = False) -> Run:
        """Run a mode, and estimate its error if asked to."""
        rules = self.flat if estimate or mode == "jacobian" or isinstance(x0, SequenceState) else self  # dense ones
        rules.check.keeps = estimate
        value, diagnostics = getattr(rules, mode)(direction, x0)
        p, way, found = rules.prepared, self.problem.backend.mode, certify(rules) if estimate else None
        return Run(value, diagnostics, p.methods, rules.derivatives, p.damping, p.seconds, rules, way, estimate=found)

    def newton(self) -> Any:
        """y − A⁻¹F(y, θ), as a tree; y itself in items where that could not be solved for."""
        return newton_step(self.flat)

    # -- the modes -----------------------------------------------------------------------------------
    def vjp(self, cotangent: Any, x0: Any = None) -> tuple[Any, Diagnostics]:
        """−Bᵀ A⁻ᵀ v."""
        raveler = self.point.y
        v = raveler.like(cotangent, "cotangent", dtype=raveler.dtype)
        g, diagnostics = self._reverse(v, x0, self.inputs & self._finite(v, raveler, "cotangent"))
        return self.product.tree(g), diagnostics

    def jvp(self, tangent: Any, x0: Any = None) -> tuple[Any, Diagnostics]:
        """The solution w of A w = −B θ̇."""
        raveler = self.point.theta
        t = raveler.like(tangent, "tangent", dtype=raveler.dtype)
        finite = self.inputs & self._finite(t, raveler, "tangent")
        w, diagnostics = self._forward(lambda at: at.maps.B.matvec(t), x0, finite, t)
        return self.product.tree(w), diagnostics

    def tangent(self, tangent: Any, *, solution_checked: bool = False) -> Any:
        """w of A w = −B θ̇, as a linear function of θ̇ and nothing else: no look at what θ̇ is.

        ``solution_checked`` says that y was looked at as a solution before.
        """
        raveler = self.point.theta
        t = raveler.like(tangent, "tangent", dtype=raveler.dtype)
        b, direct = turned(self, lambda at: at.maps.B.matvec(t))
        mask = self._mask(solution_checked) if self.nan_on_failure else None
        if mask is not None:  # before and after: calls of LAPACK must not run side by side (see `DenseSolver`)
            b = self.point.backend.space(b).scale(mask, b)
        solve: Any = self.point.backend.linear or Prepared.solve
        w = self.restricted(solve(self.prepared, -b, None, False).x) + direct
        return self.point.y.unravel(w if mask is None else self.point.y.space.scale(mask, w))

    def _mask(self, solution_checked: bool) -> Array:
        """One, and NaN in items where y or θ is not finite, y is far from a solution, or it has no derivative."""
        backend, p = self.point.backend, self.point
        one = backend.xp.ones(p.items, dtype=p.y.dtype, device=p.y.device)
        usable = self.inputs if self.maps.observations is None else self.inputs & self.maps.observations.usable
        if not solution_checked:
            step, wrong = self.check.look(), self._contradicted
            one, usable = 1 + 0 * step.step, usable & ~step.far
            usable = usable if wrong is None else usable & ~wrong
        return backend.detached(backend.xp.where(usable, one, one * float("nan")))

    def gradient(self, outer: Any, x0: Any = None) -> tuple[Any, Diagnostics]:
        """∂L/∂θ − Bᵀ A⁻ᵀ ∂L/∂y."""
        p = self.point

        def loss_at(at: Rules) -> Any:
            return at.point.scalar_function(outer, "outer", args=())

        def slopes(at: Rules) -> tuple[Array, Array, str]:
            return at.point.backend.gradients(loss_at(at), at.point.y.vector, at.point.theta.vector)

        by_y, by_theta, kind = slopes(self)
        self.kinds["outer"] = kind
        if not p.backend.traced and bool(p.y.space.is_zero(by_y)) and bool(p.theta.space.is_zero(by_theta)):
            check_loss(p, loss_at(self))
        right = p.y.space.finite(by_y) & p.theta.space.finite(by_theta)
        g, diagnostics = self._reverse(by_y, x0, self.inputs, right)
        direct = self.product.beside
        self.product = self.product._replace(
            right=lambda at: (at.embedded((found := slopes(at))[0]), found[1] + direct), value=g - direct,
            beside=by_theta + direct,
            loss=lambda at: loss_at(at)(at.point.y.vector, at.point.theta.vector),
        )  # fmt: skip
        return self.product.tree(self.product.total), diagnostics

    def jacobian(self, direction: None = None, x0: None = None) -> tuple[Any, Diagnostics]:
        """Dense dy/dθ: all columns together, forward for m <= n and in reverse otherwise."""
        p = self.point
        xp, n, m, items = p.backend.xp, p.y.n, p.theta.n, p.items
        if m <= n or n == 0:

            def columns(at: Rules) -> Array:
                if n and m:
                    return xp.moveaxis(at.maps.B.dense(), -1, 0)
                return xp.zeros((m, *items, at.maps.B.rows), dtype=p.y.dtype, device=p.y.device)

            w, diagnostics = self._forward(columns, None, self.inputs, p.theta.vector + 1)
            return self._nested(w, lambda w: p.nest(xp.moveaxis(w, 0, -1))), diagnostics
        unit = xp.eye(n, dtype=p.y.dtype, device=p.y.device)
        unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(items), n)), (n, *items, n))
        rows, diagnostics = self._reverse(unit, None, self.inputs)
        return self._nested(rows, lambda rows: p.nest(xp.moveaxis(rows, 0, -2))), diagnostics

    def _nested(self, value: Array, nest: Callable[[Array], Any]) -> Any:
        self.product = self.product._replace(tree=nest)
        return nest(value)

    def solve(self, b: Any, x0: None = None) -> tuple[Any, Diagnostics]:
        """A⁻¹ b for raveled vectors, of F as it is: whatever scale the system has."""
        return self._solved(b, transposed=False)

    def solve_adjoint(self, b: Any, x0: None = None) -> tuple[Any, Diagnostics]:
        """A⁻ᵀ b, likewise."""
        return self._solved(b, transposed=True)

    def pullback(self, v: Any, x0: Any = None) -> tuple[Any, Diagnostics]:
        """−Bᵀ A⁻ᵀ v for raveled vectors."""
        return self._reverse(v, x0, self.inputs & self._per_item(self._finite(v, self.point.y, "cotangent")))

    def _solved(self, b: Any, *, transposed: bool) -> tuple[Any, Diagnostics]:
        inputs = self.inputs & self._per_item(self._finite(b, self.point.y, "b"))
        b = b if self.maps.scale is None else self.maps.scale * b
        solution = self._solve(b, None, inputs, transposed=transposed)
        no = ~self.point.backend.xp.any(inputs | ~inputs)
        value, diagnostics = self._nan_where_failed(solution.x, self._diagnostics(solution, b, transposed, inputs, no))
        return value if self.maps.scale is None else self.maps.scale * value, diagnostics

    # -- vectors -------------------------------------------------------------------------------------
    def _forward(self, image: Callable[[Rules], Any], x0: Any, inputs: Array, t: Any) -> tuple[Any, Diagnostics]:
        """−A⁻¹ b, with b what B makes of t."""
        p = self.point
        b, direct = turned(self, image)
        space = p.backend.space(b)
        zero_product = space.is_zero(b) & ~p.theta.space.is_zero(t)
        right, b = self._per_item(space.finite(b)), -b
        solution = self._solve(b, x0, inputs, transposed=False)
        diagnostics = self._diagnostics(solution, b, False, inputs, zero_product)
        w = self.restricted(solution.x)

        def again(at: Rules) -> tuple[Any, Any]:
            b, direct = turned(at, image)
            return -b, direct

        self.product = Product(False, again, b, solution, w, p.y.unravel, direct)
        w = w + direct if self.follows else w
        return self._nan_where_failed(w, diagnostics._replace(right=right))

    def restricted(self, x: Any) -> Any:
        """The part of the system's unknowns that is y."""
        return x if self.maps.embedding is None else self.maps.embedding.restrict(x)

    def embedded(self, v: Any) -> Any:
        """A cotangent of y as a right-hand side of the transposed system."""
        return v if self.maps.embedding is None else self.maps.embedding.embed(v)

    def _reverse(self, v: Any, x0: Any, inputs: Array, right: Array | None = None) -> tuple[Any, Diagnostics]:
        """−Bᵀ A⁻ᵀ v."""
        space = self.point.backend.space
        b = self.least_norm.after(v) if self.follows else self.embedded(v)
        solution = self._solve(b, x0, inputs, transposed=True)
        u = solution.x
        direct = returned(self, v, u) if self.follows else 0
        g = -self.maps.B.rmatvec(u)
        theta = self.point.theta
        zero_product = theta.is_zero(g) & ~space(u).is_zero(u)
        diagnostics = self._diagnostics(solution, b, True, inputs, zero_product)
        right = diagnostics.right if right is None else right
        self.product = Product(True, lambda at: (at.embedded(v), direct), b, solution, g, theta.unravel, direct)
        g = g + direct if self.follows else g
        return self._nan_where_failed(g, diagnostics._replace(right=right, image=self._per_item(theta.finite(g))))

    def _solve(self, b: Any, x0: Any, inputs: Array, *, transposed: bool) -> Solution:
        backend = self.point.backend
        xp = backend.xp
        if x0 is not None and not isinstance(x0, SequenceState):
            x0 = self._start(x0, b)
        solve: Any = backend.linear or Prepared.solve
        solution: Solution = solve(self.prepared, b, x0, transposed)
        bad = ~inputs
        if needed(backend, bad):  # NaN out, whatever a solver made of NaN in
            code = xp.full_like(solution.status, int(Status.NON_FINITE))
            x = nan_where(backend, bad, solution.x)
            solution = solution._replace(status=xp.where(bad, code, solution.status), x=x)
        wrong = self._wrong(solution, b)
        if wrong is None:
            return solution
        code = xp.full_like(solution.status, int(Status.CONTRADICTED))
        return solution._replace(status=xp.where(wrong, code, solution.status))

    @cached_property
    def _contradicted(self) -> Array | None:
        """Items in which what was given of derivatives is wrong; None where nobody looks, or others do."""
        return contradicted(self.maps.checked) if self.nan_on_failure and self.condition.to_verify else None

    def _wrong(self, solution: Solution, b: Any) -> Array | None:
        """Items in which what the user says is not so, where nothing can be told of it."""
        if not self.nan_on_failure:
            return None
        found = (self._contradicted, refuted(self.condition.point_kind, self.prepared.operator, solution.x, b))
        wrong = [x for x in found if x is not None]
        return None if not wrong else wrong[0] | wrong[-1]

    def _per_item(self, mask: Array) -> Array:
        """Reduce a mask over right-hand sides."""
        xp = self.point.backend.xp
        return xp.all(mask, axis=0) if len(mask.shape) > len(self.point.items) else mask

    def _nan_where_failed(self, value: Any, diagnostics: Diagnostics) -> tuple[Any, Diagnostics]:
        """NaN in the failed items, where that is asked for, or where nothing can be raised."""
        mode, backend, solution = self.problem.settings.on_failure, self.point.backend, diagnostics.solution
        failed = solution.failed if self.maps.observations is None else solution.failed | ~self.maps.observations.usable
        failed = failed | diagnostics.step.far if self.nan_on_failure else failed
        if not (self.nan_on_failure or mode == "nan") or not needed(backend, failed):
            return value, diagnostics
        return nan_where(backend, failed, value), diagnostics

    def _start(self, x0: Any, b: Any) -> Any:
        raveler, backend = self.point.y, self.point.backend
        found = x0 if is_tree_vector(x0) else backend.as_leaf(x0, "x0")
        if tuple(found.shape) != tuple(b.shape) or is_tree_vector(found) > is_tree_vector(b):
            raise ShapeError(f"x0 has shape {tuple(found.shape)}; expected the raveled {tuple(b.shape)}.")
        if is_tree_vector(found):
            return found
        raveler.check_placed(found, "x0", b.dtype)
        return raveler.divide(backend.astype(found, b.dtype))

    # -- what was seen -------------------------------------------------------------------------------
    def _diagnostics(self, solution: Solution, b: Any, transposed: bool, inputs: Array, zero: Array) -> Diagnostics:
        step = self._seen
        if step is None:
            step = self.check.look(solution, b, transposed=transposed)
            solution = solution._replace(matvecs=solution.matvecs + self.prepared.spent)
        if not self.point.backend.traced:  # what is traced belongs to its own trace
            self._seen = step
        yes = self.point.backend.xp.ones_like(inputs)
        suspect = None
        if self.point.backend.mode is not Mode.INLINE:
            suspect = suspicion(self.condition.point_kind, self.prepared, solution, b)
        error = solution.uncertainty(self.point.backend.xp, self.prepared.operator.rounding)
        uncertain = None if error is None else error > UNCERTAIN
        return Diagnostics(solution, inputs, yes, yes, zero, step, self.maps.observations, suspect, uncertain)


def _may_stay_trees(problem: Problem, condition: Any, solver: Any) -> tuple[str, ...]:
    """Which of y and theta need not be concatenated: products alone, and a method that needs no more."""
    if problem.batched or condition.has_matrix or not problem.backend.trees(problem.y, problem.theta):
        return ()
    matrix_free, n = getattr(solver, "matrix_free", None), LeafRaveler.length(problem.y)
    if problem.backend.traced and n <= TINY:  # assembled for the units within leaves, which cannot be looked for there
        return ()
    inline = problem.backend.mode is Mode.INLINE and isinstance(condition, FixedPoint)
    return ("y", "theta") if matrix_free and matrix_free(n) else ("theta",) if inline else ()
