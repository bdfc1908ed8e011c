"""The KV slots of one block: static buffers, what lies in each slot, and where the next token goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import BlockProgram, Program
from tmc_export.core.errors import RuntimeInputError
from tmc_export.runtime._backend import Backend, Held
from tmc_export.runtime._host import HostMemory
from tmc_export.runtime._step_row import cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BlockSlots"]


class BlockSlots:
    """Slots `[1, g, C, d]` per layer of a block, and on the host what lies in them.

    Where the bundle keeps codes (`Program.kv`) they are moved as they are; only graphs widen them.

    Args:
        block: the block.
        program: the bundle's.
        backend: gives the memory of keys and values; None: arrays.

    Attributes:
        order: int64 `[1, C]`; place in the conversation of what a slot holds.
        valid: bool `[1, C]`.
        used: slots filled.
        next_position: rotary position that the next token gets in this block.
    """

    def __init__(self, block: BlockProgram, program: Program, backend: Backend | None = None) -> None:
        self.block = block
        shape = (1, program.kv_heads, block.capacity, program.head_dim)
        names = [f"past_key_values.{i}.{kind}" for i in range(block.first, block.last) for kind in ("key", "value")]
        self._store = (HostMemory() if backend is None else backend).slots(names, shape, program.slot_dtype)
        self.order: Array = np.zeros((1, block.capacity), np.int64)
        self.valid: Array = np.zeros((1, block.capacity), np.bool_)
        self._places, self._filled = cells(self.order), cells(self.valid)
        self.used = 0
        self.next_position = 0

    def reset(self) -> None:
        """Forget everything; buffers stay."""
        self.valid[:] = False
        self.used = self.next_position = 0

    def forget(self, used: int, next_position: int) -> None:
        """Go back to where `used` slots were filled and the next token had `next_position`."""
        self.valid[:, used:] = False
        self.used, self.next_position = used, next_position

    def feed(self) -> dict[str, Held]:
        """The past inputs of the block's graphs."""
        return {**self._store.tensors, "past_order": self.order, "past_valid": self.valid}

    def key(self, layer: int) -> Held:
        """Keys `[1, g, C, d]` of a layer."""
        return self._store.tensors[f"past_key_values.{layer}.key"]

    def check_room(self, count: int) -> None:
        """Refuse tokens that the slots cannot take.

        Raises:
            RuntimeInputError: the context is full.
        """
        if self.used + count > self.block.capacity:
            raise RuntimeInputError(
                f"the context is full: block {self.block.index} has {self.block.capacity} slots, {self.used} are used "
                f"and {count} more are needed; "
                "start a new conversation, or build with larger inputs.text_tokens or inputs.new_tokens"
            )

    def write(self, present: Mapping[str, Held], order: Array) -> None:
        """Append the first `len(order)` rows of the block's new keys and values; without any `present.*` the graph wrote them itself."""
        count, start = order.shape[0], self.used
        if any(name.startswith("present.") for name in present):
            self._store.append(present, start, count)
        self.order[0, start : start + count] = order
        self.valid[0, start : start + count] = True
        self.used += count

    def write_one(self, present: Mapping[str, Held], place: int) -> None:
        """As `write`, of one row: a decode step's."""
        for name in present:
            if name.startswith("present."):
                self._store.append(present, self.used, 1)
                break
        self._places[self.used], self._filled[self.used] = place, True
        self.used += 1

    def compact(self, start: int, keep: Array) -> None:
        """Of the slots from `start` on, keep those that `keep` (bool) marks, and move them together."""
        chosen = start + np.flatnonzero(keep)
        end = start + chosen.shape[0]
        self._store.move(start, chosen)
        self.order[0, start:end] = self.order[0, chosen]
        self.valid[0, end:] = False
        self.used = end
