"""Faults 63 and 64 in Torch's default precision: singular to what float32 tells apart is told, the rest is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import SOLVERS

from implicitdiff import AccuracyWarning, ImplicitDiffError, NotPositiveDefiniteError, Root, SingularError, implicit_vjp

torch = pytest.importorskip("torch")

X = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32))
FIRST = torch.tensor([1.0, 0.0, 0.0])
W = torch.tensor([1.0, 2.0, 0.0])
P = torch.tensor([0.5, 0.25, 0.25])


def collinear(w: Any, t: Any) -> Any:
    """Least squares; the third feature is the sum of the others."""
    A = torch.cat([X, X.sum(1, keepdim=True)], 1)
    return ((A @ w - t) ** 2).sum() / 2


def likelihood(z: Any, p: Any) -> Any:
    """Logits z of a class each, which are free up to a shift."""
    return -(p * torch.log_softmax(z, 0)).sum()


SINGULAR = {"collinear": (collinear, W, X @ W[:2]), "logits": (likelihood, P.log(), P)}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SINGULAR)
def test_fault_63_singular(name: str, solver: str) -> None:
    objective, y, theta = SINGULAR[name]
    for condition in (objective, Root(torch.func.grad(objective))) if solver in {"auto", "lu"} else (objective,):
        with pytest.raises((SingularError, NotPositiveDefiniteError), match="singular"):
            implicit_vjp(condition, y, theta, FIRST, solver=solver)


@pytest.mark.parametrize("name", SINGULAR)
def test_fault_60_single_precision_inside_of_double(name: str) -> None:
    """What is computed in float32 has the accuracy of float32, whatever the solver gets it in."""
    objective, y, theta = SINGULAR[name]
    inside = lambda y, t: objective(y.float(), t.float()).double()
    with pytest.raises(SingularError):
        implicit_vjp(inside, y.double(), theta.double(), FIRST.double())
    pulled, report = implicit_vjp(
        lambda y, t: ((y.float() - t.float()) ** 2).sum().double(), y.double(), y.double(), FIRST.double(),
        return_report=True,
    )  # fmt: skip
    np.testing.assert_allclose(pulled.numpy(), FIRST.numpy(), atol=1e-6)
    assert report.converged


def spectrum(condition: float, seed: int) -> Any:
    """A symmetric positive definite matrix of this condition, n = 6, in double precision."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    return torch.from_numpy(q * np.geomspace(1, 1 / condition, 6) @ q.T)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e7, 1e8, 1e9])
@pytest.mark.filterwarnings("ignore::implicitdiff.NotASolutionWarning")
def test_fault_63_conditions(condition: float) -> None:
    """The whole Hessian by autodiff in float32: right to what its rounding allows, or told."""
    for seed in range(8):
        H, v = spectrum(condition, seed), torch.from_numpy(np.random.default_rng(seed).normal(size=6))
        truth = torch.linalg.solve(H, v)
        single, y = H.float(), truth.float()
        try:
            got = implicit_vjp(lambda y, t: y @ (single @ y) / 2 - y @ t, y, single @ y, v.float())
        except (ImplicitDiffError, AccuracyWarning):
            assert condition > 1e5, "false alarm"
        else:
            error = float((got.double() - truth).norm() / truth.norm())
            assert error < 10 * condition * np.finfo(np.float32).eps
            assert error < 0.1, f"{error:.0%} off, in silence"


@pytest.mark.parametrize("mu", [1.0, 0.1, 0.03])
def test_fault_64_asymmetric_by_rounding(mu: float) -> None:
    """f = log Σ exp(X y + t) + μ/2 ‖y‖² − c·y, up to condition 1e3: the Hessian is symmetric to rounding only."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        n = 6 + seed
        A, t, y, v = (torch.from_numpy(rng.normal(size=s)) for s in ((n + 5, n), n + 5, n, n))
        y, weights = 0.3 * y, torch.softmax(A @ (0.3 * y) + t, 0)
        c = A.T @ weights + mu * y
        mixed = A.T @ (torch.diag(weights) - torch.outer(weights, weights))
        truth = -mixed.T @ torch.linalg.solve(mixed @ A + mu * torch.eye(n, dtype=torch.float64), v)
        got = implicit_vjp(
            lambda y, t, A, c: torch.logsumexp(A @ y + t, 0) + mu / 2 * (y @ y) - c @ y,
            y.float(), t.float(), v.float(), args=(A.float(), c.float()),
        )  # fmt: skip
        assert float((got.double() - truth).norm()) < 1e-3 * float(truth.norm())
