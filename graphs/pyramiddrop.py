"""PyramidDrop: drop more visual tokens the deeper the decoder, by the attention of the next layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PyramidDrop"]

_SCORE = Attention(layer="next", rows="last", heads="mean")


@register("pyramiddrop")
class PyramidDrop(Method):
    """PyramidDrop, selection in several stages.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025,
    arXiv:2410.17247.

    After each decoder layer of `layers`, with q and k computed from the tokens at the cut by the *next* layer's norm and projections:
    `score_i = mean over heads of softmax(q_last k^T / sqrt(d))_i` over all visible keys; the `floor(N0 * keep_s)` best stay, in their
    order. N0 is what arrived at the first cut.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]` per stage; score `[b, n]` in float32. Positions
    are renumbered without gaps. The KV shrinks stage by stage.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = PyramidDrop.Config()
    >>> [tokens.shape[1] for _, tokens, _ in contexts(PyramidDrop, config, "decoder.8")]
    [64, 32, 16]

    Limits: the query's and keys' projections of the next layer are computed once more at every cut. A share of what arrives is always a
    share of the first cut's candidates.

    Where the official code differs: it reads keys as if there were as many key heads as query heads; here grouped heads are expanded. It
    takes one picture per prompt. Ties go to the lowest index.
    """

    paper = "PyramidDrop, CVPR 2025, arXiv:2410.17247"
    official = "Cooperx521/PyramidDrop@6444f30 llava/model/modeling_llama_pdrop.py:pdrop_rank_drop"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share of the first cut's candidates, or number of tokens, left after each stage; never rising.
            layers: the cuts, as decoder layers that have run; the first is the one of `at`. Left out: multiples of it (8, 16, 24).
        """

        keep: tuple[Budget, ...] = (Budget(share=0.5), Budget(share=0.25), Budget(share=0.125))
        layers: tuple[int, ...] | None = None

    @staticmethod
    def stages(at: Site, config: PyramidDrop.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for each layer."""
        need_site("pyramiddrop", at, "decoder")
        first, depth = at.layer or 0, facts.decoder.layers
        layers = config.layers if config.layers is not None else tuple(first * (i + 1) for i in range(len(config.keep)))
        if not layers or len(layers) != len(config.keep):
            raise ValueError(
                f"layers: {list(layers)} and keep: {len(config.keep)} budgets differ in number; give one keep for each layer, at least one"
            )
        if layers[0] != first:
            raise ValueError(f"layers: {list(layers)} start at {layers[0]} and at: {at} at {first}; write at: decoder.{layers[0]}")
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= depth:
            raise ValueError(
                f"layers: {list(layers)} must rise, from 1 to at most {depth - 1}: {facts.architecture} has {depth} decoder layers; "
                "set layers"
            )
        return tuple(Stage(Site("decoder", layer), (_SCORE,), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: PyramidDrop.Config, facts: ModelFacts) -> Layout:
        """`floor(N0 * keep)` tokens, positions renumbered."""
        first = layout.tokens if stage.index == 0 else layout.entry_tokens
        if first is None:
            raise ValueError(
                f"pyramiddrop at {stage.at} does not know how many tokens reached its first cut, because another method cut in between; "
                "move that method before the first or behind the last layer of pyramiddrop"
            )
        k = kept_of(config.keep[stage.index], first, stage.at, "floor")
        if k > layout.tokens:
            raise ValueError(
                f"keep: {k} tokens is more than the {layout.tokens} that arrive at {stage.at}; let keep fall from stage to stage"
            )
        return replace(selected(layout, k, "renumber"), entry_tokens=first)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: PyramidDrop.Config) -> Compressed:
        """Keep the best-attended candidates, in ascending order."""
        from tmc_export.graphs._ops import gather, keep_top

        k = PyramidDrop.layout(stage, context.layout, config, context.facts).tokens
        kept, _ = keep_top(context.captured[_SCORE], k, context.valid)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))
