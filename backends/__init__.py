"""Thin adapters, one framework a file; installed as ``implicitdiff.backends``."""

if not __name__.startswith("implicitdiff."):
    raise ImportError("import implicitdiff.backends, not the folder itself: the adapters ship inside the package")
