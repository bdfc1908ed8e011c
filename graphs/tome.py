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

    With `kth: z`: patches in groups of z; all but the last of each group merge into the most similar of these last ones; n // z patches
    leave, in order. What fills no group is dropped. The class token passes.

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
    between padding and patches; here padding weighs nothing and merges last. Its k-th variant knows no class token and would merge it.
    Ties go to the lowest index.
    """

    paper = "Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461"
    official = "facebookresearch/ToMe@af95e4b tome/merge.py:bipartite_soft_matching, kth_bipartite_soft_matching, merge_wavg"
    mechanism = "similarity"
    sites = ("encoder", "encoder.<l>.mid")

    samples = (
        Sample("encoder", {"r": 9}, too_much={"r": 33}),
        Sample("encoder.1.mid", {"r": 4}),
        Sample("encoder.1.mid", {"kth": 4}, too_much={"kth": 65}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            r: tokens merged away per layer; one number, or one for each of the layers that merge.
            layers: the encoder layers (0-based) that merge with `at: encoder`; all of them when left out.
            clamp: lower an r that is too large to what a layer can merge, as the official code does, instead of refusing it.
            kth: merge all but every k-th patch instead of the r most similar ones; r is not read then.
        """

        r: int | tuple[int, ...] = 8
        layers: tuple[int, ...] | None = Field(default=None)
        clamp: bool = False
        kth: int | None = Field(default=None, ge=2)

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
        return tuple(Stage(Site("encoder", layer, "mid"), (_KEYS,), index, tied=index > 0) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ToMe.Config, facts: ModelFacts) -> Layout:
        """`n - r` tokens, or one of `kth` patches; class token first."""
        first = layout.class_tokens
        if config.kth is not None:
            return _with_class(layout, first, _groups(stage, layout, config.kth))
        r = config.r[stage.index] if isinstance(config.r, tuple) else config.r
        most = (layout.tokens - first) // 2
        if r > most and not config.clamp:
            raise ValueError(
                f"r: {r} exceeds the {most} pairs among the {layout.tokens} tokens that arrive at {stage.at}; lower r, or set clamp: "
                "true to merge all it can"
            )
        r = min(r, most)
        return layout if r == 0 else _with_class(layout, first, layout.tokens - first - r)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ToMe.Config) -> Compressed:
        """Merge the r most similar pairs."""
        import torch

        from tmc_export.graphs._bipartite import log_size, match_pairs, merge_pairs

        size = context.state.get("size")
        size = context.valid.float() if size is None else size.float()
        n, b = tokens.shape[1], tokens.shape[0]
        left, first = ToMe.layout(stage, context.layout, config, context.facts).tokens, context.layout.class_tokens
        if config.kth is not None:
            return _merge_groups(tokens, size, context, config.kth)
        if left == n:
            index = torch.arange(n).expand(b, n).contiguous()
            return Compressed(tokens, index, context.valid, state={"size": size}, key_bias=log_size(size))
        metric = context.captured[_KEYS].float().mean(dim=2)
        pairs = match_pairs(metric, n - left, context.valid, protect=bool(first))
        return merge_pairs(tokens, size, pairs, context.valid)


def _with_class(layout: Layout, first: int, patches: int) -> Layout:
    visual = Segment("visual", patches)
    return Layout((Segment("class", first), visual) if first else (visual,), layout.width)


def _groups(stage: Stage, layout: Layout, kth: int) -> int:
    """Return how many groups of `kth` patches there are; raises `ValueError` when not one."""
    patches = layout.tokens - layout.class_tokens
    if kth > patches:
        raise ValueError(f"kth: {kth} is more than the {patches} patches that arrive at {stage.at}; lower kth")
    return patches // kth


def _merge_groups(tokens: Tensor, size: Tensor, context: Context, kth: int) -> Compressed:
    """Merge the first `kth - 1` patches of every group into the most similar of the groups' last ones; class tokens pass."""
    import torch

    from tmc_export.graphs._bipartite import averages, log_size
    from tmc_export.graphs._ops import argmax, cosine, scatter_sum

    valid, first, n, b = context.valid, context.layout.class_tokens, tokens.shape[1], tokens.shape[0]
    groups = (n - first) // kth
    targets = torch.arange(first + kth - 1, first + groups * kth, kth)
    metric = context.captured[_KEYS].float().mean(dim=2)
    score = cosine(metric, metric[:, targets])
    score = torch.where(valid[:, targets].unsqueeze(1), score, torch.full_like(score, -2.0))
    index = torch.arange(n)
    group = (index - first) // kth
    own = (index < first) | ((index - first) % kth == kth - 1)
    fixed = torch.where(index < first, index, first + group)
    assign = torch.where(own, fixed, argmax(score) + first)
    assign = torch.where(index < first + groups * kth, assign, torch.full_like(assign, -1))
    k = first + groups
    weight = torch.where(valid, size, torch.zeros_like(size))
    mix = averages(assign, weight, k)
    new_size = scatter_sum(weight.unsqueeze(2), assign, k).squeeze(2)
    source = torch.cat([torch.arange(first), targets]).expand(b, -1).contiguous()
    out = (mix @ tokens.float()).to(tokens.dtype)
    return Compressed(out, source, new_size > 0, assign=assign, mix=mix, state={"size": new_size}, key_bias=log_size(new_size))
