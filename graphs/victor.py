"""Victor: registers behind the picture that take over after a few decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import need_fewer, queries_of, summaries
from tmc_export.graphs._checks import need_site, selected
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Victor"]


@register("victor")
class Victor(Method):
    """Victor, visual tokens summarized into registers by the decoder's first layers.

    Paper: "Efficient Vision-Language Models by Summarizing Visual Tokens into Compact Registers", arXiv:2410.14072. Built from the paper;
    no official code is known.

    `[x_1 ... x_n]` becomes `[x_1 ... x_n, r_1 ... r_R]` behind the projector, r learned; the first `layer` decoder layers run over all of
    it with their ordinary causal attention, so that the registers read the picture and the text behind reads both; then the n visual
    tokens are dropped, and the registers and the text go on.

    Shapes (b batch, n visual tokens, R registers, c channels): `[b, n, c]` -> `[b, n + R, c]` at `projector`; `[b, n + R, c]` ->
    `[b, R, c]` at `decoder.<layer>`.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Victor.Config(registers=8, layer=3)
    >>> stage, tokens, context = context_for(Victor, config, "projector", index=1, seed=0)
    >>> Victor.apply(stage, tokens, context, config).source.tolist()
    [[64, 65, 66, 67, 68, 69, 70, 71]]

    Limits: learned weights, `registers`; a decoder that was not trained with them does not fill them. A method between the two cuts must
    leave the registers last.

    Where the official code differs: there is none. Assumed: the registers are the same for every picture and each picture has its own copy
    right behind it; tokens keep their rotary positions when the visual ones go.
    """

    paper = "Efficient Vision-Language Models by Summarizing Visual Tokens into Compact Registers, arXiv:2410.14072"
    official = "paper only"
    mechanism = "query"
    sites = ("projector",)
    training_free = False
    grows = True

    samples = (Sample("projector", {"registers": 8, "layer": 3}, too_much={"registers": 65}),)

    class Config(MethodConfig):
        """Options; the defaults are the paper's smallest setting.

        Attributes:
            registers: registers behind each picture, the tokens that stay.
            layer: decoder layers that see the visual tokens.
        """

        registers: int = Field(default=8, ge=1)
        layer: int = Field(default=3, ge=1)

    @staticmethod
    def stages(at: Site, config: Victor.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """The registers come behind the projector, the visual tokens go after `layer` layers."""
        need_site("victor", at, "projector")
        depth = facts.decoder.layers
        if config.layer >= depth:
            raise ValueError(
                f"victor: layer: {config.layer} leaves no layer without visual tokens, {facts.architecture} has {depth}; lower layer to at "
                f"most {depth - 1}"
            )
        return Stage(at), Stage(Site("decoder", config.layer), (), 1, tied=True)

    @staticmethod
    def weights(config: Victor.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The registers."""
        return {"registers": (config.registers, facts.decoder.width)}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Victor.Config, facts: ModelFacts) -> Layout:
        """First both, then the registers alone."""
        more = 0 if stage.index == 0 else config.registers
        need_fewer("victor", f"registers: {config.registers}", config.registers, layout.tokens - more, stage.at)
        if stage.index == 0:
            return Layout((*layout.segments, Segment("visual", config.registers)), layout.width)
        return selected(layout, config.registers)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Victor.Config) -> Compressed:
        """Put the registers behind the candidates, or keep only them."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top

        n, r = tokens.shape[1], config.registers
        index = torch.arange(n).unsqueeze(0).expand(tokens.shape[0], -1)
        if stage.index == 1:
            # registers outrank the rest; padding ranks last, as everywhere
            kept, _ = keep_top((index >= n - r).float(), r, context.valid)
            return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))
        more = summaries(queries_of(context.weights["registers"], tokens), context.valid)
        return Compressed(
            torch.cat([tokens, more.tokens], dim=1),
            torch.cat([index, more.source], dim=1),
            torch.cat([context.valid, more.valid], dim=1),
        )
