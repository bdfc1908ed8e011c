"""FitPrune: delete a fitted number of visual tokens in every decoder layer, by self-attention times cross-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_site, selected
from tmc_export.graphs._contract import Attention, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FitPrune", "score"]

_SELF = Attention(layer="previous", rows="visual", heads="max", row_sum=True)
_CROSS = Attention(layer="previous", rows="text", heads="max", row_sum=True)


@register("fitprune")
class FitPrune(Method):
    """FitPrune, a table of deletions per layer.

    Paper: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025,
    arXiv:2409.10197.

    In layer l, with A the largest attention over its heads, V the n candidates and T the text tokens:
    `score_i = (sum over v in V of A[v, i] / n) * (sum over t in T of A[t, i])`; the `delete[l]` candidates of the smallest score go.
    The paper cuts the attention's output before the feed-forward; the feed-forward acts on each token by itself, so this is the cut after
    the layer, `decoder.<l+1>`: keys and values of layer l hold all its tokens either way.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, n - delete[l], c]` per stage; sums and score `[b, n]` in
    float32. Positions are kept. The KV of layer l holds what arrived at it.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = FitPrune.Config(delete=(0, 16, 0, 8))
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(FitPrune, config, "decoder.2")]
    [('decoder.2', 64), ('decoder.4', 48)]

    Limits: `delete` is a table for one model and one number of tokens. It is fitted on a few prompts: per layer, self- and
    cross-attention are cut at the same share of their mass, which a bisection sets to meet a budget of FLOPs. Sums over all visual rows
    need the whole attention map of a layer, computed in blocks.

    Where the official code differs: its fitting deletes what both sums find small, each with its own threshold, and its inference what
    the product finds small; only the latter is built here. It reads text tokens behind the picture only; those before it see no visual
    token and add nothing. It takes one picture at 35; here every picture has its own choice. Of equal scores the lowest index goes first.
    """

    paper = "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models, AAAI 2025, arXiv:2409.10197"
    official = "ywh187/FitPrune@d28e418 LLaVA_1.5/llava/model/language_model/modeling_llama.py:LlamaAttention.forward"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True

    samples = (
        Sample("decoder.2", {"delete": (0, 24, 0, 16, 3)}, too_much={"delete": (0, 65, 0, 65, 65)}),
        Sample("decoder.1", {"delete": (63,)}, too_much={"delete": (64,)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            delete: visual tokens deleted in each decoder layer, from layer 0 on; zeros at the end may be left out. `tmc-export fit` is to
                write it; the published tables are for 32 layers and 576 tokens.
        """

        delete: tuple[int, ...] = ()

        @field_validator("delete")
        @classmethod
        def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if min(value, default=0) < 0:
                raise ValueError(f"delete counts tokens per layer, at least 0; got {list(value)}")
            return value

    @staticmethod
    def stages(at: Site, config: FitPrune.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut behind every layer that deletes."""
        need_site("fitprune", at, "decoder")
        depth = facts.decoder.layers
        layers = [layer for layer, count in enumerate(config.delete) if count]
        if not layers:
            raise ValueError(
                f"delete: {list(config.delete)} removes nothing; give the tokens to delete in each layer from layer 0 on, such as "
                "delete: [0, 64, 0, 32]"
            )
        if layers[-1] >= depth - 1:
            raise ValueError(
                f"delete: {config.delete[layers[-1]]} tokens in layer {layers[-1]}, and {facts.architecture} has {depth} decoder layers; "
                f"the last layer that can delete is {depth - 2}, because no later one would see the difference"
            )
        if at.layer != layers[0] + 1:
            raise ValueError(
                f"delete: {list(config.delete)} begins in layer {layers[0]}, which is cut at decoder.{layers[0] + 1}, not at {at}; "
                f"write at: decoder.{layers[0] + 1}"
            )
        return tuple(Stage(Site("decoder", layer + 1), (_SELF, _CROSS), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FitPrune.Config, facts: ModelFacts) -> Layout:
        """`n - delete[l]` tokens, positions kept."""
        layer = (stage.at.layer or 0) - 1
        count = config.delete[layer]
        if count >= layout.tokens:
            raise ValueError(
                f"delete: {count} tokens in layer {layer} leave none of the {layout.tokens} that arrive at {stage.at}; lower it to at most "
                f"{layout.tokens - 1}, or use vtw to withdraw all"
            )
        return selected(layout, layout.tokens - count)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FitPrune.Config) -> Compressed:
        """Delete the candidates of the smallest score; padding goes first."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top

        count = tokens.shape[1] - FitPrune.layout(stage, context.layout, config, context.facts).tokens
        small = -score(context)
        _, kept = keep_top(torch.where(context.valid, small, torch.full_like(small, 1.0)), count)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


def score(context: Context) -> Tensor:
    """Return the product `[b, n]` of mean self-attention and summed cross-attention; at least 0."""
    own = context.captured[_SELF].float() / context.valid.shape[1]
    return own * context.captured[_CROSS].float()
