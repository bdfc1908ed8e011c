"""Adaptive average pooling of the visual raster to any smaller one, before the projector (DeCo) or after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._raster import need_inside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaptivePool"]


@register("adaptive_pool")
class AdaptivePool(Method):
    """Adaptive average pooling, a raster of R x C tokens whatever arrives.

    Paper: "DeCo: Decoupling Token Compression from Semantic Abstraction in Multimodal Large Language Models", arXiv:2405.20985
    (before the projector: `at: encoder`).

    With x the raster of h x w tokens: `y[I, J]` = mean of x over the rows `floor(I h / R)` to `ceil((I + 1) h / R)` (the end not
    included) and the columns likewise. Where R does not divide h the windows overlap. Both means are products with a constant matrix,
    because ONNX has no adaptive pooling.

    Shapes (b batch, n = h*w candidates, k = R*C, c channels): tokens `[b, n, c]` -> `[b, k, c]`, computed in float32. Class tokens pass
    unchanged. `mix` is the matrix itself, `assign` the cell of each candidate (of one whose windows overlap, the cell its middle lies in),
    `source` the candidate at the cell's middle.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = AdaptivePool.Config(grid=(5, 3))
    >>> stage, tokens, context = context_for(AdaptivePool, config, "projector", seed=0)
    >>> AdaptivePool.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (15, 64)

    Limits: needs a raster, so it cannot follow a method that selects. A window that touches padding is padding. DeCo trains its projector
    on pooled tokens; without that training the option is a control.

    Where the official code differs: DeCo takes a number of queries q and pools to `int(sqrt(q))` rows and columns; here the raster is the
    option, and a raster larger than the one that arrives is refused instead of repeating tokens.
    """

    paper = "DeCo, arXiv:2405.20985"
    official = "yaolinli/DeCo@103416e README.md:AvgPoolProjector"
    mechanism = "transform"
    sites = ("encoder", "encoder.<l>", "projector")

    samples = (
        Sample("encoder", {"grid": (5, 3)}, too_much={"grid": (9, 3)}),
        Sample("projector", {"grid": (4, 4)}, too_much={"grid": (0, 3)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: rows and columns that leave; DeCo has 144 tokens of 576.
        """

        grid: tuple[int, int] = (12, 12)

    @staticmethod
    def stages(at: Site, config: AdaptivePool.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("adaptive_pool", at, "encoder", "projector")
        need_raster_encoder("adaptive_pool", at, facts)
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: AdaptivePool.Config, facts: ModelFacts) -> Layout:
        """The class tokens and the smaller raster."""
        need_inside(config.grid, need_grid("adaptive_pool", layout, stage.at), stage.at)
        kept = tuple(segment for segment in layout.segments if segment.kind == "class")
        return Layout((*kept, Segment("visual", config.grid[0] * config.grid[1], config.grid)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: AdaptivePool.Config) -> Compressed:
        """Pool the raster; class tokens pass."""
        import torch

        from tmc_export.graphs._raster import cells, grid_matrix, resample, with_class

        old, new = need_grid("adaptive_pool", context.layout, stage.at), config.grid
        first, b = context.layout.class_tokens, tokens.shape[0]
        pooled = torch.cat([tokens[:, :first], resample(tokens[:, first:], old, new, "adaptive")], dim=1)
        matrix = with_class(grid_matrix(old, new, "adaptive"), first)
        padding = (matrix > 0).float() @ (~context.valid).float().unsqueeze(2)
        head, (source, assign) = torch.arange(first), cells(old, new)
        return Compressed(
            pooled,
            torch.cat([head, source + first]).expand(b, -1).contiguous(),
            padding.squeeze(2) == 0,
            assign=torch.cat([head, assign + first]).expand(b, -1).contiguous(),
            mix=matrix.expand(b, -1, -1).contiguous(),
        )
