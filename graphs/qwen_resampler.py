"""Qwen-VL's resampler: one cross-attention from a raster of learned queries, with absolute positions on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import need_divisible, need_fewer, summaries
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._projector import layer_norm, norm_shapes
from tmc_export.graphs._resampler import pair, resample_by_queries, resampler_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QwenResampler"]

_EPS = 1e-6
_Side = Annotated[int, Field(ge=1)]


@register("qwen_resampler")
class QwenResampler(Method):
    """Qwen-VL's resampler, a raster of learned queries with one cross-attention.

    Paper: "Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and Beyond", arXiv:2308.12966.

    With P the 2-D sine and cosine positions of the query raster and P' the same, resized to the picture's raster (bicubic):

    - `X = LN(x W)`, `Q = LN(query) + P`;
    - `Y = multi-head attention(Q, X + P', X)`, no residual and no feed-forward part;
    - tokens `LN(Y) proj`,

    layer norms with eps 1e-6.

    Shapes (b batch, n candidates, k = rows * columns queries, c encoder width, d decoder width): tokens `[b, n, c]` -> `[b, k, d]`. They
    are synthetic, and form the raster of the queries.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = QwenResampler.Config(grid=4, heads=4)
    >>> stage, tokens, context = context_for(QwenResampler, config, "projector.replace", seed=0)
    >>> QwenResampler.apply(stage, tokens, context, config).tokens.shape[1:]
    torch.Size([16, 96])

    Limits: needs the picture's raster. Learned weights: `attn_pool.*`, `ln_post.*` and `proj` as in the checkpoint under
    `transformer.visual.`; `attn_pool.pos_embed` is fixed in training (`_resampler.sincos_positions` makes it). `attn_pool.kv_proj` exists
    only where encoder and decoder differ in width. It takes the projector's place, so the model's own projector is not built.

    Where the official code differs: its rasters are square (256 queries); here rows and columns may differ, on both sides. The default of
    `heads` is its `width / 128`.
    """

    paper = "Qwen-VL, arXiv:2308.12966"
    official = (
        "Qwen/Qwen-VL (Hugging Face) visual.py:Resampler, VisionTransformer.forward; read in vllm-project/vllm qwen.py and resampler.py"
    )
    mechanism = "query"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", {"grid": 4, "heads": 4}, too_much={"grid": 9}),
        Sample("projector.replace", {"grid": [3, 5], "heads": 4}, too_much={"grid": (9, 8)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: raster of the queries: one side, or rows and columns; its product is the number of tokens that leave.
            heads: attention heads; the decoder's width over 128 where not given.
        """

        grid: _Side | tuple[_Side, _Side] = 16
        heads: int | None = Field(default=None, ge=1)

    @staticmethod
    def stages(at: Site, config: QwenResampler.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("qwen_resampler", at, "projector.replace")
        need_divisible("qwen_resampler", "the decoder's width", facts.decoder.width, _heads(config, facts))
        if facts.decoder.width % 4:
            raise ValueError(
                f"qwen_resampler: positions on two axes need a decoder width that divides by 4, and {facts.architecture} has "
                f"{facts.decoder.width}; use perceiver"
            )
        return (Stage(at),)

    @staticmethod
    def weights(config: QwenResampler.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The resampler, the norm after it and the last matrix."""
        d = facts.decoder.width
        return resampler_weights("attn_pool", pair(config.grid), d, facts.encoder.width) | norm_shapes("ln_post", d) | {"proj": (d, d)}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: QwenResampler.Config, facts: ModelFacts) -> Layout:
        """The raster of the queries."""
        h, w = need_grid("qwen_resampler", layout, stage.at)
        rows, columns = pair(config.grid)
        need_fewer("qwen_resampler", f"grid: {rows}x{columns}", rows * columns, h * w, stage.at)
        return Layout((Segment("visual", rows * columns, (rows, columns)),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: QwenResampler.Config) -> Compressed:
        """Resample the raster."""
        first, weights = context.layout.class_tokens, context.weights
        raster = need_grid("qwen_resampler", context.layout, stage.at)
        valid, heads = context.valid[:, first:], _heads(config, context.facts)
        y, _ = resample_by_queries(tokens[:, first:], valid, raster, weights, "attn_pool", pair(config.grid), heads, _EPS)
        return summaries(layer_norm(y, weights, "ln_post", _EPS) @ weights["proj"], valid)


def _heads(config: QwenResampler.Config, facts: ModelFacts) -> int:
    return config.heads if config.heads is not None else max(1, facts.decoder.width // 128)
