"""The command line: ``python -m implicitdiff info`` and ``python -m implicitdiff demo``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import implicitdiff
from implicitdiff import ImplicitDiffError, InputError, registry, solver_names

__all__ = ["main"]

FRAMEWORKS = {
    "numpy": ("numpy",),
    "array_api_strict": ("array-api-strict", "array_api_strict"),
    "torch": ("torch",),
    "jax": ("jax",),
    "cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x"),
    "autograd": ("autograd",),
}
"""Module of a framework to the distributions that it may come in."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a wrong argument, 1 for what went wrong later."""
    options = _parser().parse_args(argv)
    try:
        return info() if options.command == "info" else demo(options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except InputError as error:
        return _fail(str(error), 2)
    except (ImplicitDiffError, OSError) as error:
        return _fail(str(error), 1)


def _fail(message: str, status: int) -> int:
    print(f"implicitdiff: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m implicitdiff", description="Derivatives of a solution.")
    parser.add_argument("--version", action="version", version=f"implicitdiff {implicitdiff.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")
    commands.add_parser("info", help="versions, backends found with their devices, solver names")
    about = "tune one L2 penalty per feature of a softmax regression on real data, by hypergradients"
    demo = commands.add_parser("demo", help=about, description=about[0].upper() + about[1:] + ".")
    demo.add_argument(
        "--solver", default="auto", metavar="NAME", help=f"adjoint solver: {', '.join(solver_names())} (default: auto)"
    )
    demo.add_argument("--data", default="digits", choices=("digits", "breast_cancer", "wine"), help="default: digits")
    demo.add_argument("--steps", type=_positive, default=20, metavar="K", help="most outer steps (default: 20)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="S", help="seed of the split (default: 0)")
    demo.add_argument("--plot", type=Path, metavar="FILE", help="write a figure; the suffix says which kind")
    demo.add_argument("--quiet", action="store_true", help="no progress bar (which needs tqdm)")
    return parser


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


# -- demo ----------------------------------------------------------------------------------------------
def demo(options: argparse.Namespace) -> int:
    """Run the demo: progress to stderr, the table to stdout, the plot to a file."""
    if options.solver not in solver_names():
        raise InputError(f"--solver {options.solver}: not known; expected one of {', '.join(solver_names())}")
    # Loaded here: `info` needs none of it.
    from implicitdiff.tools import demo, demo_plot

    absent = demo.missing(plotting=options.plot is not None, quiet=options.quiet)
    if absent is not None:
        return _fail(absent, 1)
    if options.plot is not None:
        demo_plot.check(options.plot)
    outcome = demo.run(options.data, options.solver, options.steps, options.seed, options.quiet)
    print(demo.table(outcome))
    if options.plot is not None:
        demo_plot.plot(outcome, options.plot)
        print(f"{'plot':<16}{options.plot}")
    return 0


# -- info ----------------------------------------------------------------------------------------------
def info() -> int:
    """Print versions, backends and solver names."""
    print(f"implicitdiff  {implicitdiff.__version__}")
    print(f"Python        {platform.python_version()} on {platform.system()} {platform.machine()}\n")
    rows = [("backend", "version", "devices")]
    rows += [(name.replace("_", "-"), *_framework(name)) for name in FRAMEWORKS]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    for name, version, devices in rows:
        print(f"{name:<{first}}  {version:<{second}}  {devices}".rstrip())
    print(f"\nsolvers       {', '.join(solver_names())}")
    return 0


def _framework(name: str) -> tuple[str, str]:
    """Version and devices of a framework; one that no backend serves is not imported."""
    if find_spec(name) is None:
        return "-", "not installed"
    version = "unknown"
    for distribution in FRAMEWORKS[name]:
        try:
            version = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if name == "autograd":
        return version, "cpu (exact derivatives of functions on NumPy arrays)"
    if name not in registry.BACKENDS and name != "array_api_strict":  # that one is served by the generic backend
        return version, "no backend in this version of implicitdiff"
    try:
        return version, ", ".join(_devices(name))
    except Exception as error:  # a broken installation, a driver that does not answer: tell, and go on
        return version, f"not usable: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _devices(name: str) -> list[str]:
    if name == "jax":
        return [str(device) for device in importlib.import_module("jax").devices()]
    if name == "torch":
        torch = importlib.import_module("torch")
        return ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    known = {"numpy", "cupy"}  # what array-api-compat wraps; others follow the standard themselves
    namespace: Any = importlib.import_module(f"array_api_compat.{name}" if name in known else name)
    shown = (str(device) for device in namespace.__array_namespace_info__().devices())
    return [re.sub(r"^[\w.]+\('(.*)'\)$", r"\1", text) for text in shown]  # Device('cpu') without the wrapping
