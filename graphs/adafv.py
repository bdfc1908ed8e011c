"""AdaFV: split the budget between tokens the text asks for and tokens the encoder finds salient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_site, selected
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Site,
    Stage,
    TextEmbeds,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaFV", "balance", "text_score", "times_picked"]

_CLASS = Attention(layer="previous", rows="cls", heads="mean")
_TEXT = TextEmbeds()
_SHARPNESS = 100.0
_EPS = 1.0e-12


@register("adafv")
class AdaFV(Method):
    """AdaFV (published code: AdaV), adaptive mixture of text-to-picture similarity and class attention.

    Paper: "AdaFV: Rethinking of Visual-Language Alignment for VLM Acceleration", ACL Findings 2025, arXiv:2501.09532.

    On the decoder's inputs, x visual and t text: `s_i = max_t softmax_i(100 cos(t, x_i))` (norms at least 1e-12); `c_i` is the class
    token's attention of the encoder's last layer in use, averaged over heads. Both are sorted. The first `f = int(floor * K)` of each
    stay; the remaining `R = K - 2 f` places go to the next `a` of s and `R - a` of c, with the a that maximises
    `(sum of these s) * (sum of these c)`, the smallest such a. Where both name a token, the place it frees goes to the candidate best
    placed in either list, by min(place in s, place in c). All in their order.

    Shapes (b batch, n candidates, K kept, m text tokens, c channels): encoder `[b, 1 + n, c]` unchanged, state `attention` `[b, n]`;
    decoder.0 tokens `[b, n, c]` -> `[b, K, c]`; scores in float32.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = AdaFV.Config(keep=16)
    >>> for stage, tokens, context in contexts(AdaFV, config, "decoder.0"):
    ...     print(stage.at, AdaFV.apply(stage, tokens, context, config).tokens.shape[1])
    encoder 65
    decoder.0 16

    Limits: needs an encoder with one class token; nothing may be taken away between the encoder and decoder.0. Both scores are summed as
    they are, so their scales matter, as in the official code.

    Where the official code differs: a token that both lists name is handed to the decoder twice, and fewer distinct ones stay; the
    decoder's tokens are distinct and in order here, so the freed places are filled. With several pictures it adds the picture's number i
    instead of 576 i to the places of the class attention. It renumbers positions, as here unless `positions: keep`. Its first option is
    the budget rounded to an even number per picture.
    """

    paper = "AdaFV: Rethinking of Visual-Language Alignment for VLM Acceleration, ACL Findings 2025, arXiv:2501.09532"
    official = "JiayiV/AdaV@58d1f8d llava/model/language_model/llava_llama.py:max_sqrt_sum_with_indices, generate (method 'adav')"
    mechanism = "query"
    sites = ("decoder.0",)
    query_aware = True

    samples = (Sample("decoder.0", {"keep": 20}), Sample("decoder.0", {"keep": "75%", "floor": 0.1, "positions": "keep"}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay.
            floor: share of K that each list has for itself.
            positions: what happens to rotary positions.
        """

        keep: Budget = Budget(share=0.25)
        floor: float = Field(default=0.25, ge=0, le=0.5)
        positions: Literal["renumber", "keep"] = "renumber"

    @staticmethod
    def stages(at: Site, config: AdaFV.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """A look after the encoder, the cut at decoder.0."""
        need_site("adafv", at, "decoder")
        if at.layer != 0:
            raise ValueError(f"adafv compares the decoder's inputs with the prompt's, not at {at}; write at: decoder.0")
        need_class_token("adafv", facts)
        return Stage(Site("encoder"), (_CLASS,), 0), Stage(at, (_TEXT,), 1, tied=True)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: AdaFV.Config, facts: ModelFacts) -> Layout:
        """Everything after the encoder; K tokens at decoder.0."""
        k = kept_of(config.keep, layout.tokens - layout.class_tokens, stage.at)
        if stage.index:
            return selected(layout, k, config.positions)
        if layout.class_tokens != 1:
            raise ValueError(f"adafv needs the class token at {stage.at}, and {layout.class_tokens} arrive; put adafv first")
        return layout

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: AdaFV.Config) -> Compressed:
        """Hand the class attention on; then choose."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top, rank

        k = AdaFV.layout(stage, context.layout, config, context.facts).tokens
        n, valid = tokens.shape[1], context.valid
        if stage.index == 0:
            score = context.captured[_CLASS].float()[:, 1:]
            return Compressed(tokens, torch.arange(n).expand(tokens.shape[0], n).contiguous(), valid, state={"attention": score})
        attention = context.state["attention"]
        if context.text is None or context.text_valid is None or attention.shape[1] != n:
            scored = attention.shape[1]
            raise ValueError(f"adafv scored {scored} tokens in the encoder and {n} arrive at {stage.at}; let no other method cut between")
        similarity = text_score(tokens, context.text, context.text_valid, valid)
        places = torch.minimum(rank(similarity, valid), rank(attention, valid)).float()
        chosen = times_picked(similarity, attention, k, int(config.floor * k), valid) > 0
        kept, _ = keep_top(torch.where(chosen, torch.ones_like(places), -places), k, valid)
        return Compressed(gather(tokens, kept), kept, gather(valid, kept))


def text_score(tokens: Tensor, text: Tensor, text_valid: Tensor, valid: Tensor) -> Tensor:
    """Return `max_t softmax_i(100 cos(t, x_i))` `[b, n]` for tokens `[b, n, c]` and text `[b, m, c]`; padding is in neither."""
    import torch

    from tmc_export.graphs._ops import cosine

    logits = cosine(text, tokens, _EPS) * _SHARPNESS
    weights = torch.where(valid.unsqueeze(1), logits, torch.full_like(logits, -1e30)).softmax(dim=2)
    return torch.where(text_valid.unsqueeze(2), weights, torch.zeros_like(weights)).amax(dim=1)


def balance(first: Tensor, second: Tensor, budget: int) -> Tensor:
    """Return how many `[b]` of `first` make `(sum of its first a) * (sum of the first budget - a of second)` largest; the smallest a.

    Args:
        first: `[b, at least budget]`, falling.
        second: as first.
        budget: places to split.

    >>> import torch
    >>> balance(torch.tensor([[4.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0]]), 3).tolist()
    [1]
    """
    import torch

    from tmc_export.graphs._ops import argmax

    def sums(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.float()[:, :budget].cumsum(dim=1), (1, 0))

    backwards = torch.arange(budget, -1, -1)
    return argmax(sums(first) * sums(second).index_select(1, backwards))


def times_picked(similarity: Tensor, attention: Tensor, k: int, floor: int, valid: Tensor) -> Tensor:
    """Return how often (0, 1 or 2) each candidate `[b, n]` is named by the two lists; the sum is k."""
    import torch

    from tmc_export.graphs._ops import rank, scores_of

    rest = k - 2 * floor
    lists = [torch.topk(scores_of(score, valid), k - floor, dim=1).values[:, floor:] for score in (similarity, attention)]
    a = balance(lists[0].clamp_min(0.0), lists[1].clamp_min(0.0), rest).unsqueeze(1)
    named = (rank(similarity, valid) < a + floor).long()
    return named + (rank(attention, valid) < rest - a + floor).long()
