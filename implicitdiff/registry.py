"""Which backend serves which arrays: found by the module of the array's type, imported only then."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from implicitdiff.errors import BackendError, UnknownNameError
from implicitdiff.pytree import flatten, hint

__all__ = ["BACKENDS", "backend_for", "get_backend", "portable"]

BACKENDS: dict[str, str] = {
    "numpy": "implicitdiff.backends.numpy:NumpyBackend",
    "jax": "implicitdiff.backends.jax:JaxBackend",
    "torch": "implicitdiff.backends.torch:TorchBackend",
    "cupy": "implicitdiff.backends.cupy:CupyBackend",
    "array_api": "implicitdiff.backends.array_api:ArrayAPIBackend",
}
"""Name to ``module:class``. A backend is loaded when its arrays, or its name, are first met."""

_ROOTS = {"numpy": "numpy", "jax": "jax", "jaxlib": "jax", "torch": "torch", "cupy": "cupy"}
"""Top-level module of an array type to the name of its backend."""

_cache: dict[str, Any] = {}


def get_backend(backend: Any) -> Any:
    """Return the backend of that name, or the instance itself.

    Raises
    ------
    UnknownNameError
        Where the name is not known.
    """
    if not isinstance(backend, str):
        return backend
    if backend == "array_api":
        raise UnknownNameError("backend = 'array_api' needs its namespace: ArrayAPIBackend(xp), or leave backend=None.")
    if backend not in BACKENDS:
        raise UnknownNameError(f"backend = {backend!r} is not known; expected one of {', '.join(BACKENDS)}.")
    if backend not in _cache:
        _cache[backend] = _load(backend)()
    return _cache[backend]


def portable(engine: Any) -> Any:
    """What stands for a backend in a pickle or a copy: its name, None where the arrays tell it, else itself."""
    cached = next((key for key, known in _cache.items() if known is engine), None)
    return engine if cached is None else cached if cached in BACKENDS else None


def _load(name: str) -> Any:
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def backend_for(trees: Mapping[str, Any], beside: Any = ()) -> Any:
    """Backend of the arrays in the trees, given by the names that the user knows them under.

    JAX takes NumPy's arrays for its own, so where both are met the backend is JAX's.

    Parameters
    ----------
    trees : mapping of str to pytree
        What decides: y, theta.
    beside : pytree
        Data, or a vector, that may belong to JAX where all of the trees are NumPy's or plain numbers.

    Raises
    ------
    BackendError
        Where no backend knows an array, or the trees mix frameworks.
    """
    found: dict[str, tuple[Callable[[], str], Any]] = {}
    for name, tree in trees.items():
        flat = flatten(tree)
        for i, leaf in enumerate(flat.leaves):
            key = _framework(leaf, name)
            if key is not None and key not in found:
                found[key] = (functools.partial(flat.path, i, name), leaf)
    if "jax" in found or (found.keys() <= {"numpy"} and _holds_jax(beside)):
        found.pop("numpy", None)
        found = found or {"jax": (str, None)}
    if len(found) > 1:
        (a, (where_a, _)), (b, (where_b, _)) = list(found.items())[:2]
        raise BackendError(
            f"{where_a()} is a {a} array, {where_b()} a {b} array.\n"
            "Convert one of them: nothing is copied between frameworks."
        )
    if not found:
        return get_backend("numpy")  # Python floats only
    key, (_, leaf) = next(iter(found.items()))
    if key in _ROOTS:
        return get_backend(_ROOTS[key])
    return _generic(leaf)


def _framework(leaf: Any, name: str) -> str | None:
    """Name of the framework of an array; None for a number or a leaf that is no array at all."""
    root = type(leaf).__module__.partition(".")[0]
    if root in _ROOTS or hasattr(leaf, "__array_namespace__"):
        return _ROOTS.get(root, root)  # arrays of JAX come from jaxlib, what it traces from jax
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
        raise BackendError(f"no backend for arrays of type {kind}.{hint(leaf, name)}")
    return None


def _holds_jax(tree: Any) -> bool:
    """Whether a tree holds an array of JAX; whatever else there is in it is none of our business."""
    if "jax" not in sys.modules:
        return False
    return any(_ROOTS.get(type(leaf).__module__.partition(".")[0]) == "jax" for leaf in flatten(tree).leaves)


def _generic(leaf: Any) -> Any:
    import array_api_compat

    xp = array_api_compat.array_namespace(leaf)
    key = f"array_api:{xp.__name__}"
    if key not in _cache:
        _cache[key] = _load("array_api")(xp)
    return _cache[key]
