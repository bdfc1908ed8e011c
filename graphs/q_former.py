"""Q-Former: learned queries in a BERT that looks at the picture in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import (
    Shapes,
    bert_attention,
    bert_attention_weights,
    bert_feed_forward,
    bert_feed_forward_weights,
    need_divisible,
    need_fewer,
    queries_of,
    summaries,
)
from tmc_export.graphs._checks import need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._projector import dense, dense_shapes, layer_norm, norm_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QFormer", "query_outputs"]

_SMALL = {"queries": 8, "width": 24, "layers": 3, "heads": 4, "intermediate": 48}


@register("q_former")
class QFormer(Method):
    """Q-Former, a BERT over learned queries that attends to the picture; its outputs, projected, are the visual tokens.

    Paper: "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models", ICML 2023,
    arXiv:2301.12597. MiniGPT-4 and InstructBLIP use the same module.

    With x the picture's tokens and q the learned queries, `h_0 = LN(q)`, and for each layer i:

    - `h = LN(self-attention(h) + h)`;
    - where i divides by `cross_attention_frequency`: `h = LN(attention(h, x) + h)`;
    - `h = LN(W2 gelu(W1 h) + h)`,

    each sublayer ending in a linear layer of its own; layer norms after the residual, eps 1e-12, gelu exact. The tokens are
    `language_projection(h)`.

    Shapes (b batch, n candidates, k queries, c encoder width, w the module's width, d decoder width): tokens `[b, n, c]` -> `[b, k, w]` ->
    `[b, k, d]`. All tokens are synthetic.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = QFormer.Config(queries=8, width=24, layers=2, heads=4, intermediate=48)
    >>> stage, tokens, context = context_for(QFormer, config, "projector.replace", seed=0)
    >>> QFormer.apply(stage, tokens, context, config).tokens.shape[1:]
    torch.Size([8, 96])

    Limits: learned weights: `query_tokens`, `qformer.*` and `language_projection.*` as in Hugging Face's `Blip2ForConditionalGeneration`.
    It takes the projector's place, so the model's own projector is not built.

    Where the official code differs: BLIP-2's picture tokens include the class token, which the site does not hand on, and the encoder's
    last layer norm, which belongs to the encoder. InstructBLIP also puts the question into the same BERT; this is the part without text.
    """

    paper = "BLIP-2, ICML 2023, arXiv:2301.12597"
    official = "huggingface/transformers@v5.23.0 models/blip_2/modeling_blip_2.py:Blip2QFormerModel (port of salesforce/LAVIS)"
    mechanism = "query"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", _SMALL, too_much={"queries": 66}),
        Sample("projector.replace", {**_SMALL, "layers": 2, "cross_attention_frequency": 1}, too_much={"queries": 66}),
    )

    class Config(MethodConfig):
        """Options; the defaults are BLIP-2's.

        Attributes:
            queries: learned queries, the tokens that leave.
            width: channels inside the module.
            layers: BERT layers.
            heads: attention heads.
            intermediate: channels inside the feed-forward part.
            cross_attention_frequency: every how many layers, from the first on, the picture is attended to.
        """

        queries: int = Field(default=32, ge=1)
        width: int = Field(default=768, ge=1)
        layers: int = Field(default=12, ge=1)
        heads: int = Field(default=12, ge=1)
        intermediate: int = Field(default=3072, ge=1)
        cross_attention_frequency: int = Field(default=2, ge=1)

    @staticmethod
    def stages(at: Site, config: QFormer.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("q_former", at, "projector.replace")
        need_divisible("q_former", "width:", config.width, config.heads)
        return (Stage(at),)

    @staticmethod
    def weights(config: QFormer.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The queries, the module and the projection to the decoder."""
        w = config.width
        found: Shapes = {"query_tokens": (1, config.queries, w)} | norm_shapes("qformer.layernorm", w)
        for i in range(config.layers):
            layer = f"qformer.encoder.layer.{i}"
            found |= bert_attention_weights(f"{layer}.attention", w)
            if i % config.cross_attention_frequency == 0:
                found |= bert_attention_weights(f"{layer}.crossattention", w, facts.encoder.width)
            found |= bert_feed_forward_weights(f"{layer}.intermediate_query", f"{layer}.output_query", w, config.intermediate)
        return found | dense_shapes("language_projection", w, facts.decoder.width)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: QFormer.Config, facts: ModelFacts) -> Layout:
        """The queries."""
        need_fewer("q_former", f"queries: {config.queries}", config.queries, layout.tokens, stage.at)
        return Layout((Segment("visual", config.queries),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: QFormer.Config) -> Compressed:
        """Run the queries through the module and project them."""
        h = query_outputs(tokens, context.valid, context.weights, config)
        return summaries(dense(h, context.weights, "language_projection"), context.valid)


def query_outputs(tokens: Tensor, valid: Tensor, weights: Mapping[str, Tensor], config: QFormer.Config) -> Tensor:
    """Return the module's outputs `[b, k, w]` before the projection."""
    h = layer_norm(queries_of(weights["query_tokens"], tokens), weights, "qformer.layernorm", 1e-12)
    for i in range(config.layers):
        layer = f"qformer.encoder.layer.{i}"
        h = bert_attention(h, h, weights, f"{layer}.attention", config.heads)
        if i % config.cross_attention_frequency == 0:
            h = bert_attention(h, tokens, weights, f"{layer}.crossattention", config.heads, valid)
        h = bert_feed_forward(h, weights, f"{layer}.intermediate_query", f"{layer}.output_query")
    return h
