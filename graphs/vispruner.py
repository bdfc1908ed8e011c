"""VisPruner: the patches the class token attends to most, and of the rest those left when near duplicates are dropped round by round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_raster_encoder, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VisPruner"]

_SCORE = Attention(layer="previous", rows="cls", heads="mean")
_LANES = 8


@register("vispruner")
class VisPruner(Method):
    """VisPruner, important patches by class attention and diverse ones by repeated matching.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025, arXiv:2412.01818.

    With a the class token's attention in the layer of the features, averaged over heads, and T = keep: the `floor(T * important)` patches
    of the largest a are important. The others, in falling order of a, are the residual R. While `|R| > T - important`: of the tokens at
    its even places, the `min(per_round, |R| - T + important)` with the largest `max_j cos(x_i, x_j)` (no epsilon), j at the odd places,
    are dropped; R is then the remaining even ones by falling cosine, and behind them the odd ones as they stood.

    Shapes (b batch, n candidates of which the first is the class token, N = n-1, c channels): tokens `[b, n, c]` -> `[b, T, c]` in the
    order of the picture; a `[b, n]` and the cosines `[b, N, N]` in float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = VisPruner.Config(keep=24)
    >>> stage, tokens, context = context_for(VisPruner, config, "encoder", seed=0)
    >>> VisPruner.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (24, 65)

    Limits: `(N - T) / per_round` rounds, unrolled (56 for 576 -> 128), each a comparison of all pairs. An odd residual has no pairs and is
    refused, as is a last round that drops more than half of it; the official code fails on both. The class token is dropped. Cosines one
    rounding apart decide which tokens are compared from then on, so float32 results differ from exact ones (in float64 13 of the 32
    tokens of one golden differ), and half precision or another summation from float32.

    Where the official code differs: it multiplies the cosines of every round anew, here they are multiplied once. It masks after the
    projector, which acts token by token. Padding is dropped before any valid patch. Ties go to the lowest index, and within a round to the
    first in R.
    """

    paper = "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, ICCV 2025, arXiv:2412.01818"
    official = "Theia-4869/VisPruner@aefa01a llava/model/llava_arch.py:LlavaMetaForCausalLM.encode_images"
    mechanism = "attention"
    sites = ("encoder",)

    samples = (
        Sample("encoder", {"keep": 24}),
        Sample("encoder", {"keep": 30, "important": 0.75, "per_round": 4}),
        Sample("encoder", {"keep": 20, "important": 1.0}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the patches that stay.
            important: share of these that is kept for its attention; the others are kept for their diversity.
            per_round: near duplicates dropped per round, an even number.
        """

        keep: Budget = Budget(tokens=128)
        important: float = Field(default=0.5, ge=0, le=1)
        per_round: int = Field(default=8, ge=2, multiple_of=2)

    @staticmethod
    def stages(at: Site, config: VisPruner.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, after the last encoder layer in use."""
        need_site("vispruner", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"vispruner acts after the whole encoder, not at {at}; write at: encoder")
        need_class_token("vispruner", facts)
        need_raster_encoder("vispruner", at, facts)
        return (Stage(at, (_SCORE,)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: VisPruner.Config, facts: ModelFacts) -> Layout:
        """T patches, no class token."""
        kept, important, rounds = _counts(stage, layout, config)
        left = layout.tokens - 1 - important
        if rounds and left % 2:
            raise ValueError(
                f"keep: {kept} with {important} important patches at {stage.at} leaves a residual of {left}, which has no pairs; change "
                "keep or important so that an even number is left"
            )
        if any(2 * dropped > left - sum(rounds[:i]) for i, dropped in enumerate(rounds)):
            raise ValueError(
                f"per_round: {config.per_round} is more than half of the residual in the last of {len(rounds)} rounds at {stage.at}, where "
                f"{kept - important} diverse patches are to stay; lower per_round, or raise keep"
            )
        return selected(layout, kept)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: VisPruner.Config) -> Compressed:
        """Take the important patches, then thin out the others."""
        from tmc_export.graphs._ops import gather, keep_top, rank

        VisPruner.layout(stage, context.layout, config, context.facts)
        count, important, rounds = _counts(stage, context.layout, config)
        valid = context.valid[:, 1:]
        first = rank(context.captured[_SCORE][:, 1:], valid).float() - important
        stays = first < count - important
        if rounds:
            similar, gone, place = _cosines(tokens[:, 1:]), important, first
            for dropped in rounds:
                gone += dropped
                place = _thin(place, similar, valid, gone)
            stays = (first < 0) | (place >= 0)
        kept = keep_top(stays.float(), count)[0] + 1
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


def _counts(stage: Stage, layout: Layout, config: VisPruner.Config) -> tuple[int, int, tuple[int, ...]]:
    """Return the patches that stay, the important ones among them, and what each round drops."""
    if layout.class_tokens != 1:
        raise ValueError(f"vispruner needs the class token at {stage.at}, and {layout.class_tokens} arrive; put vispruner first")
    n = layout.tokens - 1
    kept = kept_of(config.keep, n, stage.at)
    important = int(kept * config.important)
    if important == kept:
        return kept, kept, ()
    full, rest = divmod(n - kept, config.per_round)
    return kept, important, (config.per_round,) * full + ((rest,) if rest else ())


def _cosines(patches: Tensor) -> Tensor:
    """Return the cosines `[b, n, n]` of `[b, n, c]`, float32, with lengths added up in the order in which PyTorch's `norm` adds them.

    A token's place decides whether it is compared or compared with, so two cosines in another order change every later round, and among
    576 patches some are always one rounding apart. PyTorch adds squares in eight lanes, then the lanes; a running sum does it in that
    order in every backend. Widths that 8 does not divide are added up as the backend likes.
    """
    x = patches.float()
    b, n, c = x.shape
    square = x * x
    if c % _LANES == 0:
        lanes = square.reshape(b, n, c // _LANES, _LANES).cumsum(dim=2)[:, :, -1]
        length = lanes.cumsum(dim=2)[:, :, -1:].sqrt()
    else:
        length = square.sum(dim=2, keepdim=True).sqrt()
    unit = x / length.clamp_min(1e-30)
    return unit @ unit.transpose(1, 2)


def _thin(place: Tensor, similar: Tensor, valid: Tensor, gone: int) -> Tensor:
    """Drop near duplicates among the even places of the residual.

    Args:
        place: `[b, n]` float32, a patch's place in the residual; below 0 when it is not (any more) in it.
        similar: `[b, n, n]` cosines.
        valid: `[b, n]`.
        gone: patches outside the residual afterwards.

    Returns:
        The places of the next round: in one order stand what is gone, padding, the even ones by falling cosine, then the odd ones as they
        stood, and the first `gone` of it are out.
    """
    import torch

    odd = place - 2.0 * (place * 0.5).floor() > 0.5
    against = torch.where(odd & valid & (place >= 0), 0.0, -9.0)
    key = torch.where(odd, -20.0, (similar + against.unsqueeze(1)).amax(dim=2))
    key = torch.where(valid, key, 5.0)
    key = torch.where(place < 0, 9.0, key)
    mine, other = key.unsqueeze(2), key.unsqueeze(1)
    before = (other > mine) | ((other == mine) & (place.unsqueeze(1) < place.unsqueeze(2)))
    return before.float().sum(dim=2) - gone
