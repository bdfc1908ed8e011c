"""TRIM: keep the patches by CLIP's similarity to the question, and the mean of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_raster_encoder, need_site
from tmc_export.graphs._contract import (
    Budget,
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Segment,
    Shape,
    Site,
    Stage,
    TextTower,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Trim", "similarity"]

_NORM = "vision_model.post_layernorm"
_PROJECTION = "visual_projection.weight"


@register("trim")
class Trim(Method):
    """TRIM, token reduction by CLIP metric.

    Paper: "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs", COLING 2025, arXiv:2409.10994.

    With x the patches of the encoder's last layer in use, `p_i = W LayerNorm(x_i)` (CLIP's post layer norm, eps 1e-5, and visual
    projection) and t CLIP's projected embedding of the question: `s_i = softmax_i(-(p_i . t))`; the `floor(n * keep)` best stay, in
    their order, and one more token, the mean of all others.

    Shapes (b batch, n patches, k kept, c channels, p channels of CLIP's joint space): tokens `[b, 1 + n, c]` -> `[b, k + 1, c]`; scores
    `[b, n]` in float32. The last token is synthetic; `assign` names the row of every patch; `mix` holds the weights.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Trim.Config(keep="25%", width=24)
    >>> stage, tokens, context = context_for(Trim, config, "encoder", seed=0)
    >>> Trim.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (17, 65)

    Limits: the encoder must be the visual tower of the CLIP checkpoint of `tower`, whose text tower becomes a subgraph of its own; the
    class token does not leave. Padding is not in the mean. With padding for all others the mean is 0 and not valid.

    Where the official code differs: the paper speaks of cosine similarity, the code takes the dot product, and with a minus: the *least*
    similar patches score highest; so does this. By default it takes the share of patches above `Q3 + 1.5 IQR` of s as `keep`, over the
    whole batch, and fails when none is: that depends on the data, so here `keep` is a budget. The paper merges the others by clusters; the
    code and this take one mean. It computes in float16.
    """

    paper = "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs, COLING 2025, arXiv:2409.10994"
    official = "FreedomIntelligence/TRIM@f5a232d llava/model/multimodal_encoder/clip_encoder.py:CLIPVisionTower.token_reduction"
    mechanism = "query"
    budgets = "share of outliers"
    sites = ("encoder",)
    query_aware = True

    samples = (Sample("encoder", {"keep": "21%", "width": 24}), Sample("encoder", {"keep": 10, "width": 8}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the patches that stay; the mean is one token more.
            tower: CLIP checkpoint, a hub id or a folder, whose text tower reads the question.
            width: channels of its joint space (projection_dim).
            eps: epsilon of its layer norm.
        """

        keep: Budget = Budget(share=0.21)
        tower: str = "openai/clip-vit-large-patch14-336"
        width: int = Field(default=768, ge=1)
        eps: float = Field(default=1e-5, gt=0)

    @staticmethod
    def stages(at: Site, config: Trim.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, after the last encoder layer in use."""
        need_site("trim", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"trim acts after the whole encoder, not at {at}; write at: encoder")
        need_raster_encoder("trim", at, facts)
        return (Stage(at, (TextTower(config.tower, config.width),)),)

    @staticmethod
    def weights(config: Trim.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """CLIP's post layer norm and visual projection, by their names in a CLIPModel."""
        c = facts.encoder.width
        return {f"{_NORM}.weight": (c,), f"{_NORM}.bias": (c,), _PROJECTION: (config.width, c)}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Trim.Config, facts: ModelFacts) -> Layout:
        """`floor(n * keep)` patches and the mean of the others."""
        patches = layout.tokens - layout.class_tokens
        k = kept_of(config.keep, patches, stage.at, "floor")
        if k == patches:
            raise ValueError(
                f"keep: {config.keep} leaves none of the {patches} patches at {stage.at} for the mean; keep at most {patches - 1}"
            )
        return Layout((Segment("visual", k), Segment("visual", 1)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Trim.Config) -> Compressed:
        """Keep the best patches and average the rest."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._ops import gather, keep_top, one_hot

        k = Trim.layout(stage, context.layout, config, context.facts).tokens - 1
        first = context.layout.class_tokens
        x, valid = tokens[:, first:], context.valid[:, first:]
        score = -similarity(x, context.captured[stage.needs[0]], context.weights, config.eps)
        kept, rest = keep_top(score, k, valid)
        share = (one_hot(rest, x.shape[1]).sum(dim=1) * valid.float()).unsqueeze(1)
        share = share / share.sum(dim=2, keepdim=True).clamp_min(1.0)
        mean = (share @ x.float()).to(tokens.dtype)
        own = one_hot(kept, x.shape[1]).transpose(1, 2)
        row = (own * torch.arange(k).float()).sum(dim=2).long()
        assign = torch.where(own.amax(dim=2) > 0, row, torch.full_like(row, k))
        return Compressed(
            torch.cat([gather(x, kept), mean], dim=1),
            functional.pad(kept + first, (0, 1), value=-1),
            torch.cat([gather(valid, kept), gather(valid, rest).any(dim=1, keepdim=True)], dim=1),
            assign=functional.pad(assign, (first, 0), value=-1),
            mix=functional.pad(torch.cat([one_hot(kept, x.shape[1]), share], dim=1), (first, 0)),
        )


def similarity(x: Tensor, text: Tensor, weights: Mapping[str, Tensor], eps: float) -> Tensor:
    """Return the dot products `[b, n]` of the projected patches x `[b, n, c]` with the projected text `[b, p]`, in float32."""
    from torch.nn import functional

    x = x.float()
    normed = functional.layer_norm(x, (x.shape[2],), weights[f"{_NORM}.weight"].float(), weights[f"{_NORM}.bias"].float(), eps)
    query = text.float() @ weights[_PROJECTION].float()
    return (normed @ query.unsqueeze(2)).squeeze(2)
