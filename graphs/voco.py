"""VoCo-LLaMA: tokens behind the picture through which alone the text sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import need_fewer, queries_of, summaries
from tmc_export.graphs._checks import need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VoCo", "phases", "visible"]


@register("voco")
class VoCo(Method):
    """VoCo-LLaMA, vision compression tokens behind the picture and a mask that hides the picture from the text.

    Paper: "VoCo-LLaMA: Towards Vision Compression with Large Language Models", CVPR 2025, arXiv:2406.12275.

    `count` tokens of one learned embedding follow the picture's tokens. A sequence then has three phases: 0 before the first of them, 1
    from the first to the last, 2 behind the last. On top of the causal mask,

    - a row of phase 0 or 1 sees the keys of phases 0 and 1;
    - a row of phase 2 sees the keys of phases 1 and 2;

    a sequence without such tokens sees everything. So the text reads the picture only through the `count` tokens.

    Shapes (b batch, n candidates, k = n + count, c channels): tokens `[b, n, c]` -> `[b, k, c]`; the rule: `phases` `[b, t]` bool ->
    `[b, t]` int64, `visible` of two phases -> bool.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = VoCo.Config(count=4)
    >>> stage, tokens, context = context_for(VoCo, config, "projector", seed=0)
    >>> VoCo.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (68, 64)

    Limits: adds tokens to the prefill; what it saves is the picture's part of every layer's cache afterwards, which no row of phase 2
    reads. The framework makes the mask and drops those rows (`Layout.barrier`), for one picture and without cuts in the decoder. A learned
    weight: `voco.weight`, the row of `<voco>` in the checkpoint's token table.

    Where the official code differs: there `<voco>` is a word of the prompt, and a newline stands between picture and tokens. Also what the
    rule as it is makes invisible to the text: everything before the picture, the system prompt and the first token of the sequence
    included; and between two pictures' tokens all is phase 1. The number is fixed at 2 in its evaluation.
    """

    paper = "VoCo-LLaMA, CVPR 2025, arXiv:2406.12275"
    official = "Yxxxb/VoCo-LLaMA@3b6e14d llava/model/language_model/llava_llama_1stg.py:make_voco_mask_llava"
    mechanism = "query"
    sites = ("projector",)
    training_free = False
    grows = True

    samples = (Sample("projector", {"count": 4}, too_much={"count": 65}),)

    class Config(MethodConfig):
        """Options.

        Attributes:
            count: compression tokens behind each picture.
        """

        count: int = Field(default=2, ge=1)

    @staticmethod
    def stages(at: Site, config: VoCo.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, which adds tokens."""
        need_site("voco", at, "projector")
        return (Stage(at),)

    @staticmethod
    def weights(config: VoCo.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """One row of the token table."""
        return {"voco.weight": (1, facts.decoder.width)}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: VoCo.Config, facts: ModelFacts) -> Layout:
        """What arrived, and the compression tokens."""
        need_fewer("voco", f"count: {config.count}", config.count, layout.tokens, stage.at)
        return Layout((*layout.segments, Segment("visual", config.count)), layout.width, barrier=config.count)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: VoCo.Config) -> Compressed:
        """Put the learned embedding behind the candidates, `count` times."""
        import torch

        learned = context.weights["voco.weight"].expand(config.count, -1)
        more = summaries(queries_of(learned, tokens), context.valid)
        index = torch.arange(tokens.shape[1]).unsqueeze(0).expand(tokens.shape[0], -1)
        return Compressed(
            torch.cat([tokens, more.tokens], dim=1),
            torch.cat([index, more.source], dim=1),
            torch.cat([context.valid, more.valid], dim=1),
        )


def phases(voco: Tensor) -> Tensor:
    """Return the phase `[b, t]` (int64, 0 to 2) of every token of sequences, from a bool `[b, t]` that is true on compression tokens.

    Without any, every token is of phase 1, which sees all.

    >>> import torch
    >>> phases(torch.tensor([[False, True, True, False]])).tolist()
    [[0, 1, 1, 2]]
    """
    import torch

    count = voco.long()
    up_to = count.cumsum(dim=1)
    total = count.sum(dim=1, keepdim=True)
    started, open_yet = up_to >= 1, total - up_to + count >= 1
    phase = torch.where(started, torch.where(open_yet, 1, 2), 0)
    return torch.where(total > 0, phase, torch.ones_like(phase))


def visible(query: Tensor, key: Tensor) -> Tensor:
    """Return whether queries of a phase see keys of a phase (bool, shapes broadcast); the causal mask comes on top.

    >>> import torch
    >>> phase = phases(torch.tensor([[False, True, False]]))
    >>> visible(phase.unsqueeze(2), phase.unsqueeze(1)).int().tolist()
    [[[1, 1, 0], [1, 1, 0], [0, 1, 1]]]
    """
    return ((query <= 1) & (key <= 1)) | ((query > 1) & (key >= 1))
