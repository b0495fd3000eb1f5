"""Conformance: what a solver, a condition or a backend has to fulfil, to be run on one's own.

Each function raises an `AssertionError` that lists what does not hold; none needs pytest. Our own tests call them on
everything that is built in.
"""

from __future__ import annotations

from implicitdiff.testing.backend import check_backend
from implicitdiff.testing.condition import check_condition
from implicitdiff.testing.solver import check_solver

__all__ = ["check_backend", "check_condition", "check_solver"]
