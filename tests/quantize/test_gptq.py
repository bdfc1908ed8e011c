"""GPTQ against its algorithm written out column by column, and against rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest

from tmc_export.quantize.gptq import gptq_blocks
from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks


def correlated(rows: int = 300, channels: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    mix = draw.standard_normal((channels, channels)) * np.geomspace(1, 0.02, channels)
    return (draw.standard_normal((rows, channels)) @ mix).astype(np.float32), draw.standard_normal((channels, 24)).astype(np.float32)


def written_out(weight: np.ndarray, products: np.ndarray, block: int) -> np.ndarray:
    """Algorithm 1 with the inverse updated channel by channel (equation 3), as the paper derives it."""
    damped = products.astype(np.float64) + 0.01 * np.mean(np.diag(products)) * np.eye(len(products))
    inverse, rest, codes = np.linalg.inv(damped), weight.astype(np.float64), np.empty(weight.shape)
    for i in range(len(weight)):
        if i % block == 0:
            scale = quantize_blocks(rest[i : i + block].astype(np.float32), block)[1][0].astype(np.float64)
        codes[i] = np.clip(np.rint(rest[i] / scale), -8, 7)
        error = (rest[i] - codes[i] * scale) / inverse[i, i]
        rest[i:] -= inverse[i:, i : i + 1] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("block", [32, 64])
def test_codes_are_those_of_the_algorithm(block: int) -> None:
    rows, weight = correlated()
    codes, scales = gptq_blocks(weight, rows.T @ rows, block)
    want = written_out(weight, rows.T @ rows, block)
    assert codes.dtype == np.int8 and scales.shape == (64 // block, 24)
    assert (codes != want).mean() < 0.005  # a weight that lies between two codes may fall to either side in float32
    assert (codes != quantize_blocks(weight, block)[0]).mean() > 0.2


def test_the_products_are_nearer_than_with_rounding() -> None:
    rows, weight = correlated()
    fresh, _ = correlated(seed=0)

    def lost(codes: np.ndarray, scales: np.ndarray) -> float:
        return float(np.square(fresh @ (dequantize_blocks(codes, scales) - weight)).sum())

    plain, found = quantize_blocks(weight, 32), gptq_blocks(weight, rows.T @ rows, 32)
    assert lost(*found) < 0.5 * lost(*plain)
    independent = gptq_blocks(weight, np.eye(64, dtype=np.float32), 32)  # nothing makes an error good: the negative twin
    np.testing.assert_array_equal(independent[0], plain[0])


def test_a_channel_that_was_always_zero_does_not_stop_it() -> None:
    rows, weight = correlated()
    rows[:, 5] = 0
    codes, scales = gptq_blocks(weight, rows.T @ rows, 32)
    assert np.isfinite(scales).all() and np.abs(codes).max() <= 8
