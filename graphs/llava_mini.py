"""LLaVA-Mini: a handful of compressed tokens, and the picture fused into the words before the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import Shapes, llama_layer, llama_layer_weights, need_divisible, need_fewer, rotary
from tmc_export.graphs._checks import need_grid, need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage, TextEmbeds
from tmc_export.graphs._resampler import pair, resample_by_queries, resampler_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LlavaMini", "prefuse", "rope_frequencies"]

_EPS = 1e-5
_TEXT = TextEmbeds()
_Side = Annotated[int, Field(ge=1)]


@register("llava_mini")
class LlavaMini(Method):
    """LLaVA-Mini, compression by queries and fusion of picture and text before the decoder.

    Paper: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token", ICLR 2025, arXiv:2501.03895.

    - Compression, at `encoder`: with P the positions of the query raster and P' the same resized to the picture's (bicubic), X the normed
      patches, `C = attention(LN(query) + P, X + P', X)`, no residual (layer norms with eps 1e-5). Patches and C both pass the model's
      projector.
    - Pre-fusion, at `decoder.0`: `prefusion` Llama layers with weights of their own and causal attention run over
      [patches, C, text], positions counting the valid tokens. The decoder gets C and the text as these layers leave them; the patches go.

    Shapes (b batch, n patches, k = rows * columns queries, m text tokens, c encoder width, d decoder width): `[b, n, c]` -> `[b, n + k, c]`
    at `encoder`; `[b, n + k, d]` and text `[b, m, d]` -> `[b, k, d]` and text `[b, m, d]` at `decoder.0`. With `prefusion: 0` there is one
    cut, `[b, n, c]` -> `[b, k, c]`.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = LlavaMini.Config(grid=2, heads=4, prefusion=2)
    >>> stage, tokens, context = context_for(LlavaMini, config, "encoder", index=1, seed=0)
    >>> out = LlavaMini.apply(stage, tokens, context, config)
    >>> out.tokens.shape[1], tokens.shape[1], out.text.shape == context.text.shape
    (4, 68, True)

    Limits: learned weights: `compressor.*` and `prefusion_layers.*`, as in the checkpoint under `model.`; `compressor.pos_embed` is fixed
    in training (`_resampler.sincos_positions` makes it). The pre-fusion layers are as large as the decoder's, and nothing of them is
    cached: text that comes in a later turn is fused anew. What reaches `decoder.0` must be what this method's first cut left, the
    compressed tokens last. Text rows that are padding keep their embedding.

    Where the official code differs: it fuses the whole prompt at once and averages the fused text over the frames of a video; here every
    picture is fused with the text on its own, and whoever replaces the text decides. Its raster is square. The paper's models have
    Vicuna's plain rotary positions (the defaults here); the released Llama 3.1 checkpoint needs `rope_theta: 500000` and
    `rope_scaling: [8, 1, 4, 8192]`.
    """

    paper = "LLaVA-Mini, ICLR 2025, arXiv:2501.03895"
    official = "ictnlp/LLaVA-Mini@47da113 llavamini/model/llavamini_arch.py:Resampler, encode_images_mini"
    mechanism = "query"
    sites = ("encoder",)
    query_aware = True
    training_free = False
    grows = True
    replaces_text = True

    samples = (
        Sample("encoder", {"grid": 2, "heads": 4, "prefusion": 2}, too_much={"grid": 9}),
        Sample("encoder", {"grid": [2, 3], "heads": 4, "prefusion": 0}, too_much={"grid": 9}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: raster of the queries: one side, or rows and columns; its product is the number of tokens that leave.
            heads: heads of the compression's attention.
            prefusion: pre-fusion layers; 0 compresses only, and then nothing depends on the text.
            rms_eps: eps of the pre-fusion layers' norms.
            rope_theta: base of their rotary positions.
            rope_scaling: Llama 3's stretching of slow frequencies: factor, low and high frequency factor, original context.
        """

        grid: _Side | tuple[_Side, _Side] = 1
        heads: int = Field(default=8, ge=1)
        prefusion: int = Field(default=4, ge=0)
        rms_eps: float = Field(default=1e-5, gt=0)
        rope_theta: float = Field(default=10000.0, gt=1)
        rope_scaling: tuple[float, float, float, float] | None = None

    @staticmethod
    def stages(at: Site, config: LlavaMini.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """The compression after the encoder, and the fusion before the first decoder layer."""
        need_site("llava_mini", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"llava_mini acts after the whole encoder, not at {at}; write at: encoder")
        need_raster_encoder("llava_mini", at, facts)
        need_divisible("llava_mini", "the encoder's width", facts.encoder.width, config.heads)
        first = Stage(at)
        return (first, Stage(Site("decoder", 0), (_TEXT,), 1, tied=True)) if config.prefusion else (first,)

    @staticmethod
    def weights(config: LlavaMini.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The compressor and the pre-fusion layers."""
        c = facts.encoder.width
        found: Shapes = resampler_weights("compressor", pair(config.grid), c, c)
        for i in range(config.prefusion):
            found |= llama_layer_weights(f"prefusion_layers.{i}", facts.decoder)
        return found

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: LlavaMini.Config, facts: ModelFacts) -> Layout:
        """At the encoder the patches and the raster of queries (without pre-fusion that raster alone); then the compressed tokens."""
        grid = pair(config.grid)
        k = grid[0] * grid[1]
        queries = Segment("visual", k, grid)
        if stage.index == 1:
            need_fewer("llava_mini", f"grid: {grid[0]}x{grid[1]}", k, layout.tokens - k, stage.at)
            return replace(layout, segments=(queries,), positions="renumber")
        h, w = need_grid("llava_mini", layout, stage.at)
        need_fewer("llava_mini", f"grid: {grid[0]}x{grid[1]}", k, h * w, stage.at)
        if config.prefusion:
            return Layout((*layout.segments, queries), layout.width)
        return Layout((*(s for s in layout.segments if s.kind == "class"), queries), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: LlavaMini.Config) -> Compressed:
        """Compress, or fuse."""
        return _fuse(tokens, context, config) if stage.index == 1 else _compress(stage, tokens, context, config)


def _compress(stage: Stage, tokens: Tensor, context: Context, config: LlavaMini.Config) -> Compressed:
    """Return the class tokens, the patches where they are needed later, and the compressed tokens."""
    import torch

    from tmc_export.graphs._attention import summaries

    first, n = context.layout.class_tokens, tokens.shape[1]
    raster, valid = need_grid("llava_mini", context.layout, stage.at), context.valid
    grid, weights = pair(config.grid), context.weights
    made, _ = resample_by_queries(tokens[:, first:], valid[:, first:], raster, weights, "compressor", grid, config.heads, _EPS)
    out, stay = summaries(made, valid[:, first:]), n if config.prefusion else first
    index = torch.arange(stay).unsqueeze(0).expand(tokens.shape[0], -1)
    return Compressed(
        torch.cat([tokens[:, :stay], out.tokens], dim=1),
        torch.cat([index, out.source], dim=1),
        torch.cat([valid[:, :stay], out.valid], dim=1),
    )


def _fuse(tokens: Tensor, context: Context, config: LlavaMini.Config) -> Compressed:
    """Return the last k tokens and the text as the pre-fusion layers leave them."""
    import torch

    from tmc_export.graphs._ops import gather, keep_top

    if context.text is None or context.text_valid is None:
        raise ValueError("llava_mini at decoder.0 got no text embeddings (0 of 1 need met); capture TextEmbeds")
    rows, columns = pair(config.grid)
    n, k = tokens.shape[1], rows * columns
    x = torch.cat([tokens, context.text], dim=1)
    fused = prefuse(x, torch.cat([context.valid, context.text_valid], dim=1), context, config)
    # the compressed tokens outrank the patches; padding ranks last, as everywhere
    late = (torch.arange(n) >= n - k).float().unsqueeze(0).expand(tokens.shape[0], -1)
    kept, _ = keep_top(late, k, context.valid)
    text = torch.where(context.text_valid.unsqueeze(2), fused[:, n:], context.text)
    return Compressed(gather(fused[:, :n], kept), kept, gather(context.valid, kept), text=text)


def prefuse(x: Tensor, valid: Tensor, context: Context, config: LlavaMini.Config) -> Tensor:
    """Run the pre-fusion layers over `[b, t, d]`: causal, padding unseen, positions counting the valid tokens."""
    import torch

    t, decoder = x.shape[1], context.facts.decoder
    index = torch.arange(t)
    visible = valid.unsqueeze(1) & (index.unsqueeze(0) <= index.unsqueeze(1)).unsqueeze(0)
    places = valid.long().cumsum(dim=1) - 1
    turn = rotary(torch.where(valid, places, torch.ones_like(places)), rope_frequencies(decoder.head_dim, config))
    for i in range(config.prefusion):
        x = llama_layer(x, context.weights, f"prefusion_layers.{i}", decoder, turn, visible, config.rms_eps)
    return x


def rope_frequencies(head_dim: int, config: LlavaMini.Config) -> Tensor:
    """Return the rotary frequencies `[head_dim / 2]`, `theta^(-2 i / head_dim)`, stretched as Llama 3 does where `rope_scaling` is given.

    A frequency of wavelength w stays where w < context / high, is divided by the factor where w > context / low, and in between is mixed
    by `s = (context / w - low) / (high - low)`: `(1 - s) f / factor + s f`.
    """
    import math

    import torch

    frequency = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if config.rope_scaling is None:
        return frequency
    factor, low, high, context = config.rope_scaling
    share = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * frequency / factor + share * frequency
