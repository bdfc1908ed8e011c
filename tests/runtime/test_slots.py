"""KV slots: append, compact, forget, and what a full block says."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from tests.runtime._fake import WIDTH, make_program
from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._slots import BlockSlots


@pytest.fixture
def slots() -> BlockSlots:
    program = make_program(layers=2, visual=4, text=4, new=2)
    return BlockSlots(program.blocks[0], program)


def _new(count: int, width: int, first: float) -> dict[str, Any]:
    """Rows `first`, `first + 1`, …; rows behind `count` are padding, which must not be written."""
    rows = np.where(np.arange(width) < count, first + np.arange(width), np.nan).astype(np.float32)
    full = np.broadcast_to(rows[:, None], (width, WIDTH))[None, None]
    return {f"present.{layer}.{kind}": full + (layer if kind == "key" else -layer) for layer in (0, 1) for kind in ("key", "value")}


def _held(slots: BlockSlots, layer: int) -> list[float]:
    key = slots.key(layer)[0, 0]
    assert (key == key[:, :1]).all()
    return [float(x) for x in key[: slots.used, 0]]


def test_only_the_valid_rows_are_appended(slots: BlockSlots) -> None:
    slots.write(_new(3, 4, 10), np.array([0, 1, 2]))
    slots.write(_new(1, 4, 20), np.array([3]))
    assert slots.used == 4 and _held(slots, 0) == [10, 11, 12, 20] and _held(slots, 1) == [11, 12, 13, 21]
    assert slots.order[0, :4].tolist() == [0, 1, 2, 3] and slots.valid[0].tolist() == [True] * 4 + [False] * 6
    assert all(np.isfinite(array).all() for array in slots.feed().values())
    assert slots.feed()["past_key_values.1.value"][0, 0, 3, 0] == 19


def test_compacting_moves_the_kept_rows_together_and_leaves_earlier_turns_alone(slots: BlockSlots) -> None:
    slots.write(_new(2, 2, 10), np.array([0, 1]))
    slots.write(_new(5, 5, 20), np.array([2, 3, 4, 5, 6]))
    slots.compact(2, np.array([True, False, False, True, True]))
    assert _held(slots, 0) == [10, 11, 20, 23, 24] and _held(slots, 1) == [11, 12, 21, 24, 25]
    assert slots.order[0, :5].tolist() == [0, 1, 2, 5, 6] and slots.valid[0].tolist() == [True] * 5 + [False] * 5
    slots.write(_new(1, 1, 30), np.array([7]))
    assert _held(slots, 0) == [10, 11, 20, 23, 24, 30] and slots.order[0, 5] == 7


@pytest.mark.parametrize(("codes", "held"), [("int8", np.int8), ("fp8", np.uint8)])
def test_codes_are_kept_and_moved_as_they_are(codes: Literal["int8", "fp8"], held: type[np.generic]) -> None:
    """Nothing is widened on the way, and nothing is cast into them; fp8 codes are bytes."""
    program = make_program(layers=2, visual=4, text=4, new=2)
    program = program.model_copy(update={"kv": SlotCodes(dtype=codes, scales={})})
    assert program.slot_kind == codes and program.slot_dtype == np.dtype(held).name
    slots = BlockSlots(program.blocks[0], program)
    slots.write({name: np.nan_to_num(rows).astype(held) for name, rows in _new(4, 4, 120).items()}, np.array([0, 1, 2, 3]))
    slots.compact(0, np.array([True, False, False, True]))
    assert {array.dtype for name, array in slots.feed().items() if name.startswith("past_key")} == {np.dtype(held)}
    assert _held(slots, 0) == [120, 123] and _held(slots, 1) == [121, 124]
    with pytest.raises(BundleError, match=f"new rows of float32 do not fit slots of {np.dtype(held)}; build the bundle again"):
        slots.write(_new(1, 1, 5), np.array([4]))


@pytest.mark.parametrize("keep", [[True] * 3, [False] * 3])
def test_compacting_to_all_or_nothing(slots: BlockSlots, keep: list[bool]) -> None:
    slots.write(_new(3, 3, 10), np.array([0, 1, 2]))
    slots.compact(0, np.array(keep))
    assert slots.used == sum(keep) == slots.valid.sum() and _held(slots, 0) == [10, 11, 12][: sum(keep)]


def test_forgetting_and_starting_again(slots: BlockSlots) -> None:
    slots.write(_new(3, 3, 10), np.array([0, 1, 2]))
    slots.next_position = 3
    slots.write(_new(2, 2, 20), np.array([3, 4]))
    slots.forget(3, 3)
    assert (slots.used, slots.next_position) == (3, 3) and slots.valid[0].tolist() == [True] * 3 + [False] * 7
    slots.reset()
    assert (slots.used, slots.next_position) == (0, 0) and not slots.valid.any()


def test_a_full_block_says_what_to_do(slots: BlockSlots) -> None:
    slots.write(_new(8, 8, 0), np.arange(8))
    slots.check_room(2)
    with pytest.raises(RuntimeInputError, match=r"block 0 has 10 slots, 8 are used and 3 more .* start a new conversation"):
        slots.check_room(3)


def test_one_row_is_written_as_many_are(slots: BlockSlots) -> None:
    program = make_program(layers=2, visual=4, text=4, new=2)
    other = BlockSlots(program.blocks[0], program)
    for place in (4, 9):
        slots.write(_new(1, 4, place), np.array([place]))
        other.write_one(_new(1, 4, place), place)
    assert slots.used == other.used == 2 and other.valid.dtype == np.bool_ and other.order[0, :3].tolist() == [4, 9, 0]
    np.testing.assert_array_equal(slots.order, other.order)
    np.testing.assert_array_equal(slots.valid, other.valid)
    np.testing.assert_array_equal(slots.key(1), other.key(1))
