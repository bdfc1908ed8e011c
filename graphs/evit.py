"""EViT: inside the encoder, keep the patches the class token attends to most and fuse the others into one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_raster_encoder, need_site
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage
from tmc_export.graphs._depth import layers_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EViT"]

_SCORE = Attention(layer="previous", rows="cls", heads="mean")


@register("evit")
class EViT(Method):
    """EViT, token reorganisation between attention and feed-forward of a few encoder layers.

    Paper: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022, arXiv:2202.07800.

    In each of `layers`, with a the class token's attention of that layer, averaged over heads, and N the tokens that arrive besides the
    class token: the `ceil(keep * N)` of the largest a stay, in falling order; with `fuse`, one token `sum over the dropped of a_j x_j`
    (not normalised) follows them. Where nothing is dropped nothing is fused.

    Shapes (b batch, n candidates of which the first is the class token, k kept, c channels): tokens `[b, n, c]` -> `[b, 1 + k + 1, c]`
    (without `fuse` `[b, 1 + k, c]`); a `[b, n]` in float32. The fused token is a candidate of the next cut. `assign` and `mix` say what
    was fused.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = EViT.Config(keep="50%", layers=(1, 2))
    >>> [tokens.shape[1] for _, tokens, _ in contexts(EViT, config, "encoder")]
    [65, 34]

    Limits: needs one class token. The tokens are no raster afterwards and not in the order of the picture. The official weights were tuned
    with it; on an encoder that was not, it is used as it is.

    Where the official code differs: it may count in tokens for its progressive training; here `keep` takes both forms. Padding is kept last
    and weighs nothing in the fused token. Ties go to the lowest index.
    """

    paper = "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022, arXiv:2202.07800"
    official = "youweiliang/evit@5ca95a7 evit.py:Attention.forward, Block.forward"
    mechanism = "attention"
    sites = ("encoder", "encoder.<l>.mid")

    samples = (
        Sample("encoder", {"layers": (1, 3)}),
        Sample("encoder.1.mid", {"keep": 17, "fuse": False}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the tokens that stay at each cut, class and fused token not counted; one, or one for each layer.
            layers: the encoder layers (0-based) that drop with `at: encoder`; when left out, those at a quarter, a half and three quarters
                of the depth (3, 6 and 9 of 12).
            fuse: whether the dropped tokens are fused into one.
        """

        keep: Budget | tuple[Budget, ...] = Budget(share=0.7)
        layers: tuple[int, ...] | None = None
        fuse: bool = True

    @staticmethod
    def stages(at: Site, config: EViT.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut for every layer that drops, or the one of `encoder.<l>.mid`."""
        need_site("evit", at, "encoder", "encoder.mid")
        if at.point is None and at.layer is not None:
            raise ValueError(f"evit drops between attention and feed-forward, not at {at}; write at: {at}.mid, or at: encoder and layers")
        need_class_token("evit", facts)
        need_raster_encoder("evit", at, facts)
        layers = layers_of(at, config.layers, facts.encoder.layers)
        if isinstance(config.keep, tuple) and len(config.keep) != len(layers):
            raise ValueError(f"keep: {len(config.keep)} budgets for {len(layers)} layers that drop; give one for each, or a single one")
        return tuple(Stage(Site("encoder", layer, "mid"), (_SCORE,), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: EViT.Config, facts: ModelFacts) -> Layout:
        """Class token, kept tokens, fused token."""
        if layout.class_tokens != 1:
            raise ValueError(f"evit needs the class token at {stage.at}, and {layout.class_tokens} arrive; put evit first")
        n = layout.tokens - 1
        k = kept_of(config.keep[stage.index] if isinstance(config.keep, tuple) else config.keep, n, stage.at, "ceil")
        if k == n:
            return layout
        fused = (Segment("visual", 1),) if config.fuse else ()
        return Layout((Segment("class", 1), Segment("visual", k), *fused), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: EViT.Config) -> Compressed:
        """Keep the best-attended tokens and fuse the others."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._ops import complement, gather, one_hot, top_in_order

        b, n, valid = tokens.shape[0], tokens.shape[1], context.valid
        leaving = EViT.layout(stage, context.layout, config, context.facts).tokens
        if leaving == n:
            return Compressed(tokens, torch.arange(n).expand(b, n).contiguous(), valid)
        k = leaving - 1 - int(config.fuse)
        score = torch.where(valid[:, 1:], context.captured[_SCORE][:, 1:].float(), 0.0)
        kept = functional.pad(top_in_order(score, k, valid[:, 1:]) + 1, (1, 0))
        if not config.fuse:
            return Compressed(gather(tokens, kept), kept, gather(valid, kept))
        dropped = complement(kept, n)
        share = gather(score, dropped - 1)
        fused = (share.unsqueeze(1) @ gather(tokens, dropped).float()).to(tokens.dtype)
        into = (one_hot(dropped, n).amax(dim=1) > 0) & valid
        rows = one_hot(kept, n)
        assign = torch.where(
            rows.amax(dim=1) > 0, (rows * torch.arange(k + 1).unsqueeze(1)).sum(dim=1).long(), torch.where(into, k + 1, -1)
        )
        return Compressed(
            torch.cat([gather(tokens, kept), fused], dim=1),
            torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1),
            torch.cat([gather(valid, kept), into.float().sum(dim=1, keepdim=True) > 0], dim=1),
            assign=assign,
            mix=torch.cat([rows, share.unsqueeze(1) @ one_hot(dropped, n)], dim=1),
        )
