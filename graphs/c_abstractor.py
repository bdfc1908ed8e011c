"""Honeybee's C-Abstractor: residual convolutions, adaptive pooling, residual convolutions, and an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Shape, Site, Stage
from tmc_export.graphs._projector import conv_shapes, dense_shapes, norm_shapes
from tmc_export.graphs._raster import need_inside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CAbstractor"]


@register("c_abstractor")
class CAbstractor(Method):
    """C-Abstractor, a projector that keeps what is near together.

    Paper: "Honeybee: Locality-enhanced Projector for Multimodal LLM", CVPR 2024, arXiv:2312.06742.

    With x the raster of h x w patches plus a learned vector for each place (`prenorm`: a layer norm first, eps 1e-6):
    `y = mlp(stage2(pool(stage1(x))))`, `pool` the adaptive average to R x C, a stage `depth` blocks

    `block(x) = silu(N3 conv1x1(gated(silu(N2 depthwise3x3(silu(N1 conv1x1(x)))))) + shortcut(x))`,
    `gated(u) = u * sigmoid(F2 silu(F1 mean(u) + f1) + f2)`,

    N a layer norm over the channels of one place (eps 1e-5), mean that over all places, zeros around the border; the shortcut is x itself,
    or where the channels differ `N0 conv1x1(x)`. F1 leaves a quarter of the channels that enter the block. The MLP has `mlp_depth` layers
    with SiLU between them. `eos_tokens` learned tokens follow at the end.

    Shapes (b batch, n = h*w candidates, k = R*C + eos_tokens, c channels of the encoder, d of the decoder): tokens `[b, n, c]` ->
    `[b, k, d]`. `assign` names the cell of each patch, `source` the patch at the cell's middle.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = CAbstractor.Config(grid=(4, 4), hidden=16, depth=1)
    >>> stage, tokens, context = context_for(CAbstractor, config, "projector.replace", seed=0)
    >>> tuple(tokens.shape), tuple(CAbstractor.apply(stage, tokens, context, config).tokens.shape)
    ((1, 64, 32), (1, 16, 96))

    Limits: needs a raster, with `pos_emb` the encoder's own. A token whose window touches padding is padding; padding is zero before the
    first convolution.

    Where the official code differs: it has a number of queries and pools to the root of it; here the raster that leaves is an option, and a
    plan refuses one that is larger than what arrives. It reads the raster as a square. Checkpoints with a place vector for the class token
    lose it when official code loads them; here they must have lost it already.
    """

    paper = "Honeybee, CVPR 2024, arXiv:2312.06742"
    official = "khanrc/honeybee@68a8d84 honeybee/projectors/projectors.py:CAbstractor"
    mechanism = "transform"
    sites = ("projector.replace",)
    training_free = False

    samples = (
        Sample("projector.replace", {"grid": (4, 4), "hidden": 16, "depth": 1}, too_much={"grid": (9, 4)}),
        Sample(
            "projector.replace",
            {"grid": (5, 3), "hidden": 32, "depth": 2, "mlp_depth": 1, "prenorm": True, "pos_emb": False, "eos_tokens": 2},
        ),
        Sample("projector.replace", {"grid": (4, 4), "depth": 0}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: rows and columns that leave.
            hidden: channels of the convolutions.
            depth: blocks of each stage; with 0 only the pooling is left.
            mlp_depth: layers of the MLP at the end.
            pos_emb: add a learned vector for each place.
            prenorm: normalise the patches first.
            eos_tokens: learned tokens at the end.
        """

        grid: tuple[int, int] = (12, 12)
        hidden: int = Field(default=1024, ge=1)
        depth: int = Field(default=3, ge=0)
        mlp_depth: int = Field(default=2, ge=1)
        pos_emb: bool = True
        prenorm: bool = False
        eos_tokens: int = Field(default=0, ge=0)

    @staticmethod
    def stages(at: Site, config: CAbstractor.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, in the projector's place."""
        need_site("c_abstractor", at, "projector.replace")
        return (Stage(at),)

    @staticmethod
    def weights(config: CAbstractor.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        """Names of the projector's state dict."""
        c, d, (h, w) = facts.encoder.width, facts.decoder.width, facts.encoder.grid
        found: dict[str, Shape] = {}
        if config.eos_tokens:
            found["eos_tokens"] = (1, config.eos_tokens, d)
        if config.pos_emb:
            found["pos_emb"] = (1, h * w, c)
        if config.prenorm:
            found |= norm_shapes("prenorm", c)
        inner = config.hidden if config.depth else c
        for index in range(config.depth):
            found |= _block_shapes(f"net.0.b{index + 1}", inner if index else c, inner)
            found |= _block_shapes(f"net.2.b{index + 1}", inner, inner)
        for index in range(config.mlp_depth):
            found |= dense_shapes(f"readout.{2 * index}", d if index else inner, d)
        return found

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: CAbstractor.Config, facts: ModelFacts) -> Layout:
        """The raster asked for and the tokens at the end, as wide as the decoder."""
        arriving = need_grid("c_abstractor", layout, stage.at)
        need_inside(config.grid, arriving, stage.at)
        if config.pos_emb and arriving != facts.encoder.grid:
            raise ValueError(
                f"pos_emb has one vector for each of the encoder's {list(facts.encoder.grid)} patches, and {list(arriving)} arrive at "
                f"{stage.at}; take away the cut before it, or write pos_emb: false"
            )
        end = (Segment("visual", config.eos_tokens),) if config.eos_tokens else ()
        return Layout((Segment("visual", config.grid[0] * config.grid[1], config.grid), *end), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: CAbstractor.Config) -> Compressed:
        """Convolve, pool, convolve and project."""
        import torch

        from tmc_export.graphs._projector import adaptive, layer_norm, masked, pooled_valid, to_image, to_tokens
        from tmc_export.graphs._raster import cells

        old, new, b = need_grid("c_abstractor", context.layout, stage.at), config.grid, tokens.shape[0]
        weights = context.weights
        x = layer_norm(tokens, weights, "prenorm", eps=1e-6) if config.prenorm else tokens
        x = masked(x + weights["pos_emb"] if config.pos_emb else x, context.valid)
        image = _blocks(to_image(x, old), weights, "net.0", config.depth)
        image = to_image(adaptive(to_tokens(image), old, new), new)
        out = _readout(to_tokens(_blocks(image, weights, "net.2", config.depth)), weights, config.mlp_depth)
        source, assign = cells(old, new)
        source, valid = source.expand(b, -1), pooled_valid(context.valid, old, new)
        if config.eos_tokens:
            out = torch.cat([out, weights["eos_tokens"].expand(b, -1, -1)], dim=1)
            source = torch.cat([source, torch.full((b, config.eos_tokens), -1)], dim=1)
            valid = torch.cat([valid, context.valid.any(dim=1, keepdim=True).expand(-1, config.eos_tokens)], dim=1)
        return Compressed(out, source.contiguous(), valid, assign=assign.expand(b, -1).contiguous())


def _block_shapes(name: str, into: int, out: int) -> dict[str, Shape]:
    """Declare one block."""
    squeezed = round(into * 0.25)
    found = conv_shapes(f"{name}.conv1.conv", into, out, 1) | norm_shapes(f"{name}.conv1.bn", out)
    found |= conv_shapes(f"{name}.conv2.conv", 1, out, 3) | norm_shapes(f"{name}.conv2.bn", out)
    found |= conv_shapes(f"{name}.se.fc1", out, squeezed, 1, bias=True) | conv_shapes(f"{name}.se.fc2", squeezed, out, 1, bias=True)
    found |= conv_shapes(f"{name}.conv3.conv", out, out, 1) | norm_shapes(f"{name}.conv3.bn", out)
    if into != out:
        found |= conv_shapes(f"{name}.downsample.conv", into, out, 1) | norm_shapes(f"{name}.downsample.bn", out)
    return found


def _blocks(image: Tensor, weights: Mapping[str, Tensor], name: str, depth: int) -> Tensor:
    """Run one stage: `[b, c, h, w]`."""
    for index in range(depth):
        image = _block(image, weights, f"{name}.b{index + 1}")
    return image


def _block(image: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Run one block: `[b, c, h, w]`."""
    from torch.nn import functional

    from tmc_export.graphs._projector import channel_norm, conv

    def normed(x: Tensor, part: str) -> Tensor:
        return channel_norm(conv(x, weights, f"{name}.{part}.conv"), weights, f"{name}.{part}.bn")

    inner = functional.silu(normed(functional.silu(normed(image, "conv1")), "conv2"))
    squeezed = functional.silu(conv(inner.mean(dim=(2, 3), keepdim=True), weights, f"{name}.se.fc1"))
    gated = inner * conv(squeezed, weights, f"{name}.se.fc2").sigmoid()
    shortcut = normed(image, "downsample") if f"{name}.downsample.conv.weight" in weights else image
    return functional.silu(normed(gated, "conv3") + shortcut)


def _readout(x: Tensor, weights: Mapping[str, Tensor], depth: int) -> Tensor:
    """Run the MLP: `[b, k, c]` to `[b, k, d]`."""
    from torch.nn import functional

    from tmc_export.graphs._projector import dense

    for index in range(depth):
        x = dense(functional.silu(x) if index else x, weights, f"readout.{2 * index}")
    return x
