"""What the user gives of derivatives is held against the function that they are of, at its first use.

Let G(y, θ) be the function that the user wrote (∇f, F or T), z and t directions without structure in the units of y and
θ, and u one in those of 1/G. Two evaluations of G give u'[G(y + εz, θ) − G(y − εz, θ)] / 2ε, and two more the same
along t; every product that was given has to give the same:

    u'(jvp z) = (vjp u)'z = u'(jacobian z),     u'(mixed_jvp t) = (mixed_vjp u)'t.

The adjoint that was solved for, Aᵀu = v, is a second u: it weighs what the result depends on, A⁻¹ included. In forward
mode the solution w is a second z. What a product has to do with the condition (signs, y − T) is not the user's concern,
and not looked at. A callable is blamed only if it is wrong beyond the noise of G in two draws.
"""

from __future__ import annotations

import math
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.closures import PLAIN
from implicitdiff.conditions.base import Checked
from implicitdiff.errors import InconsistentDerivativesError
from implicitdiff.namespaces import namespace
from implicitdiff.probes import Along, Gap, draw, measured, settled, units
from implicitdiff.pytree import flatten
from implicitdiff.vectors import is_tree_vector

__all__ = ["Question", "Trial", "Wrong", "cause_of", "verify", "wrong_in"]


class Question(NamedTuple):
    """A given product, applied: a number that differences of G along ``along`` have to give, too."""

    name: str
    product: Callable[[], Array]
    along: Along
    u: Array
    shift: Array | None = None
    """u'z, where it is I − ∂G/∂y that is solved with."""


class Wrong(NamedTuple):
    """A callable that is not what it should be."""

    name: str
    gap: Gap
    cause: str


class Trial:
    """One draw of directions, and what is asked along them.

    Parameters
    ----------
    checked : Checked
    number : int
        Of the draw.
    adjoint, tangent : array or None
        Solutions of the condition's system, transposed or not.
    """

    def __init__(
        self, checked: Checked, number: int = 0, adjoint: Array | None = None, tangent: Array | None = None
    ) -> None:
        self.checked, self.number, self.point = checked, number, checked.point
        look, y, theta = self.point.backend.look_at, self.point.y, self.point.theta
        self.y, self.theta = look(y.vector), look(theta.vector)
        self.xp = xp = namespace(self.y)
        (self.size, self.known), (size, known) = units(xp, y, self.y), units(xp, theta, self.theta)
        self.both = self.known and known
        self.z = draw(xp, self.y, 4 * number) * self.size
        self.t = draw(xp, self.theta, 4 * number + 1) * size if theta.n else None
        function, self.scalar = function_of(checked), None
        if function is None:  # only values of f: G is not evaluated as a whole
            function, self.scalar = checked.values, self.size
        self.along_z = self._along(function, self.z, None)
        self.along_t = None if self.t is None else self._along(function, None, self.t)
        self.u = self._dual()
        self.adjoint = None if adjoint is None else look(adjoint)
        moves = tangent is not None and bool(xp.all(self.size > 0))
        self.w = self._scaled(look(tangent)) if moves else None
        self.along_w = None if self.w is None else self._along(function, self.w, None)

    def _along(self, function: Any, dy: Array | None, dtheta: Array | None) -> Along:
        f = self.applied(function)
        return Along(self.xp, f, self.y, self.theta, dy, dtheta, scalar=self.scalar, known=self.both)

    def applied(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """A function of the framework's vectors on those that are looked at."""
        backend = self.point.backend
        return lambda *vectors: backend.look_at(function(*map(backend.put_back, vectors)))

    def _dual(self) -> Array:
        """A vector without structure in the units of 1/G, up to a common factor."""
        xp, c = self.xp, self.checked
        s = draw(xp, self.y, 4 * self.number + 2)
        if c.symmetric:  # y_i G_i has the unit of f
            return s * self.size
        if c.solved == 1:  # T has the units of y
            return xp.where(self.size > 0, s / xp.where(self.size > 0, self.size, xp.ones_like(s)), 0 * s)
        rows = xp.abs(self.along_z.change(0))
        rows = rows if self.along_t is None else rows + xp.abs(self.along_t.change(0))
        usable = (rows > 0) & xp.isfinite(rows)
        return xp.where(usable, s / xp.where(usable, rows, xp.ones_like(rows)), xp.zeros_like(s))

    def _scaled(self, w: Array) -> Array:
        """A direction of y, as large as its units let it be."""
        ratio = self.xp.max(self.xp.abs(w) / self.size, axis=-1, keepdims=True)
        return w / self.xp.where(ratio > 0, ratio, self.xp.ones_like(ratio))

    def questions(self) -> Iterator[Question]:
        """Everything that was given, in the order in which it is blamed."""
        c, dot = self.checked, self.xp.vecdot
        matrix = None if c.matrix[1] is None else c.matrix[1].forward
        for u, z, along, extra in self._pairs():
            shift = dot(u, z) if c.solved == 1 and extra else None
            for name, product in ((c.matrix[0], matrix), c.forward):
                if product is not None:
                    yield Question(name, self.behind(u, product, z), along, u, shift)
            name, product = c.adjoint
            if product is not None:
                yield Question(name, self.before(u, product, z), along, u, shift)
        if self.t is None or self.along_t is None:
            return
        for u in [self.u] if self.adjoint is None else [self.u, self.adjoint]:
            if c.mixed_vjp is not None:
                yield Question("mixed_vjp", self.before(u, c.mixed_vjp, self.t), self.along_t, u)
            if c.mixed_jvp is not None:
                yield Question("mixed_jvp", self.behind(u, c.mixed_jvp, self.t), self.along_t, u)

    def behind(self, u: Array, product: Callable[[Array], Array], z: Array) -> Callable[[], Array]:
        """u'(P z), to be computed when it is asked for."""
        return lambda: self.xp.vecdot(u, self.applied(product)(z))

    def before(self, u: Array, product: Callable[[Array], Array], z: Array) -> Callable[[], Array]:
        """(P u)'z, likewise."""
        return lambda: self.xp.vecdot(self.applied(product)(u), z)

    def _pairs(self) -> Iterator[tuple[Array, Array, Along, bool]]:
        yield self.u, self.z, self.along_z, False
        if self.adjoint is not None:
            yield self.adjoint, self.z, self.along_z, True
        if self.w is not None and self.along_w is not None:
            yield self.u, self.w, self.along_w, True

    def gradient(self) -> tuple[Callable[[], Array], Along, Array] | None:
        """∇f along z at a point where it is not zero, and f there; None unless both were given."""
        c = self.checked
        if c.values is None or c.what != "grad" or c.function is None:
            return None
        xp, f, grad = self.xp, self.applied(c.values), self.applied(c.function)
        far = 0.1 if self.along_z.eps > 1e-10 else 1e-2
        y = self.y + far * draw(xp, self.y, 4 * self.number + 3) * self.size
        along = Along(
            xp, lambda y, t: f(y, t)[..., None], y, self.theta, self.z, None, known=self.known, width=1
        )  # fmt: skip
        return (lambda: xp.vecdot(grad(y, self.theta), self.z)), along, xp.ones_like(y[..., :1])


def function_of(checked: Checked) -> Callable[[Array, Array], Array] | None:
    """G, where it costs no more than a few evaluations of what the user gave."""
    if checked.values is None or checked.what == "grad" or checked.derive is None:
        return checked.function
    return checked.function if checked.derive().kind == "autodiff" else None


# -- the verdict -----------------------------------------------------------------------------------------
def wrong_in(checked: Checked, adjoint: Array | None = None, tangent: Array | None = None) -> list[Wrong]:
    """Callables that are wrong in two draws."""
    found: dict[str, Wrong] = {}
    first = Trial(checked, 0, adjoint, tangent)
    suspects = {name for name, gap in _differing(first)}
    if not suspects:
        return []
    for name, gap in _differing(Trial(checked, 1, adjoint, tangent), suspects):
        found.setdefault(name, Wrong(name, gap, ""))
    return [wrong._replace(cause=cause_of(first, wrong)) for wrong in found.values()]


def _differing(trial: Trial, names: set[str] | None = None) -> Iterator[tuple[str, Gap]]:
    """Names of callables that differ from differences of G, each once."""
    done: set[str] = set()
    about_f = trial.gradient() if names is None or "grad" in names else None
    if about_f is not None:
        product, along, one = about_f
        gap = _gap(product, along, one)
        if gap is not None:
            yield "grad", gap
    for question in trial.questions():
        if question.name in done or (names is not None and question.name not in names):
            continue
        gap = _gap(question.product, question.along, question.u, question.shift)
        if gap is not None:
            done.add(question.name)
            yield question.name, gap


def _gap(product: Callable[[], Array], along: Along, u: Array, shift: Array | None = None) -> Gap | None:
    """How far a number is off; None where it is not, or where it cannot be known."""
    try:
        number = product()
    except Exception:  # told where it is used
        return None
    if settled(number, along, u, shift):
        return None
    gap = measured(number, along, u, shift)
    return gap if bool(along.xp.any(gap.bad)) else None


def cause_of(trial: Trial, wrong: Wrong) -> str:
    """Say what the mistake looks like."""
    gap, xp, c = wrong.gap, trial.xp, trial.checked
    ratios = gap.found / xp.where(gap.seen == 0, gap.found, gap.seen)
    weight = xp.where(gap.bad, xp.ones_like(ratios), xp.zeros_like(ratios))
    ratio = float(xp.sum(xp.where(gap.bad, ratios, 0 * weight)) / xp.sum(weight))  # the mean over wrong items
    if wrong.name in {c.forward[0], c.adjoint[0], c.matrix[0]}:
        special = _of_a_square(trial, wrong.name)
        if special:
            return special
    elif _is_mixed_transposed(trial, wrong.name):
        return "it is transposed"
    return _of_a_ratio(ratio)


def _is_mixed_transposed(trial: Trial, name: str) -> bool:
    c, u, t = trial.checked, trial.u, trial.t
    if t is None or trial.point.y.n != trial.point.theta.n:
        return False
    if name == "mixed_vjp" and c.mixed_vjp is not None:
        return _agrees(trial.behind(u, c.mixed_vjp, t), trial.along_t, u)
    if name == "mixed_jvp" and c.mixed_jvp is not None:
        return _agrees(trial.before(u, c.mixed_jvp, t), trial.along_t, u)
    return False


def _of_a_ratio(ratio: float) -> str:
    for factor, text in ((2.0, "a factor of 2 too much"), (0.5, "a factor of 2 is missing"), (-1.0, "the other sign")):
        if math.isclose(ratio, factor, rel_tol=0.05):
            return text
    return "a term that is missing, or the derivative of another function"


def _of_a_square(trial: Trial, name: str) -> str:
    """Try the transpose, and y − T in place of T, for a derivative with respect to y."""
    c, xp, u, z = trial.checked, trial.xp, trial.u, trial.z
    products = {c.forward[0]: c.forward[1], c.adjoint[0]: c.adjoint[1]}
    product = c.matrix[1].forward if c.matrix[1] is not None and name == c.matrix[0] else products[name]
    if product is None:
        return ""
    turned = name == c.adjoint[0] and name != c.forward[0]  # this one is applied to u

    def value(swap: bool) -> Array:
        return (trial.before if swap else trial.behind)(u, product, z)()

    if c.solved == 1 and _agrees(lambda: xp.vecdot(u, z) - value(turned), trial.along_z, u):
        return "it is that of y - T(y, theta); give that of T itself"
    if not c.symmetric and _agrees(lambda: value(not turned), trial.along_z, u):
        both = c.forward[1] is not None and c.adjoint[1] is not None
        return "jvp and vjp are swapped" if both and name != c.matrix[0] else "it is transposed"
    return ""


def _agrees(product: Callable[[], Array], along: Along | None, u: Array) -> bool:
    try:
        return along is not None and settled(product(), along, u)
    except Exception:
        return False


def error_for(checked: Checked, wrongs: list[Wrong]) -> InconsistentDerivativesError:
    """Build the error that names the callables."""
    xp = namespace(wrongs[0].gap.found)
    names = " and ".join(wrong.name for wrong in wrongs)
    first = wrongs[0]
    off = float(xp.max(xp.where(first.gap.bad, first.gap.difference, 0 * first.gap.allowed)))
    other = "fun" if first.name == "grad" else checked.what
    verb = "are not derivatives" if len(wrongs) > 1 else "is not the gradient" if other != checked.what else None
    head = f"{names} {verb or 'is not the derivative'} of {other} at this point: {off:.2g} off, relative to its size."
    same = len({wrong.cause for wrong in wrongs}) == 1
    causes = first.cause if same else "; ".join(f"{wrong.name}: {wrong.cause}" for wrong in wrongs)
    return InconsistentDerivativesError(
        f"{head}\nLikely cause: {causes}.\n"
        "Next: check_derivatives(condition, y, theta) shows each of them; verify=False on the condition lets an "
        "approximation pass that is meant."
    )


# -- once ------------------------------------------------------------------------------------------------
_lock = threading.Lock()
_verified: dict[Any, list[Any]] = {}


def _key_of(task: Any, functions: tuple[Callable[..., Any], ...]) -> tuple[Any, list[Any]]:
    """Make a key of functions and structure, and list what has to live for it to mean the same.

    A function that is written inside another is the same function at each turn of a loop, as long as it finds the same
    objects in its closure.
    """
    held: list[Any] = []
    names = tuple(_identity(f, held) for f in functions)
    shapes = []
    for tree in (task.y, task.theta):
        flat = flatten(tree)
        shapes.append((flat.spec, *map(_form, flat.leaves)))
    return (names, tuple(shapes), task.backend.name, task.batched), held


def _form(leaf: Any) -> Any:
    shape = getattr(leaf, "shape", None)
    return type(leaf) if shape is None else (tuple(shape), str(leaf.dtype))


def _identity(function: Any, held: list[Any]) -> Any:
    if isinstance(function, types.MethodType):
        held += [function.__self__, function.__func__]
        return id(function.__self__), id(function.__func__)
    if type(function) is types.FunctionType:
        cells = [*_contents(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        others = [x for x in cells if not _is_value(x)]
        if all(type(x).__weakrefoffset__ for x in others):
            held += others
            parts = tuple((type(x), x) if _is_value(x) else id(x) for x in cells)
            return function.__code__, id(function.__globals__), parts
    held.append(function)
    return id(function)


def _is_value(x: Any) -> bool:
    return type(x) in PLAIN or isinstance(x, np.generic)


def _contents(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            found.append(None)
    return found


def verify(task: Any, rules: Callable[[], Any], mode: str = "", solution: Any = None) -> None:
    """Hold what was given against its function, once for the same functions and structure.

    Parameters
    ----------
    task : Task
    rules : callable
        Returns the `Rules` at the point.
    mode : str
        Of the rules, in which a system was solved.
    solution : array, optional
        The solution of that system.

    Raises
    ------
    InconsistentDerivativesError
        With the names of the callables at fault.
    """
    functions = getattr(task.condition, "to_verify", ())
    if not functions or not task.backend.local(task.y, task.theta):
        return
    key, held = _key_of(task, functions)
    if key in _verified:
        return
    checked: Checked | None = rules().checked
    if checked is not None and checked.point.y.n and not is_tree_vector(checked.point.y.vector):
        x = None if solution is None or checked.solved is None else _raveled(checked, solution)
        short = checked.point.theta.n <= checked.point.y.n
        forward = mode in {"jvp", "solve"} or (mode == "jacobian" and short)
        wrongs = wrong_in(checked, *((None, x) if forward else (x, None)))
        if wrongs:
            raise error_for(checked, wrongs)
    _remember(key, held)


def _raveled(checked: Checked, x: Any) -> Array:
    """The first of several right-hand sides, as one vector per item."""
    backend = checked.point.backend
    if is_tree_vector(x):
        x = backend.concat([backend.reshape(leaf, (-1,)) for leaf in x.leaves])
    return x[0, ...] if len(x.shape) > len(checked.point.items) + 1 else x


def _remember(key: Any, held: list[Any]) -> None:
    table = _verified

    def drop(_: Any) -> None:
        table.pop(key, None)

    kept: list[Any] = []
    for thing in held:
        try:
            kept.append(weakref.ref(thing, drop))
        except TypeError:  # kept, or its id could come to mean another
            kept.append(thing)
    with _lock:
        table[key] = kept
