"""Trials of what was given of derivatives: a draw of directions, and what is asked along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor, quotient
from implicitdiff.conditions.base import Checked
from implicitdiff.namespaces import namespace
from implicitdiff.tolerances import AWAY
from implicitdiff.verification.probes import Along, draw, units

__all__ = ["Question", "Trial"]


class Question(NamedTuple):
    """A given product, applied: a number that differences of G along ``along`` have to give, too."""

    name: str
    product: Callable[[], Array]
    along: Along
    u: Array
    shift: Array | None = None
    """u'z, where it is I − ∂G/∂y that is solved with."""


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
        self.along_w = None if self.w is None else self._along(function, self.w, None, self.along_z)

    def _along(self, function: Any, dy: Array | None, dtheta: Array | None, beside: Along | None = None) -> Along:
        f = self.applied(function)
        return Along(
            self.xp, f, self.y, self.theta, dy, dtheta, scalar=self.scalar, known=self.both, beside=beside
        )  # fmt: skip

    def applied(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """A function of the framework's vectors on those that are looked at."""
        backend = self.point.backend
        return lambda *vectors: backend.look_at(function(*map(backend.put_back, vectors)))

    def _dual(self) -> Array:
        """A vector without structure in the units of 1/G, up to a common factor."""
        xp, c = self.xp, self.checked
        number = 4 * self.number + 2
        if c.symmetric:  # y_i G_i has the unit of f
            return draw(xp, self.y, number) * self.size
        if c.solved == 1:  # T has the units of y
            s = draw(xp, self.y, number)
            return xp.where(self.size > 0, s / xp.where(self.size > 0, self.size, xp.ones_like(s)), 0 * s)
        rows = xp.abs(self.along_z.change(0))
        rows = rows if self.along_t is None else rows + xp.abs(self.along_t.change(0))
        s = draw(xp, rows, number)
        usable = (rows > 0) & xp.isfinite(rows)
        return quotient(xp, s, rows, usable)

    def _scaled(self, w: Array) -> Array:
        """A direction of y, as large as its units let it be."""
        ratio = self.xp.max(self.xp.abs(w) / self.size, axis=-1, keepdims=True)
        return w / divisor(self.xp, ratio)

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
        far = AWAY.of(self.along_z.eps)
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
