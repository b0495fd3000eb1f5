"""Linear maps and operators: products, transposes, assembly, and what is known of the structure.

Vectors carry leading axes: for a problem (or a batch of ``items`` problems) a map takes arrays of shape
``(*rhs, *items, n)``, where ``rhs`` is ``()`` for one right-hand side and ``(k,)`` for k of them, all with the
same A. Matrices have shape ``(*items, rows, columns)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.errors import CallbackError, DerivativeError, ShapeError
from implicitdiff.tolerances import NOISY_PRODUCTS, ROUNDING, ROUNDING_LEAST, SMALL

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["LinearMap", "Operator", "Product", "checked_product", "matrix_map", "matrix_product"]

Product = Callable[[Array], Array]
Derive = Callable[[bool], "tuple[str, Product] | None"]


@dataclass(frozen=True)
class LinearMap:
    """A linear map from vectors of length ``columns`` to vectors of length ``rows``.

    Parameters
    ----------
    backend : Backend
        Of the vectors.
    rows, columns : int
        Its dimensions.
    items : tuple of int
        Leading axes of independent maps.
    dtype, device
        Of the vectors of length ``rows``.
    forward, adjoint : callable or None
        ``(*rhs, *items, columns) -> (*rhs, *items, rows)`` and its transpose. One may be missing.
    matrix : array, shape (*items, rows, columns), optional
        The matrix, where it is at hand.
    sparse : scipy.sparse matrix, optional
        The same, sparse.
    kind : str
        Where the products come from, for the report.
    label : str
        What to call the product in a message.
    derive : callable or None
        Asked for a missing product when it is first needed: ``derive(transposed)`` returns its kind and the product,
        or None; then the matrix is assembled from the product that is there.
    domain : dtype, optional
        Of the vectors of length ``columns``, where it is another one.
    accuracy : float
        Relative error of a product beyond rounding; not 0 for finite differences.
    """

    backend: Backend
    rows: int
    columns: int
    items: tuple[int, ...]
    dtype: Any
    device: Any
    forward: Product | None = None
    adjoint: Product | None = None
    matrix: Array | None = None
    sparse: Any = None
    kind: str = "given"
    label: str = "A"
    derive: Derive | None = None
    domain: Any = None
    accuracy: float = 0.0
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def matvec(self) -> Product:
        """The product with A."""
        return self.forward or self._missing(transposed=False)

    @property
    def rmatvec(self) -> Product:
        """The product with Aᵀ."""
        return self.adjoint or self._missing(transposed=True)

    @property
    def sources(self) -> str:
        """Where the products used so far come from."""
        derived = [found[0] for key, found in self._cache.items() if key.startswith("derived") and found]
        return ", ".join(dict.fromkeys([self.kind, *derived]))

    def _missing(self, *, transposed: bool) -> Product:
        key = f"derived{transposed}"
        if key not in self._cache:
            self._cache[key] = None if self.derive is None else self.derive(transposed)
        if self._cache[key] is not None:
            return self._cache[key][1]
        return matrix_product(self.backend.xp, self.dense(), transposed=transposed)

    def rewrapped(self, wrap: Callable[[Product], Product], **changes: Any) -> Any:
        """Copy with every product, given or still to be derived, wrapped."""
        derive = self.derive

        def derived(transposed: bool) -> tuple[str, Product] | None:
            found = None if derive is None else derive(transposed)
            return None if found is None else (found[0], wrap(found[1]))

        forward, adjoint = (None if p is None else wrap(p) for p in (self.forward, self.adjoint))
        if getattr(self, "entries", None) is not None:
            changes = {"entries": None, **changes}
        return replace(self, forward=forward, adjoint=adjoint, derive=derived, _cache={}, **changes)

    def specialised(self, kind: type[Any], **more: Any) -> Any:
        """Copy as an operator of a class derived from this one, with what that has beside."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "_cache"} | more)

    def dense(self) -> Array:
        """Return the matrix, shape (*items, rows, columns), assembled once in one sweep over the unit vectors."""
        if self.matrix is not None:
            return self.matrix
        if "matrix" not in self._cache:
            self._cache["matrix"] = self._assemble()
        return self._cache["matrix"]

    def _assemble(self) -> Array:
        xp = self.backend.xp
        if self.sparse is not None:
            return xp.asarray(self.sparse.toarray(), dtype=self.dtype, device=self.device)
        forward = self.adjoint is None or (self.forward is not None and self.columns <= self.rows)
        product, n = (self.forward, self.columns) if forward else (self.adjoint, self.rows)
        if product is None:
            raise DerivativeError(f"no product with {self.label} is known: give one of its callables.")
        dtype = self.domain if forward and self.domain is not None else self.dtype
        unit = xp.eye(n, dtype=dtype, device=self.device)
        unit = xp.broadcast_to(xp.reshape(unit, (n, *(1,) * len(self.items), n)), (n, *self.items, n))
        images = xp.moveaxis(self.backend.astype(product(unit), self.dtype), 0, -1)  # (*items, rows, columns) forward
        return images if forward else xp.matrix_transpose(images)


def matrix_product(xp: Any, matrix: Array, *, transposed: bool = False) -> Product:
    """Product of a matrix (*items, rows, columns) with vectors (*rhs, *items, columns)."""
    m = xp.matrix_transpose(matrix) if transposed else matrix
    if len(matrix.shape) == 2:
        return lambda x: x @ xp.matrix_transpose(m) if len(x.shape) > 1 else m @ x

    def product(x: Array) -> Array:
        if len(x.shape) == len(m.shape):  # right-hand sides as the columns of one matrix product
            columns = m @ xp.moveaxis(x, 0, -1)
            return xp.moveaxis(columns, -1, 0)
        return (m @ x[..., None])[..., 0]

    return product


@dataclass(frozen=True)
class Operator(LinearMap):
    """A square linear map with what is known of its structure.

    Parameters
    ----------
    symmetric : bool or None
        True, False, or None where nothing is known.
    positive_definite : bool or None
        Likewise.
    trusted : bool
        Whether the symmetry holds by construction (an autodiff Hessian, a matrix that was compared with its
        transpose); one that was only declared is checked.
    damping : float
        δ of (A + δI), applied to every product and to the matrix.
    offset : float
        Size of what cancels in A beside its entries: 1 for I − ∂T, of which a small rest is known to the rounding of 1.
    sparsity : Sparsity, optional
        Where A has entries, if that is known or to be found: then it is assembled from a few products.
    entries : Entries, optional
        A as it was assembled so.
    leaves : tuple of int
        Lengths of the leaves of y, each in a unit of its own; empty where that is not known.
    like : array
        A vector of the kind that the operator is applied to, where the leaves are known.
    regular : bool
        Whether A is to be regular, so that no method may find one solution of many.
    """

    symmetric: bool | None = None
    positive_definite: bool | None = None
    trusted: bool = False
    damping: float = 0.0
    offset: float = 0.0
    sparsity: Any = field(default=None, repr=False, compare=False)
    entries: Any = field(default=None, repr=False, compare=False)
    leaves: tuple[int, ...] = ()
    like: Any = field(default=None, repr=False, compare=False)
    regular: bool = False

    def principal(self) -> Operator:
        """Return the part that damping is to make positive definite."""
        return self

    @property
    def rounding(self) -> float:
        """Relative error of A by rounding.

        It is not the worst that rounding may do, but what it usually does: a product may be exact (of a matrix, say),
        but for the rounding of its entries. It averages over as many of them as a row has; of a symmetric A, whose
        entries are rounded in pairs, over (n + 1) / 2. What cancels in I − ∂T is known to the rounding of 1.
        """
        apart = (self.n + 1) / 2 if self.symmetric else max(self.n, 1)
        part = max(ROUNDING / apart**0.5, ROUNDING_LEAST)
        return (0.5 if self.offset else part) * float(self.backend.xp.finfo(self.dtype).eps)

    @property
    def resolution(self) -> float:
        """Relative error of A itself: what is smaller, against ‖A‖, is not known to be different from zero."""
        return max(self.accuracy, self.rounding)

    @property
    def n(self) -> int:
        """Order of the operator."""
        return self.rows

    @property
    def assembled(self) -> bool:
        """Whether a matrix was assembled from products."""
        return "matrix" in self._cache and self.sparse is None and self.entries is None

    @property
    def probes(self) -> int:
        """Products that were spent to see how large A is between the leaves of y."""
        return self._cache.get("probes", 0)

    @property
    def at_hand(self) -> Array | None:
        """The matrix that was assembled from products, if one was."""
        return self._cache.get("matrix")

    def transpose(self) -> Operator:
        """Return Aᵀ: itself where A is symmetric."""
        if self.symmetric:
            return self
        xp = self.backend.xp
        matrix = self.matrix if self.matrix is not None else self._cache.get("matrix")
        derive = self.derive
        return replace(
            self,
            derive=None if derive is None else (lambda transposed: derive(not transposed)),
            forward=self.adjoint,
            adjoint=self.forward,
            matrix=None if matrix is None else xp.matrix_transpose(matrix),
            sparse=None if self.sparse is None else self.sparse.T,
            sparsity=None if self.sparsity is None else self.sparsity.transposed,
            entries=None if self.entries is None else self.entries.transposed(xp, self.device),
            label=self.label.removesuffix("ᵀ") if self.label.endswith("ᵀ") else self.label + "ᵀ",
            _cache={},
        )

    def settled(self) -> Operator:
        """Return one fixed A, where each product brings noise of its own: no method converges for a matrix that moves.

        It is assembled up to an order of `SMALL`; beyond, or where the products are good, A is as it is.
        """
        if self.accuracy <= NOISY_PRODUCTS or self.n > SMALL or self.matrix is not None or self.backend.traced:
            return self
        xp, matrix = self.backend.xp, self.dense()
        if self.symmetric:
            matrix = 0.5 * (matrix + xp.matrix_transpose(matrix))
        forward, adjoint = matrix_product(xp, matrix), matrix_product(xp, matrix, transposed=True)
        return replace(self, matrix=matrix, forward=forward, adjoint=forward if self.symmetric else adjoint)

    def damped(self, damping: Any) -> Any:
        """Return A + δI, δ a number, or an array of one for each item; A as it is where it is not square.

        What damping means there is the method's.
        """
        number = isinstance(damping, (int, float))
        if (number and not damping) or self.rows != self.columns:
            return self
        xp, matrix, sparse, entries = self.backend.xp, self.matrix, self.sparse, self.entries
        factor = self.weighted(damping if number else damping[..., None])

        def shift() -> Array:
            return factor + xp.zeros((self.n,), dtype=self.dtype, device=self.device)

        if matrix is not None:
            matrix = matrix + shift()[..., None] * xp.eye(self.n, dtype=self.dtype, device=self.device)
        if sparse is not None:
            import scipy.sparse

            sparse = (sparse + scipy.sparse.diags_array(shift())).tocsc()
        entries = None if entries is None else entries.shifted(xp, shift(), self.device)

        def wrap(product: Product) -> Product:
            return lambda x: product(x) + (x * damping if hasattr(x, "map") else factor * x)

        changes: dict[str, Any] = {"matrix": matrix, "sparse": sparse, "entries": entries}
        return self.rewrapped(wrap, **changes, **({"damping": self.damping + damping} if number else {}))

    def weighted(self, damping: Any) -> Any:
        """Return what damping adds to the diagonal: the same everywhere."""
        return damping


def matrix_map(
    kind: type[LinearMap], backend: Backend, matrix: Any, items: tuple[int, ...], dtype: Any, device: Any, **tags: Any
) -> Any:
    """Wrap a dense array, a SciPy sparse matrix or a SciPy LinearOperator as a linear map.

    Raises
    ------
    ShapeError
        Where it is not a matrix.
    """
    shape = tuple(matrix.shape)
    if len(shape) != len(items) + 2 or shape[:-2] != items:
        raise ShapeError(f"{tags.get('label', 'A')} has shape {shape}; expected a matrix (*{items}, rows, columns).")
    common = {"backend": backend, "rows": shape[-2], "columns": shape[-1], "items": items, "dtype": dtype,
              "device": device, **tags}  # fmt: skip
    if hasattr(matrix, "tocsc"):
        csr, csc = matrix.tocsr().astype(dtype), matrix.tocsc().astype(dtype)
        return kind(**common, sparse=csc, forward=lambda x: (csr @ x.T).T, adjoint=lambda x: (csc.T @ x.T).T)
    if hasattr(matrix, "matvec"):
        if not tags.get("symmetric") and not _has_transpose(matrix):
            return kind(**common, forward=_columns(matrix.matvec, matrix.matmat, dtype))
        return kind(**common, forward=_columns(matrix.matvec, matrix.matmat, dtype),
                    adjoint=_columns(matrix.rmatvec, matrix.rmatmat, dtype))  # fmt: skip
    forward = matrix_product(backend.xp, matrix)
    adjoint = forward if tags.get("trusted") else matrix_product(backend.xp, matrix, transposed=True)
    return kind(**common, matrix=matrix, forward=forward, adjoint=adjoint)


def checked_product(like: LinearMap, function: Callable[[Array], Any], name: str) -> Product:
    """A user's product on vectors (*items, n) as one on (*rhs, *items, n), with its results checked."""
    backend, shape = like.backend, (*like.items, like.columns)

    def one(x: Array) -> Array:
        y = function(backend.guard(x))
        if not backend.is_array(y) or tuple(y.shape) != shape:
            got = f"an array of shape {tuple(y.shape)}" if hasattr(y, "shape") else type(y).__name__
            raise CallbackError(f"{name} returned {got}.\nExpected an array of {backend.name}, shape {shape}.")
        return backend.astype(y, like.dtype)

    return backend.batched(one, like.items)


def _has_transpose(operator: Any) -> bool:
    try:
        operator.rmatvec(np.zeros(operator.shape[0], dtype=operator.dtype))
    except NotImplementedError:
        return False
    return True


def _columns(one: Product, many: Product, dtype: Any) -> Product:
    def product(x: Array) -> Array:
        y = one(x) if x.ndim == 1 else many(x.T).T
        return y.astype(dtype, copy=False)

    return product
