"""What a condition has to fulfil."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from implicitdiff.api import implicit_jacobian, implicit_jvp, implicit_vjp
from implicitdiff.errors import ImplicitDiffWarning, NotASolutionWarning
from implicitdiff.pytree import flatten, map_leaves
from implicitdiff.registry import backend_for, get_backend
from implicitdiff.testing.common import close, require, run
from implicitdiff.tools.derivative_check import check_derivatives
from implicitdiff.typing import Options

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["check_condition"]


def check_condition(
    condition: Any, y: Any, theta: Any, *, args: tuple[Any, ...] = (), backend: Any = None, rtol: float = 1e-5,
    seed: int = 0,
) -> None:  # fmt: skip
    """Check a condition at a solution: its products fit F and one another, and the derivative is that of the solution.

    Parameters
    ----------
    condition : Condition or callable
    y, theta : pytree
        A solution and its parameters.
    args : tuple
    backend : str or Backend, optional
    rtol : float
        How far two numbers may be apart, relative to the largest entry: single precision and differences need more.
    seed : int
        Of the directions.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> import numpy as np
    >>> from implicitdiff import Root
    >>> from implicitdiff.testing import check_condition
    >>> check_condition(Root(lambda y, t: y**3 - t), np.array([2.0]), np.array([8.0]))
    """
    engine = get_backend(backend) if backend is not None else backend_for({"y": y, "theta": theta})
    options: Options = {"args": args, "backend": engine}
    rng = np.random.default_rng(seed)

    v, t = (_direction(engine, tree, rng) for tree in (y, theta))

    def solved() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitDiffWarning)
            warnings.simplefilter("error", NotASolutionWarning)
            implicit_jvp(condition, y, theta, t, **options)

    def products() -> None:
        found = check_derivatives(condition, y, theta, args=args, backend=engine)
        require(found.ok, str(found))

    def adjoint() -> None:
        forward = _inner(v, implicit_jvp(condition, y, theta, t, **options))
        reverse = _inner(implicit_vjp(condition, y, theta, v, **options), t)
        size = max(abs(forward), abs(reverse))
        require(abs(forward - reverse) <= rtol * size, f"⟨v, dy t⟩ = {forward:.8g}, ⟨dyᵀ v, t⟩ = {reverse:.8g}")

    def jacobian() -> None:
        J = _matrix(implicit_jacobian(condition, y, theta, **options), y, theta)
        close(J @ _raveled(t), _raveled(implicit_jvp(condition, y, theta, t, **options)), rtol, "J t against the JVP")

    run(f"condition {type(condition).__name__}",
         {"y is a solution": solved, "given products": products, "forward and reverse": adjoint,
          "jacobian": jacobian})  # fmt: skip


def _direction(engine: Backend, tree: Any, rng: np.random.Generator) -> Any:
    """Random numbers like a tree, in the units of its leaves."""

    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return float(rng.normal())
        size = np.max(np.abs(np.asarray(leaf)), initial=0.0) or 1.0
        return engine.xp.asarray(size * rng.normal(size=leaf.shape), dtype=leaf.dtype, device=engine.device(leaf))

    return map_leaves(one, tree)


def _raveled(tree: Any) -> Any:
    leaves = [np.ravel(np.asarray(leaf, dtype=float)) for leaf in flatten(tree).leaves]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _inner(a: Any, b: Any) -> float:
    return float(_raveled(a) @ _raveled(b))


def _matrix(nested: Any, y: Any, theta: Any) -> Any:
    """Turn a nested Jacobian into a matrix (n, m)."""
    rows, columns = ([np.size(np.asarray(leaf)) for leaf in flatten(tree).leaves] for tree in (y, theta))
    blocks = iter(flatten(nested).leaves)
    return np.concatenate([
        np.concatenate([np.reshape(np.asarray(next(blocks), dtype=float), (r, c)) for c in columns], axis=1)
        for r in rows
    ])  # fmt: skip
