"""How far off a derivative is, from one loose Newton step and one loose correction of the solve.

Let ŷ be what was handed in for the solution, û the adjoint that was found, ĝ = ∂L/∂θ − Bᵀû, and A, B, F at ŷ. With

    A δ = F(ŷ),  y⁺ = ŷ − δ,       A w = ∂L/∂y(y⁺) − A(y⁺)ᵀ û  (transposed),       g⁺ = ∂L/∂θ(y⁺) − B(y⁺)ᵀ (û + w),

g⁺ is the gradient with both errors, of the solution and of the solve, squared, so that e = ĝ − g⁺ is the error of ĝ to
first order. The same holds forward, with w of A w = −B θ̇ in place of û. Both systems are solved to one digit, or with
the factors that are there; and w to further ones where it changes y, and the derivative far less. The parts of e are
told apart by what the derivative is made anew from, starting with û:

    inner solution        the maps at y⁺,
    linear solve          the maps at ŷ (the true residual of û),
    damping, Gauss-Newton the same with the whole A, where another matrix was solved with,
    finite differences    the maps at ŷ by differences of eighth order, so that the change is the error of those of the
                          fourth; what is said of y⁺ above is taken by these, too,
    rounding              what of the first two is no larger than rounding in F and in A û explains.

κ = ‖F(y⁺)‖ / ‖F(ŷ)‖ says whether Newton's method contracts at ŷ, and with it whether e is more than a number.

References
----------
R. Becker, R. Rannacher, "An optimal control approach to a posteriori error estimation in finite element methods", Acta
Numerica 10 (2001) 1-102. DOI 10.1017/S0962492901000010 (errors of a functional by its adjoint)
M. B. Giles, N. A. Pierce, "An introduction to the adjoint approach to design", Flow, Turbulence and Combustion 65
(2000) 393-415. DOI 10.1023/A:1011430410075 (L − ûᵀF)
Z. Ye, G. Peyré, D. Cremers, P. Ablin, "Enhancing hypergradients estimation: a study of preconditioning and
reparameterization", AISTATS 2024. arXiv:2402.16748 (a Newton step squares the error)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from implicitdiff.arrays import Array, divisor, item_norm
from implicitdiff.errors import InputError
from implicitdiff.estimates import Estimate, Product, Resolving, nothing
from implicitdiff.linalg.damping import shifted
from implicitdiff.tolerances import (
    CAUTIOUS,
    CERTIFIED,
    ESTIMATED,
    MOST_RESOLVED,
    NOISE,
    PROBES,
    RESIDUAL,
    ROUNDED,
    SPLIT,
)

if TYPE_CHECKING:
    from implicitdiff.rules import Rules

__all__ = ["certify", "certify_adjoint", "certify_tangent", "newton_step"]


def newton_step(rules: Rules) -> Any:
    """y − A⁻¹F(y, θ), as a tree: damped where A itself is not solved with, and y in items where nothing is."""
    rules = _exact(rules)
    p, prepared, F = rules.point, rules.prepared.exact, _residual(rules)
    found = prepared.solve(F)
    step, failed = found.x, found.failed
    if shifted(prepared):
        rtol = RESIDUAL.at(p.backend.xp, F.dtype)
        whole, usable, _ = prepared.roughly(F, transposed=False, rtol=rtol)
        step, failed = p.backend.space(F).select(usable, whole, step), failed & ~usable
    y = p.y.vector - rules.restricted(step)
    y = p.y.space.select(~failed & p.y.space.finite(y), y, p.y.vector)
    return p.y.unravel(p.backend.detached(y))


def _residual(rules: Rules) -> Array:
    if rules.maps.residual is None:
        raise InputError(
            "error, max_error and polish need F(y, theta), and the condition gives no way to evaluate it.\n"
            "Next: give fun or grad beside the products."
        )
    if rules.check.kept is not None:
        return rules.check.kept
    F: Array = rules.maps.residual()
    return rules.point.backend.xp.asarray(F, copy=True)  # it may be a buffer that the next call fills again


def _exact(rules: Rules) -> Rules:
    """Return the rules with the whole of A, where the condition has them solve with another matrix."""
    condition = rules.condition.exact
    if condition is rules.condition:
        return rules
    problem = replace(rules.problem, condition=condition, copy=False)
    return type(rules)(problem, flat=True, choices=rules.maps.choices, trial=True)


def at_another(rules: Rules, step: Array) -> Rules:
    """Return the rules at ŷ − step, with the form of the system at ŷ."""
    y = rules.point.y.vector - rules.restricted(step)
    y = rules.point.backend.detached(y)
    problem = replace(rules.problem, y=rules.point.y.unravel(y), copy=False)
    choices = rules.condition.moved(rules.maps.choices, step)
    return type(rules)(problem, flat=True, choices=choices, trial=True)


def certify(rules: Rules) -> Estimate:
    """Estimate the error of the derivative that was made last.

    Parameters
    ----------
    rules : Rules
        On flat vectors; F can be evaluated.
    """
    p, product = rules.point, rules.product
    if 0 in (p.y.n, p.theta.n, *p.items, *product.value.shape):
        return nothing(rules, product)
    return _Certificate(rules, product).estimate()


def certify_adjoint(rules: Rules, solution: Any, b: Array) -> Estimate:
    """Estimate the error of −Bᵀu from a solution of Aᵀu = b, b of the system."""
    value = -rules.maps.B.rmatvec(solution.x)
    product = Product(True, lambda at: (b, 0), b, solution, value, lambda value: value)
    return _Certificate(rules, product).estimate()


def certify_tangent(rules: Rules, solution: Any, b: Array, t: Array) -> Estimate:
    """Estimate the error of a solution of A w = b, with b = −B θ̇ of the system, and θ̇ as a vector."""
    value = rules.restricted(solution.x)
    product = Product(False, lambda at: (-at.maps.B.matvec(t), 0), b, solution, value, lambda value: value)
    return _Certificate(rules, product).estimate()


def _over(xp: Any, a: Array, b: Array) -> Array:
    """a/b of sizes; infinity where b alone is zero, zero where both are."""
    nothing = xp.where(a > 0, xp.full_like(a, float("inf")), 0 * a)
    return xp.where(b > 0, a / divisor(xp, b), nothing)


class _Certificate:
    """The estimate for one product.

    Parameters
    ----------
    rules : Rules
        At ŷ, of the product.
    product : Product
    """

    def __init__(self, rules: Rules, product: Product) -> None:
        self.rules, self.backend = _exact(rules), rules.point.backend
        self.approximate = self.rules is not rules or shifted(self.rules.prepared)
        self.finer = self._by_finer_differences()
        self.xp, self.items = self.backend.xp, rules.point.items
        self.whole = True
        self.product = self._of_probes(product)
        self.rtol = self._tolerance()
        self.spent: Any = 0

    def _tolerance(self) -> float:
        """Relative residual of the two systems: a digit of the solution, and not of its stiff components alone.

        F and ρ are mostly made of those. A residual of 0.3 / κ(A) leaves less than a third of any other.
        """
        solution, A = self.product.solution, self.rules.prepared.operator
        if self.backend.traced or (solution.condition is None and solution.rcond is None):
            return CAUTIOUS
        xp = self.xp
        known = 1 / xp.asarray(solution.condition) if solution.condition is not None else xp.asarray(solution.rcond)
        least = float(xp.min(known))
        return max(min(ESTIMATED[0], ESTIMATED[1] * least), RESIDUAL.at(xp, A.dtype)) if least > 0 else CAUTIOUS

    def _of_probes(self, product: Product) -> Product:
        """Return the product along a few directions, where it is a Jacobian by a method without factors."""
        xp, x = self.xp, product.solution.x
        rhs = x.shape[0] if len(x.shape) > len(self.items) + 1 else 0
        if rhs <= PROBES or self.rules.prepared.factored:
            return product
        self.whole = False
        signs = self._signs(rhs, x)

        def along(many: Array) -> Array:
            return xp.tensordot(signs, many, axes=1)

        def right(at: Rules) -> tuple[Array, Any]:
            b, more = product.right(at)
            return along(b), more

        solution = product.solution._replace(x=along(x))
        return product._replace(right=right, solution=solution, value=along(product.value))

    def _signs(self, rhs: int, like: Array) -> Array:
        """PROBES vectors of ±1 without structure."""
        space = self.backend.vector_space((PROBES * rhs,), like.dtype, self.rules.point.y.device)
        probe = self.xp.reshape(space.probe(), (PROBES, rhs))
        return self.xp.where(probe > 0, self.xp.ones_like(probe), -self.xp.ones_like(probe))

    # -- the derivative, made again ------------------------------------------------------------------
    def _left(self, at: Rules) -> tuple[Array, Any]:
        """The residual of û by the maps of a point, and what is added to the derivative there."""
        b, more = self.product.right(at)
        return b - self._image(at, self.product.solution.x), more

    def _image(self, at: Rules, x: Array) -> Array:
        """A x or Aᵀ x at a point."""
        A = at.prepared.operator
        self.spent += self._rhs()
        return (A.rmatvec if self.product.transposed else A.matvec)(x)

    def _rhs(self) -> int:
        shape = self.product.solution.x.shape
        return int(shape[0]) if len(shape) > len(self.items) + 1 else 1

    def _solved(self, at: Rules, left: Array) -> tuple[Array, Array]:
        """A⁻¹ or A⁻ᵀ of a residual, as far as the derivative at a point sees it; whether it is that, per item.

        Of a method of Krylov the residual is orthogonal to all that it has seen, and so are the first directions of the
        correction. Where that is B, as with Lᵧ in its direction, the correction changes y and seems to change nothing.
        """
        xp, (w, usable) = self.xp, self._roughly(left)
        if self.rules.prepared.factored:
            return w, usable
        unit = _over(xp, self._size(self.product.value), self._size(self.product.solution.x))

        def unresolved(w: Array, level: Any) -> Array:
            return self._size(self._change(at, w)) < level * unit * self._size(w)

        def further(s: Resolving) -> Resolving:
            before, self.spent = self.spent, 0
            more, good = self._roughly(left - self._image(at, s.w))
            w = s.w + xp.where(s.open[..., None], more, xp.zeros_like(more))
            spent, self.spent = s.spent + self._counted(s.open), before
            level = s.level * self.rtol
            return Resolving(w, s.usable & (good | ~s.open), level, s.open & unresolved(w, level), spent, s.count + 1)

        level = xp.asarray(self.rtol, dtype=w.dtype, device=self.rules.point.y.device)
        open_ = unresolved(w, level)
        first = Resolving(w, usable, level, open_, self._counted(open_) * 0, 0)
        end = self.backend.while_loop(
            lambda s: xp.any(s.open) & (s.count < MOST_RESOLVED), further, first, limit=MOST_RESOLVED
        )
        self.spent = self.spent + end.spent
        return end.w, end.usable

    def _roughly(self, left: Array) -> tuple[Array, Array]:
        """The solution of one more system, to about a digit."""
        w, usable, spent = self.rules.prepared.roughly(left, transposed=self.product.transposed, rtol=self.rtol)
        self.spent += self._most(spent) * self._rhs()
        return w, self._all(usable)

    def _change(self, at: Rules, w: Array) -> Array:
        """What a correction of û takes from the derivative."""
        return at.maps.B.rmatvec(w) if self.product.transposed else -at.restricted(w)

    def _derivative(self, at: Rules, x: Array, more: Any) -> Array:
        return more - at.maps.B.rmatvec(x) if self.product.transposed else at.restricted(x) + more

    def _all(self, mask: Array) -> Array:
        return self.xp.all(mask, axis=0) if len(mask.shape) > len(self.items) else mask

    def _most(self, count: Any) -> Array:
        """The largest count over right-hand sides, per item."""
        count = self.xp.asarray(count, device=self.rules.point.y.device)
        return self.xp.max(count, axis=0) if len(count.shape) > len(self.items) else count

    def _counted(self, like: Array) -> Array:
        """Products that were spent, per item."""
        spent = self.xp.asarray(self.spent, dtype=self.xp.int32, device=self.rules.point.y.device)
        return self.xp.broadcast_to(spent, like.shape)

    def _size(self, x: Array) -> Array:
        """2-norm per item; over right-hand sides that of the whole, or its mean over random directions."""
        size = item_norm(self.xp, x)
        if len(size.shape) > len(self.items):
            size = item_norm(self.xp, self.xp.moveaxis(size, 0, -1))
            size = size if self.whole else size / PROBES**0.5
        return size

    # -- the estimate --------------------------------------------------------------------------------
    def estimate(self) -> Estimate:
        """Make the Newton step and the corrections."""
        xp, rules, product = self.xp, self.rules, self.product
        F = _residual(self.finer)
        size = self._scaled(F, rows=True)
        delta, stepped, spent = rules.prepared.roughly(F, transposed=False, rtol=self.rtol)
        self.spent += self._most(spent)
        there = at_another(self.finer, delta)
        left, more = self._left(there)
        w, corrected = self._solved(there, left)
        e = product.total - self._derivative(there, product.solution.x + w, more)
        zero = xp.zeros_like(size)
        part, linear = self._linear(left)
        approximation, linear = (linear, zero) if self.approximate else (zero, linear)
        exact, solved, noise = self._rounded(size)
        apart, unseen = self._apart(part, F)
        inner, differences = self._size(e - part - apart), self._size(apart)
        again = self._again(there, left, w)
        left_over = (again > CERTIFIED) & (self._size(left) > noise)
        absolute = self._size(e)
        told = xp.isfinite(absolute) & (corrected | ~left_over)  # else it may be 0, of a method that did not start
        absolute = xp.where(told, absolute, xp.full_like(absolute, float("inf")))
        kappa = _over(xp, self._scaled(_residual(there), rows=True), size)
        changed = None if there.maps.changed is None else there.maps.changed()
        rounding = xp.where(exact, inner, zero) + xp.where(solved, linear, zero)
        good = stepped & corrected & there.inputs & xp.isfinite(absolute)
        trusted = good & ((kappa <= CERTIFIED) | exact | unseen) & ~left_over
        trusted = trusted if changed is None else trusted & ~xp.any(changed, axis=-1)
        return Estimate(
            absolute, self._relative(absolute), xp.where(exact, zero, inner), xp.where(solved, zero, linear),
            differences, rounding, approximation, kappa, again, trusted, good, self._counted(kappa),
            product.tree(e) if self.whole else None, self._value(F), rules.point.y.unravel(there.point.y.vector),
            changed,
        )  # fmt: skip

    def _relative(self, absolute: Array) -> Array:
        """Over the size of the derivative, but not less than what cancels in it leaves of rounding."""
        xp, product = self.xp, self.product
        size, eps = self._size(product.total), float(xp.finfo(product.value.dtype).eps)
        if hasattr(product.beside, "shape"):  # g = ∂L/∂θ − Bᵀu
            beside = self._size(product.beside)
            size = xp.maximum(size, eps * (2 * beside + size))
        return _over(xp, absolute, size)

    def _linear(self, left: Array) -> tuple[Array, Array]:
        """What of the error is that of û as a solution: the vector where it counts, else 0; and the size of ρ."""
        xp, product = self.xp, self.product
        rho = xp.asarray(product.solution.residual, dtype=left.dtype) * self._size(product.b)
        wanted = (rho > SPLIT * self._size(left)) | self.approximate

        def solve(_: Any) -> tuple[Array, Any]:
            before, self.spent = self.spent, 0
            w = self._solved(self.rules, self._left(self.rules)[0])[0]
            spent, self.spent = self.spent, before
            return self._change(self.rules, w), xp.asarray(spent)

        part, spent = self.backend.if_any(wanted, solve, (xp.zeros_like(product.value), xp.asarray(0)))
        self.spent = self.spent + spent
        return part, xp.where(wanted, self._size(part), xp.zeros_like(rho))

    def _by_finer_differences(self) -> Rules:
        """The rules at ŷ with better differences; the same where they are not made of any."""
        rules = self.rules
        if self.backend.traced or not any("finite differences" in kind for kind in rules.derivatives.values()):
            return rules
        problem = replace(rules.problem, backend=self.backend.finer(), copy=False)
        return type(rules)(problem, flat=True, choices=rules.maps.choices, trial=True)

    def _apart(self, linear: Array, F: Array) -> tuple[Array, Array]:
        """What better differences change at ŷ; and whether F is no larger than what they change in it."""
        xp, product = self.xp, self.product
        size = self._scaled(F, rows=True)
        if self.finer is self.rules:
            return xp.zeros_like(product.value), size < 0
        left, more = self._left(self.finer)
        w, _ = self._solved(self.finer, left)
        change = self._scaled(_residual(self.rules) - F, rows=True)
        apart = product.total - self._derivative(self.finer, product.solution.x + w, more) - linear
        return apart, size <= NOISE * change

    def _scaled(self, x: Array, *, rows: bool) -> Array:
        """Return the 2-norm of a residual of A, or of Aᵀ, in the units in which A is equilibrated."""
        scaling = self.rules.prepared.scaling
        if scaling is not None:
            x = x * (scaling.rows if rows else scaling.columns)
        return item_norm(self.xp, x)

    def _again(self, there: Rules, left: Array, w: Array) -> Array:
        """κ of the adjoint: what of its residual at y⁺ is left after the correction, the largest over right-hand sides.

        Where A changes much on the way to y⁺, the factors of A(ŷ) leave much of it.
        """
        rest = left - self._image(there, w)
        before, after = (self._scaled(x, rows=not self.product.transposed) for x in (left, rest))
        return self._most(_over(self.xp, after, before))

    def _rounded(self, F: Array) -> tuple[Array, Array, Array]:
        """Whether rounding explains F of that size, and the residual of the solve; and what it makes of that."""
        xp, product, A = self.xp, self.product, self.rules.prepared.operator
        eps = ROUNDED * float(xp.finfo(F.dtype).eps)
        y = self.rules.embedded(self.rules.point.y.vector)
        known, norm = product.solution.operator_norm, xp.zeros_like(F)
        if known is None or not self.rules.prepared.factored:  # a method of Krylov knows it from below
            norm = self._scaled(A.matvec(y), rows=True)
        if known is not None:
            columns = None if (scaling := self.rules.prepared.scaling) is None else scaling.columns
            size = item_norm(xp, y if columns is None else y / columns)
            norm = xp.maximum(norm, xp.asarray(known, dtype=norm.dtype) * size)
        rounded = eps * norm >= F
        size = xp.asarray(product.solution.residual, dtype=norm.dtype)
        x, b = self._size(product.solution.x), self._size(product.b)
        level = eps * (1 if known is None else 1 + xp.asarray(known, dtype=x.dtype) * x / divisor(xp, b))
        return rounded, size <= level, level * b

    def _value(self, F: Array) -> Array | None:
        """L(ŷ) − ûᵀF, which is L at the solution to second order."""
        product = self.product
        if product.loss is None:
            return None
        return product.loss(self.rules) - self.xp.vecdot(product.solution.x, F, axis=-1)
