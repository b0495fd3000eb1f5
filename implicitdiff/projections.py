"""Euclidean projections onto convex sets, P(x) = argmin over y in C of ‖y − x‖², on the arrays of any framework.

The vector is the last axis; leading axes are independent vectors. Each function can be compiled, vectorised and
differentiated by the framework, in x and in the numbers that describe the set. At points where P has a kink (x on the
boundary of C, or a coordinate on the edge of the support) autodiff gives one of the one-sided derivatives.

For `ProjectedGradient` a set that depends on the parameters is written as
``lambda x, theta: box(x, theta["lower"], theta["upper"])``.

References
----------
N. Parikh, S. Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1 (2014) 127-239, chapter 6.
DOI 10.1561/2400000003
"""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitdiff.arrays import Array, divisor
from implicitdiff.namespaces import check_not_negative, constant, expanded, filled, namespace, norm, plain

__all__ = ["affine", "ball", "box", "l1_ball", "simplex"]


def box(x: Array, lower: Any = None, upper: Any = None) -> Array:
    """Project onto the box {y: lower <= y <= upper}.

    Parameters
    ----------
    x : array, shape (..., n)
    lower, upper : float or array, shape (n,) or (..., n), optional
        None leaves that side open.

    Returns
    -------
    array, shape (..., n)

    Examples
    --------
    >>> import numpy as np
    >>> print(box(np.array([-1.0, 0.4, 3.0]), 0.0, 1.0))
    [0.  0.4 1. ]
    """
    xp, y = namespace(x, lower, upper), x
    if upper is not None:
        bound = filled(xp, x, upper)
        y = xp.where(x > bound, bound, y)
    if lower is not None:
        bound = filled(xp, x, lower)
        y = xp.where(x < bound, bound, y)
    return y


def ball(x: Array, *, radius: Any = 1.0, center: Any = None) -> Array:
    """Project onto the Euclidean ball {y: ‖y − center‖ <= radius}.

    Parameters
    ----------
    x : array, shape (..., n)
    radius : float or array, shape (...)
        One for each vector, or one for all; not negative.
    center : array, shape (n,) or (..., n), optional
        0 by default.

    Returns
    -------
    array, shape (..., n)

    Raises
    ------
    InputError
        For a negative number as the radius.

    Examples
    --------
    >>> import numpy as np
    >>> print(ball(np.array([3.0, 4.0])))
    [0.6 0.8]
    """
    check_not_negative(radius=radius)
    xp, radius = namespace(x, radius, center), expanded(radius)
    d = x if center is None else x - center
    length = norm(xp, d)
    outside = length > radius
    factor = xp.where(outside, radius / xp.where(outside, length, xp.ones_like(length)), xp.ones_like(length))
    y = factor * d
    # an inner point comes out as it was, to the last bit
    return xp.where(outside, y if center is None else center + y, x)


def simplex(x: Array, *, total: Any = 1.0) -> Array:
    """Project onto the simplex {y: y >= 0, Σ y = total}.

    Parameters
    ----------
    x : array, shape (..., n)
    total : float or array, shape (...)
        One for each vector, or one for all; positive.

    Returns
    -------
    array, shape (..., n)
        max(x − τ, 0) for the τ with which the sum is right.

    Raises
    ------
    InputError
        For a negative number as the total.

    References
    ----------
    J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in high
    dimensions", ICML 2008. DOI 10.1145/1390156.1390191

    Examples
    --------
    >>> import numpy as np
    >>> print(simplex(np.array([0.5, 0.9, -1.0])))
    [0.3 0.7 0. ]
    """
    check_not_negative(total=total)
    xp, total = namespace(x, total), expanded(total)
    x = x - xp.max(x, axis=-1, keepdims=True)  # the projection does not change, and a large offset does no harm
    # With u sorted downwards, the threshold is the largest of τ_k = (u_1 + … + u_k − total) / k: τ_k grows as long as
    # u_k lies above it, and only so long.
    v = plain(x)
    u, count = -xp.sort(-v, axis=-1), constant(xp, v, np.arange(1.0, v.shape[-1] + 1))
    cumulated = (xp.cumsum if hasattr(xp, "cumsum") else xp.cumulative_sum)(u, axis=-1)
    threshold = xp.max((cumulated - plain(total)) / count, axis=-1, keepdims=True)
    # Once more from the support alone, which keeps the order of the coordinates out of the derivative.
    support = x > threshold
    size = xp.sum(xp.where(support, xp.ones_like(x), xp.zeros_like(x)), axis=-1, keepdims=True)
    size = divisor(xp, size)
    threshold = (xp.sum(xp.where(support, x, xp.zeros_like(x)), axis=-1, keepdims=True) - total) / size
    y = x - threshold
    return xp.where(support & (y > 0), y, xp.zeros_like(x))


def l1_ball(x: Array, *, radius: Any = 1.0) -> Array:
    """Project onto the ℓ1 ball {y: ‖y‖₁ <= radius}.

    Parameters
    ----------
    x : array, shape (..., n)
    radius : float or array, shape (...)
        One for each vector, or one for all; positive.

    Returns
    -------
    array, shape (..., n)
        x itself where it lies in the ball.

    Raises
    ------
    InputError
        For a negative number as the radius.

    References
    ----------
    J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in high
    dimensions", ICML 2008. DOI 10.1145/1390156.1390191

    Examples
    --------
    >>> import numpy as np
    >>> print(l1_ball(np.array([-2.0, 1.5, 0.1])))
    [-0.75  0.25  0.  ]
    """
    check_not_negative(radius=radius)
    xp = namespace(x, radius)
    size = xp.abs(x)
    inside = xp.sum(size, axis=-1, keepdims=True) <= expanded(radius)
    shrunk = simplex(size, total=radius)
    return xp.where(inside, x, xp.where(x < 0, -shrunk, shrunk))


def affine(x: Array, A: Array, b: Array) -> Array:
    """Project onto the affine set {y: A y = b}.

    Parameters
    ----------
    x : array, shape (..., n)
    A : array, shape (k, n)
        Of full rank k <= n; a dependent row makes the library's own error for a singular matrix, or NaN.
    b : array, shape (k,) or (..., k)

    Returns
    -------
    array, shape (..., n)
        x − Aᵀ (A Aᵀ)⁻¹ (A x − b).

    Examples
    --------
    >>> import numpy as np
    >>> print(affine(np.array([1.0, 2.0]), np.array([[1.0, 1.0]]), np.array([1.0])))
    [0. 1.]
    """
    xp = namespace(x, A, b)
    At = xp.swapaxes(A, -1, -2) if not hasattr(xp, "matrix_transpose") else xp.matrix_transpose(A)
    for _ in range(2):  # the second time makes up for the rounding that A Aᵀ, of the squared condition, lets in
        gap = (A @ x[..., None])[..., 0] - b
        x = x - (At @ xp.linalg.solve(A @ At, gap[..., None]))[..., 0]
    return x
