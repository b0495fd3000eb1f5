"""Weak scaling of a sharded gradient in counted work, on devices made of the CPU; prints a line for each layout.

Run by ``test_jax_sharding``. The problem that each device holds stays the same while devices are added; the counts are
XLA's own of the operations of the compiled program of one device, in which a loop counts once.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from implicitdiff import CG, implicit_vjp

jax.config.update("jax_enable_x64", True)

EXAMPLES, FEATURES, OUTPUTS = 4096, 128, 4
# axes of X, T, y and theta; what stays whole is none of the device's share
LAYOUTS = {"examples": (("d", None), ("d", None), (None, None), (None,)),
           "outputs": ((None, None), (None, "d"), (None, "d"), ("d",))}  # fmt: skip


def objective(y: Any, theta: Any, X: Any, T: Any) -> Any:
    """Ridge regression with one penalty for each output."""
    return (jnp.sum((X @ y - T) ** 2) + jnp.sum(jnp.exp(theta) * y**2)) / 2


def gradient(y: Any, theta: Any, X: Any, T: Any) -> Any:
    """Of ½‖y‖²."""
    return implicit_vjp(objective, y, theta, y, args=(X, T), solver=CG())


def compiled(layout: str, devices: int) -> Any:
    """Compile for so many devices, each with the same share."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",), axis_types=(AxisType.Auto,))
    rows, columns = (devices, 1) if layout == "examples" else (1, devices)
    n, k = rows * EXAMPLES, columns * OUTPUTS
    shapes = (n, FEATURES), (n, k), (FEATURES, k), (k,)
    X, T, y, theta = (
        jax.ShapeDtypeStruct(shape, jnp.float64, sharding=NamedSharding(mesh, P(*axes)))
        for shape, axes in zip(shapes, LAYOUTS[layout], strict=True)
    )
    return jax.jit(gradient).lower(y, theta, X, T).compile()


def main() -> None:
    count = len(jax.devices())
    for layout in LAYOUTS:
        one, many = compiled(layout, 1), compiled(layout, count)
        scaling = one.cost_analysis()["flops"] / many.cost_analysis()["flops"]
        moved = len(re.findall(r"(?:all-gather|all-to-all|collective-permute)(?:-start)?\(", many.as_text()))
        sys.stdout.write(f"{layout}: weak scaling {scaling:.3f}, gathers {moved}\n")


if __name__ == "__main__":
    main()
