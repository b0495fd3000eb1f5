"""`check_derivatives`: what was given of derivatives, held against everything that it can be held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, divisor
from implicitdiff.compilers import untraced
from implicitdiff.conditions.base import Checked
from implicitdiff.namespaces import namespace
from implicitdiff.problem import problem_of
from implicitdiff.records import html_table
from implicitdiff.rules import Rules
from implicitdiff.tolerances import MISTAKE_OF_PRODUCT, UNKNOWN
from implicitdiff.typing import ConditionLike
from implicitdiff.verification.mistakes import Wrong, cause_of
from implicitdiff.verification.probes import Along, Gap, draw, measured, units
from implicitdiff.verification.trials import Trial

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["CheckRow", "DerivativeCheck", "check_derivatives"]

_NOTHING = "nothing to compare: no derivative is given, and none comes from autodiff"


@dataclass(frozen=True)
class CheckRow:
    """One comparison.

    Attributes
    ----------
    callable : str
        What was compared: the argument's name.
    against : str
        What with.
    difference : float
        Relative difference, the largest over several directions (and over the items of a batch).
    allowed : float
        What the tolerance, and the noise of the comparison, allow.
    verdict : str
        ``"ok"``, ``"wrong"``, or ``"unknown"`` where the noise is too large to say.
    cause : str
        What the mistake looks like.
    """

    callable: str
    against: str
    difference: float
    allowed: float
    verdict: str
    cause: str = ""


class DerivativeCheck(Sequence[CheckRow]):
    """The rows of `check_derivatives`; prints as a table.

    Parameters
    ----------
    rows : sequence of CheckRow
        One for each comparison.

    Attributes
    ----------
    rows : tuple of CheckRow
        The same.
    """

    def __init__(self, rows: Sequence[CheckRow]) -> None:
        self.rows = tuple(rows)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as can be seen."""
        return all(row.verdict != "wrong" for row in self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self.rows:
            return _NOTHING
        head, *body = self._cells()
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        return html_table(head, body, "" if body else _NOTHING)

    def _cells(self) -> Iterator[tuple[str, ...]]:
        yield "callable", "compared with", "difference", "allowed", "verdict", "looks like"
        for r in self:
            yield r.callable, r.against, f"{r.difference:.1e}", f"{r.allowed:.1e}", r.verdict, r.cause


def check_derivatives(
    condition: ConditionLike, y: Any, theta: Any, *, args: tuple[Any, ...] = (), backend: Any = None,
    batched: bool = False,
) -> DerivativeCheck:  # fmt: skip
    """Compare every derivative that was given with the function that it is of, and with the others.

    Products are compared along a few directions without structure, each coordinate in its own unit: with central
    differences of the function, whose noise is measured; with the framework's autodiff where it has one; a product with
    its transpose; a Hessian with its transpose. The autodiff of the functions is compared with their differences, too.

    Parameters
    ----------
    condition, y, theta, args, backend, batched
        As for `implicit_grad`. y need not be a solution.

    Returns
    -------
    DerivativeCheck
        A sequence of `CheckRow`, with ``.ok``; ``print`` it.

    Raises
    ------
    InputError, DTypeError, BackendError, CallbackError, DerivativeError
        As `implicit_grad`, for what cannot be evaluated at all.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Stationary, check_derivatives
    >>> wrong = Stationary(grad=lambda y, t: y**3 - t, hvp=lambda y, t, v: 6 * y**2 * v)
    >>> found = check_derivatives(wrong, np.array([1.0, 2.0]), np.array([1.0, 8.0]))
    >>> found.ok, found[0].callable, found[0].against, found[0].cause
    (False, 'hvp', 'differences of grad', 'a factor of 2 too much')
    """
    return _checked(condition, y, theta, tuple(args), batched, backend)


@untraced
def _checked(
    condition: Any, y: Any, theta: Any, args: tuple[Any, ...], batched: bool, backend: Backend
) -> DerivativeCheck:  # fmt: skip
    problem = problem_of(condition, y, theta, args=args, batched=batched, backend=backend)
    with problem.backend.computing():
        rules = Rules(problem, flat=True)
        if not rules.point.y.n:
            return DerivativeCheck([])
        rows = [row for checked in rules.maps.checked for row in _of_given(rules, checked)]
        rows += _of_parts(rules)
    return DerivativeCheck(rows)


# -- what was given ----------------------------------------------------------------------------------------
def _of_given(rules: Rules, c: Checked) -> Iterator[CheckRow]:
    derived = None if c.derive is None else c.derive()
    exact = derived is not None and derived.kind == "autodiff"
    trials: list[Trial] = []
    if c.function is not None or c.values is not None:
        adjoint = _adjoint(rules, c)
        trials = [Trial(c, 0, adjoint), Trial(c, 1, adjoint)]
        yield from _with_differences(trials)
    if exact and trials:
        yield from _with_autodiff(trials[0], derived)
    if trials:
        yield from _with_each_other(trials[0])


def _adjoint(rules: Rules, c: Checked) -> Array | None:
    """A u of Aᵀu = v, which weighs what a result depends on; None where it takes a compiler, or is not found."""
    if c.solved is None or rules.point.backend.traced:
        return None
    y = rules.point.y
    xp = rules.point.backend.xp
    size, _ = units(xp, y, y.vector)
    v = draw(xp, y.vector, 9) / divisor(xp, size)
    try:
        u, diagnostics = rules.solve_adjoint(v)
    except Exception:  # what is wrong is to be shown, not raised
        return None
    return None if bool(xp.any(diagnostics.solution.failed)) else u


def _with_differences(trials: list[Trial]) -> Iterator[CheckRow]:
    first, second = (dict(_gaps(trial)) for trial in trials)
    for name, gap in first.items():
        other = second.get(name)
        wrong = _any(gap.bad) and other is not None and _any(other.bad)
        what = trials[0].checked.of if name == "grad" else trials[0].checked.what
        cause = cause_of(trials[0], Wrong(name, gap, "")) if wrong else ""
        yield _row(name, f"differences of {what}", gap, wrong, cause)


def _gaps(trial: Trial) -> Iterator[tuple[str, Gap]]:
    """The gap of each callable, the worst over the directions."""
    found: dict[str, Gap] = {}
    about_f = trial.gradient()
    if about_f is not None:
        product, along, one = about_f
        found["grad"] = measured(product(), along, one)
    for q in trial.questions():
        gap = measured(q.product(), q.along, q.u, q.shift)
        if q.name not in found or _excess(gap) > _excess(found[q.name]):
            found[q.name] = gap
    yield from found.items()


def _with_autodiff(trial: Trial, derived: Any) -> Iterator[CheckRow]:
    """Given products against the framework's own, and the framework's own against differences."""
    c, u, z, t = trial.checked, trial.u, trial.z, trial.t
    what = c.what
    matrix = None if c.matrix[1] is None else c.matrix[1].forward
    by_y = trial.behind(u, derived.hvp if c.symmetric else derived.jvp_y, z)()
    gap = measured(by_y, trial.along_z, u)
    yield _row(f"autodiff of {what} (y)", f"differences of {what}", gap, _any(gap.bad), "")
    for name, product in ((c.matrix[0], matrix), c.forward):
        if product is not None:
            yield _pair(name, f"autodiff of {what}", trial.behind(u, product, z)(), by_y, trial)
    if c.adjoint[1] is not None:
        yield _pair(c.adjoint[0], f"autodiff of {what}", trial.before(u, c.adjoint[1], z)(), by_y, trial)
    if t is None or trial.along_t is None:
        return
    by_theta = trial.before(u, derived.vjp_theta, t)()
    gap = measured(by_theta, trial.along_t, u)
    yield _row(f"autodiff of {what} (theta)", f"differences of {what}", gap, _any(gap.bad), "")
    if c.mixed_vjp is not None:
        yield _pair("mixed_vjp", f"autodiff of {what}", trial.before(u, c.mixed_vjp, t)(), by_theta, trial)
    if c.mixed_jvp is not None:
        yield _pair("mixed_jvp", f"autodiff of {what}", trial.behind(u, c.mixed_jvp, t)(), by_theta, trial)


def _with_each_other(trial: Trial) -> Iterator[CheckRow]:
    """A product against its transpose, and symmetry."""
    c, u, z, t = trial.checked, trial.u, trial.z, trial.t
    matrix = None if c.matrix[1] is None else c.matrix[1].forward
    for name, product in ((c.matrix[0], matrix), c.forward):
        if product is None:
            continue
        value = trial.behind(u, product, z)()
        if c.symmetric:
            yield _pair(name, "its transpose", value, trial.before(u, product, z)(), trial)
        if c.adjoint[1] is not None and not c.symmetric:
            yield _pair(name, c.adjoint[0], value, trial.before(u, c.adjoint[1], z)(), trial)
    if c.mixed_vjp is not None and c.mixed_jvp is not None and t is not None:
        forward, reverse = trial.behind(u, c.mixed_jvp, t)(), trial.before(u, c.mixed_vjp, t)()
        yield _pair("mixed_jvp", "mixed_vjp", forward, reverse, trial)


# -- conditions that are made of several functions -----------------------------------------------------------
def _of_parts(rules: Rules) -> Iterator[CheckRow]:
    """The autodiff of each function of a condition with constraints against its differences."""
    p = rules.point
    for name, (function, scalar) in rules.condition.parts(p).items():
        applied = _looked_at(p.backend, function, scalar)
        derived = p.backend.differentiate(_with_axis(function) if scalar else function, p.y.vector, p.theta.vector)
        if derived.kind != "autodiff":
            continue
        y, theta = p.backend.look_at(p.y.vector), p.backend.look_at(p.theta.vector)
        xp = namespace(y)
        for which, raveler, x, product in (("y", p.y, y, derived.jvp_y), ("theta", p.theta, theta, derived.jvp_theta)):
            if not raveler.n:
                continue
            size, known = units(xp, raveler, x)
            d = draw(xp, x, 3) * size
            dy, dtheta = (d, None) if which == "y" else (None, d)
            along = Along(xp, applied, y, theta, dy, dtheta, known=known)
            change = along.change(0)
            rows = xp.abs(change)
            u = xp.where(rows > 0, draw(xp, change, 5) / divisor(xp, rows), 0 * rows)
            gap = measured(xp.vecdot(u, p.backend.look_at(product(p.backend.put_back(d)))), along, u)
            yield _row(f"autodiff of {name} ({which})", f"differences of {name}", gap, _any(gap.bad), "")


def _with_axis(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda y, theta: function(y, theta)[..., None]


def _looked_at(backend: Backend, function: Callable[..., Array], scalar: bool) -> Callable[..., Array]:
    called = _with_axis(function) if scalar else function
    return lambda *x: backend.look_at(called(*map(backend.put_back, x)))


# -- rows ------------------------------------------------------------------------------------------------
def _any(mask: Any) -> bool:
    return bool(mask.any()) if hasattr(mask, "any") else _largest(mask) > 0


def _largest(x: Any) -> float:
    flat = x.reshape(-1) if hasattr(x, "reshape") else None
    if flat is None:
        flat = namespace(x).reshape(x, (-1,))
    return max((float(flat[i]) for i in range(flat.shape[0])), default=0.0)


def _excess(gap: Gap) -> float:
    return _largest(gap.difference / gap.allowed)


def _row(name: str, against: str, gap: Gap, wrong: bool, cause: str) -> CheckRow:
    difference, allowed = _largest(gap.difference), _largest(gap.allowed)
    verdict = "wrong" if wrong else "ok" if allowed < UNKNOWN else "unknown"  # NaN says nothing either
    return CheckRow(name, against, difference, allowed, verdict, cause)


def _pair(name: str, against: str, a: Array, b: Array, trial: Trial) -> CheckRow:
    """Compare two numbers that are exact but for rounding."""
    xp = trial.xp
    size = xp.maximum(xp.abs(a), xp.abs(b))
    difference = xp.abs(a - b) / divisor(xp, size)
    allowed = MISTAKE_OF_PRODUCT.of(trial.along_z.eps)
    wrong = _any(difference > allowed)
    return CheckRow(name, against, _largest(difference), allowed, "wrong" if wrong else "ok")
