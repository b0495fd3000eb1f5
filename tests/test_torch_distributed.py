"""Torch past one process: data spread over two processes gives what one process makes of all the data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("torch") is None:
    pytest.skip("needs torch", allow_module_level=True)

import torch.distributed

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples_distributed"
SOLVERS = {
    "stationary": ("cg", "minres", "gmres", "auto"), "given": ("cg", "minres", "auto"), "matrix": ("cg", "auto"),
    "root": ("gmres", "bicgstab", "auto"), "fixed point": ("gmres", "auto"),
}  # fmt: skip
SHORT = {
    "stationary:cg", "given:minres", "matrix:auto", "root:gmres", "root:bicgstab", "fixed point:auto",
    "features:objective:cg", "outputs:grad:cg", "examples:given:cg", "features:objective:minres", "features:root:cg",
}  # fmt: skip
"""Each condition, solver and layout once; the other cases are exhaustive."""


def cases(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in SHORT)) for name in names]


def chosen(request: pytest.FixtureRequest, names: list[str]) -> list[str]:
    """Return the cases that are asked for in this run."""
    asked = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    return [name for name in names if name in asked]


CASES = [f"{name}:{solver}" for name, solvers in SOLVERS.items() for solver in solvers]
FAULTS = {
    "y": "InputError: y is not the same",
    "theta": "InputError: theta is not the same",
    "cotangent": "InputError: the right-hand side .* is not the same",
    "nan": "NonFiniteProductError|SolveError",
    "recorded": "DerivativeError: .*process group",
}


def environment() -> dict[str, str]:
    """Let a script find this checkout, and run on one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def in_two(*commands: list[str], timeout: float = 240, **variables: Any) -> list[str]:
    """Run two processes and return what they print."""
    running = []
    for rank, command in enumerate(commands):
        own = {**environment(), **{k: v.format(rank) for k, v in variables.items()}}
        running.append(
            subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own
            )
        )
    try:
        done = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for process, (_, wrong) in zip(running, done, strict=True):
        assert process.returncode == 0, wrong[-3000:]
    return [printed for printed, _ in done]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in every case."""
    meeting = tmp_path_factory.mktemp("torch") / "meeting"
    script = str(Path(__file__).with_name("distributed_torch.py"))
    run = [*chosen(request, CASES), *(f"told:{f}" for f in FAULTS)]
    run += [f"dtensor:{case}" for case in (*chosen(request, SPREAD), "bare", *(f"told:{f}" for f in SPREAD_FAULTS))]
    printed = in_two(*([script, str(meeting), str(rank), "2", *run] for rank in range(2)))
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.parametrize("case", cases(CASES))
def test_data_parallel(results: list[dict[str, Any]], case: str) -> None:
    """Every process gets the derivatives of one process with all the data, in as many iterations."""
    for found in results:
        assert found[case]["error"] <= 1e-10
        assert found[case]["iterations"] == found[case]["alone"]
    if "auto" not in case:
        assert max(results[0][case]["iterations"]) > 3, "a real solve"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_everywhere(results: list[dict[str, Any]], fault: str) -> None:
    """What is wrong in one process, or differs between them, is an error in both, and nobody waits for ever."""
    for found in results:
        assert re.match(FAULTS[fault], found[f"told:{fault}"]["told"], re.DOTALL), found[f"told:{fault}"]["told"]


def test_no_group() -> None:
    from implicitdiff import BackendError
    from implicitdiff.backends.torch import TorchBackend

    with pytest.raises(BackendError, match="init_process_group"):
        TorchBackend(group=True)


def rendezvous() -> dict[str, str]:
    """What torchrun would put into the environment."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "{}", "WORLD_SIZE": "2"}


@pytest.mark.exhaustive
def test_documented_example() -> None:
    """The example of the documentation, started as torchrun starts it."""
    example = str(EXAMPLES / "torch_data_parallel.py")
    for rank, text in enumerate(in_two([example], [example], **rendezvous())):
        found = re.search(r"rank (\d): error (\S+), iterations (\d+) and (\d+)", text)
        assert found, text
        assert int(found[1]) == rank
        assert float(found[2]) <= 1e-10
        assert found[3] == found[4]


# -- DTensor -----------------------------------------------------------------------------------------------
SPREAD = [
    *(f"{layout}:objective:cg" for layout in ("features", "outputs", "examples")),
    *(f"{layout}:grad:cg" for layout in ("features", "outputs", "examples")),
    *(f"{layout}:given:cg" for layout in ("features", "outputs", "examples")),
    "features:objective:minres", "features:root:cg", "examples:objective:minres",
]  # fmt: skip
SPREAD_FAULTS = {
    "lu": "BackendError: .*concatenate", "cholesky": "BackendError: .*concatenate",
    "auto": "BackendError: .*concatenate",
    "jacobian": "BackendError: .*concatenate", "gmres": "BackendError: .*gmres keeps a basis",
    "nan": r"NonFiniteError: cotangent\['w'\]", "detached": "DerivativeError: .*recording",
    "indefinite": "NotPositiveDefiniteError",
}  # fmt: skip


@pytest.fixture(scope="module")
def spread(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of two processes found with tensors spread over both."""
    return [
        {name.removeprefix("dtensor:"): value for name, value in found.items() if name.startswith("dtensor:")}
        for found in results
    ]


@pytest.mark.parametrize("case", cases(SPREAD))
def test_dtensors(spread: list[dict[str, Any]], case: str) -> None:
    """Derivatives of one process, in as many iterations, each with the placements of what it belongs to."""
    for found in spread:
        assert found[case]["error"] <= 1e-10
        assert found[case]["kept"] is True
        assert found[case]["iterations"] == spread[0][case]["iterations"]
    pairs = zip(spread[0][case]["iterations"], spread[0][case]["alone"], strict=True)
    assert all(abs(a - b) <= 1 and a > 3 for a, b in pairs)


def test_bare_dtensor(spread: list[dict[str, Any]]) -> None:
    """One tensor of one axis; a sum over processes that a product leaves to be made is made."""
    for found in spread:
        assert found["bare"]["error"] <= 1e-10
        assert found["bare"]["kept"] is True
        assert found["bare"]["partial"] is True


@pytest.mark.parametrize("fault", SPREAD_FAULTS)
def test_faults_of_dtensors(spread: list[dict[str, Any]], fault: str) -> None:
    """What would gather is refused, and what one process sees is told in both."""
    for found in spread:
        assert re.match(SPREAD_FAULTS[fault], found[f"told:{fault}"]["told"], re.DOTALL), found[f"told:{fault}"]["told"]


@pytest.mark.exhaustive
def test_documented_dtensor_example() -> None:
    """The example of the documentation, started as torchrun starts it."""
    example = str(EXAMPLES / "torch_dtensor.py")
    for rank, text in enumerate(in_two([example], [example], **rendezvous())):
        found = re.search(r"rank (\d): error (\S+), placements kept: (\w+), iterations (\d+) and (\d+)", text)
        assert found, text
        assert int(found[1]) == rank
        assert float(found[2]) <= 1e-10
        assert found[3] == "True"
        assert found[4] == found[5]
