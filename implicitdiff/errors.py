"""Every error and warning of the library, each also the builtin that a user would catch.

::

    ImplicitDiffError
    ├── InputError (ValueError)              an argument is wrong
    │   ├── ShapeError                       ... in its shape or structure
    │   ├── NonFiniteError                   ... holds NaN or Inf
    │   ├── PatternError                     ... leaves out entries of A that are not zero
    │   └── UnknownNameError (KeyError)      ... names no solver, backend or mode
    ├── DTypeError (TypeError)               integer, complex or half-precision data
    ├── BackendError (TypeError)             no backend for the arrays, or mixed frameworks or devices
    ├── CallbackError (ValueError)           a user's function returned the wrong thing
    ├── DerivativeError (NotImplementedError) a derivative is missing and cannot be derived
    │   ├── InconsistentDerivativesError     a given derivative disagrees with the function that it is of
    │   └── NoiseError                       a derivative lies below the noise of the function
    └── SolveError (numpy.linalg.LinAlgError) the linear solve failed
        ├── InfeasibleError (ValueError)     y violates a constraint, or no y satisfies them
        ├── UnboundedError (ValueError)      the objective has no lower bound on the constraints
        ├── SingularError                    A is singular, or so to working precision
        │   └── QualificationError           the gradients of the active constraints are linearly dependent
        ├── NotPositiveDefiniteError         zero or negative curvature
        ├── NotSymmetricError                A was declared symmetric and is not
        ├── NotConvergedError                the residual is above the tolerance
        ├── NotInvariantError                the loss sees directions in which the solution is free
        ├── InaccurateError                  the estimated error of the derivative exceeds max_error
        ├── PreconditionerError              the preconditioner is none
        └── NonFiniteProductError (FloatingPointError)  a product holds NaN or Inf

    ImplicitDiffWarning (UserWarning)
    ├── AccuracyWarning                      the derivative is known to few digits
    ├── NotASolutionWarning                  F(y, theta) is not zero
    ├── RecompilationWarning                 JAX compiles at every call
    ├── RegularityWarning                    a weakly active constraint, a multiplier of the wrong sign
    │   └── DegeneracyWarning                one of several derivatives at a degenerate point
    └── SolveWarning                         a failed solve under on_failure="warn"
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "AccuracyWarning",
    "BackendError",
    "CallbackError",
    "DTypeError",
    "DegeneracyWarning",
    "DerivativeError",
    "ImplicitDiffError",
    "ImplicitDiffWarning",
    "InaccurateError",
    "InconsistentDerivativesError",
    "InfeasibleError",
    "InputError",
    "NoiseError",
    "NonFiniteError",
    "NonFiniteProductError",
    "NotASolutionWarning",
    "NotConvergedError",
    "NotInvariantError",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "PatternError",
    "PreconditionerError",
    "QualificationError",
    "RecompilationWarning",
    "RegularityWarning",
    "ShapeError",
    "SingularError",
    "SolveError",
    "SolveWarning",
    "UnboundedError",
    "UnknownNameError",
]


class ImplicitDiffError(Exception):
    """Base of every error that this library raises."""


class InputError(ImplicitDiffError, ValueError):
    """An argument is wrong; the message names it."""


class ShapeError(InputError):
    """An argument has the wrong shape, structure or length."""


class NonFiniteError(InputError):
    """An argument holds NaN or Inf."""


class PatternError(InputError):
    """The sparsity pattern leaves out entries of A that are not zero; the message names one."""


class UnknownNameError(InputError, KeyError):
    """A solver, a backend or a mode of that name is not known; the message lists the valid ones."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class DTypeError(ImplicitDiffError, TypeError):
    """The data type of an argument is not supported."""


class BackendError(ImplicitDiffError, TypeError):
    """The arrays belong to no known framework, or to several, or lie on several devices."""


class CallbackError(ImplicitDiffError, ValueError):
    """A user's function returned something of the wrong type, structure or shape."""


class DerivativeError(ImplicitDiffError, NotImplementedError):
    """A derivative is needed that is neither given nor can be derived."""


class InconsistentDerivativesError(DerivativeError):
    """A given product or matrix is not the derivative of the function it is given for; the message names it."""


class NoiseError(DerivativeError):
    """A derivative by differences lies below the noise of the function that is differenced."""


class SolveError(ImplicitDiffError, np.linalg.LinAlgError):
    """The linear solve failed.

    Attributes
    ----------
    value : pytree or None
        What would have been returned under ``on_failure="ignore"``; in a batch, the items that did
        not fail are right.
    report : Report or None
        How the solve ended.
    """

    value: Any = None
    report: Any = None


class SingularError(SolveError):
    """A is singular, or singular to working precision."""


class QualificationError(SingularError):
    """The gradients of the active constraints are linearly dependent (LICQ fails): the multipliers are not unique."""


class InfeasibleError(SolveError, ValueError):
    """The point violates a constraint: it is no solution, and has no derivative as one; or no point satisfies them."""


class UnboundedError(SolveError, ValueError):
    """The objective of a program has no lower bound on its constraints: there is no solution."""


class NotPositiveDefiniteError(SolveError):
    """A method for positive definite A met zero or negative curvature."""


class NotSymmetricError(SolveError):
    """A was declared symmetric and is not."""


class NotConvergedError(SolveError):
    """An iterative method stopped with a residual above its tolerance."""


class NotInvariantError(SolveError):
    """The loss sees the null space of A, which ``singular="gauge"`` says it does not; ``report.leak`` says how much."""


class InaccurateError(SolveError):
    """The estimated error of a derivative exceeds ``max_error``; ``report.error`` says by how much, and why."""


class PreconditionerError(SolveError):
    """The preconditioner holds NaN or Inf, is singular, or is not symmetric positive definite where it has to be."""


class NonFiniteProductError(SolveError, FloatingPointError):
    """A product with A or B holds NaN or Inf although y, theta and the vector are finite."""


class ImplicitDiffWarning(UserWarning):
    """Base of every warning of this library."""


class AccuracyWarning(ImplicitDiffWarning):
    """The derivative is known to few digits: noise or rounding in A, times its condition number, leaves no more."""


class NotASolutionWarning(ImplicitDiffWarning):
    """The point handed in is not a solution: F(y, theta) is not zero."""


class RecompilationWarning(ImplicitDiffWarning):
    """JAX compiles at every call: a function is made anew, or sees a value that changes or cannot be compared."""


class RegularityWarning(ImplicitDiffWarning):
    """The solution is less regular than its derivative assumes: a weakly active constraint, a wrong multiplier."""


class DegeneracyWarning(RegularityWarning):
    """Active constraints are dependent or weak: the derivative is one element of the generalised one."""


class SolveWarning(ImplicitDiffWarning):
    """A failed solve, told as a warning (``on_failure="warn"``)."""
