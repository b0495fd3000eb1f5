"""`on_report` of a wrapped solver: one report for each derivative, of one form, wherever it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from frameworks import framework

from implicitdiff import InputError, Report, Root, SingularError, Status, implicit_function

ROOT = Root(
    lambda y, theta: y**3 - theta, jvp=lambda y, theta, v: 3 * y**2 * v, vjp=lambda y, theta, v: 3 * y**2 * v,
    mixed_vjp=lambda y, theta, u: -u, mixed_jvp=lambda y, theta, t: -t, verify=False,
)  # fmt: skip


def wrapped(**options: Any) -> tuple[Any, list[Report]]:
    reports: list[Report] = []
    return implicit_function(ROOT, solver="lu", on_report=reports.append, **options)(lambda t: t ** (1 / 3)), reports


def form(report: Report) -> dict[str, Any]:
    """Types of the fields; numbers of those that the place of the call does not change."""
    kept = ("status", "solver", "reason", "iterations", "matvecs", "derivatives", "damping", "solved")
    kinds = {name: type(value) for name, value in vars(report).items() if name != "solution"}
    return {**kinds, "values": {name: getattr(report, name) for name in kept}}


def test_eager_calls() -> None:
    solve, reports = wrapped()
    theta = np.array([1.0, 8.0])
    solve(theta)
    assert reports == []
    solve.vjp(theta, theta)
    solve.jvp(theta, theta)
    solve.jacobian(theta)
    lin = solve.linearize(theta)
    lin.vjp(theta)
    lin.vjp(theta)
    assert len(reports) == 5
    assert all(report.converged for report in reports)
    assert reports[-1] is lin.report


def test_failures_are_reported_and_raised() -> None:
    reports: list[Report] = []
    flat = implicit_function(Root(lambda y, t: 0 * y * t + t - 1), solver="lu", on_report=reports.append)(np.copy)
    with pytest.raises(SingularError) as caught:
        flat.vjp(np.ones(2), np.ones(2))
    assert [report.status for report in reports] == [Status.SINGULAR]
    assert caught.value.report is reports[0]


def test_what_it_raises_is_raised() -> None:
    def stop(report: Report) -> None:
        raise KeyError(report.solver)

    solve = implicit_function(ROOT, solver="lu", on_report=stop)(np.cbrt)
    with pytest.raises(KeyError, match="lu"):
        solve.vjp(np.ones(2), np.ones(2))
    with pytest.raises(InputError, match="on_report is list; expected a function"):
        implicit_function(ROOT, on_report=[])  # type: ignore[call-overload]


def test_torch() -> None:
    """Backward, forward mode, ``torch.func``; a Jacobian's rows are solved together."""
    torch = framework("torch").torch
    solve, reports = wrapped()
    theta = torch.tensor([1.0, 8.0], dtype=torch.float64, requires_grad=True)
    solve(theta).sum().backward()
    assert len(reports) == 1
    solve.vjp(theta.detach(), torch.ones(2, dtype=torch.float64))
    assert form(reports[0]) == form(reports[1])
    with torch.autograd.forward_ad.dual_level():
        solve(torch.autograd.forward_ad.make_dual(theta.detach(), theta.detach()))
    torch.func.jacrev(solve)(theta.detach())
    assert len(reports) == 4
    assert all(report.converged for report in reports)


@pytest.fixture(scope="module")
def jax() -> Any:
    return framework("jax").jax


def test_jax(jax: Any) -> None:
    """Eager and compiled, in reverse and forward: all like the report of an eager product."""
    solve, reports = wrapped()
    theta = jax.numpy.asarray([1.0, 8.0])
    loss = jax.grad(lambda t: solve(t).sum())
    solve.vjp(theta, theta)
    for call in (loss, jax.jit(loss), lambda t: jax.jvp(solve, (t,), (t,)), jax.jit(lambda t: solve.vjp(t, t))):
        for _ in range(2):
            call(theta)
            jax.effects_barrier()
    assert len(reports) == 9
    assert all(form(report) == form(reports[0]) for report in reports)
    np.testing.assert_allclose(reports[1].solution, [1 / 3, 1 / 12], rtol=1e-14)


@pytest.mark.slow
def test_jax_under_vmap_and_with_an_error(jax: Any) -> None:
    """One report, with an entry for each item; what is raised in an eager derivative is raised there."""
    reports: list[Report] = []

    def keep(report: Report) -> None:
        reports.append(report)
        if isinstance(report.converged, bool):
            raise KeyError(report.solver)

    solve = implicit_function(ROOT, solver="lu", on_report=keep)(lambda t: t ** (1 / 3))
    gradient = jax.grad(lambda t: solve(t).sum())
    jax.jit(jax.vmap(jax.vmap(gradient)))(jax.numpy.ones((2, 3, 4)))
    jax.effects_barrier()
    (report,) = reports
    assert report.converged.shape == report.residual.shape == report.matvecs.shape == (6,)
    assert report.solution.shape == (6, 4)
    assert report.converged.all()
    with pytest.raises(KeyError, match="lu"):
        gradient(jax.numpy.ones(4))
