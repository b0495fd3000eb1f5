"""What the user gives of derivatives and is wrong: found, and named with what the mistake looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.conditions.base import Checked
from implicitdiff.errors import InconsistentDerivativesError
from implicitdiff.namespaces import namespace
from implicitdiff.verification.probes import Along, Gap, measured, settled
from implicitdiff.verification.trials import Trial

__all__ = ["Wrong", "cause_of", "error_for", "wrong_in"]


class Wrong(NamedTuple):
    """A callable that is not what it should be."""

    name: str
    gap: Gap
    cause: str


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
    other = checked.of if first.name == "grad" else checked.what
    verb = "are not derivatives" if len(wrongs) > 1 else "is not the gradient" if other != checked.what else None
    head = f"{names} {verb or 'is not the derivative'} of {other} at this point: {off:.2g} off, relative to its size."
    same = len({wrong.cause for wrong in wrongs}) == 1
    causes = first.cause if same else "; ".join(f"{wrong.name}: {wrong.cause}" for wrong in wrongs)
    return InconsistentDerivativesError(
        f"{head}\nLikely cause: {causes}.\n"
        "Next: check_derivatives(condition, y, theta) shows each of them; verify=False on the condition lets an "
        "approximation pass that is meant."
    )
