"""DynamicViT: small learned predictors between encoder layers decide which patches stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_raster_encoder, need_site
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage
from tmc_export.graphs._depth import layers_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DynamicViT", "keep_log_probability"]

_EPS = 1e-5
_QUARTERS = (Budget(share=0.7), Budget(share=0.49), Budget(share=0.343))


@register("dynamicvit")
class DynamicViT(Method):
    """DynamicViT, learned selection before a few encoder layers.

    Paper: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021, arXiv:2106.02034.

    Before each of `layers`, for the patches x (class token left out): `z = GELU(Linear(LayerNorm(x)))` (epsilon 1e-5, GELU by erf);
    `g = mean over patches of the second half of z's channels`; `p = log_softmax(MLP([first half of z, g]))` with the widths C, C/2, C/4,
    2 and GELU between. The `floor(N0 * keep_s)` patches of the largest p_0 stay, in falling order, behind the class token. N0 is what
    arrived at the first cut.

    Shapes (b batch, n candidates of which the first is the class token, k kept, c channels): tokens `[b, n, c]` -> `[b, 1 + k, c]`; p
    `[b, n-1, 2]` in float32. Weights: `score_predictor.<s>.{in_conv,out_conv}.*` for each cut s.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = DynamicViT.Config()
    >>> [tokens.shape[1] for _, tokens, _ in contexts(DynamicViT, config, "encoder")]
    [65, 45, 32]

    Limits: the predictors are trained together with the encoder; with weights of another encoder, or random ones, the choice means
    nothing. Needs one class token and a width that 4 divides. The tokens are no raster afterwards and not in the order of the picture.

    Where the official code differs: it counts from 196 patches, here from those that arrived at the first cut. Its training masks instead
    of dropping; this is its inference. The mean runs over the valid patches. Ties go to the lowest index.
    """

    paper = "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021, arXiv:2106.02034"
    official = "raoyongming/DynamicViT@1322e62 models/dyvit.py:PredictorLG.forward, VisionTransformerDiffPruning.forward"
    mechanism = "attention"
    sites = ("encoder", "encoder.<l>")
    training_free = False

    samples = (
        Sample("encoder"),
        Sample("encoder.2", {"keep": (Budget(tokens=21),)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share of the patches of the first cut, or number of them, left after each cut; never rising.
            layers: the encoder layers (0-based) before which patches are dropped with `at: encoder`; when left out, those at a quarter, a
                half and three quarters of the depth (3, 6 and 9 of 12).
        """

        keep: tuple[Budget, ...] = _QUARTERS
        layers: tuple[int, ...] | None = None

    @staticmethod
    def stages(at: Site, config: DynamicViT.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut before each of the layers."""
        need_site("dynamicvit", at, "encoder")
        need_class_token("dynamicvit", facts)
        need_raster_encoder("dynamicvit", at, facts)
        if facts.encoder.width % 4:
            raise ValueError(
                f"dynamicvit's predictors halve the width twice, and the encoder of {facts.architecture} is {facts.encoder.width} wide; "
                "use a method without predictors, such as evit"
            )
        layers = layers_of(at, config.layers, facts.encoder.layers)
        if len(config.keep) != len(layers):
            raise ValueError(f"keep: {len(config.keep)} budgets for {len(layers)} layers that drop; give one for each")
        return tuple(Stage(Site("encoder", layer), (), index) for index, layer in enumerate(layers))

    @staticmethod
    def weights(config: DynamicViT.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """A predictor for each cut."""
        c = facts.encoder.width
        one: dict[str, Shape] = {"in_conv.0.weight": (c,), "in_conv.0.bias": (c,), "in_conv.1.weight": (c, c), "in_conv.1.bias": (c,)}
        for layer, (into, out) in zip((0, 2, 4), ((c, c // 2), (c // 2, c // 4), (c // 4, 2)), strict=True):
            one |= {f"out_conv.{layer}.weight": (out, into), f"out_conv.{layer}.bias": (out,)}
        return {f"score_predictor.{cut}.{name}": shape for cut in range(len(config.keep)) for name, shape in one.items()}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: DynamicViT.Config, facts: ModelFacts) -> Layout:
        """The class token and `floor(N0 * keep)` patches."""
        if layout.class_tokens != 1:
            raise ValueError(f"dynamicvit needs the class token at {stage.at}, and {layout.class_tokens} arrive; put dynamicvit first")
        first = layout.tokens - 1 if stage.index == 0 else layout.entry_tokens
        if first is None:
            raise ValueError(
                f"dynamicvit at {stage.at} does not know how many patches reached its first cut, because another method cut in between; "
                f"move that method before the first of dynamicvit's {len(config.keep)} cuts or behind the last"
            )
        k = kept_of(config.keep[stage.index], first, stage.at, "floor")
        if k > layout.tokens - 1:
            raise ValueError(
                f"keep: {k} patches is more than the {layout.tokens - 1} that arrive at {stage.at}; let keep fall from cut to cut"
            )
        return replace(Layout((Segment("class", 1), Segment("visual", k)), layout.width), entry_tokens=first)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: DynamicViT.Config) -> Compressed:
        """Keep the patches that the predictor is surest of."""
        from torch.nn import functional

        from tmc_export.graphs._ops import gather, top_in_order

        k = DynamicViT.layout(stage, context.layout, config, context.facts).tokens - 1
        valid = context.valid[:, 1:]
        prefix = f"score_predictor.{stage.index}."
        own = {name.removeprefix(prefix): value for name, value in context.weights.items() if name.startswith(prefix)}
        score = keep_log_probability(tokens[:, 1:], valid, own)
        kept = functional.pad(top_in_order(score, k, valid) + 1, (1, 0))
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


def keep_log_probability(patches: Tensor, valid: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probability `[b, n]` float32 that a patch of `[b, n, c]` stays, by one predictor's weights (`in_conv.0.weight`, …)."""
    import torch
    from torch.nn import functional

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].float().T + weights[f"{name}.bias"].float()

    x, c = patches.float(), patches.shape[2]
    x = functional.layer_norm(x, (c,), weights["in_conv.0.weight"].float(), weights["in_conv.0.bias"].float(), _EPS)
    x = functional.gelu(linear(x, "in_conv.1"))
    counted = valid.float().unsqueeze(2)
    half = c // 2
    whole = (x[:, :, half:] * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp_min(1.0)
    x = torch.cat([x[:, :, :half], whole.expand(-1, x.shape[1], -1)], dim=2)
    x = functional.gelu(linear(functional.gelu(linear(x, "out_conv.0")), "out_conv.2"))
    return functional.log_softmax(linear(x, "out_conv.4"), dim=-1)[:, :, 0]
