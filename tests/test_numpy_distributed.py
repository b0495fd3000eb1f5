"""NumPy past one process: each holds a slice of y, and all of them take the same steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("needs sockets that are files", allow_module_level=True)

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "docs" / "examples_distributed" / "numpy_mpi.py"
CASES = ("cg", "minres", "gmres", "restarted", "bicgstab", "chebyshev")
FAULTS = {
    "y": "NonFiniteError: y", "cotangent": "NonFiniteError: cotangent", "product": "NonFiniteProductError|SolveError",
    "singular": "SingularError", "auto": "BackendError: solver 'auto'", "lu": "BackendError: solver 'lu'",
    "cholesky": "BackendError: solver 'cholesky'", "missing": "DerivativeError: .*slice",
    "empty": "InputError: .*entry",
    "maxiter": "NotConvergedError", "not a solution": "NotASolutionWarning", "jacobian": "BackendError: several",
    "outer": "DerivativeError: the gradient of outer",
}  # fmt: skip


@pytest.fixture(scope="module")
def meeting() -> Iterator[Path]:
    """Return a folder with a path short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def in_two(command: list[str], socket: Path, path: Path) -> list[str]:
    """Run a command in two processes that find each other at a socket, and return what they print."""
    where = os.pathsep.join(filter(None, [str(path), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    running = []
    for rank in range(2):
        own = {"PYTHONPATH": where, "OMP_NUM_THREADS": "1", "STANDIN_RANK": str(rank), "STANDIN_MEETING": str(socket)}
        running.append(
            subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **own},
            )
        )  # fmt: skip
    try:
        done = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    wrong = "\n".join(errors[-2000:] for _, errors in done)
    assert [process.returncode for process in running] == [0, 0], wrong
    return [printed for printed, _ in done]


@pytest.fixture(scope="module")
def results(meeting: Path) -> list[dict[str, Any]]:
    """What each of two processes found in every case."""
    command = [str(HERE / "distributed_numpy.py"), *CASES, *(f"told:{fault}" for fault in FAULTS)]
    return [json.loads(text) for text in in_two(command, meeting / "s", HERE)]


@pytest.mark.parametrize("case", CASES)
def test_slices(results: list[dict[str, Any]], case: str) -> None:
    """Slices of unequal length give the derivatives of the whole, in as many iterations, with the same report."""
    first, second = (found[case] for found in results)
    assert max(first["error"], second["error"]) <= 1e-10
    assert first["iterations"] == second["iterations"] > 5
    assert abs(first["iterations"] - first["alone"]) <= 1
    assert first["sizes"] == second["sizes"], "norms of the whole"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_everywhere(results: list[dict[str, Any]], fault: str) -> None:
    """What one process sees is an error in both, and what a slice is not enough for is refused."""
    texts = [found[f"told:{fault}"]["told"] for found in results]
    for text in texts:
        assert re.match(FAULTS[fault], text, re.DOTALL), text


LINE = re.compile(r"rank (\d): (\d+) entries, error (\S+), iterations (\d+)")


def check_lines(text: str) -> None:
    found = sorted(LINE.findall(text))
    assert [line[:2] for line in found] == [("0", "40"), ("1", "50")], text
    assert all(float(error) <= 1e-10 for _, _, error, _ in found)
    assert found[0][3] == found[1][3]


def test_documented_example(meeting: Path) -> None:
    """The example of the documentation, with a stand-in for mpi4py."""
    package = meeting / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("import standin_mpi as MPI\n", encoding="utf-8")
    (meeting / "standin_mpi.py").write_bytes((HERE / "standin_mpi.py").read_bytes())
    check_lines("".join(in_two([str(EXAMPLE)], meeting / "e", meeting)))


def test_documented_example_over_mpi() -> None:
    """The same over MPI, where it is installed."""
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None or find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py and mpiexec")
    where = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout)
