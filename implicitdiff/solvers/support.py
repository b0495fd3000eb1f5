"""Systems of a projected or proximal fixed point, solved on the support, where they are symmetric.

A = (1 + δ) I − D + s D H, with D the derivative of a projection or proximal operator, H a Hessian, s the step, δ the
damping. D is symmetric, with eigenvalues in [0, 1]: it is itself the Hessian of a convex function. Let N be the
orthogonal projector on null(D), and P = I − N. In A w = b the part N b passes through, N w = N b / (1 + δ). With
w = N w + D z for z in the range of D the rest is

    M z = P b − s D H N w,    M = (1 + δ) D − D² + s D H D,

symmetric, and positive definite at a strict minimum. The transposed system Aᵀ u = v has the same M:

    M z = D v,    u = N v / (1 + δ) + z − s N H D z / (1 + δ).

For the lasso D is the projector on the support S, and M = s H_SS: one solves for |S| unknowns, not n.

References
----------
Q. Bertrand et al., "Implicit differentiation of Lasso-type models for hyperparameter optimization", ICML 2020.
arXiv:2002.08943
J.-J. Moreau, "Proximité et dualité dans un espace hilbertien", Bull. Soc. Math. France 93 (1965) 273-299.
DOI 10.24033/bsmf.1625 (a proximal operator is the gradient of a convex function)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from implicitdiff.arrays import Array, divisor, item_norm, needed
from implicitdiff.errors import InputError, NotSymmetricError
from implicitdiff.linalg.operator import Operator
from implicitdiff.linalg.vector_space import is_tree_vector
from implicitdiff.outcome import Counts, Status
from implicitdiff.solvers.base import Solver, methods_of
from implicitdiff.tolerances import PROJECTOR, RESIDUAL_ON_SUPPORT

__all__ = ["OnSupport", "ProximalOperator", "Support", "support_of"]


@dataclass(frozen=True)
class ProximalOperator(Operator):
    """A = I − D + s D H with its parts.

    Parameters
    ----------
    outer : Operator
        D.
    inner : Operator
        H.
    step : float
        s.
    """

    outer: Any = None
    inner: Any = None
    step: float = 1.0


class Support(NamedTuple):
    """The coordinates on which D is not zero, and what D is there.

    ``diagonal`` is that of a diagonal D, else None. ``projector`` holds the items whose D is an orthogonal projector.
    """

    mask: Array
    diagonal: Array | None
    projector: Array


def support_of(op: ProximalOperator) -> tuple[Support, bool]:
    """Find the support by products of D with vectors without structure, and whether D is known to be of use.

    That is so for a diagonal D, whose entries beside 0 are regular, and for an orthogonal projector. Where values are
    not seen the answer is no.
    """
    backend, D = op.backend, op.outer
    xp = backend.xp
    ones = xp.ones((*op.items, op.n), dtype=op.dtype, device=op.device)
    z = backend.space(ones).probe() + 0 * ones
    image, other = D.matvec(z), xp.flip(z, axis=-1)
    level = PROJECTOR.at(xp, op.dtype) + 1e4 * D.accuracy
    size = level * item_norm(xp, image)
    projector = item_norm(xp, D.matvec(image) - image) <= size
    if backend.traced:
        return Support(image != 0, None, projector), False
    diagonal = D.matvec(ones)
    if bool(xp.all(item_norm(xp, diagonal * z - image) <= size)):
        return Support(image != 0, diagonal, projector), True
    gap = xp.abs(xp.vecdot(other, image) - xp.vecdot(D.matvec(other), z))
    symmetric = gap <= size * item_norm(xp, z)
    return Support(image != 0, None, projector), bool(xp.all(projector & symmetric))


class _State(NamedTuple):
    """The whole operator; where it is restricted, the support, its indices, M, and the inner solver's state."""

    operator: Any
    prepared: Any
    support: Support | None = None
    places: tuple[Array, Array] | None = None
    reduced: Any = None
    transposed: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class OnSupport(Solver):
    """A method that solves for the coordinates of the support.

    Parameters
    ----------
    method : Solver
        For the system on the support.
    restrict : bool or None
        None leaves it to what is found at the point; without values that is no.
    """

    method: Any
    restrict: bool | None = None

    verified = True

    @property
    def damping(self) -> Any:  # type: ignore[override]
        """δ."""
        damping = getattr(self.method, "damping", 0.0)
        if damping == "auto":
            raise InputError("damping = 'auto': I − ∂T of a projected or proximal step needs none.\nGive a number.")
        return damping

    def roughly(self, rtol: float) -> OnSupport:
        known = getattr(self.method, "roughly", None)
        return self if known is None else replace(self, method=known(rtol))

    def init(self, operator: Any) -> _State:
        support, found = None, False
        parts = isinstance(operator, ProximalOperator) and self.restrict is not False
        if parts and (self.restrict or not operator.backend.traced):
            support, found = support_of(operator)
        if support is None or not (found or self.restrict):
            self._refuse_symmetric_only()
            return _State(operator, self.method.init(operator))
        places = None if operator.backend.traced or operator.items else _places(operator, support.mask)
        reduced = _reduced(operator, support, places)
        return _State(operator, self.method.init(reduced) if reduced.n else None, support, places, reduced)

    def _refuse_symmetric_only(self) -> None:
        if getattr(self.method, "symmetric_only", False):
            raise NotSymmetricError(
                f"{self.method.name} is for symmetric A, and that of a projected or proximal fixed point is not.\n"
                "Next: restrict=True, which solves on the support, where it is; or lu, gmres or auto."
            )

    def plan(self, state: _State, rhs: int) -> None:
        """Let the method prepare for so many right-hand sides."""
        if hasattr(self.method, "plan") and state.prepared is not None:
            self.method.plan(state.prepared, rhs)

    def transpose(self, state: _State) -> _State:
        if state.support is None:
            return _State(state.operator.transpose(), self.method.transpose(state.prepared))
        return state._replace(transposed=not state.transposed)

    def describe(self, state: _State) -> list[tuple[str, str]]:
        if state.prepared is None:
            return [("none", "the support is empty")]
        methods = methods_of(self.method, state.prepared)
        if state.support is None:
            return list(methods)
        where = "on the support" if state.places is None else f"on the support, {state.reduced.n} of {state.operator.n}"
        return [(name, f"{where}; {why}") for name, why in methods]

    def solve(self, state: _State, b: Array, x0: Array | None = None) -> tuple[Array, Any, Counts]:
        if state.support is None:
            return self._plain(state, b, x0)
        op, space = state.operator, _Spaces(state)
        rest, keep = space.beside(b), 1 / (1 + op.damping)
        push, curve = space.push, op.inner.matvec
        if state.transposed:
            z, status, counts = self._inner(state, space.cut(push(b)), None if x0 is None else space.cut(x0))
            z = space.padded(z)
            x = z + keep * (rest - op.step * space.beside(curve(push(z))))
        else:
            right = b - rest
            if needed(op.backend, rest != 0):
                right = right - keep * op.step * push(curve(rest))
            z, status, counts = self._inner(state, space.cut(right), None)
            x = keep * rest + push(space.padded(z))
        return self._checked(state, b, x, status, counts)

    def _plain(self, state: _State, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        x, status, counts = self.method.solve(state.prepared, b, x0)
        if is_tree_vector(x) or getattr(self.method, "verified", False):
            return x, status, counts
        return self._checked(state, b, x, status, counts)

    def _inner(self, state: _State, b: Array, x0: Array | None) -> tuple[Array, Any, Counts]:
        if state.prepared is None:
            return b, 0, Counts(0, 0)
        x, status, counts = self.method.solve(state.prepared, b, x0)
        return x, status, Counts(*counts)

    def _checked(self, state: _State, b: Array, x: Array, status: Any, counts: Counts) -> tuple[Array, Any, Counts]:
        """Hold the true residual of the whole system against a tolerance."""
        op = state.operator
        xp, product = op.backend.xp, _transposed(state) if state.transposed else op.matvec
        size, residual = item_norm(xp, b), item_norm(xp, b - product(x))
        residual = residual / divisor(xp, size)
        rtol = getattr(self.method, "rtol", None) or RESIDUAL_ON_SUPPORT.at(xp, b.dtype)
        tolerance = 100 * rtol + 1e4 * op.accuracy
        status = xp.broadcast_to(xp.asarray(status, device=op.device), residual.shape)
        wrong = (status == 0) & ~(residual <= tolerance)
        status = xp.where(wrong, xp.full_like(status, int(Status.STAGNATED)), status)
        counts = Counts(*counts)._replace(residual=residual, tolerance=tolerance + 0 * residual, operator_norm=None)
        return x, status, counts._replace(matvecs=counts.matvecs + 2)


def _transposed(state: _State) -> Any:
    """The product with Aᵀ; where D is known by differences, and symmetric, no transposed product is derived."""
    op = state.operator
    if op.adjoint is not None or state.support is None:
        return op.rmatvec
    push = _Spaces(state).push
    return lambda x: (1 + op.damping) * x - push(x) + op.step * op.inner.matvec(push(x))


class _Spaces:
    """The maps between the vectors of the whole system and those of the support."""

    def __init__(self, state: _State) -> None:
        self.op, self.support, self.places = state.operator, state.support, state.places
        self.xp = state.operator.backend.xp

    def push(self, x: Array) -> Array:
        """D x."""
        return _push(self.op, self.support, x)

    def beside(self, x: Array) -> Array:
        """N x."""
        return _beside(self.op, self.support, x)

    def cut(self, x: Array) -> Array:
        """Return the coordinates of the support."""
        return x if self.places is None else self.xp.take(x, self.places[0], axis=-1)

    def padded(self, x: Array) -> Array:
        """Return the coordinates of the support, with zeros beside."""
        return x if self.places is None else _padded(self.op, self.places, x)


def _places(op: Operator, mask: Array) -> tuple[Array, Array] | None:
    """Indices of the support, and for each coordinate its place in the support; the last place is a zero."""
    xp = op.backend.xp
    indices = xp.nonzero(mask)[0]
    count = indices.shape[0]
    if count == op.n:
        return None
    counted = xp.astype(mask, indices.dtype)
    total = xp.cumulative_sum(counted) if hasattr(xp, "cumulative_sum") else xp.cumsum(counted, axis=0)
    return indices, xp.where(mask, total - 1, xp.full_like(total, count))


def _padded(op: Operator, places: tuple[Array, Array], x: Array) -> Array:
    zero = op.backend.xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=op.device)
    return op.backend.xp.take(op.backend.concat([x, zero]), places[1], axis=-1)


def _push(op: Any, support: Any, x: Array) -> Array:
    return op.outer.matvec(x) if support.diagonal is None else support.diagonal * x


def _beside(op: Any, support: Any, x: Array) -> Array:
    """N x: beside the range of a projector, or beside the support of a D that is regular there."""
    xp = op.backend.xp
    outside = xp.where(support.mask, xp.zeros_like(x), x)
    if support.diagonal is not None:
        return outside
    return xp.where(support.projector[..., None], x - op.outer.matvec(x), outside)


def _reduced(op: ProximalOperator, support: Support, places: tuple[Array, Array] | None) -> Operator:
    """M + N: the identity beside the range of D, so that M is regular at the order that it has."""
    n = op.n if places is None else int(places[0].shape[0])
    xp, curve, shift = op.backend.xp, op.inner.matvec, 1 + op.damping

    def product(x: Array) -> Array:
        x = x if places is None else _padded(op, places, x)
        d, diagonal = _push(op, support, x), support.diagonal
        if diagonal is None:
            y = shift * d + _push(op, support, op.step * curve(d) - d) + _beside(op, support, x)
        else:  # where it is one, nothing is left of the first, and what H adds may be far below its rounding
            y = (shift - diagonal) * d + op.step * (diagonal * curve(d)) + _beside(op, support, x)
        return y if places is None else xp.take(y, places[0], axis=-1)

    matrices = _matrices(op, support, places)
    return Operator(
        op.backend, n, n, op.items, op.dtype, op.device, forward=product, adjoint=product, kind=op.kind,
        label="the system on the support", symmetric=True, trusted=op.inner.trusted, damping=op.damping,
        accuracy=op.accuracy, **matrices,
    )  # fmt: skip


def _matrices(op: ProximalOperator, support: Support, places: tuple[Array, Array] | None) -> dict[str, Any]:
    """M as a matrix, dense or sparse, where H is one and D is diagonal."""
    d, H = support.diagonal, op.inner
    if d is None or op.items or (H.matrix is None and H.sparse is None):
        return {}
    xp, rest = op.backend.xp, (1 + op.damping - d) * d
    rest = xp.where(support.mask, rest, xp.ones_like(rest))
    if H.sparse is not None:
        import scipy.sparse

        scale = scipy.sparse.diags_array(d)
        sparse = (op.step * (scale @ H.sparse @ scale) + scipy.sparse.diags_array(rest)).tocsc()
        return {"sparse": sparse if places is None else sparse[places[0]][:, places[0]].tocsc()}
    matrix = op.step * d[:, None] * H.matrix * d + rest * xp.eye(op.n, dtype=op.dtype, device=op.device)
    if places is not None:
        matrix = xp.take(xp.take(matrix, places[0], axis=0), places[0], axis=1)
    return {"matrix": matrix}
