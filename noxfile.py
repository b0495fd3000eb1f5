"""Every chore of the project, one session each: ``python3 noxfile.py -s tests``, or ``nox -s tests`` where nox is.

Run as a script on a machine that has nothing but Python, it first makes itself a virtual environment with nox in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NOX = "nox>=2025.2.9"


def bootstrap() -> int:
    """Run nox from a virtual environment of its own, made at the first call; return its exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            f"noxfile.py: Python 3.11 or later is needed, this is {sys.version.split()[0]}: python3.12 noxfile.py ..."
        )
    home = ROOT / ".nox" / "bootstrap"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or subprocess.call([python, "-c", "import nox"], stderr=subprocess.DEVNULL):
        import venv  # Debian ships Python without it

        print(f"noxfile.py: setting up nox in {home}", flush=True)
        venv.create(home, clear=True, with_pip=True)
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", NOX])
    return subprocess.call([python, "-m", "nox", "-f", __file__, *sys.argv[1:]])


try:
    import nox
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    try:
        sys.exit(bootstrap())
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"noxfile.py: cannot set up nox ({error}).\nPython needs venv and pip: on Debian, apt install python3-venv."
        )

nox.needs_version = NOX.removeprefix("nox")
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_venv = "yes"

PYTHONS = ["3.11", "3.12", "3.13"]


def install(session: nox.Session, *what: str) -> None:
    """Install under constraints.txt: what is pinned there is pinned in every session."""
    session.install("-c", "constraints.txt", *what)


def run_tests(session: nox.Session, *options: str) -> None:
    """Run the suite on up to four processes of one BLAS thread each; what follows ``--`` goes to pytest."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    threads["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
    workers = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")  # tests take from 1 ms to 20 s
    session.run("python", "-m", "pytest", *workers, *options, *session.posargs, env={"MPLBACKEND": "Agg", **threads})


def tests(session: nox.Session) -> None:
    """Run the test suite: ``tests`` with the Python that runs nox, ``tests-3.12`` with that one."""
    install(session, "-e", ".[test,torch,jax]", "optax>=0.2")  # whose optimizers `bilevel` takes
    run_tests(session)


nox.session(tests)
for version in PYTHONS:
    nox.session(tests, name=f"tests-{version}", python=version)


def lowest(*extras: str) -> list[str]:
    """Pins at the lower bounds of the required dependencies and of some extras, read from pyproject.toml."""
    import tomllib

    from packaging.requirements import Requirement  # comes with nox

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    pins = []
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:  # an extra made of extras
            pins += lowest(*sorted(requirement.extras))
            continue
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"pyproject.toml: {requirement} needs one lower bound (>=)")
        pins.append(f"{requirement.name}=={bounds[0]}")
    return sorted(set(pins))


@nox.session
def quick(session: nox.Session) -> None:
    """Run each choice of each test once, in a few minutes: without JAX, or on what ``-- --backend jax`` names."""
    install(session, "-e", ".[test,torch,jax]")
    chosen = any(option.startswith("--backend") for option in session.posargs)
    libraries = () if chosen else ("--backend", "numpy", "--backend", "array_api_strict", "--backend", "torch")
    run_tests(session, "--cover", "1", "--ignore-glob=*/test_gallery_*", *libraries)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """Run the full product of what the tests choose from, and the generated cases of ``fuzz``; takes hours."""
    install(session, "-e", ".[test,torch,jax]")
    run_tests(session, "--exhaustive")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Run 10 000 random problems on each framework, and some thousand in random units; takes an hour or two."""
    install(session, "-e", ".[test,torch,jax]")
    run_tests(session, "--exhaustive", "tests/test_fuzz.py", "tests/test_units.py")


@nox.session
def coverage(session: nox.Session) -> None:
    """Report the lines and branches that the test suite runs; what follows ``--`` goes to pytest."""
    install(session, "-e", ".[test,torch,jax]", "pytest-cov")
    run_tests(session, "--cov", "--cov-report=term-missing:skip-covered")


@nox.session
def mutation(session: nox.Session) -> None:
    """Change the solvers and the rules, an operator or a number at a time, and list what no test notices.

    ``-- implicitdiff/solvers/cg.py`` names the files, ``-- 100`` how many changes are tried of each, drawn by chance.
    """
    install(session, "-e", ".[test]", "cosmic-ray")
    limits = [word for word in session.posargs if word.isdigit()]
    files = [word for word in session.posargs if word not in limits]
    python = str(Path(session.virtualenv.bin) / "python")
    session.run("python", "tests/mutation.py", python, session.create_tmp(), *limits[:1] or ["0"], *files)


# The oldest NumPy supported has no wheels for Python 3.13.
@nox.session(python=None if sys.version_info < (3, 13) else "3.11")
def minimums(session: nox.Session) -> None:
    """Run each choice of the tests once with the lowest versions that are allowed, and without the frameworks."""
    pins = Path(session.create_tmp()) / "minimums.txt"
    pins.write_text("\n".join(lowest("test")) + "\n", encoding="utf-8")
    install(session, "-c", str(pins), "-e", ".[test]")
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    # of Torch and JAX, or of the source and not of what is installed beside it
    others = ("--deselect=README.md::README.md", "--ignore=docs/frameworks.md", "--ignore=docs/networks.md",
              "--ignore-glob=*/test_gallery_*", "--ignore=tests/test_structure.py")  # fmt: skip
    # an old release may use what a newer one of something else calls deprecated
    run_tests(session, "--cover", "1", *others, "-W", "ignore::DeprecationWarning")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: those of the package, and those that a user sees."""
    install(session, "-e", ".[test,torch,jax]", "mypy")
    session.run("mypy")
    session.run("python", "-m", "pytest", "--exhaustive", "tests/test_typing.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html and run its gallery; a warning is an error."""
    install(session, "-e", ".[docs,torch,jax]")
    command = ("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run(*command, *session.posargs, env={"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """Tune one penalty per feature on real data, and plot it; what follows ``--`` goes to the demo."""
    install(session, "-e", ".[demo,plot]")
    options = ["--plot", "demo.png", *session.posargs]  # of a repeated option the last one counts
    session.run("python", "-m", "implicitdiff", "demo", *options, env={"MPLBACKEND": "Agg"})


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks on tiny sizes; what follows ``--`` replaces that: ``-- run`` measures."""
    install(session, "-e", ".[autograd,torch,jax,demo,qp]")
    everything = ["run", "--short", "--backends", "numpy,torch,jax", "--problems", "all"]
    quickly = {} if session.posargs else {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # most is compilation
    session.run("python", "-m", "benchmarks", *(session.posargs or everything), env=quickly)


if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, "-m", "nox", "-f", __file__, *sys.argv[1:]]))
