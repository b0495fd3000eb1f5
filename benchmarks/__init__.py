"""Benchmarks of implicitdiff against the cost of the work itself; run ``python -m benchmarks`` in a checkout.

``problems`` holds what is differentiated, ``cases`` what is compared with what in NumPy, ``frameworks`` the cases that
Torch and JAX share, ``with_torch`` and ``with_jax`` the work by hand and other libraries, ``measure`` how time and
memory are taken, ``report`` the table and the file, ``__main__`` the command.
"""
