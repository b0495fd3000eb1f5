"""A zoo of problems with known derivatives, and what is measured on solutions of them that are not exact."""

from functools import cache

from zoo.constrained import CONSTRAINED
from zoo.equations import EQUATIONS
from zoo.minima import MINIMA
from zoo.problem import Problem

__all__ = ["NAMES", "Problem", "problem"]

_MAKERS = {maker.__name__.replace("_", " "): maker for maker in (*MINIMA, *EQUATIONS, *CONSTRAINED)}
NAMES = tuple(_MAKERS)


@cache
def problem(name: str) -> Problem:
    """Return a problem of the zoo."""
    return _MAKERS[name]()
