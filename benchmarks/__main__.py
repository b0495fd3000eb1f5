"""The command: ``python -m benchmarks run [--short] [--json FILE] [--only NAME] [--threads N] [--clock cpu]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import THREAD_VARIABLES, Setting, machine
from benchmarks.report import table, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 1 where a result is wrong, whatever the times say."""
    options = _parser().parse_args(argv)
    for name in THREAD_VARIABLES:  # read when NumPy is first imported, hence before the cases are
        os.environ[name] = str(options.threads)
    from benchmarks.cases import CASES

    unknown = sorted(set(options.only) - set(CASES))
    if unknown:
        print(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    setting = Setting(clock=options.clock)
    if options.short:
        setting = Setting(short=True, rounds=1, seconds=0.0, clock=options.clock)
    rows = []
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += CASES[name](setting)
    about = machine(options.threads)
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; Python {about['python']}; "
          + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))  # fmt: skip
    print(table(rows))
    if options.json is not None:
        write_json(options.json, about, setting, rows)
    return 0 if all(row.correct for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of implicitdiff.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and print a table")
    run.add_argument("--short", action="store_true", help="tiny sizes: shows that everything runs and is right")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    run.add_argument("--only", action="append", default=[], metavar="NAME", help="only this case; may be repeated")
    run.add_argument("--threads", type=int, default=1, help="threads of the BLAS (default 1: the least noise)")
    run.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: less noise on a busy machine")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
