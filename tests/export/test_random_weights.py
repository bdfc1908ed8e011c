"""Random weights: the same numbers everywhere, of a size that lets signals through."""

from __future__ import annotations

import numpy as np
import pytest

from tmc_export.export.random_weights import random_weight


def test_the_numbers_are_these_on_every_machine() -> None:
    # The first raw words of Philox with the key sha256("3:a.weight")[:16], shifted to 24 bits, brought to ±sqrt(3 / 4).
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"3:a.weight").digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(8)
    want = [(int(word >> np.uint64(40)) / 2**23 - 1 + 2**-24) * (3 / 4) ** 0.5 for word in words]
    got = random_weight(3, "a.weight", (2, 4))
    assert got.dtype == np.float32 and got.shape == (2, 4)
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-6)
    assert np.array_equal(got, random_weight(3, "a.weight", (2, 4)))


@pytest.mark.parametrize(("seed", "name"), [(4, "a.weight"), (3, "b.weight")])
def test_seed_and_name_change_them(seed: int, name: str) -> None:
    assert not np.array_equal(random_weight(3, "a.weight", (2, 4)), random_weight(seed, name, (2, 4)))


@pytest.mark.parametrize(
    ("shape", "fan_in"),
    [((128, 256), 256), ((64, 32, 3, 3), 288), ((512, 1, 3, 3), 9), ((1, 64, 256), 256), ((1, 1, 4096), 4096)],
)
def test_one_output_has_variance_one(shape: tuple[int, ...], fan_in: int) -> None:
    found = random_weight(0, "x", shape).astype(np.float64)
    assert abs(found.var() * fan_in - 1) < 0.1 and abs(found.mean()) * fan_in**0.5 < 0.05
    assert np.abs(found).max() <= (3 / fan_in) ** 0.5


@pytest.mark.parametrize(
    ("name", "shape", "value"),
    [
        ("norm.weight", (5,), 1.0),
        ("gamma", (5,), 1.0),
        ("bn.running_var", (5,), 1.0),
        ("norm.bias", (5,), 0.0),
        ("bn.running_mean", (5,), 0.0),
        ("temperature", (), 1.0),
        ("head.bias", (), 0.0),
    ],
)
def test_norms_let_signals_through(name: str, shape: tuple[int, ...], value: float) -> None:
    found = random_weight(0, name, shape)
    assert found.shape == shape and (found == value).all()


def test_a_learned_vector_is_neither_silent_nor_all_ones() -> None:
    found = random_weight(0, "class_embedding", (4096,))
    assert abs(float(found.std()) * 64 - 1) < 0.05
