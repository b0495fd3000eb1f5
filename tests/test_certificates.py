"""``error``, ``max_error`` and ``polish`` as they are called: every entry, every library, every failure."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import NUMPY
from helpers_certificates import OFF, THETA, A, call, outer, root, solution, truth

from implicitdiff import (
    CG,
    GMRES,
    KKT,
    LU,
    MINRES,
    AccuracyWarning,
    ErrorEstimate,
    FixedPoint,
    InaccurateError,
    InputError,
    ProximalGradient,
    Root,
    SolveWarning,
    Stationary,
    implicit_jacobian,
    implicit_jvp,
    implicit_vjp,
    linearize,
    proxes,
)

pytestmark = pytest.mark.filterwarnings("ignore::implicitdiff.NotASolutionWarning")
modes = pytest.mark.parametrize("mode", ["gradient", "vjp", "jvp", "jacobian"])


# -- the estimate --------------------------------------------------------------------------------------------------
@modes
@pytest.mark.parametrize("solver", ["lu", "gmres", "auto"])
def test_the_error_is_estimated_and_its_correction_squares_it(lib, mode, solver):
    exact = truth()[mode]
    found, report = call(lib, mode, solver=solver, error=True, return_report=True)
    e, value = report.error, lib.numpy(found)
    off = np.linalg.norm(value - exact)
    assert isinstance(e, ErrorEstimate)
    assert 0.8 <= e.absolute / off <= 1.25
    assert e.relative == pytest.approx(e.absolute / np.linalg.norm(value))
    assert e.trusted is True
    assert e.doubt == ""
    assert 0 < e.contraction <= 0.25
    assert e.cause == "inner solution"
    assert list(e.parts) == ["inner solution", "linear solve", "finite differences", "rounding"]
    assert e.parts["inner solution"] == pytest.approx(e.absolute, rel=0.1)
    assert e.products > 0
    assert lib.owns(e.correction)
    assert np.linalg.norm(value - lib.numpy(e.correction) - exact) < 0.15 * off


def test_without_being_asked_there_is_none():
    assert call(NUMPY, "vjp", return_report=True)[1].error is None


def test_the_loss_is_corrected(lib):
    """L − uᵀF is the loss at the solution to second order."""
    f, y = outer(NUMPY), solution()
    value = call(lib, "gradient", error=True, return_report=True)[1].error.value
    first = abs(f(y + OFF, THETA) - f(y, THETA))
    assert abs(value - f(y, THETA)) < 0.05 * first


@modes
def test_polished_derivatives(lib, mode):
    exact, errors = truth()[mode], []
    for steps in (0, 1, 2):
        value, report = call(lib, mode, polish=steps, return_report=True)
        errors.append(np.linalg.norm(lib.numpy(value) - exact))
        if steps:
            assert np.linalg.norm(lib.numpy(report.polished_y) - solution()) < np.linalg.norm(OFF) ** (2**steps)
    assert errors[1] < 0.05 * errors[0]
    assert errors[2] < 1e-3 * errors[1]


@pytest.mark.slow(on=("array_api_strict",))
@modes
def test_polish_until_the_error_is_met(lib, mode):
    value, report = call(lib, mode, polish="auto", max_error=1e-3, return_report=True)
    assert report.error.relative <= 1e-3
    assert 1e-9 < np.linalg.norm(lib.numpy(value) - truth()[mode]) / np.linalg.norm(truth()[mode]) < 2e-3
    value = call(lib, mode, polish="auto")
    np.testing.assert_allclose(lib.numpy(value), truth()[mode], rtol=1e-12, atol=1e-12)


def test_polish_that_does_not_contract_is_told():
    """At y = 0 the derivative of y³ − θ vanishes: Newton's method goes astray from next to it."""
    cube = Root(lambda y, t: y**3 - t, jvp=lambda y, t, v: 3 * y**2 * v, mixed_jvp=lambda y, t, d: -d)
    with pytest.warns(AccuracyWarning, match="polish='auto' stopped where Newton's method does not contract"):
        implicit_jvp(cube, np.array([0.1]), np.array([8.0]), np.ones(1), polish="auto")


# -- a limit -------------------------------------------------------------------------------------------------------
def test_a_limit_is_a_failure_like_others(lib):
    with pytest.raises(
        InaccurateError, match=r"off by an estimated 0\.0\d+ of its size, above max_error = 0\.001"
    ) as e:
        call(lib, "vjp", max_error=1e-3)
    assert "Likely cause: inner solution.\nNext: solve the inner problem further" in str(e.value)
    assert e.value.report.error.relative > 1e-3
    value = call(lib, "vjp")
    np.testing.assert_array_equal(lib.numpy(e.value.value), lib.numpy(value))
    np.testing.assert_array_equal(lib.numpy(call(lib, "vjp", max_error=0.5)), lib.numpy(value))
    np.testing.assert_array_equal(lib.numpy(call(lib, "vjp", max_error=1e-3, on_failure="ignore")), lib.numpy(value))
    assert np.isnan(lib.numpy(call(lib, "vjp", max_error=1e-3, on_failure="nan"))).all()
    with pytest.warns(SolveWarning, match="InaccurateError"):
        call(lib, "vjp", max_error=1e-3, on_failure="warn")


def test_a_limit_in_a_batch(lib):
    """Each item has an estimate of its own; NaN in the one that is off."""
    y = np.stack([solution(), solution() + 5 * OFF, solution() + 1e-3 * OFF])
    theta, one = lib.array(np.stack([THETA] * 3)), lib.array(np.ones((3, 3)))
    M, xp = lib.array(A), lib.xp
    if lib.per_item:
        condition = root(lib)
    else:
        times = lambda K, v: (K @ v[..., None])[..., 0]
        Mt = lib.array(A.T.copy())
        condition = Root(
            lambda y, t: times(M, y) + y**3 / 4 - t,
            jvp=lambda y, t, v: times(M, v) + 0.75 * y**2 * v,
            vjp=lambda y, t, u: times(Mt, u) + 0.75 * y**2 * u,
            mixed_jvp=lambda y, t, d: -d, mixed_vjp=lambda y, t, u: -u,
        )  # fmt: skip
    options = {"batched": True, "max_error": 1e-2, "return_report": True}
    found, report = implicit_vjp(condition, lib.array(y), theta, one, on_failure="nan", **options)
    bad = np.isnan(lib.numpy(found))
    assert bad.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    relative = lib.numpy(report.error.relative)
    assert relative[0] < 1e-12 < 1e-6 < relative[2] < 1e-2 < relative[1] < 1
    assert report.error.cause == ("rounding", "inner solution", "inner solution")
    assert lib.numpy(report.error.trusted).all()
    assert xp.isnan(found).shape == (3, 3)
    with pytest.raises(InaccurateError, match="item 1: the derivative is off"):
        implicit_vjp(condition, lib.array(y), theta, one, **options)


# -- causes --------------------------------------------------------------------------------------------------------
def test_the_linear_solve_is_the_cause():
    """Two steps of CG, accepted: the error is that of the solve, and what is left of it is corrected."""
    H = np.diag([1.0, 3.0, 10.0, 30.0]) + 0.3
    condition = Stationary(grad=lambda y, t: H @ y - t, hvp=lambda y, t, v: H @ v, mixed_vjp=lambda y, t, u: -u)
    theta, v = np.array([1.0, -2.0, 0.5, 3.0]), np.array([1.0, 1.0, -1.0, 2.0])
    options = {"solver": CG(maxiter=2), "on_failure": "ignore", "error": True, "return_report": True}
    found, report = implicit_vjp(condition, np.linalg.solve(H, theta), theta, v, **options)
    exact = np.linalg.solve(H, v)
    assert report.error.cause == "linear solve"
    assert report.error.trusted
    assert 0.7 < report.error.absolute / np.linalg.norm(found - exact) < 1.4
    assert np.linalg.norm(found - report.error.correction - exact) < 0.3 * np.linalg.norm(found - exact)


def test_rounding_is_the_cause_at_the_exact_solution(lib):
    error = call(lib, "vjp", y=solution(), error=True, return_report=True)[1].error
    assert error.cause == "rounding"
    assert error.relative < 1e-14
    assert error.trusted


def test_differences_are_the_cause():
    """F by hand, no derivative: A and B are differences."""
    f = Root(lambda y, t: A @ y + np.abs(y) ** 3 / 4 - np.exp(t))
    y = np.array([0.4, 1.1, 0.9])
    theta = np.log(A @ y + y**3 / 4)
    found, report = implicit_vjp(f, y, theta, np.ones(3), backend=_differences(), error=True, return_report=True)
    exact = np.exp(theta) * np.linalg.solve((A + np.diag(0.75 * y**2)).T, np.ones(3))
    assert report.error.cause == "finite differences"
    assert 0.7 <= report.error.absolute / np.linalg.norm(found - exact) <= 1.5


def _differences() -> Any:
    from implicitdiff.backends.numpy import NumpyBackend

    return NumpyBackend("finite_differences")


@pytest.mark.parametrize("solver", [LU(damping=0.3), GMRES(damping=0.3)], ids=repr)
@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_damping_is_the_cause(solver, off):
    """A + δI is solved with: named, measured, and told where Newton steps leave it."""
    y = solution() + off
    exact = truth()["vjp"]
    found, report = implicit_vjp(root(NUMPY), y, THETA, np.ones(3), solver=solver, error=True, return_report=True)
    e, true = report.error, np.linalg.norm(found - exact)
    assert e.cause == "damping"
    assert e.trusted
    assert 0.9 < e.absolute / true < 1.1
    assert e.parts["damping"] > 20 * e.parts["inner solution"]
    assert np.linalg.norm(found - e.correction - exact) < 0.1 * true
    with pytest.raises(InaccurateError, match="Likely cause: damping"):
        implicit_vjp(root(NUMPY), y, THETA, np.ones(3), solver=solver, max_error=1e-3)
    for polish in (1, "auto"):
        with pytest.warns(AccuracyWarning, match="for damping: no Newton step takes that away"):
            implicit_vjp(root(NUMPY), y, THETA, np.ones(3), solver=solver, polish=polish)


def test_newton_steps_of_a_damped_solver_are_not_damped():
    """They would gain a digit each at best, and none where A is as small as its damping."""
    lin = linearize(root(NUMPY), solution() + OFF, THETA, solver=LU(damping=1.0))
    with pytest.warns(AccuracyWarning, match="damping"):
        lin.vjp(np.ones(3), polish=2)
    assert np.linalg.norm(lin.report.polished_y - solution()) < np.linalg.norm(OFF) ** 3


@pytest.mark.parametrize("damping", [0.0, "auto"])
def test_damping_that_is_none_costs_nothing(damping):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        y = solution() + OFF
        report = implicit_vjp(
            root(NUMPY), y, THETA, np.ones(3), solver=LU(damping=damping), polish=2, error=True, return_report=True
        )[1]
    assert report.error.parts.get("damping", 0.0) == 0.0
    assert report.error.cause != "damping"


# -- what changes sides --------------------------------------------------------------------------------------------
def test_a_change_of_the_active_set_is_named():
    """From y = 0.2 the Newton step leaves the half-line y <= 0.25: the bound is active at the solution, not at y."""
    kkt = KKT(lambda y, t: ((y - t) ** 2).sum() / 2, ineq=lambda y, t: y - 0.25)
    report = implicit_jacobian(kkt, np.array([0.2, 0.1]), np.array([1.0, 0.1]), error=True, return_report=True)[1]
    assert report.error.trusted is False
    assert "the active set changes (ineq[0]) between y and its Newton step" in report.error.doubt


def test_a_change_of_the_support_is_named():
    Q = np.array([[1.0, 0.2], [0.2, 1.0]])
    lasso = ProximalGradient(
        grad=lambda y, t: Q @ y - t, hvp=lambda y, t, v: Q @ v, mixed_jvp=lambda y, t, d: -d,
        mixed_vjp=lambda y, t, u: -u, prox=lambda x, t, step: proxes.lasso(x, 0.5, step),
    )  # fmt: skip
    y, theta = np.array([1.8, 0.0]), np.array([2.0, 0.85])  # where the first entry is 1.49, the second one is 0.05
    report = implicit_jacobian(lasso, y, theta, error=True, return_report=True)[1]
    assert report.error.trusted is False
    assert "a kink of prox lies (in coordinate 1" in report.error.doubt


def test_far_from_a_solution_nothing_is_trusted():
    report = call(NUMPY, "vjp", y=solution() + 30 * OFF * [1, 40, 1], error=True, return_report=True)[1]
    assert report.error.trusted is False
    assert "solve the inner problem further" in report.error.doubt


def test_constraints_that_hold_are_followed():
    """On the circle of radius θ, off along it and across: multipliers take part in the Newton step."""
    c = np.array([2.0, 1.0])
    kkt = KKT(lambda y, t: -(c * y).sum(), eq=lambda y, t: (y**2).sum() - t[0] ** 2)
    theta = np.array([1.5])
    exact = c / np.linalg.norm(c)
    y = 1.5 * exact + [0.01, -0.02]
    options = {
        "error": True,
        "return_report": True,
        "on_failure": "ignore",
    }
    found, report = implicit_jvp(kkt, y, theta, np.ones(1), **options)
    off = np.linalg.norm(found - exact)
    assert report.error.trusted
    assert 0.9 < report.error.absolute / off < 1.1
    assert np.linalg.norm(found - report.error.correction - exact) < 0.05 * off
    polished = implicit_jvp(kkt, y, theta, np.ones(1), polish=2)
    np.testing.assert_allclose(polished, exact, rtol=1e-6)


def test_multipliers_that_are_given_belong_to_one_point():
    """They are not those of the polished y, which recovers its own."""
    c = np.array([2.0, 1.0])
    condition = KKT(
        lambda y, t: -(c * y).sum(), eq=lambda y, t: (y**2).sum() - t[0] ** 2, multipliers=(np.array([0.7]), None)
    )
    y = 1.5 * c / np.linalg.norm(c) + [0.01, -0.02]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = implicit_jvp(condition, y, np.array([1.5]), np.ones(1), polish=3)
    np.testing.assert_allclose(found, c / np.linalg.norm(c), rtol=1e-8)


# -- the object ----------------------------------------------------------------------------------------------------
def test_of_a_linearization():
    lin = linearize(root(NUMPY), solution() + OFF, THETA, error=True)
    lin.vjp(np.ones(3))
    first = lin.report.error
    lin.jvp(np.ones(3))
    assert lin.report.error.absolute != first.absolute
    lin.jacobian(error=False)
    assert lin.report.error is None
    lin.vjp(np.ones(3), polish=1, error=False)
    assert lin.report.polished_y is not None
    with pytest.raises(InaccurateError):
        lin.jvp(np.ones(3), max_error=1e-6)
    again = pickle.loads(pickle.dumps(linearize(FixedPoint(halved), np.ones(2), np.ones(2), max_error=0.1)))
    with pytest.raises(InaccurateError):
        again.vjp(np.ones(2), max_error=1e-12, polish=0)


def halved(y: Any, t: Any) -> Any:
    return 0.4 * y + t + 0.01 * y**2


def test_how_it_looks():
    error = call(NUMPY, "gradient", error=True, return_report=True)[1].error
    assert repr(error).startswith("ErrorEstimate(relative=0.0")
    assert "inner solution" in str(error)
    assert "trusted" in error._repr_html_()
    assert error == pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"error": 1}, "error = 1: expected True or False"),
        ({"max_error": -1.0}, "max_error = -1.0: expected a positive number"),
        ({"max_error": True}, "max_error = True"),
        ({"polish": -1}, "polish = -1: expected a number of Newton steps, or 'auto'"),
        ({"polish": "more"}, "polish = 'more'"),
    ],
)
def test_options_that_mean_nothing(options, says):
    with pytest.raises(InputError, match=says):
        call(NUMPY, "vjp", **options)
    with pytest.raises(InputError, match=says):
        linearize(root(NUMPY), solution(), THETA).vjp(np.ones(3), **options)


@pytest.mark.parametrize("options", [{"error": True}, {"max_error": 0.1}, {"polish": 1}])
def test_f_has_to_be_known(options):
    condition = Stationary(hvp=lambda y, t, v: 2 * v, mixed_vjp=lambda y, t, u: -u)
    with pytest.raises(InputError, match=r"error, max_error and polish need F\(y, theta\)"):
        implicit_vjp(condition, np.ones(2), np.ones(2), np.ones(2), **options)


@pytest.mark.parametrize("solver", ["lu", "cholesky"])
def test_what_an_estimate_costs_beside_factors(solver):
    """One value of F, and three products: two with A, one with B."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *at: calls.append(name) or function(*at)

    H = A @ A.T
    condition = Stationary(
        grad=counted("F", lambda y, t: H @ y + y**3 / 4 - t),
        hvp=counted("A", lambda y, t, v: H @ v + 0.75 * y**2 * v),
        hessian=lambda y, t: H + np.diag(0.75 * y**2), mixed_vjp=counted("B", lambda y, t, u: -u),
    )  # fmt: skip
    y, spent = np.array([0.1, 0.5, 0.3]), []
    for error in (False, False, True):  # the first one looks at what it was given
        calls.clear()
        implicit_vjp(condition, y, THETA, np.ones(3), solver=solver, error=error, on_failure="ignore")
        spent.append({name: calls.count(name) for name in "FAB"})
    assert {name: spent[2][name] - spent[1][name] for name in "FAB"} == {"F": 1, "A": 2, "B": 1}


def test_nothing_to_estimate():

    condition = Root(lambda y, t: y - t.sum(), jvp=lambda y, t, v: v, mixed_jvp=lambda y, t, d: -d.sum() + 0 * y)
    found, report = implicit_jvp(condition, np.zeros(0), np.ones(2), np.ones(2), error=True, return_report=True)
    assert found.shape == (0,)
    assert report.error.absolute == 0
    assert report.error.trusted


@pytest.mark.parametrize("name", ["cg", "minres", "gmres"])
def test_a_loss_along_B_is_estimated(name):
    """The residual of a Krylov method is orthogonal to B there: a short correction seems to change nothing."""
    d, b = np.linspace(1, 5, 20), np.linspace(1, 2, 20)
    condition = Stationary(
        grad=lambda y, t: d * y - t * b, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -(u @ b)
    )
    solver = {"cg": CG, "minres": MINRES, "gmres": GMRES}[name]
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
        options = {"solver": solver(rtol=rtol), "error": True, "return_report": True}
        g, report = implicit_vjp(condition, b / d, np.array(1.0), b, **options)
        true = abs(g - b @ (b / d))
        assert 0.5 <= report.error.absolute / true <= 2
        assert report.error.trusted


@pytest.mark.parametrize("solver", [CG(damping=1.0), CG(damping="auto")])
def test_a_correction_that_cannot_be_made_is_no_estimate_of_zero(solver):
    """The correction is made without damping, and CG makes no step where A is indefinite."""
    d = np.array([3.0, 1.0, -0.5])
    condition = Stationary(grad=lambda y, t: d * y - t, hvp=lambda y, t, v: d * v, mixed_vjp=lambda y, t, u: -u)
    options = {"solver": solver, "return_report": True}
    _, report = implicit_vjp(condition, 1 / d, np.ones(3), np.ones(3), error=True, **options)
    assert np.isinf(report.error.absolute)
    assert not report.error.trusted
    with pytest.raises(InaccurateError):
        implicit_vjp(condition, 1 / d, np.ones(3), np.ones(3), max_error=0.1, **options)
