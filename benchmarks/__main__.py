"""The command: ``python -m benchmarks run …``, ``… plot FILE …`` and ``… compare OLD NEW``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import THREAD_VARIABLES, Setting, machine
from benchmarks.report import Result, Skipped, read_json, table, write_json

MODULES = {"numpy": "benchmarks.cases", "torch": "benchmarks.with_torch", "jax": "benchmarks.with_jax"}
OF_PROGRAMS = ("first call", "restarts")  # of JAX
BACKENDS = (*MODULES, "cupy")
DEVICES = ("cpu", "cuda")
NAMES = ("gradient", "jacobian", "batch", "qp", "qp layers", "equilibrium", "products", "syncs", "import", "memory",
         "small", "scale", "certificates", "sequences", "sparse", "batches", "networks")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 1 where a result is wrong, whatever the times say, 2 where the arguments are."""
    options = _parser().parse_args(argv)
    if options.command == "plot":
        from benchmarks.plots import draw

        for path in draw(options.files, options.out):
            print(path)
        return 0
    if options.command == "compare":
        from benchmarks.compare import compare

        return compare(options.old, options.new, options.fail_above)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    for name in THREAD_VARIABLES:  # read when NumPy or a framework is first imported, hence before anything else
        os.environ[name] = str(options.threads)
    wrong = _unknown(options)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    backends = options.backends.split(",")
    setting = Setting(
        clock=options.clock, threads=options.threads, peers=options.peers, device=_devices(options)[0],
        **({"short": True, "rounds": 1, "seconds": 0.0} if options.short else {"seconds": options.seconds}),
    )  # fmt: skip
    if len(backends) == 1:
        result = measured(backends[0], options, setting)
    else:  # the thread pools of two frameworks get in each other's way
        result = merged([in_its_own_process(name, options) for name in backends], options.threads)
    about = result.machine
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; Python {about['python']}; "
          + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))  # fmt: skip
    print(table(result))
    if options.json is not None:
        write_json(options.json, setting, result)
    return 0 if result.correct else 1


def _devices(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(options.devices.split(","))


def _listed(text: str) -> tuple[str, ...]:
    """Names of an option; none where it says "none"."""
    return tuple(name for name in text.split(",") if name and name != "none")


def _unknown(options: argparse.Namespace) -> str | None:
    """Say which name of an option there is not."""
    from benchmarks.sweep import problem_names
    from implicitdiff import solver_names

    for what, known, asked in (
        ("backend", BACKENDS, options.backends.split(",")), ("case", (*NAMES, *OF_PROGRAMS, "none"), options.only),
        ("device", DEVICES, _devices(options)), ("problem", (*problem_names(), "all"), _listed(options.problems)),
        ("solver", solver_names(), _listed(options.solvers)),
    ):  # fmt: skip
        unknown = sorted(set(asked) - set(known))
        if unknown:
            return f"no {what} {', '.join(unknown)}; there are {', '.join(known)}"
    if not all(size.isdigit() and int(size) for size in _listed(options.sizes)):
        return f"--sizes {options.sizes}: expected positive integers"
    return None


def measured(backend: str, options: argparse.Namespace, setting: Setting) -> Result:
    """Run the cases and the sweep of one framework here."""
    result = Result(machine(setting.threads, [backend]))
    if importlib.util.find_spec(backend) is None:
        result.skipped.append(Skipped("all", "", f"{backend} is not installed", backend))
        return result
    if options.only != ["none"]:
        for device in _devices(options):
            _cases(result, backend, options.only, replace(setting, device=device))
    if options.problems != "none":
        from benchmarks.sweep import Sweep, sweep

        names = () if options.problems == "all" else _listed(options.problems)
        sizes = tuple(map(int, _listed(options.sizes)))
        plan = Sweep(names, _listed(options.solvers), sizes, _devices(options), options.seed)
        result.add(sweep(backend, plan, setting))
    return result


def _cases(result: Result, backend: str, only: Sequence[str], setting: Setting) -> None:
    """Run the comparisons that have bars."""
    if backend not in MODULES:
        result.skipped.append(Skipped("all comparisons", "", "there are none for this framework", backend))
        return
    module = importlib.import_module(MODULES[backend])
    reason = module.unavailable(setting)
    if reason is not None:
        result.skipped.append(Skipped("all comparisons", "", reason, backend))
        return
    cases: Mapping[str, Callable[[Setting], Any]] = module.CASES
    for name in only or cases:
        if name in cases:
            print(f"{backend}: {name} ...", file=sys.stderr, flush=True)
            try:
                result.add(cases[name](setting))
            except ModuleNotFoundError as missing:
                if str(missing.name).partition(".")[0] in {"benchmarks", "implicitdiff"}:
                    raise
                result.skipped.append(Skipped(name, "", f"{missing.name} is not installed", backend))
        else:
            result.skipped.append(Skipped(name, "", "there is no such case for this framework", backend))


def in_its_own_process(backend: str, options: argparse.Namespace) -> Result:
    """Run the cases of one framework in a fresh interpreter."""
    named = ("threads", "clock", "devices", "problems", "sizes", "solvers", "seed", "seconds")
    given = [
        word for name in named if getattr(options, name) != "" for word in (f"--{name}", str(getattr(options, name)))
    ]
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
        whole.add([*result.rows, *result.samples, *result.skipped])
    return whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of implicitdiff.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and print a table")
    run.add_argument("--backends", default="numpy", metavar="A,B", help="of numpy,torch,jax,cupy, each in a process")
    run.add_argument("--devices", default="cpu", metavar="A,B", help="of cpu,cuda: where the arrays are")
    run.add_argument("--peers", action="store_true", help="let other libraries do the same, too")
    run.add_argument("--short", action="store_true", help="tiny sizes: shows that everything runs and is right")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    run.add_argument("--only", action="append", default=[], metavar="NAME",
                     help="only this comparison; may be repeated; none: the sweep alone")  # fmt: skip
    run.add_argument("--problems", default="none", metavar="A,B", help="sweep over these, or all (default none)")
    run.add_argument("--sizes", default="", metavar="N,M", help="sizes of the sweep (default: each problem's own)")
    run.add_argument("--solvers", default="", metavar="A,B", help="solvers of the sweep (default: each problem's own)")
    run.add_argument("--seed", type=int, default=0, help="of the problems in the sweep")
    run.add_argument("--seconds", type=float, default=3.0, help="for each measurement (default 3)")
    run.add_argument("--threads", type=int, default=1, help="threads of BLAS and framework (default 1: least noise)")
    run.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: less noise on a busy machine")
    plot = commands.add_parser("plot", help="draw figures from files of runs")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE")
    plot.add_argument("--out", type=Path, default=Path("benchmark_plots"), metavar="FOLDER")
    compare = commands.add_parser("compare", help="hold the times of two runs against each other")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("--fail-above", type=float, metavar="RATIO", help="end with status 1 where new / old is above")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
