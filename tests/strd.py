"""NIST's Statistical Reference Datasets for nonlinear regression: data, certified values, and the models.

National Institute of Standards and Technology, Statistical Reference Datasets, itl.nist.gov/div898/strd: a work of the
United States government, in the public domain. ``data/nist_strd.json`` holds for each of the 27 sets the two starting
points, the certified parameters, their certified standard deviations, the certified residual sum of squares, and the
columns, response first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from implicitdiff import LeastSquares

Model = Callable[[ModuleType, Any, Any], Any]
_SETS = json.loads((Path(__file__).parent / "data" / "nist_strd.json").read_text())
NAMES = tuple(_SETS)


def _growth(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * (1 - xp.exp(-b[1] * x))


def _chwirut(xp: Any, b: Any, x: Any) -> Any:
    return xp.exp(-b[0] * x) / (b[1] + b[2] * x)


def _cubics(xp: Any, b: Any, x: Any) -> Any:
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _peaks(xp: Any, b: Any, x: Any) -> Any:
    first, second = (b[i] * xp.exp(-((x - b[i + 1]) ** 2) / b[i + 2] ** 2) for i in (2, 5))
    return b[0] * xp.exp(-b[1] * x) + first + second


def _decays(xp: Any, b: Any, x: Any) -> Any:
    return b[0] * xp.exp(-b[1] * x) + b[2] * xp.exp(-b[3] * x) + b[4] * xp.exp(-b[5] * x)


def _seasons(xp: Any, b: Any, x: Any) -> Any:
    def wave(i: int, period: Any) -> Any:
        return b[i] * xp.cos(2 * math.pi * x / period) + b[i + 1] * xp.sin(2 * math.pi * x / period)

    return b[0] + wave(1, 12) + wave(4, b[3]) + wave(7, b[6])


MODELS: dict[str, Model] = {
    "Bennett5": lambda xp, b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _growth,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda xp, b, x: b[0] * x ** b[1],
    "ENSO": _seasons,
    "Eckerle4": lambda xp, b, x: b[0] / b[1] * xp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "Gauss3": _peaks,
    "Hahn1": _cubics,
    "Kirby2": lambda xp, b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": _decays,
    "Lanczos2": _decays,
    "Lanczos3": _decays,
    "MGH09": lambda xp, b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda xp, b, x: b[0] * xp.exp(b[1] / (x + b[2])),
    "MGH17": lambda xp, b, x: b[0] + b[1] * xp.exp(-x * b[3]) + b[2] * xp.exp(-x * b[4]),
    "Misra1a": _growth,
    "Misra1b": lambda xp, b, x: b[0] * (1 - 1 / (1 + b[1] * x / 2) ** 2),
    "Misra1c": lambda xp, b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda xp, b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda xp, b, x: b[0] - b[1] * x[0] * xp.exp(-b[2] * x[1]),
    "Rat42": lambda xp, b, x: b[0] / (1 + xp.exp(b[1] - b[2] * x)),
    "Rat43": lambda xp, b, x: b[0] / (1 + xp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda xp, b, x: b[0] - b[1] * x - xp.arctan(b[2] / (x - b[3])) / math.pi,
    "Thurber": _cubics,
}


class Set(NamedTuple):
    """One of the sets."""

    name: str
    data: np.ndarray
    x: np.ndarray
    certified: np.ndarray
    errors: np.ndarray
    rss: float

    @property
    def deviation(self) -> float:
        """The certified residual standard deviation."""
        return math.sqrt(self.rss / (len(self.data) - len(self.certified)))

    def condition(self, xp: ModuleType, x: Any = None, **options: Any) -> LeastSquares:
        """The fit, with the data as parameters, in a library."""
        model, x = MODELS[self.name], self.x if x is None else x
        return LeastSquares(lambda b, data: model(xp, b, x) - data, **options)


def strd(name: str) -> Set:
    """Return the set of that name."""
    found = _SETS[name]
    data, *x = (np.array(column) for column in found["columns"])
    of_logarithm = name == "Nelson"
    return Set(
        name, np.log(data) if of_logarithm else data, x[0] if len(x) == 1 else np.stack(x),
        np.array(found["certified"]), np.array(found["errors"]), found["rss"],
    )  # fmt: skip
