"""ST3: fewer visual tokens every few decoder layers, down a straight line."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ST3"]

_ROWS = {
    "all": Attention(layer="previous", rows="all", heads="mean", row_sum=True),
    "text": Attention(layer="previous", rows="text", heads="mean", row_sum=True),
    "last": Attention(layer="previous", rows="last", heads="mean"),
}


@register("st3")
class ST3(Method):
    """ST3, progressive pruning of inattentive visual tokens (PVTP).

    Paper: "ST3: Accelerating Multimodal Large Language Model by Spatial-Temporal Visual Token Trimming", AAAI 2025, arXiv:2412.20105.

    After decoder layers `at`, `at + every`, ... (`cuts` of them), with A the attention of the layer before, averaged over heads:
    `score_i = sum over rows q of A[q, i]`; the best stay, in their order. Of the N0 that arrive at the first cut,
    `N0 - floor((N0 - keep) * j / cuts)` are left after cut j = 1 ... cuts: the paper trims more and more with depth, and a static graph
    needs the schedule as numbers.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]` per stage; score `[b, n]` in float32. Positions
    are kept. The KV shrinks stage by stage.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = ST3.Config(cuts=3, every=4, keep=16)
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(ST3, config, "decoder.2")]
    [('decoder.2', 64), ('decoder.6', 48), ('decoder.10', 32)]

    Limits: only the pruning in the prefill. The paper's second half, visual token annealing, takes further visual rows out of the KV as the
    answer grows; no stage acts between two tokens yet. Rows `all` need the whole attention map of a layer, computed in blocks.

    Where the official code differs: none was released; built from the paper. It does not settle which queries score; `rows` says it, by
    default all that see the token. Ties go to the lowest index.
    """

    paper = "ST3: Accelerating Multimodal Large Language Model by Spatial-Temporal Visual Token Trimming, AAAI 2025, arXiv:2412.20105"
    official = "paper only"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True
    budgets = "tokens left after the last cut"

    samples = (
        Sample("decoder.2", {"cuts": 3, "every": 4, "keep": 17}),
        Sample("decoder.1", {"cuts": 1, "rows": "text"}),
        Sample("decoder.1", {"cuts": 1, "rows": "last"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share of the first cut's candidates, or number of tokens, left after the last cut.
            cuts: how many.
            every: decoder layers from one cut to the next.
            rows: whose attention scores: all tokens that see the candidate, the text tokens, or the last one.
        """

        keep: Budget = Budget(share=0.25)
        cuts: int = Field(default=4, ge=1)
        every: int = Field(default=6, ge=1)
        rows: Literal["all", "text", "last"] = "all"

    @staticmethod
    def stages(at: Site, config: ST3.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut every few layers."""
        need_site("st3", at, "decoder")
        first, depth = at.layer or 0, facts.decoder.layers
        layers = [first + config.every * index for index in range(config.cuts)]
        if first < 1 or layers[-1] >= depth:
            raise ValueError(
                f"cuts: {config.cuts} every {config.every} layers from {at} are at {layers}; the {depth} decoder layers of "
                f"{facts.architecture} have cuts from 1 to {depth - 1}; lower cuts or every"
            )
        return tuple(Stage(Site("decoder", layer), (_ROWS[config.rows],), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ST3.Config, facts: ModelFacts) -> Layout:
        """A point on the line from N0 to `keep`, positions kept."""
        first = layout.tokens if stage.index == 0 else layout.entry_tokens
        if first is None:
            raise ValueError(
                f"st3 at {stage.at} does not know how many of the {layout.tokens} tokens reached its first cut, because another method cut "
                "in between; move that method before the first or behind the last cut of st3"
            )
        final = kept_of(config.keep, first, stage.at)
        k = first - (first - final) * (stage.index + 1) // config.cuts
        if k > layout.tokens:
            raise ValueError(
                f"keep: {config.keep} means {k} tokens after {stage.at}, more than the {layout.tokens} that arrive there; lower keep"
            )
        return replace(selected(layout, k), entry_tokens=first)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ST3.Config) -> Compressed:
        """Keep the best-attended candidates, in ascending order."""
        from tmc_export.graphs._ops import gather, keep_top

        k = ST3.layout(stage, context.layout, config, context.facts).tokens
        kept, _ = keep_top(context.captured[stage.needs[0]], k, context.valid)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))
