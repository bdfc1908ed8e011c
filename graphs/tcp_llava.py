"""TCP-LLaVA: compression tokens that gather picture and question before the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage, TextEmbeds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TcpLlava"]

_TEXT = TextEmbeds()


@register("tcp_llava")
class TcpLlava(Method):
    """TCP-LLaVA, compression tokens that take the picture's place after reading picture and question.

    Paper: "Efficient Whole Slide Pathology VQA via Token Compression", arXiv:2507.14497. Built from the paper; no official code is known.

    With V the projected visual tokens, T the text embeddings and C learned compression tokens, `S_0 = [C, V, T]`; for each of `layers`
    layers, as in BERT, attention in both directions and layer norms after the residual (eps 1e-12):

    - `S = LN(self-attention(S) + S)`,
    - `S = LN(W2 gelu(W1 S) + S)`;

    the rows of C leave, like BERT's class token, and V is dropped.

    Shapes (b batch, n visual tokens, m text tokens, k compression tokens, d decoder width): tokens `[b, n, d]` and text `[b, m, d]` ->
    `[b, k, d]`. The k tokens take the places of the first k candidates, and positions are renumbered.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = TcpLlava.Config(tokens=8, layers=1, heads=4, intermediate=64)
    >>> stage, tokens, context = context_for(TcpLlava, config, "decoder.0", seed=0)
    >>> TcpLlava.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (8, 64)

    Limits: learned weights, under names of this library. In a later turn the tokens stay what the first question made of the picture.

    Where the official code differs: there is none. The paper says that trainable tokens aggregate visual and textual information in a
    module inspired by BERT's class token and that only they go on to the decoder. Assumed here: the module works at the decoder's width on
    tokens as they are (no positions or types of its own), its last layer is not special, its sizes (the defaults), and that the prompt's
    text goes on unchanged, because the decoder's chat template needs it.
    """

    paper = "Efficient Whole Slide Pathology VQA via Token Compression, arXiv:2507.14497"
    official = "paper only"
    mechanism = "query"
    sites = ("decoder.<k>",)
    query_aware = True
    training_free = False

    samples = (Sample("decoder.0", {"tokens": 8, "layers": 2, "heads": 4, "intermediate": 64}, too_much={"tokens": 65}),)

    class Config(MethodConfig):
        """Options.

        Attributes:
            tokens: compression tokens for each picture, the tokens that stay.
            layers: layers of the module.
            heads: attention heads.
            intermediate: channels inside its feed-forward part.
        """

        tokens: int = Field(default=64, ge=1)
        layers: int = Field(default=2, ge=1)
        heads: int = Field(default=8, ge=1)
        intermediate: int = Field(default=3072, ge=1)

    @staticmethod
    def stages(at: Site, config: TcpLlava.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, on the assembled embeddings."""
        need_site("tcp_llava", at, "decoder")
        if at.layer != 0:
            raise ValueError(f"tcp_llava works on the embeddings and not at {at}; write at: decoder.0")
        need_divisible("tcp_llava", "the decoder's width", facts.decoder.width, config.heads)
        return (Stage(at, (_TEXT,)),)

    @staticmethod
    def weights(config: TcpLlava.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The compression tokens and the module."""
        d = facts.decoder.width
        found: Shapes = {"compression_tokens": (config.tokens, d)}
        for i in range(config.layers):
            layer = f"layers.{i}"
            found |= bert_attention_weights(f"{layer}.attention", d)
            found |= bert_feed_forward_weights(f"{layer}.intermediate", f"{layer}.output", d, config.intermediate)
        return found

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: TcpLlava.Config, facts: ModelFacts) -> Layout:
        """The compression tokens."""
        need_fewer("tcp_llava", f"tokens: {config.tokens}", config.tokens, layout.tokens, stage.at)
        return replace(layout, segments=(Segment("visual", config.tokens),), positions="renumber")

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: TcpLlava.Config) -> Compressed:
        """Let the compression tokens read picture and text."""
        import torch

        if context.text is None or context.text_valid is None:
            raise ValueError("tcp_llava at decoder.0 got no text embeddings (0 of 1 need met); capture TextEmbeds")
        k, weights = config.tokens, context.weights
        s = torch.cat([queries_of(weights["compression_tokens"], tokens), tokens, context.text], dim=1)
        always = torch.ones_like(s[:, :k, 0], dtype=torch.bool)
        visible = torch.cat([always, context.valid, context.text_valid], dim=1)
        for i in range(config.layers):
            s = bert_attention(s, s, weights, f"layers.{i}.attention", config.heads, visible)
            s = bert_feed_forward(s, weights, f"layers.{i}.intermediate", f"layers.{i}.output")
        places = torch.arange(k).unsqueeze(0).expand(tokens.shape[0], -1)
        return replace(summaries(s[:, :k], context.valid), source=places.contiguous())
