"""ATP-LLaVA: tokens above learned thresholds on what attends to them and on where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_grid, need_site, selected
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Shape,
    Site,
    Stage,
    TextEmbeds,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATPLLaVA", "margins", "spatial_scores"]

_SELF = Attention(layer="previous", rows="visual", heads="mean", row_sum=True)
_CROSS = Attention(layer="previous", rows="text", heads="mean", row_sum=True)
_TEXT = TextEmbeds()  # for how many text rows there are


@register("atp_llava")
class ATPLLaVA(Method):
    """ATP-LLaVA, adaptive token pruning (ATP) with spatial augmented pruning (SAP).

    Paper: "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", CVPR 2025, arXiv:2412.00447.

    After each of `layers`, with A the attention of the layer before averaged over heads, n candidates and m text tokens:
    `self_i = mean over visual rows of A[v, i]`, `cross_i = mean over text rows of A[t, i]`, `redundancy_i = (self_i + cross_i) / 2`;
    `spatial_i = 1 - lambda R_i`, R_i = 1/s^2 the smallest rate of a uniform sampling (every s-th row and column) that takes token i, 1 when
    none does. Learned: `z = W [mean self, mean cross] + b`, `theta_r = sigmoid(w_r . z + b_r)`, `theta_s = sigmoid(w_s . z + b_s)`. The
    paper keeps a token when `redundancy_i > theta_r` or `spatial_i > theta_s`. Here the number is a budget: the `keep` best by
    `max(redundancy_i - theta_r, spatial_i - theta_s)`, in their order; with the number the thresholds leave, the same tokens stay.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, k, c]` per stage; scores `[b, n]` and thresholds
    `[b, 1]` in float32; state `spatial` `[b, n]` from the first cut on. Positions are kept.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = ATPLLaVA.Config(keep=("50%", "50%"), layers=(4, 14))
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(ATPLLaVA, config, "decoder.4")]
    [('decoder.4', 64), ('decoder.14', 32)]

    Limits: learned, with the model, under a loss that holds the mean number of tokens to a target; no weights were released. The raster
    must be whole at the first cut. Sums over all visual rows need the whole attention map of a layer, computed in blocks.

    Where the official code differs: none was released; built from the paper's equations. It speaks of attention logits in `self_i`; here
    both are taken after the softmax, since before it a causal mask leaves no finite mean. The sampling strides are `strides`. The soft
    masks of training (sigmoid of ten times the margin) rank as the margins do. Ties go to the lowest index.
    """

    paper = "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models, CVPR 2025, arXiv:2412.00447"
    official = "paper only"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True
    training_free = False
    budgets = "tokens kept at each cut"

    samples = (Sample("decoder.4", {"keep": ("60%", 20), "layers": (4, 14)}),)

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share of what arrives or number of tokens kept at each cut.
            layers: the cuts, as decoder layers that have run; the first is the one of `at`.
            strides: rows and columns between two tokens of a uniform sampling.
            scale: lambda.
        """

        keep: tuple[Budget, ...] = (Budget(share=0.5),) * 3
        layers: tuple[int, ...] = (4, 14, 24)
        strides: tuple[int, ...] = (2, 3, 4)
        scale: float = Field(default=3.0, gt=0)

    @staticmethod
    def stages(at: Site, config: ATPLLaVA.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for each layer."""
        need_site("atp_llava", at, "decoder")
        layers, depth = config.layers, facts.decoder.layers
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
        if min(config.strides, default=0) < 1:
            raise ValueError(f"strides: {list(config.strides)} are rows and columns between two samples; give one at least, each 1 or more")
        return tuple(Stage(Site("decoder", layer), (_SELF, _CROSS, _TEXT), index, tied=index > 0) for index, layer in enumerate(layers))

    @staticmethod
    def weights(config: ATPLLaVA.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Per cut, the projection of the two mean scores and the two threshold heads."""
        c = facts.decoder.width
        found: dict[str, Shape] = {}
        for layer in config.layers:
            found[f"atp.{layer}.score_projection.weight"], found[f"atp.{layer}.score_projection.bias"] = (c, 2), (c,)
            for head in ("redundant", "spatial"):
                found[f"atp.{layer}.{head}_threshold_head.weight"] = (1, c)
                found[f"atp.{layer}.{head}_threshold_head.bias"] = (1,)
        return found

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ATPLLaVA.Config, facts: ModelFacts) -> Layout:
        """`keep` tokens, positions kept."""
        if stage.index == 0:
            need_grid("atp_llava", layout, stage.at)
        return selected(layout, kept_of(config.keep[stage.index], layout.tokens, stage.at))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ATPLLaVA.Config) -> Compressed:
        """Keep the candidates farthest above their thresholds, in ascending order."""
        from tmc_export.graphs._ops import gather, keep_top

        k = ATPLLaVA.layout(stage, context.layout, config, context.facts).tokens
        spatial = context.state.get("spatial")
        if spatial is None:
            grid = need_grid("atp_llava", context.layout, stage.at)
            spatial = spatial_scores(grid, config.strides, config.scale).expand(tokens.shape[0], -1)
        kept, _ = keep_top(margins(stage, context, spatial), k, context.valid)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept), state={"spatial": gather(spatial.contiguous(), kept)})


def spatial_scores(grid: tuple[int, int], strides: tuple[int, ...], scale: float) -> Tensor:
    """Return `1 - scale * rate` `[1, rows * columns]` float32, rate 1/s^2 of the largest stride that takes a token, 1 when none does."""
    import torch

    rows, columns = grid
    largest = [max((s for s in strides if row % s == 0 and col % s == 0), default=1) for row in range(rows) for col in range(columns)]
    return torch.tensor([[1.0 - scale / (s * s) for s in largest]])


def margins(stage: Stage, context: Context, spatial: Tensor) -> Tensor:
    """Return `[b, n]`: by how much a candidate is above the nearer of its thresholds; above 0 where the paper keeps it."""
    import torch

    valid, text_valid = context.valid, context.text_valid
    if text_valid is None:
        raise ValueError(f"atp_llava averages over the text tokens at {stage.at}, and none were handed over; ask for TextEmbeds")
    count = valid.float().sum(dim=1, keepdim=True).clamp_min(1.0)
    own = context.captured[_SELF].float() / count
    cross = context.captured[_CROSS].float() / text_valid.float().sum(dim=1, keepdim=True).clamp_min(1.0)
    own, cross = (torch.where(valid, s, torch.zeros_like(s)) for s in (own, cross))
    means = torch.cat([s.sum(dim=1, keepdim=True) / count for s in (own, cross)], dim=1)

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = (context.weights[f"atp.{stage.at.layer}.{name}.{kind}"].float() for kind in ("weight", "bias"))
        return x @ weight.transpose(0, 1) + bias

    z = linear(means, "score_projection")
    redundant = linear(z, "redundant_threshold_head").sigmoid()
    place = linear(z, "spatial_threshold_head").sigmoid()
    return torch.maximum((own + cross) / 2.0 - redundant, spatial - place)
