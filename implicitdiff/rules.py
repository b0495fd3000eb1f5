"""The derivative rules on vectors: the four maps at a point, the two solves, and what was seen on the way.

The invariant is F(y*(θ), θ) = 0 for all θ near the point. Differentiating it along θ̇,

    A w + B θ̇ = 0   with  A = ∂F/∂y,  B = ∂F/∂θ,  w = dy along θ̇,

so w solves A w = −B θ̇ (forward), and for a cotangent v of y

    ⟨v, w⟩ = −⟨v, A⁻¹ B θ̇⟩ = ⟨−Bᵀ u, θ̇⟩   with  Aᵀ u = v,

so the cotangent of θ is −Bᵀ u (reverse). One factorisation of A serves both.

Nothing here raises or warns about a value: what was seen is returned as `Evidence`, so that the same code runs inside
a compiled program, and is judged outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, any_true, needed
from implicitdiff.conditions import as_condition
from implicitdiff.conditions.point import Point
from implicitdiff.curvature import suspicion
from implicitdiff.errors import ShapeError
from implicitdiff.judgement import reject_non_finite
from implicitdiff.ravel import LeafRavel, Ravel
from implicitdiff.report import Status
from implicitdiff.solve import Solution, prepare
from implicitdiff.solvers import get_solver
from implicitdiff.vectors import is_tree_vector

__all__ = ["Direct", "Evidence", "Rules", "Run", "Task"]


@dataclass(frozen=True)
class Task:
    """What a user asked for: a condition at a point, and how to solve.

    Parameters
    ----------
    backend : Backend
    condition : Condition or callable
    y, theta : pytree
    args : tuple
    solver : str or Solver
    on_failure : str
    batched : bool
    own : bool
        Whether y and theta are copied, since they are used again later.
    """

    backend: Any
    condition: Any
    y: Any
    theta: Any
    args: tuple[Any, ...] = ()
    solver: Any = "auto"
    on_failure: str = "raise"
    batched: bool = False
    own: bool = False


class Evidence(NamedTuple):
    """What was seen on the way, per item where there are any: arrays only, so that it may leave a compiled program."""

    solution: Solution
    inputs: Array
    """Whether y, theta and the vector are finite."""
    right: Array
    """Whether what made the right-hand side (B t, or the gradients of the loss) is finite."""
    image: Array
    """Whether Bᵀ u is finite."""
    vanished: Array
    """Whether a product with B is exactly zero, and the vector is not."""
    stationarity: Array
    """‖F(y, θ)‖."""
    residual: Array
    """Whether F(y, θ) is finite."""
    unsolved: Array
    """Whether F(y, θ) is far from zero."""
    findings: Any = None
    """What the condition saw beside F."""
    suspect: Any = None
    """Items in which the solve saw curvature that contradicts what y is said to be."""


class Rules:
    """The rules at one point; made where the arrays are, inside a compiled program or out of it.

    Parameters
    ----------
    task : Task
    flat : bool
        Whether to concatenate the leaves even where the method could do without.
    mute : bool
        Whether nothing can be told outside, so that a failed item has to be NaN.
    """

    def __init__(self, task: Task, *, flat: bool = False, mute: bool = False) -> None:
        engine, solver, condition = task.backend, get_solver(task.solver), as_condition(task.condition)
        keep = not flat and _may_stay_trees(task, condition, solver)
        self.task, self.mute = task, mute
        y = _border(keep, engine, task.y)(engine, task.y, "y", task.batched, task.own)
        theta = _border(keep, engine, task.theta)(engine, task.theta, "theta", task.batched, task.own)
        y.check_partner(theta)
        self.point = Point(engine, y, theta, tuple(task.args))
        self.inputs = self._finite(y.vector, y, "y") & self._finite(condition.without_bounds(theta), theta, "theta")
        maps = engine.combined(condition.maps(self.point), y.vector, theta.vector)
        self.condition, self.B, self.value, self.at = condition, maps.B, maps.residual, maps.at
        self.frame, self.findings, self.checked = maps.frame, maps.findings, maps.checked
        self.prepared = prepare(maps.A, condition.routed(solver), mute=mute and task.on_failure != "ignore")
        self.kinds: dict[str, str] = {}
        self.told = self.warned = self.curved = False
        self._seen: tuple[Array, Array, Array] | None = None

    @property
    def derivatives(self) -> dict[str, str]:
        """Where the products came from that were used so far."""
        return {"A": self.prepared.operator.sources, "B": self.B.sources, **self.kinds}

    def _finite(self, x: Any, border: Ravel, name: str) -> Array:
        """Whether the items of a vector are finite; where values are seen, one that is not is told at once."""
        finite = border.finite(x) if x.shape[-1] == border.n else self.task.backend.space(x).finite(x)
        if not self.task.backend.traced and any_true(self.task.backend.xp, ~finite):
            reject_non_finite(self.task, border, x, name)
        return finite

    # -- the modes -----------------------------------------------------------------------------------
    def vjp(self, cotangent: Any, x0: Any = None) -> tuple[Any, Evidence]:
        """−Bᵀ A⁻ᵀ v."""
        border = self.point.y
        v = border.like(cotangent, "cotangent", dtype=border.dtype)
        g, evidence = self._pull(v, x0, self.inputs & self._finite(v, border, "cotangent"))
        return self.point.theta.unravel(g), evidence

    def jvp(self, tangent: Any, x0: Any = None) -> tuple[Any, Evidence]:
        """The solution w of A w = −B θ̇."""
        border = self.point.theta
        t = border.like(tangent, "tangent", dtype=border.dtype)
        w, evidence = self._push(self.B.matvec(t), x0, self.inputs & self._finite(t, border, "tangent"), t)
        return self.point.y.unravel(w), evidence

    def tangent(self, tangent: Any) -> Any:
        """w of A w = −B θ̇, as a linear function of θ̇ and nothing else: no look at what θ̇ is."""
        border = self.point.theta
        b = self.B.matvec(border.like(tangent, "tangent", dtype=border.dtype))
        w = self._back(self.point.backend.linear(self.prepared, -b, None, False).x)
        if self.mute and self.findings is not None and self.task.on_failure != "ignore":
            space = self.point.y.space
            w = space.select(self.findings.usable, w, space.nan())
        return self.point.y.unravel(w)

    def gradient(self, outer: Any, x0: Any = None) -> tuple[Any, Evidence]:
        """∂L/∂θ − Bᵀ A⁻ᵀ ∂L/∂y."""
        p = self.point
        loss = p.scalar_function(outer, "outer", args=())
        by_y, by_theta, kind = p.backend.gradients(loss, p.y.vector, p.theta.vector)
        self.kinds["outer"] = kind
        right = p.y.space.finite(by_y) & p.theta.space.finite(by_theta)
        g, evidence = self._pull(by_y, x0, self.inputs, right)
        return p.theta.unravel(by_theta + g), evidence

    def jacobian(self, direction: None = None, x0: None = None) -> tuple[Any, Evidence]:
        """Dense dy/dθ: all columns together, forward for m <= n and in reverse otherwise."""
        p = self.point
        xp, n, m, items = p.backend.xp, p.y.n, p.theta.n, p.items
        if m <= n or n == 0:
            b = xp.zeros((m, *items, self.B.rows), dtype=p.y.dtype, device=p.y.device)
            if n and m:
                b = xp.moveaxis(self.B.dense(), -1, 0)
            w, evidence = self._push(b, None, self.inputs, p.theta.vector + 1)
            return p.nest(xp.moveaxis(w, 0, -1)), evidence
        unit = xp.eye(n, dtype=p.y.dtype, device=p.y.device)
        unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(items), n)), (n, *items, n))
        rows, evidence = self._pull(unit, None, self.inputs)
        return p.nest(xp.moveaxis(rows, 0, -2)), evidence

    def solve(self, b: Any, x0: None = None) -> tuple[Any, Evidence]:
        """A⁻¹ b for raveled vectors."""
        return self._solved(b, transposed=False)

    def solve_adjoint(self, b: Any, x0: None = None) -> tuple[Any, Evidence]:
        """A⁻ᵀ b for raveled vectors."""
        return self._solved(b, transposed=True)

    def pullback(self, v: Any, x0: None = None) -> tuple[Any, Evidence]:
        """−Bᵀ A⁻ᵀ v for raveled vectors."""
        return self._pull(v, None, self.inputs & self._per_item(self._finite(v, self.point.y, "cotangent")))

    def _solved(self, b: Any, *, transposed: bool) -> tuple[Any, Evidence]:
        inputs = self.inputs & self._per_item(self._finite(b, self.point.y, "b"))
        solution = self._solve(b, None, inputs, transposed=transposed)
        no = ~self.point.backend.xp.any(inputs | ~inputs)
        return self._poisoned(solution.x, solution), self._evidence(solution, b, inputs, None, None, no)

    # -- vectors -------------------------------------------------------------------------------------
    def _push(self, b: Any, x0: Any, inputs: Array, t: Any) -> tuple[Any, Evidence]:
        """−A⁻¹ b."""
        p = self.point
        space = p.backend.space(b)
        vanished = space.vanishes(b) & ~p.theta.space.vanishes(t)
        right, b = self._per_item(space.finite(b)), -b
        solution = self._solve(b, x0, inputs, transposed=False)
        w = self._back(solution.x)
        return self._poisoned(w, solution), self._evidence(solution, b, inputs, right, None, vanished)

    def _back(self, x: Any) -> Any:
        """The part of the system's unknowns that is y."""
        return x if self.frame is None else self.frame.back(x)

    def _pull(self, v: Any, x0: Any, inputs: Array, right: Array | None = None) -> tuple[Any, Evidence]:
        """−Bᵀ A⁻ᵀ v."""
        space = self.point.backend.space
        b = v if self.frame is None else self.frame.into(v)
        solution = self._solve(b, x0, inputs, transposed=True)
        u = solution.x
        g = -self.B.rmatvec(u)
        theta = self.point.theta
        vanished = theta.vanishes(g) & ~space(u).vanishes(u)
        evidence = self._evidence(solution, b, inputs, right, self._per_item(theta.finite(g)), vanished)
        return self._poisoned(g, solution), evidence

    def _solve(self, b: Any, x0: Any, inputs: Array, *, transposed: bool) -> Solution:
        backend = self.point.backend
        xp = backend.xp
        if x0 is not None:
            x0 = self._start(x0, b)
        solution: Solution = backend.linear(self.prepared, b, x0, transposed)
        bad = ~inputs
        if needed(backend, bad):  # NaN out, whatever a solver made of NaN in
            space = backend.space(solution.x)
            code = xp.full_like(solution.status, int(Status.NON_FINITE))
            x = space.select(xp.broadcast_to(bad, space.items), space.nan(), solution.x)
            solution = solution._replace(status=xp.where(bad, code, solution.status), x=x)
        return solution

    def _per_item(self, mask: Array) -> Array:
        """Reduce a mask over right-hand sides."""
        xp = self.point.backend.xp
        return xp.all(mask, axis=0) if len(mask.shape) > len(self.point.items) else mask

    def _poisoned(self, value: Any, solution: Solution) -> Any:
        """NaN in the failed items, where that is asked for, or where nothing can be raised."""
        mode, backend = self.task.on_failure, self.point.backend
        wanted = mode == "nan" or (self.mute and mode != "ignore")
        failed = solution.failed if self.findings is None else solution.failed | ~self.findings.usable
        if not wanted or not needed(backend, failed):
            return value
        space = backend.space(value)
        return space.select(backend.xp.broadcast_to(failed, space.items), space.nan(), value)

    def _start(self, x0: Any, b: Any) -> Any:
        border, backend = self.point.y, self.point.backend
        found = x0 if is_tree_vector(x0) else backend.as_leaf(x0, "x0")
        if tuple(found.shape) != tuple(b.shape) or is_tree_vector(found) > is_tree_vector(b):
            raise ShapeError(f"x0 has shape {tuple(found.shape)}; expected the raveled {tuple(b.shape)}.")
        if is_tree_vector(found):
            return found
        border.check_placed(found, "x0", b.dtype)
        return border.divide(backend.astype(found, b.dtype))

    # -- what was seen -------------------------------------------------------------------------------
    def _evidence(
        self, solution: Solution, b: Any, inputs: Array, right: Array | None, image: Array | None, vanished: Array
    ) -> Evidence:  # fmt: skip
        seen = self._seen or self.look(solution.operator_norm)
        if not self.point.backend.traced:  # what is traced belongs to its own trace
            self._seen = seen
        size, finite, unsolved = seen
        yes = self.point.backend.xp.ones_like(inputs)
        return Evidence(
            solution, inputs, yes if right is None else right, yes if image is None else image, vanished,
            size, finite, unsolved, self.findings,
            None if self.mute else suspicion(self.condition.point_kind, self.prepared, solution, b),
        )  # fmt: skip

    def look(self, known: Array | None, *, sure: bool = False) -> tuple[Array, Array, Array]:
        """‖F‖, whether it is finite, and whether it is far from zero; ``known`` is a lower estimate of ‖A‖."""
        # F near y is A δ for an error δ of y, so ‖F‖ is held against ‖A‖ max(‖y‖, 1), with the lower estimate
        # of ‖A‖ that the solve brought along: scaling F scales both sides.
        p = self.point
        backend, space, y = p.backend, p.y.space, p.y.vector
        xp = backend.xp
        if self.value is None or p.y.n == 0:
            size = xp.full(p.items, float("nan") if p.y.n else 0.0, dtype=p.y.dtype, device=p.y.device)
            no = xp.zeros(p.items, dtype=xp.bool, device=p.y.device)
            return size, ~no, no
        residual = self.value()
        of_system = backend.space(residual)
        size, length = of_system.size(residual), space.size(y)
        length = xp.where(length > 1, length, xp.ones_like(length))
        level = 1e-5 if float(xp.finfo(p.y.dtype).eps) < 1e-10 else 1e-3

        def along(norm: Array) -> Array:  # the estimate is a lower one, and may not have seen the direction of F
            safe = xp.where(size > 0, size, xp.ones_like(size))
            unit = of_system.scale(1 / safe, of_system.copy(residual))
            return xp.maximum(norm, of_system.size(self.prepared.operator.matvec(unit)))

        norm = xp.zeros_like(size) if known is None else xp.asarray(known, dtype=size.dtype)
        if not backend.traced:
            norm = backend.rescue(~(size <= level * norm * length), along, norm)
        elif known is None or sure:  # else whoever judges is to make sure
            norm = along(norm)
        return size, of_system.finite(residual), size > level * norm * length


class Run(NamedTuple):
    """What a run of a mode came to, and whether its values can be seen."""

    value: Any
    evidence: Evidence
    methods: Sequence[tuple[str, str]]
    derivatives: dict[str, str]
    damping: float
    seconds: float
    rules: Rules | None = None
    """None where they were inside a compiled program."""
    visible: bool = True
    sound: Any = None
    """From a compiled program, whether there is nothing to tell."""


class Direct:
    """Runs the rules where the arrays are, and keeps them: A is factored once.

    Parameters
    ----------
    task : Task
    mute : bool
        Whether nothing can be told outside.
    """

    def __init__(self, task: Task, *, mute: bool = False) -> None:
        self._task, self._mute = task, mute
        self._rules = Rules(task, mute=mute)

    @property
    def derivatives(self) -> dict[str, str]:
        """Where the products came from that were used so far."""
        return self._rules.derivatives

    def __call__(self, mode: str, direction: Any, x0: Any) -> Run:
        rules = self._rules
        if mode == "jacobian" and isinstance(rules.point.y, LeafRavel):  # dense: there is no keeping leaves apart
            rules = Rules(self._task, flat=True, mute=self._mute)
        value, evidence = getattr(rules, mode)(direction, x0)
        p = rules.prepared
        return Run(value, evidence, p.methods, rules.derivatives, p.damping, p.seconds, rules, not self._mute)


def _may_stay_trees(task: Task, condition: Any, solver: Any) -> bool:
    """Whether the leaves of y and theta need not be concatenated: products alone, and a method that needs no more."""
    if task.batched or condition.has_matrix or not task.backend.trees(task.y, task.theta):
        return False
    matrix_free = getattr(solver, "matrix_free", None)
    return bool(matrix_free and matrix_free(LeafRavel.length(task.y)))


def _border(keep: bool, engine: Any, tree: Any) -> type[Ravel]:
    """Return the kind of border."""
    return LeafRavel if keep and not engine.is_vector(tree) else Ravel
