"""TopV: the tokens that a transport of one layer's input to its output draws on most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_grid, need_site, selected
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TopV", "costs", "spread"]


@register("topv")
class TopV(Method):
    """TopV, pruning by optimal transport between the tokens before and after a decoder layer.

    Paper: "TopV: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory Multimodal Vision Language Model",
    CVPR 2025, arXiv:2503.18278.

    With s the visual tokens at the input of decoder layer L-1 and t those at the input of layer L, both on the raster:
    `C_ij = alpha (1 - cos(s_i, t_j)) / 2 + beta (1 - exp(-|i - j|^2 / (2 sigma^2))) + gamma |i - centre| / max |i' - centre|`, where
    |i - j| is the distance on the raster in tokens. Sinkhorn's iterations (`_sinkhorn.py`), a fixed number, all masses 1 / n, give the
    plan P in which every target gets its 1 / n; `importance_i = sum_j P_ij`. `K - m` of the K = `floor(n * keep)` tokens are the most
    important ones, `m = int(recover * K)` are spread evenly over the others.

    Shapes (b batch, n candidates, K kept, c channels): decoder.<L-1> `[b, n, c]` unchanged, state `before` `[b, n, c]`; decoder.<L>
    tokens `[b, n, c]` -> `[b, K, c]`; costs and plan `[b, n, n]` in float32. Positions are kept.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = TopV.Config(keep="50%")
    >>> for stage, tokens, context in contexts(TopV, config, "decoder.3"):
    ...     print(stage.at, TopV.apply(stage, tokens, context, config).tokens.shape[1])
    decoder.2 64
    decoder.3 32

    Limits: needs the raster. n^2 numbers and three matrix-vector products a round: its share of the prefill is the largest of all
    selections beside TokenCarve and DivPrune. Padding has no mass and is no target.

    Where the official code differs: there is none; this is from the paper's description. The paper takes the targets behind
    the layer's second norm, a place between the layer's halves that no cut reaches: the layer's output stands in, and cosines instead of
    differences, so that lengths do not matter. Which margin of the plan the last step meets is not known to us; were it the sources', all
    would be equally important, so it is the targets'. A cost that depends on the source alone, as the central distance does, cancels in
    every transport whose sources have fixed masses: gamma only counts with `iterations: 0`, where each target draws from the sources by
    `softmax_i(-C_ij / epsilon)`. Weights, sigma, epsilon and iterations are options; their defaults are not checked against the authors'.
    """

    paper = "TopV, CVPR 2025, arXiv:2503.18278"
    official = "paper only"
    mechanism = "similarity"
    sites = ("decoder.<k>",)

    samples = (Sample("decoder.3", {"keep": 20}), Sample("decoder.1", {"keep": "40%", "recover": 0.0, "gamma": 0.5, "iterations": 0}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay, recovered ones included.
            recover: share of them that is spread evenly over what would be pruned.
            alpha: weight of the features.
            beta: weight of the distance on the raster.
            gamma: weight of the distance to the centre.
            sigma: reach of a token on the raster, in tokens.
            epsilon: weight of the entropy.
            iterations: Sinkhorn iterations; 0 leaves the masses of the sources free.
        """

        keep: Budget = Budget(share=0.5)
        recover: float = Field(default=0.25, ge=0, lt=1)
        alpha: float = Field(default=1.0, ge=0, le=2)
        beta: float = Field(default=1.0, ge=0, le=2)
        gamma: float = Field(default=0.01, ge=0, le=2)
        sigma: float = Field(default=10.0, gt=0)
        epsilon: float = Field(default=0.1, ge=0.05)
        iterations: int = Field(default=3, ge=0, le=100)

    @staticmethod
    def stages(at: Site, config: TopV.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """A look one layer before, and the cut."""
        need_site("topv", at, "decoder")
        layer, depth = at.layer or 0, facts.decoder.layers
        if not 1 <= layer < depth:
            raise ValueError(
                f"topv at {at} needs a decoder layer before and after the cut; use decoder.1 to decoder.{depth - 1} (the paper: decoder.3)"
            )
        return Stage(Site("decoder", layer - 1), (), 0), Stage(at, (), 1, tied=True)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: TopV.Config, facts: ModelFacts) -> Layout:
        """Everything at the first place; `floor(n * keep)` tokens at the second."""
        need_grid("topv", layout, stage.at)
        k = kept_of(config.keep, layout.tokens, stage.at, "floor")
        return selected(layout, k) if stage.index else layout

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: TopV.Config) -> Compressed:
        """Hand the tokens on; then choose."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top, partition
        from tmc_export.graphs._sinkhorn import sinkhorn

        k = TopV.layout(stage, context.layout, config, context.facts).tokens
        n, valid = tokens.shape[1], context.valid
        if stage.index == 0:
            index = torch.arange(n).expand(tokens.shape[0], n).contiguous()
            return Compressed(tokens, index, valid, state={"before": tokens})
        mass = valid.float() / valid.float().sum(dim=1, keepdim=True).clamp_min(1.0)
        cost = costs(context.state["before"], tokens, need_grid("topv", context.layout, stage.at), valid, config)
        importance = sinkhorn(cost, mass, mass, config.epsilon, config.iterations).sum(dim=2)
        recovered = int(config.recover * k)
        top, rest = keep_top(importance, k - recovered, valid)
        chosen = torch.zeros_like(valid).scatter(1, top, True)
        if recovered:
            more, _ = keep_top(spread(gather(valid, rest), recovered).float(), recovered, gather(valid, rest))
            chosen = chosen.scatter(1, gather(rest, more), True)
        kept, _ = partition(chosen, k)
        return Compressed(gather(tokens, kept), kept, gather(valid, kept))


def costs(before: Tensor, after: Tensor, grid: tuple[int, int], valid: Tensor, config: TopV.Config) -> Tensor:
    """Return the costs `[b, n, n]` of moving each token before to each token after; 0 wherever one of them is padding."""
    import torch

    from tmc_export.graphs._ops import cosine

    h, w = grid
    place = torch.stack([torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)], dim=1).float()
    apart = ((place.unsqueeze(1) - place.unsqueeze(0)) ** 2).sum(dim=2)
    middle = ((place - torch.tensor([(h - 1) / 2, (w - 1) / 2])) ** 2).sum(dim=1).sqrt()
    near = 1.0 - (apart / (-2.0 * config.sigma**2)).exp()
    fixed = config.beta * near + (config.gamma * middle / middle.amax(dim=0).clamp_min(1e-30)).unsqueeze(1)
    cost = config.alpha * (1.0 - cosine(before, after)) / 2.0 + fixed
    return cost * (valid.unsqueeze(1) & valid.unsqueeze(2)).float()


def spread(present: Tensor, count: int) -> Tensor:
    """Mark `count` of the true entries of `[b, n]`, evenly: of N in a row, numbers i at which `(i + 1) * count // N` is one more.

    With fewer true entries than `count`, all of them.

    >>> import torch
    >>> spread(torch.ones(1, 6, dtype=torch.bool), 2).tolist()
    [[False, False, True, False, False, True]]
    """
    import torch

    up_to = present.long().cumsum(dim=1)
    total = up_to[:, -1:].clamp_min(1)
    steps = torch.div(up_to * count, total, rounding_mode="floor") > torch.div((up_to - 1) * count, total, rounding_mode="floor")
    return present & steps
