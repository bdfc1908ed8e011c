"""The attention function that every decoder layer runs with: static slots, a mask from slot vectors, query rows on the side.

It is registered with transformers' `AttentionInterface`, so a family's own layer code (biases, q/k norms, rotary variants) is
traced as it is. The form (heads expanded, 4-D MatMul, additive mask, Softmax, MatMul) is the one that TensorRT-RTX fuses.

Legend: b batch, h heads, g KV heads, T new tokens, P past slots, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention, Need
from tmc_export.surgery._sums import add_rows, by_need
from tmc_export.surgery.replay import round_slots

__all__ = [
    "IMPLEMENTATION",
    "MASKED",
    "AttentionState",
    "additive_mask",
    "expand_heads",
    "recording",
    "register_attention",
    "static_attention",
]

IMPLEMENTATION = "tmc_static"
MASKED = -3.0e4
"""Added to a masked score: far below any score, inside float16's range, and finite so that a row that sees nothing stays finite."""


@dataclass
class AttentionState:
    """What one traced subgraph gives to the attention function and gets from it.

    Attributes:
        past: layer → keys and values `[b, g, P, d]`.
        masks: layer → additive mask `[b, 1, T, P+T]`.
        wanted: layer → which query rows to record.
        last: `[b]` row of the last valid token.
        summed: layer → sums over rows of its map to record.
        member: which rows belong to which sum; see `_sums.members_of`.
        keys, values: recorded, `[b, g, T, d]`.
        queries: recorded, scaled, `[b, h, 1 | T, d]`.
        sums: recorded, per need `[b, P+T]`, with `heads="none"` `[b, h, P+T]`.
    """

    past: Mapping[int, tuple[Tensor, Tensor]]
    masks: Mapping[int, Tensor]
    wanted: Mapping[int, Literal["last", "all"]] = field(default_factory=dict)
    last: Tensor | None = None
    summed: Mapping[int, tuple[Attention, ...]] = field(default_factory=dict)
    member: Mapping[str, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, dict[Need, Tensor]] = field(default_factory=dict)


_STATE: ContextVar[AttentionState | None] = ContextVar("tmc_attention_state", default=None)


@contextmanager
def recording(state: AttentionState) -> Iterator[AttentionState]:
    """Make `state` the one that attention reads and writes while the context lasts."""
    token = _STATE.set(state)
    try:
        yield state
    finally:
        _STATE.reset(token)


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat KV heads to the query heads: `[b, g, s, d]` → `[b, h, s, d]`."""
    batch, groups, slots, width = tensor.shape
    if groups == heads:
        return tensor
    return tensor[:, :, None].expand(batch, groups, heads // groups, slots, width).reshape(batch, heads, slots, width)


def additive_mask(
    query_order: Tensor, key_order: Tensor, key_valid: Tensor, window: int | None, dtype: torch.dtype, since: Tensor | None = None
) -> Tensor:
    """Return 0 where a query sees a key and `MASKED` elsewhere.

    Args:
        query_order: `[b, T]` place of each query in the conversation.
        key_order: `[b, s]`.
        key_valid: `[b, s]` bool.
        window: a query sees keys less than this many places back; None: all.
        dtype: of the result.
        since: `[b, T]` first place that each query sees; None: all.

    Returns:
        `[b, 1, T, s]`.
    """
    never = torch.iinfo(torch.int64).max
    visible = torch.where(key_valid, key_order, never)[:, None, :] <= query_order[:, :, None]  # one comparison of T x s, not three
    if window is not None:
        visible = visible & (query_order[:, :, None] - key_order[:, None, :] < window)
    if since is not None:
        visible = visible & (key_order[:, None, :] >= since[:, :, None])
    return torch.where(visible, 0.0, MASKED).to(dtype)[:, None]


def static_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Attend with the new rows to the past and to each other, and record what the state in force asks for.

    Args:
        module: the layer's attention; its number and the channels of a head are read.
        query: `[b, h, T, d]`, rotated.
        key: `[b, g, T, d]`, rotated.
        value: `[b, g, T, d]`.
        attention_mask: not used; the state has the mask.
        scaling: of the products; `d ** -0.5` where none is given.
        options: what transformers hands on; `softcap` is refused.

    Returns:
        `[b, T, h, d]`, and no weights.

    Raises:
        ExportError: no state is in force, or the layer caps its scores.
    """
    state = _STATE.get()
    if state is None:
        raise ExportError(
            "the static attention function ran outside of a subgraph; load the model with its own attention to run it as it is"
        )
    if options.get("softcap"):
        raise ExportError(f"attention with softcap={options['softcap']} is not served")
    layer = int(module.layer_idx)
    query = query * (module.head_dim**-0.5 if scaling is None else scaling)
    key, value = round_slots(layer, key, value)
    state.keys[layer], state.values[layer] = key, value
    if (rows := state.wanted.get(layer)) is not None:
        if rows == "last" and state.last is not None:
            index = state.last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
            state.queries[layer] = query.gather(2, index)
        else:
            state.queries[layer] = query
    past_key, past_value = state.past[layer]
    keys = expand_heads(torch.cat([past_key, key], 2), query.shape[1])
    values = expand_heads(torch.cat([past_value, value], 2), query.shape[1])
    weights = (query @ keys.transpose(-1, -2) + state.masks[layer]).softmax(-1)
    if needs := state.summed.get(layer):
        state.sums[layer] = by_need(needs, add_rows(needs, {False: weights}, state.member))
    return (weights @ values).transpose(1, 2).contiguous(), None


def register_attention() -> str:
    """Register the function with transformers and return the name a model is to be made with."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, static_attention)
    return IMPLEMENTATION
