"""Sums over rows of an attention map, which a block hands out piece by piece: one column per token of the turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import BlockProgram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["columns_of_turn", "pad_columns", "sum_names"]


def sum_names(block: BlockProgram) -> list[str]:
    """Names of the sums that a block's prefill and chunk graphs return."""
    return [f"sums.{layer}.{n}" for layer, sums in block.row_sums.items() for n in range(len(sums))]


def columns_of_turn(sums: Array, past: int, start: int, count: int, piece: slice) -> Array:
    """Bring the sums over the rows of one piece of a turn to the turn's tokens.

    Args:
        sums: `[…, P + T]`, over P slots and the piece's own T tokens.
        past: P.
        start: slot of the turn's first token.
        count: n, tokens of the turn.
        piece: which of them the rows are; no row sees what comes behind.

    Returns:
        `[…, n]`; what earlier turns left has no column.
    """
    columns = np.zeros((*sums.shape[:-1], count), sums.dtype)
    if past:
        columns[..., : piece.start] = sums[..., start : start + piece.start]
    columns[..., piece] = sums[..., past : past + piece.stop - piece.start]
    return columns


def pad_columns(columns: Array, size: int) -> Array:
    """Fill the last axis up to `size` with zeros."""
    return np.concatenate([columns, np.zeros((*columns.shape[:-1], size - columns.shape[-1]), columns.dtype)], -1)
