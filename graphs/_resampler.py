"""The resampler that Qwen-VL and LLaVA-Mini share: a raster of learned queries, one cross-attention, positions on both sides.

With P the positions of the query raster, P' the same resized to the raster of the candidates (bicubic, a = -0.75, no antialiasing), and
LN layer norms: `Q = LN(query) + P`, `X = LN(x W)`, `K = X + P'`, `V = X`, and one multi-head attention, without a residual or a
feed-forward part.

Legend: b batch, n = rows * columns candidates, k queries, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tmc_export.graphs._attention import Shapes, packed_attention, packed_attention_weights, queries_of
from tmc_export.graphs._projector import dense, layer_norm, norm_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "cubic_matrix", "pair", "resample_by_queries", "resampler_weights", "resize_positions", "sincos_positions"]

Grid = tuple[int, int]


def pair(grid: int | Grid) -> Grid:
    """Return (rows, columns) of a raster that may be written as one side.

    >>> pair(4), pair((7, 14))
    ((4, 4), (7, 14))
    """
    return (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])


def resampler_weights(name: str, grid: Grid, width: int, arriving: int) -> Shapes:
    """Return the shapes; `kv_proj` only where the candidates are not `width` wide, as the official modules have it."""
    k = grid[0] * grid[1]
    found: Shapes = {f"{name}.query": (k, width), f"{name}.pos_embed": (k, width)}
    if arriving != width:
        found[f"{name}.kv_proj.weight"] = (width, arriving)
    for norm in ("ln_q", "ln_kv"):
        found |= norm_shapes(f"{name}.{norm}", width)
    return found | packed_attention_weights(f"{name}.attn", width)


def sincos_positions(width: int, grid: Grid) -> Tensor:
    """Return the fixed positions `[rows * columns, width]` that `pos_embed` holds in trained checkpoints; float32.

    The first half of the channels encodes the column, the second the row; each half is [sines, cosines] at frequencies
    `10000^(-4 i / width)`.

    Raises:
        ValueError: a width that does not divide by 4.
    """
    import torch

    if width % 4:
        raise ValueError(f"sine and cosine positions on two axes need a width that divides by 4, got {width}; choose another width")
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = []
    for length, shape in ((grid[1], (1, -1, 1)), (grid[0], (-1, 1, 1))):
        angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequency
        halves.append(torch.cat([angle.sin(), angle.cos()], dim=1).reshape(*shape[:2], width // 2).expand(*grid, -1))
    return torch.cat(halves, dim=2).reshape(-1, width).float()


def cubic_matrix(arriving: int, leaving: int) -> Tensor:
    """Return the `[leaving, arriving]` float32 weights of bicubic resizing of a line, borders repeated; rows sum to 1.

    The four neighbours of `z = (i + 1/2) * arriving / leaving - 1/2` at distance t weigh `1 - (a + 3) t^2 + (a + 2) t^3` for t <= 1 and
    `a (t^3 - 5 t^2 + 8 t - 4)` for 1 < t < 2, with a = -3/4 and no antialiasing.

    >>> cubic_matrix(2, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    import torch

    a = -0.75
    z = (torch.arange(leaving, dtype=torch.float32) + 0.5) * (arriving / leaving) - 0.5
    place = torch.arange(arriving, dtype=torch.float32).unsqueeze(0)
    total = torch.zeros(leaving, arriving)
    for step in (-1.0, 0.0, 1.0, 2.0):
        tap = z.floor() + step
        t = (z - tap).abs()
        near = 1.0 - (a + 3.0) * t**2 + (a + 2.0) * t**3
        far = a * (t**3 - 5.0 * t**2 + 8.0 * t - 4.0)
        weight = torch.where(t <= 1.0, near, far)
        hit = tap.clamp(0.0, float(arriving - 1)).unsqueeze(1) == place
        total = total + weight.unsqueeze(1) * hit.float()
    return total


def resize_positions(positions: Tensor, arriving: Grid, leaving: Grid) -> Tensor:
    """Resize positions `[rows * columns, c]` from one raster to another, bicubic in float32; unchanged where they are equal."""
    if arriving == leaving:
        return positions
    width = positions.shape[1]
    flat = cubic_matrix(arriving[0], leaving[0]) @ positions.float().reshape(arriving[0], arriving[1] * width)
    out = cubic_matrix(arriving[1], leaving[1]) @ flat.reshape(leaving[0], arriving[1], width)
    return out.reshape(-1, width).to(positions.dtype)


def resample_by_queries(
    tokens: Tensor, valid: Tensor, raster: Grid, weights: Mapping[str, Tensor], name: str, grid: Grid, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Resample candidates `[b, n, c']` of a raster into `[b, k, c]`; also the attention `[b, k, n]`, averaged over heads.

    Args:
        tokens: the candidates, without class tokens.
        valid: `[b, n]`; padding is seen by no query.
        raster: rows and columns of the candidates.
        weights: what `resampler_weights` declares.
        name: the prefix of its names.
        grid: rows and columns of the queries.
        heads: attention heads.
        eps: of the layer norms.
    """
    x = dense(tokens, weights, f"{name}.kv_proj") if f"{name}.kv_proj.weight" in weights else tokens
    x = layer_norm(x, weights, f"{name}.ln_kv", eps)
    positions = weights[f"{name}.pos_embed"]
    query = layer_norm(weights[f"{name}.query"], weights, f"{name}.ln_q", eps) + positions
    key = x + resize_positions(positions, grid, raster)
    return packed_attention(queries_of(query, x), key, x, weights, f"{name}.attn", heads, valid)
