"""Sums over rows of an attention map, from the reference's queries and keys: whole maps in float64, nothing in blocks.

Legend: h heads, T tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import RowSum
from tmc_export.verify._trace import BlockTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["expected_sums"]


def expected_sums(trace: BlockTrace, layer: int, sums: Sequence[RowSum], start: int) -> list[Array]:
    """Add up the rows of a layer's map from row `start` on.

    Returns:
        Per sum float32 `[T]`, with `heads="none"` `[h, T]`.
    """
    query, key = trace.queries[layer].astype(np.float64)[:, start:], trace.keys[layer].astype(np.float64)
    products = np.einsum("htd,hsd->hts", query, key.repeat(query.shape[0] // key.shape[0], 0))
    products = np.where(trace.order[None] <= trace.order[start:, None], products, -np.inf)
    weights = np.exp(products - products.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    text = trace.group[start:] == 0
    return [_joined(weights[:, _chosen(one, text)], one).sum(-2).astype(np.float32) for one in sums]


def _chosen(one: RowSum, text: Array) -> Array:
    return {"all": np.ones_like(text), "text": text, "visual": ~text}[one.rows]


def _joined(weights: Array, one: RowSum) -> Array:
    if one.heads == "none":
        return weights
    joined: Array = weights.max(0) if one.heads == "max" else weights.sum(0)
    return joined / len(weights) if one.heads == "mean" else joined
