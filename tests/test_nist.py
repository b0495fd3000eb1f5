"""NIST's certified regressions: standard deviations, what the data do to the parameters, what Gauss-Newton costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from strd import NAMES, Set, strd

from implicitdiff import implicit_jvp, implicit_vjp, linearize

EACH = pytest.mark.parametrize("name", NAMES)


def polished(fit: Any, of: Set, data: np.ndarray, steps: int) -> np.ndarray:
    """Newton steps from the certified parameters, which have eleven digits."""
    b = of.certified
    for _ in range(steps):
        b = linearize(fit, b, data).newton()
    return b


@EACH
def test_standard_deviations(name: str) -> None:
    """Plain NumPy: J by complex steps."""
    of = strd(name)
    fit = of.condition(np)
    b = polished(fit, of, of.data, 2)
    np.testing.assert_allclose(b, of.certified, rtol=1e-10)
    lin = linearize(fit, b, of.data)
    # the residuals of Lanczos1 are 1e-13 of its data: in double precision their sum of squares has three digits
    found = of.deviation * lin.standard_errors(scale=False) if name == "Lanczos1" else lin.standard_errors()
    np.testing.assert_allclose(found, of.errors, rtol=1e-9)


def exact(name: str, **options: Any) -> tuple[Any, Set]:
    """The fit with exact derivatives, by HIPS autograd."""
    return strd(name).condition(pytest.importorskip("autograd.numpy"), **options), strd(name)


@EACH
def test_sensitivities_to_the_data(name: str) -> None:
    """Against solutions for other data, by a Newton's method of this test's own."""
    autograd = pytest.importorskip("autograd")
    fit, of = exact(name)
    slope = autograd.grad(lambda b, data: (fit.residual(b, data) ** 2).sum() / 2)
    hessian = autograd.jacobian(slope)

    def solution(data: np.ndarray) -> np.ndarray:
        b, unit = of.certified, of.errors
        for _ in range(8):
            A = hessian(b, data) * unit * unit[:, None]
            b = b - unit * np.linalg.solve(A, unit * slope(b, data))
        return b

    t = np.cos(np.arange(float(len(of.data)))) * of.deviation
    h = {"Lanczos1": 1e4}.get(name, 2e-3)  # of the residuals' standard deviation; by differences of fourth order
    moved = {k: solution(of.data + k * h * t) for k in (-2, -1, 1, 2)}
    expected = (8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * h)
    found = implicit_jvp(fit, solution(of.data), of.data, t)
    off = np.linalg.norm((found - expected) / of.errors) / np.linalg.norm(expected / of.errors)
    assert off < 1e-6


@EACH
def test_the_certificate_tells_what_gauss_newton_costs(name: str) -> None:
    near, of = exact(name, hessian="gauss-newton")
    b, v = polished(near, of, of.data, 1), 1 / of.errors
    g, report = implicit_vjp(near, b, of.data, v, error=True, return_report=True)
    truth = implicit_vjp(near.exact, b, of.data, v)
    off = np.linalg.norm(g - truth) / np.linalg.norm(g)
    told = report.error
    assert told.relative == pytest.approx(off, rel=0.01, abs=1e-7)
    assert told.trusted
    large = {"MGH09": 0.29, "Thurber": 0.32, "ENSO": 0.41, "BoxBOD": 0.099}
    if name in large:
        assert told.relative == pytest.approx(large[name], rel=0.02)
        assert told.cause == "Gauss-Newton"
