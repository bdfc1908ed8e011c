from __future__ import annotations

import numpy as np
import pytest

from tmc_export.quantize.clipping import clip_of, entropy, mse, percentile
from tmc_export.quantize.histogram import BINS, Histogram


def seen(values: np.ndarray, channels: int = 4) -> Histogram:
    found = Histogram(channels)
    found.add(values.reshape(-1, channels))
    return found


def gaussian(count: int = 40_000, outliers: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    values[:outliers] = 60.0
    return values


def test_magnitudes_are_counted_where_they_lie() -> None:
    found = seen(np.array([0.0, -0.5, 1.0, -2.0], np.float32))
    assert found.top == 2.0 and found.peak == 2.0 and found.rows == 1
    assert np.flatnonzero(found.counts).tolist() == [0, BINS // 4, BINS // 2, BINS - 1]
    np.testing.assert_array_equal(found.peaks, [0.0, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(found.means, [0.0, 0.5, 1.0, 2.0])


def test_the_order_of_samples_does_not_count_and_nothing_is_lost() -> None:
    parts = [gaussian(4000, seed=i) * 4.0**i for i in range(4)]
    one, other = Histogram(4), Histogram(4)
    for part in parts:
        one.add(part.reshape(-1, 4))
    for part in parts[::-1]:
        other.add(part.reshape(-1, 4))
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.top == other.top >= one.peak > one.top / 2 and one.counts.sum() == 16_000 and one.rows == 4000
    np.testing.assert_array_equal(one.counts, seen(np.concatenate(parts)).counts)
    assert (one.counts != seen(np.concatenate(parts[:3])).counts).any()


def test_zeros_before_anything_else_are_kept() -> None:
    found = Histogram(2)
    found.add(np.zeros((5, 2), np.float32))
    assert found.top == 0.0 and clip_of("mse", found) == 0.0
    found.add(np.ones((1, 2), np.float32))
    assert found.counts.sum() == 12 and found.counts[0] == 10


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        seen(np.array([0.0, 1.0, wrong, 2.0], np.float32))


def test_a_percentile_is_numpy_s_within_a_bin() -> None:
    values = gaussian()
    found = seen(values)
    for share in (50.0, 99.0, 99.9):
        assert abs(percentile(found, share) - np.percentile(np.abs(values), share)) <= 2 * found.top / BINS
    assert clip_of("percentile", found, share=100.0) == found.peak


def error(values: np.ndarray, end: float) -> float:
    step = end / 127
    return float(np.square(values - np.clip(np.rint(values / step), -127, 127) * step).mean())


def test_least_squares_ends_where_the_true_error_is_least() -> None:
    values = np.random.default_rng(1).standard_t(3, 40_000).astype(np.float32)
    found = seen(values)
    end, ends = mse(found, 127), np.linspace(0.05, 1.0, 96) * found.peak
    best = min(error(values, float(e)) for e in ends)
    assert error(values, end) <= 1.02 * best < 0.9 * error(values, found.peak)


def test_entropy_leaves_rare_outliers_out_and_keeps_a_full_range() -> None:
    assert entropy(seen(gaussian(outliers=4)), 127) < 12.0
    flat = np.linspace(-1, 1, 40_000, dtype=np.float32)
    assert entropy(seen(flat), 127) > 0.97


def test_minmax_keeps_everything_and_no_observer_goes_beyond() -> None:
    found = seen(gaussian(outliers=1))
    assert clip_of("minmax", found) == 60.0
    for observer in ("percentile", "entropy", "mse"):
        assert 0 < clip_of(observer, found) <= 60.0  # type: ignore[arg-type]
