"""MobileVLM V2's lightweight downsample projector: an MLP, adaptive pooling and one depthwise convolution with a shortcut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage
from tmc_export.graphs._projector import conv_shapes, dense_shapes
from tmc_export.graphs._raster import need_inside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LdpV2"]

_MLP, _PEG = "mlp.mlp", "peg.peg.0"


@register("ldp_v2")
class LdpV2(Method):
    """The lightweight downsample projector of MobileVLM V2, LDPv2.

    Paper: "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model", arXiv:2402.03766.

    `x = W2 gelu(W1 tokens + b1) + b2`; `p` = adaptive average pooling of the raster x to R x C (the mean over the rows `floor(I h / R)` to
    `ceil((I + 1) h / R)`, the end not included, and the columns likewise); `y = p + depthwise3x3(p) + bias`, zeros around the border.

    Shapes (b batch, n = h*w candidates, k = R*C, c channels of the encoder, d of the decoder): tokens `[b, n, c]` -> `[b, k, d]`. `assign`
    names the cell of each patch, `source` the patch at the cell's middle.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = LdpV2.Config(grid=(4, 4))
    >>> stage, tokens, context = context_for(LdpV2, config, "projector.replace", seed=0)
    >>> tuple(tokens.shape), tuple(LdpV2.apply(stage, tokens, context, config).tokens.shape)
    ((1, 64, 32), (1, 16, 96))

    Limits: needs a raster. A token whose window touches padding is padding; padding is zero before the pooling, as the border is.

    Where the official code differs: its 12 x 12 is written into the code, and a smaller raster than that comes out larger; here the raster
    that leaves is an option, and a plan refuses one that is larger than what arrives. It reads the raster as a square.
    """

    paper = "MobileVLM V2, arXiv:2402.03766"
    official = "Meituan-AutoML/MobileVLM@688fdec mobilevlm/model/vision_projector.py:LDPNetV2Projector"
    mechanism = "transform"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", {"grid": (4, 4)}, too_much={"grid": (9, 4)}),
        Sample("projector.replace", {"grid": (5, 3)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: rows and columns that leave.
        """

        grid: tuple[int, int] = (12, 12)

    @staticmethod
    def stages(at: Site, config: LdpV2.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("ldp_v2", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: LdpV2.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of the projector's state dict."""
        out = facts.decoder.width
        mlp = dense_shapes(f"{_MLP}.0", facts.encoder.width, out) | dense_shapes(f"{_MLP}.2", out, out)
        return mlp | conv_shapes(_PEG, 1, out, 3, bias=True)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: LdpV2.Config, facts: ModelFacts) -> Layout:
        """The raster asked for, as wide as the decoder."""
        need_inside(config.grid, need_grid("ldp_v2", layout, stage.at), stage.at)
        return Layout((Segment("visual", config.grid[0] * config.grid[1], config.grid),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: LdpV2.Config) -> Compressed:
        """Project each patch, pool, and add what the neighbours say."""
        from torch.nn import functional

        from tmc_export.graphs._projector import adaptive, conv, dense, masked, pooled_valid, to_image, to_tokens
        from tmc_export.graphs._raster import cells

        old, new, b = need_grid("ldp_v2", context.layout, stage.at), config.grid, tokens.shape[0]
        wide = dense(functional.gelu(dense(tokens, context.weights, f"{_MLP}.0")), context.weights, f"{_MLP}.2")
        pooled = to_image(adaptive(masked(wide, context.valid), old, new), new)
        source, assign = cells(old, new)
        return Compressed(
            to_tokens(pooled + conv(pooled, context.weights, _PEG)),
            source.expand(b, -1).contiguous(),
            pooled_valid(context.valid, old, new),
            assign=assign.expand(b, -1).contiguous(),
        )
