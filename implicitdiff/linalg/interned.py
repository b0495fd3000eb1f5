"""Objects that are one for all equal contents, so that what is made of one is made once."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from implicitdiff.closures import Memory

__all__ = ["Interned"]

_lock = threading.Lock()
_known: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


class Interned:
    """What is told apart by its content alone: arrays of one dtype and length, and hashable values beside them."""

    _made: Memory

    @classmethod
    def _of(cls, **content: Any) -> Self:
        """Return the object with that content: the one that there is, or a new one."""
        arrays = [x for x in content.values() if isinstance(x, np.ndarray)]
        beside = tuple(x for x in content.values() if not isinstance(x, np.ndarray))
        key = cls, beside, hashlib.blake2b(np.concatenate(arrays).tobytes()).digest()
        with _lock:
            found = _known.get(key)
            if found is None:
                found = object.__new__(cls)
                vars(found).update(content, _made=Memory())
                _known[key] = found
        return found

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under a key, or make it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
