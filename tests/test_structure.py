"""The shape of the source: imports run one way, nothing heavy is imported, names and sizes."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

import implicitdiff
from benchmarks.structure import walk

ROOT = Path(__file__).resolve().parents[1]
CORE, BACKENDS = ROOT / "implicitdiff", ROOT / "backends"

# From the leaves up. A module may import what stands on an earlier line, and of its own line what makes no cycle.
LAYERS = (
    (
        "errors",
        "mode",
        "tolerances",
        "arrays",
        "pytree",
        "compilers",
        "closures",
        "namespaces",
        "records",
        "plotting",
        "error_estimate",
        "identities",
    ),
    ("outcome", "failures"),
    ("projections", "proxes"),
    ("linalg.__init__", "linalg.vector_space", "linalg.host_space", "ravel", "registry", "axes", "programs"),
    ("linalg.operator", "problem"),
    (
        "linalg.block_operator",
        "linalg.gram_operator",
        "linalg.equilibration",
        "linalg.blocks",
        "linalg.rows",
        "linalg.segments",
        "linalg.coloring",
        "linalg.interned",
        "linalg.pattern",
        "linalg.entries",
        "linalg.detection",
        "linalg.sparsity",
        "linalg.sparse_map",
    ),
    ("linalg.preconditioner", "linalg.rectangular", "linalg.damping", "linalg.determined"),
    ("solvers",),
    ("linalg.solve", "linalg.reports", "solution_check"),
    (
        "problem",
        "conditions",
        "verification",
        "curvature",
        "certificate",
        "estimates",
        "accuracy",
        "polishing",
        "rules",
        "least_norm",
        "runs",
        "covariance",
        "typing",
        "diagnosis",
        "linearization",
        "linalg.system",
    ),
    ("decorator", "api", "quadratic", "outer"),
    ("tools.__init__", "tools.regularity", "tools.comparison", "tools.comparison_plot", "tools.derivative_check"),
    ("testing",),
    ("__init__",),
    ("tools.demo", "tools.demo_problem", "tools.demo_plot", "tools.command_line"),
    ("__main__",),
)
PUBLIC_MODULES = {"projections", "proxes"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
BUILD_ON_ARRAY_API = {"numpy", "torch", "jax", "cupy"}
HELPERS = {"base", "curvature", "differences", "lending", "noise", "sampling", "sizes", "steps", "autograd"}


def module_name(path: Path) -> str:
    """Dotted name under which a file of the tree is imported."""
    top = ("implicitdiff", "backends") if path.is_relative_to(BACKENDS) else ("implicitdiff",)
    base = BACKENDS if path.is_relative_to(BACKENDS) else CORE
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join((*top, *parts)).removesuffix(".__init__")


def core_files() -> list[Path]:
    """Return the files of the core: those under the link to backends/ are not part of it."""
    return sorted(p for p in CORE.rglob("*.py") if not p.is_relative_to(CORE / "backends"))


SOURCES = {module_name(path): path for path in (*core_files(), *sorted(BACKENDS.rglob("*.py")))}
CORE_MODULES = [name for name in SOURCES if not name.startswith("implicitdiff.backends")]
ADAPTERS = [name for name in SOURCES if name.startswith("implicitdiff.backends.")]


@functools.cache
def parsed(name: str) -> ast.Module:
    """Syntax tree of a module."""
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def resolve(name: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    """Modules of this package that an import statement of module `name` loads by name."""
    if isinstance(node, ast.Import):
        targets = {alias.name for alias in node.names}
    else:
        assert node.level == 0, f"{name}:{node.lineno}: relative import"
        source = node.module or ""
        # ``from package import thing`` loads package.thing where that is a module
        targets = {f"{source}.{a.name}" if f"{source}.{a.name}" in SOURCES else source for a in node.names}
    return {t for t in targets if t.partition(".")[0] in {"implicitdiff", "backends"}}


def imports(name: str) -> set[str]:
    """Modules of this package that a module imports when it runs, at its top or inside its functions."""
    tree = parsed(name)
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    never_run = {id(n) for block in for_types for n in ast.walk(block)}
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) not in never_run]
    return set().union(*(resolve(name, node) for node in nodes))


def layer(name: str) -> str:
    """What the layers speak of: a file or folder under the package, or a file in a folder of several layers."""
    if name == "implicitdiff":
        return "__init__"
    short = name.removeprefix("implicitdiff.")
    if f"{short}.__init__" in RANK:
        return f"{short}.__init__"
    return short if short in RANK else short.split(".")[0]


def test_sources_are_found() -> None:
    """The other tests here look at the files that there are."""
    assert {
        "implicitdiff",
        "implicitdiff.linalg.solve",
        "implicitdiff.solvers.cg",
        "implicitdiff.backends.numpy",
    } <= set(SOURCES)
    assert imports("implicitdiff.linalg.solve") >= {"implicitdiff.arrays", "implicitdiff.solvers"}


@pytest.mark.parametrize("name", CORE_MODULES)
def test_imports_run_one_way(name: str) -> None:
    """A module imports only from its own layer or one below."""
    assert layer(name) in RANK, f"{name} has no layer: give it one in LAYERS"
    upward = {t for t in imports(name) if RANK.get(layer(t), -1) > RANK[layer(name)]}
    assert not upward, f"{name} imports from a layer above: {sorted(upward)}"


def test_no_import_cycle() -> None:
    """No modules import one another in a circle, lazily or not (a package counts as its ``__init__``)."""
    graph = {name: imports(name) & set(SOURCES) for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("name", CORE_MODULES)
def test_core_names_no_backend(name: str) -> None:
    """The core reaches a backend by name, in registry.py, and never by an import statement."""
    assert not {t for t in imports(name) if t.startswith("implicitdiff.backends")}
    docstrings = {id(node) for node in docstring_nodes(parsed(name))}
    named = [
        node.value
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if node.value.startswith("implicitdiff.backends")
    ]
    assert bool(named) == (name == "implicitdiff.registry"), f"{name} names {named}"


def docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that stand as statements: docstrings, also of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def layer_of_backend(name: str) -> str:
    """Name of a backend's file or folder."""
    return name.split(".")[2]


@pytest.mark.parametrize("name", ADAPTERS)
def test_backends_stand_alone(name: str) -> None:
    """No backend imports another, but for those that build on array_api, and their helpers."""
    own = layer_of_backend(name)
    targets = {layer_of_backend(t) for t in imports(name) if t.startswith("implicitdiff.backends.")}
    allowed = HELPERS | ({"array_api"} if own in BUILD_ON_ARRAY_API else set())
    family = own.partition("_")[0]
    allowed |= {t for t in map(layer_of_backend, ADAPTERS) if t.partition("_")[0] == family == "numpy"}
    assert targets - {own} <= allowed
    assert not any(t.partition(".")[0] == "backends" for t in imports(name)), "import implicitdiff.backends, absolutely"


def test_lending_names_no_framework() -> None:
    """What lends one framework's autodiff to another reaches both by name only: it imports the core and no adapter."""
    lending = "implicitdiff.backends.lending"
    assert not {t for t in imports(lending) if t.startswith("implicitdiff.backends")}
    nodes = [n for n in ast.walk(parsed(lending)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    roots = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots |= {(node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert roots <= {"implicitdiff", *sys.stdlib_module_names}
    assert "implicitdiff.registry" in imports(lending)


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_loads_no_framework() -> None:
    """All that is public loads nothing but itself on top of NumPy, SciPy's linalg and the standard library."""
    result = run_python(
        "import sys, numpy, scipy.linalg\n"
        "before = set(sys.modules)\n"
        "from implicitdiff import *\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names))\n"
    )
    assert result.returncode == 0, result.stderr
    new = result.stdout.split()
    assert "implicitdiff.linalg.solve" in new
    known = {"implicitdiff"} if hasattr(np, "unstack") else {"implicitdiff", "array_api_compat"}  # NumPy before 2.1
    assert [m for m in new if m.partition(".")[0] not in known or m.startswith("implicitdiff.backends.")] == []


def test_import_loads_what_is_used() -> None:
    """``import implicitdiff`` by itself loads nothing; a name brings its module, and one that there is not is none."""
    result = run_python(
        "import sys, numpy, scipy.linalg\n"
        "before = set(sys.modules)\n"
        "import implicitdiff\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "implicitdiff.SolveError\n"
        "print('implicitdiff.errors' in sys.modules, 'implicitdiff.linearization' in sys.modules)\n"
        "print(implicitdiff.testing.check_solver.__name__, hasattr(implicitdiff, 'implicit_gradient'))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["implicitdiff", "True False", "check_solver False"]


def test_import_of_the_folder_is_refused() -> None:
    """``import backends`` from the root would load every adapter a second time."""
    result = run_python("import backends")
    assert result.returncode != 0
    assert "ImportError: import implicitdiff.backends" in result.stderr


def test_backends_folder_is_the_link() -> None:
    """The link makes the checkout complete for mypy, pytest and an import at the root."""
    link = CORE / "backends"
    assert link.is_symlink(), "implicitdiff/backends must be the link to ../backends"
    assert link.readlink() == Path("../backends")


def test_all_is_sorted_and_importable() -> None:
    """``__all__`` is sorted as ruff sorts it, without doubles, and every name of it is there."""
    names = implicitdiff.__all__

    def isort_style(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert names == sorted(set(names), key=isort_style)
    assert [name for name in names if not hasattr(implicitdiff, name)] == []


def test_all_is_complete() -> None:
    """Every class and function that ``__init__`` imports is public, and every error and warning is."""
    for_types = next(node for node in parsed("implicitdiff").body if isinstance(node, ast.If))
    imported = {
        (alias.asname or alias.name, node.module)
        for node in for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, _ in imported} == set(implicitdiff.__all__)
    for name, module in imported:
        if module != "implicitdiff":
            assert getattr(implicitdiff, name) is getattr(importlib.import_module(module), name), name
    assert set(importlib.import_module("implicitdiff.errors").__all__) <= set(implicitdiff.__all__)
    public = {
        name for name in dir(implicitdiff)
        if not name.startswith("_") and (name in PUBLIC_MODULES or not inspect.ismodule(getattr(implicitdiff, name)))
    }  # fmt: skip
    assert public == set(implicitdiff.__all__)


@pytest.mark.parametrize("name", CORE_MODULES)
def test_every_all_is_true(name: str) -> None:
    """What a module lists in ``__all__`` is there."""
    if layer(name) == "__main__":
        return
    module = importlib.import_module(name)
    assert [item for item in getattr(module, "__all__", ()) if not hasattr(module, item)] == []


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`implicitdiff.linearize` must always be the function."""
    functions = {name for name in implicitdiff.__all__ if isinstance(getattr(implicitdiff, name), FunctionType)}
    assert len(functions) >= 7
    assert functions.isdisjoint(name.rpartition(".")[2] for name in SOURCES)


def functions_in(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, those of the docstring not counted."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


@pytest.mark.parametrize("name", SOURCES)
def test_sizes(name: str) -> None:
    """Files of up to 400 lines, functions of up to 40."""
    lines = SOURCES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{SOURCES[name]}: {lines} lines"
    long = {f.name: length(f) for f in functions_in(parsed(name)) if length(f) > 40}
    assert not long, f"{SOURCES[name]}: {long}"


def test_every_class_of_faults_has_its_tests() -> None:
    """The first line of a file of tests names the classes of faults that it is about: ``FAULTS 1 to 11, 13 and 70``."""
    about: set[int] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        numbers = re.match(r'"""faults? ([0-9, and to]+)', path.read_text(encoding="utf-8"), re.IGNORECASE)
        for low, high in re.findall(r"(\d+)(?: to (\d+))?", numbers[1]) if numbers else ():
            about.update(range(int(low), int(high or low) + 1))
    assert about == set(range(1, 79))


def test_tolerances_are_in_one_file() -> None:
    """Nothing is compared with a small number that is written there and then."""
    for name in (name for name in SOURCES if not name.endswith((".tolerances", ".demo", ".demo_problem"))):
        compared = (node for node in ast.walk(parsed(name)) if isinstance(node, ast.Compare))
        numbers = [n for node in compared for n in ast.walk(node) if isinstance(n, ast.Constant)]
        assert not [(name, n.lineno) for n in numbers if type(n.value) is float and 0 < n.value < 0.05]


def test_the_way_of_a_gradient_is_short() -> None:
    """What `benchmarks.structure` counts does not grow unseen."""
    found = walk()
    assert found["frames to a product"] <= 16
    assert found["functions in a gradient"] <= 229
    assert found["files in a gradient"] <= 36
