"""From a user's functions to the four maps A, Aᵀ, B, Bᵀ.

Every condition rests on one vector function G(y, θ): ∇_y f, F itself, or T. What the user gave of its derivatives is
used; what is missing is derived by the backend. The signs of the condition come last: F = G, or F = y − T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias

from implicitdiff.arrays import Array
from implicitdiff.conditions.matrices import matrix_operator
from implicitdiff.conditions.point import Point
from implicitdiff.errors import DerivativeError, InputError, UnknownNameError
from implicitdiff.linalg.operator import LinearMap, Operator, Product
from implicitdiff.linalg.sparse_map import by_colors
from implicitdiff.linalg.sparsity import Sparsity
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.records import Record
from implicitdiff.solvers.flat import OnRange
from implicitdiff.tolerances import EXACT_ASSEMBLY

__all__ = [
    "Checked",
    "Condition",
    "Embedding",
    "Function",
    "Given",
    "Maps",
    "Observations",
    "check_callables",
    "check_singular",
    "check_verify",
    "finite_part",
    "lengths_of_leaves",
    "maps_from",
]

SINGULAR = ("raise", "gauge", "minimum-norm")
"""What may be asked for where A is singular."""

Function: TypeAlias = Callable[..., Any] | None
"""What a user may give, and may leave out."""


class Embedding(NamedTuple):
    """How a system whose unknowns are not those of y is used: y extended by multipliers, or a part of y.

    With E the map from y to the unknowns, the derivative is that of E y = 0-padded (or cut) y.
    """

    embed: Callable[[Array], Array]
    """A cotangent of y, (*rhs, *items, n), as a right-hand side of the system."""
    restrict: Callable[[Array], Array]
    """The part of the system's unknowns that is y."""


class Observations(NamedTuple):
    """What a condition saw at the point beside F, per item: arrays only, so that it may leave a compiled program."""

    usable: Array
    """Whether the derivative exists, as far as was seen."""
    quiet: Array
    """Whether there is nothing to tell."""
    details: Any
    """For `Condition.tell`."""


class Checked(NamedTuple):
    """A function G(y, θ) with what was given of its derivatives, so that these can be held against it."""

    point: Point
    what: str
    """What the user knows G under."""
    function: Callable[[Array, Array], Array] | None
    """G on vectors; None where it is not known."""
    values: Callable[[Array, Array], Array] | None
    """f on vectors, where G = ∇f and f was given."""
    derive: Callable[[], Any] | None
    """Returns the backend's derivatives of G."""
    forward: tuple[str, Product | None]
    adjoint: tuple[str, Product | None]
    matrix: tuple[str, LinearMap | None]
    mixed_jvp: Product | None
    mixed_vjp: Product | None
    symmetric: bool
    solved: int | None = None
    """What is solved with: ∂G/∂y (0), I − ∂G/∂y (1), or a matrix that is made of more than G (None)."""
    of: str = "fun"
    """What the user knows f under."""


class Maps(NamedTuple):
    """F and its derivatives at a point.

    ``residual`` is None where the condition gives no way to evaluate F; ``at`` evaluates F at any (y, θ).
    """

    residual: Callable[[], Array] | None
    at: Callable[[Array, Array], Array] | None
    A: Operator
    B: LinearMap
    embedding: Embedding | None = None
    observations: Observations | None = None
    checked: tuple[Checked, ...] = ()
    scale: Array | None = None
    """W, shape (*items, rows of A): the system is W F, and its unknowns are W⁻¹ those of F; zero where it has none."""
    choices: Any = None
    """What the form of the system depends on beside y and θ (`Point.choices`); None where it has one form."""
    changed: Callable[[], Array] | None = None
    """At a point with the choices of another: which of these would be others here, (*items, k)."""
    hessian: Array | None = None
    """Of a saddle system, H as a matrix, (*items, n, n), where it is at hand."""

    def raw(self, x: Array) -> Array:
        """W⁻¹ x: a right-hand side of the system as one of F, or unknowns of F as those of the system."""
        if self.scale is None:
            return x
        xp = self.A.backend.xp
        safe = xp.where(self.scale > 0, self.scale, xp.ones_like(self.scale))
        return xp.where(self.scale > 0, x / safe, xp.zeros_like(x))


class Condition(Record):
    """A condition F(y, θ) = 0; subclasses say how F and its derivatives come from the user's functions."""

    @property
    def to_verify(self) -> tuple[Callable[..., Any], ...]:
        """The user's functions, where derivatives are among them that are to be held against the others."""
        return ()

    def parts(self, point: Point) -> dict[str, tuple[Callable[[Array, Array], Array], bool]]:
        """Functions that it is made of, where there are several; and whether each is a scalar."""
        return {}

    @property
    def point_kind(self) -> str | None:
        """What kind of stationary point y is said to be; None where nothing was said, and a saddle is told."""
        return "saddle"

    @property
    def exact(self) -> Condition:
        """The condition with the whole of A, where it solves with a matrix that is near to it."""
        return self

    @property
    def has_matrix(self) -> bool:
        """Whether vectors are needed as they are, not leaf by leaf: A is a matrix, or is made of one."""
        return False

    @property
    def arrays(self) -> dict[str, Any]:
        """Fields that hold numbers, not functions: they may be others at the next call."""
        return {}

    per_item: ClassVar[tuple[str, ...]] = ()
    """Names of those of them that carry the leading axis of a batch."""

    structure: ClassVar[Any] = None
    """What was found of the form of A, where that is looked for: at another one the system is another program."""

    def without_bounds(self, theta: Any) -> Any:
        """Return the vector of theta without what may be infinite in it: bounds, where the condition has such."""
        return theta.vector

    singular: str = "raise"
    """What is asked for where A is singular; a field of the conditions that let it be said."""

    follows: ClassVar[bool] = False
    """Whether ``singular="minimum-norm"`` follows the solution of least norm, where there is one (`least_norm`)."""

    def routed(self, solver: Any) -> Any:
        """Return the solver for the whole system, given the one that was asked for."""
        return solver if self.singular == "raise" else OnRange(solver, self.singular)

    def tell(self, observations: Observations, batched: bool) -> tuple[Exception | None, list[str | Warning]]:
        """Turn observations into an error, if any, and warnings: texts, where they are about regularity."""
        return None, []

    def diagnose(self, observations: Observations, error: Exception, operator: Operator) -> Exception:
        """Say more about a solve that failed."""
        return error

    def moved(self, choices: Any, step: Array) -> Any:
        """Return the choices at x − step, x the unknowns of the system."""
        return choices

    def elsewhere(self) -> Condition:
        """Return the condition for another point: without what was given for one alone."""
        return self

    def without_selection(self) -> Condition:
        """Return the condition that shows what is degenerate, and selects nothing."""
        return self

    def received(self, aux: Any) -> Condition:
        """Return the condition for one solution, given what the wrapped solver returned beside it."""
        return self

    def name_changes(self, xp: Any, changed: Array) -> str:
        """Say what `Maps.changed` found."""
        return "a kink lies"

    def maps(self, point: Point) -> Maps:
        """F, A = ∂F/∂y and B = ∂F/∂θ at a point."""
        raise NotImplementedError


@dataclass(frozen=True)
class Given:
    """What the user gave of ∂G/∂y and ∂G/∂θ, with the names under which it was given."""

    forward: tuple[str, Callable[..., Any] | None] = ("jvp", None)
    adjoint: tuple[str, Callable[..., Any] | None] = ("vjp", None)
    matrix: tuple[str, Callable[..., Any] | None] = ("jacobian", None)
    mixed_jvp: Callable[..., Any] | None = None
    mixed_vjp: Callable[..., Any] | None = None
    sparsity: Sparsity | None = None


def finite_part(xp: Any, theta: Any) -> Any:
    """Return a vector with zeros in place of infinities."""
    if is_tree_vector(theta):
        return theta.map(lambda leaf: finite_part(xp, leaf))
    return xp.where(xp.isinf(theta), xp.zeros_like(theta), theta)


def check_callables(**functions: Any) -> None:
    """Raise where an argument is neither a function nor None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InputError(f"{name} is {type(function).__name__}; expected a callable.")


def check_singular(singular: Any) -> None:
    """Raise where ``singular`` is none of what it may be."""
    if singular not in SINGULAR:
        raise UnknownNameError(f"singular = {singular!r}: expected one of {', '.join(map(repr, SINGULAR))}.")


def check_verify(verify: Any) -> None:
    """Raise where ``verify`` is neither True nor False."""
    if not isinstance(verify, bool):
        raise InputError(f"verify = {verify!r}: expected True or False.")


class _Builder:
    """Chooses each product: given, or derived where it is missing."""

    def __init__(
        self, point: Point, given: Given, derive: Callable[[], Any] | None, symmetric: bool, what: str
    ) -> None:
        self.point, self.given, self._derive = point, given, derive
        self.symmetric, self.what = symmetric, what
        self.forward, self.adjoint = self._product(*given.forward), self._product(*given.adjoint)
        name, matrix = given.matrix
        self.matrix = None if matrix is None else matrix_operator(point, name, point.call(matrix, name), symmetric)
        self.mixed = self._mixed()

    def _product(self, name: str, function: Function) -> Product | None:
        """Return a given product with ∂G/∂y or its transpose."""
        return None if function is None else self.point.product(function, name, self.point.y, self.point.y)

    @cached_property
    def derived(self) -> Any:
        """The backend's derivatives of G; made once, and only where something is missing."""
        if self._derive is None:
            raise DerivativeError(
                f"a derivative of {self.what} is needed, is not given, and there is no function to derive it from.\n"
                "Give fun or grad, or the missing one of hvp, hessian, mixed_vjp, mixed_jvp."
            )
        return self._derive()

    def checked(self, function: Any, values: Any, known_as: str) -> Checked:
        """G with what was given of it."""
        given, mixed = self.given, self.mixed
        return Checked(
            self.point, known_as, function, values, None if self._derive is None else (lambda: self.derived),
            (given.forward[0], self.forward), (given.adjoint[0], self.adjoint), (given.matrix[0], self.matrix),
            None if given.mixed_jvp is None else mixed.forward, None if given.mixed_vjp is None else mixed.adjoint,
            self.symmetric, 0,
        )  # fmt: skip

    def operator(self) -> Operator:
        """∂G/∂y."""
        p = self.point
        forward, adjoint = self.forward, self.adjoint
        if self.matrix is not None:  # products that are given beside a matrix stay the user's
            op = self.matrix
            forward = forward or op.forward
            adjoint = forward if self.symmetric else adjoint or op.adjoint
            derive = self._missing("jvp_y", "vjp_y")
            return replace(op, forward=forward, adjoint=adjoint, derive=derive, sparsity=self.given.sparsity)
        kind, accuracy = "given", 0.0
        if forward is None and adjoint is None:
            kind, accuracy = self.derived.kind, self.derived.accuracy
            forward = self.derived.hvp if self.symmetric else self.derived.jvp_y
            # A transposed product by differences costs n evaluations, as much as the whole matrix: assemble it.
            adjoint = self.derived.vjp_y if kind == "autodiff" else None
        return Operator(
            p.backend, p.y.n, p.y.n, p.items, p.y.dtype, p.y.device, forward=forward,
            adjoint=forward if self.symmetric else adjoint, kind=kind, label="A",
            symmetric=True if self.symmetric else None, trusted=self.symmetric and kind != "given",
            accuracy=accuracy, derive=self._missing("jvp_y", "vjp_y"),
            leaves=lengths_of_leaves(p), like=p.y.vector, sparsity=self.given.sparsity,
        )  # fmt: skip

    def _missing(self, jvp: str, vjp: str) -> Callable[[bool], tuple[str, Any] | None]:
        """Derive a product that was not given, when it is needed; None leaves it to assembly, which is exact.

        A transposed product by differences costs as much as the whole matrix; a forward one is cheap, but not
        exact, and worth it only where assembly is out of reach.
        """

        def derive(transposed: bool) -> tuple[str, Any] | None:
            if self._derive is None:
                return None
            d = self.derived
            if transposed:
                return (d.kind, getattr(d, vjp)) if d.kind == "autodiff" else None
            small = self.point.y.n <= EXACT_ASSEMBLY
            return None if d.kind == "finite differences" and small else (d.kind, getattr(d, jvp))

        return derive

    def _mixed(self) -> LinearMap:
        """∂G/∂θ."""
        p, given = self.point, self.given
        jvp, vjp = given.mixed_jvp, given.mixed_vjp
        forward = None if jvp is None else p.product(jvp, "mixed_jvp", p.theta, p.y)
        adjoint = None if vjp is None else p.product(vjp, "mixed_vjp", p.y, p.theta)
        kind, accuracy = "given", 0.0
        if forward is None and adjoint is None:
            forward, adjoint, kind = self.derived.jvp_theta, self.derived.vjp_theta, self.derived.kind
            accuracy = self.derived.accuracy
        B = LinearMap(
            p.backend, p.y.n, p.theta.n, p.items, p.y.dtype, p.y.device, forward=forward, adjoint=adjoint,
            kind=kind, label="B", domain=p.theta.dtype, accuracy=accuracy,
        )  # fmt: skip
        return B if given.sparsity is None else by_colors(B, given.sparsity.mixed)


def lengths_of_leaves(point: Point) -> tuple[int, ...]:
    """Return the lengths of the leaves of y; an empty one counts only where vectors hold it as a part."""
    return tuple(leaf.size for leaf in point.y.leaves if leaf.size or is_tree_vector(point.y.vector))


def maps_from(
    point: Point, given: Given, function: Callable[[Array, Array], Array] | None,
    derive: Callable[[], Any] | None, *, symmetric: bool = False, what: str = "F",
    value: Callable[[], Array] | None = None, values: Callable[[Array, Array], Array] | None = None,
    known_as: str = "fun",
) -> Maps:  # fmt: skip
    """Build the maps of F = G.

    Parameters
    ----------
    point : Point
    given : Given
        What the user gave.
    function : callable or None
        G on vectors.
    derive : callable or None
        Returns the backend's derivatives of G.
    symmetric : bool
        Whether ∂G/∂y is symmetric.
    what : str
        Name of G, for messages.
    value : callable, optional
        Evaluates G at the point, where that is cheaper than ``function``.
    values : callable, optional
        f on vectors, where G = ∇f and f was given.
    known_as : str
        What the user knows G under.
    """
    builder = _Builder(point, given, derive, symmetric, what)
    y, theta = point.y.vector, point.theta.vector
    if value is None and function is not None:
        value = lambda: function(y, theta)  # noqa: E731
    checked = (builder.checked(function, values, known_as),)
    return Maps(value, function, builder.operator(), builder.mixed, checked=checked)
