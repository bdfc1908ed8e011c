"""ZipVL: per layer the smallest set of visual tokens that holds a share of the attention, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ZipVL", "important"]

_SCORE = Attention(layer="previous", rows="text", heads="mean", row_sum=True)


@register("zipvl")
class ZipVL(Method):
    """ZipVL, as many tokens as a layer's attention asks for.

    Paper: "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification", ICCV 2025, arXiv:2410.08584.

    After each of `layers`, with A the attention of the layer before, averaged over heads: `a_i = sum over probe rows q of A[q, i]`. With a
    sorted falling, the important tokens are the first p, `p = min{p : a_1 + ... + a_p >= threshold * sum of all}`. The paper ranks by a
    divided by the number of rows that see the token; the probes here are the text tokens of the turn, which see all of a picture or
    none, so the division changes no order. Static: `keep` tokens leave, the best ones in their order; those of them behind the
    first p are marked as padding, so nothing attends to them.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]` per stage, `valid` `[b, k]`; scores `[b, n]` in
    float32. Positions are kept.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = ZipVL.Config(keep=("50%",), threshold=0.3)
    >>> stage, tokens, context = context_for(ZipVL, config, "decoder.2", seed=0)
    >>> out = ZipVL.apply(stage, tokens, context, config)
    >>> out.tokens.shape[1], int(out.valid.sum()) < 32
    (32, True)

    Limits: tokens that a layer does not need are gone for the later ones too; in the paper they skip that layer's attention and come back
    in the next. A smaller p saves no time within a static shape, only what padding costs the answer; lower `keep` for speed. The paper's
    low-bit KV for unimportant tokens (first version) is not built.

    Where the official code differs: none was released; built from the paper. It probes with the last and some random tokens; a static
    graph wants no random ones. Mass is counted over the candidates, not over all tokens. Ties go to the lowest index.
    """

    paper = "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification, ICCV 2025, arXiv:2410.08584"
    official = "paper only"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True
    budgets = "tokens that leave each cut; those behind the threshold are padding"

    samples = (
        Sample("decoder.2", {"keep": ("50%", 16), "layers": (2, 6)}),
        Sample("decoder.2", {"keep": (40,), "threshold": 0.6}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share of what arrives or number of tokens that leave each cut; the cap on the important ones.
            layers: the cuts, as decoder layers that have run; the first is the one of `at`. Left out: `at` alone.
            threshold: share of the attention that the important tokens hold; left out: all that `keep` lets stay. The paper: 0.975.
        """

        keep: tuple[Budget, ...] = (Budget(share=0.5),)
        layers: tuple[int, ...] | None = None
        threshold: float | None = Field(default=None, gt=0, le=1)

    @staticmethod
    def stages(at: Site, config: ZipVL.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for each layer."""
        need_site("zipvl", at, "decoder")
        depth = facts.decoder.layers
        layers = config.layers if config.layers is not None else (at.layer or 0,)
        if not layers or len(layers) != len(config.keep):
            raise ValueError(
                f"layers: {list(layers)} and keep: {len(config.keep)} budgets differ in number; give one keep for each layer, at least one"
            )
        if layers[0] != at.layer:
            raise ValueError(f"layers: {list(layers)} start at {layers[0]}, and at: is {at}; write at: decoder.{layers[0]}")
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= depth:
            raise ValueError(
                f"layers: {list(layers)} must rise, from 1 to at most {depth - 1}: {facts.architecture} has {depth} decoder layers; "
                "set layers"
            )
        return tuple(Stage(Site("decoder", layer), (_SCORE,), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ZipVL.Config, facts: ModelFacts) -> Layout:
        """The cap, positions kept."""
        return selected(layout, kept_of(config.keep[stage.index], layout.tokens, stage.at))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ZipVL.Config) -> Compressed:
        """Keep the best-attended candidates in order; those beyond the threshold as padding."""
        from tmc_export.graphs._ops import gather, keep_top

        k = ZipVL.layout(stage, context.layout, config, context.facts).tokens
        attended, valid = context.captured[_SCORE], context.valid
        kept, _ = keep_top(attended, k, valid)
        stays = valid if config.threshold is None else important(attended, valid, config.threshold)
        return Compressed(gather(tokens, kept), kept, gather(stays, kept))


def important(attended: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return `[b, n]` bool: the smallest set of valid candidates whose attention `[b, n]` sums to `threshold` of all; one at least."""
    import torch

    from tmc_export.graphs._ops import gather, order_by, rank

    mass = torch.where(valid, attended.float(), torch.zeros_like(attended.float()))
    place = rank(mass, valid)
    sums = gather(mass, order_by(place)).cumsum(dim=1)
    before = gather(torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1), place)
    return valid & ((before < threshold * mass.sum(dim=1, keepdim=True)) | (place == 0))
