"""DivPrune: the tokens that are farthest from one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DivPrune", "picks"]

_SELECTED = -1.0
_PADDING = -0.5
_FAR = 4.0


@register("divprune")
class DivPrune(Method):
    """DivPrune, selection by the largest smallest distance.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv:2503.02175.

    With `D_ij = 1 - cos(x_i, x_j)` (no epsilon): the first pick is the candidate whose nearest other is farthest,
    `argmax_j min_{i != j} D_ij`; each further one is `argmax_j min_{i picked} D_ij`. The `round(n * keep)` picks (half to even) stay, in
    their order.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]`; D `[b, n, n]` and a running minimum `[b, n]` in
    float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = DivPrune.Config(keep=8)
    >>> stage, tokens, context = context_for(DivPrune, config, "projector", seed=0)
    >>> DivPrune.apply(stage, tokens, context, config).source.shape[1]
    8

    Limits: k steps one after another, unrolled: three nodes each, about 450 at k=144 and 880 at k=288. D takes n^2 c multiply-adds and n^2
    floats. A zero vector is at distance 1 of everything (the official code makes it NaN). Padding is picked when nothing else is left.

    Where the official code differs: it does not mark what it picked, so that with fewer distinct tokens than k it picks some again and
    hands copies to the decoder: that takes `repeats: true`, at the projector; without it every pick is another candidate, the lowest
    index first once all distances are 0. It renumbers positions, as here unless `positions: keep`. It prunes by the first item of a
    batch and takes the span of the picture as 35 on.
    """

    paper = "DivPrune, CVPR 2025, arXiv:2503.02175"
    official = "vbdi/divprune@799e2d9 LLaVA/llava/model/llava_arch.py:DivPrune"
    mechanism = "similarity"
    sites = ("projector", "decoder.0")

    samples = (
        Sample("projector", {"keep": 9}),
        Sample("projector", {"keep": "20%", "repeats": True}),
        Sample("decoder.0", {"keep": "25%", "positions": "keep"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay; the official default is 9.8%.
            positions: what happens to rotary positions at `decoder.0`.
            repeats: pick a candidate again when all others are copies of picked ones, as the official code does; projector only.
        """

        keep: Budget = Budget(share=0.098)
        positions: Literal["renumber", "keep"] = "renumber"
        repeats: bool = False

    @staticmethod
    def stages(at: Site, config: DivPrune.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("divprune", at, "projector", "decoder")
        if at.part == "decoder" and at.layer != 0:
            raise ValueError(f"divprune compares the decoder's inputs, not at {at}; write at: decoder.0 or at: projector")
        if at.part == "decoder" and config.repeats:
            raise ValueError("repeats: true would put a token twice at decoder.0; use at: projector, or leave repeats out")
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: DivPrune.Config, facts: ModelFacts) -> Layout:
        """`round(n * keep)` tokens."""
        return selected(layout, kept_of(config.keep, layout.tokens, stage.at), config.positions)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: DivPrune.Config) -> Compressed:
        """Keep the picks, in ascending order."""
        from tmc_export.graphs._ops import gather, partition, top_in_order

        k = DivPrune.layout(stage, context.layout, config, context.facts).tokens
        found, nearest = picks(tokens, k, context.valid, repeats=config.repeats)
        if config.repeats:
            kept = gather(found, top_in_order(-found.float(), k))
        else:
            kept, _ = partition(nearest < (_SELECTED + _PADDING) / 2, k)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


def picks(tokens: Tensor, k: int, valid: Tensor, *, repeats: bool = False) -> tuple[Tensor, Tensor]:
    """Make k picks of tokens `[b, n, c]`.

    Returns:
        `[b, k]` int64, the picks in the order they are made; and `[b, n]`, the distance to the nearest pick, -1 for the picks themselves
        unless `repeats`.
    """
    import torch

    from tmc_export.graphs._ops import argmax, cosine

    b, n = tokens.shape[0], tokens.shape[1]
    itself = torch.eye(n, dtype=torch.bool)
    distances = 1.0 - cosine(tokens, tokens)
    others = torch.where(itself | ~valid.unsqueeze(2), torch.full_like(distances, _FAR), distances)
    if not repeats:
        distances = torch.where(itself, torch.full_like(distances, _SELECTED), distances)
    padding = torch.full_like(distances[:, 0], _PADDING)
    found = [argmax(torch.where(valid, others.amin(dim=1), padding))]
    rows, first = distances.flatten(0, 1), torch.arange(b) * n
    nearest = torch.where(valid, torch.full_like(padding, _FAR), padding)
    for step in range(k):
        pick = found[-1] if b == 1 else found[-1] + first
        nearest = torch.minimum(nearest, rows.index_select(0, pick))
        if step < k - 1:
            found.append(argmax(nearest))
    return torch.stack(found, dim=1), nearest
