"""Derivatives of a solution, in one call.

Whoever solved F(y, θ) = 0 for y, in whatever framework, with whatever solver: `implicit_grad`, `implicit_vjp`,
`implicit_jvp` and `implicit_jacobian` give its derivative with respect to θ by one linear solve, `linearize` keeps the
factorisation, `implicit_function` wraps the solver, and a `Report` tells how far to trust the result.
"""

from implicitdiff import projections, proxes
from implicitdiff.api import implicit_grad, implicit_jacobian, implicit_jvp, implicit_vjp, linearize
from implicitdiff.conditions import (
    KKT,
    QP,
    Condition,
    FixedPoint,
    LeastSquares,
    LogBarrier,
    ProjectedGradient,
    ProximalGradient,
    Root,
    Stationary,
)
from implicitdiff.conditions.multipliers import multipliers_from_scipy, split_multipliers
from implicitdiff.decorator import implicit_function
from implicitdiff.error_estimate import ErrorEstimate
from implicitdiff.errors import (
    AccuracyWarning,
    BackendError,
    CallbackError,
    DerivativeError,
    DTypeError,
    ImplicitDiffError,
    ImplicitDiffWarning,
    InaccurateError,
    InconsistentDerivativesError,
    InfeasibleError,
    InputError,
    NoiseError,
    NonFiniteError,
    NonFiniteProductError,
    NotASolutionWarning,
    NotConvergedError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    PatternError,
    PreconditionerError,
    QualificationError,
    RecompilationWarning,
    RegularityWarning,
    ShapeError,
    SingularError,
    SolveError,
    SolveWarning,
    UnboundedError,
    UnknownNameError,
)
from implicitdiff.linalg.system import linear_solve
from implicitdiff.linearization import Linearization
from implicitdiff.outcome import Counts, Report, Status
from implicitdiff.outer.driver import Bilevel, BilevelResult, bilevel
from implicitdiff.outer.schedules import Fixed, Geometric, Summable, Sweep
from implicitdiff.outer.state import BilevelState
from implicitdiff.quadratic import solve_qp
from implicitdiff.registry import register_backend
from implicitdiff.solvers import (
    CG,
    GMRES,
    LDLT,
    LU,
    MINRES,
    Auto,
    BiCGSTAB,
    Cholesky,
    Solver,
    register_solver,
    solver_names,
)
from implicitdiff.tools.comparison import Comparison, SolverRow, compare_solvers
from implicitdiff.tools.derivative_check import CheckRow, DerivativeCheck, check_derivatives
from implicitdiff.tools.regularity import Regularity, check_regularity

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "LDLT",
    "LU",
    "MINRES",
    "QP",
    "AccuracyWarning",
    "Auto",
    "BackendError",
    "BiCGSTAB",
    "Bilevel",
    "BilevelResult",
    "BilevelState",
    "CallbackError",
    "CheckRow",
    "Cholesky",
    "Comparison",
    "Condition",
    "Counts",
    "DTypeError",
    "DerivativeCheck",
    "DerivativeError",
    "ErrorEstimate",
    "Fixed",
    "FixedPoint",
    "Geometric",
    "ImplicitDiffError",
    "ImplicitDiffWarning",
    "InaccurateError",
    "InconsistentDerivativesError",
    "InfeasibleError",
    "InputError",
    "LeastSquares",
    "Linearization",
    "LogBarrier",
    "NoiseError",
    "NonFiniteError",
    "NonFiniteProductError",
    "NotASolutionWarning",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "PatternError",
    "PreconditionerError",
    "ProjectedGradient",
    "ProximalGradient",
    "QualificationError",
    "RecompilationWarning",
    "Regularity",
    "RegularityWarning",
    "Report",
    "Root",
    "ShapeError",
    "SingularError",
    "SolveError",
    "SolveWarning",
    "Solver",
    "SolverRow",
    "Stationary",
    "Status",
    "Summable",
    "Sweep",
    "UnboundedError",
    "UnknownNameError",
    "bilevel",
    "check_derivatives",
    "check_regularity",
    "compare_solvers",
    "implicit_function",
    "implicit_grad",
    "implicit_jacobian",
    "implicit_jvp",
    "implicit_vjp",
    "linear_solve",
    "linearize",
    "multipliers_from_scipy",
    "projections",
    "proxes",
    "register_backend",
    "register_solver",
    "solve_qp",
    "solver_names",
    "split_multipliers",
]
