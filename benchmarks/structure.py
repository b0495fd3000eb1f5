"""The size of the source and the length of the way through it: ``python -m benchmarks.structure``.

Counts the lines of core and adapters, and for one gradient on NumPy (a quadratic, given products, CG) the files and
functions of the package that run and the frames between the user's call and the first product with A.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import implicitdiff

__all__ = ["lines", "main", "walk"]

ROOT = Path(__file__).resolve().parents[1]
CORE, ADAPTERS = ROOT / "implicitdiff", ROOT / "backends"


def lines() -> dict[str, int]:
    """Count the lines of the core and of the adapters, and the files that hold them.

    Returns
    -------
    dict of str to int
    """
    adapters = sorted(ADAPTERS.rglob("*.py"))
    core = [path for path in sorted(CORE.rglob("*.py")) if not path.is_relative_to(CORE / "backends")]
    found = {f"lines, {name}": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
             for name, paths in (("core", core), ("adapters", adapters))}  # fmt: skip
    return {**found, "lines": sum(found.values()), "files": len(core) + len(adapters)}


def walk(solver: str = "cg", n: int = 50) -> dict[str, int]:
    """Run one gradient and count what of the package it passes; the second one, when everything is loaded and checked.

    Parameters
    ----------
    solver : str
        Name of the linear solver.
    n : int
        Unknowns of the quadratic.

    Returns
    -------
    dict of str to int
    """
    H = np.diag(np.linspace(1.0, 10.0, n))
    depth: list[int] = []

    def hvp(y: Any, theta: Any, v: Any) -> Any:
        depth.append(_frames(sys._getframe(1)))
        return H @ v

    condition = implicitdiff.Stationary(
        grad=lambda y, theta: H @ y - theta, hvp=hvp, mixed_vjp=lambda y, theta, u: -u, kind="minimum"
    )
    theta = np.ones(n)
    y = np.linalg.solve(H, theta)

    def call() -> Any:
        return implicitdiff.implicit_grad(condition, y, y, theta, solver=solver)

    call()
    depth.clear()
    seen = _profiled(call)
    files = {code.co_filename for code in seen}
    return {"files in a gradient": len(files), "functions in a gradient": len(seen), "frames to a product": depth[0]}


def _frames(frame: FrameType | None) -> int:
    """Count the package's frames from here up."""
    count = 0
    while frame is not None:
        count += _is_ours(frame.f_code.co_filename)
        frame = frame.f_back
    return count


@functools.cache
def _is_ours(path: str) -> bool:
    return Path(path).is_relative_to(CORE) or Path(path).is_relative_to(ADAPTERS)


def _profiled(call: Callable[[], Any]) -> set[Any]:
    """Run a function and return the code objects of the package that ran."""
    seen: set[Any] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and _is_ours(frame.f_code.co_filename):
            seen.add(frame.f_code)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print them for a machine")
    found = {**lines(), **walk()}
    if parser.parse_args().json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<24} {count}" for name, count in found.items()))


if __name__ == "__main__":
    main()
