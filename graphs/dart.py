"""DART: a few pivots, and the tokens that repeat them least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage, TextEmbeds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dart"]

_TEXT = TextEmbeds()
_EPS = 1.0e-8
_PADDING = -10.0
_RETAINED = -20.0


@register("dart")
class Dart(Method):
    """DART, duplication-aware reduction of tokens, as NVIDIA's TensorRT-Edge-LLM ships it: on the decoder's inputs.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv:2502.11494.

    k = ceil(n * keep). Pivots: the `min(pivot_image, k)` candidates with the largest `|x|_1`, then the `pivot_text` text tokens with
    the largest `|t|_1`, each in falling order; the image pivots are retained. Then pivot by pivot, with m tokens still to be
    retained and p pivots left, this one included: the `ceil(m / p)` candidates not yet retained with the smallest
    `x . pivot / max(|x| |pivot|, 1e-8)` are retained. They stay in their order.

    Shapes (b batch, n candidates, k kept, m text tokens, c channels): tokens `[b, n, c]` -> `[b, k, c]`; norms and cosines `[b, n]` in
    float32. Positions are kept.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Dart.Config(keep="50%")
    >>> stage, tokens, context = context_for(Dart, config, "decoder.0", seed=0)
    >>> Dart.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (32, 64)

    Limits: at `projector` there is no text, so `pivot_text: 0`. A prompt with fewer text tokens than text pivots uses the first of them
    again. Padding is retained when nothing else is left and is no pivot before that.

    Where the official code differs: the paper's own code acts after decoder layer 2, takes its pivots by the keys of that layer and
    retains `k // pivots` tokens for each, so that its count misses k; TensorRT-Edge-LLM cannot see inside its engine, works on the inputs
    and shares k out exactly: this is the latter. With fewer text tokens than text pivots it has fewer pivots. It leaves pictures of fewer
    than 16 tokens alone. Every picture has its own share there as here (`scope: image`). Ties go to the lowest index there and here.
    """

    paper = "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, EMNLP 2025, arXiv:2502.11494"
    official = "NVIDIA/TensorRT-Edge-LLM 0.11 cpp/runtime/preprocess/dartPruner.cpp:DartPruner::selectRetainedImageTokens, growSpanGreedily"
    mechanism = "similarity"
    sites = ("decoder.0", "projector")
    query_aware = True

    samples = (
        Sample("decoder.0", {"keep": "40%"}),
        Sample("decoder.0", {"keep": 3}),
        Sample("projector", {"keep": 33, "pivot_text": 0, "pivot_image": 5}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay (rounded up).
            pivot_image: visual pivots.
            pivot_text: text pivots; 0 at the projector.
        """

        keep: Budget = Budget(share=0.75)
        pivot_image: int = Field(default=4, ge=0)
        pivot_text: int = Field(default=4, ge=0)

        @model_validator(mode="after")
        def _some(self) -> Dart.Config:
            if self.pivot_image + self.pivot_text < 1:
                raise ValueError("pivot_image: 0 and pivot_text: 0 leave no pivot; set at least one to 1")
            return self

    @staticmethod
    def stages(at: Site, config: Dart.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, on the decoder's inputs or before them."""
        need_site("dart", at, "decoder", "projector")
        if at.part == "decoder" and at.layer != 0:
            raise ValueError(f"dart compares the decoder's inputs with the prompt's, not at {at}; write at: decoder.0")
        if at.part == "projector" and config.pivot_text:
            asked = f"pivot_text: {config.pivot_text} needs text"
            raise ValueError(f"{asked}, which is not known at {at}; set pivot_text: 0, or use at: decoder.0")
        return (Stage(at, (_TEXT,) if config.pivot_text else ()),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Dart.Config, facts: ModelFacts) -> Layout:
        """`ceil(n * keep)` tokens, positions kept."""
        return selected(layout, kept_of(config.keep, layout.tokens, stage.at, "ceil"))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Dart.Config) -> Compressed:
        """Retain the pivots and what repeats them least."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top, one_hot, partition

        n, valid = tokens.shape[1], context.valid
        k = Dart.layout(stage, context.layout, config, context.facts).tokens
        x = tokens.float()
        first = min(config.pivot_image, k)
        own = _largest(x, first, valid)
        pivots = gather(x, own)
        if config.pivot_text and context.text is not None and context.text_valid is not None:
            text = context.text.float()
            pivots = torch.cat([pivots, gather(text, _largest(text, config.pivot_text, context.text_valid))], dim=1)
        norms = (x * x).sum(dim=2).sqrt().unsqueeze(1) * (pivots * pivots).sum(dim=2).sqrt().unsqueeze(2)
        apart = -(pivots @ x.transpose(1, 2)) / norms.clamp_min(_EPS)
        apart = torch.where(valid.unsqueeze(1), apart, torch.full_like(apart, _PADDING))
        retained = one_hot(own, n).sum(dim=1) > 0
        left, count = k - first, pivots.shape[1]
        for row in range(count):
            share = -(-left // (count - row))
            if share:
                score = torch.where(retained, torch.full_like(apart[:, row], _RETAINED), apart[:, row])
                retained = retained | (one_hot(keep_top(score, share)[0], n).sum(dim=1) > 0)
                left -= share
        kept, _ = partition(retained, k)
        return Compressed(gather(tokens, kept), kept, gather(valid, kept))


def _largest(x: Tensor, count: int, valid: Tensor) -> Tensor:
    """Return the `count` rows `[b, count]` of x `[b, n, c]` with the largest absolute sum, in falling order; the first again for padding.

    With fewer rows than `count`, the first again as well.
    """
    import torch

    from tmc_export.graphs._ops import gather, top_in_order

    found = min(count, x.shape[1])
    order = top_in_order(x.abs().sum(dim=2), found, valid)
    again = order[:, :1].expand(-1, count)
    return torch.cat([torch.where(gather(valid, order), order, again[:, :found]), again[:, found:]], dim=1)
