"""MADTP: inside the encoder, keep the patches that matter to the picture and to codes shared with the text, and fuse the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_raster_encoder, need_site
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Features,
    Layout,
    Method,
    MethodConfig,
    Need,
    Sample,
    Segment,
    Shape,
    Site,
    Stage,
)
from tmc_export.graphs._depth import layers_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MADTP"]

_CLASS = Attention(layer="previous", rows="cls", heads="mean")
_CLASS_MAX = Attention(layer="previous", rows="cls", heads="max")
_COLUMNS = Attention(layer="previous", rows="all", heads="max")
_CODES = "space_dict"
_MAP = "visual_encoder.img_query_model.q_map.0"


@register("madtp")
class MADTP(Method):
    """MADTP, selection between attention and feed-forward, guided by codes that image and text were trained to share.

    Paper: "MADTP: Multimodal Alignment-Guided Dynamic Token Pruning for Accelerating Vision-Language Transformer", CVPR 2024,
    arXiv:2403.02991.

    In each of `layers`, for the patches (class token left out), with A the layer's attention and D the codes:
    `s_j = sum over patches i of max over heads of A_ij`, `t_j = max over codes of (x_j D^T)` with x the tokens that enter the layer
    (mapped by a linear layer under `mapped`), `c_j` the class token's attention:
    `score = (s / (sum s + 1e-8) + t / (sum t + 1e-8) + c) / 3`.
    The k patches of the largest score stay, in the order of the picture, and one token follows:
    `sum over the dropped of score_j x_j / (sum score + 1e-8)`. Under `scores: class` (its static form) `score = c`, and nothing is fused.

    Shapes (b batch, n candidates of which the first is the class token, k kept, c channels): tokens `[b, n, c]` -> `[b, 1 + k + 1, c]`;
    scores `[b, n]` in float32. Weights: `space_dict` `[codes, code_width]`, and the map's.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = MADTP.Config(keep="60%", layers=(1, 2), codes=10)
    >>> [tokens.shape[1] for _, tokens, _ in contexts(MADTP, config, "encoder")]
    [65, 40]

    Limits: codes and encoder are trained together; with random codes the choice means nothing (`scores: class` needs none). The first
    layer has no tokens before it to compare with the codes. The decoder's own text tokens are not pruned here, as the official code does
    for its text encoder. `t` is divided by its sum, which may be near zero or negative, as there.

    Where the official code differs: it keeps the patches whose score lies above a threshold that a temperature sets (and as many for every
    item of the batch as the one with the most); here that count is a budget, and with it the same tokens come out, its own order being
    left open there. Its class attention weighs the heads by the length of their output at each patch; here they count equally. Padding is
    kept last and has no share in the sums. Ties go to the lowest index.
    """

    paper = (
        "MADTP: Multimodal Alignment-Guided Dynamic Token Pruning for Accelerating Vision-Language Transformer, CVPR 2024, arXiv:2403.02991"
    )
    official = "double125/MADTP@fa3cc4e models/vit.py:Block.Reduce_token, Block.Reduce_token_static"
    mechanism = "attention"
    sites = ("encoder", "encoder.<l>.mid")
    training_free = False
    budgets = "patches above the threshold"

    samples = (
        Sample("encoder", {"layers": (1, 3), "codes": 10}),
        Sample("encoder.2.mid", {"keep": 25, "codes": 7, "mapped": True, "code_width": 20}),
        Sample("encoder.0.mid", {"keep": 17, "scores": "class"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the tokens that stay at each cut, class and fused token not counted; one, or one for each layer.
            layers: the encoder layers (0-based) that drop with `at: encoder`; when left out, those at a quarter, a half and three quarters
                of the depth.
            scores: `joint`, or `class` for the static form by class attention alone.
            codes: number of shared codes.
            mapped: whether a linear layer maps the tokens to the codes' width.
            code_width: width of the codes under `mapped`; without, it is the encoder's.
        """

        keep: Budget | tuple[Budget, ...] = Budget(share=0.7)
        layers: tuple[int, ...] | None = None
        scores: Literal["joint", "class"] = "joint"
        codes: int = Field(default=100, ge=1)
        mapped: bool = False
        code_width: int = Field(default=768, ge=1)

    @staticmethod
    def stages(at: Site, config: MADTP.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for every layer that drops, or the one of `encoder.<l>.mid`."""
        need_site("madtp", at, "encoder", "encoder.mid")
        if at.point is None and at.layer is not None:
            raise ValueError(f"madtp drops between attention and feed-forward, not at {at}; write at: {at}.mid, or at: encoder and layers")
        need_class_token("madtp", facts)
        need_raster_encoder("madtp", at, facts)
        layers = layers_of(at, config.layers, facts.encoder.layers)
        if isinstance(config.keep, tuple) and len(config.keep) != len(layers):
            raise ValueError(f"keep: {len(config.keep)} budgets for {len(layers)} layers that drop; give one for each, or a single one")
        if config.scores == "joint" and layers[0] == 0:
            raise ValueError(
                "madtp compares what enters a layer with its codes, and layer 0 has no layer before it; start at layer 1, "
                "or set scores: class"
            )
        return tuple(Stage(Site("encoder", layer, "mid"), _needs(layer, config), index) for index, layer in enumerate(layers))

    @staticmethod
    def weights(config: MADTP.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """The codes, and the map onto their width."""
        if config.scores == "class":
            return {}
        width = facts.encoder.width
        if not config.mapped:
            return {_CODES: (config.codes, width)}
        wide = config.code_width
        return {_CODES: (config.codes, wide), f"{_MAP}.weight": (wide, width), f"{_MAP}.bias": (wide,)}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: MADTP.Config, facts: ModelFacts) -> Layout:
        """Class token, kept patches, fused token."""
        if layout.class_tokens != 1:
            raise ValueError(f"madtp needs the class token at {stage.at}, and {layout.class_tokens} arrive; put madtp first")
        n = layout.tokens - 1
        k = kept_of(config.keep[stage.index] if isinstance(config.keep, tuple) else config.keep, n, stage.at)
        fused = config.scores == "joint"
        if n - k <= int(fused):
            return layout
        return Layout((Segment("class", 1), Segment("visual", k), *((Segment("visual", 1),) if fused else ())), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: MADTP.Config) -> Compressed:
        """Keep the patches of the largest score and fuse the others."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._ops import gather, keep_top, one_hot

        b, n, valid = tokens.shape[0], tokens.shape[1], context.valid
        leaving = MADTP.layout(stage, context.layout, config, context.facts).tokens
        if leaving == n:
            return Compressed(tokens, torch.arange(n).expand(b, n).contiguous(), valid)
        k = leaving - 1 - int(config.scores == "joint")
        score = _score(stage, context, config)
        kept, dropped = keep_top(score, k, valid[:, 1:])
        kept, dropped = functional.pad(kept + 1, (1, 0)), dropped + 1
        if config.scores == "class":
            return Compressed(gather(tokens, kept), kept, gather(valid, kept))
        share = gather(score, dropped - 1)
        share = share / (share.sum(dim=1, keepdim=True) + 1e-8)
        fused = (share.unsqueeze(1) @ gather(tokens, dropped).float()).to(tokens.dtype)
        into = (one_hot(dropped, n).amax(dim=1) > 0) & valid
        rows = one_hot(kept, n)
        own = (rows * torch.arange(k + 1).unsqueeze(1)).sum(dim=1).long()
        return Compressed(
            torch.cat([gather(tokens, kept), fused], dim=1),
            torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1),
            torch.cat([gather(valid, kept), into.float().sum(dim=1, keepdim=True) > 0], dim=1),
            assign=torch.where(rows.amax(dim=1) > 0, own, torch.where(into, k + 1, -1)),
            mix=torch.cat([rows, share.unsqueeze(1) @ one_hot(dropped, n)], dim=1),
        )


def _needs(layer: int, config: MADTP.Config) -> tuple[Need, ...]:
    return (_CLASS,) if config.scores == "class" else (_CLASS, _CLASS_MAX, _COLUMNS, Features(layer - 1))


def _score(stage: Stage, context: Context, config: MADTP.Config) -> Tensor:
    """Return the importance `[b, n-1]` of every patch, 0 for padding."""
    import torch

    valid = context.valid[:, 1:]

    def patches(need: Need) -> Tensor:
        return torch.where(valid, context.captured[need][:, 1:].float(), 0.0)

    def shared(value: Tensor) -> Tensor:
        return value / (value.sum(dim=1, keepdim=True) + 1e-8)

    if config.scores == "class":
        return patches(_CLASS)
    features = next(context.captured[need] for need in stage.needs if isinstance(need, Features))[:, 1:].float()
    if config.mapped:
        features = features @ context.weights[f"{_MAP}.weight"].float().T + context.weights[f"{_MAP}.bias"].float()
    aligned = torch.where(valid, (features @ context.weights[_CODES].float().T).amax(dim=2), 0.0)
    return (shared(patches(_COLUMNS) - patches(_CLASS_MAX)) + shared(aligned) + patches(_CLASS)) / 3.0
