"""The linear solvers, one method a file, and the table of their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from implicitdiff.errors import InputError, UnknownNameError
from implicitdiff.solvers.auto import Auto
from implicitdiff.solvers.base import Solver
from implicitdiff.solvers.bicgstab import BiCGSTAB
from implicitdiff.solvers.cg import CG
from implicitdiff.solvers.chebyshev import Chebyshev
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.diagonal import Diagonal
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.ldlt import LDLT
from implicitdiff.solvers.lsmr import LSMR
from implicitdiff.solvers.lu import LU
from implicitdiff.solvers.minres import MINRES
from implicitdiff.solvers.minres_qlp import MINRESQLP
from implicitdiff.solvers.neumann import Neumann, OneStep, Phantom
from implicitdiff.solvers.nystrom import Nystrom
from implicitdiff.solvers.pinv import Pinv
from implicitdiff.solvers.truncated import Truncated

__all__ = [
    "CG",
    "GMRES",
    "LDLT",
    "LSMR",
    "LU",
    "MINRES",
    "MINRESQLP",
    "Auto",
    "BiCGSTAB",
    "Chebyshev",
    "Cholesky",
    "Diagonal",
    "Neumann",
    "Nystrom",
    "OneStep",
    "Phantom",
    "Pinv",
    "Solver",
    "Truncated",
    "get_solver",
    "register_solver",
    "solver_names",
    "suitable",
]

_METHODS = (
    Auto, LU, LDLT, Cholesky, CG, MINRES, GMRES, BiCGSTAB, LSMR, MINRESQLP, Pinv,
    Truncated, Chebyshev, Neumann, OneStep, Phantom, Diagonal, Nystrom,
)  # fmt: skip
_FACTORIES: dict[str, Callable[[], Any]] = {solver.name: functools.cache(solver) for solver in _METHODS}


def solver_names() -> list[str]:
    """List the names that ``solver=`` accepts.

    Returns
    -------
    list of str
        The built-in ones first, then those registered since.
    """
    return list(_FACTORIES)


@functools.cache
def suitable(structure: str = "general", *, direct: bool | None = None) -> tuple[str, ...]:
    """List the registered methods that are exact for a square A of that structure, `Auto` not among them.

    Parameters
    ----------
    structure : {"general", "symmetric", "positive definite"}
        What is known of A.
    direct : bool, optional
        Whether to list the ones that factor a matrix, or the ones that do not; both by default.

    Returns
    -------
    tuple of str
    """
    order = ("general", "symmetric", "positive definite")

    def fits(name: str) -> bool:
        solver = get_solver(name)
        needs = getattr(solver, "structure", "general")
        exact = not getattr(solver, "approximate", False) and order.index(needs) <= order.index(structure)
        return exact and direct in (None, getattr(solver, "direct", False)) and not isinstance(solver, Auto)

    return tuple(name for name in _FACTORIES if fits(name))


def register_solver(name: str, factory: Callable[[], Any]) -> None:
    """Make a solver available by name.

    Parameters
    ----------
    name : str
        What ``solver=`` will accept. A name already taken is an error, so that nothing changes silently.
    factory : callable
        Called without arguments, returns a `Solver` (an object with ``init``, ``solve``, ``transpose``).

    Raises
    ------
    InputError
        Where the name is taken or the factory is not callable.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"name = {name!r}: expected a non-empty string.")
    if name in _FACTORIES:
        raise InputError(f"name = {name!r} is taken; registered solvers: {', '.join(_FACTORIES)}.")
    if not callable(factory):
        raise InputError(f"factory for {name!r} is not callable: {type(factory).__name__}.")
    _FACTORIES[name] = factory
    suitable.cache_clear()


def get_solver(solver: Any) -> Any:
    """Return the solver of that name, or the instance itself."""
    if isinstance(solver, str):
        if solver not in _FACTORIES:
            raise UnknownNameError(
                f"solver = {solver!r} is not known; expected one of {', '.join(_FACTORIES)}, or an instance."
            )
        solver = _FACTORIES[solver]()
    elif isinstance(solver, type):
        raise InputError(f"solver is the class {solver.__name__}; pass an instance, {solver.__name__}().")
    if isinstance(solver, Solver):
        return solver
    missing = [m for m in ("init", "solve", "transpose") if not callable(getattr(solver, m, None))]
    if missing:
        raise InputError(f"solver of type {type(solver).__name__} has no method {', '.join(missing)}.")
    return solver
