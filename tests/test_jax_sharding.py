"""FAULTS 74: JAX past one device: the leaves keep their sharding, and nothing is gathered."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples_distributed" / "jax_sharded.py"
MAPPED = Path(__file__).with_name("distributed_jax.py")
SCALING = Path(__file__).with_name("scaling_jax.py")
LINE = re.compile(r"(\w+): error (\S+), sharding kept: (\w+), gathers in the program: (\d+), sums: (\w+)")


def printed(script: Path, devices: int, *arguments: str) -> str:
    """What a script prints, on that many devices made of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True, text=True, env=environment, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def lines() -> dict[str, tuple[str, ...]]:
    """What the documented example prints."""
    return {found[1]: found.groups() for found in LINE.finditer(printed(EXAMPLE, 8))}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["examples", "features"])
def test_sharded_gradient(lines: dict[str, tuple[str, ...]], layout: str) -> None:
    """The gradient is that of one device; the compiled program sums over devices, and gathers nothing."""
    _, error, kept, gathers, sums = lines[layout]
    assert float(error) <= 1e-10
    assert kept == "True"
    assert gathers == "0"
    assert sums == "True"


@pytest.mark.slow
@pytest.mark.parametrize("solvers", ["lu cg gmres", *(pytest.param(more, marks=pytest.mark.exhaustive)
                for more in ("cholesky minres auto", "bicgstab truncated chebyshev"))])  # fmt: skip
def test_inside_shard_map(solvers: str) -> None:
    """Inside of ``shard_map``, with the checks of what varies over devices that JAX makes by default."""
    cases = dict(line.rsplit(": ", 1) for line in printed(MAPPED, 4, *solvers.split()).splitlines())
    assert len(cases) == 6  # three solvers, a wrapped one, a sum over devices in the objective, a dense Jacobian
    assert all(float(error) <= 1e-12 for error in cases.values()), cases


@pytest.mark.slow
def test_weak_scaling_in_counted_work() -> None:
    """Eight devices with eight times the problem: each does what one alone does, and nothing is gathered."""
    found = re.findall(r"(\w+): weak scaling (\S+), gathers (\d+)", printed(SCALING, 8))
    assert [name for name, *_ in found] == ["examples", "outputs"]
    for _, scaling, gathers in found:
        assert float(scaling) >= 0.9
        assert gathers == "0"
