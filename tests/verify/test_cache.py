"""The reference's cache: rows as they are, or as slots of codes give them back."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tmc_export.bundle.program import SlotCodes  # noqa: E402
from tmc_export.verify._cache import Cache  # noqa: E402

CODES = SlotCodes(dtype="int8", scales={"0.key": (0.5, 0.25), "0.value": (1.0, 2.0)})


def rows(*values: float) -> torch.Tensor:
    """The same rows in both heads, `[1, 2, T, 1]`."""
    return torch.tensor(values)[None, None, :, None].expand(1, 2, -1, 1)


def test_rows_are_rounded_as_they_come_head_by_head() -> None:
    cache = Cache(1, CODES)
    key, value = cache.update(rows(0.3, 100.0, -100.0), rows(0.5, 1.5, -300.0), 0)
    assert key[0, :, :, 0].tolist() == [[0.5, 63.5, -64.0], [0.25, 31.75, -32.0]]
    assert value[0, :, :, 0].tolist() == [[0.0, 2.0, -128.0], [0.0, 2.0, -256.0]]  # half-way goes to the even code
    key, _ = cache.update(rows(0.7), rows(0.0), 0)
    assert key[0, :, :, 0].tolist() == [[0.5, 63.5, -64.0, 0.5], [0.25, 31.75, -32.0, 0.75]]
    assert torch.equal(cache.keys[0], key)


def test_fp8_rows_keep_three_bits_behind_the_first() -> None:
    codes = SlotCodes(dtype="fp8", scales={"0.key": (1.0, 0.5), "0.value": (1.0, 2.0)})
    key, value = Cache(1, codes).update(rows(1.0625, 17.0, 1000.0), rows(1.1875, -19.0, -300.0), 0)
    assert key[0, :, :, 0].tolist() == [[1.0, 16.0, 448.0], [1.0, 16.0, 224.0]]  # half-way goes to the even code; the last one is 448
    assert value[0, :, :, 0].tolist() == [[1.25, -20.0, -288.0], [1.25, -20.0, -288.0]]


def test_rows_are_rounded_for_who_only_looks() -> None:
    cache = Cache(1, CODES)
    with cache.peeking():
        key, _ = cache.update(rows(0.3), rows(0.0), 0)
    assert key[0, :, 0, 0].tolist() == [0.5, 0.25] and cache.keys == [None]


def test_without_codes_rows_stay_as_they_are() -> None:
    key, value = Cache(1).update(rows(0.3, 100.0), rows(0.5, 1e9), 0)
    assert torch.equal(key, rows(0.3, 100.0)) and torch.equal(value, rows(0.5, 1e9))
