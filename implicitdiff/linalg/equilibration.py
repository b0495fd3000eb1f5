"""Equilibration: every row and column of a system in a unit of its own, by powers of two.

Entries of y and of F have units of their own, so A may hold 1e-7 beside 1e7 and be as regular as the identity. With
positive diagonal R and C the system A x = b is that of Â = R A C: Â x̂ = R b, x = C x̂. Rank, convergence and residuals
are judged on Â, where units have dropped out, and since R and C hold powers of two nothing is rounded on the way.

- A positive definite matrix: R = C = D with d_i = a_ii^(-1/2), within a factor n of the best diagonal scaling there is
  (van der Sluis).
- Symmetric: the same, where the diagonal has an entry; then sweeps d_i /= sqrt(max_j |d_i a_ij d_j|) (Ruiz).
- Any other: sweeps of Sinkhorn and Knopp's iteration, to rows and columns whose absolute values sum to one. What it
  comes to does not depend on the units that it begins with, and entries that are nothing but rounding hardly count.
  (The largest entry in place of the sum would do neither: with zeros in the pattern, a column in a unit of 1e12 makes
  every row that has an entry there a row of that entry alone.)
- Products only: the same for the matrix of the norms of the blocks between the leaves of y, seen on one vector each.
  A leaf is a unit then; entries within one are not scaled against each other. A small system, though, is assembled for
  its scales where the entries of y, or those of the image of one vector in their units, are of very different sizes.

References
----------
A. van der Sluis, "Condition numbers and equilibration of matrices", Numer. Math. 14 (1969) 14-23.
DOI 10.1007/BF02165096
R. Sinkhorn, P. Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", Pacific J. Math. 21 (1967)
343-348. DOI 10.2140/pjm.1967.21.343
P. A. Knight, D. Ruiz, B. Uçar, "A symmetry preserving algorithm for matrix scaling", SIAM J. Matrix Anal. Appl. 35
(2014) 931-955. DOI 10.1137/110825753
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from implicitdiff.arrays import Array, any_true, divisor, ends, item_norm, needed, times
from implicitdiff.linalg.operator import Operator, Product
from implicitdiff.linalg.vector_space import TreeVector, is_tree_vector
from implicitdiff.tolerances import ALIKE, EVEN, MIXED, SMALL, TINY

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["Scaling", "equilibrated", "of_matrix", "of_operator", "of_sparse", "scaled_sparse"]

SWEEPS = 60
"""Of a matrix at hand, at most; units from 1e-9 to 1e9 took 5 to 10 in trials, and up to that many with many zeros."""
PROBED = 3
"""Sweeps where there are products only."""
LEAVES = 8
"""Up to so many leaves are seen one by one; more of them by sweeps over all at once."""


class Scaling(NamedTuple):
    """R and C as vectors (*items, n), or as one number per leaf where vectors are tuples of leaves."""

    rows: Any
    columns: Any

    def transpose(self) -> Scaling:
        """Of Aᵀ: C Aᵀ R."""
        return Scaling(self.columns, self.rows)

    def scaled(self, b: Any) -> Any:
        """R b."""
        return _times(self.rows, b)

    def restored(self, x: Any) -> Any:
        """C x̂."""
        return _times(self.columns, x)

    def start(self, x: Any) -> Any:
        """C⁻¹ x."""
        return _times(_reciprocal(self.columns), x)

    def residual(self, r: Any) -> Any:
        """R⁻¹ r̂."""
        return _times(_reciprocal(self.rows), r)

    def reported_residual(self, backend: Backend, converged: Array, judged: tuple[Array, Any], r: Any, b: Any) -> Array:
        """Return ‖b − A x‖ / ‖b‖ for a scaled r and b; the scaled ones where they disagree on success."""
        xp, space = backend.xp, backend.space(b)

        def number(x: Any) -> Array:  # scalars of a space may be the host's own numbers
            return xp.asarray(x, dtype=b.dtype, device=backend.device(x) if backend.is_array(x) else None)

        size = number(space.size(self.residual(b)))
        relative = number(space.size(self.residual(r))) / divisor(xp, size)
        residual, tolerance = map(number, judged)
        return xp.where(xp.asarray(converged) == (relative <= tolerance), relative, residual)


def _reciprocal(scale: Any) -> Any:
    return scale.map(lambda number: 1 / number) if is_tree_vector(scale) else 1 / scale


def _times(scale: Any, x: Any) -> Any:
    return x.map(lambda leaf, number: number * leaf, scale) if is_tree_vector(x) else scale * x


# -- of a matrix ---------------------------------------------------------------------------------------
def of_matrix(backend: Backend, matrix: Array, *, symmetric: bool, definite: bool = False) -> Scaling | None:
    """Scale a dense matrix (*items, n, n); None where its rows and columns are alike already.

    Parameters
    ----------
    symmetric : bool
        Whether R = C is asked for.
    definite : bool
        Whether the diagonal alone decides, as it may for a positive definite matrix.
    """
    xp = backend.xp
    if symmetric and definite:
        d = _inverse_root(xp, xp.abs(xp.linalg.diagonal(matrix)))
        return _checked(backend, d, d)
    size = xp.abs(backend.detached(matrix))
    if symmetric:
        d = _symmetric(backend, xp.linalg.diagonal(size), lambda d: xp.max(size * d[..., None, :], axis=-1))
        return _checked(backend, d, d)
    rows, columns = _inverse(xp, xp.max(size, axis=-1)), _inverse(xp, xp.max(size, axis=-2))
    if not backend.traced and _alike(xp, rows) and _alike(xp, columns):
        return None
    turned = xp.matrix_transpose(size)

    def sums(d: Array, axis: int) -> Array:
        return times(size if axis else turned, d)

    return _checked(backend, *_balanced(backend.while_loop, xp, sums, xp.ones_like(rows)))


def _symmetric(backend: Backend, diagonal: Array, over: Callable[[Array], Array]) -> Array:
    """Scale by the diagonal, then even out; ``over(d)`` is the largest entry of each row, with columns times d."""
    xp = backend.xp
    d = xp.where(diagonal > 0, _inverse_root(xp, diagonal), xp.zeros_like(diagonal))
    if needed(backend, ~(diagonal > 0)):  # a row without a diagonal entry goes by those that have one
        d = xp.where(diagonal > 0, d, _inverse(xp, over(d)))

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        return xp.any((state[1] > 2) | (state[1] < 0.5)) & (state[2] < PROBED)

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d = state[0] * _inverse_root(xp, state[1])
        return d, d * over(d), state[2] + 1

    return backend.while_loop(goes_on, sweep, (d, d * over(d), xp.sum(0 * d)), PROBED)[0]


def _balanced(loop: Any, xp: Any, sums: Callable[[Array, int], Array], one: Array) -> Any:
    """Scale rows and columns in turn until the rows are even (the columns are, then).

    ``sums(d, axis)`` are the sums over each row (1), with columns times d, or over each column (0), with rows times d.
    """

    def sweep(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        _, columns, _, done = state
        rows = _inverse(xp, sums(columns, 1))
        columns = _inverse(xp, sums(rows, 0))
        return rows, columns, rows * sums(columns, 1), done + 1

    def goes_on(state: tuple[Array, Array, Array, Array]) -> Array:
        total, done = state[2:]
        known = _inverse(xp, _inverse(xp, total))  # a row of zeros counts as one
        uneven = xp.max(known, axis=-1) > EVEN * xp.min(known, axis=-1)
        return xp.any(uneven | (done < 1)) & (done < SWEEPS)

    start = (one, one, sums(one, 1), xp.sum(0 * one))
    rows, columns, *_ = loop(goes_on, sweep, start, SWEEPS)
    return rows, columns


def of_sparse(backend: Backend, matrix: Any, *, symmetric: bool) -> Scaling | None:
    """Scale a SciPy sparse matrix (n, n); None where its rows and columns are alike already."""
    size = abs(matrix).tocsr()
    if symmetric:
        over = lambda d: size.multiply(d[None, :]).tocsr().max(axis=1).toarray().ravel()  # noqa: E731
        d = _symmetric(backend, size.diagonal(), over)
        return _checked(backend, d, d)
    largest = [_inverse(np, size.max(axis=axis).toarray().ravel()) for axis in (0, 1)]
    if all(_alike(np, d) for d in largest):
        return None
    turned = size.T.tocsr()

    def sums(d: Array, axis: int) -> Array:
        return (size if axis else turned) @ d

    return _checked(backend, *_balanced(backend.while_loop, np, sums, np.ones(size.shape[0])))


def scaled_sparse(matrix: Any, scaling: Scaling) -> Any:
    """R A C of a SciPy sparse matrix."""
    return matrix.multiply(scaling.rows[:, None]).multiply(scaling.columns[None, :]).tocsc()


def _inverse(xp: Any, x: Array) -> Array:
    """1/x, and one where x is zero or not finite."""
    one = xp.ones_like(x)
    usable = xp.isfinite(x) & (x > 0)
    return xp.where(usable, one / xp.where(usable, x, one), one)


def _inverse_root(xp: Any, x: Array) -> Array:
    return xp.sqrt(_inverse(xp, x))


def _exponents(xp: Any, x: Array) -> Array:
    return xp.round(xp.log2(x))


def _alike(xp: Any, x: Array) -> bool:
    """Whether the entries of each item are of one size."""
    return not any_true(xp, xp.max(x, axis=-1) > 2.0**ALIKE * xp.min(x, axis=-1))


def _checked(backend: Backend, rows: Array, columns: Array) -> Scaling | None:
    """Round to powers of two; None where there is nothing to scale, and that can be seen."""
    xp = backend.xp
    alike = not backend.traced and (not rows.shape[-1] or _alike(xp, rows))
    if alike and (columns is rows or not rows.shape[-1] or _alike(xp, columns)):
        return None
    return _powers(xp, rows, columns)


def _powers(xp: Any, rows: Array, columns: Array) -> Scaling:
    scale = 2.0 ** _exponents(xp, rows)
    return Scaling(scale, scale if columns is rows else 2.0 ** _exponents(xp, columns))


# -- of an operator --------------------------------------------------------------------------------------
def of_operator(op: Operator, *, symmetric: bool = False) -> Scaling | None:
    """Scale an operator by its matrix, if it is at hand, else leaf by leaf; kept with the operator.

    R = C where A is symmetric, or ``symmetric`` says that the method takes it to be.
    """
    symmetric = symmetric or bool(op.symmetric)
    key, found = f"scaling{symmetric}", None
    if key in op._cache:
        return op._cache[key]
    if not op.n or 0 in op.items:
        pass
    elif op.sparse is not None:
        found = of_sparse(op.backend, op.sparse, symmetric=symmetric)
    elif op.matrix is not None or op.assembled or _mixed(op):
        found = of_matrix(op.backend, op.dense(), symmetric=symmetric)
    elif len(op.leaves) > 1:
        found = _by_leaves(op, symmetric)
    op._cache[key] = found
    return found


def _mixed(op: Operator) -> bool:
    """Whether y or F seem to hold entries in different units, in a system so small that it may be assembled."""
    if op.n > SMALL or op.n < 2 or op.like is None or is_tree_vector(op.like):
        return False
    if op.backend.traced:  # nothing is seen there: a matter of order alone
        return op.n <= TINY
    xp = op.backend.xp
    ratio, unit = MIXED.at(xp, op.dtype), xp.abs(op.like)
    least, largest = ends(xp, unit)
    if any_true(xp, ~(least > 0)):
        unit = xp.where(unit > 0, unit, divisor(xp, largest)[..., None])
        least, largest = ends(xp, unit)
    image = xp.abs(op.matvec(unit * op.backend.space(op.like).probe()))
    op._cache["probes"] = op.probes + 1
    small, large = ends(xp, image)
    return any_true(xp, (largest > ratio * least) | (large > ratio * small))


def equilibrated(op: Operator, scaling: Scaling | None) -> Operator:
    """Return Â; the operator itself where there is nothing to scale."""
    if scaling is None:
        return op
    rows, columns = scaling

    def between(left: Any, product: Product, right: Any) -> Product:
        return lambda x: _times(left, product(_times(right, x)))

    derive = op.derive

    def derived(transposed: bool) -> tuple[str, Product] | None:
        found = None if derive is None else derive(transposed)
        if found is None:
            return None
        left, right = (columns, rows) if transposed else (rows, columns)
        return found[0], between(left, found[1], right)

    matrix, sparse = op.matrix, op.sparse
    if matrix is None and not op.backend.traced:
        matrix = op.at_hand
    if matrix is not None:
        matrix = rows[..., :, None] * matrix * columns[..., None, :]
    if sparse is not None:
        sparse = scaled_sparse(sparse, scaling)
    forward = None if op.forward is None else between(rows, op.forward, columns)
    adjoint = None if op.adjoint is None else between(columns, op.adjoint, rows)
    return replace(
        op, forward=forward, adjoint=adjoint, derive=derived, matrix=matrix, sparse=sparse, leaves=(),
        sparsity=None, entries=None, _cache={"scalingTrue": None, "scalingFalse": None},
    )  # fmt: skip


# -- leaf by leaf ----------------------------------------------------------------------------------------
def _by_leaves(op: Operator, symmetric: bool) -> Scaling | None:
    """Scale the leaves of y against each other, from what A makes of one vector in each."""
    leaves = _Leaves(op)
    count = len(op.leaves)
    if count <= LEAVES:
        op._cache["probes"] = op.probes + count
        columns = [leaves.norms(op.matvec(leaves.only(j))) for j in range(count)]
        size = op.backend.xp.stack(columns, axis=-1) / leaves.lengths[..., None, :]
        return leaves.expanded(of_matrix(op.backend, size, symmetric=symmetric))
    if not symmetric and op.adjoint is None:
        return None
    op._cache["probes"] = op.probes + PROBED * (1 if symmetric else 2)
    ones = op.backend.xp.ones_like(leaves.lengths)
    rows = columns = ones
    for _ in range(PROBED):
        found = leaves.norms(op.matvec(leaves.weighted(columns))) / leaves.lengths
        if symmetric:
            rows = columns = columns * _inverse_root(op.backend.xp, columns * found)
            continue
        rows = _inverse(op.backend.xp, found)
        columns = _inverse(op.backend.xp, leaves.norms(op.rmatvec(leaves.weighted(rows))) / leaves.lengths)
    return leaves.expanded(_checked(op.backend, rows, columns))


class _Leaves:
    """Vectors of an operator, leaf by leaf: parts of one vector, or leaves that are kept apart."""

    def __init__(self, op: Operator) -> None:
        self.op, self.xp = op, op.backend.xp
        self.probe = op.backend.space(op.like).probe()
        self.apart = is_tree_vector(self.probe)
        self.lengths = self.norms(self.probe)

    def norms(self, x: Any) -> Array:
        """Norm of each leaf, shape (*items, leaves)."""
        if self.apart:
            alone = [TreeVector([leaf]) for leaf in x.leaves]
            return self.xp.stack([self.op.backend.space(leaf).size(leaf) for leaf in alone], axis=-1)
        out, start = [], 0
        for size in self.op.leaves:
            out.append(item_norm(self.xp, x[..., start : start + size]))
            start += size
        return self.xp.stack([self.xp.asarray(norm) for norm in out], axis=-1)

    def weighted(self, weights: Array) -> Any:
        """Return the probe vector with each leaf multiplied by its weight (*items, leaves)."""
        return _times(self._vector(weights), self.probe)

    def only(self, j: int) -> Any:
        """Return the probe vector in one leaf, zeros in the others."""
        chosen = self.xp.asarray([float(i == j) for i in range(len(self.op.leaves))], dtype=self.op.dtype)
        return self.weighted(chosen + 0 * self.lengths)

    def expanded(self, scaling: Scaling | None) -> Scaling | None:
        """One number per leaf as a vector, or as a number for each leaf that is kept apart."""
        return None if scaling is None else Scaling(*map(self._vector, scaling))

    def _vector(self, numbers: Array) -> Any:
        if self.apart:
            return TreeVector([numbers[i] for i in range(len(self.op.leaves))])
        parts = [
            self.xp.broadcast_to(numbers[..., i : i + 1], (*numbers.shape[:-1], size))
            for i, size in enumerate(self.op.leaves)
        ]
        return self.op.backend.concat(parts)
