"""Derivatives of a solution, in one call.

Whoever solved F(y, θ) = 0 for y, in whatever framework, with whatever solver: `implicit_grad`, `implicit_vjp`,
`implicit_jvp` and `implicit_jacobian` give its derivative with respect to θ by one linear solve, `linearize` keeps the
factorisation, `implicit_function` wraps the solver, and a `Report` tells how far to trust the result.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from implicitdiff import projections, proxes
    from implicitdiff.api import (
        implicit_grad,
        implicit_jacobian,
        implicit_jvp,
        implicit_vjp,
        linearize,
        sequence_state,
    )
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
        DegeneracyWarning,
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
        NotInvariantError,
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
    from implicitdiff.outer.single_loop import SABA, SOBA
    from implicitdiff.outer.state import BilevelState
    from implicitdiff.quadratic import solve_qp
    from implicitdiff.registry import register_backend
    from implicitdiff.solvers import (
        CG,
        GMRES,
        LDLT,
        LSMR,
        LU,
        MINRES,
        MINRESQLP,
        Auto,
        BiCGSTAB,
        Chebyshev,
        Cholesky,
        Diagonal,
        Neumann,
        Nystrom,
        OneStep,
        Phantom,
        Pinv,
        Solver,
        Truncated,
        register_solver,
        solver_names,
    )
    from implicitdiff.solvers.sequences import SequenceState
    from implicitdiff.tools.comparison import Comparison, SolverRow, compare_solvers
    from implicitdiff.tools.derivative_check import CheckRow, DerivativeCheck, check_derivatives
    from implicitdiff.tools.regularity import Regularity, check_regularity

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "LDLT",
    "LSMR",
    "LU",
    "MINRES",
    "MINRESQLP",
    "QP",
    "SABA",
    "SOBA",
    "AccuracyWarning",
    "Auto",
    "BackendError",
    "BiCGSTAB",
    "Bilevel",
    "BilevelResult",
    "BilevelState",
    "CallbackError",
    "Chebyshev",
    "CheckRow",
    "Cholesky",
    "Comparison",
    "Condition",
    "Counts",
    "DTypeError",
    "DegeneracyWarning",
    "DerivativeCheck",
    "DerivativeError",
    "Diagonal",
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
    "Neumann",
    "NoiseError",
    "NonFiniteError",
    "NonFiniteProductError",
    "NotASolutionWarning",
    "NotConvergedError",
    "NotInvariantError",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "Nystrom",
    "OneStep",
    "PatternError",
    "Phantom",
    "Pinv",
    "PreconditionerError",
    "ProjectedGradient",
    "ProximalGradient",
    "QualificationError",
    "RecompilationWarning",
    "Regularity",
    "RegularityWarning",
    "Report",
    "Root",
    "SequenceState",
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
    "Truncated",
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
    "sequence_state",
    "solve_qp",
    "solver_names",
    "split_multipliers",
]

_MODULES = (
    "errors", "error_estimate", "outcome", "registry", "solvers", "solvers.sequences", "conditions", "linalg.system",
    "linearization", "decorator", "api", "conditions.multipliers", "quadratic", "outer.schedules", "outer.single_loop",
    "outer.state", "outer.driver", "tools.comparison", "tools.derivative_check", "tools.regularity",
)  # fmt: skip
"""Where the public names are, from the leaves up: one is looked for when it is first used, and loads what is below."""


if not TYPE_CHECKING:  # a type checker would take every name for known

    def __getattr__(name: str) -> Any:
        for module in _MODULES if name in __all__ else ():
            found = importlib.import_module(f"{__name__}.{module}")
            if name in found.__all__:
                globals()[name] = value = getattr(found, name)
                return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
