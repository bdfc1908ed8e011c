"""The arithmetic of nvfp4, worked out by hand: E2M1 codes, E4M3 block scales, one scale per tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tmc_export.quantize.nvfp4 import BLOCK, dequantize_nvfp4, global_scale, quantize_nvfp4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def sqnr_db(want: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((want.astype(np.float64) ** 2).sum() / ((want - got).astype(np.float64) ** 2).sum()))


def scale_of(weight: np.ndarray) -> np.ndarray:
    return global_scale(float(np.abs(weight).max()), weight.dtype)


def test_the_table_of_e2m1() -> None:
    """Every number by its definition: (-1)^s · 2^(e-1) · (1 + m/2), subnormal below."""
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        want = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert values[code] == (-want if code >> 3 else want)
    assert np.abs(values[:8]).tolist() == E2M1
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # halfway between neighbours: the even code
    assert ties.astype(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_a_block_by_hand() -> None:
    """Tensor scale 1: block scale max / 6 = 2, all values even multiples of the table, so that nothing is lost."""
    column = np.array([12, -12, 8, 6, 4, 3, 2, 1, 0, -1, -2, -3, -4, -6, -8, 0], np.float32)
    codes, scales = quantize_nvfp4(column[:, None], np.float32(1))
    assert scales.astype(np.float32).tolist() == [[2.0]]
    assert codes.astype(np.float32).ravel().tolist() == (column / 2).tolist()
    assert np.array_equal(dequantize_nvfp4(codes, scales, np.float32(1))[:, 0], column)


def test_the_top_is_4_where_that_loses_less() -> None:
    """1 and 0.75 beside each other: 6 and 4.5 would make 0.75 a 4 or 0.67; 4 and 3 hold both."""
    column = np.array([1.0, 0.75] * 8, np.float32)
    codes, scales = quantize_nvfp4(column[:, None], np.float32(1))
    assert scales.astype(np.float32).tolist() == [[0.25]]
    assert np.array_equal(dequantize_nvfp4(codes, scales, np.float32(1))[:, 0], column)


def test_a_block_of_zeros_has_codes_of_zero_and_a_scale_above_it() -> None:
    weight = np.zeros((32, 2), np.float32)
    weight[16:, 1] = 3.0
    codes, scales = quantize_nvfp4(weight, scale_of(weight))
    assert (scales.astype(np.float32) > 0).all() and not codes[:16].astype(np.float32).any()
    np.testing.assert_allclose(dequantize_nvfp4(codes, scales, scale_of(weight)), weight, rtol=2e-7)
    zero = np.zeros((16, 1), np.float32)
    assert scale_of(zero) > 0 and not quantize_nvfp4(zero, scale_of(zero))[0].astype(np.float32).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_shapes_types_and_signal(dtype: type) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 24)).astype(dtype)
    scale = scale_of(weight)
    codes, scales = quantize_nvfp4(weight, scale)
    assert codes.shape == (256, 24) and codes.dtype == ml_dtypes.float4_e2m1fn
    assert scales.shape == (256 // BLOCK, 24) and scales.dtype == ml_dtypes.float8_e4m3fn
    assert scale.dtype == dtype and scale.shape == () and np.abs(scales.astype(np.float32)).max() <= 448
    got = sqnr_db(weight, dequantize_nvfp4(codes, scales, scale))
    assert got > 20.5
    assert sqnr_db(weight, dequantize_nvfp4(codes, np.roll(scales, 1, axis=1), scale)) < got - 3  # scales of the neighbour column


def test_the_search_is_no_worse_than_6_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((512, 64)).astype(np.float32)
    both = sqnr_db(weight, dequantize_nvfp4(*quantize_nvfp4(weight, scale_of(weight)), scale_of(weight)))
    monkeypatch.setattr("tmc_export.quantize.nvfp4._TOPS", (6.0,))
    assert both > sqnr_db(weight, dequantize_nvfp4(*quantize_nvfp4(weight, scale_of(weight)), scale_of(weight))) + 0.3


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 16)).astype(np.float32)
    whole = quantize_nvfp4(weight, scale_of(weight))
    monkeypatch.setattr("tmc_export.quantize.nvfp4._SLAB", 300)
    for a, b in zip(whole, quantize_nvfp4(weight, scale_of(weight)), strict=True):
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("peak", [1e-6, 3e-3, 0.7, 100.0])
def test_no_block_scale_is_above_the_largest_e4m3(peak: float) -> None:
    scale = np.float32(global_scale(peak, np.float16))
    assert np.float32(peak) / 6 / scale <= 448
