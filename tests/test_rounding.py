"""What differences make of functions that move by less than their rounding, or in steps of it."""

from __future__ import annotations

import numpy as np
import pytest

from implicitdiff.backends.differences import groups
from implicitdiff.backends.noise import noise_along


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
