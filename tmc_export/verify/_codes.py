"""Codes of slots as numpy holds them: int8, and fp8 (E4M3 without infinities) as bytes, of which it has no type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.lazy import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["codes_of", "numbers_of", "steps_between"]

_TOP = 448.0


def codes_of(kind: str, numbers: Array) -> Array:
    """Round numbers to codes, ties to the even one, what is beyond the last one to it.

    Args:
        kind: `int8` or `fp8`, as `SlotCodes.dtype`.
        numbers: divided by their scales.

    >>> codes_of("int8", np.array([0.5, 1.5, -300.0])).tolist(), codes_of("fp8", np.array([1.0, 448.0, -1e9])).tolist()
    ([0, 2, -128], [56, 126, 254])
    """
    if kind == "int8":
        found: Array = np.clip(np.rint(numbers), -128, 127).astype(np.int8)
        return found
    return np.clip(numbers, -_TOP, _TOP).astype(_e4m3()).view(np.uint8)


def numbers_of(kind: str, codes: Array) -> Array:
    """Return what codes stand for, before their scales, float32.

    >>> numbers_of("fp8", np.array([0, 56, 126, 254], np.uint8)).tolist()
    [0.0, 1.0, 448.0, -448.0]
    """
    found: Array = (codes.view(_e4m3()) if kind == "fp8" else codes).astype(np.float32)
    return found


def steps_between(got: Array, want: Array) -> Array:
    """Return how many codes lie from one to the other, int64; the type says which codes: bytes are fp8, whose two zeros are one code.

    >>> steps_between(np.array([0x00, 0x01, 0x38], np.uint8), np.array([0x80, 0x81, 0x3A], np.uint8)).tolist()
    [0, 2, 2]
    """
    found: Array = np.abs(_ordered(got) - _ordered(want))
    return found


def _ordered(codes: Array) -> Array:
    """Codes as integers in the order of what they stand for."""
    wide: Array = codes.astype(np.int64)
    return np.where(wide & 0x80, -(wide & 0x7F), wide) if codes.dtype == np.uint8 else wide


def _e4m3() -> Any:
    return require("ml_dtypes", extra="export", purpose="read fp8 codes").float8_e4m3fn
