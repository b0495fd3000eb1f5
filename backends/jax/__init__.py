"""JAX: its transformations, programs compiled once, differentiable solutions, sharded arrays."""

from implicitdiff.backends.jax.backend import JaxBackend

__all__ = ["JaxBackend"]
