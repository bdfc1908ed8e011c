"""SmoothQuant's and AWQ's numbers, and the rows that AWQ judges by: against what is written out here."""

from __future__ import annotations

import numpy as np
import pytest

from tmc_export.quantize.awq import SHRINKS, awq_blocks, awq_divisors
from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks
from tmc_export.quantize.row_sample import RowSample
from tmc_export.quantize.smoothquant import smooth_divisors


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_s_equation_channel_by_channel(alpha: float) -> None:
    draw = np.random.default_rng(0)
    peaks, weights = np.abs(draw.standard_normal(5)).astype(np.float32), [draw.standard_normal((n, 5)).astype(np.float32) for n in (3, 7)]
    found = smooth_divisors(peaks, weights, alpha)
    for j in range(5):
        top = max(float(np.abs(w[:, j]).max()) for w in weights)
        assert found[j] == pytest.approx(float(peaks[j]) ** alpha / top ** (1 - alpha), rel=1e-5)
    if alpha == 1.0:
        np.testing.assert_allclose(peaks / found, 1.0, rtol=1e-5)  # all of the range moved: every channel ends at 1


def test_a_channel_without_values_is_left_alone() -> None:
    assert smooth_divisors(np.array([0.0, 4.0], np.float32), [np.array([[5.0, 0.0]])], 0.5)[0] == 1.0


def lost(rows: np.ndarray, weight: np.ndarray, divisor: np.ndarray) -> float:
    rounded = dequantize_blocks(*quantize_blocks(np.ascontiguousarray(weight.T) * divisor[:, None], 32)) / divisor[:, None]
    return float(np.square(rows @ rounded - rows @ weight.T).sum())


def test_awq_helps_where_some_channels_are_large_and_never_hurts() -> None:
    draw = np.random.default_rng(0)
    rows, weight = draw.standard_normal((64, 128)).astype(np.float32), draw.standard_normal((48, 128)).astype(np.float32)
    rows[:, ::17] *= 30
    means = np.abs(rows).mean(0)
    found = awq_divisors(rows, means, [weight], 32)
    assert lost(rows, weight, found) < 0.6 * lost(rows, weight, np.ones(128, np.float32))
    assert found[::17].min() > np.median(found)
    steps = [np.maximum(means**a, 1e-4) for a in np.arange(1, 20) / 20]
    tried = [lost(rows, weight, (s / np.sqrt(s.max() * s.min())).astype(np.float32)) for s in steps]
    assert lost(rows, weight, found) == pytest.approx(min(tried), rel=1e-3)
    exact = np.round(draw.uniform(-7, 7, (48, 128))).astype(np.float32)
    exact[:, ::32] = 7.0  # every block has its scale 1: nothing is lost by rounding as it is
    np.testing.assert_array_equal(awq_divisors(rows, means, [exact], 32), np.ones(128, np.float32))


def test_awq_s_ranges_are_the_best_of_the_grid_block_by_block() -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((40, 64)).astype(np.float32) * np.where(np.arange(64) % 7, 1, 8).astype(np.float32)
    weight = draw.standard_t(3, (64, 6)).astype(np.float32)
    products = np.stack([rows[:, part].T @ rows[:, part] for part in (slice(0, 32), slice(32, 64))])
    codes, scales = awq_blocks(products, weight)
    assert codes.dtype == np.int8 and codes.shape == (64, 6) and scales.shape == (2, 6)
    better = 0
    for part, at in ((slice(0, 32), 0), (slice(32, 64), 1)):
        for n in range(6):
            lost = []
            for share in SHRINKS:
                scale = np.abs(weight[part, n]).max() * share / 7
                lost.append(np.square(rows[:, part] @ (np.clip(np.rint(weight[part, n] / scale), -8, 7) * scale - weight[part, n])).sum())
            mine = np.square(rows[:, part] @ (codes[part, n] * scales[at, n] - weight[part, n])).sum()
            assert mine == pytest.approx(min(lost), rel=1e-3)
            better += mine < 0.99 * lost[0]
    assert better > 6  # the whole range is rarely the best
    np.testing.assert_array_equal(awq_blocks(products, np.zeros((64, 2), np.float32))[0], 0)


def test_rows_are_a_fair_sample_and_the_same_every_time() -> None:
    hits = np.zeros(200)
    for start in range(40):
        sample = RowSample(50, 1)
        order = np.roll(np.arange(200), 5 * start).astype(np.float32)[:, None]
        for piece in np.split(order, [3, 40, 41, 120]):
            sample.add(piece)
        assert sample.seen == 200 and sample.rows.shape == (50, 1) and len(np.unique(sample.rows)) == 50
        hits[sample.rows[:, 0].astype(int)] += 1
    assert hits.sum() == 2000 and hits.max() < 30  # 10 each, on the average: none is always there
    one, two = (RowSample(4, 2) for _ in range(2))
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    one.add(rows)
    two.add(rows[:7])
    assert two.rows.shape == (4, 2) and not np.array_equal(one.rows, two.rows)
    two.add(rows[7:])
    short = RowSample(9, 2)
    short.add(rows[:2])
    np.testing.assert_array_equal(short.rows, rows[:2])
