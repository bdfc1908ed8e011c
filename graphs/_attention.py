"""What learned resamplers are made of, as functions over named weights: attention, BERT's and Llama's blocks.

Attention is the plain form (MatMul, Softmax, MatMul) that every engine takes; softmax is float32, and the keys that a query may not see
get a logit of -1e30, so that a row which sees nothing stays finite. Linear layers and norms are those of `_projector.py`.

Legend: b batch, r queries, n keys, c channels, h heads, d channels of a head, t tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tmc_export.core.facts import DecoderFacts
from tmc_export.graphs._contract import Shape
from tmc_export.graphs._projector import dense, dense_shapes, layer_norm, norm_shapes, rms_norm

if TYPE_CHECKING:
    from torch import Tensor

    from tmc_export.graphs._contract import Compressed

    Weights = Mapping[str, Tensor]

__all__ = [
    "attend",
    "bert_attention",
    "bert_attention_weights",
    "bert_feed_forward",
    "bert_feed_forward_weights",
    "llama_layer",
    "llama_layer_weights",
    "need_divisible",
    "need_fewer",
    "packed_attention",
    "packed_attention_weights",
    "queries_of",
    "rotary",
    "summaries",
]

_UNSEEN = -1.0e30
_BERT_EPS = 1e-12

Shapes = dict[str, Shape]


# ------------------------------------------------------------------------------------------------------------- refusals
def need_divisible(method: str, what: str, width: int, heads: int) -> None:
    """Raise `ValueError` unless `width` (what: its name) divides into `heads`."""
    if width % heads:
        raise ValueError(f"{method}: {what} {width} does not divide into heads: {heads}; set heads to a divisor of {width}")


def need_fewer(method: str, option: str, made: int, arriving: int, at: object) -> None:
    """Raise `ValueError` when a module would make more tokens than arrive."""
    if arriving < 1:
        raise ValueError(
            f"{method}: {option} makes {made} tokens of the {arriving} that are left at {at}; put {method} first, or remove it"
        )
    if made > arriving:
        raise ValueError(f"{method}: {option} makes {made} tokens of the {arriving} that arrive at {at}; lower it to at most {arriving}")


# ------------------------------------------------------------------------------------------------------------- attention
def queries_of(learned: Tensor, like: Tensor) -> Tensor:
    """Return learned tokens `[r, c]` or `[1, r, c]` as `[b, r, c]`, one copy for every item of `like` `[b, ...]`."""
    flat = learned if learned.dim() == 3 else learned.unsqueeze(0)
    return flat.expand(like.shape[0], -1, -1)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None, kv_heads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with projected queries `[b, r, h*d]` to keys and values `[b, n, kv*d]`.

    Args:
        query: projected, not yet scaled.
        key: projected.
        value: projected.
        heads: query heads h.
        visible: bool `[b, n]` or `[b, r, n]`; None: everything.
        kv_heads: heads of keys and values, h where not given; each serves `h / kv` query heads.

    Returns:
        The joined heads `[b, r, h*d]`, and the weights `[b, h, r, n]` in float32.
    """
    import torch

    kv = kv_heads or heads
    q, k, v = _split(query, heads), _split(key, kv), _split(value, kv)
    if kv != heads:
        k, v = (t.unsqueeze(2).expand(-1, -1, heads // kv, -1, -1).flatten(1, 2) for t in (k, v))
    logits = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).float()
    if visible is not None:
        seen = visible.reshape(visible.shape[0], 1, -1, visible.shape[-1])
        logits = torch.where(seen, logits, torch.full_like(logits, _UNSEEN))
    share = logits.softmax(dim=-1)
    out = share.to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), share


def summaries(tokens: Tensor, valid: Tensor) -> Compressed:
    """Return made tokens `[b, k, c]` as a result: synthetic (source -1), and valid where any candidate is (`valid` `[b, n]`)."""
    import torch

    from tmc_export.graphs._contract import Compressed

    b, k = tokens.shape[0], tokens.shape[1]
    some = valid.float().amax(dim=1, keepdim=True) > 0
    return Compressed(tokens, torch.full((b, k), -1, dtype=torch.int64), some.expand(b, k).contiguous())


# ------------------------------------------------------------------------------------------- torch's packed multi-head attention
def packed_attention_weights(name: str, width: int) -> Shapes:
    """Return the shapes of a `torch.nn.MultiheadAttention` whose queries, keys and values are equally wide."""
    packed: Shapes = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return packed | dense_shapes(f"{name}.out_proj", width, width)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, name: str, heads: int, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what that module makes of `[b, r, c]` and `[b, n, c]`, and its weights averaged over heads `[b, r, n]`."""
    rows, biases = weights[f"{name}.in_proj_weight"].chunk(3), weights[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (x @ w.transpose(0, 1) + b for x, w, b in zip((query, key, value), rows, biases, strict=True))
    out, share = attend(q, k, v, heads, visible)
    return dense(out, weights, f"{name}.out_proj"), share.mean(dim=1)


# ------------------------------------------------------------------------------------------------------------ BERT's block
def bert_attention_weights(name: str, width: int, key_width: int | None = None) -> Shapes:
    """Return the shapes of BERT's attention sublayer under Hugging Face's names; `key_width` for attention to other tokens."""
    other = key_width or width
    found = dense_shapes(f"{name}.attention.query", width, width)
    for part in ("key", "value"):
        found |= dense_shapes(f"{name}.attention.{part}", other, width)
    return found | dense_shapes(f"{name}.output.dense", width, width) | norm_shapes(f"{name}.output.LayerNorm", width)


def bert_attention(x: Tensor, other: Tensor, weights: Weights, name: str, heads: int, visible: Tensor | None = None) -> Tensor:
    """Return `LN(dense(attention(x, other)) + x)` (eps 1e-12) for `x` `[b, r, c]` and `other` `[b, n, c']`."""
    q, k, v = (dense(t, weights, f"{name}.attention.{p}") for t, p in ((x, "query"), (other, "key"), (other, "value")))
    out = dense(attend(q, k, v, heads, visible)[0], weights, f"{name}.output.dense")
    return layer_norm(out + x, weights, f"{name}.output.LayerNorm", _BERT_EPS)


def bert_feed_forward_weights(first: str, second: str, width: int, intermediate: int) -> Shapes:
    """Return the shapes of BERT's feed-forward sublayer; `first` and `second` are the names of its halves."""
    wide = dense_shapes(f"{first}.dense", width, intermediate) | dense_shapes(f"{second}.dense", intermediate, width)
    return wide | norm_shapes(f"{second}.LayerNorm", width)


def bert_feed_forward(x: Tensor, weights: Weights, first: str, second: str) -> Tensor:
    """Return `LN(dense(gelu(dense(x))) + x)`, gelu exact, eps 1e-12."""
    from torch.nn import functional

    inner = functional.gelu(dense(x, weights, f"{first}.dense"))
    return layer_norm(dense(inner, weights, f"{second}.dense") + x, weights, f"{second}.LayerNorm", _BERT_EPS)


# ----------------------------------------------------------------------------------------------------------- Llama's layer
def llama_layer_weights(name: str, facts: DecoderFacts) -> Shapes:
    """Return the shapes of one Llama decoder layer of the decoder's own size."""
    c, queries, keys = facts.width, facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    found = norm_shapes(f"{name}.input_layernorm", c, bias=False) | norm_shapes(f"{name}.post_attention_layernorm", c, bias=False)
    for part, wide in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        found |= dense_shapes(f"{name}.self_attn.{part}", c, wide, bias=False)
    found |= dense_shapes(f"{name}.self_attn.o_proj", queries, c, bias=False)
    for part in ("gate_proj", "up_proj"):
        found |= dense_shapes(f"{name}.mlp.{part}", c, facts.intermediate, bias=False)
    return found | dense_shapes(f"{name}.mlp.down_proj", facts.intermediate, c, bias=False)


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `[b, 1, t, d]` at positions `[b, t]` for frequencies `[d / 2]`, in float32."""
    import torch

    angle = positions.float().unsqueeze(2) * frequencies
    both = torch.cat([angle, angle], dim=2).unsqueeze(1)
    return both.cos(), both.sin()


def _rotate(x: Tensor, heads: int, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the heads of `[b, t, h*d]` in Llama's order: the first half of a head's channels is paired with the second."""
    import torch

    split = _split(x, heads).float()
    half = split.shape[3] // 2
    turned = split * turn[0] + torch.cat([-split[..., half:], split[..., :half]], dim=3) * turn[1]
    return turned.to(x.dtype).transpose(1, 2).flatten(2)


def llama_layer(
    x: Tensor, weights: Weights, name: str, facts: DecoderFacts, turn: tuple[Tensor, Tensor], visible: Tensor, eps: float
) -> Tensor:
    """Run one Llama decoder layer on `[b, t, c]`; `turn` is `rotary`'s answer, `visible` bool `[b, t, t]`, `eps` that of its norms."""
    from torch.nn import functional

    y = rms_norm(x, weights, f"{name}.input_layernorm", eps)
    q, k, v = (dense(y, weights, f"{name}.self_attn.{part}_proj") for part in ("q", "k", "v"))
    q, k = _rotate(q, facts.heads, turn), _rotate(k, facts.kv_heads, turn)
    x = x + dense(attend(q, k, v, facts.heads, visible, facts.kv_heads)[0], weights, f"{name}.self_attn.o_proj")
    y = rms_norm(x, weights, f"{name}.post_attention_layernorm", eps)
    gate = functional.silu(dense(y, weights, f"{name}.mlp.gate_proj"))
    return x + dense(gate * dense(y, weights, f"{name}.mlp.up_proj"), weights, f"{name}.mlp.down_proj")
