"""A stand-in for CuPy made of NumPy: the names, signatures and failures that the backend relies on, and no device.

It tells whether the backend calls CuPy as it is documented and deals with what comes back: a singular matrix that comes
with a warning, an inverse or a Cholesky factor that is wrong in silence, scalars that are arrays. It counts how often
somebody waits for the device. What only a device can show is in the tests marked ``gpu``.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg

waits: list[str] = []
"""Each time a number was read back."""


class Device:
    """One of two devices; the current one is 0."""

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __str__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


class ndarray(np.ndarray):
    """An array whose scalars are arrays, too."""

    place = 0

    @property
    def device(self) -> Device:  # type: ignore[override]
        return Device(self.place)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array).view(ndarray)

    def __getitem__(self, key: Any) -> Any:
        return _ours(np.asarray(self)[key])

    def _read(self) -> np.ndarray:
        waits.append("read")
        return np.asarray(self)

    def __bool__(self) -> bool:
        return bool(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def item(self, *args: Any) -> Any:
        return self._read().item(*args)


ndarray.__module__ = "cupy"


def _ours(x: Any) -> Any:
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x).view(ndarray)
    return tuple(map(_ours, x)) if type(x) is tuple else x


def _wrapped(function: Any) -> Any:
    @functools.wraps(function, updated=())
    def called(*args: Any, **kwargs: Any) -> Any:
        return _ours(function(*args, **kwargs))

    return called


class ElementwiseKernel:
    """A kernel whose one statement happens to be one of Python's."""

    def __init__(self, inputs: str, outputs: str, operation: str, name: str) -> None:
        self.operation = operation
        self.names = [part.split()[1] for part in f"{inputs}, {outputs}".split(", ")]

    def __call__(self, *arrays: Any) -> None:
        assert all(isinstance(x, ndarray) for x in arrays)
        assert len({x.dtype for x in arrays}) == 1, "T is one type"
        exec(self.operation, {}, dict(zip(self.names, map(np.asarray, arrays), strict=True)))


# -- linear algebra ------------------------------------------------------------------------------------
_on_error = ["ignore"]


@contextlib.contextmanager
def errstate(*, linalg: str) -> Iterator[None]:
    """What cuSOLVER's failures do."""
    _on_error.append(linalg)
    try:
        yield
    finally:
        _on_error.pop()


def inv(a: Any) -> Any:
    """Inverses; of a singular item what happened to lie in memory."""
    items = [np.linalg.inv(m) if np.linalg.matrix_rank(m) == len(m) else np.zeros_like(m) for m in np.asarray(a)]
    return np.stack(items).view(ndarray)


def cholesky(a: Any) -> Any:
    """Lower factors; of an item that is not positive definite the lower triangle as it was."""

    def one(m: np.ndarray) -> np.ndarray:
        try:
            return np.linalg.cholesky(m)
        except np.linalg.LinAlgError:
            if _on_error[-1] == "raise":
                raise
            return np.tril(m)

    a = np.asarray(a)
    return (one(a) if a.ndim == 2 else np.stack([one(m) for m in a])).view(ndarray)


def lu_factor(a: Any, overwrite_a: bool = False, check_finite: bool = True) -> Any:
    """LU with pivots; a zero pivot is warned about."""
    assert a.ndim == 2
    lu, pivots, info = scipy.linalg.lapack.dgetrf(np.asarray(a))
    if info > 0:
        warnings.warn(f"Diagonal number {info} is exactly zero. Singular matrix.", RuntimeWarning, stacklevel=2)
    return lu.view(ndarray), pivots.view(ndarray)


def lu_solve(factor: Any, b: Any, trans: int = 0, overwrite_b: bool = False, check_finite: bool = True) -> Any:
    """Solve with columns b."""
    lu, pivots = map(np.asarray, factor)
    with np.errstate(all="ignore"):
        return scipy.linalg.lapack.dgetrs(lu, pivots.copy(), np.asarray(b), trans=trans)[0].view(ndarray)


def solve_triangular(a: Any, b: Any, trans: Any = 0, lower: bool = False, **_: Any) -> Any:
    """Solve with a triangular matrix, or a stack of them."""
    m = np.tril(a) if lower else np.triu(a)
    m = np.swapaxes(m, -1, -2) if trans in (1, "T") else m
    m, b = np.asarray(m), np.asarray(b)
    known = np.isfinite(m).all(axis=(-2, -1), keepdims=True)
    x = np.linalg.solve(np.where(known, m, np.eye(m.shape[-1])), b)
    return np.where(known, x, np.nan).view(ndarray)


def modules() -> dict[str, types.ModuleType]:
    """Return what to put into ``sys.modules``."""
    made = {
        name: types.ModuleType(name)
        for name in (
            "cupy",
            "cupy.linalg",
            "cupy.fft",
            "cupy.cuda",
            "cupy.cuda.device",
            "cupyx",
            "cupyx.scipy",
            "cupyx.scipy.linalg",
        )
    }
    cupy, cupyx = made["cupy"], made["cupyx"]
    for name in np.__all__:
        thing = getattr(np, name)
        if not isinstance(thing, types.ModuleType):
            plain = isinstance(thing, type) or not callable(thing)
            setattr(cupy, name, thing if plain else _wrapped(thing))
    cupy.__dict__.update(ndarray=ndarray, ElementwiseKernel=ElementwiseKernel, __version__="14.0.0", __path__=[])
    for source, target in ((np.linalg, made["cupy.linalg"]), (np.fft, made["cupy.fft"])):
        for name in source.__all__:
            thing = getattr(source, name)
            setattr(target, name, thing if isinstance(thing, type) else _wrapped(thing))
    made["cupy.linalg"].__dict__.update(inv=inv, cholesky=cholesky)
    made["cupy.cuda"].__dict__.update(Device=Device, __path__=[])
    made["cupy.cuda.device"].__dict__.update(Device=Device)
    cupy.__dict__.update(linalg=made["cupy.linalg"], fft=made["cupy.fft"], cuda=made["cupy.cuda"])
    made["cupyx.scipy.linalg"].__dict__.update(
        lu_factor=lu_factor, lu_solve=lu_solve, solve_triangular=solve_triangular
    )
    made["cupyx.scipy"].__dict__.update(linalg=made["cupyx.scipy.linalg"], __path__=[])
    cupyx.__dict__.update(errstate=errstate, scipy=made["cupyx.scipy"], __path__=[])
    return made
