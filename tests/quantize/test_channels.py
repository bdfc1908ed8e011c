"""The arithmetic of one scale per output channel, worked out by hand: int8, E4M3 and their scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tmc_export.quantize._channels import ChannelScheme, channel_scales, quantize_channels
from tmc_export.quantize.fp8 import FP8, to_e4m3
from tmc_export.quantize.int8 import INT8

SCHEMES = [INT8, FP8]


def quantize(weight: np.ndarray, axis: int, scheme: ChannelScheme) -> tuple[np.ndarray, np.ndarray]:
    scales = channel_scales(weight, axis, scheme.top)
    return quantize_channels(weight, scales, axis, scheme), scales


def widen(codes: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    return codes.astype(np.float32) * scales.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(codes.ndim)])


def sqnr_db(want: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((want.astype(np.float64) ** 2).sum() / ((want - got).astype(np.float64) ** 2).sum()))


def test_int8_by_hand() -> None:
    # channel 0: scale 1, ties go to the even code; channel 1: scale 2; channel 2: zeros
    weight = np.array([[127, 254, 0], [0.5, 1, 0], [1.5, -3, 0], [-2.5, -254, 0]], np.float32)
    codes, scales = quantize(weight, 1, INT8)
    assert scales[:2].tolist() == [1.0, 2.0] and 0 < scales[2] < 1e-44
    assert codes.tolist() == [[127, 127, 0], [0, 0, 0], [2, -2, 0], [-2, -127, 0]] and codes.dtype == np.int8


def test_fp8_by_hand() -> None:
    # scale 1: 448 is the top; 1.0625 and 1.1875 are ties between neighbours 1/8 apart; 2^-10 is half of the smallest number
    weight = np.array([[448.0], [1.0625], [1.1875], [-17.0], [2.0**-10], [3 * 2.0**-10], [0.0]], np.float32)
    codes, scales = quantize(weight, 1, FP8)
    assert scales.tolist() == [1.0]
    assert codes.astype(np.float32).ravel().tolist() == [448.0, 1.0, 1.25, -16.0, 0.0, 2.0**-8, 0.0]


def test_the_table_of_e4m3() -> None:
    """Every number of the format by its definition: (-1)^s · 2^(e-7) · (1 + m/8), subnormal below, S.1111.111 being no number."""
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for byte in range(256):
        sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
        if byte & 127 == 127:
            assert np.isnan(values[byte])
            continue
        want = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        assert values[byte] == sign * want
    finite = values[np.isfinite(values)]
    assert finite.max() == FP8.top and np.array_equal(to_e4m3(finite).astype(np.float32), finite)
    assert not np.isfinite(to_e4m3(np.array([500.0], np.float32)).astype(np.float32)).all()  # which is why ratios are clipped


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "axis"), [((96, 40), 1), ((40, 96), 0), ((24, 3, 7, 7), 0)])
def test_shapes_types_and_signal(shape: tuple[int, ...], axis: int, dtype: type, scheme: ChannelScheme) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    codes, scales = quantize(weight, axis, scheme)
    assert codes.shape == shape and scales.shape == (shape[axis],) and scales.dtype == dtype and (scales > 0).all()
    assert np.abs(codes.astype(np.float32)).max() == scheme.top
    least = {"int8": 40.0, "fp8": 31.0}[scheme.name]  # Gaussian weights keep some 42 and 31.6 dB
    assert sqnr_db(weight, widen(codes, scales, axis)) > least
    assert sqnr_db(weight, widen(codes, np.roll(scales, 1), axis)) < least  # scales of the neighbour channel


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_scales_of_tiny_float16_weights_do_not_clip_them(scheme: ChannelScheme) -> None:
    """Below 6e-5 a float16 has fewer digits: a scale rounded down there would put the largest weight far above the largest code."""
    peaks = np.linspace(1e-6, 1e-4, 300).astype(np.float16)
    weight = np.stack([peaks, -peaks / 2])
    scales = channel_scales(weight, 1, scheme.top)
    assert (peaks.astype(np.float32) / scales.astype(np.float32) <= scheme.top * (1 + 2.0**-9)).all()
    plain = np.maximum((peaks.astype(np.float32) / scheme.top).astype(np.float16), np.finfo(np.float16).smallest_subnormal)
    assert (peaks.astype(np.float32) / plain.astype(np.float32) > scheme.top * 1.05).any()  # what is avoided


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_slabs_do_not_show(axis: int, scheme: ChannelScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    whole = quantize(weight, axis, scheme)[0]
    monkeypatch.setattr("tmc_export.quantize._channels._SLAB", 100)
    assert np.array_equal(whole, quantize(weight, axis, scheme)[0])
