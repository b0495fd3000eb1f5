"""What is built and installed is whole: a wheel, and a wheel made from an sdist."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (".*", "*.egg-info", "__pycache__", "build", "dist", "_build")
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
SETUPTOOLS = "77.0.3"  # the bound of pyproject.toml

CHECK = """
import importlib, pkgutil
import numpy as np
import implicitdiff
from implicitdiff import Stationary, implicit_vjp

modules = [m.name for m in pkgutil.walk_packages(implicitdiff.__path__, "implicitdiff.")]
frameworks = {"cupy", "jax", "torch"}
for name in modules:
    if not name.endswith(".__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in frameworks:
                raise
given = Stationary(grad=lambda y, t: y - t**2)
assert np.allclose(implicit_vjp(given, np.array([9.0]), np.array([3.0]), np.ones(1)), 6.0)
print(implicitdiff.__file__)
print(*sorted(modules))
"""

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Run a command and return its output; what a failed one wrote is shown."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python whose setuptools can build the project: this one, else one of a new environment."""
    have, need = (
        tuple(int(part) for part in version.split(".")[:3])
        for version in (importlib.metadata.version("setuptools"), SETUPTOOLS)
    )
    if have >= need:
        return Path(sys.executable)
    home = tmp_path_factory.mktemp("builder")
    run(sys.executable, "-m", "venv", home, cwd=home)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", f"setuptools>={SETUPTOOLS}", cwd=home)
    return python


@pytest.fixture(scope="module", params=[pytest.param("tree", marks=pytest.mark.exhaustive), "sdist"])
def wheel(request: pytest.FixtureRequest, builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, built from a copy of the tree or from an sdist of that copy."""
    work = tmp_path_factory.mktemp(request.param)
    source = work / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    if request.param == "sdist":
        archive = run(builder, "-c", BUILD, "build_sdist", work, cwd=source).splitlines()[-1]
        shutil.unpack_archive(work / archive, work / "unpacked", filter="data")
        source = work / "unpacked" / archive.removesuffix(".tar.gz")
    return work / run(builder, "-c", BUILD, "build_wheel", work, cwd=source).splitlines()[-1]


def sources() -> set[str]:
    """Files that belong in a wheel, by their path in it."""
    core = {p.relative_to(ROOT) for p in (ROOT / "implicitdiff").rglob("*.py")}
    inside = {p.as_posix() for p in core if p.parts[1] != "backends"}
    backends = {f"implicitdiff/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "backends").rglob("*.py")}
    return inside | backends | {"implicitdiff/py.typed"}


def test_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    """A subpackage that pyproject.toml does not list is dropped without a word."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    about = metadata.rpartition("/")[0]
    assert {name for name in names if not name.startswith(f"{about}/")} == sources()
    assert f"{about}/licenses/LICENSE" in names
    assert len(names) == len(set(names))
    assert "\nRequires-Python: >=3.11\n" in text


def test_installed_wheel_works_outside_and_at_the_root(wheel: Path, tmp_path: Path) -> None:
    """From outside it is the installed package that answers, at the root the checkout; both are whole."""
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    script = tmp_path / "check.py"
    script.write_text(CHECK, encoding="utf-8")
    # NumPy comes from this environment and the package from the target, behind the folder that Python is started in
    start = f"import sys; sys.path.insert(1, {str(target)!r}); exec(open({str(script)!r}).read())"
    outside, modules = run(sys.executable, "-c", start, cwd=tmp_path).splitlines()
    assert Path(outside) == target / "implicitdiff" / "__init__.py"
    at_root, modules_at_root = run(sys.executable, "-c", start, cwd=ROOT).splitlines()
    assert Path(at_root) == ROOT / "implicitdiff" / "__init__.py"
    assert modules.split() == modules_at_root.split()
    assert "implicitdiff.backends.numpy" in modules.split()


def test_editable_install_is_a_path(builder: Path, tmp_path: Path) -> None:
    """Type checkers and editors follow a folder that is named, and run no code to find a package."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    with zipfile.ZipFile(
        tmp_path / run(builder, "-c", BUILD, "build_editable", tmp_path, cwd=source).split()[-1]
    ) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        named = Path(wheel.read(path).decode().strip())
    assert named.samefile(source)
    assert (named / "implicitdiff" / "py.typed").is_file()
    assert (named / "implicitdiff" / "backends" / "__init__.py").is_file()
