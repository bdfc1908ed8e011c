from __future__ import annotations

import numpy as np

from tmc_export.runtime._sums import columns_of_turn, pad_columns


def whole(weights: np.ndarray, start: int) -> np.ndarray:
    """Sums over the rows of a turn that begins at key `start`, over its own keys."""
    return weights[start:, start:].sum(0)


def test_pieces_add_up_to_the_turn() -> None:
    """Seven tokens behind three others, in pieces of three; the slots hold what came before each piece."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((10, 10)))
    slots, chunk, start = 12, 3, 3
    total = np.zeros(7)
    for begin in (0, 3, 6):
        piece = slice(begin, min(begin + chunk, 7))
        rows = weights[start + piece.start : start + piece.stop]
        given = np.zeros(slots + chunk)
        given[: start + piece.start] = rows[:, : start + piece.start].sum(0)
        given[slots : slots + piece.stop - piece.start] = rows[:, start + piece.start : start + piece.stop].sum(0)
        total += columns_of_turn(given, slots, start, 7, piece)
    np.testing.assert_allclose(total, whole(weights, start))
    shifted = columns_of_turn(given, slots, start - 1, 7, slice(6, 7))
    assert abs(shifted - columns_of_turn(given, slots, start, 7, slice(6, 7))).max() > 0.1  # a slot off would be seen


def test_a_graph_without_a_past_has_the_turn_in_front() -> None:
    sums = np.arange(10.0).reshape(2, 5)
    np.testing.assert_array_equal(columns_of_turn(sums, 0, 0, 3, slice(0, 3)), sums[:, :3])


def test_padding_is_zero() -> None:
    np.testing.assert_array_equal(pad_columns(np.ones((1, 2), np.float32), 4), np.array([[1, 1, 0, 0]], np.float32))
