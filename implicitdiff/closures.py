"""What a function sees beside its arguments: its closure, its defaults, globals, and what objects and modules hold."""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import operator
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

__all__ = ["PLAIN", "Memory", "inside", "is_library", "sees", "swapped"]

LIMIT = 20_000
"""Values that are looked at, at most."""

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), type(Ellipsis)))

_LIBRARIES = frozenset(("implicitdiff", "jax", "jaxlib", "numpy", "scipy", "torch", "array_api_compat"))
_SHELVES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Memory(dict[Any, Any]):
    """A dict that remembers what was found: a function that sees it is the same whatever is in it."""


@functools.lru_cache(maxsize=4096)
def is_library(name: str) -> bool:
    """Whether a module is an installed one, whose own globals and classes are not expected to change."""
    if name.partition(".")[0] in _LIBRARIES:
        return True
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None)
    if path is None:
        return name != "__main__" and name in sys.builtin_module_names
    return str(path).startswith(_SHELVES)


def sees(
    roots: Iterable[Any], is_array: Callable[[Any], bool], wanted: Callable[[Any], bool], limit: int = LIMIT
) -> bool:
    """Whether functions, or objects that hold some, see an array of a certain kind.

    Parameters
    ----------
    roots : iterable
    is_array : callable
        Whether a value is one to ask about, and to look into no further.
    wanted : callable
        What to ask about it.
    limit : int
        Values that are looked at, the nearest first.
    """
    seen: dict[int, Any] = {}  # the values themselves, or another could come to bear the id of one
    left, turn = deque(roots), 0
    while left and turn < limit:
        value, turn = left.popleft(), turn + 1
        if is_array(value):
            if wanted(value):
                return True
        elif type(value) not in PLAIN and id(value) not in seen:
            seen[id(value)] = value
            left.extend(inside(value))
    return False


def inside(value: Any) -> tuple[Any, ...]:
    """What a value is made of, as far as Python shows it."""
    kind = type(value)
    if kind is types.FunctionType:
        return _of_function(value)
    if kind is dict:
        return (*value.keys(), *value.values())
    if kind is tuple or kind is list:
        return tuple(value)
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, type):
        return () if isinstance(value, enum.EnumMeta) or is_library(value.__module__) else _of_class(value)
    if isinstance(value, (types.ModuleType, enum.Enum, Memory)):
        return ()
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords, vars(value)
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset
    return (*_entries(value), *_of_object(value))


def swapped(value: Any, swap: Callable[[Any], Any], done: dict[int, Any] | None = None) -> Any:
    """Copy a function with other values in what it sees, as far as that can be copied; itself where nothing changes.

    Parameters
    ----------
    value : object
        The function, or an object.
    swap : callable
        Returns what is to stand in place of a value, or the value itself.
    """
    done = {} if done is None else done
    if type(value) in PLAIN:
        return value
    if id(value) not in done:
        done[id(value)] = value  # met again inside of itself
        new = swap(value)
        done[id(value)] = new if new is not value else _copied(value, lambda part: swapped(part, swap, done))
    return done[id(value)]


def _copied(value: Any, of: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind is types.FunctionType:
        return _function_with(value, of)
    if isinstance(value, types.MethodType):
        owner = of(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = of(value.func), of(value.args), of(value.keywords)
        same = all(map(operator.is_, parts, (value.func, value.args, value.keywords)))
        return value if same else functools.partial(parts[0], *parts[1], **parts[2])
    if kind is dict:
        return _changed(value, {key: of(entry) for key, entry in value.items()}, list(value.values()))
    if kind is tuple or kind is list:
        return _changed(value, kind(map(of, value)), value)
    if kind.__module__.startswith("jaxlib") and hasattr(value, "__wrapped__"):
        return of(value.__wrapped__)
    if isinstance(value, (type, types.ModuleType, enum.Enum, Memory)) or not hasattr(value, "__dict__"):
        return value
    held = of(vars(value))
    if held is vars(value):
        return value
    other = copy.copy(value)
    vars(other).update(held)
    return other


def _changed(old: Any, new: Any, entries: Any) -> Any:
    found = new.values() if isinstance(new, dict) else new
    return old if all(map(operator.is_, found, entries)) else new


def _function_with(function: types.FunctionType, of: Callable[[Any], Any]) -> types.FunctionType:
    old = function.__closure__ or ()
    cells = tuple(_cell_with(cell, of) for cell in old)
    space = function.__globals__
    names = () if is_library(function.__module__ or "builtins") else _names(function.__code__)
    others = {n: new for n in names if n in space and (new := of(space[n])) is not space[n]}
    defaults, by_name = of(function.__defaults__), of(function.__kwdefaults__)
    same = all(map(operator.is_, cells, old))
    if same and not others and defaults is function.__defaults__ and by_name is function.__kwdefaults__:
        return function
    new = types.FunctionType(function.__code__, {**space, **others}, function.__name__, defaults, cells)
    new.__kwdefaults__ = by_name
    return new


def _cell_with(cell: types.CellType, of: Callable[[Any], Any]) -> types.CellType:
    try:
        old = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    new = of(old)
    return cell if new is old else types.CellType(new)


def _entries(value: Any) -> tuple[Any, ...]:
    """What a container holds, subclasses of Python's own included."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return tuple(value)
    if isinstance(value, Mapping):
        items = tuple(value.items())
        return (*(key for key, _ in items), *(entry for _, entry in items))
    return ()


def _of_object(value: Any) -> tuple[Any, ...]:
    """Attributes, those in slots included, and the class where it is not a library's."""
    kind = type(value)
    wrapped = getattr(value, "__wrapped__", None)
    if kind.__module__.startswith("jaxlib"):  # a compiled function is the one that it was made of
        return () if wrapped is None else (wrapped,)
    parts = [vars(value)] if hasattr(value, "__dict__") else []
    parts += [getattr(value, name) for name in _slots(cast("Hashable", kind)) if hasattr(value, name)]
    if wrapped is not None:
        parts.append(wrapped)
    if not is_library(kind.__module__) and not isinstance(value, enum.Enum):
        parts.append(kind)
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def _slots(kind: Hashable) -> tuple[str, ...]:
    """Names of the attributes that objects of a class keep in slots."""
    return tuple(
        name
        for part in inspect.getmro(cast("type", kind))
        for name, held in vars(part).items()
        if isinstance(held, types.MemberDescriptorType) and not name.startswith("__")
    )


def _of_class(kind: type) -> tuple[Any, ...]:
    """Attributes and methods, and the classes that it is built on."""
    held = [
        value
        for name, value in vars(kind).items()
        if (name == "__call__" or not name.startswith(("__", "_abc_"))) and not _is_descriptor(value)
    ]
    return (*held, *kind.__bases__)


def _is_descriptor(value: Any) -> bool:
    """Whether an entry of a class is only the way to what its objects hold."""
    return isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)) or (
        hasattr(type(value), "__get__") and not hasattr(value, "__dict__") and not isinstance(value, property)
    )


def _of_function(function: types.FunctionType) -> tuple[Any, ...]:
    """Cells, defaults, attributes, and the globals that its code names."""
    parts: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # not filled yet
            parts.append(None)
    parts += [function.__defaults__, function.__kwdefaults__]
    if function.__dict__:
        parts.append(function.__dict__)
    if is_library(function.__module__ or "builtins"):
        return tuple(parts)
    space, names = function.__globals__, _names(function.__code__)
    for name in names:
        if name in space:
            parts += _looked_up(space[name], names)
        elif name in sys.modules:  # imported inside
            parts += _looked_up(sys.modules[name], names)
    return tuple(parts)


def _looked_up(value: Any, names: tuple[str, ...]) -> list[Any]:
    """A global; of a module what the code may look up in it."""
    found, left, modules = list[Any](), [value], set[int]()
    while left:
        value = left.pop()
        if not isinstance(value, types.ModuleType):
            found.append(value)
        elif id(value) not in modules and not is_library(value.__name__):
            modules.add(id(value))
            left += [vars(value)[name] for name in names if name in vars(value)]
    return found


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function looks up outside, those of the functions written inside it included."""
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
