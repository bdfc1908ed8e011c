"""VisionZip: the tokens the class token attends to most, and the rest merged into evenly spaced ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_class_token, need_raster_encoder, need_site
from tmc_export.graphs._contract import Attention, Compressed, Context, Keys, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VisionZip"]

_SCORE = Attention(layer="previous", rows="cls", heads="sum")
_KEYS = Keys()


@register("visionzip")
class VisionZip(Method):
    """VisionZip, dominant tokens by class attention and contextual tokens by merging.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv:2412.04467.

    With A the attention and K the unscaled keys of the last encoder layer in use:
    `score_i = sum over heads of A[class, i]`; the `dominant - 1` best patches and the class token stay, in their order. Of the R others,
    every `max(1, R // contextual)`-th is a target, the first `contextual` of them; each remaining token joins the target of the largest
    cosine of `mean over heads of K` (no epsilon), and `contextual_t = target_t + mean of those that joined` (the bare target when none
    did).

    Shapes (b batch, n candidates of which the first is the class token, k = dominant + contextual, c channels): tokens `[b, n, c]` ->
    `[b, k, c]`; score `[b, n]` and cosines in float32. `assign` names the row of every candidate; `mix` holds the weights.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = VisionZip.Config(dominant=12, contextual=4)
    >>> stage, tokens, context = context_for(VisionZip, config, "encoder", seed=0)
    >>> VisionZip.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (16, 65)

    Limits: needs an encoder with one class token. The class token leaves as a visual token, so the projector and the decoder see it. A
    contextual token is a sum, about twice as long as its neighbours, as the released code has it. Padding never becomes a target before
    valid patches and joins nothing.

    Where the official code differs: its two options count the class token inside `dominant` on the outside and not inside; here
    `dominant` counts it (54 + 10 = 64). It divides by the number that joined with a floor of 1, the same as here. Ties go to the lowest
    index.
    """

    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025, arXiv:2412.04467"
    official = "dvlab-research/VisionZip@3151f6d visionzip/clip_encoder.py:CLIPVisionTower_VisionZip.forward"
    mechanism = "attention"
    sites = ("encoder",)

    samples = (
        Sample("encoder", {"dominant": 12, "contextual": 7}, too_much={"dominant": 60, "contextual": 7}),
        Sample("encoder", {"dominant": 55, "contextual": 10}, too_much={"dominant": 60, "contextual": 7}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            dominant: tokens kept as they are, the class token included.
            contextual: tokens that the rest is merged into.
        """

        dominant: int = Field(default=54, ge=2)
        contextual: int = Field(default=10, ge=1)

    @staticmethod
    def stages(at: Site, config: VisionZip.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, after the last encoder layer in use."""
        need_site("visionzip", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"visionzip acts after the whole encoder, not at {at}; write at: encoder")
        need_class_token("visionzip", facts)
        need_raster_encoder("visionzip", at, facts)
        return (Stage(at, (_SCORE, _KEYS)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: VisionZip.Config, facts: ModelFacts) -> Layout:
        """The dominant run, the contextual run; both visual."""
        if layout.class_tokens != 1:
            raise ValueError(f"visionzip needs the class token at {stage.at}, and {layout.class_tokens} arrive; put visionzip first")
        k = config.dominant + config.contextual
        if k > layout.tokens:
            raise ValueError(
                f"dominant: {config.dominant} and contextual: {config.contextual} are {k} tokens, more than the {layout.tokens} that "
                "arrive at "
                f"{stage.at} (class token included); lower them"
            )
        return Layout((Segment("visual", config.dominant), Segment("visual", config.contextual)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: VisionZip.Config) -> Compressed:
        """Keep the dominant tokens and merge the others."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top, one_hot

        VisionZip.layout(stage, context.layout, config, context.facts)
        valid, n = context.valid, tokens.shape[1]
        score = context.captured[_SCORE].float()
        top = torch.full_like(score[:, :1], 1e30)
        dominant, rest = keep_top(torch.cat([top, score[:, 1:]], dim=1), config.dominant, valid)
        target, joiner = _split(rest, config.contextual)
        if not joiner.shape[1]:  # everything stays; engines take no empty tensors
            every = torch.cat([dominant, target], dim=1)
            return Compressed(gather(tokens, every), every, gather(valid, every))
        nearest = _nearest(context.captured[_KEYS], target, joiner, valid)
        member = one_hot(nearest, config.contextual).transpose(1, 2)
        member = member / member.sum(dim=2, keepdim=True).clamp_min(1.0)
        kept = torch.cat([dominant, target], dim=1)
        mean = member @ gather(tokens, joiner).float()
        contextual = gather(tokens, target).float() + mean
        out = torch.cat([gather(tokens, dominant), contextual.to(tokens.dtype)], dim=1)
        share = torch.cat([torch.zeros_like(one_hot(dominant, n)), member @ one_hot(joiner, n)], dim=1)
        return Compressed(
            out,
            kept,
            gather(valid, kept),
            assign=_assign(kept, joiner, nearest, config),
            mix=one_hot(kept, n) + share,
        )


def _split(rest: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """Split the remaining candidates `[b, R]` into targets `[b, contextual]` and joiners `[b, R - contextual]`; static positions."""
    import torch

    count = rest.shape[1]
    step = max(1, count // contextual)
    targets = list(range(0, count, step))[:contextual]
    joiners = [i for i in range(count) if i not in set(targets)]
    return rest[:, torch.tensor(targets, dtype=torch.int64)], rest[:, torch.tensor(joiners, dtype=torch.int64)]


def _nearest(keys: Tensor, target: Tensor, joiner: Tensor, valid: Tensor) -> Tensor:
    """Return the target `[b, R']` that each joiner is nearest to, -1 for padding; a padded target is never joined by a valid token."""
    import torch

    from tmc_export.graphs._ops import argmax, cosine, gather

    metric = keys.float().mean(dim=2)
    score = cosine(gather(metric, joiner), gather(metric, target))
    score = torch.where(gather(valid, target).unsqueeze(1), score, torch.full_like(score, -2.0))
    nearest = argmax(score)
    return torch.where(gather(valid, joiner), nearest, torch.full_like(nearest, -1))


def _assign(kept: Tensor, joiner: Tensor, nearest: Tensor, config: VisionZip.Config) -> Tensor:
    """Return the output row `[b, n]` of every candidate."""
    import torch

    row = torch.arange(kept.shape[1]).unsqueeze(0).expand(kept.shape[0], -1)
    joined = torch.where(nearest < 0, nearest, nearest + config.dominant)
    where = torch.cat([kept, joiner], dim=1)
    return torch.zeros_like(where).scatter(1, where, torch.cat([row, joined], dim=1))
