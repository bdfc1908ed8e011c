"""The KV slots of one block: static buffers, what lies in each slot, and where the next token goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import BlockProgram, Program
from tmc_export.core.errors import RuntimeInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BlockSlots"]


class BlockSlots:
    """Buffers `[1, g, C, d]` per layer of a block.

    Attributes:
        order: int64 `[1, C]`; place in the conversation of what a slot holds.
        valid: bool `[1, C]`.
        used: slots filled.
        next_position: rotary position that the next token gets in this block.
    """

    def __init__(self, block: BlockProgram, program: Program) -> None:
        self.block, self._axes = block, program.rope_axes
        shape = (1, program.kv_heads, block.capacity, program.head_dim)
        self._layers = range(block.first, block.last)
        self._buffers = {f"past_key_values.{i}.{kind}": np.zeros(shape, program.dtype) for i in self._layers for kind in ("key", "value")}
        self.order: Array = np.zeros((1, block.capacity), np.int64)
        self.valid: Array = np.zeros((1, block.capacity), np.bool_)
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

    def feed(self) -> dict[str, Array]:
        """The past inputs of the block's graphs."""
        return {**self._buffers, "past_order": self.order, "past_valid": self.valid}

    def step_feed(self) -> dict[str, Array]:
        """What the block's decode graph reads besides `hidden`, in arrays that stay from token to token, to be filled in place."""
        row = {name: np.zeros((1, 1), np.int64) for name in ("order", "since")}
        positions = np.zeros((self._axes, 1, 1), np.int64)
        return {**row, "positions": positions, "valid": np.ones((1, 1), np.bool_), "last": np.zeros(1, np.int64), **self.feed()}

    def key(self, layer: int) -> Array:
        """Keys `[1, g, C, d]` of a layer."""
        return self._buffers[f"past_key_values.{layer}.key"]

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

    def write(self, present: Mapping[str, Array], order: Array) -> None:
        """Append the first `len(order)` rows of the block's new keys and values; without any `present.*` the graph wrote them itself."""
        count, start = order.shape[0], self.used
        if any(name.startswith("present.") for name in present):
            for name, buffer in self._buffers.items():
                buffer[:, :, start : start + count] = present[name.replace("past_key_values.", "present.", 1)][:, :, :count]
        self.order[0, start : start + count] = order
        self.valid[0, start : start + count] = True
        self.used += count

    def compact(self, start: int, keep: Array) -> None:
        """Of the slots from `start` on, keep those that `keep` (bool) marks, and move them together."""
        chosen = start + np.flatnonzero(keep)
        end = start + chosen.shape[0]
        for buffer in self._buffers.values():
            buffer[:, :, start:end] = buffer[:, :, chosen]
        self.order[0, start:end] = self.order[0, chosen]
        self.valid[0, end:] = False
        self.used = end
