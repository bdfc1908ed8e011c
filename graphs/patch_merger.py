"""The patch merger of Qwen2-VL and Qwen2.5-VL: norm, a square of patches side by side, and an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage
from tmc_export.graphs._projector import dense_shapes, need_blocks, norm_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PatchMerger"]

_EPS = 1e-6


@register("patch_merger")
class PatchMerger(Method):
    """The merger of Qwen2-VL, as the projector of a model that has another.

    Papers: "Qwen2-VL", arXiv:2409.12191 (layer norm); "Qwen2.5-VL Technical Report", arXiv:2502.13923 (RMS norm).

    With x the raster of h x w patches and m the side of a block:
    `token(R, C)` = concatenation over r, s = 0 … m-1 (s fastest) of `norm(x[m R + r, m C + s])`, eps 1e-6, each patch by itself;
    `y = W2 gelu(W1 token + b1) + b2`, the inner width that of the token.

    Shapes (b batch, n = h*w candidates, k = n / m², c channels of the encoder, d of the decoder): tokens `[b, n, c]` -> `[b, k, d]`.
    `assign` names the token of every patch, `source` the patch at the token's middle.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = PatchMerger.Config()
    >>> stage, tokens, context = context_for(PatchMerger, config, "projector.replace", seed=0)
    >>> tuple(tokens.shape), tuple(PatchMerger.apply(stage, tokens, context, config).tokens.shape)
    ((1, 64, 32), (1, 16, 96))

    Limits: needs a raster whose sides the block divides. The Qwen families have this merger already; with their own weights it changes
    nothing there. A token with padding in it is padding.

    Where the official code differs: its processor cuts the picture into patches block by block, so that the merger takes four patches that
    follow each other; here the raster is put into that order first. Qwen2.5-VL also groups blocks into windows before its encoder and
    undoes that after the merger; what comes out is the same raster.
    """

    paper = "Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL, arXiv:2502.13923"
    official = "huggingface/transformers 5.23 models/qwen2_vl/modeling_qwen2_vl.py:PatchMerger, qwen2_5_vl:Qwen2_5_VLPatchMerger"
    mechanism = "transform"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", too_much={"merge": 3}),
        Sample("projector.replace", {"merge": 4, "norm": "rms"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            merge: patches per side that become one token.
            norm: layer (Qwen2-VL) or rms (Qwen2.5-VL).
        """

        merge: int = Field(default=2, ge=2)
        norm: Literal["layer", "rms"] = "layer"

    @staticmethod
    def stages(at: Site, config: PatchMerger.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("patch_merger", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: PatchMerger.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of the merger's state dict."""
        wide = facts.encoder.width * config.merge**2
        norm = norm_shapes("ln_q", facts.encoder.width, bias=config.norm == "layer")
        return norm | dense_shapes("mlp.0", wide, wide) | dense_shapes("mlp.2", wide, facts.decoder.width)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: PatchMerger.Config, facts: ModelFacts) -> Layout:
        """The smaller raster, as wide as the decoder."""
        h, w = need_grid("patch_merger", layout, stage.at)
        need_blocks("merge", config.merge, (h, w), stage.at)
        grid = (h // config.merge, w // config.merge)
        return Layout((Segment("visual", grid[0] * grid[1], grid),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: PatchMerger.Config) -> Compressed:
        """Normalise, join the neighbours and project."""
        from torch.nn import functional

        from tmc_export.graphs._projector import dense, joined, layer_norm, rms_norm, unshuffle

        h, w = need_grid("patch_merger", context.layout, stage.at)
        need_blocks("merge", config.merge, (h, w), stage.at)
        norm = layer_norm if config.norm == "layer" else rms_norm
        raster = norm(tokens, context.weights, "ln_q", _EPS).reshape(tokens.shape[0], h, w, -1)
        inner = dense(unshuffle(raster, config.merge).flatten(1, 2), context.weights, "mlp.0")
        valid, source, assign = joined(context, (h, w), config.merge)
        return Compressed(dense(functional.gelu(inner), context.weights, "mlp.2"), source, valid, assign=assign)
