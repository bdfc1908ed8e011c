"""Random selection: the control that every selecting method is measured against."""

from __future__ import annotations

import random as _random
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_raster_encoder, need_site, selected
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random", "priorities"]


def priorities(n: int, seed: int) -> list[int]:
    """Return a pseudo-random permutation of 0 … n-1, the same on every Python version (only `random()` is promised to be).

    >>> sorted(priorities(5, seed=1))
    [0, 1, 2, 3, 4]
    """
    draw = _random.Random(seed)
    keys = [draw.random() for _ in range(n)]
    places = [0] * n
    for place, index in enumerate(sorted(range(n), key=keys.__getitem__)):
        places[index] = place
    return places


@register("random")
class Random(Method):
    """Random selection, a control: the same count as a method, chosen without looking.

    Paper: none; the baseline of every paper of the field.

    With p a pseudo-random permutation of 0 … n-1 drawn from `seed`: the k candidates with the largest `p_i` stay, in their order. The
    permutation is baked into the graph: all pictures lose the same places, other seeds lose others. Class tokens always stay.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]`. Positions are kept, or numbered
    anew under `positions: renumber`.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Random.Config(keep=4, seed=7)
    >>> stage, tokens, context = context_for(Random, config, "projector", seed=0)
    >>> Random.apply(stage, tokens, context, config).source.shape[1]
    4

    Limits: one draw for all pictures; average several seeds for a figure with an interval.

    Where the official code differs: there is none.
    """

    paper = "none (control)"
    official = "paper only"
    mechanism = "control"
    sites = ("encoder", "encoder.<l>", "projector", "decoder.<k>")

    samples = (Sample("encoder"), Sample("projector", {"keep": 5, "seed": 3}), Sample("decoder.2"))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay; class tokens are not counted.
            seed: which draw.
            positions: what happens to rotary positions at decoder sites, so that it can stand beside a method of either rule.
        """

        keep: Budget = Budget(share=0.5)
        seed: int = Field(default=0, ge=0)
        positions: Literal["keep", "renumber"] = "keep"

    @staticmethod
    def stages(at: Site, config: Random.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("random", at, "encoder", "projector", "decoder")
        need_raster_encoder("random", at, facts)
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Random.Config, facts: ModelFacts) -> Layout:
        """The class tokens and `round(n * keep)` others."""
        first = layout.class_tokens
        k = kept_of(config.keep, layout.tokens - first, stage.at)
        if not first:
            return selected(layout, k, config.positions)
        return Layout((Segment("class", first), Segment("visual", k)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Random.Config) -> Compressed:
        """Keep the places with the largest priorities; padding only when nothing else is left."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top

        first = context.layout.class_tokens
        n = context.layout.tokens - first
        k = Random.layout(stage, context.layout, config, context.facts).tokens
        scores = [n + 1] * first + priorities(n, config.seed)
        kept, _ = keep_top(torch.tensor(scores, dtype=torch.float32).expand(tokens.shape[0], -1), k, context.valid)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))
