"""What the reference's encoder gives a stage beyond the attention weights of the layer that ran: products before softmax, one joined head,
and the layer to come.

Legend: n tokens, h heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention, Keys
from tmc_export.verify._towers import Tower

__all__ = ["from_products", "keys_ahead"]


def keys_ahead(tower: Tower, layer: int, tokens: Tensor, need: Keys) -> Tensor:
    """Keys `[1, n, h, d]` that encoder layer `layer` would compute of `tokens [1, n, c]`."""
    return tower.products(layer, tokens)[1]


def from_products(tower: Tower, layer: int, tokens: Tensor, key_bias: Tensor | None, need: Attention, place: str) -> Tensor:
    """Attention of an encoder layer over `tokens [1, n, c]`, from its own projections: `[1, n]`, or `[1, h, n]` with `heads="none"`.

    Args:
        tower: the encoder.
        layer: which layer; the tokens are those that enter it.
        tokens: `[1, n, c]`.
        key_bias: `[1, n]` or None.
        need: rows of the class token, or all of them summed.
        place: for messages.

    Raises:
        ExportError: other rows are asked for.
    """
    if need.rows not in ("cls", "all"):
        raise ExportError(f"the reference does not capture {need} at {place}; an encoder has class-token rows and column sums")
    products, _ = tower.products(layer, tokens)
    if need.heads == "joined":  # q and k side by side over all heads, scaled by the root of the whole width
        products = products.sum(1, keepdim=True) / products.shape[1] ** 0.5
    if key_bias is not None:
        products = products + key_bias[:, None, None, :].float()
    weights = products if need.logits else torch.softmax(products, -1)
    rows = weights[:, :, :1] if need.rows == "cls" else weights
    heads = {"mean": rows.mean(1, keepdim=True), "max": rows.amax(1, keepdim=True), "sum": rows.sum(1, keepdim=True)}
    joined = heads.get(need.heads, rows).sum(2)
    return joined if need.heads == "none" else joined[:, 0]
