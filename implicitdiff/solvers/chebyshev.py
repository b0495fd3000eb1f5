"""Chebyshev's semi-iteration: the polynomial of A that is best for all spectra between two bounds.

With θ = (a + b)/2, δ = (b − a)/2, σ = θ/δ, starting from d = r/θ, ρ = 1/σ::

    x += d      r −= A d      ρ₊ = 1 / (2σ − ρ)      d = ρ₊ρ d + (2ρ₊/δ) r

After k terms the residual is at most 1/T_k(σ) of b, T_k Chebyshev's polynomial. No inner product is taken.

References
----------
G. H. Golub, R. S. Varga, "Chebyshev semi-iterative methods, successive overrelaxation iterative methods, and second
order Richardson iterative methods", Numer. Math. 3 (1961) 147-156. DOI 10.1007/BF01386013
Y. Saad, "Iterative methods for sparse linear systems", 2nd ed., SIAM, 2003, algorithm 12.1. DOI 10.1137/1.9780898718003
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from implicitdiff.arrays import Array
from implicitdiff.linalg.operator import Operator, Product
from implicitdiff.outcome import Status
from implicitdiff.solvers.approximation import Applied, ApproximateState, Approximation, dominant, number
from implicitdiff.solvers.base import Structure
from implicitdiff.tolerances import GROWTH, POWER_SHORT

__all__ = ["Chebyshev"]


class _State(NamedTuple):
    x: Array
    r: Array
    d: Array
    rho: Array
    size: Array
    active: Array
    status: Array
    terms: Array
    turn: Any


@dataclass(frozen=True, eq=False, repr=False)
class Chebyshev(Approximation):
    """Chebyshev's semi-iteration: symmetric definite A, products only, no inner products.

    Parameters
    ----------
    terms : int, default 20
        Terms: as many products, that for the true residual among them.
    bounds : (float, float), optional
        Two numbers of one sign between which the eigenvalues of A lie. By default both are found by power iteration (up
        to 30 products for each, once for each A). Bounds that do not hold at the outer end make it diverge, which is
        told; at the inner end they cost accuracy.
    damping : float, default 0
        δ of (A + δI) x = b, in place of A x = b. The bounds are those of A + δI.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Chebyshev, linear_solve
    >>> x = linear_solve(np.diag([1.0, 2.0, 3.0]), np.ones(3), solver=Chebyshev(terms=8, bounds=(1.0, 3.0)))
    >>> print(x.round(3))
    [1.    0.5   0.333]
    """

    terms: int = 20
    bounds: tuple[float, float] | None = None
    damping: float | Literal["auto"] = 0.0

    name: ClassVar[str] = "chebyshev"
    cost: ClassVar[str] = "terms"
    structure: ClassVar[Structure] = "symmetric"

    def prepare(self, operator: Operator) -> Any:
        """Return the bound next to zero, and the other one."""
        if self.bounds is not None:
            inner, outer = sorted(map(float, self.bounds), key=abs)
            return inner, outer
        largest = dominant(operator)
        outer = largest * (1 + POWER_SHORT)  # it is known from below
        return largest - _smaller(operator, largest), outer

    def apply(self, state: ApproximateState, space: Any, r: Array) -> Applied:
        op, zero, one = state.operator, space.scalar(0.0), space.scalar(1.0)
        inner, outer = (number(space, op, bound) for bound in state.prepared)
        indefinite = ~(inner * outer > 0) & (outer != 0)
        middle, half = (outer + inner) / 2, (outer - inner) / 2
        narrow = ~(abs(half) > space.eps * abs(middle)) | indefinite
        half = space.where(narrow, space.where(middle != 0, space.eps * middle, one), half)
        middle = space.where(middle != 0, middle, one)
        sigma, size = middle / half, space.norm(r)
        d = space.scale(one / middle, space.copy(r))
        first = _State(
            space.zeros(), space.copy(r), d, one / sigma, size, space.isfinite(size) & ~indefinite,
            space.where(indefinite, int(Status.NOT_POSITIVE_DEFINITE), space.counter()), space.counter(1), 0,
        )  # fmt: skip

        def step(s: _State) -> _State:
            go = space.where(s.active, one, zero)
            x, r = space.axpy(go, s.d, s.x), space.axpy(-go, op.matvec(s.d), s.r)
            rho = space.where(s.active, one / (2 * sigma - s.rho), s.rho)
            d = space.axpy(go * 2 * rho / half, r, space.scale(space.where(s.active, rho * s.rho, one), s.d))
            norm = space.where(s.active, space.norm(r), s.size)
            grown = s.active & (norm > GROWTH.of(space.eps) * size)
            status = space.where(grown, int(Status.DIVERGED), s.status)
            terms = space.where(s.active, s.terms + 1, s.terms)
            return _State(x, r, d, rho, norm, s.active & ~grown & space.isfinite(norm), status, terms, s.turn + 1)

        end = op.backend.while_loop(
            lambda s: space.any(s.active) & (s.turn < self.terms - 1), step, first, limit=self.terms - 1
        )  # fmt: skip
        return Applied(space.axpy(one, end.d, end.x), end.terms, end.turn, end.status, end.size)


def _smaller(operator: Operator, largest: Any) -> Any:
    """Return how far the other end of the spectrum is from the largest eigenvalue: the largest of λmax I − A."""
    backend = operator.backend

    def wrap(product: Product) -> Product:
        def shifted(x: Array) -> Array:
            space = backend.space(x)
            negative = space.scale(space.scalar(-1.0), space.copy(product(x)))
            return space.axpy(number(space, operator, largest), x, negative)

        return shifted

    other = operator.rewrapped(wrap, matrix=None, sparse=None)
    found = dominant(other)
    operator._cache["probes"] = operator.probes + other.probes
    return found
