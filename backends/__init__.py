"""Thin adapters, one framework a file; installed as ``implicitdiff.backends``."""

if not __name__.startswith("implicitdiff."):
    raise ImportError("import implicitdiff.backends, not the folder itself: the adapters ship inside the package")

BUILT_IN: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "numpy": (f"{__name__}.numpy:NumpyBackend", ("numpy",), ()),
    "jax": (f"{__name__}.jax:JaxBackend", ("jax", "jaxlib"), ("numpy",)),  # arrays of jaxlib, tracers of jax
    "torch": (f"{__name__}.torch:TorchBackend", ("torch",), ()),
    "cupy": (f"{__name__}.cupy:CupyBackend", ("cupy",), ()),
    "array_api": (f"{__name__}.array_api:ArrayAPIBackend", (), ()),
}
"""Name to the arguments of `implicitdiff.register_backend`: ``module:class``, roots, and whose arrays it also takes."""
