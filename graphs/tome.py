"""ToMe: merge similar tokens inside the encoder, between attention and feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Keys, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ToMe"]

_KEYS = Keys()


@register("tome")
class ToMe(Method):
    """ToMe, bipartite soft matching of tokens by their keys, r fewer after every layer.

    Paper: "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.

    In each layer, with m the keys averaged over heads: a = the even tokens, b = the odd ones; `s_ij = cos(m_ai, m_bj)` (no epsilon; the
    class token, a_0, is out). Each a_i has the partner `argmax_j s_ij`; the r of a with the largest maximum merge into their partner,
    `x_b = sum(size * x) / sum(size)`, `size_b = sum(size)`. Out: the other a, then all of b. The next layers add
    `log(size)` to the attention logits of each key.

    Shapes (b batch, n candidates, c channels): tokens `[b, n, c]` -> `[b, n-r, c]`; state `size` `[b, n-r]` float32; `key_bias =
    log(size)`.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = ToMe.Config(r=4)
    >>> stage, tokens, context = context_for(ToMe, config, "encoder", index=1, seed=0)
    >>> ToMe.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (57, 61)

    Limits: the tokens are no raster afterwards and not in order: the remaining a by falling similarity without a class token, by index
    with one. No raster means that a pool cannot follow. At most one class token.

    Where the official code differs: it lowers an r that is too large without a word; here that takes `clamp: true`. It draws no line
    between padding and patches; here padding weighs nothing and merges last. Ties go to the lowest index.
    """

    paper = "Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461"
    official = "facebookresearch/ToMe@af95e4b tome/merge.py:bipartite_soft_matching, merge_wavg; tome/patch/timm.py"
    mechanism = "similarity"
    sites = ("encoder", "encoder.<l>.mid")

    samples = (Sample("encoder", {"r": 9}, too_much={"r": 33}), Sample("encoder.1.mid", {"r": 4}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            r: tokens merged away per layer; one number, or one for each of the layers that merge.
            layers: the encoder layers (0-based) that merge with `at: encoder`; all of them when left out.
            clamp: lower an r that is too large to what a layer can merge, as the official code does, instead of refusing it.
        """

        r: int | tuple[int, ...] = 8
        layers: tuple[int, ...] | None = Field(default=None)
        clamp: bool = False

        @model_validator(mode="after")
        def _positive(self) -> ToMe.Config:
            if min(self.r if isinstance(self.r, tuple) else (self.r,), default=-1) < 0:
                raise ValueError(f"r counts tokens merged away per layer and is at least 0, got {self.r}")
            return self

    @staticmethod
    def stages(at: Site, config: ToMe.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for every layer that merges, or the one of `encoder.<l>.mid`."""
        need_site("tome", at, "encoder", "encoder.mid")
        if at.point is None and at.layer is not None:
            raise ValueError(
                f"tome merges between attention and feed-forward, not at {at}; write at: {at}.mid, or at: encoder for every layer"
            )
        need_raster_encoder("tome", at, facts)
        if facts.encoder.class_tokens > 1:
            raise ValueError(
                f"tome protects one class token, and {facts.architecture} has {facts.encoder.class_tokens}; use at: projector methods"
            )
        depth = facts.encoder.layers
        layers = (at.layer,) if at.layer is not None else tuple(range(depth)) if config.layers is None else config.layers
        if not layers or list(layers) != sorted(set(layers)) or not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"layers: {list(layers)} are not ascending layers of the {depth} of the encoder; use 0 to {depth - 1}")
        if isinstance(config.r, tuple) and len(config.r) != len(layers):
            raise ValueError(
                f"r: {list(config.r)} has {len(config.r)} numbers for {len(layers)} layers that merge; give one for each, or a single one"
            )
        return tuple(Stage(Site("encoder", layer, "mid"), (_KEYS,), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ToMe.Config, facts: ModelFacts) -> Layout:
        """`n - r` tokens, class token first."""
        first = layout.class_tokens
        r = config.r[stage.index] if isinstance(config.r, tuple) else config.r
        most = (layout.tokens - first) // 2
        if r > most and not config.clamp:
            raise ValueError(
                f"r: {r} exceeds the {most} pairs among the {layout.tokens} tokens that arrive at {stage.at}; lower r, or set clamp: "
                "true to merge all it can"
            )
        r = min(r, most)
        if r == 0:
            return layout
        visual = Segment("visual", layout.tokens - first - r)
        return Layout((Segment("class", first), visual) if first else (visual,), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ToMe.Config) -> Compressed:
        """Merge the r most similar pairs."""
        import torch

        size = context.state.get("size")
        size = context.valid.float() if size is None else size.float()
        n, b = tokens.shape[1], tokens.shape[0]
        r = n - ToMe.layout(stage, context.layout, config, context.facts).tokens
        if r == 0:
            index = torch.arange(n).expand(b, n).contiguous()
            return Compressed(tokens, index, context.valid, state={"size": size}, key_bias=_log(size))
        kept, merged, partner = _match(context.captured[_KEYS], r, context.layout.class_tokens, context.valid)
        return _merge(tokens, size, kept, merged, partner, context.valid)


def _log(size: Tensor) -> Tensor:
    """Return log(size) with 0 for padding, whose attention the validity already masks."""
    return size.clamp_min(1.0).log()


def _match(keys: Tensor, r: int, first: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Match even tokens with odd ones.

    Returns:
        The even tokens that stay `[b, a-r]` and those that merge `[b, r]`, both counted among the even ones, and the odd partner `[b, r]`
        of the latter.
    """
    import torch

    from tmc_export.graphs._ops import argmax, cosine, gather, top_in_order

    metric = keys.float().mean(dim=2)
    score = cosine(metric[:, 0::2], metric[:, 1::2])
    both = valid[:, 0::2].unsqueeze(2) & valid[:, 1::2].unsqueeze(1)
    score = torch.where(both, score, torch.full_like(score, -2.0))
    best = score.amax(dim=2)
    if first:
        best = torch.cat([torch.full_like(best[:, :1], -1e30), best[:, 1:]], dim=1)
    order = top_in_order(best, best.shape[1])
    merged, kept = order[:, :r], order[:, r:]
    if first:
        from tmc_export.graphs._ops import complement

        kept = complement(merged, best.shape[1])
    return kept, merged, gather(argmax(score), merged)


def _merge(tokens: Tensor, size: Tensor, kept: Tensor, merged: Tensor, partner: Tensor, valid: Tensor) -> Compressed:
    """Average by size: `[b, n, c]` to `[b, n-r, c]`, the remaining even tokens, then the odd ones."""
    import torch

    from tmc_export.graphs._ops import gather, one_hot

    dtype, b, n = tokens.dtype, tokens.shape[0], tokens.shape[1]
    weight = torch.where(valid, size, torch.zeros_like(size))
    odds = torch.arange(1, n, 2)
    onto = one_hot(partner, odds.shape[0]).transpose(1, 2)
    even_weight = gather(weight[:, 0::2], merged)
    odd_size = weight[:, 1::2] + (onto @ even_weight.unsqueeze(2)).squeeze(2)
    total = odd_size.clamp_min(1e-30).unsqueeze(2)
    moved = onto @ (gather(tokens[:, 0::2], merged).float() * even_weight.unsqueeze(2))
    odd = (tokens[:, 1::2].float() * weight[:, 1::2].unsqueeze(2) + moved) / total
    out = torch.cat([gather(tokens[:, 0::2], kept), odd.to(dtype)], dim=1)
    new_size = torch.cat([gather(weight[:, 0::2], kept), odd_size], dim=1)
    source = torch.cat([kept * 2, odds.expand(b, -1)], dim=1)
    stay = kept.shape[1]
    row = torch.arange(stay + odds.shape[0]).expand(b, -1)
    where = torch.cat([source, merged * 2], dim=1)
    assign = torch.zeros_like(where).scatter(1, where, torch.cat([row, partner + stay], dim=1))
    mix = one_hot(assign, stay + odds.shape[0]).transpose(1, 2) * weight.unsqueeze(1)
    mix = mix / mix.sum(dim=2, keepdim=True).clamp_min(1e-30)
    return Compressed(out, source, new_size > 0, assign=assign, mix=mix, state={"size": new_size}, key_bias=_log(new_size))
