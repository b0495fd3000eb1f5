"""Matrices as users return them: dense, sparse, or a LinearOperator."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from implicitdiff.conditions.point import Point
from implicitdiff.errors import BackendError, CallbackError
from implicitdiff.linalg.operator import LinearMap, Operator, matrix_map

__all__ = ["given_matrix", "matrix_operator"]


def matrix_operator(p: Point, name: str, matrix: Any, symmetric: bool) -> Operator:
    """Return a matrix of the user's, ∂G/∂y at a point, as an operator.

    Parameters
    ----------
    p : Point
    name : str
        Of the function that returned it.
    matrix : array, SciPy sparse matrix or LinearOperator
    symmetric : bool
        Whether it is said to be symmetric.
    """
    op: Operator = given_matrix(p, name, matrix, p.y.n, Operator, label="A", symmetric=True if symmetric else None)
    return replace(op, adjoint=op.forward) if symmetric else op


def given_matrix(p: Point, name: str, matrix: Any, rows: int, kind: type[LinearMap], **tags: Any) -> Any:
    """Wrap the matrix with ``rows`` rows, and a column for each entry of y, that a callable returned.

    Raises
    ------
    CallbackError, BackendError
        Where it is none.
    """
    n, items = p.y.n, p.items
    sparse, linear = hasattr(matrix, "tocsc"), hasattr(matrix, "matvec")
    if (sparse or linear) and p.backend.name != "numpy":
        raise BackendError(f"{name} returned a SciPy matrix, and y is an array of {p.backend.name}.")
    if not sparse and not linear:
        array = p.backend.as_array(matrix, p.y.device, p.y.dtype)
        if array is None or math.prod(array.shape) != rows * n * math.prod(items):
            got = type(matrix).__name__ if array is None else f"an array of shape {tuple(array.shape)}"
            raise CallbackError(f"{name} returned {got}.\nExpected a matrix of shape {(*items, rows, n)}.")
        p.y.check_placed(array, name, p.y.dtype)
        matrix = p.backend.astype(p.backend.reshape(array, (*items, rows, n)), p.y.dtype)
    elif tuple(matrix.shape) != (rows, n) or items:
        raise CallbackError(
            f"{name} returned {type(matrix).__name__} of shape {tuple(matrix.shape)}.\n"
            f"Expected shape {(*items, rows, n)}."
        )
    return matrix_map(kind, p.backend, matrix, items, p.y.dtype, p.y.device, **tags)
