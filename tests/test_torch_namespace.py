"""Torch's namespace as the core sees it: where it takes a shorter way, the numbers are those of the longer one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from implicitdiff.arrays import any_true, item_norm  # noqa: E402
from implicitdiff.backends.torch import namespace as xp  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("power", [-290, -200, -30, 0, 30, 200, 300])
def test_norms_at_any_scale(dtype, shape, power):
    if dtype == "float32" and abs(power) > 30:
        power //= 10
    x = (np.random.default_rng(0).normal(size=shape) * 10.0**power).astype(dtype)
    with np.errstate(all="ignore"):
        expected = np.linalg.norm(x.astype(np.longdouble), axis=-1)
    np.testing.assert_allclose(np.asarray(item_norm(xp, torch.from_numpy(x))), expected, rtol=4 * np.finfo(dtype).eps)


def test_norms_of_items_of_very_different_sizes():
    x = torch.tensor([[3.0, 4.0], [3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(np.asarray(item_norm(xp, x)), [5.0, 5e200, 5e-200, 0.0], rtol=1e-15)


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]], dtype=torch.float64)
    assert not np.any(np.isfinite(np.asarray(item_norm(xp, x))))
    assert any_true(xp, ~torch.isfinite(item_norm(xp, x[0])))


def test_norms_under_vmap():
    x = torch.tensor([[3.0, 4.0], [3e200, 4e200]], dtype=torch.float64)
    found = torch.func.vmap(lambda row: item_norm(xp, row))(x)
    np.testing.assert_allclose(np.asarray(found), [5.0, 5e200], rtol=1e-15)


def test_where_promotes_as_the_standard_does():
    mask = torch.tensor([True, False])
    found = xp.where(mask, torch.tensor(1.0, dtype=torch.float64), torch.ones(2, dtype=torch.float32))
    assert found.dtype == torch.float64
    assert xp.where(mask, torch.ones(2, dtype=torch.float32), 0.0).dtype == torch.float32
