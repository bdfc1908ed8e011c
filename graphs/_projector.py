"""What the learned projectors share: layers by state-dict name, convolutions over a raster, joining of neighbours.

The `*_shapes` functions declare weights without torch; the functions of the same stem compute with them. Weights keep the names, shapes and
axis order of the official state dicts.

Legend: b batch, h w the raster, n = h*w candidates, c channels that arrive, d channels that leave, k tokens that leave, f tokens joined per
side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tmc_export.graphs._contract import Context, Shape, Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "adaptive",
    "channel_norm",
    "conv",
    "conv_shapes",
    "dense",
    "dense_shapes",
    "joined",
    "layer_norm",
    "masked",
    "need_blocks",
    "norm_shapes",
    "pooled_valid",
    "rms_norm",
    "to_image",
    "to_tokens",
    "unshuffle",
]

Grid = tuple[int, int]
Weights = Mapping[str, "Tensor"]


# ------------------------------------------------------------------------------------------------------------- refusals
def need_blocks(option: str, side: int, grid: Grid, at: Site) -> None:
    """Raise `ValueError` unless the raster divides into blocks of `side` x `side`."""
    if any(length % side for length in grid):
        raise ValueError(
            f"{option}: {side} does not divide the raster of {grid[0]}x{grid[1]} tokens that arrives at {at}; choose one that does, or "
            "another inputs.image_size"
        )


# --------------------------------------------------------------------------------------------------------------- layers
def dense_shapes(name: str, into: int, out: int, bias: bool = True) -> dict[str, Shape]:
    """Declare a linear layer: weight `[out, into]`, bias `[out]`."""
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm_shapes(name: str, width: int, bias: bool = True) -> dict[str, Shape]:
    """Declare a layer norm, or without `bias` an RMS norm."""
    found: dict[str, Shape] = {f"{name}.weight": (width,)}
    return found | {f"{name}.bias": (width,)} if bias else found


def conv_shapes(name: str, into: int, out: int, kernel: int, bias: bool = False) -> dict[str, Shape]:
    """Declare a convolution: weight `[out, into, kernel, kernel]`; `into` is 1 for a depthwise one."""
    return {f"{name}.weight": (out, into, kernel, kernel)} | ({f"{name}.bias": (out,)} if bias else {})


def dense(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Apply a linear layer along the last axis."""
    from torch.nn import functional

    return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` along the last axis."""
    from torch.nn import functional

    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def rms_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` along the last axis, the root in float32."""
    import torch

    wide = x.float()
    return weights[f"{name}.weight"] * (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def channel_norm(image: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    """Layer norm over the channels of an image `[b, c, h, w]`."""
    return layer_norm(image.permute(0, 2, 3, 1), weights, name, eps).permute(0, 3, 1, 2)


def conv(image: Tensor, weights: Weights, name: str, stride: int = 1) -> Tensor:
    """Convolve `[b, c, h, w]` with zeros around the border, so that stride 1 keeps the raster; groups follow from the weight's shape."""
    from torch.nn import functional

    kernel = weights[f"{name}.weight"]
    groups, padding = image.shape[1] // kernel.shape[1], kernel.shape[2] // 2
    return functional.conv2d(image, kernel, weights.get(f"{name}.bias"), stride, padding, groups=groups)


# --------------------------------------------------------------------------------------------------------------- raster
def masked(tokens: Tensor, valid: Tensor) -> Tensor:
    """Set padding to zero, as the border of a convolution is: `[b, n, c]`."""
    import torch

    return torch.where(valid.unsqueeze(2), tokens, torch.zeros_like(tokens))


def to_image(tokens: Tensor, grid: Grid) -> Tensor:
    """Raster rows `[b, h*w, c]` to `[b, c, h, w]`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def to_tokens(image: Tensor) -> Tensor:
    """`[b, c, h, w]` to raster rows `[b, h*w, c]`."""
    return image.flatten(2).transpose(1, 2)


def adaptive(tokens: Tensor, arriving: Grid, leaving: Grid) -> Tensor:
    """Adaptive average pooling of raster rows: `[b, h*w, c]` to `[b, h'*w', c]`."""
    from tmc_export.graphs._raster import resample

    return resample(tokens, arriving, leaving, "adaptive")


def pooled_valid(valid: Tensor, arriving: Grid, leaving: Grid) -> Tensor:
    """Return `[b, h'*w']`: false where the adaptive window touches padding."""
    return adaptive((~valid).float().unsqueeze(2), arriving, leaving).squeeze(2) <= 0


def unshuffle(image: Tensor, factor: int, transposed: bool = False) -> Tensor:
    """Join blocks of `factor` x `factor` neighbours into one token: `[b, h, w, c]` to `[b, h/f, w/f, f*f*c]`.

    Channels run (row in the block, column in the block, channel). `transposed` hands `[b, w/f, h/f, f*f*c]`: the same tokens, the
    raster's axes exchanged.

    >>> import torch
    >>> unshuffle(torch.arange(8).reshape(1, 2, 4, 1), 2).tolist()
    [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]
    """
    b, h, w, c = image.shape
    blocks = image.reshape(b, h // factor, factor, w // factor, factor, c)
    order = (0, 3, 1, 2, 4, 5) if transposed else (0, 1, 3, 2, 4, 5)
    return blocks.permute(*order).flatten(3)


def joined(context: Context, grid: Grid, factor: int, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `unshuffle` does to (valid `[b, k]`, source `[b, k]`, assign `[b, n]`).

    A block that holds padding is padding. `source` is the token at the block's middle (of an even block, the one below and right of it).
    """
    import torch

    from tmc_export.graphs._raster import cells

    b, (h, w) = context.valid.shape[0], grid
    valid = unshuffle(context.valid.float().reshape(b, h, w, 1), factor, transposed).flatten(1, 2).amin(dim=2) > 0
    new = (h // factor, w // factor)
    source, assign = cells(grid, new)
    if transposed:
        source = source.reshape(new).transpose(0, 1).flatten()
        assign = torch.arange(new[0] * new[1]).reshape(new[1], new[0]).transpose(0, 1).flatten()[assign]
    return valid, source.expand(b, -1).contiguous(), assign.expand(b, -1).contiguous()
