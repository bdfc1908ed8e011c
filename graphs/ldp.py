"""MobileVLM's lightweight downsample projector: an MLP and two MobileNetV3 blocks, the second of stride 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage
from tmc_export.graphs._projector import conv_shapes, dense_shapes, norm_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ldp"]

_MLP, _BLOCKS = "model.mlp", "model.mb_block"


@register("ldp")
class Ldp(Method):
    """The lightweight downsample projector, LDP.

    Paper: "MobileVLM: A Fast, Strong and Open Vision Language Assistant for Mobile Devices", arXiv:2312.16886.

    `x = W2 gelu(W1 tokens + b1) + b2` on the raster of h x w, then `z = block(x, stride 1) + x` and `y = block(z, stride s)`, where

    `block(x) = norm(pointwise(gated(hardswish(norm(depthwise3x3(x))))))`,
    `gated(u) = u * hardsigmoid(F2 relu(F1 mean(u) + f1) + f2)`,

    norm being a layer norm over the channels of one place (eps 1e-5), mean that over all places, and the convolutions without bias, zeros
    around the border. F1 leaves d/4 channels, rounded to a multiple of 8 (at least 8, and not below 9/10 of d/4).

    Shapes (b batch, n = h*w candidates, k = ceil(h/s) ceil(w/s), c channels of the encoder, d of the decoder): tokens `[b, n, c]` ->
    `[b, k, d]`. `assign` names the s x s square of each patch, `source` the patch at the centre of the last convolution.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Ldp.Config()
    >>> stage, tokens, context = context_for(Ldp, config, "projector.replace", seed=0)
    >>> tuple(tokens.shape), tuple(Ldp.apply(stage, tokens, context, config).tokens.shape)
    ((1, 64, 32), (1, 16, 96))

    Limits: needs a raster. A token whose square holds padding is padding; padding is zero before the first convolution, as the border is.

    Where the official code differs: it reads the raster as a square and has stride 2 (576 -> 144); here the raster is known and the stride
    an option.
    """

    paper = "MobileVLM, arXiv:2312.16886"
    official = "Meituan-AutoML/MobileVLM@688fdec mobilevlm/model/vision_projector.py:LDPNetProjector"
    mechanism = "transform"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", too_much={"stride": 9}),
        Sample("projector.replace", {"stride": 3}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            stride: of the second block, tokens per side that become one.
        """

        stride: int = Field(default=2, ge=1)

    @staticmethod
    def stages(at: Site, config: Ldp.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("ldp", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: Ldp.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of the projector's state dict."""
        out = facts.decoder.width
        found = dense_shapes(f"{_MLP}.1", facts.encoder.width, out) | dense_shapes(f"{_MLP}.3", out, out)
        for block in (f"{_BLOCKS}.1.block", f"{_BLOCKS}.2.block"):
            found |= conv_shapes(f"{block}.0.0", 1, out, 3) | norm_shapes(f"{block}.0.1", out)
            found |= conv_shapes(f"{block}.1.fc1", out, _squeezed(out), 1, bias=True)
            found |= conv_shapes(f"{block}.1.fc2", _squeezed(out), out, 1, bias=True)
            found |= conv_shapes(f"{block}.2.0", out, out, 1) | norm_shapes(f"{block}.2.1", out)
        return found

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Ldp.Config, facts: ModelFacts) -> Layout:
        """The smaller raster, as wide as the decoder."""
        grid = _leaving(need_grid("ldp", layout, stage.at), config, stage.at)
        return Layout((Segment("visual", grid[0] * grid[1], grid),), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Ldp.Config) -> Compressed:
        """Project each patch, then mix and thin out the raster."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._ops import scatter_sum
        from tmc_export.graphs._projector import dense, masked, to_image, to_tokens

        old, b = need_grid("ldp", context.layout, stage.at), tokens.shape[0]
        new = _leaving(old, config, stage.at)
        wide = dense(functional.gelu(dense(tokens, context.weights, f"{_MLP}.1")), context.weights, f"{_MLP}.3")
        image = to_image(masked(wide, context.valid), old)
        image = image + _block(image, context.weights, f"{_BLOCKS}.1.block", 1)
        image = _block(image, context.weights, f"{_BLOCKS}.2.block", config.stride)
        s = config.stride
        assign = torch.tensor([(row // s) * new[1] + column // s for row in range(old[0]) for column in range(old[1])])
        source = torch.tensor([row * s * old[1] + column * s for row in range(new[0]) for column in range(new[1])])
        assign = assign.expand(b, -1).contiguous()
        padding = scatter_sum((~context.valid).float().unsqueeze(2), assign, new[0] * new[1]).squeeze(2)
        return Compressed(to_tokens(image), source.expand(b, -1).contiguous(), padding == 0, assign=assign)


def _squeezed(width: int) -> int:
    """Channels inside the gate."""
    quarter = width // 4
    near = max(8, (quarter + 4) // 8 * 8)
    return near + 8 if near < 0.9 * quarter else near


def _leaving(grid: tuple[int, int], config: Ldp.Config, at: Site) -> tuple[int, int]:
    """Return the raster that leaves; raises `ValueError` when the stride is longer than a side."""
    if config.stride > min(grid):
        raise ValueError(f"stride: {config.stride} is longer than a side of the {grid[0]}x{grid[1]} raster at {at}; lower it")
    return -(-grid[0] // config.stride), -(-grid[1] // config.stride)


def _block(image: Tensor, weights: Mapping[str, Tensor], name: str, stride: int) -> Tensor:
    """A MobileNetV3 block that keeps its channels, without the shortcut: `[b, d, h, w]`."""
    from torch.nn import functional

    from tmc_export.graphs._projector import channel_norm, conv

    inner = functional.hardswish(channel_norm(conv(image, weights, f"{name}.0.0", stride), weights, f"{name}.0.1"))
    squeezed = functional.relu(conv(inner.mean(dim=(2, 3), keepdim=True), weights, f"{name}.1.fc1"))
    gated = inner * functional.hardsigmoid(conv(squeezed, weights, f"{name}.1.fc2"))
    return channel_norm(conv(gated, weights, f"{name}.2.0"), weights, f"{name}.2.1")
