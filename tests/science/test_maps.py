"""Maps of a detector: values between pixels, factors of flux corrections."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from spxdask.science.maps import interpolate_map, repair_factors


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8"])
def test_interpolation_is_bilinear(tmp_path, dtype):
    rng = np.random.default_rng(1)
    plane = rng.uniform(37, 39, (60, 80)).astype(dtype)
    plane.tofile(tmp_path / "map")
    mapped = np.memmap(tmp_path / "map", dtype, "r", shape=plane.shape)
    x, y = rng.uniform(-0.5, 79.5, 500), rng.uniform(-0.5, 59.5, 500)
    x[:4], y[:4] = [0, 79, -0.5, 79.5], [0, 59, -0.5, 59.5]
    expected = RegularGridInterpolator(
        (np.arange(60), np.arange(80)), plane.astype(float), bounds_error=False, fill_value=None
    )((y, x))
    got = interpolate_map(mapped, x, y)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got[0] == plane[0, 0]
    assert got[1] == plane[59, 79]


def test_missing_values_and_places():
    plane = np.ones((4, 4))
    plane[2, 2] = np.nan
    got = interpolate_map(plane, [1.5, 0.5, np.nan, 2.0], [1.5, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(np.isnan(got), [True, False, True, True])
    assert interpolate_map(plane, [], []).shape == (0,)
    with pytest.raises(ValueError, match="2 x 2 pixels"):
        interpolate_map(np.ones((1, 5)), [0.0], [0.0])


def test_wrong_factors_become_the_median_of_their_row():
    factors = np.full((5, 9), 0.97, ">f4")
    factors[1] = [0.875, 0.9, 0.92, np.nan, 3653.0, 0.011, 0.93, np.inf, -1.0]
    factors[2] = np.nan
    factors[3, 0], factors[3, 1] = 0.5, 2.0
    got = repair_factors(factors)
    assert got.dtype == np.dtype("=f4")
    middle = np.float32(0.5) * (np.float32(0.9) + np.float32(0.92))
    expected = factors.astype("=f4")
    expected[1, [3, 4, 5, 7, 8]] = middle
    expected[2] = 0.97
    np.testing.assert_array_equal(got, expected)
    assert np.isnan(factors[1, 3])  # the argument is as it was
    with pytest.raises(ValueError, match="no factor of the flux correction"):
        repair_factors(np.zeros((2, 2)))
