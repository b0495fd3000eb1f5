"""Which backend serves which arrays: found by the module of the array's type, imported only then."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from implicitdiff.errors import BackendError, InputError, UnknownNameError
from implicitdiff.pytree import flatten, hint

if TYPE_CHECKING:
    from implicitdiff.backends.base import Backend

__all__ = ["BACKENDS", "backend_for", "get_backend", "portable", "register_backend"]

BACKENDS: dict[str, str | Callable[[], Backend]] = {}
"""Name to ``module:class`` or a factory. A backend is loaded when its arrays, or its name, are first met."""

_ROOTS: dict[str, str] = {}
"""Top-level module of an array type to the name of its backend."""

_TAKES: dict[str, tuple[str, ...]] = {}
"""Name of a backend to those whose arrays it takes for its own."""

_cache: dict[str, Backend] = {}


def register_backend(
    name: str, module: str | Callable[[], Backend], roots: Sequence[str] | None = None, takes: Sequence[str] = ()
) -> None:
    """Make a backend known by name, and by the arrays that it serves.

    Parameters
    ----------
    name : str
        What ``backend=`` will accept.
    module : str or callable
        ``"module:class"``, imported when the backend is first needed, or a callable without arguments that returns an
        instance. The class is a subclass of ``implicitdiff.backends.base.Backend``.
    roots : sequence of str, optional
        Top-level modules of the types of its arrays: an array whose type comes from one of them is served by this
        backend. Default: ``name``.
    takes : sequence of str, optional
        Backends whose arrays this one takes for its own, where both are met in one call.

    Raises
    ------
    InputError
        Where the name or a root is taken, or ``module`` is neither of the two.

    See Also
    --------
    implicitdiff.testing.check_backend : what a backend has to fulfil.

    Examples
    --------
    >>> from implicitdiff import register_backend
    >>> register_backend("mine", "my_package.adapter:MyBackend", roots=("my_arrays",))  # doctest: +SKIP
    """
    roots = (name,) if roots is None else roots
    if not isinstance(name, str) or not name:
        raise InputError(f"name = {name!r}: expected a non-empty string.")
    if name in BACKENDS:
        raise InputError(f"name = {name!r} is taken; registered backends: {', '.join(BACKENDS)}.")
    if not (callable(module) or (isinstance(module, str) and all(module.partition(":")))):
        raise InputError(f"module = {module!r}: expected 'module:class', or a callable that returns a backend.")
    if isinstance(roots, str) or not all(isinstance(root, str) and root.isidentifier() for root in roots):
        raise InputError(f"roots = {roots!r}: expected a sequence of names of top-level modules.")
    for root in roots:
        if root in _ROOTS:
            raise InputError(f"roots: the arrays of {root!r} are served by the backend {_ROOTS[root]!r}.")
    unknown = [other for other in takes if other not in BACKENDS]
    if unknown:
        raise UnknownNameError(f"takes: {unknown[0]!r} is not known; expected some of {', '.join(BACKENDS)}.")
    BACKENDS[name] = module
    _ROOTS.update(dict.fromkeys(roots, name))
    _TAKES[name] = tuple(takes)


for _name, _entry in importlib.import_module("implicitdiff.backends").BUILT_IN.items():
    register_backend(_name, *_entry)


def get_backend(backend: Any) -> Backend:
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


def _load(name: str) -> Callable[..., Backend]:
    target = BACKENDS[name]
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def backend_for(trees: Mapping[str, Any], beside: Any = ()) -> Backend:
    """Backend of the arrays in the trees, given by the names that the user knows them under.

    Where a backend takes another's arrays for its own (JAX those of NumPy) and both are met, it is that one.

    Parameters
    ----------
    trees : mapping of str to pytree
        What decides: y, theta.
    beside : pytree
        Data, or a vector: where all of the trees are arrays that another backend takes, or plain numbers, and that
        backend's are among these, it is that one.

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
    for taker, taken in _TAKES.items():
        if taken and (taker in found or (found.keys() <= set(taken) and _holds(beside, taker))):
            found = {key: at for key, at in found.items() if key not in taken} or {taker: (str, None)}
    if len(found) > 1:
        (a, (where_a, _)), (b, (where_b, _)) = list(found.items())[:2]
        raise BackendError(
            f"{where_a()} is a {a} array, {where_b()} a {b} array.\n"
            "Convert one of them: nothing is copied between frameworks."
        )
    if not found:
        return get_backend("numpy")  # Python floats only
    key, (_, leaf) = next(iter(found.items()))
    return get_backend(key) if key in BACKENDS else _generic(leaf)


def _framework(leaf: Any, name: str) -> str | None:
    """Name of the framework of an array; None for a number or a leaf that is no array at all."""
    root = type(leaf).__module__.partition(".")[0]
    if root in _ROOTS or hasattr(leaf, "__array_namespace__"):
        return _ROOTS.get(root, root)
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
        raise BackendError(f"no backend for arrays of type {kind}.{hint(leaf, name)}")
    return None


def _holds(tree: Any, name: str) -> bool:
    """Whether a tree holds an array of that backend; whatever else there is in it is none of our business."""
    roots = [root for root, backend in _ROOTS.items() if backend == name and root in sys.modules]
    if not roots:
        return False
    return any(type(leaf).__module__.partition(".")[0] in roots for leaf in flatten(tree).leaves)


def _generic(leaf: Any) -> Backend:
    import array_api_compat

    xp = array_api_compat.array_namespace(leaf)
    key = f"array_api:{xp.__name__}"
    if key not in _cache:
        _cache[key] = _load("array_api")(xp)
    return _cache[key]
