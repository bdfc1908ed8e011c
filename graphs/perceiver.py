"""Flamingo's perceiver resampler: latents that attend to the picture and to themselves, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import (
    Shapes,
    attend,
    need_fewer,
    queries_of,
    summaries,
)
from tmc_export.graphs._checks import need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._projector import dense, dense_shapes, layer_norm, norm_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Perceiver"]

_EPS = 1e-5


@register("perceiver")
class Perceiver(Method):
    """Perceiver resampler, learned latents refined by attention to the picture and to themselves.

    Paper: "Flamingo: a Visual Language Model for Few-Shot Learning", NeurIPS 2022, arXiv:2204.14198; IDEFICS (2023) uses the same module.

    With x the picture's tokens, l the latents, LN layer norms (eps 1e-5), and in each of `depth` layers:

    - `l = l + Wo attention(Wq LN(l), Wkv [LN'(x), LN(l)])`: the latents are keys too, and x is normed anew in each layer;
    - `l = l + W2 gelu(W1 LN''(l))`;

    at the end `LN(l)`, and where the decoder is wider or narrower than the encoder one linear layer to its width. Queries are scaled by
    `dim_head^(-1/2)`; of all linear layers only the last has a bias.

    Shapes (b batch, n candidates, k latents, c encoder width, d decoder width): tokens `[b, n, c]` -> `[b, k, c]` -> `[b, k, d]`. All
    tokens are synthetic.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Perceiver.Config(latents=8, depth=2, heads=4, dim_head=8)
    >>> stage, tokens, context = context_for(Perceiver, config, "projector.replace", seed=0)
    >>> Perceiver.apply(stage, tokens, context, config).tokens.shape[1:]
    torch.Size([8, 96])

    Limits: learned weights: `latents`, `layers.*` and `norm.*` as in the official `PerceiverResampler`, and `proj.*`, which is this
    library's. It takes the projector's place, so the model's own projector is not built.

    Where the official code differs: Flamingo hands the latents to gated cross-attention inside the decoder; here they are tokens of the
    prompt, as in IDEFICS2, hence the linear layer. Embeddings of frame and picture (`frame_embs`, `media_time_embs`) are not added: the
    released models have none. IDEFICS norms each head's queries and keys as well, which is left out.
    """

    paper = "Flamingo, NeurIPS 2022, arXiv:2204.14198"
    official = "mlfoundations/open_flamingo@655f693 open_flamingo/src/helpers.py:PerceiverResampler"
    mechanism = "query"
    sites = ("projector.replace",)
    training_free = False

    samples = (Sample("projector.replace", {"latents": 8, "depth": 2, "heads": 4, "dim_head": 8}, too_much={"latents": 66}),)

    class Config(MethodConfig):
        """Options; the defaults are open_flamingo's.

        Attributes:
            latents: learned latents, the tokens that leave.
            depth: layers.
            heads: attention heads.
            dim_head: channels of a head.
            ff_mult: how many times wider the feed-forward part is.
        """

        latents: int = Field(default=64, ge=1)
        depth: int = Field(default=6, ge=1)
        heads: int = Field(default=8, ge=1)
        dim_head: int = Field(default=64, ge=1)
        ff_mult: int = Field(default=4, ge=1)

    @staticmethod
    def stages(at: Site, config: Perceiver.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("perceiver", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: Perceiver.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The latents, the layers, the last norm, and the projection where it is needed."""
        c, inner = facts.encoder.width, config.heads * config.dim_head
        found: Shapes = {"latents": (config.latents, c)}
        for i in range(config.depth):
            attention, forward = f"layers.{i}.0", f"layers.{i}.1"
            found |= norm_shapes(f"{attention}.norm_media", c) | norm_shapes(f"{attention}.norm_latents", c)
            found |= dense_shapes(f"{attention}.to_q", c, inner, bias=False)
            found |= dense_shapes(f"{attention}.to_kv", c, 2 * inner, bias=False)
            found |= dense_shapes(f"{attention}.to_out", inner, c, bias=False)
            found |= norm_shapes(f"{forward}.0", c)
            found |= dense_shapes(f"{forward}.1", c, c * config.ff_mult, bias=False)
            found |= dense_shapes(f"{forward}.3", c * config.ff_mult, c, bias=False)
        found |= norm_shapes("norm", c)
        return found if c == facts.decoder.width else found | dense_shapes("proj", c, facts.decoder.width)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Perceiver.Config, facts: ModelFacts) -> Layout:
        """The latents."""
        need_fewer("perceiver", f"latents: {config.latents}", config.latents, layout.tokens, stage.at)
        return Layout((Segment("visual", config.latents),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Perceiver.Config) -> Compressed:
        """Refine the latents."""
        import torch
        from torch.nn import functional

        weights = context.weights
        latents = queries_of(weights["latents"], tokens)
        visible = torch.cat([context.valid, torch.ones_like(latents[:, :, 0], dtype=torch.bool)], dim=1)
        for i in range(config.depth):
            latents = latents + _attention(tokens, latents, visible, weights, f"layers.{i}.0", config)
            inner = dense(layer_norm(latents, weights, f"layers.{i}.1.0", _EPS), weights, f"layers.{i}.1.1")
            latents = latents + dense(functional.gelu(inner), weights, f"layers.{i}.1.3")
        latents = layer_norm(latents, weights, "norm", _EPS)
        return summaries(dense(latents, weights, "proj") if "proj.weight" in weights else latents, context.valid)


def _attention(
    tokens: Tensor, latents: Tensor, visible: Tensor, weights: Mapping[str, Tensor], name: str, config: Perceiver.Config
) -> Tensor:
    """Attend with the latents `[b, k, c]` to the picture and to themselves; `visible` bool `[b, n + k]`."""
    import torch

    media = layer_norm(tokens, weights, f"{name}.norm_media", _EPS)
    normed = layer_norm(latents, weights, f"{name}.norm_latents", _EPS)
    key, value = dense(torch.cat([media, normed], dim=1), weights, f"{name}.to_kv").chunk(2, dim=2)
    return dense(attend(dense(normed, weights, f"{name}.to_q"), key, value, config.heads, visible)[0], weights, f"{name}.to_out")
