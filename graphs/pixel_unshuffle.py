"""Pixel unshuffle: a square of neighbouring patches becomes one token of as many times the channels, and an MLP projects it."""

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

__all__ = ["PixelUnshuffle"]

_LINEAR = "modality_projection.proj"


@register("pixel_unshuffle")
class PixelUnshuffle(Method):
    """Pixel unshuffle and a projection, as the projector of a model.

    Papers: "How Far Are We to GPT-4V?" (InternVL 1.5), Science China 2024, arXiv:2404.16821; "NVLM", arXiv:2409.11402; "Building and better
    understanding vision-language models" (Idefics3), arXiv:2408.12637; "SmolVLM", COLM 2025, arXiv:2504.05299.

    With x the raster of h x w patches and f the factor, token (R, C) is the concatenation over r, s = 0 … f-1 (s fastest) of
    `x[f R + r, f C + s]`. Then

    - `internvl`: `y = W2 gelu(W1 layer_norm(token, eps 1e-5) + b1) + b2`, weights `mlp1.0`, `mlp1.1`, `mlp1.3`;
    - `idefics3`: `y = W token`, weight `modality_projection.proj`.

    Shapes (b batch, n = h*w candidates, k = n / f², c channels of the encoder, d of the decoder): tokens `[b, n, c]` -> `[b, k, d]`.
    `assign` names the token of every patch, `source` the patch at the token's middle.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = PixelUnshuffle.Config(factor=2)
    >>> stage, tokens, context = context_for(PixelUnshuffle, config, "projector.replace", seed=0)
    >>> tuple(tokens.shape), tuple(PixelUnshuffle.apply(stage, tokens, context, config).tokens.shape)
    ((1, 64, 32), (1, 16, 96))

    Limits: needs a raster whose sides the factor divides. A token with padding in it is padding.

    Where the official code differs: InternVL writes the factor as `downsample_ratio = 1 / factor`. Its `ps_version: v1` does not exchange
    the axes back, so that tokens run down the columns: `order: v1` does the same, and the raster that leaves is w/f x h/f. `v2` and
    Idefics3 agree. On a raster that is not square, Idefics3's own code reads a square; here the raster is known.
    """

    paper = "InternVL 1.5, Science China 2024, arXiv:2404.16821; Idefics3, arXiv:2408.12637; SmolVLM, COLM 2025, arXiv:2504.05299"
    official = (
        "OpenGVLab/InternVL@0328579 internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py:InternVLChatModel.pixel_shuffle; "
        "huggingface/transformers 5.23 models/idefics3/modeling_idefics3.py:Idefics3Connector"
    )
    mechanism = "transform"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", too_much={"factor": 3}),
        Sample("projector.replace", {"order": "v1"}),
        Sample("projector.replace", {"factor": 4, "projection": "idefics3"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            factor: patches per side that become one token.
            order: v2 runs along the rows; v1, of the first InternVL checkpoints, down the columns.
            projection: what follows: InternVL's norm and two layers, or Idefics3's one layer.
        """

        factor: int = Field(default=2, ge=2)
        order: Literal["v1", "v2"] = "v2"
        projection: Literal["internvl", "idefics3"] = "internvl"

    @staticmethod
    def stages(at: Site, config: PixelUnshuffle.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("pixel_unshuffle", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: PixelUnshuffle.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of InternVL's or Idefics3's state dict, without the prefix of the model."""
        wide, out = facts.encoder.width * config.factor**2, facts.decoder.width
        if config.projection == "idefics3":
            return dense_shapes(_LINEAR, wide, out, bias=False)
        return norm_shapes("mlp1.0", wide) | dense_shapes("mlp1.1", wide, out) | dense_shapes("mlp1.3", out, out)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: PixelUnshuffle.Config, facts: ModelFacts) -> Layout:
        """The smaller raster, as wide as the decoder."""
        h, w = need_grid("pixel_unshuffle", layout, stage.at)
        need_blocks("factor", config.factor, (h, w), stage.at)
        grid = (h // config.factor, w // config.factor)
        grid = (grid[1], grid[0]) if config.order == "v1" else grid
        return Layout((Segment("visual", grid[0] * grid[1], grid),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: PixelUnshuffle.Config) -> Compressed:
        """Join the neighbours and project."""
        from tmc_export.graphs._projector import joined, unshuffle

        h, w = need_grid("pixel_unshuffle", context.layout, stage.at)
        need_blocks("factor", config.factor, (h, w), stage.at)
        transposed = config.order == "v1"
        wide = unshuffle(tokens.reshape(tokens.shape[0], h, w, -1), config.factor, transposed).flatten(1, 2)
        valid, source, assign = joined(context, (h, w), config.factor, transposed)
        return Compressed(_projected(wide, context.weights, config), source, valid, assign=assign)


def _projected(wide: Tensor, weights: Mapping[str, Tensor], config: PixelUnshuffle.Config) -> Tensor:
    """Project `[b, k, f*f*c]` to `[b, k, d]`."""
    from torch.nn import functional

    from tmc_export.graphs._projector import dense, layer_norm

    if config.projection == "idefics3":
        return dense(wide, weights, _LINEAR)
    inner = dense(layer_norm(wide, weights, "mlp1.0", eps=1e-5), weights, "mlp1.1")
    return dense(functional.gelu(inner), weights, "mlp1.3")
