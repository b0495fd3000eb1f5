"""The command: ``python -m benchmarks run [--backends numpy,torch,jax] [--peers] [--short] [--json FILE] ...``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import THREAD_VARIABLES, Setting, machine
from benchmarks.report import Result, Skipped, read_json, table, write_json

MODULES = {"numpy": "benchmarks.cases", "torch": "benchmarks.with_torch", "jax": "benchmarks.with_jax"}
NAMES = ("gradient", "jacobian", "batch", "products", "syncs", "import", "memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 1 where a result is wrong, whatever the times say."""
    options = _parser().parse_args(argv)
    backends = options.backends.split(",")
    for what, known, asked in (("backend", MODULES, backends), ("case", NAMES, options.only)):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            print(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    for name in THREAD_VARIABLES:  # read when a framework is first imported, hence before the cases are
        os.environ[name] = str(options.threads)
    setting = Setting(
        clock=options.clock, threads=options.threads, peers=options.peers, device=options.device,
        **({"short": True, "rounds": 1, "seconds": 0.0} if options.short else {}),
    )  # fmt: skip
    if len(backends) == 1:
        result = measured(backends[0], options.only, setting)
    else:  # the thread pools of two frameworks get in each other's way
        result = merged([in_its_own_process(name, options) for name in backends], options.threads)
    about = result.machine
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; Python {about['python']}; "
          + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))  # fmt: skip
    print(table(result))
    if options.json is not None:
        write_json(options.json, setting, result)
    return 0 if result.correct else 1


def measured(backend: str, only: Sequence[str], setting: Setting) -> Result:
    """Run the cases of one framework here."""
    result = Result(machine(setting.threads, [backend]))
    if importlib.util.find_spec(backend) is None:
        result.skipped.append(Skipped("all", "", f"{backend} is not installed", backend))
        return result
    module = importlib.import_module(MODULES[backend])
    reason = module.unavailable(setting)
    if reason is not None:
        result.skipped.append(Skipped("all", "", reason, backend))
        return result
    cases: Mapping[str, Callable[[Setting], Any]] = module.CASES
    for name in only or cases:
        if name in cases:
            print(f"{backend}: {name} ...", file=sys.stderr, flush=True)
            result.add(cases[name](setting))
        else:
            result.skipped.append(Skipped(name, "", "there is no such case for this framework", backend))
    return result


def in_its_own_process(backend: str, options: argparse.Namespace) -> Result:
    """Run the cases of one framework in a fresh interpreter."""
    given = ["--threads", str(options.threads), "--clock", options.clock, "--device", options.device]
    given += [flag for flag, wanted in (("--short", options.short), ("--peers", options.peers)) if wanted]
    given += [word for name in options.only for word in ("--only", name)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks", "run", "--backends", backend, "--json", str(path), *given]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if path.exists():
            return read_json(path)
    result = Result(machine(options.threads, [backend]), broken=True)
    result.skipped.append(Skipped("all", "", f"its process ended with status {done.returncode}", backend))
    return result


def merged(results: Sequence[Result], threads: int) -> Result:
    """Put the results of several processes together."""
    whole = Result(machine(threads), broken=any(result.broken for result in results))
    for result in results:
        whole.machine["versions"] |= result.machine["versions"]
        whole.add([*result.rows, *result.skipped])
    return whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of implicitdiff.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and print a table")
    run.add_argument("--backends", default="numpy", metavar="A,B", help="of numpy,torch,jax, each in its own process")
    run.add_argument("--peers", action="store_true", help="let other libraries do the same, too")
    run.add_argument("--short", action="store_true", help="tiny sizes: shows that everything runs and is right")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    run.add_argument("--only", action="append", default=[], metavar="NAME", help="only this case; may be repeated")
    run.add_argument("--threads", type=int, default=1, help="threads of BLAS and framework (default 1: least noise)")
    run.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: less noise on a busy machine")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arrays are")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
