"""The frameworks with autodiff, as the tests see them: arrays, compilation, and derivatives of closed forms."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from conftest import compile_fast

compile_fast()


class Torch:
    """Torch, and its functional transformations."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.xp = importlib.import_module("array_api_compat.torch")
        self.func = self.torch.func
        with warnings.catch_warnings():  # the first compilation warns about Torch itself
            warnings.simplefilter("ignore")
            self.torch.compile(lambda x: x + 1, backend="eager")(self.torch.zeros(1))

    def numpy(self, x: Any) -> np.ndarray:
        """Return the numbers."""
        return x.detach().cpu().numpy()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as the framework compiles it, with breaks where it has to look at values."""
        return self.torch.compile(function, backend="eager")

    def compiled_gradient(self, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Gradient of what was compiled; the framework does not compile its own backward pass."""
        return self.gradient(self.compiled(loss))

    def black_box(self, solution: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a solver through which nothing can be differentiated."""
        return lambda theta: solution(theta.detach().clone()).numpy()

    def gradient(self, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Gradient by the framework's own autodiff, the way most users call it."""

        def gradient(theta: Any) -> Any:
            theta = theta.detach().clone().requires_grad_()
            return self.torch.autograd.grad(loss(theta), theta)[0]

        return gradient

    def transforms(self) -> dict[str, Any]:
        """Functional transformations by name."""
        return {name: getattr(self.func, name) for name in ("grad", "jacrev", "jacfwd", "hessian", "vmap")}


class Jax:
    """JAX in double precision."""

    name = "jax"

    def __init__(self) -> None:
        self.jax = importlib.import_module("jax")
        self.jax.config.update("jax_enable_x64", True)
        self.xp = importlib.import_module("jax.numpy")

    def numpy(self, x: Any) -> np.ndarray:
        """Return the numbers."""
        return np.asarray(x)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as the framework compiles it."""
        return self.jax.jit(function)

    def compiled_gradient(self, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Gradient, compiled whole."""
        return self.compiled(self.gradient(loss))

    def black_box(self, solution: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a solver through which nothing can be differentiated."""
        return lambda theta: np.array(solution(np.asarray(theta)))

    def gradient(self, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Gradient by the framework's own autodiff."""
        return self.jax.grad(loss)

    def transforms(self) -> dict[str, Any]:
        """Functional transformations by name."""
        return {name: getattr(self.jax, name) for name in ("grad", "jacrev", "jacfwd", "hessian", "vmap")}


_KINDS = {"torch": Torch, "jax": Jax}
_made: dict[str, Any] = {}


def framework(name: str) -> Any:
    """Return the framework of that name, or skip the test where it is not installed."""
    if find_spec(name) is None:
        pytest.skip(f"needs {name}")
    if name not in _made:
        _made[name] = _KINDS[name]()
    return _made[name]


EACH = pytest.mark.parametrize("name", list(_KINDS))
