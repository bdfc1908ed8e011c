"""TokenLearner: a few tokens, each a learned spatial average of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TokenLearner"]

_NORM, _MLP = "LayerNorm_0", "token_masking"
_MASKED = -3.0e4
"""The score of padding: inside float16's range, and exp(-30000) is zero in every dtype."""


@register("token_learner")
class TokenLearner(Method):
    """TokenLearner V1.1, learned attention maps over the visual tokens.

    Paper: "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021, arXiv:2106.11297.

    With x the visual tokens: `s = W2 gelu(W1 layer_norm(x, eps 1e-6) + b1) + b2`, gelu in its tanh form; `y_t = sum over i of
    softmax over i (s_it) x_i`. There is no shortcut and no projection: a learned token is an average of x itself.

    Shapes (b batch, n visual candidates, k learned tokens, c channels): tokens `[b, n, c]` -> `[b, k, c]`, the scores and averages in
    float32. Class tokens pass unchanged, before the learned ones. `mix` holds the weights of the averages; a learned token is synthetic
    (source -1).

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = TokenLearner.Config(tokens=8)
    >>> stage, tokens, context = context_for(TokenLearner, config, "encoder", seed=0)
    >>> TokenLearner.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (9, 65)

    Limits: learned tokens form no raster. Padding has the weight zero; the learned tokens of a picture that is all padding are padding.

    Where the official code differs: this is `TokenLearnerModuleV11`, which its authors recommend; the paper's own module (four 3x3
    convolutions, sigmoid, a sum) is `TokenLearnerModule`. The official code is JAX: kernels are `[in, out]`, and names join with a slash
    there and with a dot here. It has no class token; in a vision transformer of it the module stands between two layers, here
    `encoder.<l>`.
    """

    paper = "TokenLearner, NeurIPS 2021, arXiv:2106.11297"
    official = "google-research/scenic@03c3032 scenic/projects/token_learner/model.py:TokenLearnerModuleV11"
    mechanism = "query"
    sites = ("encoder", "encoder.<l>", "projector")
    training_free = False

    samples = (
        Sample("encoder", {"tokens": 8}, too_much={"tokens": 65}),
        Sample("projector", {"tokens": 5, "bottleneck": 12, "channels": 96}, too_much={"tokens": 65}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            tokens: learned tokens that leave.
            bottleneck: channels inside the MLP.
            channels: channels of the tokens that arrive; the encoder's width when left out, the decoder's must be written at `projector`.
        """

        tokens: int = Field(default=8, ge=1)
        bottleneck: int = Field(default=64, ge=1)
        channels: int | None = Field(default=None, ge=1)

    @staticmethod
    def stages(at: Site, config: TokenLearner.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("token_learner", at, "encoder", "projector")
        need_raster_encoder("token_learner", at, facts)
        width = facts.decoder.width if at.part == "projector" else facts.encoder.width
        if _channels(config, facts) != width:
            raise ValueError(
                f"token_learner at {at} gets tokens of {width} channels, and its weights are for {_channels(config, facts)}; "
                f"write channels: {width}"
            )
        return (Stage(at),)

    @staticmethod
    def weights(config: TokenLearner.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of the module's parameters; kernels are `[in, out]`."""
        c, inner, k = _channels(config, facts), config.bottleneck, config.tokens
        return {
            f"{_NORM}.scale": (c,),
            f"{_NORM}.bias": (c,),
            f"{_MLP}.Dense_0.kernel": (c, inner),
            f"{_MLP}.Dense_0.bias": (inner,),
            f"{_MLP}.Dense_1.kernel": (inner, k),
            f"{_MLP}.Dense_1.bias": (k,),
        }

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: TokenLearner.Config, facts: ModelFacts) -> Layout:
        """The class tokens and the learned ones."""
        visual = layout.tokens - layout.class_tokens
        if config.tokens > visual:
            raise ValueError(f"tokens: {config.tokens} is more than the {visual} visual tokens that arrive at {stage.at}; lower it")
        kept = tuple(segment for segment in layout.segments if segment.kind == "class")
        return Layout((*kept, Segment("visual", config.tokens)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: TokenLearner.Config) -> Compressed:
        """Average the visual tokens by learned maps; class tokens pass."""
        import torch
        from torch.nn import functional

        TokenLearner.layout(stage, context.layout, config, context.facts)
        first, b, n = context.layout.class_tokens, tokens.shape[0], tokens.shape[1]
        visual, valid = tokens[:, first:], context.valid[:, first:]
        scores = _scores(visual, context.weights).float().transpose(1, 2)
        share = torch.where(valid.unsqueeze(1), scores, torch.full_like(scores, _MASKED)).softmax(dim=2)
        learned = (share @ visual.float()).to(tokens.dtype)
        source = torch.full((b, config.tokens), -1)
        some = valid.any(dim=1, keepdim=True).expand(-1, config.tokens)
        if not first:
            return Compressed(learned, source, some, mix=share)
        head = torch.arange(first).expand(b, -1)
        return Compressed(
            torch.cat([tokens[:, :first], learned], dim=1),
            torch.cat([head, source], dim=1),
            torch.cat([context.valid[:, :first], some], dim=1),
            mix=torch.cat([torch.eye(first, n).expand(b, -1, -1), functional.pad(share, (first, 0))], dim=1),
        )


def _channels(config: TokenLearner.Config, facts: ModelFacts) -> int:
    """Channels the weights are for."""
    return facts.encoder.width if config.channels is None else config.channels


def _scores(visual: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Score every visual token for every learned one: `[b, n, c]` to `[b, n, k]`."""
    from torch.nn import functional

    normed = functional.layer_norm(visual, visual.shape[-1:], weights[f"{_NORM}.scale"], weights[f"{_NORM}.bias"], 1e-6)
    inner = normed @ weights[f"{_MLP}.Dense_0.kernel"] + weights[f"{_MLP}.Dense_0.bias"]
    return functional.gelu(inner, approximate="tanh") @ weights[f"{_MLP}.Dense_1.kernel"] + weights[f"{_MLP}.Dense_1.bias"]
