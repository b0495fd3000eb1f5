"""What users hold prints briefly, compares without raising, and can be copied and pickled."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import JAX, NUMPY, STRICT, TORCH, Library

from implicitdiff import (
    CG,
    KKT,
    LU,
    QP,
    Auto,
    DerivativeCheck,
    FixedPoint,
    LogBarrier,
    ProjectedGradient,
    ProximalGradient,
    Report,
    Root,
    SingularError,
    Stationary,
    Status,
    check_derivatives,
    check_regularity,
    compare_solvers,
    implicit_function,
    implicit_vjp,
    linearize,
)

ONE = np.ones(2)
LIBRARIES = (NUMPY, STRICT, *TORCH, *JAX)


def cubic(y: Any, theta: Any) -> Any:
    return y**3 - theta


def squares(y: Any, theta: Any) -> Any:
    return ((y - theta) ** 2).sum()


def slope(y: Any, theta: Any, v: Any) -> Any:
    return 3 * y**2 * v


def minus(y: Any, theta: Any, v: Any) -> Any:
    return -v


def bound(y: Any, theta: Any) -> Any:
    return y - 3.0


def clipped(x: Any, theta: Any) -> Any:
    return np.clip(x, 0.0, 1.0)


def shrunk(x: Any, theta: Any, step: Any) -> Any:
    return x / (1 + step)


ROOT = Root(cubic, jvp=slope, vjp=slope, mixed_vjp=minus, mixed_jvp=minus, verify=False)


@implicit_function(Root(cubic))
def cube_root(theta: Any) -> Any:
    return theta ** (1 / 3)


HELD: dict[str, tuple[Callable[[], Any], str]] = {
    "Stationary": (lambda: Stationary(squares, kind="minimum"), "Stationary(fun=squares, kind='minimum')"),
    "Root": (lambda: Root(cubic, verify=False), "Root(fun=cubic, verify=False)"),
    "FixedPoint": (lambda: FixedPoint(cubic), "FixedPoint(fun=cubic)"),
    "KKT": (
        lambda: KKT(squares, ineq=bound, multipliers=np.ones(2)), "KKT(f=squares, ineq=bound, multipliers=float64[2])"
    ),
    "LogBarrier": (lambda: LogBarrier(squares, bound, t=8.0), "LogBarrier(f=squares, ineq=bound, t=8)"),
    "QP": (lambda: QP(Q=np.eye(2), q=np.ones(2)), "QP(Q=float64[2, 2], q=float64[2])"),
    "ProjectedGradient": (
        lambda: ProjectedGradient(squares, clipped), "ProjectedGradient(fun=squares, projection=clipped)"
    ),
    "ProximalGradient": (lambda: ProximalGradient(squares, shrunk), "ProximalGradient(fun=squares, prox=shrunk)"),
    "CG": (lambda: CG(rtol=1e-6, preconditioner=np.eye(2)), "CG(rtol=1e-06, preconditioner=float64[2, 2])"),
    "LU": (LU, "LU()"),
    "Auto": (lambda: Auto(damping=0.5), "Auto(damping=0.5)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_conditions_and_solvers(name: str) -> None:
    """Equal by what they are made of, arrays included; shown as they were written."""
    make, shown = HELD[name]
    made = make()
    assert repr(made) == shown
    assert made == make()
    assert made not in (None, Root(squares), CG(maxiter=7))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other == made
        assert repr(other) == shown


def test_conditions_without_arrays_are_keys() -> None:
    assert {Root(cubic): 1, CG(): 2}[Root(cubic)] == 1
    assert len({Root(cubic), Root(squares), FixedPoint(cubic)}) == 3


def reports() -> dict[str, Report]:
    single = linearize(Root(cubic), np.array([2.0]), np.array([8.0]))
    single.vjp(np.ones(1))
    batch = linearize(Root(cubic), np.ones((3, 2)), np.ones((3, 2)), batched=True)
    batch.vjp(np.ones((3, 2)))
    assert single.report is not None
    assert batch.report is not None
    return {"single": single.report, "batch": batch.report}


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_reports(kind: str) -> None:
    report = reports()[kind]
    assert report == dataclasses.replace(report, residual=copy.copy(report.residual))
    assert report != dataclasses.replace(report, residual=report.residual + 1)
    for same in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert same == report
        np.testing.assert_array_equal(same.solution, report.solution)
    assert len(repr(report)) < 100
    assert repr(report).startswith("Report(CONVERGED" if kind == "single" else "Report(3 of 3 converged")
    page = report._repr_html_()
    assert page.startswith("<table><caption>Report</caption>")
    assert "<td>matvecs</td>" in page


def test_tables_in_a_notebook() -> None:
    given = Stationary(grad=lambda y, theta: y**3 - theta, hvp=lambda y, theta, v: 3 * y**2 * v)
    found = check_derivatives(given, ONE, ONE)
    assert found == found
    assert "<td>hvp</td>" in found._repr_html_()
    assert "nothing to compare" in DerivativeCheck([])._repr_html_()
    for thing in (
        found,
        check_regularity(squares, ONE, ONE),
        compare_solvers(squares, squares, ONE, ONE, solvers=("lu",), repeats=1),
    ):
        assert str(pickle.loads(pickle.dumps(thing))) == str(copy.deepcopy(thing)) == str(thing)


def test_errors_carry_their_report() -> None:
    with pytest.raises(SingularError) as caught:
        implicit_vjp(Root(lambda y, theta: 0 * y - theta + 1), ONE, ONE, ONE, solver="lu")
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert error.report == caught.value.report
    assert error.report.status == Status.SINGULAR
    assert error.value.shape == (2,)


@pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.name)
def test_linearizations(lib: Library) -> None:
    """Copies solve again and know the last report; factors and programs are made anew."""
    one = lib.array([1.0, 1.0])
    try:
        copy.deepcopy(one)
    except TypeError:
        pytest.skip(f"this release of {lib.name} cannot copy its arrays")
    lin = linearize(ROOT, lib.array([1.0, 2.0]), lib.array([1.0, 8.0]), solver="lu")
    assert repr(lin).startswith("Linearization(condition=Root(fun=cubic, jvp=slope")
    assert repr(lin).endswith("solver='lu')")
    expected = lib.numpy(lin.vjp(one))
    assert "CONVERGED" in repr(lin)
    for other in (copy.deepcopy(lin), pickle.loads(pickle.dumps(lin))):
        assert other.report == lin.report
        np.testing.assert_array_equal(lib.numpy(other.vjp(one)), expected)


def test_functions_of_users_that_cannot_be_pickled() -> None:
    lin = linearize(lambda y, theta: squares(y, theta), ONE, ONE)
    assert copy.deepcopy(lin).jvp(ONE) == pytest.approx(ONE)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(lin)


def test_wrapped_functions() -> None:
    assert repr(cube_root) == "<implicit_function cube_root of Root(fun=cubic)>"
    assert pickle.loads(pickle.dumps(cube_root)) is cube_root
    assert copy.deepcopy(cube_root) is cube_root
    other = implicit_function(Root(cubic), solver="lu")(np.cbrt)
    for again in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        assert again is not other
        assert again.jacobian(np.array([8.0])) == pytest.approx(1 / 12)
