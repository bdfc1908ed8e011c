"""FastV: keep the visual tokens that the last prompt token attends to most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FastV"]

_SCORE = Attention(layer="previous", rows="last", heads="mean")


@register("fastv")
class FastV(Method):
    """FastV, pruning of visual tokens by attention after an early decoder layer.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv:2403.06764.

    At the input of layer K, with A the attention of layer K-1:
    `score_i = mean over heads of A[last token, i]`; the `round(n * keep)` best stay (half to even), in their order.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]`; score `[b, n]` in float32. Positions are kept.
    The KV of layers below K stays whole; from K on it holds k visual rows.

    >>> import torch
    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = FastV.Config(keep="50%")
    >>> stage, tokens, context = context_for(FastV, config, "decoder.2", seed=0)
    >>> FastV.apply(stage, tokens, context, config).tokens.shape[1] * 2 == tokens.shape[1]
    True

    Limits: the class of the query matters: a prompt that ends in a fixed template scores by the template's last token.

    Where the official code differs: it calls the *removed* share R (`keep = 1 - R`), one variant rounds down, one hard-codes the picture's
    span 35:611, and a batch is pruned by its first item; here every item has its own choice. Ties go to the lowest index.
    """

    paper = "An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv:2403.06764"
    official = "pkunlp-icler/FastV@d165972 src/FastV/llava-hf/transformers/src/transformers/models/llama/modeling_llama.py:fastv_forward"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay.
        """

        keep: Budget = Budget(share=0.5)

    @staticmethod
    def stages(at: Site, config: FastV.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut; `decoder.0` has no layer before it to score by and is refused."""
        need_site("fastv", at, "decoder")
        if not 1 <= (at.layer or 0) < facts.decoder.layers:
            raise ValueError(
                f"fastv at {at} needs a decoder layer before and after the cut; use decoder.1 to decoder.{facts.decoder.layers - 1} "
                "(the paper: decoder.2)"
            )
        return (Stage(at, (_SCORE,)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FastV.Config, facts: ModelFacts) -> Layout:
        """`round(n * keep)` tokens, positions kept."""
        return selected(layout, kept_of(config.keep, layout.tokens, stage.at))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FastV.Config) -> Compressed:
        """Keep the best-attended candidates, in ascending order."""
        from tmc_export.graphs._ops import gather, keep_top

        k = FastV.layout(stage, context.layout, config, context.facts).tokens
        kept, _ = keep_top(context.captured[_SCORE], k, context.valid)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))
