"""What rounding makes of results: of A that is rounded, and of functions that move by less, or in steps of it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import with_condition

from implicitdiff.backends.differences import groups
from implicitdiff.backends.noise import noise_along
from implicitdiff.linalg.operator import Operator, matrix_map
from implicitdiff.linalg.solve import prepare
from implicitdiff.registry import get_backend


def test_parts_of_a_direction_add_up_to_it_in_every_item() -> None:
    v = np.array([[1e12, 3.0, 2e-3], [1e12, 2e12, 3e11]])
    parts = list(groups(np, v, np.ones_like(v)))
    np.testing.assert_array_equal(sum(part * length for part, length in parts), v)
    assert all(np.max(np.abs(part)) <= 1 for part, _ in parts)


@pytest.mark.parametrize("rate", [1.0, 3.0, 17.0])
def test_noise_of_what_moves_by_whole_units(rate: float) -> None:
    """Flat at the first distance, and exactly a line at the second."""
    unit, zero = 1e-6, np.array([0.5])
    steps = lambda t: zero + unit * np.floor(1e-9 + rate * t / 1e-4)
    assert noise_along(np, steps, zero, 1e-16 * zero)[0] > 1e-3 * unit


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_estimate_of_what_rounding_does_is_what_is_usual(n: int, symmetric: bool) -> None:
    """Entries of A rounded at random, those of a symmetric A in pairs: the root mean square of what it makes of x."""
    ratios = []
    for seed in range(30):
        A, b = with_condition(n, 1e5, seed, kind="definite" if symmetric else "general")
        op = matrix_map(
            Operator, get_backend("numpy"), A.astype("f4"), (), np.float32, None, symmetric=symmetric, trusted=symmetric
        )
        found = prepare(op, "lu").solve(b.astype("f4"))
        rng, errors, x = np.random.default_rng(seed), [], np.linalg.solve(A, b)
        for _ in range(40):
            G = rng.standard_normal((n, n))
            G = np.tril(G) + np.tril(G, -1).T if symmetric else G
            moved = np.linalg.solve(A * (1 + 0.25 * np.finfo("f4").eps * G), b)
            errors.append(np.linalg.norm(moved - x) / np.linalg.norm(x))
        ratios.append(np.mean(np.square(errors)) ** 0.5 / float(found.uncertainty(np, op.rounding)))
    assert 0.6 <= np.median(ratios) <= 1.3
    assert np.max(ratios) <= 2.5
