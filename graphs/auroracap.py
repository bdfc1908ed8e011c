"""AuroraCap: ToMe in every encoder layer, by one share for the whole encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_raster_encoder, need_site
from tmc_export.graphs._contract import Budget, Compressed, Context, Keys, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AuroraCap"]

_KEYS = Keys()


@register("auroracap")
class AuroraCap(Method):
    """AuroraCap, token merging in every layer of the encoder.

    Paper: "AuroraCap: Efficient, Performant Video Detailed Captioning and a New Benchmark", ICLR 2025, arXiv:2410.03051.

    Every layer merges `r = int(N * (1 - keep) / L)` pairs between attention and feed-forward, N patches of the picture, L layers: even
    tokens with odd ones by the cosine of their keys averaged over heads, `x = sum(size * x) / sum(size)`, as ToMe does. Token 0 never
    merges into another.

    Shapes (b batch, n candidates, c channels): tokens `[b, n, c]` -> `[b, n-r, c]` per layer; state `size` `[b, n-r]` float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = AuroraCap.Config(keep="50%")
    >>> stage, tokens, context = context_for(AuroraCap, config, "encoder", index=1, seed=0)
    >>> AuroraCap.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (49, 57)

    Limits: the rounding of r leaves up to L - 1 tokens more than `keep` says. Not in order, and no raster, afterwards. The model was
    trained with it.

    Where the official code differs: it protects token 0 also in an encoder without a class token (SigLIP), and so does this: patch 0 is
    then never merged. It means to add log(size) to the attention, but adds it per query row, which softmax cancels: no key bias here.
    It divides by all layers of the checkpoint, also those behind the features in use (`depth`). It lowers an r that a layer cannot
    merge without a word; here that is refused.
    """

    paper = "AuroraCap, ICLR 2025, arXiv:2410.03051"
    official = "rese1f/aurora@27f6530 src/xtuner/xtuner/model/aurora.py:AuroraEncoder, AuroraCLIPEncoderLayer; tome.py"
    mechanism = "similarity"
    sites = ("encoder",)

    samples = (Sample("encoder", {"keep": "50%"}), Sample("encoder", {"keep": 20, "depth": 5}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the patches that stay, at least, after the last layer.
            depth: layers that the share is divided over; those that run when left out.
        """

        keep: Budget = Budget(share=0.5)
        depth: int | None = Field(default=None, ge=1)

    @staticmethod
    def stages(at: Site, config: AuroraCap.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut in every layer that runs."""
        need_site("auroracap", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"auroracap merges in every encoder layer, not at {at} alone; write at: encoder, or use tome at {at}.mid")
        need_raster_encoder("auroracap", at, facts)
        if facts.encoder.class_tokens > 1:
            raise ValueError(
                f"auroracap protects one token, and {facts.architecture} has {facts.encoder.class_tokens} class tokens; use at: projector "
                "methods"
            )
        return tuple(Stage(Site("encoder", layer, "mid"), (_KEYS,), layer, tied=layer > 0) for layer in range(facts.encoder.layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: AuroraCap.Config, facts: ModelFacts) -> Layout:
        """`n - r` tokens, class token first."""
        first, patches = layout.class_tokens, facts.encoder.grid[0] * facts.encoder.grid[1]
        r = _pairs(config, facts)
        kept = config.keep.tokens or 0
        if r < 0 or kept > layout.tokens - first:
            raise ValueError(
                f"keep: {config.keep} is more than the {min(patches, layout.tokens - first)} patches that arrive at {stage.at}; lower keep"
            )
        most = (layout.tokens - 1) // 2
        if r > most:
            raise ValueError(
                f"keep: {config.keep} merges {r} pairs in every layer, more than the {most} among the {layout.tokens} tokens that arrive "
                f"at {stage.at}; raise keep"
            )
        if r == 0:
            return layout
        visual = Segment("visual", layout.tokens - first - r)
        return Layout((Segment("class", first), visual) if first else (visual,), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: AuroraCap.Config) -> Compressed:
        """Merge the r most similar pairs."""
        import torch

        from tmc_export.graphs._bipartite import match_pairs, merge_pairs

        size = context.state.get("size")
        size = context.valid.float() if size is None else size.float()
        n, b = tokens.shape[1], tokens.shape[0]
        r = n - AuroraCap.layout(stage, context.layout, config, context.facts).tokens
        if r == 0:
            return Compressed(tokens, torch.arange(n).expand(b, n).contiguous(), context.valid, state={"size": size})
        metric = context.captured[_KEYS].float().mean(dim=2)
        out = merge_pairs(tokens, size, match_pairs(metric, r, context.valid, protect=True), context.valid)
        return Compressed(out.tokens, out.source, out.valid, assign=out.assign, mix=out.mix, state=out.state)


def _pairs(config: AuroraCap.Config, facts: ModelFacts) -> int:
    """Return r of every layer; negative when more than all patches are to stay."""
    patches = facts.encoder.grid[0] * facts.encoder.grid[1]
    depth = config.depth if config.depth is not None else facts.encoder.layers
    if config.keep.tokens is not None:
        return (patches - config.keep.tokens) // depth
    return int(patches * (1 - (config.keep.share or 0.0)) / depth)
