"""The demo's data, and its inner problem: a softmax regression with one L2 penalty per feature (see `demo`)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from implicitdiff import Stationary

__all__ = ["CONDITION", "DATASETS", "Data", "Floats", "Model", "Split", "fit", "grad", "hvp", "load",
           "loss", "loss_grad", "losses", "missing", "mixed_vjp", "softmax"]  # fmt: skip

Floats = NDArray[np.float64]

DATASETS = {"digits": (0.11, 0.45), "breast_cancer": (0.25, 0.45), "wine": (0.25, 0.45)}
"""Shares of training and validation set. Few samples to train on make penalties matter; a validation set that is
large against the number of penalties keeps them from being fitted to its noise."""


# -- data ----------------------------------------------------------------------------------------------
class Split(NamedTuple):
    """Standardised features with a column of ones behind, shape (samples, p + 1), and one-hot classes."""

    X: Floats
    Y: Floats


@dataclass(frozen=True)
class Data:
    """A data set in three parts; the training set alone sets the standardisation."""

    name: str
    train: Split
    validation: Split
    test: Split
    features: list[str]
    mean: Floats

    def __str__(self) -> str:
        sizes = (len(part.X) for part in (self.train, self.validation, self.test))
        samples = "{} samples to train, {} to validate, {} to test".format(*sizes)
        return f"{self.name}: {len(self.features)} features, {self.train.Y.shape[1]} classes; {samples}"


def missing(*, plotting: bool, quiet: bool) -> str | None:
    """Say which packages to install that are needed and not there, by a command that works in a checkout as well."""
    needed = {"sklearn": True, "tqdm": not quiet, "matplotlib": plotting}
    absent = [name for name, used in needed.items() if used and find_spec(name) is None]
    if not absent:
        return None
    packages = [name.replace("sklearn", "scikit-learn") for name in absent]
    instead = ", or --quiet" if absent == ["tqdm"] else ""
    return f"the demo needs {' and '.join(packages)}: python -m pip install {' '.join(packages)}{instead}"


def load(name: str, seed: int) -> Data:
    """Load a data set that ships with scikit-learn and split it, every class in the same shares."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = getattr(datasets, f"load_{name}")()
    X, y = bunch.data.astype(np.float64), bunch.target
    parts, (train, validation) = [], DATASETS[name]
    for share in (train, validation / (1 - train)):
        first, X, first_y, y = train_test_split(X, y, train_size=share, random_state=seed, stratify=y)
        parts.append((first, first_y))
    mean, scale = parts[0][0].mean(axis=0), parts[0][0].std(axis=0)
    scale[scale == 0] = 1.0  # a pixel that is always blank

    def split(X: Floats, y: Any) -> Split:
        return Split(np.column_stack([(X - mean) / scale, np.ones(len(X))]), np.eye(len(bunch.target_names))[y])

    names = [str(feature) for feature in bunch.feature_names]
    return Data(name, split(*parts[0]), split(*parts[1]), split(X, y), names, mean)


# -- inner problem -------------------------------------------------------------------------------------
def softmax(S: Floats) -> Floats:
    """Probabilities from scores, shape (samples, classes)."""
    E = np.exp(S - S.max(axis=1, keepdims=True))
    return E / E.sum(axis=1, keepdims=True)


def losses(W: Floats, X: Floats, Y: Floats) -> Floats:
    """Cross-entropy of each sample."""
    S = X @ W
    S -= S.max(axis=1, keepdims=True)
    return np.log(np.exp(S).sum(axis=1)) - (S * Y).sum(axis=1)


def loss(W: Floats, X: Floats, Y: Floats) -> float:
    """Mean cross-entropy."""
    return float(losses(W, X, Y).mean())


def loss_grad(W: Floats, X: Floats, Y: Floats) -> Floats:
    """Gradient of the mean cross-entropy in W."""
    return X.T @ (softmax(X @ W) - Y) / len(X)


def penalty_grad(W: Floats, theta: Floats) -> Floats:
    """Gradient of the penalty; linear in W, so it is its own Hessian product."""
    out = W * np.append(np.exp(theta), 0.0)[:, None]
    out[-1] += W[-1].sum()
    return out


def objective(W: Floats, theta: Floats, X: Floats, Y: Floats) -> float:
    """Inner objective."""
    return loss(W, X, Y) + 0.5 * float(np.vdot(W, penalty_grad(W, theta)))


def grad(W: Floats, theta: Floats, X: Floats, Y: Floats) -> Floats:
    """Gradient of the inner objective in W."""
    return loss_grad(W, X, Y) + penalty_grad(W, theta)


def hvp(W: Floats, theta: Floats, V: Floats, X: Floats, Y: Floats) -> Floats:
    """Product of V with the Hessian of the inner objective in W."""
    P, D = softmax(X @ W), X @ V
    D -= (P * D).sum(axis=1, keepdims=True)
    return X.T @ (P * D) / len(X) + penalty_grad(V, theta)


def mixed_vjp(W: Floats, theta: Floats, U: Floats, X: Floats, Y: Floats) -> Floats:
    """∂⟨∇_W f, U⟩/∂θ."""
    return np.exp(theta) * (W[:-1] * U[:-1]).sum(axis=1)


CONDITION = Stationary(grad=grad, hvp=hvp, mixed_vjp=mixed_vjp)


def fit(W: Floats, theta: Floats, train: Split, tol: float = 1e-11, maxiter: int = 100) -> Floats:
    """Minimise the inner objective by Newton-CG from W until the norm of the gradient is below ``tol``."""
    X, Y = train
    for _ in range(maxiter):
        g = grad(W, theta, X, Y)
        size = float(np.linalg.norm(g))
        if size <= tol:
            return W
        step = _newton_step(W, theta, g, X, Y, rtol=min(0.1, size))
        value, slope, t = objective(W, theta, X, Y), float(np.vdot(g, step)), 1.0
        enough = 1e-14 * abs(value)  # near the minimum the decrease drowns in rounding
        while objective(W + t * step, theta, X, Y) > value + 1e-4 * t * slope + enough:
            t /= 2
        W = W + t * step
    raise RuntimeError(f"the inner problem was not solved in {maxiter} steps: gradient norm {size:.1e} > {tol:.1e}")


def _newton_step(W: Floats, theta: Floats, g: Floats, X: Floats, Y: Floats, rtol: float) -> Floats:
    P = softmax(X @ W)
    diagonal = (X**2).T @ (P * (1 - P)) / len(X) + penalty_grad(np.ones_like(W), theta)
    shape, n = W.shape, W.size
    A = LinearOperator((n, n), lambda v: hvp(W, theta, v.reshape(shape), X, Y).ravel(), dtype=np.float64)
    M = LinearOperator((n, n), lambda v: v / diagonal.ravel(), dtype=np.float64)
    step: Floats = cg(A, -g.ravel(), rtol=rtol, M=M)[0]
    return step.reshape(shape)


class Model(NamedTuple):
    """Log-penalties, shape (p,), and the weights that they lead to."""

    theta: Floats
    W: Floats
