"""The token table: `input_ids [b, T]` → `hidden [b, T, c]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from tmc_export.families._contract import DecoderParts

__all__ = ["Embed"]


class Embed(nn.Module):
    """The decoder's own embedding module, so that a family's scaling is traced with it."""

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__()
        self.table = parts.embed

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        return ["input_ids"]

    def output_names(self) -> list[str]:
        """Name of the output."""
        return ["hidden"]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the tokens up."""
        hidden: Tensor = self.table(input_ids)
        return hidden
