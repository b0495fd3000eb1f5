"""Running checks, and comparing numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Checks", "close", "require", "run"]

Checks = Mapping[str, Callable[[], None]]
"""What is checked, to the check."""


def run(what: str, checks: Checks) -> None:
    """Run all of the checks; raise one error that lists those that failed."""
    failed = []
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise AssertionError(f"{what}: {len(failed)} of {len(checks)} checks failed.\n" + "\n".join(failed))


def require(held: Any, message: str) -> None:
    """Raise where something does not hold."""
    if not bool(held):
        raise AssertionError(message)


def close(found: Any, expected: Any, rtol: float, what: str) -> None:
    """Require that two arrays agree relative to the largest entry of the second."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    require(found.shape == expected.shape, f"{what} has shape {found.shape}; expected {expected.shape}")
    gap = np.max(np.abs(found - expected), initial=0.0)
    size = np.max(np.abs(expected), initial=0.0)
    require(gap <= rtol * size, f"{what} is off by {gap:.3g} of {size:.3g}")
