"""Public signatures: what a strict type checker makes of a user's script, and what Python itself says of options."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import implicitdiff
from implicitdiff import Auto, Root, implicit_function, linear_solve, outcome
from implicitdiff.typing import DEFAULTS, OnFailure, SolverName

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
[mypy]
strict = True
mypy_path = {root}
[mypy-implicitdiff.*]
ignore_errors = True
"""
LINEAR = Root(lambda y, theta: y - theta)
CALLS = {
    "implicit_grad": (LINEAR, np.ones(2), np.ones(2), np.ones(2)),
    "implicit_vjp": (LINEAR, np.ones(2), np.ones(2), np.ones(2)),
    "implicit_jvp": (LINEAR, np.ones(2), np.ones(2), np.ones(2)),
    "implicit_jacobian": (LINEAR, np.ones(2), np.ones(2)),
    "linearize": (LINEAR, np.ones(2), np.ones(2)),
    "linear_solve": (np.eye(2), np.ones(2)),
    "implicit_function": (LINEAR,),
}


@pytest.mark.exhaustive  # the session `types` runs it
def test_a_user_sees_real_types(tmp_path: Path) -> None:
    """One strict run over `typed_user.py`, in which results are asserted, and mistakes have to be found."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "mypy.ini").write_text(CONFIG.format(root=ROOT), encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "user"
    out, err, status = api.run(
        ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(cache), str(ROOT / "tests" / "typed_user.py")]
    )
    assert status == 0, out + err


@pytest.mark.parametrize("name", CALLS)
def test_unknown_options_are_told(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'solvr'$"):
        getattr(implicitdiff, name)(*CALLS[name], solvr="lu")


@pytest.mark.parametrize("name", CALLS)
def test_signatures_spell_options_out(name: str) -> None:
    """For ``help``, notebooks and the documentation; each with its default and its type."""
    parameters = inspect.signature(getattr(implicitdiff, name)).parameters
    assert {"solver", "on_failure", "backend", "batched"} <= parameters.keys()
    assert ("x0" in parameters) is (name in {"implicit_grad", "implicit_vjp", "implicit_jvp", "linear_solve"})
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert {n: p.default for n, p in parameters.items() if n in DEFAULTS}.items() <= DEFAULTS.items()
    assert parameters["solver"].annotation == "SolverName | str | SolverLike"


def test_literals_are_the_names_that_there_are() -> None:
    assert set(get_args(OnFailure)) == set(outcome.MODES)
    built_in = [
        cls
        for cls in (getattr(implicitdiff, name) for name in implicitdiff.__all__)
        if inspect.isclass(cls) and "name" in vars(cls)
    ]
    assert set(get_args(SolverName)) == {cls.name for cls in built_in if issubclass(cls, implicitdiff.Solver)} - {
        implicitdiff.Solver.name
    }


def test_an_instance_is_a_solver_as_well() -> None:
    np.testing.assert_allclose(linear_solve(np.eye(2), np.ones(2), solver=Auto()), 1.0)
    assert implicit_function(LINEAR, solver=Auto())(np.copy).vjp(np.ones(2), np.ones(2)) == pytest.approx(1.0)
