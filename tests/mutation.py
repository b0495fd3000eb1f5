"""Mutation tests of the solvers and the rules, by cosmic-ray: ``mutation.py PYTHON FOLDER LIMIT [FILE ...]``.

A copy of the tree is changed in one place at a time, and the tests below run on it with NumPy alone. What none of them
notices is printed as a patch. LIMIT changes of each file are drawn by chance; 0 means all.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "_build")
TESTS = [f"tests/test_{name}.py" for name in ("solvers", "ldlt", "equilibration", "solver_options", "solver_choice")]
RULES = [f"tests/test_{name}.py" for name in ("suite", "batches", "inputs", "newton_step")]
FILES = [*sorted((ROOT / "implicitdiff" / "solvers").glob("*.py")), ROOT / "implicitdiff" / "rules.py"]
CONFIG = """
[cosmic-ray]
module-path = "{file}"
timeout = 120
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider --cover 1 --backend numpy {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def draw(session: Path, limit: int) -> None:
    """Leave out all but some of the changes."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(session, WorkDB.Mode.open) as found:
        jobs = sorted(item.job_id for item in found.work_items)
        for job in random.Random(0).sample(jobs, len(jobs) - limit) if limit < len(jobs) else ():
            found.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def mutated(file: Path, tree: Path, python: str, limit: int) -> None:
    """Try the changes of a file, and print those that went unnoticed."""
    config, session = tree / "mutation.toml", tree / f"{file.stem}.sqlite"
    tests = [*TESTS, *(RULES if file.stem in {"rules", "auto", "base"} else [])]
    config.write_text(CONFIG.format(file=file, python=python, tests=" ".join(tests)), encoding="utf-8")
    command = str(Path(python).with_name("cosmic-ray"))
    subprocess.run([command, "init", config, session], cwd=tree, check=True)
    if limit:
        draw(session, limit)
    subprocess.run([command, "exec", config, session], cwd=tree, check=True)
    report = [str(Path(python).with_name("cr-report")), session, "--surviving-only", "--show-diff"]
    subprocess.run(report, cwd=tree, check=True)


def main() -> None:
    python, folder, limit, *names = sys.argv[1:]
    tree = Path(folder).resolve() / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for file in [ROOT / name for name in names] or FILES:
        mutated(file.relative_to(ROOT), tree, python, int(limit))


if __name__ == "__main__":
    main()
