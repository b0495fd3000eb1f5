"""Conditions F(y, θ) = 0 that a solution satisfies, made of plain functions."""

from typing import Any

from implicitdiff.conditions.base import Condition
from implicitdiff.conditions.fixed_point import FixedPoint
from implicitdiff.conditions.kkt import KKT
from implicitdiff.conditions.least_squares import LeastSquares
from implicitdiff.conditions.log_barrier import LogBarrier
from implicitdiff.conditions.proximal import ProjectedGradient, ProximalGradient
from implicitdiff.conditions.qp import QP
from implicitdiff.conditions.root import Root
from implicitdiff.conditions.stationary import Stationary
from implicitdiff.errors import InputError

__all__ = [
    "KKT",
    "QP",
    "Condition",
    "FixedPoint",
    "LeastSquares",
    "LogBarrier",
    "ProjectedGradient",
    "ProximalGradient",
    "Root",
    "Stationary",
    "as_condition",
]


def as_condition(condition: Any) -> Condition:
    """Return the condition itself; a bare callable is the objective of `Stationary`."""
    if isinstance(condition, Condition):
        return condition
    if callable(condition) and not isinstance(condition, type):
        return Stationary(condition)
    raise InputError(
        f"condition is {condition!r}; expected one of {', '.join(__all__[:-1])}, or the objective f itself."
    )
