"""Proximal operators, prox(x) = argmin over y of step · r(y) + ½ ‖y − x‖², on the arrays of any framework.

The vector is the last axis; leading axes are independent vectors. A penalty is a number or an array, and may be a
parameter: each function can be compiled, vectorised and differentiated by the framework in x and in the penalty. At
points where the operator has a kink (abs(x) = step · penalty) autodiff gives one of the one-sided derivatives.

For `ProximalGradient` write ``lambda x, theta, step: lasso(x, theta["penalty"], step)``; where theta
is the penalty, ``lasso`` itself will do.

References
----------
N. Parikh, S. Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1 (2014) 127-239, chapter 6.
DOI 10.1561/2400000003
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from implicitdiff.arrays import Array
from implicitdiff.errors import InputError
from implicitdiff.namespaces import check_not_negative, constant, expanded, namespace, norm

__all__ = ["elastic_net", "group_lasso", "lasso", "ridge"]


def lasso(x: Array, penalty: Any, step: float = 1.0) -> Array:
    """Proximal operator of the lasso penalty penalty · ‖y‖₁: soft thresholding.

    Parameters
    ----------
    x : array, shape (..., n)
    penalty : float or array, shape (n,) or (..., n)
        Not negative.
    step : float
        Factor of the penalty.

    Returns
    -------
    array, shape (..., n)
        Exactly 0 where abs(x) <= step · penalty.

    Raises
    ------
    InputError
        For a negative number as the penalty.

    References
    ----------
    R. Tibshirani, "Regression shrinkage and selection via the lasso", J. R. Stat. Soc. B 58 (1996) 267-288.
    DOI 10.1111/j.2517-6161.1996.tb02080.x

    Examples
    --------
    >>> import numpy as np
    >>> print(lasso(np.array([3.0, -0.5, -2.0]), 1.0))
    [ 2.  0. -1.]
    """
    check_not_negative(penalty=penalty)
    xp, level = namespace(x, penalty), step * penalty
    return xp.where(x > level, x - level, xp.where(x < -level, x + level, xp.zeros_like(x)))


def ridge(x: Array, penalty: Any, step: float = 1.0) -> Array:
    """Proximal operator of the ridge penalty ½ penalty · ‖y‖².

    Parameters
    ----------
    x : array, shape (..., n)
    penalty : float or array, shape (n,) or (..., n)
        Not negative.
    step : float
        Factor of the penalty.

    Returns
    -------
    array, shape (..., n)
        x / (1 + step · penalty).

    Raises
    ------
    InputError
        For a negative number as the penalty.

    References
    ----------
    A. E. Hoerl, R. W. Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 12
    (1970) 55-67. DOI 10.1080/00401706.1970.10488634

    Examples
    --------
    >>> import numpy as np
    >>> print(ridge(np.array([3.0, -1.5]), 2.0))
    [ 1.  -0.5]
    """
    check_not_negative(penalty=penalty)
    return x / (1 + step * penalty)


def elastic_net(x: Array, l1: Any, l2: Any, step: float = 1.0) -> Array:
    """Proximal operator of the elastic net l1 · ‖y‖₁ + ½ l2 · ‖y‖²: soft thresholding, then shrinking.

    Parameters
    ----------
    x : array, shape (..., n)
    l1, l2 : float or array, shape (n,) or (..., n)
        Not negative.
    step : float
        Factor of the penalty.

    Returns
    -------
    array, shape (..., n)
        Exactly 0 where abs(x) <= step · l1.

    Raises
    ------
    InputError
        For a negative number as a penalty.

    References
    ----------
    H. Zou, T. Hastie, "Regularization and variable selection via the elastic net", J. R. Stat. Soc. B 67 (2005)
    301-320. DOI 10.1111/j.1467-9868.2005.00503.x

    Examples
    --------
    >>> import numpy as np
    >>> print(elastic_net(np.array([3.0, -0.5]), 1.0, 1.0))
    [1. 0.]
    """
    check_not_negative(l2=l2)
    return lasso(x, l1, step) / (1 + step * l2)


def group_lasso(x: Array, penalty: Any, step: float = 1.0, *, groups: Sequence[int] | None = None) -> Array:
    """Proximal operator of the group lasso Σ_g penalty_g ‖y_g‖: a group shrinks towards 0, and may vanish as one.

    Parameters
    ----------
    x : array, shape (..., n)
    penalty : float or array
        Not negative; one for all groups, or one for each: of shape (...) without ``groups``, else (number of groups,).
    step : float
        Factor of the penalty.
    groups : sequence of int, shape (n,), optional
        Number of the group of each coordinate, from 0. Without it the last axis is one group: of a matrix, each row.

    Returns
    -------
    array, shape (..., n)
        x_g max(1 − step · penalty_g / ‖x_g‖, 0); exactly 0 in the groups that vanish.

    Raises
    ------
    InputError
        For a negative number as the penalty, or groups that do not number the n coordinates.

    References
    ----------
    M. Yuan, Y. Lin, "Model selection and estimation in regression with grouped variables", J. R. Stat. Soc. B 68
    (2006) 49-67. DOI 10.1111/j.1467-9868.2005.00532.x

    Examples
    --------
    >>> import numpy as np
    >>> print(group_lasso(np.array([3.0, 4.0, 0.5]), 1.0, groups=[0, 0, 1]))
    [2.4 3.2 0. ]
    """
    check_not_negative(penalty=penalty)
    xp = namespace(x, penalty)
    members = None if groups is None else constant(xp, x, _membership(groups, x.shape[-1]))
    level = step * (expanded(penalty) if members is None else penalty)
    length = norm(xp, x, members)
    alive = length > level
    factor = 1 - level / xp.where(alive, length, xp.ones_like(length))
    factor = xp.where(alive, factor, xp.zeros_like(length))
    return x * (factor if members is None else factor @ members.T)


def _membership(groups: Sequence[int], n: int) -> np.ndarray:
    """1 where a coordinate belongs to a group, shape (n, groups)."""
    labels = np.asarray(groups)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or (n and labels.min() < 0):
        raise InputError(f"groups is {groups!r}; expected {n} integers >= 0, the group of each coordinate.")
    return (labels[:, None] == np.arange(labels.max(initial=-1) + 1)).astype(float)
